"""A day before a camera: does watching stay flat, is nothing lost unsaid, and are answers about times right?

A toy stream of many scenes, one after another, with outages between them, is watched by the engine that
``streamvid live`` runs, on a camera whose clock goes as fast as the engine follows; once an hour it does not wait
(``rush``), as when a model is too slow, and frames are left out.  The memory has a disk limit that is reached.  At
known moments the stream stands still and questions are asked:

``now``      "what color is the circle right now?": ten seconds back
``ago``      "... about ten minutes ago?": two minutes around that
``clock``    "... at 14:05:10?" and "... between 14:05:10 and 14:06:00?", within the last hour
``earlier``  the same, an hour back or more, where memory was thinned out for the disk limit
``gap``      a moment of an outage, or now while one lasts: right only if the answer says that there is no video
             and why; an answer from another time is wrong

Asked is what has one right answer about the events in the time asked about (`toy.questions`), whatever else the
stream showed before and after; an answer counts only if it is exactly right.  "When" is left out: the toy model
counts to 3599 seconds.  Windows whose border cuts an event, or that a rush thinned out, are not asked about.
``alone`` is what the model can do: the same frames alone, watched afresh and asked without the words of time.
``uniform`` and ``recent`` are the floors: evenly spaced spans and the last ones, of all that is remembered and at
the same budget.

Not measured: decoding and the network (see ``tests/ingest``), real models, more than one camera.

    python benchmarks/live.py --hours 24
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import random
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import streamvid_pipelines.live.engine as engine
from streamvid.budget import Limits
from streamvid.frames import Clip, Frame
from streamvid.ingest.supervised import Gap, Notice
from streamvid.memory.bank import Bank
from streamvid.memory.keys import MemoryKey
from streamvid.memory.verify import verify
from streamvid.query.when import When
from streamvid.receipt import Receipt
from streamvid.session import Session
from streamvid.temporal.methods.compose import Chain
from streamvid.toy.questions import ask_all
from streamvid.toy.world import Event, Scene, sample_scene
from streamvid_pipelines.ask import Loaded, Request, load
from streamvid_pipelines.live.engine import Live
from streamvid_pipelines.live.settings import CameraRequest, LiveRequest

ORIGIN = datetime(2026, 3, 4, 9, 30, tzinfo=UTC)
FPS = 2
SIDE = 64
REASONS = ("connection refused", "no picture for 10 s", "no route to host")
RUSH_SECONDS = 120
NOW, AGO, REACH = 10, 600, 60
"""What is understood of "right now" and of "about ten minutes ago", in seconds."""

KEY = MemoryKey(content="alone", sampling={}, model="toy", processor="toy", methods=[], embedder="toy")
KINDS = ("now", "ago", "clock", "earlier", "gap")


@dataclass(frozen=True)
class Piece:
    """One scene or, without one, one outage."""

    start: int
    stop: int
    scene: Scene | None = None
    reason: str = ""


@dataclass(frozen=True)
class Shown:
    """An event on the clock of the stream."""

    event: Event
    start: int
    stop: int


@dataclass(frozen=True)
class Ask:
    """A question put when the stream has come to ``at``."""

    at: int
    kind: str
    subject: str
    """Kind of the toy question; "gap" for one about an outage."""

    question: str
    answer: str
    """The one right answer; of a gap the reason for it."""

    plain: str
    """The question without the words of time."""

    window: tuple[int, int]


@dataclass
class Stream:
    """What a camera shows for some hours, and everything that is known of it; the same for the same seed."""

    seconds: int
    pieces: list[Piece]
    events: list[Shown]
    rushes: list[tuple[int, int]]

    @classmethod
    def of(cls, seconds: int, *, seed: int = 0, outage_seconds: int = 1500, rush: bool = True) -> Stream:
        """Scenes of 20 to 60 s with up to two events; an outage about every ``outage_seconds``; a rush an hour."""
        rng = random.Random(seed)
        pieces: list[Piece] = []
        events: list[Shown] = []
        clock, due = 0, rng.randrange(outage_seconds // 2, outage_seconds)
        while clock < seconds:
            if clock >= due and seconds - clock > 60:
                length = min(rng.choice((20, 45, 90, 200, 400)), seconds - clock - 30)
                pieces.append(Piece(clock, clock + length, reason=rng.choice(REASONS)))
                due = clock + length + rng.randrange(outage_seconds // 2, outage_seconds * 3 // 2)
            else:
                length = min(rng.randrange(20, 61), max(8, seconds - clock))
                count = rng.choice((0, 1, 1, 1, 2))
                scene = sample_scene(seed * 1_000_003 + clock, seconds=length, events=count, held_out=False)
                pieces.append(Piece(clock, clock + length, scene))
                events += [Shown(e, clock + e.start_seconds, clock + e.end_seconds) for e in scene.events]
            clock += length
        rushes = [(at, at + RUSH_SECONDS) for at in range(2400, clock - 600, 3600)] if rush else []
        return cls(clock, pieces, events, rushes)

    @property
    def gaps(self) -> list[Gap]:
        """The outages."""
        return [Gap(Fraction(p.start), Fraction(p.stop), p.reason) for p in self.pieces if p.scene is None]

    def seen(self, start: int, stop: int) -> list[Shown]:
        """Events in ``[start, stop)``, whole or in part."""
        return [shown for shown in self.events if shown.start < stop and shown.stop > start]

    def whole(self, start: int, stop: int) -> bool:
        """Whether a window cuts no event, lies in no rush, and shows anything at all."""
        if start < 0 or any(a < stop and b > start for a, b in self.rushes):
            return False
        if any(p.scene is None and p.start <= start and p.stop >= stop for p in self.pieces):
            return False
        return all(start <= shown.start and shown.stop <= stop for shown in self.seen(start, stop))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame | Piece]:
        """Frames in their order, and outages in their place."""
        stop = self.seconds if stop is None else stop
        for piece in self.pieces:
            if piece.stop <= start or piece.start >= stop:
                continue
            if piece.scene is None:
                yield piece
                continue
            first, last = max(start, piece.start), min(stop, piece.stop)
            times = [Fraction(n, FPS) for n in range(first * FPS, last * FPS)]
            pictures = torch.from_numpy(
                piece.scene.draw([float(t - piece.start) for t in times], height=SIDE, width=SIDE)
            )
            for at, picture in zip(times, pictures, strict=True):
                yield Frame(picture.clone(), at, Fraction(1, FPS))

    def asks(self, *, seed: int = 0, each: int = 2, hourly: int = 3, first: int = 900) -> list[Ask]:
        """Questions in the order they are put.

        Args:
            seed: draws moments and questions.
            each: questions about one window.
            hourly: windows of each kind in an hour.
            first: seconds before which nothing is asked.
        """
        rng = random.Random(seed)
        out: list[Ask] = []
        slots = [first + n * 3600 // hourly for n in range((self.seconds - first) * hourly // 3600)]
        for slot in slots:
            for kind in KINDS:
                for _ in range(200):
                    at = slot + rng.randrange(3600 // hourly)
                    made = self._made(kind, at, rng) if at < self.seconds - 4 else None
                    if made is not None:
                        out += rng.sample(made, min(each, len(made)))
                        break
        return sorted(out, key=lambda ask: ask.at)

    def _made(self, kind: str, at: int, rng: random.Random) -> list[Ask] | None:
        """All questions of a kind that can be put at a moment; None if it is not a good one."""
        away = next((gap for gap in self.gaps if gap.start < at < gap.stop), None)
        if kind == "gap":
            return self._about_gap(at, away, rng)
        if away is not None or any(a <= at < b + 60 for a, b in self.rushes):
            return None
        if kind == "now":
            window, words = (at - NOW, at), "right now"
            here = [shown for shown in self.events if shown.start + 2 <= at <= shown.stop]
            if any(gap.start < at and gap.stop > at - NOW for gap in self.gaps):
                return None
            if (not here and rng.random() < 0.9) or any(shown.start < at - NOW for shown in self.seen(*window)):
                return None
            return self._about(kind, at, window, words, rng, until=at)
        if kind == "ago":
            window = at - AGO - REACH, at - AGO + REACH
            return self._about(kind, at, window, "about ten minutes ago", rng) if self.whole(*window) else None
        back = rng.randrange(60, 3600) if kind == "clock" else rng.randrange(3600, max(3601, min(at, 82_800)))
        moment = at - back
        if rng.random() < 0.5:
            near = [shown for shown in self.events if abs(shown.start - moment) < 120 and shown.stop < at - 10]
            if not near:
                return None
            shown = rng.choice(near)
            return self._at(kind, at, rng.randrange(shown.start + 1, shown.stop), rng)
        window = moment, moment + rng.randrange(20, 120)
        words = f"between {wall(window[0])} and {wall(window[1])}"
        return self._about(kind, at, window, words, rng) if self.whole(*window) and window[1] <= at - 10 else None

    def _at(self, kind: str, at: int, moment: int, rng: random.Random) -> list[Ask] | None:
        """About the one event that is seen all through the second before and after a moment."""
        here = self.seen(moment - 1, moment + 1)
        if (
            len(here) != 1
            or not here[0].start < moment < here[0].stop
            or any(a < moment + 1 and b > moment - 1 for a, b in self.rushes)
        ):
            return None
        return self._about(kind, at, (moment - 1, moment + 1), f"at {wall(moment)}", rng)

    def _about(
        self, kind: str, at: int, window: tuple[int, int], words: str, rng: random.Random, until: int | None = None
    ) -> list[Ask]:
        seen = self.seen(*window)
        scene = Scene(rng.randrange(1 << 30), window[1] - window[0], "plain", tuple(shown.event for shown in seen))
        return [
            Ask(at, kind, item.kind, f"{item.question[:-1]} {words}?", item.answer, item.question, window)
            for item in ask_all(scene)
            if item.kind != "when" and not (item.kind == "none" and item.question.startswith(("when", "at what")))
        ]

    def _about_gap(self, at: int, away: Gap | None, rng: random.Random) -> list[Ask] | None:
        if away is not None:
            if at - away.start <= NOW:
                return None
            window, words, gap = (at - NOW, at), "right now", away
        else:
            past = [gap for gap in self.gaps if gap.stop < at - 10]
            if not past:
                return None
            gap = rng.choice(past[-6:])
            if gap.start < at - AGO - REACH and gap.stop > at - AGO + REACH:
                window, words = (at - AGO - REACH, at - AGO + REACH), "about ten minutes ago"
            else:
                moment = rng.randrange(int(gap.start) + 2, int(gap.stop) - 2)
                window, words = (moment - 1, moment + 1), f"at {wall(moment)}"
        asked = ("what happens?", "what color is the circle?", "how many shapes are there?", "is there a red star?")
        return [Ask(at, "gap", "gap", f"{plain[:-1]} {words}?", gap.reason, plain, window) for plain in asked]


def wall(seconds: int) -> str:
    """The time on the wall of a second of the stream."""
    return (ORIGIN + timedelta(seconds=seconds)).strftime("%H:%M:%S")


class Camera:
    """Stands in for ``Supervised``: shows a stream as fast as it is watched, and stands still to be asked about."""

    def __init__(self, stream: Stream, stops: Sequence[int]) -> None:
        self.stream, self.name, self.origin = stream, "toy camera", ORIGIN
        self.open_gap: Gap | None = None
        self.connects = self.losses = self.frames = self.dropped = 0
        self.accuracy_seconds, self.frozen, self.black, self.live = 0.0, False, False, True
        self.stops = sorted(set(stops))
        self.stands: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        """Moments at which the stream stands still; None at its end."""

        self.go_on = threading.Semaphore(0)
        self.waiting: Callable[[], int] = lambda: 0
        """How many frames wait to be watched."""

        self.closed = threading.Event()

    def __iter__(self) -> Iterator[Frame | Gap | Notice]:
        self.connects += 1
        due = list(self.stops)
        for item in self.stream.frames():
            start, stop = (item.start, item.stop) if isinstance(item, Piece) else (item.pts, item.pts)
            if isinstance(item, Piece):
                self.losses += 1
                yield Notice(Fraction(item.start), "lost", f"{self.name}: {item.reason}")
            while due and due[0] <= stop:
                at = due.pop(0)
                if isinstance(item, Piece):
                    self.open_gap = Gap(Fraction(start), Fraction(at), item.reason)
                self._stand(at)
                if self.closed.is_set():
                    return
            if isinstance(item, Piece):
                self.open_gap = None
                self.connects += 1
                yield Notice(Fraction(item.stop), "connected", self.name)
                yield Gap(Fraction(item.start), Fraction(item.stop), item.reason)
                continue
            rush = any(a <= item.pts < b for a, b in self.stream.rushes)
            while self.waiting() >= 8 and not rush and not self.closed.wait(0.0005):
                pass
            if self.closed.is_set():
                return
            self.frames += 1
            yield item
        self.stands.put(None)

    def _stand(self, at: int) -> None:
        self.stands.put(at)
        while not self.go_on.acquire(timeout=0.1):
            if self.closed.is_set():
                return

    def close(self) -> None:
        """End it."""
        self.closed.set()

    def join(self, seconds: float) -> bool:
        """Nothing of it goes on."""
        return True

    def wall(self, seconds: Fraction) -> datetime:
        """The time on the wall."""
        return self.origin + timedelta(seconds=float(seconds))


@dataclass
class Score:
    """Right answers of one way to answer, by kind."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    wrong: list[tuple[Ask, str]] = field(default_factory=list)

    def note(self, ask: Ask, text: str, right: bool) -> None:
        """Count one answer."""
        self.asked[ask.kind] += 1
        self.right[ask.kind] += right
        if not right:
            self.wrong.append((ask, text))

    def share(self, kind: str | None = None) -> float:
        """Right answers of one kind or of all; nan where none was asked."""
        asked = sum(self.asked.values()) if kind is None else self.asked[kind]
        right = sum(self.right.values()) if kind is None else self.right[kind]
        return right / asked if asked else float("nan")

    def to_dict(self) -> dict[str, list[int]]:
        """Right and asked by kind."""
        return {kind: [self.right[kind], self.asked[kind]] for kind in KINDS if self.asked[kind]}


@dataclass(frozen=True)
class Point:
    """What was seen at one moment."""

    hours: float
    rss: int
    disk: int
    status: dict[str, Any]


@dataclass
class Run:
    """What came of watching a stream."""

    scores: dict[str, Score]
    points: list[Point]
    gaps: list[tuple[float, float, str]]
    seconds: float
    most_disk: int
    last: dict[str, Any]

    def slope(self) -> float:
        """MB of resident memory per stream hour, least squares after the first tenth."""
        late = self.points[len(self.points) // 10 :]
        if len(late) < 2:
            return float("nan")
        x = torch.tensor([point.hours for point in late], dtype=torch.float64)
        y = torch.tensor([point.rss / 1e6 for point in late], dtype=torch.float64)
        x, y = x - x.mean(), y - y.mean()
        return float((x * y).sum() / (x * x).sum())


def rss() -> int:
    """Resident bytes of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def right(ask: Ask, text: str, given: int) -> bool:
    """Whether an answer is exactly right."""
    if ask.kind == "gap":
        return given == 0 and text.startswith("nothing is remembered of") and f": {ask.answer}" in text
    return text == ask.answer


def alone(ask: Ask, stream: Stream, loaded: Loaded, reduce: str) -> str:
    """What the model says of the window's frames by themselves."""
    folder = Path(tempfile.mkdtemp(prefix="alone-"))
    try:
        with Bank.open(folder) as bank:
            session = Session(loaded.adapter.stream(), bank, chain=Chain.parse(reduce), embedder=loaded.embedder)
            session.start(height=SIDE, width=SIDE, num_frames=64)
            frames = [f for f in stream.frames(*ask.window) if isinstance(f, Frame)]
            receipt = Receipt(source="alone")
            with bank.writer(KEY, path="alone", name="alone") as writer:
                for first in range(0, len(frames), 8):
                    clip = [Frame(f.pixels, f.pts - ask.window[0], f.duration) for f in frames[first : first + 8]]
                    session.watch(Clip.of(clip), writer, receipt, interval=Fraction(1, FPS))
            return session.ask(ask.plain, bank.source("alone"), receipt).text
    finally:
        shutil.rmtree(folder)


def floor(policy: str, ask: Ask, live: Live, loaded: Loaded, now: int) -> str:
    """What a policy answers from all that is remembered; asked without the words of time, which it would not know."""
    request = live.request
    with Bank.open(request.folder, read_only=True) as bank:
        session = Session(
            loaded.adapter.stream(), bank, chain=Chain.parse(request.reduce), embedder=loaded.embedder,
            recall=replace(request, recall=policy).recall_method(), limits=Limits(answer_tokens=request.budget),
        )  # fmt: skip
        session._when = lambda *_: When()  # type: ignore[method-assign]
        source = bank.find(live.cameras[0].key)
        assert source is not None
        return session.ask(ask.plain, source, Receipt(source="floor"), now=float(now)).text


def watch(
    stream: Stream,
    asks: Sequence[Ask],
    request: LiveRequest,
    loaded: Loaded,
    *,
    floors: Sequence[str] = (),
    say: Callable[[Point], None] = lambda point: None,
    every: int = 600,
) -> Run:
    """Watch a stream and ask.

    Args:
        stream: what the camera shows.
        asks: what is asked, by time.
        request: settings of the engine.
        loaded: the model.
        floors: recall policies that answer the same, and "alone".
        say: told at every checkpoint.
        every: stream seconds between two checkpoints.
    """
    scores = {"live": Score(), **{name: Score() for name in floors}}
    points: list[Point] = []
    stops = {ask.at for ask in asks} | set(range(every, stream.seconds, every))
    camera = Camera(stream, sorted(stops))
    most, began = 0, time.perf_counter()
    with patch.object(engine, "Supervised", lambda *_, **__: camera):
        with Live([CameraRequest("toy", "lavfi:toy")], request, loaded) as live:
            camera.waiting = lambda: live.cameras[0].feed.waiting
            while (at := camera.stands.get()) is not None:
                for ask in (ask for ask in asks if ask.at == at):
                    answer = live.ask(ask.question).result(120)
                    given = answer.receipt.tokens_given
                    scores["live"].note(ask, answer.text, right(ask, answer.text, given))
                    for name in floors:
                        if name != "alone":
                            text, given = floor(name, ask, live, loaded, at), 1
                        elif ask.kind == "gap":
                            continue
                        else:
                            text = alone(ask, stream, loaded, request.reduce)
                        scores[name].note(ask, text, right(ask, text, given))
                if at % every == 0:
                    while live.cameras[0].feed.waiting >= request.clip_frames:
                        time.sleep(0.002)
                    disk = sum(file.stat().st_size for file in request.folder.rglob("*") if file.is_file())
                    most = max(most, disk)
                    points.append(Point(at / 3600, rss(), disk, live.cameras[0].status()))
                    say(points[-1])
                camera.go_on.release()
            if not live.wait(120):
                raise TimeoutError("the engine did not end with its camera")
            last = live.status()["streams"][0]
    seconds = time.perf_counter() - began
    with Bank.open(request.folder, read_only=True) as bank:
        found = bank.gaps(bank.source("toy").id)
        gaps = [(float(gap.start), float(gap.stop), gap.reason) for gap in found]
    return Run(scores, points, gaps, seconds, most, last)


def main() -> None:
    """Watch, ask, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="of the stream; 24 takes about ten minutes")
    parser.add_argument("--disk", type=float, default=6.0, help="limit of the memory in MB")
    parser.add_argument("--budget", type=int, default=1024, help="most visual tokens of an answer")
    parser.add_argument("--hourly", type=int, default=3, help="windows of each kind asked about in an hour")
    parser.add_argument("--reduce", default=LiveRequest().reduce, help="what is reduced, as in --reduce of streamvid")
    parser.add_argument("--no-floors", action="store_true", help="the engine alone, for memory and speed")
    parser.add_argument("--seed", type=int, default=0, help="of the stream and the questions")
    parser.add_argument("--wrong", action="store_true", help="print every wrong answer of the engine")
    parser.add_argument("--folder", type=Path, default=None, help="where; default: the system's temporary folder")
    asked = parser.parse_args()
    stream = Stream.of(round(asked.hours * 3600), seed=asked.seed)
    asks = stream.asks(seed=asked.seed, hourly=asked.hourly)
    floors = () if asked.no_floors else ("alone", "uniform", "recent")
    loaded = load(Request(model="toy", threads=1), lambda text: None)
    folder = Path(tempfile.mkdtemp(prefix="live-", dir=asked.folder))
    request = LiveRequest(
        model="toy", memory=folder, fps=FPS, disk_bytes=int(asked.disk * 1e6), budget=asked.budget,
        reduce=asked.reduce, threads=1,
    )  # fmt: skip
    print(
        f"{stream.seconds / 3600:.1f} h, {len(stream.events)} events, {len(stream.gaps)} outages, {len(asks)} questions"
    )
    heads = ("hours", "RSS MB", "disk MB", "read", "watched", "thinned", "dropped", "lag s")
    print(" ".join(f"{head:>8}" for head in heads))

    def say(point: Point) -> None:
        status = point.status
        counts = [status[f"frames_{name}"] for name in ("read", "watched", "thinned", "dropped")]
        print(
            f"{point.hours:8.2f} {point.rss / 1e6:8.1f} {point.disk / 1e6:8.2f} "
            f"{' '.join(f'{count:8d}' for count in counts)} {status['lag_seconds']:8.1f}",
            flush=True,
        )

    try:
        run = watch(stream, asks, request, loaded, floors=floors, say=say, every=1800)
        with Bank.open(folder, read_only=True) as bank:
            clean = not verify(bank).problems
    finally:
        shutil.rmtree(folder)
    print(f"\n{'right':8} {' '.join(f'{kind:>9}' for kind in KINDS)} {'all':>8}")
    for name, score in run.scores.items():
        cells = [f"{score.right[kind]} of {score.asked[kind]}" if score.asked[kind] else "-" for kind in KINDS]
        print(f"{name:8} {' '.join(f'{cell:>9}' for cell in cells)} {score.share():8.1%}")
    if asked.wrong:
        for ask, text in run.scores["live"].wrong:
            print(f"{ask.kind} at {wall(ask.at)}: {ask.question} {ask.answer!r}, not {text!r}")
    last = run.last
    missing = last["frames_read"] - sum(last[f"frames_{name}"] for name in ("watched", "thinned", "dropped"))
    truth = [(float(gap.start), float(gap.stop), gap.reason) for gap in stream.gaps]
    told = {
        "hours": stream.seconds / 3600,
        "seconds": round(run.seconds, 1),
        "rss_first_mb": round(run.points[0].rss / 1e6, 1),
        "rss_last_mb": round(run.points[-1].rss / 1e6, 1),
        "rss_slope_mb_per_hour": round(run.slope(), 3),
        "disk_limit_mb": asked.disk,
        "disk_most_mb": round(run.most_disk / 1e6, 3),
        **{f"frames_{name}": last[f"frames_{name}"] for name in ("read", "watched", "thinned", "dropped")},
        "frames_unaccounted": missing,
        "lag_seconds_at_end": last["lag_seconds"],
        "connects": last["connects"],
        "losses": last["losses"],
        "gaps": len(run.gaps),
        "gaps_as_they_were": run.gaps == truth,
        "memory_verifies": clean,
        "right": {name: score.to_dict() for name, score in run.scores.items()},
        "share": {name: round(score.share(), 4) for name, score in run.scores.items()},
        "machine": f"{platform.machine()}, 1 of {os.cpu_count()} cores",
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
