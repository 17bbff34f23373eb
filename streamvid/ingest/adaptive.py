"""Frames chosen by what changes: a detector on small grey pictures, a pace, and the walk over a source.

Nothing looks ahead more than one picture, and what is held does not grow.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from math import ceil, floor, sqrt

import numpy as np
from numpy.typing import NDArray

from streamvid.errors import SourceError
from streamvid.ingest.pictures import Picture, Pictures
from streamvid.ingest.sampling import FLOOR_FPS, Adaptive, Plan, Sampler, SamplingReport, Shot, exact

Grey = NDArray[np.uint8]
Cells = NDArray[np.float32]

_NOISE_LOOKS = 50
"""Looks over which the noise of a cell is averaged."""

_NOISE_LEVELS = 3.0
"""Noise of one cell beyond that of the whole picture that is believed, in grey levels.  More
would take a juggler for noise after a while."""

_SIGMAS = 6.0
"""Noise that a changed cell must stand out of."""

_SHIFTS = 3.0
"""How many times the apparent shift of the whole picture excuses a difference at an edge."""

_FIELDS = 6
"""Sixteenths of the picture that must have edges before a shift of everything is believed."""

_SLOWLY = 1.35
_AT_ONCE = 1.1
"""By what factor exposure may change since the latest frame and from look to look; more counts as a change."""

_LEVELS = 10.0
"""By how many grey levels the mean may change besides."""

_EXPOSED = 0.25
"""Part of an exposure correction by which it may be wrong in places."""

_GLARE = 235.0
"""Brightness at which a cell may hold clipped pixels, and an exposure correction tells nothing."""


class Change(Enum):
    """What a look at a picture found, compared with the latest frame."""

    NONE = "none"
    SUBJECT = "subject"
    SCENE = "scene"
    CUT = "cut"


def cells_of(height: int, width: int, cells: int) -> tuple[int, int]:
    """(h, w) of a small picture of about ``cells`` pixels in the shape of the large one, never larger than it."""
    scale = min(1.0, sqrt(cells / (height * width)))
    return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(slots=True)
class _Small:
    """A small picture and what is asked of it again and again."""

    cells: Cells
    edges: Cells
    """Difference between neighbouring cells, mean of 3x3."""

    contrast: float

    @classmethod
    def of(cls, grey: Grey) -> _Small:
        cells = grey.astype(np.float32)
        slope = np.zeros_like(cells)
        slope[1:] = np.abs(cells[1:] - cells[:-1])
        slope[:, 1:] = np.maximum(slope[:, 1:], np.abs(cells[:, 1:] - cells[:, :-1]))
        return cls(cells, _blur(slope, 1)[0], float(cells.std()))


@dataclass(slots=True)
class _Difference:
    """One small picture less another, after the exposure was made equal."""

    local: Cells
    """How much 3x3 cells differ, less how much their surroundings of 15x15 do; absolute grey levels."""

    excused: Cells
    """What the correction of the exposure may have left, in grey levels."""

    scene: float
    """Mean difference as a share of the contrast."""

    @classmethod
    def of(cls, new: _Small, old: _Small, gain: float) -> _Difference:
        correction = _exposed(new.cells, old.cells, gain)
        rest = new.cells - old.cells - correction
        near, around, far = _blur(rest, 1, 2, 7)
        scene = float(np.abs(around).mean()) / (8 + (new.contrast + old.contrast) / 2)
        excused = np.abs(_EXPOSED * correction)
        glaring = np.maximum(new.cells, old.cells) > _GLARE
        if glaring.any():
            excused[_blur(glaring, 1)[0] > 0] += np.abs(correction).max()
        return cls(np.abs(near - far), excused, scene)


class ChangeDetector:
    """Whether a picture shows something that the latest frame does not.

    Two channels look at the same small grey picture, both after a fit of gain and offset, so
    that a camera that adapts its exposure changes nothing.

    - *Scene*: the mean difference, as a share of the contrast.  Above ``cut`` from one look to
      the next it is a cut; above ``scene`` from the latest frame it is a fade, a large mover or
      a camera that has turned far enough.
    - *Subject*: the largest difference of 3x3 cells less that of their surroundings.  It must
      exceed ``subject`` grey levels or six times the noise there, and on top of that what a
      shift of the whole picture would explain: the edges tell how far each sixteenth of it
      seems to have moved, and the middle one counts, so that a camera that turns is not taken
      for a thousand subjects.

    Noise is the median difference of all cells or the running mean of the cell itself,
    whichever is larger.  Each frame becomes what later pictures are compared with, so slow
    changes add up until they are seen.

    Not seen: what changes in colour and not in brightness, what moves less than about 20 grey
    levels times cells from look to look (it adds up and is seen later), soft shadows, and
    small subjects while the camera itself moves.

    Args:
        settings: thresholds.
    """

    def __init__(self, settings: Adaptive) -> None:
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Forget the frame, the noise and everything else."""
        self._frame: _Small | None = None
        self._latest: _Small | None = None
        self._noise: Cells = np.zeros((0, 0), dtype=np.float32)
        self._looks = 0

    def keep(self) -> None:
        """The picture looked at last has become a frame."""
        self._frame = self._latest

    def look(self, grey: Grey) -> Change:
        """Compare a picture with the latest frame; the very first one is a cut, and a frame.

        Args:
            grey: (h, w), always of one size.
        """
        new = _Small.of(grey)
        frame, before, self._latest = self._frame, self._latest, new
        if frame is None or before is None:
            self._frame = new
            self._noise = np.zeros_like(new.cells)
            return Change.CUT
        since_frame = _Difference.of(new, frame, _SLOWLY)
        since_before = _Difference.of(new, before, _AT_ONCE)
        quiet = float(np.median(since_frame.local)) * 1.48
        noise = np.maximum(quiet, np.minimum(1.25 * _blur(self._noise, 2)[0], max(_NOISE_LEVELS, 3 * quiet)))
        self._learn(since_before.local, noise)
        cut = self.settings.cut
        if since_before.scene > cut and (before is frame or _Difference.of(new, frame, _AT_ONCE).scene > cut):
            return Change.CUT
        if since_frame.scene > self.settings.scene:
            return Change.SCENE
        edges = np.maximum(new.edges, frame.edges)
        needed = np.maximum(self.settings.subject, _SIGMAS * noise) + since_frame.excused
        needed += _SHIFTS * _shift(since_frame.local, edges) * edges
        return Change.SUBJECT if bool((since_frame.local > needed).any()) else Change.NONE

    def _learn(self, local: Cells, noise: Cells) -> None:
        """Average the noise of each cell; what stands out of it counts little, so that a passer-by is no noise."""
        self._looks += 1
        usual = np.minimum(local, np.maximum(self.settings.subject, 2 * noise))
        self._noise += (usual - self._noise) / min(self._looks, _NOISE_LOOKS)


def _blur(cells: Cells | NDArray[np.bool_], *radii: int) -> list[Cells]:
    """Means over squares of ``2 * radius + 1``; cells beyond the border are as those on it."""
    edge = max(radii)
    sums = np.pad(cells, edge, "edge").cumsum(0, dtype=np.float64).cumsum(1)
    sums = np.pad(sums, ((1, 0), (1, 0)))
    height, width = cells.shape
    out = []
    for radius in radii:
        near, far = edge - radius, edge + radius + 1
        above, below = sums[near : near + height], sums[far : far + height]
        total = below[:, far : far + width] - below[:, near : near + width]
        total -= above[:, far : far + width] - above[:, near : near + width]
        out.append((total / (far - near) ** 2).astype(np.float32))
    return out


def _exposed(new: Cells, old: Cells, gain: float) -> Cells:
    """What to add to the old picture for the exposure of the new one, by the cells that agree, within bounds."""
    agree_new, agree_old = new.ravel(), old.ravel()
    for _ in range(2):
        mean_new, mean_old = float(agree_new.mean()), float(agree_old.mean())
        # A ratio of variances, not a regression: noise would bend that towards a contrast of 0.
        contrast = sqrt((float(agree_new.var()) + 4) / (float(agree_old.var()) + 4))
        contrast = min(max(contrast, 1 / gain), gain)
        level = min(max(mean_new, mean_old / gain - _LEVELS), mean_old * gain + _LEVELS)
        correction = (contrast - 1) * (old - mean_old) + (level - mean_old)
        rest = np.abs(new - old - correction).ravel()
        agrees = rest <= max(2.5 * float(np.median(rest)), 2.0)
        agree_new, agree_old = new.ravel()[agrees], old.ravel()[agrees]
    return correction


def _shift(local: Cells, edges: Cells) -> float:
    """How many cells everything seems to have moved: the middle one of 16 fields, those without edges left out."""
    strong = edges > max(4.0, float(np.quantile(edges, 0.75)))
    changed, there = _in_fields(local * strong), _in_fields(edges * strong)
    moved = changed[there > 0] / there[there > 0]
    return min(1.5, float(np.median(moved))) if len(moved) >= _FIELDS else 0.0


def _in_fields(cells: Cells) -> Cells:
    """Sums over 4 x 4 fields."""
    height, width = cells.shape
    rows, columns = ([k * n // 4 for k in range(4)] for n in (height, width))
    return np.add.reduceat(np.add.reduceat(cells, rows, 0), columns, 1)


def adaptive_plan(adaptive: Adaptive, plan: Plan) -> Plan:
    """The plan with its floor: at least half of ``max_frames`` is left to changes."""
    fps = plan.fps if plan.fps is not None else FLOOR_FPS
    if plan.max_frames is None or plan.stop is None:
        return replace(plan, fps=fps, adaptive=adaptive)
    looks = ceil((plan.stop - plan.start) * exact(adaptive.max_fps))
    apart = (looks - 1) // max(1, plan.max_frames // 2) + 1
    if _apart(adaptive, fps) >= apart:
        return replace(plan, fps=fps, adaptive=adaptive)
    fewer = exact(adaptive.max_fps) / (apart + 1)
    note = f"max_frames={plan.max_frames} turns a floor of {float(fps):g} fps into {float(fewer):.4g} fps"
    return replace(plan, fps=fewer, adaptive=adaptive, notes=(*plan.notes, note))


def _apart(adaptive: Adaptive, fps: Fraction) -> int:
    """Looks that pass at least between a frame and the next one that the floor asks for.

    One less than fit into ``1 / fps``: a frame's picture may have appeared just after the look before.
    """
    return max(1, floor(exact(adaptive.max_fps) / fps) - 1)


class Pace:
    """How many of the changed pictures become frames, decided as they come.

    Two limits.  A store of ``burst`` frames that refills at ``steady_fps``: what begins is seen
    closely, what lasts is thinned, cuts always pass.  And ``max_frames``, if given: as large a
    part of it must be left as there is span left, less an eighth so that the first seconds are
    not blind, for a cut less a quarter.

    Args:
        plan: an adaptive one; with ``max_frames`` its end must be known.
    """

    def __init__(self, plan: Plan) -> None:
        assert plan.adaptive is not None
        self._adaptive = plan.adaptive
        self._plan = plan
        self._frames = 0
        self._store = float(plan.adaptive.burst)
        self._filled = plan.start

    def floor(self) -> None:
        """Count a frame that the floor asks for; it always passes."""
        self._frames += 1

    def change(self, now: Fraction, change: Change) -> bool:
        """Whether a changed picture becomes a frame now; if so it is counted."""
        refilled = float((now - self._filled) * exact(self._adaptive.steady_fps))
        self._store = min(float(self._adaptive.burst), self._store + refilled)
        self._filled = now
        if not (self._store >= 1 or change is Change.CUT) or not self._affords(now, change):
            return False
        self._store = max(0.0, self._store - 1)
        self._frames += 1
        return True

    @property
    def full(self) -> bool:
        """Whether ``max_frames`` is reached."""
        return self._plan.max_frames is not None and self._frames >= self._plan.max_frames

    def _affords(self, now: Fraction, change: Change) -> bool:
        """Whether ``max_frames`` leaves one for this.  The floor needs half at most, so it is never starved."""
        start, stop, most = self._plan.start, self._plan.stop, self._plan.max_frames
        if most is None or stop is None:
            return True
        reserve = Fraction(3, 4) if change is Change.CUT else Fraction(7, 8)
        return most - self._frames - Fraction(1, 2) >= reserve * (most - 1) * (stop - now) / (stop - start)


@dataclass(slots=True)
class _Held:
    """A frame whose end is not known yet."""

    pixels: NDArray[np.uint8]
    pts: Fraction
    until: Fraction
    """How far the pictures looked at did not differ from it."""

    ended: bool = False
    """Whether one has differed since."""


class AdaptiveSampler(Sampler):
    """Changed pictures of a source, and one each ``1 / fps`` seconds at least; see ``Sampling``.

    Holds three pictures at most.  A frame is given when the next one is found.

    Args:
        pictures: one pass over the source; closed by this object.
        plan: an adaptive one.
        cells: (h, w) of the small pictures that are compared.
        size: (H, W) to scale to while converting; None keeps the full size.
        name: what to call the source in messages.
    """

    def __init__(
        self,
        pictures: Pictures,
        plan: Plan,
        *,
        cells: tuple[int, int],
        size: tuple[int, int] | None = None,
        name: str = "",
    ) -> None:
        super().__init__(pictures, plan, size=size, name=name)
        assert plan.adaptive is not None and plan.fps is not None
        self._adaptive = plan.adaptive
        self._cells = cells
        self._looks_per_second = exact(plan.adaptive.max_fps)
        self._wait = 1 / plan.fps
        self._detector = ChangeDetector(plan.adaptive)
        self._pace = Pace(plan)
        self._held: _Held | None = None
        self._looked = 0
        self._left_out = 0

    @property
    def report(self) -> SamplingReport:
        """What was looked at, so far."""
        notes = self._plan.notes
        if self._left_out:
            limits = f"steady_fps={float(exact(self._adaptive.steady_fps)):g} after a burst of {self._adaptive.burst}"
            limits += f" and max_frames={self._plan.max_frames}" if self._plan.max_frames is not None else ""
            notes += (f"{self._left_out} changed pictures were left out by {limits}",)
        return replace(super().report, notes=notes, looked=self._looked, left_out=self._left_out)

    def _run(self) -> Generator[Shot, None, None]:
        try:
            yield from super()._run()
        except SourceError:
            yield from self._give(self._seen_until)
            raise
        yield from self._give(self._seen_until)

    def _take(self, shown: Picture, gone: Fraction) -> Iterator[Shot]:
        """Look at a picture if a target meets it; a frame that it ends is given."""
        plan = self._plan
        limit = gone if plan.stop is None else min(gone, plan.stop)
        self._k = max(self._k, ceil((shown.pts - plan.start) * self._looks_per_second))
        change: Change | None = None
        pixels: NDArray[np.uint8] | None = None
        while self._target() < limit and not self._full():
            at = self._target() if change is not None else max(shown.pts, plan.start)
            if change is None:
                change = self._detector.look(shown.grey(self._cells))
                self._looked += 1
            self._k += 1
            if self._wants(change, at):
                yield from self._give(at)
                pixels = shown.pixels(self._size) if pixels is None else pixels
                self._detector.keep()
                self._held = _Held(pixels, at, at)
                self._first = at if self._first is None else self._first
                change = Change.NONE
            if change is Change.NONE:
                self._saw(at, limit)
            elif self._held is not None:
                self._held.ended = True
        self._left_out += change not in (None, Change.NONE)

    def _wants(self, change: Change, at: Fraction) -> bool:
        """Whether the picture becomes a frame.  The floor counts as reached if it would be passed at the next look."""
        if self._held is None or self._target() > self._held.pts + self._wait:
            self._pace.floor()
            return True
        return change is not Change.NONE and self._pace.change(at, change)

    def _saw(self, pts: Fraction, until: Fraction) -> None:
        """A picture was on screen that is a frame or does not differ from the latest."""
        self._gap = max(self._gap, pts - self._seen_until)
        self._seen_until = until
        if self._held is not None and not self._held.ended:
            self._held.until = until

    def _give(self, until: Fraction) -> Iterator[Shot]:
        """The frame that is held, now that its end is known: at most ``until``."""
        if self._held is not None:
            held, self._held = self._held, None
            self._frames += 1
            yield Shot(held.pixels, held.pts, min(held.until, until) - held.pts)

    def _target(self) -> Fraction:
        return self._plan.start + self._k / self._looks_per_second

    def _full(self) -> bool:
        return self._pace.full
