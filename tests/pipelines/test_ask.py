"""The main job through the library: watch once, remember, answer from memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamvid.errors import SettingsError, SourceError
from streamvid.memory.bank import Bank
from streamvid.memory.records import State
from streamvid.models import checkpoints
from streamvid.session import used_bytes
from streamvid.temporal.methods.compose import Chain
from streamvid.toy.video import write_video
from streamvid.toy.world import sample_scene
from streamvid_pipelines import ask as pipeline
from streamvid_pipelines.ask import AskVideo, Loaded, Progress, Request, ask, load

SEED = 3


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "scene.mp4"
    write_video(sample_scene(SEED, clean=True), path, height=64, width=64, fps=10)
    return path


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    return load(Request(model="toy", threads=1), lambda text: None)


def open_video(path: Path, loaded: Loaded, folder: Path, **changes: Any) -> AskVideo:
    return AskVideo(path, replace(Request(model="toy"), **changes), loaded, Bank.open(folder))


def test_the_second_question_decodes_and_encodes_nothing(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    first = open_video(video, loaded, tmp_path).ask("what happens?").receipt
    again = open_video(video, loaded, tmp_path).ask("what happens?").receipt
    assert (first.cache, again.cache) == ("miss", "hit")
    assert first.frames_decoded > 0 and first.frames_encoded > 0
    assert (again.frames_decoded, again.frames_encoded) == (0, 0)
    assert again.tokens_given == first.tokens_given
    assert again.key == first.key


def test_a_hit_does_not_even_open_the_video(
    video: Path, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_video(video, loaded, tmp_path).ask("what happens?").text
    monkeypatch.setattr(pipeline, "open_source", None)
    assert open_video(video, loaded, tmp_path).ask("what happens?").text == before


@pytest.mark.parametrize(
    "changes",
    [
        {"fps": 1.0},
        {"max_frames": 8},
        {"start_seconds": 2.0},
        {"stop_seconds": 9.0},
        {"reduce": "none"},
        {"reduce": "rlt:threshold=0.2"},
    ],
    ids=str,
)
def test_any_other_setting_is_another_memory(
    video: Path, loaded: Loaded, tmp_path: Path, changes: dict[str, Any]
) -> None:
    open_video(video, loaded, tmp_path).prepare()
    other = open_video(video, loaded, tmp_path, **changes)
    other.prepare()
    assert other.receipt.cache == "miss"


def test_llm_methods_and_recall_share_one_memory(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    """They act when a question is asked, so one memory serves them all."""
    open_video(video, loaded, tmp_path, reduce="rlt").prepare()
    other = open_video(video, loaded, tmp_path, reduce="rlt,frame_fusion:cost=0.9", recall="uniform", budget=20)
    receipt = other.ask("what happens?").receipt
    assert receipt.cache == "hit"
    assert receipt.tokens_given == 20


def test_red_blue_green_clips_never_answer_for_each_other(loaded: Loaded, tmp_path: Path) -> None:
    """Frames of equal shape and number: only the content tells these memories apart."""
    import av

    colors = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (40, 60, 230)}
    features = {}
    for name, color in colors.items():
        path = tmp_path / f"{name}.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for _ in range(20):
                frame = av.VideoFrame.from_ndarray(
                    torch.tensor(color, dtype=torch.uint8).expand(64, 64, 3).contiguous().numpy(), format="rgb24"
                )
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        opened = open_video(path, loaded, tmp_path / "memory", reduce="none")
        opened.prepare()
        assert opened.receipt.cache == "miss"
        assert opened.source is not None
        spans = opened.bank.spans(opened.source.id)
        features[name] = opened.bank.read([(s, s.tokens) for s in spans])[0].features.mean(0)
    assert not torch.allclose(features["red"], features["blue"], atol=1e-3)
    assert not torch.allclose(features["red"], features["green"], atol=1e-3)


def test_reduce_none_keeps_every_token_and_gives_them_all(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    receipt = open_video(video, loaded, tmp_path, reduce="none").ask("what happens?").receipt
    assert receipt.tokens_seen == receipt.tokens_remembered == receipt.tokens_given == 16 * 16


def test_the_default_chain_saves_work_in_the_tower_on_a_still_camera(
    video: Path, loaded: Loaded, tmp_path: Path
) -> None:
    opened = open_video(video, loaded, tmp_path)
    opened.prepare()
    assert opened.receipt.tokens_encoded < opened.receipt.tokens_seen / 2
    assert opened.receipt.tokens_remembered <= opened.receipt.tokens_seen * 0.25 + 1


def test_the_budget_is_kept_and_what_was_read_is_in_the_receipt(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    receipt = open_video(video, loaded, tmp_path, reduce="none", budget=50).ask("what happens?").receipt
    assert receipt.tokens_given == 50 == sum(span.tokens for span in receipt.spans)
    assert receipt.budget == 50


def test_times_are_the_containers(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    opened = open_video(video, loaded, tmp_path, reduce="none", start_seconds=4.0, stop_seconds=9.5)
    receipt = opened.ask("what happens?").receipt
    assert (receipt.start_seconds, receipt.stop_seconds) == (4.0, 9.5)
    assert receipt.frames_remembered == 11
    assert receipt.spans[0].start_seconds == 4.0
    assert receipt.spans[-1].stop_seconds == 9.5


def test_no_span_reaches_beyond_the_end_of_the_video(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    write_video(sample_scene(SEED, seconds=16, clean=True), path, height=64, width=64, fps=10)
    opened = open_video(path, loaded, tmp_path / "memory", reduce="none", fps=0.7)
    opened.prepare()
    assert opened.source is not None
    assert opened.bank.spans(opened.source.id)[-1].stop == 16


def test_similarities_in_the_receipt_are_the_exact_ones(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    """The index finds what comparing with every key finds."""
    opened = open_video(video, loaded, tmp_path)
    receipt = opened.ask("what color is the ring?").receipt
    assert opened.source is not None and loaded.embedder is not None
    with torch.inference_mode():
        asked = loaded.embedder.texts(["what color is the ring?"])[0]
    ids, view = opened.bank.view(opened.source.id)
    exact = view.likeness(asked, torch.arange(len(ids)))
    found = torch.tensor([span.similarity for span in receipt.spans])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_citations_lie_in_spans_that_were_given(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    opened = open_video(video, loaded, tmp_path, budget=40)
    for question in ("what happens?", "when does the red cross appear?", "which shape comes last?"):
        answer = opened.ask(question)
        for start, stop in answer.spans:
            assert any(s.start_seconds <= start < s.stop_seconds for s in answer.receipt.spans)
            assert start < stop <= 16


def test_interrupted_watching_goes_on_where_it_stopped(
    video: Path, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CLIP_FRAMES", 8)
    whole = open_video(video, loaded, tmp_path / "whole", reduce="none")
    whole.prepare()

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.frames >= 16:
            raise Stop

    with pytest.raises(Stop):
        open_video(video, loaded, tmp_path / "cut", reduce="none").prepare(stop)
    resumed = open_video(video, loaded, tmp_path / "cut", reduce="none")
    resumed.prepare()
    assert resumed.receipt.cache == "partial"
    assert resumed.receipt.frames_sampled == 16
    assert resumed.receipt.frames_remembered == 32
    assert whole.source is not None and resumed.source is not None
    spans = [(s.start, s.stop, s.tokens) for s in whole.bank.spans(whole.source.id)]
    assert [(s.start, s.stop, s.tokens) for s in resumed.bank.spans(resumed.source.id)] == spans


def test_clips_of_large_frames_are_shorter_so_that_memory_is_bounded() -> None:
    assert pipeline.clip_frames(height=360, width=640) == 32
    for height, width in ((1080, 1920), (2160, 3840), (4320, 7680)):
        frames = pipeline.clip_frames(height=height, width=width)
        assert frames % 2 == 0 and 8 <= frames <= 32
        assert frames == 8 or frames * height * width * 3 <= pipeline.CLIP_BYTES


def test_without_an_embedder_recall_goes_by_time_and_says_so(video: Path, tmp_path: Path) -> None:
    """What a user of a real checkpoint has before an image-text encoder was downloaded."""
    settings = {"model": "toy", "embedder": "none", "threads": 1, "memory": tmp_path}
    for budget in (4096, 30):
        answer = ask(video, "when does the red cross appear?", budget=budget, **settings)[0]
        assert answer.text
        assert answer.receipt.tokens_given <= budget
        assert all(span.similarity is None for span in answer.receipt.spans)
        assert any("by time alone" in warning for warning in answer.receipt.warnings)


def test_a_checkpoint_folder_of_ones_own_is_loaded_like_any_other(video: Path, tmp_path: Path) -> None:
    from tests.models import tiny

    folder = tiny.write(tmp_path / "my-model")
    settings = {"embedder": "none", "threads": 1, "memory": tmp_path / "memory", "max_new_tokens": 4}
    first = ask(video, "what happens?", model=str(folder), **settings)[0]
    assert first.receipt.model.startswith("my-model")
    for dtype in ("float32", "bfloat16"):
        again = ask(video, "what happens?", model=str(folder), dtype=dtype, **settings)[0]
        assert again.receipt.cache == ("hit" if dtype == "float32" else "miss")


def test_the_budget_steps_down_to_what_the_model_can_read(video: Path, tmp_path: Path) -> None:
    from tests.models import tiny

    folder = tiny.write(tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 600
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"model": str(folder), "embedder": "none", "threads": 1, "max_new_tokens": 2, "memory": tmp_path / "m"}
    tight = ask(video, "what happens?", reduce="none", **settings)[0].receipt
    assert any("lowered" in warning for warning in tight.warnings)
    assert tight.tokens_given < tight.tokens_remembered and tight.prompt_tokens < 600
    loose = ask(video, "what happens?", reduce="rlt", **settings)[0].receipt
    assert not any("lowered" in warning for warning in loose.warnings)


def test_the_budget_steps_down_to_what_memory_may_hold(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    opened = open_video(video, loaded, tmp_path, reduce="none")
    opened.prepare()
    adapter = loaded.adapter
    room = used_bytes("cpu") + 64 * 2**20
    assert adapter.token_bytes > 4 * adapter.info.num_layers * adapter.info.hidden_size
    tight = open_video(video, loaded, tmp_path, reduce="none", ram_bytes=room)
    tight.session.limits = replace(tight.session.limits, ram_bytes=used_bytes("cpu") + 150 * adapter.token_bytes)
    receipt = tight.ask("what happens?").receipt
    assert 0 < receipt.tokens_given <= 150 < receipt.tokens_remembered
    assert any("limit on memory" in warning for warning in receipt.warnings)
    full = open_video(video, loaded, tmp_path, reduce="none", ram_bytes=1 << 20)
    with pytest.raises(SettingsError, match="no room for a token"):
        full.ask("what happens?")


def test_a_source_that_is_kept_is_pinned(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    opened = open_video(video, loaded, tmp_path, keep=True)
    opened.prepare()
    assert opened.source is not None and opened.source.pinned
    assert open_video(video, loaded, tmp_path).bank.sources()[0].pinned


def test_fresh_forgets_and_watches_again(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    open_video(video, loaded, tmp_path).prepare()
    again = open_video(video, loaded, tmp_path, fresh=True)
    again.prepare()
    assert again.receipt.cache == "miss"
    assert len(again.bank.sources()) == 1
    assert again.source is not None and again.source.state is State.COMPLETE


def test_two_processes_share_a_memory(video: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path; from streamvid_pipelines.ask import ask\n"
        f"a = ask({str(video)!r}, ['what happens?'], model='toy', threads=1, memory=Path({str(tmp_path)!r}))\n"
        "print(json.dumps([a[0].text, a[0].receipt.cache, a[0].receipt.frames_encoded]))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    ]
    assert runs[0][1] == "miss"
    assert runs[1] == [runs[0][0], "hit", 0]


def test_progress_comes_with_numbers(
    video: Path, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CLIP_FRAMES", 8)
    seen: list[Progress] = []
    open_video(video, loaded, tmp_path).prepare(seen.append)
    assert [p.frames for p in seen] == [8, 16, 24, 32]
    assert seen[-1].seconds_done == seen[-1].seconds_total == 16.0
    assert seen[0].speed > 0 and seen[-1].eta_seconds == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 0}, "at least 1"),
        ({"reduce": "frame_fuson"}, "frame_fusion"),
        ({"reduce": "fastvid:keep_ratoi=0.2"}, "keep_ratio"),
        ({"reduce": "fastvid,rlt"}, "order"),
        ({"recall": "rlt"}, "does not recall"),
        ({"reduce": "uniform"}, "--recall"),
        ({"model": "tyo"}, "toy"),
        ({"device": "cuda:77"}, "doctor"),
        ({"fps": 0.0}, "fps"),
        ({"dtype": "int3"}, "dtype"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line_that_teaches(
    video: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        ask(video, "what happens?", **({"model": "toy", "memory": tmp_path} | changes))
    assert "\n" not in str(caught.value)


def test_an_empty_question_is_refused(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="empty"):
        open_video(video, loaded, tmp_path).ask("  ")


def test_a_missing_file_is_found_out_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load", None)
    with pytest.raises(SourceError):
        ask(tmp_path / "nothing.mp4", "what happens?", memory=tmp_path)


def test_auto_without_any_model_says_so_unmistakably(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(checkpoints, "cached", lambda repository: None)
    answer = ask(video, "what happens?", model="auto", memory=tmp_path, threads=1)[0]
    assert any("TOY" in warning for warning in answer.receipt.warnings)
    with pytest.raises(checkpoints.errors.UnsupportedError, match="--no-toy"):
        ask(video, "what happens?", model="auto", memory=tmp_path, toy_allowed=False)


def test_a_family_without_adapter_is_named(tmp_path: Path, video: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(checkpoints.errors.UnsupportedError, match="'llama'"):
        ask(video, "what happens?", model=str(folder), memory=tmp_path)


def test_the_chain_is_part_of_the_key_only_as_far_as_it_acts_at_ingest() -> None:
    full = Chain.parse("rlt,fastvid,frame_fusion").describe(ingest_only=True)
    assert full == Chain.parse("rlt,fastvid").describe(ingest_only=True)
    assert full != Chain.parse("rlt").describe(ingest_only=True)
