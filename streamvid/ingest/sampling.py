"""Which pictures of a source become frames, and a report of what was not looked at.

Knows times only: pictures come from any ``Pictures``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor, isfinite
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
class Adaptive:
    """How to choose frames by what changes: few where nothing happens, many where something does.

    Up to ``max_fps`` pictures a second are looked at, as small grey pictures, and compared with
    the latest frame.  One becomes a frame if the scene differs (a cut, a fade, a camera that
    has turned), if a small subject moved, came or went, or if the floor asks for it.

    Args:
        max_fps: pictures looked at a second, > 0, and so the most frames a second.  Higher sees
            shorter events and costs more.
        steady_fps: changed pictures a second that become frames while something goes on and on,
            > 0 and at most ``max_fps``.  Higher follows lasting motion closer and keeps more.
        burst: changed pictures kept one after another before ``steady_fps`` sets the pace, >= 1.
            What was not used comes back at ``steady_fps``.  Cuts are never held back.
        subject: how much 3x3 cells of the small picture must change more than their surroundings,
            in grey levels (0 to 255), > 0.  Smaller sees fainter subjects and keeps more.
        scene: mean difference from the latest frame, as a share of the contrast, > 0.  Smaller
            keeps more frames of a turning camera or a fade.
        cut: the same between one look and the next, > 0; above it, it is a cut.
        cells: pixels of the small picture, >= 256.  More sees smaller subjects and costs more: a
            subject of 0.1 % of the picture is 5 of 5184.

    Raises:
        SettingsError: if a value is out of range.
    """

    max_fps: Seconds = 10
    steady_fps: Seconds = 2
    burst: int = 30
    subject: float = 6.0
    scene: float = 0.25
    cut: float = 0.6
    cells: int = 5184

    def __post_init__(self) -> None:
        if not 0 < exact(self.steady_fps) <= exact(self.max_fps):
            raise SettingsError(
                f"steady_fps must be above 0 and at most max_fps, got {self.steady_fps} and {self.max_fps}; "
                "to keep every change set both to the same"
            )
        if self.burst < 1:
            raise SettingsError(f"burst must be at least 1, got {self.burst}; for even sampling leave adaptive out")
        for name, number in (("subject", self.subject), ("scene", self.scene), ("cut", self.cut)):
            if not (isfinite(number) and number > 0):
                raise SettingsError(f"{name} must be above 0, got {number}; a smaller value keeps more frames")
        if self.cells < 256:
            raise SettingsError(f"cells must be at least 256, got {self.cells}; a smaller picture shows no subject")


FLOOR_FPS = Fraction(1, 2)
"""Floor of adaptive sampling when no ``fps`` is given."""


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

    With ``keys`` only key frames are decoded, which is many times faster; how far apart they
    are, the encoder chose.  A frame lasts as long as its picture does by itself.  A picture on
    screen at ``start`` counts if it is a key frame.

    With ``adaptive`` the targets are those of ``max_fps``, and of the pictures met there only
    the changed ones become frames, but never further apart than ``1 / fps``.  A picture that is
    given when it is met first carries its own time, later the target's.  A frame stands for
    the unchanged pictures after it: it lasts until the last one looked at that did not differ
    is gone.  For this it is given when the next frame is found, at most ``1 / fps`` later.

    Args:
        fps: targets a second, > 0; higher sees more and costs more.  None, with ``count``
            None, takes every picture once.  With ``keys`` the first key frame of each ``1 / fps``
            seconds is taken.  With ``adaptive`` it is the floor, at most half of its
            ``max_fps``: no longer than ``1 / fps`` seconds between frames; None means 0.5.
        count: instead of ``fps``: this many targets, spread evenly from the start of the span.
        max_frames: never more frames than this, >= 1; the rate is lowered until they fit.  Key
            frames are thinned evenly, by their order.  With ``adaptive`` the floor takes at most
            half and changes the rest, spread over the span.
        start: first moment of the span in container seconds; None begins with the first picture.
        stop: end of the span in container seconds, not included; None goes to the end.
        keys: take key frames only.
        adaptive: choose frames by what changes, with these settings; None does not.

    Raises:
        SettingsError: if a value is out of range or two exclude each other.
    """

    fps: Seconds | None = None
    count: int | None = None
    max_frames: int | None = None
    start: Seconds | None = None
    stop: Seconds | None = None
    keys: bool = False
    adaptive: Adaptive | None = None

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
        self._check_mode()

    def _check_mode(self) -> None:
        if self.keys and self.adaptive is not None:
            raise SettingsError("give keys or adaptive, not both; key frames are where the encoder put them")
        if self.count is not None and (self.keys or self.adaptive is not None):
            mode = "keys" if self.keys else "adaptive"
            raise SettingsError(f"count={self.count} asks for even spacing, {mode} chooses its own; give max_frames")
        if self.adaptive is not None and 2 * exact(self.fps or FLOOR_FPS) > exact(self.adaptive.max_fps):
            raise SettingsError(
                f"fps={float(exact(self.fps or FLOOR_FPS)):g} is the floor of adaptive sampling and must be at most "
                f"half of max_fps={float(exact(self.adaptive.max_fps)):g}; raise max_fps or leave adaptive out"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """A sampling made exact for one source: targets ``start + k / fps`` below ``stop``."""

    start: Fraction
    stop: Fraction | None
    """End of the span in seconds, not included; None: until the pictures end."""

    fps: Fraction | None
    """Targets a second; None takes every picture once.  The floor if ``adaptive``."""

    max_frames: int | None = None
    notes: tuple[str, ...] = ()
    keys: bool = False
    """Whether only key frames are decoded: the first in each ``1 / fps`` seconds, or all."""

    share: Fraction = Fraction(1)
    """Which part of these key frames is taken, evenly by their order."""

    adaptive: Adaptive | None = None

    @property
    def mode(self) -> str:
        """In a word: "adaptive", "keys", "rate", or "every" for every picture once."""
        if self.adaptive is not None:
            return "adaptive"
        return "keys" if self.keys else "rate" if self.fps is not None else "every"


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
    """Rate of the targets, in adaptive mode the floor; None when every picture was taken."""

    longest_gap: Fraction
    """Longest stretch, in seconds, in which no picture on screen was given as a frame.  In
    adaptive mode pictures that were looked at and did not differ from the latest frame count
    as given, changed ones that were left out do not."""

    notes: tuple[str, ...] = ()
    """Requests that could not be honoured as they stood, one sentence each."""

    mode: str = "rate"
    """What the plan was, in a word; see ``Plan.mode``."""

    looked: int = 0
    """Pictures compared with the latest frame; 0 unless adaptive."""

    left_out: int = 0
    """Pictures that had changed and were not given, by ``steady_fps`` or ``max_frames``; 0 unless adaptive."""

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
            mode=self._plan.mode,
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
        if self._first is None:
            raise SourceError(f"{self._name} shows no picture between {self._between()}")

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

    def _between(self) -> str:
        start, stop = self._plan.start, self._plan.stop
        return f"{float(start):g} and {float(stop):g} s" if stop is not None else f"{float(start):g} s and the end"

    def _full(self) -> bool:
        return self._plan.max_frames is not None and self._frames >= self._plan.max_frames

    def _end_at(self, end: Fraction) -> None:
        self._span_stop = end
        self._gap = max(self._gap, end - self._seen_until)


def chosen_keys(pictures: Pictures, plan: Plan) -> Iterator[tuple[Picture, Fraction, Fraction]]:
    """Key frames of a plan before they are thinned, each with when it appears and is gone within the span.

    Args:
        pictures: a pass over key frames only.
        plan: the span, and the rate if at most one is taken in each ``1 / fps`` seconds.
    """
    pictures.skip_to(plan.start)
    wanted = plan.start
    shown = next(pictures, None)
    while shown is not None and (plan.stop is None or shown.pts < plan.stop):
        following = next(pictures, None)
        gone = shown.pts + shown.duration
        gone = gone if following is None else min(gone, following.pts)
        gone = gone if plan.stop is None else min(gone, plan.stop)
        pts = max(shown.pts, plan.start)
        if gone > pts >= wanted:
            if plan.fps is not None:
                wanted = plan.start + (floor((pts - plan.start) * plan.fps) + 1) / plan.fps
            yield shown, pts, gone
            if following is not None and wanted > following.pts:
                pictures.skip_to(wanted)
        shown = following


class KeySampler(Sampler):
    """Key frames of a source; ``pictures`` is a pass over nothing else."""

    @property
    def report(self) -> SamplingReport:
        """What was looked at, so far; says how far apart the key frames are where that is not as asked."""
        report = super().report
        if self._span_stop is None:
            return report
        wanted = 1 / self._plan.fps if self._plan.fps is not None else None
        apart = f"{float(self._gap):.4g} s"
        if self._frames == 1 and self._gap > 0 and self._plan.max_frames != 1:
            note = f"one key frame between {self._between()}; longest gap {apart}; sample without keys to see the rest"
        elif wanted is not None and self._gap > wanted and self._plan.share == 1:
            note = f"fps={float(1 / wanted):g} is not reached: up to {apart} pass without a key frame"
        else:
            return report
        return replace(report, notes=(*report.notes, note))

    def _run(self) -> Generator[Shot, None, None]:
        plan = self._plan
        end = plan.start
        with self._pictures as pictures:
            for order, (shown, pts, end) in enumerate(chosen_keys(pictures, plan)):
                if self._full():
                    break
                if floor(order * plan.share) > floor((order - 1) * plan.share):
                    yield self._frame(shown.pixels(self._size), pts, end - pts)
        if self._first is None:
            raise SourceError(
                f"{self._name} shows no key frame between {self._between()}; take a longer span or sample without keys"
            )
        self._end_at(plan.stop if plan.stop is not None else end)
