"""Recall as an answer shows it: the time asked about, the scores, and what is said where nothing is remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import streamvid.session as session_module
from streamvid.errors import SettingsError, Vanished
from streamvid.memory.bank import Bank
from streamvid.query.looking import Looking, Seen
from streamvid.recollection import Recollection
from streamvid.signals import Signals
from streamvid.temporal.methods.base import LayerView
from streamvid.toy.video import write_video
from streamvid.toy.world import Event, Scene, sample_scene
from streamvid_pipelines.ask import AskVideo, Loaded, Request, load

SEED, SECONDS = 5, 40


@pytest.fixture(scope="module")
def scene() -> Scene:
    return sample_scene(SEED, seconds=SECONDS, clean=True)


@pytest.fixture(scope="module")
def folder(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    write_video(scene, folder / "scene.mp4", height=64, width=64, fps=4)
    return folder


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(Request(model="toy", threads=1), lambda text: None)


@pytest.fixture
def open_video(folder: Path, loaded: Loaded) -> Iterator[Any]:
    with Bank.open(folder / "memory") as bank:
        base = Request(model="toy", reduce="none", threads=1)
        yield lambda **changes: AskVideo(folder / "scene.mp4", replace(base, **changes), loaded, bank)


def test_only_the_time_that_was_asked_about_is_read(open_video: Any) -> None:
    receipt = open_video().ask("what happens between 0:08 and 0:16?").receipt
    assert receipt.time.ranges == [(8.0, 16.0)]
    assert receipt.time.words == ["between 0:08 and 0:16"]
    assert receipt.spans
    assert all(span.start_seconds < 16 and span.stop_seconds > 8 for span in receipt.spans)
    assert receipt.time.spans == len(receipt.spans) < len(open_video().ask("what happens?").receipt.spans)
    assert 'time: 8.0-16.0 s ("between 0:08 and 0:16")' in receipt.short()
    assert json.loads(json.dumps(receipt.to_dict()))["time"]["ranges"] == [[8.0, 16.0]]


def test_where_nothing_is_remembered_the_answer_says_so_and_nothing_is_widened(open_video: Any) -> None:
    video = open_video()
    pieces: list[str] = []
    answer = video.ask("what happens at 9:00?", pieces.append)
    assert answer.text == "".join(pieces) == "nothing is remembered of 08:59-09:01; the memory covers 00:00-00:40"
    assert answer.spans == ()
    assert (answer.receipt.tokens_given, answer.receipt.spans, answer.receipt.new_tokens) == (0, [], 0)
    assert "the model was not asked" in answer.receipt.warnings[-1]
    after = video.ask("what happens?").receipt
    assert after.time is None
    assert not any("nothing is remembered" in text for text in after.warnings), "a warning about another question"


def test_where_nothing_changed_the_picture_before_is_read(
    folder: Path, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static spans are not stored at all: that is no reason to say that nothing is remembered of them."""
    with Bank.open(tmp_path) as bank:
        video = AskVideo(folder / "scene.mp4", Request(model="toy", reduce="rlt", threads=1), loaded, bank)
        video.prepare()
        assert video.source is not None
        _, view = bank.view(video.source.id)
        holes = (view.start_seconds[1:] - view.stop_seconds[:-1] >= 3).nonzero()
        assert len(holes), "the scene must have a still stretch"
        before = int(holes[0])
        start = int(view.stop_seconds[before]) + 1
        receipt = video.ask(f"what happens between 0:{start:02} and 0:{start + 1:02}?").receipt
        assert [span.start_seconds for span in receipt.spans] == [float(view.start_seconds[before])]
        lost = type("Lost", (), {"start": start - 1, "stop": start + 5, "reason": "connection refused"})
        monkeypatch.setattr(bank, "gaps", lambda source_id: [lost])
        text = video.ask(f"what happens between 0:{start:02} and 0:{start + 1:02}?").text
        assert text.startswith("nothing is remembered of"), "a gap is not a still picture"
        assert "connection refused" in text


def test_an_event_in_the_question_sets_the_time(open_video: Any, scene: Scene) -> None:
    event: Event = scene.events[len(scene.events) // 2]
    receipt = open_video().ask(f"how many shapes are there before the {event.name} appears?").receipt
    (start, stop) = receipt.time.ranges[0]
    assert start == 0
    assert stop == pytest.approx(event.end_seconds, abs=1.0), "up to the event and with it"
    assert f"the {event.name}" in receipt.time.notes[0]


def test_an_event_that_never_was_sets_no_time_and_is_said(open_video: Any, scene: Scene) -> None:
    receipt = open_video().ask("how many shapes are there before the dog in the kitchen appears?").receipt
    if receipt.time is None:
        assert any("was not found clearly" in text for text in receipt.warnings)
    else:
        assert "was found at" in receipt.time.notes[0]


def test_every_answer_names_policy_settings_spans_and_scores(open_video: Any) -> None:
    receipt = open_video(recall="relevance:neighbours=0", budget=70).ask("which shape is red?").receipt
    assert receipt.recall == "relevance"
    assert receipt.recall_settings == {"neighbours": 0}
    assert sum(span.tokens for span in receipt.spans) == receipt.tokens_given == 70
    assert all(span.similarity is not None and span.attention is None for span in receipt.spans)
    best = max(receipt.spans, key=lambda span: span.similarity)
    assert best.tokens == best.stored


def test_attention_scores_are_in_the_receipt_and_finite(open_video: Any) -> None:
    receipt = open_video(recall="attention:neighbours=0", budget=70).ask("what color is the circle?").receipt
    assert receipt.spans
    assert all(span.attention is not None and 0 <= span.attention < 100 for span in receipt.spans)
    assert receipt.tokens_given == 70


def test_the_model_is_asked_a_bounded_number_of_tokens_at_a_time(
    open_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass holds at most what is set, whatever the memory; and nothing is left on the model."""
    monkeypatch.setattr(session_module, "LOOKED_AT_TOKENS", 16)
    video = open_video(recall="attention:tokens_each=4", budget=30)
    sizes: list[int] = []
    adapter = video.session.adapter
    generate = adapter.generate

    def counted(prompt: Any, **rest: Any) -> Any:
        sizes.append(int(prompt.visual.sum()))
        return generate(prompt, **rest)

    monkeypatch.setattr(adapter, "generate", counted)
    video.ask("what color is the circle?")
    assert len(sizes) > 2
    assert max(sizes[:-1]) <= 16, "the last pass is the answer"
    assert not any("forward" in layer.__dict__ for layer in adapter.model.model.language_model.layers)


def test_looking_reads_the_opening_and_the_question_and_stops_at_its_depth() -> None:
    cell = torch.tensor([-1, -1, -1, 0, 1, -1, -1])  # opening, stamp, mark, two visual tokens, two that ask
    rows = torch.tensor([[[0.2, 0.2, 0.1, 0.3, 0.1, 0.1, 0.0]] * 2])
    probe = Looking(depth=0.0, question=2)
    view = LayerView(
        index=0,
        num_layers=4,
        after_attention=True,
        hidden=torch.zeros(7, 2),
        cell=cell,
        positions=torch.arange(7),
        original_length=7,
        attention=lambda count: rows[:, -count:],
    )
    with pytest.raises(Seen):
        probe.reduce_layer(view, Signals())
    assert probe.scores is not None
    torch.testing.assert_close(probe.scores, torch.tensor([0.3 / 0.4, 0.1 / 0.4]).log1p())
    deeper = Looking(depth=1.0, question=2)
    deeper.reduce_layer(view, Signals())
    assert deeper.scores is not None, "a first layer among others does not stop the pass"


def test_a_policy_that_needs_an_encoder_is_refused_when_put_together(
    folder: Path, loaded: Loaded, tmp_path: Path
) -> None:
    request = Request(model="toy", recall="mmr")
    with Bank.open(tmp_path) as bank, pytest.raises(SettingsError, match="--recall coverage"):
        AskVideo(folder / "scene.mp4", request, Loaded(loaded.adapter, None), bank)


@pytest.mark.parametrize("lost, said", [(1, None), (9, "ask again")])
def test_what_was_merged_meanwhile_is_looked_up_again(
    open_video: Any, monkeypatch: pytest.MonkeyPatch, lost: int, said: str | None
) -> None:
    """A camera's memory is merged while it is asked; only if that goes on for ever is the user told."""
    video = open_video()
    read, calls = Recollection.records, []

    def records(memory: Recollection, rows: torch.Tensor) -> Any:
        calls.append(len(rows))
        if len(calls) <= lost:
            raise Vanished("2 of 5 spans were merged; ask again")
        return read(memory, rows)

    monkeypatch.setattr(Recollection, "records", records)
    if said is None:
        assert video.ask("what color is the circle?").receipt.tokens_given > 0
        assert len(calls) == 2
    else:
        with pytest.raises(Vanished, match=said):
            video.ask("what color is the circle?")
        assert len(calls) == 3
