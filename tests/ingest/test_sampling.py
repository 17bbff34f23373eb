"""Which pictures become frames: against a slow, exact reference on made-up pictures."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest import DecodeStats, Picture, Pictures, Plan, Reader, Sampler, Sampling, Source, SourceInfo


class FakePicture(Picture):
    def __init__(self, number: int, pts: Fraction, duration: Fraction) -> None:
        self.number, self.pts, self.duration = number, pts, duration

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        return np.full((1, 1, 3), self.number, dtype=np.uint8)

    def grey(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        return np.full(size, self.number, dtype=np.uint8)


class FakePictures(Pictures):
    """Pictures at given times; when allowed to jump, it leaves out some that are gone by then."""

    def __init__(self, times: list[Fraction], last: Fraction, seed: int | None = None) -> None:
        self.stats = DecodeStats()
        self._times = [*times, times[-1] + last]
        self._place = 0
        self._random = random.Random(seed) if seed is not None else None
        self.closed = False

    def __next__(self) -> FakePicture:
        k = self._place
        if k + 1 >= len(self._times):
            raise StopIteration
        self._place += 1
        return FakePicture(k, self._times[k], self._times[k + 1] - self._times[k])

    def skip_to(self, seconds: Fraction) -> None:
        if self._random is not None:
            shown = max((k for k, time in enumerate(self._times[:-1]) if time <= seconds), default=0)
            self._place = max(self._place, self._random.randint(min(self._place, shown), shown))

    def close(self) -> None:
        self.closed = True


class FakeReader(Reader):
    def __init__(self, times: list[Fraction], last: Fraction, *, known: bool = True, seed: int | None = None) -> None:
        self._times, self._last, self._seed = times, last, seed
        duration = times[-1] + last - times[0] if known else None
        self.info = SourceInfo("/x", "x", "fake", "fake", 1, 1, duration, times[0], Fraction(1), None, 0, "fake")

    def pictures(self, *, keys_only: bool = False) -> FakePictures:
        return FakePictures(self._times, self._last, self._seed)


def fake(times: list[Fraction], last: Fraction, *, known: bool = True, seed: int | None = None) -> Source:
    return Source(FakeReader(times, last, known=known, seed=seed))


def reference(
    times: list[Fraction], last: Fraction, fps: Fraction, start: Fraction, stop: Fraction
) -> list[tuple[int, Fraction]]:
    """Number and time of every frame, target by target."""
    end = times[-1] + last
    out: list[tuple[int, Fraction]] = []
    k = 0
    while (target := start + k / fps) < min(stop, end):
        number = max(i for i, time in enumerate(times) if time <= target)
        again = bool(out) and out[-1][0] == number
        out.append((number, target if again else max(times[number], start)))
        k += 1
    return out


fractions = st.fractions(min_value=Fraction(1, 60), max_value=Fraction(7, 2), max_denominator=60)


@settings(max_examples=200, deadline=None)
@given(
    start=st.fractions(min_value=-5, max_value=60000, max_denominator=90),
    gaps=st.lists(fractions, min_size=0, max_size=12),
    last=fractions,
    fps=st.fractions(min_value=Fraction(1, 4), max_value=12, max_denominator=30),
    span=st.tuples(st.fractions(0, 1, max_denominator=20), st.fractions(0, 1, max_denominator=20)),
    seed=st.integers(0, 1000),
)
def test_frames_are_those_of_the_reference_with_and_without_jumps(start, gaps, last, fps, span, seed) -> None:
    times = [start]
    for gap in gaps:
        times.append(times[-1] + gap)
    end = times[-1] + last
    a, b = (start + (end - start) * share for share in sorted(span))
    b = end if a == b or a >= end else b
    a = start if a >= b else a
    expected = reference(times, last, fps, a, b)
    sampling = Sampling(fps=fps, start=a, stop=b)
    plain = fake(times, last).frames(sampling)
    frames = list(plain)
    assert [(int(f.pixels[0, 0, 0]), f.pts) for f in frames] == expected
    jumping = fake(times, last, seed=seed).frames(sampling)
    again = list(jumping)
    assert [(f.pts, f.duration) for f in again] == [(f.pts, f.duration) for f in frames]
    assert jumping.report == plain.report
    assert all(x.pts < y.pts for x, y in zip(frames, frames[1:], strict=False))
    assert all(x.pts + x.duration <= y.pts for x, y in zip(frames, frames[1:], strict=False))
    assert frames[-1].pts + frames[-1].duration <= b
    seen = sum(f.duration for f in frames)
    gaps_seen = [y.pts - x.pts - x.duration for x, y in zip(frames, frames[1:], strict=False)]
    gaps_seen += [frames[0].pts - a, b - frames[-1].pts - frames[-1].duration]
    assert plain.report.longest_gap == max(gaps_seen)
    assert seen + sum(gaps_seen) == b - a


def at(*seconds: float) -> list[Fraction]:
    return [Fraction(str(s)) for s in seconds]


def test_a_still_picture_is_seen_as_long_as_it_stays() -> None:
    frames = list(fake(at(0.3), Fraction(3)).frames(Sampling(fps=1)))
    assert [f.pts for f in frames] == at(0.3, 1.3, 2.3)
    assert sum(f.duration for f in frames) == 3
    assert frames[0].pixels.data_ptr() == frames[1].pixels.data_ptr()


def test_first_time_a_picture_keeps_its_own_time() -> None:
    frames = list(fake(at(0, 0.9, 1.95, 4), Fraction(1)).frames(Sampling(fps=1)))
    assert [f.pts for f in frames] == at(0, 0.9, 1.95, 3, 4)


def test_a_picture_from_before_the_span_takes_the_start_of_the_span() -> None:
    frames = list(fake(at(0, 5), Fraction(5)).frames(Sampling(fps=1, start=3, stop=6)))
    assert [(f.pts, f.duration) for f in frames] == [(3, 1), (4, 1), (5, 1)]


def test_every_picture_once_without_a_rate() -> None:
    frames = list(fake(at(0, 0.5, 0.6, 9), Fraction(1)).frames(Sampling(start=0.55, stop=9)))
    assert [(f.pts, f.duration) for f in frames] == [
        (Fraction(11, 20), Fraction(1, 20)),
        (Fraction(3, 5), Fraction(42, 5)),
    ]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_count_spreads_evenly_from_the_start(count: int, known: bool) -> None:
    times = [Fraction(k, 10) for k in range(70)]
    taken = fake(times, Fraction(1, 10), known=known).frames(Sampling(count=count))
    frames = list(taken)
    assert len(frames) == count
    assert all(abs(f.pts - Fraction(7 * k, count)) <= Fraction(1, 10) for k, f in enumerate(frames))


def test_max_frames_lowers_the_rate_and_says_so() -> None:
    times = [Fraction(k, 10) for k in range(100)]
    taken = fake(times, Fraction(1, 10)).frames(Sampling(fps=5, max_frames=8))
    assert len(list(taken)) == 8
    assert taken.report.fps == Fraction(8, 10)
    assert taken.report.notes == ("max_frames=8 turns 5 fps into 0.8 fps",)
    assert taken.report.effective_fps == pytest.approx(0.8)


def test_max_frames_that_fit_change_nothing() -> None:
    times = [Fraction(k, 10) for k in range(100)]
    taken = fake(times, Fraction(1, 10)).frames(Sampling(fps=1, max_frames=10))
    assert len(list(taken)) == 10 and taken.report.notes == ()


def test_max_frames_bounds_every_picture_too() -> None:
    times = [Fraction(k, 10) for k in range(100)]
    taken = fake(times, Fraction(1, 10)).frames(Sampling(max_frames=10))
    assert [f.pts for f in taken] == list(range(10))
    assert "every picture" in taken.report.notes[0]


def test_a_float_rate_means_its_decimal() -> None:
    assert fake(at(0), Fraction(9)).plan(Sampling(fps=29.97)).fps == Fraction(2997, 100)


@pytest.mark.parametrize(
    "bad",
    [
        {"fps": 0},
        {"fps": -1},
        {"fps": float("inf")},
        {"count": 0},
        {"max_frames": 0},
        {"fps": 1, "count": 2},
        {"start": 5, "stop": 5},
        {"start": float("nan")},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_at_once(bad: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        Sampling(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("span", [{"start": 20}, {"stop": 9}, {"start": 2, "stop": 3}], ids=str)
def test_a_span_outside_of_the_video_is_refused_with_what_there_is(span: dict[str, float]) -> None:
    with pytest.raises(SourceError, match="runs from 10 to 12 s"):
        fake(at(10, 11), Fraction(1)).frames(Sampling(fps=1, **span))


def test_closing_early_closes_the_pictures() -> None:
    pictures = FakePictures(at(0, 1, 2), Fraction(1))
    with Sampler(pictures, Plan(Fraction(0), None, Fraction(1))) as frames:
        next(frames)
        assert not pictures.closed
    assert pictures.closed
    assert list(frames) == []


def test_no_more_than_one_picture_of_lookahead() -> None:
    """A still or slow source must not be read ahead: frame k is out before picture k + 2 is asked for."""
    pictures = FakePictures([Fraction(k) for k in range(50)], Fraction(1))
    frames = Sampler(pictures, Plan(Fraction(0), None, None))
    for k in range(40):
        next(frames)
        assert pictures._place <= k + 2
