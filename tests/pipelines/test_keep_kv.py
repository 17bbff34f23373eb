"""The second question is prefilled from what the first one left, in one process and in the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamvid.budget import Limits
from streamvid.memory.bank import Bank
from streamvid.toy.video import write_video
from streamvid.toy.world import sample_scene
from streamvid_pipelines.ask import AskVideo, Loaded, Request, load

FIRST, SECOND = "what happens?", "how many shapes are there?"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "scene.mp4"
    write_video(sample_scene(3, clean=True), path, height=64, width=64, fps=10)
    return path


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(Request(model="toy", threads=1), lambda text: None)


def opened(video: Path, loaded: Loaded, memory: Path, **changes: Any) -> AskVideo:
    request = replace(Request(model="toy", reduce="rlt"), **changes)
    return AskVideo(video, request, loaded, Bank.open(memory, limits=request.limits()))


def kept(memory: Path) -> list[Path]:
    return sorted((memory / "kv").glob("*"))


def test_questions_in_one_session_share_the_video_part(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    session = opened(video, loaded, tmp_path)
    first, second, again = (session.ask(text) for text in (FIRST, SECOND, FIRST))
    assert first.receipt.reused_tokens == 0
    assert second.receipt.reused_tokens == again.receipt.reused_tokens > first.receipt.tokens_given
    assert second.text == opened(video, loaded, tmp_path).ask(SECOND).text
    assert again.text == first.text
    assert kept(tmp_path) == []  # nothing is written that was not asked for


def test_methods_inside_the_model_share_nothing(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    session = opened(video, loaded, tmp_path, reduce="rlt,frame_fusion")
    assert [session.ask(text).receipt.reused_tokens for text in (FIRST, SECOND)] == [0, 0]


def test_kept_keys_and_values_serve_the_next_process(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    plain = opened(video, loaded, tmp_path).ask(SECOND)
    first = opened(video, loaded, tmp_path, keep_kv=True, reduce="rlt,frame_fusion").ask(FIRST).receipt
    assert first.reused_tokens == 0 and len(kept(tmp_path)) == 1
    assert any("frame_fusion left out" in warning for warning in first.warnings)
    stamp = kept(tmp_path)[0].stat().st_mtime_ns
    second = opened(video, loaded, tmp_path, keep_kv=True).ask(SECOND)
    assert second.receipt.reused_tokens > second.receipt.tokens_given > 0
    assert second.text == plain.text
    assert kept(tmp_path)[0].stat().st_mtime_ns == stamp  # what is there already is not written again
    # Without the option nothing of it is used.
    assert opened(video, loaded, tmp_path).ask(SECOND).receipt.reused_tokens == 0


def test_other_spans_another_setting_and_damage_are_no_hit(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    def ask(**changes: Any) -> tuple[str, int]:
        answer = opened(video, loaded, tmp_path, keep_kv=True, **changes).ask(FIRST)
        return answer.text, answer.receipt.reused_tokens

    whole = ask()
    assert whole[1] == 0 and ask()[1] > 0
    assert ask(recall="uniform", budget=12)[1] < 12  # a prefix at most
    assert ask(reduce="rlt:threshold=0.3")[1] == 0
    assert ask() == whole or ask()[1] > 0
    path = next(p for p in kept(tmp_path) if p.stat().st_size == max(q.stat().st_size for q in kept(tmp_path)))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert ask()[0] == whole[0]


def test_what_does_not_fit_the_limit_is_said_and_not_kept(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    opened(video, loaded, tmp_path).prepare()
    with Bank.open(tmp_path) as bank:
        limit = bank.usage() + 1000
    receipt = opened(video, loaded, tmp_path, keep_kv=True, disk_bytes=limit).ask(FIRST).receipt
    assert any("are not kept" in warning for warning in receipt.warnings)
    assert kept(tmp_path) == []


def test_it_counts_as_memory_and_goes_with_its_source(video: Path, loaded: Loaded, tmp_path: Path) -> None:
    ask = opened(video, loaded, tmp_path, keep_kv=True)
    ask.prepare()
    with Bank.open(tmp_path, limits=Limits()) as bank:
        before = bank.usage()
        ask.ask(FIRST)
        assert bank.usage() - before >= kept(tmp_path)[0].stat().st_size > 10_000
        assert ask.source is not None
        bank.remove(ask.source)
        assert kept(tmp_path) == []
