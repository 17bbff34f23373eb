"""Live sources that fail, come back, jump and stand still: with clocks that only move when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.errors import SettingsError, SourceError
from streamvid.frames import Frame
from streamvid.ingest.buffer import Ahead
from streamvid.ingest.devices import Hopeless
from streamvid.ingest.line import Came, Connect
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.still_life import Dull, StillLife
from streamvid.ingest.supervised import Gap, Notice, Patience, Supervised, short
from streamvid.ingest.wall import Wall

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CAMERA = "rtsp://camera.test/live"
INFO = SimpleNamespace(codec="h264", width=8, height=6, live=True, name="a camera", notes=())
STEP = Fraction(1, 10)


@dataclass
class Clock:
    """Moves when somebody sleeps or waits."""

    seconds: float = 50.0
    slept: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds


@dataclass
class Act:
    """One connection: pictures, and how it ends: "end", "silent" or an error when connecting or reading."""

    pictures: int = 0
    ends: str = "end"
    first: Fraction = Fraction(0)
    size: tuple[int, int] = (6, 8)


class Play:
    """Connections one after another, each as written; the last one again and again."""

    def __init__(self, *acts: Act) -> None:
        self.clock, self.acts, self.count = Clock(), acts, 0
        self.asked: list[dict[str, Any]] = []

    def connect(self, source: Any, **how: Any) -> Any:
        act = self.acts[min(self.count, len(self.acts) - 1)]
        self.count += 1
        self.asked.append({"source": source, **how})
        if act.ends == "refused" and not act.pictures:
            raise SourceError(f"{CAMERA} refused the connection; check the address")
        if act.ends == "password":
            raise Hopeless(f"{CAMERA} wants another user name or password (401); check the address")
        return SimpleNamespace(
            info=SimpleNamespace(**{**vars(INFO), "height": act.size[0], "width": act.size[1]}),
            close=lambda: None,
            frames=lambda sampling, size: Reel(self.clock, act, size or act.size),
        )

    def line(self, connect: Connect, ahead: Ahead, now: Callable[[], float]) -> Line:
        return Line(connect, self.clock)

    def watch(self, source: Any = CAMERA, **how: Any) -> Supervised:
        begun = self.clock.seconds
        settings: dict[str, Any] = {
            "origin": NOON,
            "today": lambda: NOON + timedelta(seconds=self.clock.seconds - begun),
            "random": lambda: 0.0,
            **how,
        }
        return Supervised(
            source, connect=self.connect, line=self.line, now=self.clock.now, sleep=self.clock.sleep, **settings
        )


class Reel:
    def __init__(self, clock: Clock, act: Act, size: tuple[int, int]) -> None:
        self.clock, self.act, self.size, self.given, self.stats = clock, act, size, 0, DecodeStats()

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        if self.given == self.act.pictures:
            if self.act.ends == "end":
                raise StopIteration
            if self.act.ends == "silent":
                raise TimeoutError
            raise SourceError(f"{CAMERA} broke; check it")
        self.clock.seconds += float(STEP)
        pixels = torch.full((*self.size, 3), 100 + self.given % 100, dtype=torch.uint8)
        self.given += 1
        return Frame(pixels, self.act.first + (self.given - 1) * STEP, STEP)


class Line:
    """A connection read when it is asked, by whoever asks."""

    def __init__(self, connect: Connect, clock: Clock) -> None:
        self.connect, self.clock, self.open = connect, clock, None

    def take(self, seconds: float) -> Came:
        if self.open is None:
            self.open = self.connect()
        source, reel = self.open
        try:
            frame = next(reel)
        except TimeoutError:
            self.clock.seconds += seconds
            raise
        return Came(source.info, frame, self.clock.now(), reel.stats.rescaled, reel.stats.jumps, 0)

    def join(self, seconds: float) -> bool:
        return True

    def cut(self) -> None:
        pass


def take(watched: Supervised, frames: int) -> list[Frame | Gap | Notice]:
    """What is given until there are so many frames."""
    given: list[Frame | Gap | Notice] = []
    while sum(isinstance(item, Frame) for item in given) < frames:
        given.append(next(watched))
    return given


def kinds(items: list[Frame | Gap | Notice]) -> list[str]:
    """One word an item, frames and signs of life left out."""
    words = [item.kind if isinstance(item, Notice) else type(item).__name__ for item in items]
    return [word for word in words if word not in ("Frame", "alive")]


def test_a_lost_camera_leaves_a_gap_with_its_reason() -> None:
    play = Play(Act(5, "broken"), Act(0, "refused"), Act(0, "refused"), Act(5))
    watched = play.watch()
    items = take(watched, 6)
    assert kinds(items) == ["connected", "lost", "retry", "retry", "retry", "connected", "Gap"]
    (gap,) = [item for item in items if isinstance(item, Gap)]
    frames = [item for item in items if isinstance(item, Frame)]
    assert gap.start == frames[4].pts + frames[4].duration == Fraction(1, 2)
    assert gap.stop == frames[5].pts == Fraction(4)  # 0.5 + 1 + 2 seconds of waiting
    assert watched.describe(gap) == "no video 12:00:00-12:00:04: broke, then refused the connection"
    assert (watched.connects, watched.losses, watched.frames) == (2, 1, 6)


def test_the_gap_that_lasts_is_told_at_any_time() -> None:
    watched = Play(Act(5, "broken"), Act(0, "refused")).watch()
    take(watched, 5)
    assert watched.open_gap is None
    while not (isinstance(item := next(watched), Notice) and item.kind == "alive"):
        pass
    gap = watched.open_gap
    assert gap is not None and gap.start == Fraction(1, 2) and gap.stop > gap.start


def test_silence_is_given_up_after_the_stall_limit_and_never_blocks() -> None:
    play = Play(Act(3, "silent"), Act(3))
    watched = play.watch(patience=Patience(stall_seconds=4))
    items = take(watched, 4)
    assert kinds(items) == ["connected", "lost", "retry", "connected", "Gap"]
    (gap,) = [item for item in items if isinstance(item, Gap)]
    assert gap.stop - gap.start == Fraction(9, 2) and gap.reason == "no picture for 4 s"
    assert sum(isinstance(item, Notice) and item.kind == "alive" for item in items) == 4  # one a second, for 4 s


def test_delays_double_up_to_the_longest_and_chance_only_shortens() -> None:
    patience = Patience(first_delay=1, longest_delay=10, jitter=0.5)
    assert [patience.delay(failed, 0.0) for failed in (1, 2, 3, 4, 5, 5000)] == [1, 2, 4, 8, 10, 10]
    assert patience.delay(5, 0.999) == pytest.approx(5, abs=0.01)


def test_a_wrong_password_fails_at_once_but_is_tried_again_where_it_worked_before() -> None:
    with pytest.raises(SourceError, match="401"):
        next(Play(Act(0, "password")).watch())
    assert kinds(take(Play(Act(2), Act(0, "password"), Act(2)).watch(), 3))[-2:] == ["connected", "Gap"]
    insisting = Play(Act(0, "password"), Act(2)).watch(patience=Patience(insist=True))
    assert kinds(take(insisting, 1)) == ["retry", "connected", "Gap"]


def test_it_gives_up_when_told_to() -> None:
    play = Play(Act(2), Act(0, "refused"))
    watched = play.watch(patience=Patience(give_up_after=30))
    begun = play.clock.seconds
    with pytest.raises(SourceError, match="no picture for 30 s and is given up: refused the connection"):
        for _ in watched:
            pass
    assert 30 <= play.clock.seconds - begun < 32


def test_a_run_goes_on_with_the_clock_of_the_one_before() -> None:
    watched = Play(Act(3)).watch(origin=NOON - timedelta(hours=2))
    first = next(item for item in watched if isinstance(item, Frame))
    assert first.pts == 7200 and watched.wall(first.pts) == NOON
    with pytest.raises(SettingsError, match="time zone"):
        Play(Act()).watch(origin=datetime(2026, 1, 1))


def test_files_keep_their_times_and_end_unless_they_loop() -> None:
    play = Play(Act(4, first=Fraction(7)))
    items = list(play.watch("lavfi:testsrc"))
    assert [item.pts for item in items if isinstance(item, Frame)] == [0, STEP, 2 * STEP, 3 * STEP]
    again = [item.pts for item in take(play.watch("lavfi:testsrc", loop=True), 10) if isinstance(item, Frame)]
    assert again == [k * STEP for k in range(10)]


def test_another_size_is_told_and_frames_keep_theirs() -> None:
    play = Play(Act(2), Act(2, size=(12, 16)))
    items = take(play.watch(), 4)
    assert kinds(items)[-3:] == ["connected", "size", "Gap"]
    assert "gives 16x12 instead of 8x6" in next(item.text for item in items if getattr(item, "kind", "") == "size")
    assert {tuple(item.pixels.shape) for item in items if isinstance(item, Frame)} == {(6, 8, 3)}


def test_closing_ends_the_iteration() -> None:
    with Play(Act(5)).watch() as watched:
        take(watched, 2)
        watched.close()
        assert list(watched) == []


def test_logins_come_from_the_environment_and_are_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMVID_USER", "me")
    monkeypatch.setenv("STREAMVID_PASSWORD", "s@cr:t")

    def connect(source: str, **_: Any) -> Any:
        raise Hopeless(f"{source} is bad, s@cr:t")

    assert Play(Act(1)).watch().name == CAMERA
    watched = Supervised(CAMERA, connect=connect)
    with pytest.raises(SourceError) as refusal:
        for _ in watched:
            pass
    assert "s@cr:t" not in str(refusal.value) and "s%40cr%3At" not in str(refusal.value)
    play = Play(Act(1))
    take(play.watch(), 1)
    assert play.asked[0]["source"] == "rtsp://me:s%40cr%3At@camera.test/live"
    take(play.watch("rtsp://you:other@camera.test/live"), 1)
    assert play.asked[1]["source"] == "rtsp://you:other@camera.test/live"
    monkeypatch.delenv("STREAMVID_USER")
    with pytest.raises(SettingsError, match="STREAMVID_USER is not"):
        Play(Act(1)).watch()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            Act,
            st.integers(0, 6),
            st.sampled_from(["end", "silent", "broken", "refused"]),
            st.fractions(-5, 10**6, max_denominator=90000),
        ),
        max_size=8,
    ),
    st.floats(0, 0.999),
)
def test_frames_and_gaps_cover_the_time_without_overlap(acts: list[Act], draw: float) -> None:
    play = Play(Act(3, "broken"), *acts, Act(10))
    watched = play.watch(random=lambda: draw, patience=Patience(stall_seconds=3, longest_delay=5))
    items = take(watched, 3 + sum(act.pictures for act in acts) + 10)
    at: Fraction | None = None
    for item in items:
        if isinstance(item, Gap):
            assert item.start == at and item.stop > item.start and "\n" not in item.reason
            at = item.stop
        elif isinstance(item, Frame):
            assert at is None or item.pts == at
            at = item.pts + item.duration
    assert max(play.clock.slept) <= 1
    times = [item.at for item in items if isinstance(item, Notice)]
    assert times == sorted(times)


@pytest.mark.parametrize("step, way", [(3600, "forward by 3600 s"), (-3600, "back by 3600 s")])
def test_a_machine_whose_clock_is_set_goes_on_with_the_times_of_before(step: int, way: str) -> None:
    play = Play(Act(20, "broken"), Act(0, "refused"), Act(20))
    turned = [0]
    watched = play.watch(today=lambda: NOON + timedelta(seconds=play.clock.seconds - 50 + turned[0]))
    items = take(watched, 10)
    turned[0] = step
    items += take(watched, 20)
    times = [item.pts for item in items if isinstance(item, Frame)]
    assert times == sorted(times) and max(times) < 10
    (said,) = [item for item in items if isinstance(item, Notice) and item.kind == "clock"]
    assert f"the clock of this machine was set {way}" in said.text and said.at == times[9] + STEP
    assert watched.clock_set_seconds == pytest.approx(step) and watched.origin == NOON
    assert watched.wall(times[-1]) < NOON + timedelta(seconds=10)
    turned[0] = step + 1
    assert "clock" not in kinds(take(watched, 5))


def test_pictures_that_came_damaged_are_counted_and_said_now_and_then() -> None:
    play = Play(Act(1000, "silent"))
    damaged = iter([0, 1, 3, *[4 + k // 100 for k in range(1000)]])

    def line(connect: Connect, ahead: Ahead, now: Callable[[], float]) -> Any:
        made = play.line(connect, ahead, now)
        return SimpleNamespace(cut=made.cut, take=lambda seconds: replace(made.take(seconds), damaged=next(damaged)))

    watched = Supervised(
        CAMERA, connect=play.connect, line=line, now=play.clock.now, sleep=play.clock.sleep, origin=NOON,
        today=lambda: NOON + timedelta(seconds=play.clock.seconds - 50),
    )  # fmt: skip
    items = take(watched, 1000)
    said = [item.text for item in items if isinstance(item, Notice) and item.kind == "damage"]
    assert len(said) == 2 and "left out: 1;" in said[0] and "left out: 8;" in said[1] and watched.damaged == 13


def place(wall: Wall, pictures: list[tuple[float, float]]) -> list[float | None]:
    """Where pictures of 0.1 s lie, from (their own time, when they came)."""
    placed = [wall.place(_exact(pts), STEP, _exact(came) + STEP) for pts, came in pictures]
    return [None if at is None else float(at.pts) for at in placed]


def _exact(seconds: float) -> Fraction:
    return Fraction(seconds).limit_denominator(1000)


def test_a_late_network_is_no_clock_jump() -> None:
    wall = Wall()
    late = [(k / 10, k / 10 if k < 300 else max(k / 10, 38)) for k in range(500)]  # 8 s of nothing, then all at once
    assert place(wall, late) == [pytest.approx(k / 10) for k in range(500)]


def test_a_clock_that_leaps_is_set_anew_by_the_receipt() -> None:
    wall = Wall()
    came = [k / 10 for k in range(40)]
    leaps = [k / 10 + (3600 if k >= 20 else 0) for k in range(40)]
    falls = [k / 10 + (3600 if k < 20 else 0) for k in range(40)]
    assert place(wall, list(zip(leaps, came, strict=True))) == [pytest.approx(k / 10) for k in range(40)]
    assert place(Wall(), list(zip(falls, came, strict=True))) == [pytest.approx(k / 10) for k in range(40)]


@pytest.mark.parametrize("rate", [0.999, 1.001])
def test_a_clock_that_drifts_stays_within_the_tolerance_for_ever(rate: float) -> None:
    """One part in a thousand: after 10,000 s it would be 10 s off."""
    wall, step = Wall(), Fraction(1)
    last, left_out = -1.0, 0
    for k in range(10_000):
        placed = wall.place(_exact(k * rate), STEP, k * step + STEP)
        left_out += placed is None
        if placed is not None:
            assert placed.pts > last and abs(placed.pts - k) < 2 + 0.1
            last = placed.pts
    assert left_out < 15


def test_slow_pictures_in_bursts_are_no_leap_of_the_clock() -> None:
    """A playlist of twelve-second segments at one picture in four seconds: their steps pass without any time."""
    wall = Wall()
    came = [0.0, 0.1, 0.2, 0.3, *(12.0 * (k // 3 + 1) + 0.1 * (k % 3) for k in range(30))]
    placed = [wall.place(Fraction(4 * k), Fraction(4), _exact(at) + 4) for k, at in enumerate(came[:16])]
    assert [at is not None and at.leap is None for at in placed] == [True] * 16
    assert wall.accuracy_seconds == pytest.approx(1 + 11.7)


def test_pictures_that_were_kept_make_the_stated_accuracy_worse() -> None:
    wall = Wall()
    burst = [(k / 10, 1.0) for k in range(30)] + [(3 + k / 10, 1.1 + k / 10) for k in range(50)]
    assert place(wall, burst) == [pytest.approx(1 + k / 10) for k in range(80)]
    assert wall.accuracy_seconds == pytest.approx(1 + 2.9, abs=0.11)


def shots(levels: list[float], noise: float = 0.0) -> list[tuple[str, bool]]:
    """What is said of one picture a second."""
    torch.manual_seed(0)
    watcher, said = StillLife(Dull(frozen_seconds=5)), []
    for k, level in enumerate(levels):
        pixels = (torch.full((72, 128, 3), level) + noise * torch.randn(72, 128, 3)).clamp(0, 255).to(torch.uint8)
        said += [(f"{change.kind} {k}", change.over) for change in watcher.look(pixels, Fraction(k))]
    return said


def test_a_frozen_picture_is_told_once_when_it_begins_and_once_when_it_ends() -> None:
    assert shots([100.0] * 12 + [101.0] * 3) == [("frozen 5", False), ("frozen 12", True)]


def test_the_noise_of_a_camera_is_not_frozen() -> None:
    assert shots([100.0] * 20, noise=2.0) == []


def test_a_small_subject_keeps_a_picture_alive() -> None:
    watcher, still = StillLife(Dull(frozen_seconds=5)), torch.full((1080, 1920, 3), 90, dtype=torch.uint8)
    for k in range(10):
        pixels = still.clone()
        pixels[500:510, 20 * k : 20 * k + 10] = 140
        assert list(watcher.look(pixels, Fraction(k))) == []


def test_a_black_picture_is_told_and_a_lamp_at_night_is_not_black() -> None:
    said = shots([120.0, 3.0, 2.0, 3.0, 120.0])
    assert said == [("black 1", False), ("black 4", True)]
    night = torch.zeros(72, 128, 3, dtype=torch.uint8)
    night[:12, :12] = 200
    assert list(StillLife(Dull()).look(night, Fraction(0))) == []


def test_reasons_are_short() -> None:
    assert short("rtsp://a/b refused the connection; check x", "rtsp://a/b") == "refused the connection"


@pytest.mark.parametrize(
    "wrong", [{"stall_seconds": 0}, {"first_delay": -1}, {"longest_delay": 0.1}, {"jitter": 2}, {"give_up_after": 0}]
)
def test_impossible_patience_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Patience(**wrong)  # type: ignore[arg-type]


def test_a_real_source_runs_through_the_thread() -> None:
    with Supervised("lavfi:testsrc=duration=2:rate=10:size=64x48", sampling=2) as watched:
        items = list(watched)
    assert [item.pts for item in items if isinstance(item, Frame)] == [0, Fraction(1, 2), 1, Fraction(3, 2)]
    assert kinds(items) == ["connected"] and watched.dropped == 0
