"""Which pictures of a source become frames, and a report of what was not looked at.

Knows times only: pictures come from any ``Pictures``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite
from typing import Self

import numpy as np
from numpy.typing import NDArray

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest.pictures import DecodeStats, Picture, Pictures

Seconds = Fraction | float | int
"""A time or rate; a float means the decimal number it prints as, so 29.97 is 2997/100."""


def exact(value: Seconds) -> Fraction:
    """The value as a fraction; raises SettingsError for infinities and NaN."""
    if isinstance(value, float):
        if not isfinite(value):
            raise SettingsError(f"times and rates must be finite, got {value}")
        return Fraction(str(value))
    return Fraction(value)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which moments of a source to look at.

    With a rate, the target times are ``start + k / fps``, and at each the picture that is on
    screen is taken: the last one with ``pts <= target``::

        pictures   a------b--c----------------------d--|
        targets    |    |    |    |    |    |    |    |
        frames     a    a'   c    c'   c'   c'   c'   d

    ``a`` and ``c`` carry their own container pts.  ``a'`` and ``c'`` are the same picture
    again because it is still there; they carry the target time, so times rise strictly and
    a picture that stays is seen for as long as it stays.  A picture that appeared before
    ``start`` is given ``start`` as its time.  A frame lasts until the next picture of the
    source or until the same picture is given again, whichever is first.

    Args:
        fps: targets a second, > 0; higher sees more and costs more.  None, with ``count``
            None, takes every picture once.
        count: instead of ``fps``: this many targets, spread evenly from the start of the span.
        max_frames: never more frames than this, >= 1; the rate is lowered until they fit.
        start: first moment of the span in container seconds; None begins with the first picture.
        stop: end of the span in container seconds, not included; None goes to the end.

    Raises:
        SettingsError: if a value is out of range or both ``fps`` and ``count`` are given.
    """

    fps: Seconds | None = None
    count: int | None = None
    max_frames: int | None = None
    start: Seconds | None = None
    stop: Seconds | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and self.count is not None:
            raise SettingsError(f"give fps or count, not both, got fps={self.fps} and count={self.count}")
        if self.fps is not None and exact(self.fps) <= 0:
            raise SettingsError(f"fps must be above 0, got {self.fps}; to see every picture leave it out")
        for name, number in (("count", self.count), ("max_frames", self.max_frames)):
            if number is not None and number < 1:
                raise SettingsError(f"{name} must be at least 1, got {number}")
        start = exact(self.start) if self.start is not None else None
        stop = exact(self.stop) if self.stop is not None else None
        if start is not None and stop is not None and stop <= start:
            raise SettingsError(f"the span must end after it starts, got {float(start):g} to {float(stop):g} s")


@dataclass(frozen=True, slots=True)
class Plan:
    """A sampling made exact for one source: targets ``start + k / fps`` below ``stop``."""

    start: Fraction
    stop: Fraction | None
    """End of the span in seconds, not included; None: until the pictures end."""

    fps: Fraction | None
    """Targets a second; None takes every picture once."""

    max_frames: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingReport:
    """What was looked at and, above all, what was not."""

    frames: int
    """Frames given."""

    start: Fraction | None
    """When the first frame appears, in seconds; None before there is one."""

    stop: Fraction | None
    """End of what the frames were taken from, in seconds."""

    fps: Fraction | None
    """Rate of the targets; None when every picture was taken."""

    longest_gap: Fraction
    """Longest stretch, in seconds, in which no picture on screen was given as a frame."""

    notes: tuple[str, ...] = ()
    """Requests that could not be honoured as they stood, one sentence each."""

    @property
    def effective_fps(self) -> float:
        """Frames given for each second of the span; 0.0 for an empty span."""
        if self.start is None or self.stop is None or self.stop <= self.start:
            return 0.0
        return float(self.frames / (self.stop - self.start))


@dataclass(frozen=True, slots=True)
class Shot:
    """One sampled picture: what a ``Frame`` is made of."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB."""

    pts: Fraction
    duration: Fraction


class Sampler(Iterator[Shot]):
    """Pictures of a source at the planned times; holds two pictures at most.

    ``report`` and ``stats`` are up to date at any moment.  Ends by itself; ``close`` (or the
    end of a ``with`` block) lets go of the file earlier.

    Args:
        pictures: one pass over the source; closed by this object.
        plan: targets.
        size: (H, W) to scale to while converting; None keeps the full size.
        name: what to call the source in messages.
    """

    def __init__(self, pictures: Pictures, plan: Plan, *, size: tuple[int, int] | None = None, name: str = "") -> None:
        self._pictures = pictures
        self._plan = plan
        self._size = size
        self._name = name
        self._frames = 0
        self._first: Fraction | None = None
        self._seen_until = plan.start
        self._span_stop: Fraction | None = None
        self._gap = Fraction(0)
        self._k = 0
        self._steps = self._run()

    @property
    def stats(self) -> DecodeStats:
        """What happened while decoding, so far."""
        return self._pictures.stats

    @property
    def report(self) -> SamplingReport:
        """What was looked at, so far."""
        return SamplingReport(
            frames=self._frames,
            start=self._first,
            stop=self._span_stop if self._span_stop is not None else self._seen_until if self._frames else None,
            fps=self._plan.fps,
            longest_gap=self._gap,
            notes=self._plan.notes,
        )

    def __next__(self) -> Shot:
        return next(self._steps)

    def close(self) -> None:
        """Let go of the file."""
        self._steps.close()
        self._pictures.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> Generator[Shot, None, None]:
        """Walk with one picture of lookahead, so that it is known when each picture goes."""
        plan, pictures = self._plan, self._pictures
        with pictures:
            pictures.skip_to(plan.start)
            shown = next(pictures, None)
            while shown is not None:
                following = next(pictures, None)
                gone = following.pts if following is not None else shown.pts + shown.duration
                yield from self._take(shown, gone)
                if following is None:
                    self._end_at(gone if plan.stop is None else min(gone, plan.stop))
                elif self._full() or (plan.stop is not None and max(self._target(), gone) >= plan.stop):
                    self._end_at(gone if plan.stop is None else plan.stop)
                    break
                elif self._target() > following.pts:
                    pictures.skip_to(self._target())
                shown = following
        if not self._frames:
            span = f"{float(plan.start):g} and {float(plan.stop):g} s" if plan.stop is not None else "start and end"
            raise SourceError(f"{self._name} shows no picture between {span}")

    def _take(self, shown: Picture, gone: Fraction) -> Iterator[Shot]:
        """The frames that one picture gives while it is on screen, none if no target meets it."""
        plan = self._plan
        limit = gone if plan.stop is None else min(gone, plan.stop)
        if plan.fps is None:
            if limit > plan.start:
                pts = max(shown.pts, plan.start)
                yield self._frame(shown.pixels(self._size), pts, limit - pts)
            return
        self._k = max(self._k, ceil((shown.pts - plan.start) * plan.fps))
        pixels: NDArray[np.uint8] | None = None
        while self._target() < limit and not self._full():
            # The first time a picture is given it carries its own time, later the target's.
            pts = self._target() if pixels is not None else max(shown.pts, plan.start)
            pixels = shown.pixels(self._size) if pixels is None else pixels
            self._k += 1
            yield self._frame(pixels, pts, min(self._target(), limit) - pts)

    def _frame(self, pixels: NDArray[np.uint8], pts: Fraction, duration: Fraction) -> Shot:
        if self._first is None:
            self._first = pts
        self._frames += 1
        self._gap = max(self._gap, pts - self._seen_until)
        self._seen_until = pts + duration
        return Shot(pixels, pts, duration)

    def _target(self) -> Fraction:
        """The next target time; without a rate the start, as every picture is wanted."""
        return self._plan.start + (self._k / self._plan.fps if self._plan.fps is not None else 0)

    def _full(self) -> bool:
        return self._plan.max_frames is not None and self._frames >= self._plan.max_frames

    def _end_at(self, end: Fraction) -> None:
        self._span_stop = end
        self._gap = max(self._gap, end - self._seen_until)
