"""Watching and asking at once: what is remembered, what is said of gaps, and what happens under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import streamvid_pipelines.live.engine as module
from streamvid.errors import BankError, SettingsError, SourceError
from streamvid.frames import Frame
from streamvid.ingest.supervised import Gap, Notice
from streamvid.memory.bank import Bank
from streamvid.memory.records import SourceRecord
from streamvid.tokens import VideoTokens
from streamvid.toy.world import Scene, sample_scene
from streamvid_pipelines.ask import Loaded, Request, load
from streamvid_pipelines.live.engine import STAYED_AWAY, Live, Said
from streamvid_pipelines.live.settings import CameraRequest, LiveRequest
from tests.live.cameras import NOON, FakeCamera, Item, frame


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(Request(model="toy", threads=1), lambda text: None)


@pytest.fixture
def request_(tmp_path: Path) -> LiveRequest:
    return LiveRequest(model="toy", memory=tmp_path, fps=2, overload="all", disk_bytes=None, threads=1)


@pytest.fixture
def cameras(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sequence[Item]]:
    """Put items under the name of a source; a camera of that source gives them."""
    items: dict[str, Sequence[Item]] = {}

    def made(source: str, *, origin: datetime | None = None, **_: Any) -> FakeCamera:
        return FakeCamera(items[source], origin=origin, name=source)

    monkeypatch.setattr(module, "Supervised", made)
    return items


def scene_frames(scene: Scene, *, fps: int = 2) -> list[Item]:
    """A toy scene as a camera sees it."""
    times = [Fraction(n, fps) for n in range(scene.seconds * fps)]
    pictures = torch.from_numpy(scene.draw([float(at) for at in times], height=64, width=64))
    return [Frame(picture, at, Fraction(1, fps)) for picture, at in zip(pictures, times, strict=True)]


def watch(request: LiveRequest, loaded: Loaded, *names: str, **rest: Any) -> list[Said]:
    said: list[Said] = []
    with Live([CameraRequest(name, name) for name in names], request, loaded, say=said.append, **rest) as live:
        assert live.wait(60)
    return said


@contextmanager
def remembered(request: LiveRequest, name: str) -> Iterator[tuple[Bank, SourceRecord]]:
    with Bank.open(request.folder) as bank:
        yield bank, bank.source(name)


def gaps(bank: Bank, source: SourceRecord) -> list[tuple[float, float, str]]:
    return [(float(gap.start), float(gap.stop), gap.reason) for gap in bank.gaps(source.id)]


def test_what_was_watched_is_remembered_with_its_times_and_gaps(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    gap = Gap(Fraction(10), Fraction(40), "connection refused")
    cameras["front"] = [
        Notice(Fraction(0), "connected", "front: h264"),
        *(frame(n / 2) for n in range(20)),
        Notice(Fraction(10), "lost", "front is lost"),
        gap,
        *(frame(40 + n / 2) for n in range(20)),
    ]
    said = watch(request_, loaded, "front")
    assert [(one.kind, one.at) for one in said] == [("connected", NOON), ("lost", NOON + timedelta(seconds=10))]
    with remembered(request_, "front") as (bank, source):
        spans = bank.spans(source.id)
        assert spans[0].start == 0 and spans[-1].stop == 50
        assert all(span.stop <= 10 or span.start >= 40 for span in spans), "no span reaches into the gap"
        assert gaps(bank, source) == [(10, 40, "connection refused")]
        assert source.summary["origin"] == NOON.isoformat() and source.summary["watched_until"] == 50
        assert source.summary["frames_remembered"] == 40


def test_the_same_name_goes_on_with_its_memory(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    """The clock is that of the first run; the time between is a gap."""
    cameras["front"] = [frame(n / 2) for n in range(16)]
    watch(request_, loaded, "front")
    cameras["front"] = [frame(100 + n / 2) for n in range(16)]
    watch(request_, loaded, "front")
    with remembered(request_, "front") as (bank, source):
        assert len(bank.sources()) == 1
        assert bank.spans(source.id)[-1].stop == 108
        assert gaps(bank, source) == [(8, 100, STAYED_AWAY)]
        assert source.summary["frames_remembered"] == 32


def test_a_file_that_stands_in_goes_on_where_it_ended(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    for _ in range(2):
        cameras["film"] = [frame(n / 2) for n in range(16)]
        watch(request_, loaded, "film")
    with remembered(request_, "film") as (bank, source):
        spans = bank.spans(source.id)
        assert spans[-1].stop == 16 and not bank.gaps(source.id)
        assert all(a.stop <= b.start for a, b in zip(spans, spans[1:], strict=False))


def tokens_of(request: LiveRequest, name: str) -> list[VideoTokens]:
    with remembered(request, name) as (bank, source):
        spans = bank.spans(source.id)
        assert spans
        return bank.read([(span, span.tokens) for span in spans])


def test_many_streams_share_a_model_and_nothing_else(
    tmp_path: Path, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    """Each remembers exactly what it remembers when it is alone, whatever the others show between its clips."""
    names = ("a", "b", "c")
    for number, name in enumerate(names):
        cameras[name] = scene_frames(sample_scene(number, seconds=24, clean=True))
    together = LiveRequest(model="toy", memory=tmp_path / "all", fps=2, overload="all", codec="fp32", threads=1)
    watch(together, loaded, *names)
    for name in names:
        alone = LiveRequest(model="toy", memory=tmp_path / name, fps=2, overload="all", codec="fp32", threads=1)
        watch(alone, loaded, name)
        for one, other in zip(tokens_of(together, name), tokens_of(alone, name), strict=True):
            torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-5)
            assert torch.equal(one.position, other.position)
            assert torch.equal(one.pts_seconds, other.pts_seconds)


def test_clip_by_clip_is_all_at_once(tmp_path: Path, loaded: Loaded, cameras: dict[str, Sequence[Item]]) -> None:
    """The default reduction decides each frame by the past alone: the length of clips does not change what stays."""
    kept = []
    for length in (4, 16):
        cameras["a"] = scene_frames(sample_scene(3, seconds=24, clean=True))
        request = LiveRequest(
            model="toy", memory=tmp_path / str(length), fps=2, overload="all", codec="fp32", reduce="rlt",
            clip_frames=length, threads=1,
        )  # fmt: skip
        watch(request, loaded, "a")
        kept.append(VideoTokens.cat(tokens_of(request, "a")))
    short, long = kept
    assert torch.equal(short.pts_seconds, long.pts_seconds)
    assert torch.equal(short.position[:, 1:], long.position[:, 1:])
    torch.testing.assert_close(short.features, long.features, rtol=0, atol=1e-4)


def test_a_question_is_answered_while_it_watches(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    """Everything that came before the question counts, whole clip or not."""
    go_on = threading.Event()
    cameras["front"] = [
        *scene_frames(sample_scene(5, seconds=21, clean=True)),
        go_on,
        *[frame(21 + n / 2) for n in range(8)],
    ]
    with Live([CameraRequest("front", "front")], request_, loaded) as live:
        while live.cameras[0].feed.counts.frames < 42:
            time.sleep(0.01)
        pieces: list[str] = []
        answer = live.ask("what happens?", on_text=pieces.append).result(60)
        assert "".join(pieces).strip() == answer.text
        assert answer.receipt.stop_seconds >= 20.5
        assert answer.origin == NOON and answer.to_dict()["wall"]
        go_on.set()
        assert live.wait(60)
    with remembered(request_, "front") as (bank, source):
        assert [said.question for said in bank.answers(source.id)] == ["what happens?"]


def test_a_question_about_a_gap_is_told_of_it(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    held = threading.Event()
    cameras["front"] = [
        *(frame(n / 2) for n in range(20)), Gap(Fraction(10), Fraction(400), "connection refused"),
        *(frame(400 + n / 2) for n in range(16)), held,
    ]  # fmt: skip
    with Live([CameraRequest("front", "front")], request_, loaded) as live:
        while live.cameras[0].feed.counts.frames < 36:
            time.sleep(0.01)
        lost = live.ask("what happened between 12:01 and 12:02?").result(60)
        assert lost.receipt.tokens_given == 0
        gap = "no video 12:00:10-12:06:40: connection refused"
        assert lost.text.startswith(f"nothing is remembered of 12:01:00-12:02:00 ({gap})")
        partly = live.ask("what happened in the last five minutes?").result(60)
        assert any(gap in text for text in partly.receipt.warnings)
        whole = live.ask("what happens?").result(60)
        assert whole.receipt.tokens_given > 0
        held.set()


def test_an_outage_that_lasts_is_on_record_before_it_ends(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NOTE_SECONDS", 0.0)
    held = threading.Event()
    cameras["front"] = [*(frame(n / 2) for n in range(16)), Notice(Fraction(8), "lost", "front: no route"), held]
    with Live([CameraRequest("front", "front")], request_, loaded) as live:
        camera = live.cameras[0]
        camera.events.open_gap = Gap(Fraction(8), Fraction(100), "no route")  # type: ignore[misc]
        answer = live.ask("what is there right now?").result(60)
        assert "no route" in answer.text and answer.receipt.tokens_given == 0
        with Bank.open(request_.folder, read_only=True) as bank:
            assert gaps(bank, bank.source("front")) == [(8, 100, "no route")]
        camera.events.open_gap = Gap(Fraction(8), Fraction(130), "no route")  # type: ignore[misc]
        live.ask("what is there right now?").result(60)
        with Bank.open(request_.folder, read_only=True) as bank:
            assert gaps(bank, bank.source("front")) == [(8, 130, "no route")], "it is one gap still"
        held.set()


def test_a_model_that_is_too_slow_falls_behind_no_further_than_the_buffer(
    tmp_path: Path, loaded: Loaded, cameras: dict[str, Sequence[Item]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera a hundred times faster than its clock, and a model that sleeps: lag and memory stay bounded."""
    request = LiveRequest(model="toy", memory=tmp_path, fps=2, overload="adaptive", buffer_frames=16, threads=1)
    lags, waiting = [], []

    class Paced(FakeCamera):
        def __iter__(self) -> Iterator[Any]:
            for item in super().__iter__():
                time.sleep(0.005)
                yield item

    frames = [frame(n / 2, value=n % 7 * 30) for n in range(600)]
    monkeypatch.setattr(module, "Supervised", lambda source, **_: Paced(frames))

    def slow(camera: module.Camera, *_: Any) -> None:
        lags.append(camera.lag_seconds)
        waiting.append(camera.feed.waiting)
        time.sleep(0.1)

    watch(request, loaded, "fast", on_watched=slow)
    with remembered(request, "fast") as (bank, source):
        assert bank.spans(source.id)[-1].stop >= 299
    assert max(waiting) <= 16
    assert max(lags) <= 16 * 32 / 2, "the buffer at the coarsest rate"
    assert len(lags) > 10


def test_no_stream_starves_another(request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]) -> None:
    """A stream that always has a clip ready does not keep the others from theirs."""
    cameras["busy"] = [frame(n / 2) for n in range(400)]
    cameras["calm"] = [frame(n / 2) for n in range(40)]
    order: list[str] = []
    watch(request_, loaded, "busy", "calm", on_watched=lambda camera, *_: order.append(camera.request.name))
    last = max(index for index, name in enumerate(order) if name == "calm")
    assert last < len(order) / 2 + 2, order


def test_what_makes_no_sense_is_said_at_once(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    cameras["a"] = [threading.Event()]
    cameras["b"] = [threading.Event()]
    with pytest.raises(SettingsError, match="two streams are called 'a'"):
        Live([CameraRequest("a", "a"), CameraRequest("a", "b")], request_, loaded)
    with pytest.raises(SettingsError, match="nothing to watch"):
        Live([], request_, loaded)
    with Live([CameraRequest("a", "a"), CameraRequest("b", "b")], request_, loaded) as live:
        with pytest.raises(SettingsError, match="which stream"):
            live.ask("who came?")
        with pytest.raises(SettingsError, match="did you mean|known"):
            live.ask("who came?", stream="c")
        with pytest.raises(SettingsError, match="nothing was seen of a yet"):
            live.ask("who came?", stream="a").result(60)
        with pytest.raises(BankError, match="is being written by process"):
            with Live([CameraRequest("a", "a")], request_, loaded):
                pass


def test_a_source_that_fails_for_good_ends_it_with_its_reason(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    cameras["a"] = [frame(0), SourceError("a: wrong password")]
    with pytest.raises(SourceError, match="wrong password"):
        watch(request_, loaded, "a")
    with remembered(request_, "a") as (bank, source):
        assert len(bank.spans(source.id)) == 1, "what came before stays"


def test_questions_after_the_end_are_refused(
    request_: LiveRequest, loaded: Loaded, cameras: dict[str, Sequence[Item]]
) -> None:
    cameras["a"] = [frame(0), frame(0.5)]
    with Live([CameraRequest("a", "a")], request_, loaded) as live:
        assert live.wait(60)
        with pytest.raises(Exception, match="not watched any more|watching has ended"):
            live.ask("who came?").result(10)
        assert not live.status()["running"]
