"""Which images are shown when: by a rate, by what an animation says, or by the times they were taken at."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from pathlib import Path

from streamvid.ingest.files import label
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.stills import Taken, Unusable, taken, webp_frames

_UNHURRIED_MS = 100
"""What browsers make of an animation's frame that claims to last no time."""


class _Untimed(Exception):
    """Why the images cannot be placed by the times they were taken at, as half a sentence."""


@dataclass(frozen=True, slots=True)
class Times:
    """When each of ``count`` pictures appears: ``k / rate``, or as ``marks`` say, whose last is the end."""

    count: int
    rate: Fraction | None = None
    marks: tuple[Fraction, ...] = ()

    def at(self, k: int) -> Fraction:
        """When picture k appears, in seconds; for ``count`` the end of the last."""
        return self.marks[k] if self.rate is None else k / self.rate

    def shown(self, seconds: Fraction) -> int:
        """Which is on screen then, if all of them are shown; out of range before and after."""
        return bisect_right(self.marks, seconds) - 1 if self.rate is None else floor(seconds * self.rate)


@dataclass(frozen=True, slots=True)
class Order:
    """Files in the order they are shown, and their times."""

    names: tuple[str, ...]
    times: Times
    tick: Fraction
    notes: tuple[str, ...] = ()
    keys: frozenset[int] | None = None
    """The pictures that need no other one; None for all."""

    lost: DecodeStats = field(default_factory=DecodeStats)
    """Counts of what is known to be unusable before the first pass."""


def order_of(root: Path, names: tuple[str, ...], *, animated: bool, rate: Fraction | None) -> Order:
    """Which images are shown when, as ``ImagesReader`` says; ``names`` are files of ``root``.

    Raises:
        Unusable: if an animation cannot be read.
    """
    if animated:
        return _animation(root / names[0], names, rate)
    if rate is not None:
        return Order(names, Times(len(names), rate), 1 / rate)
    default = Order(names, Times(len(names), Fraction(1)), Fraction(1))
    if len(names) == 1:
        return replace(default, notes=("a still image; shown for 1 s",))
    try:
        return _by_exif(root, names)
    except _Untimed as reason:
        assumed = f"no rate was given and {reason}; 1 picture a second is assumed (set it with --rate)"
        return replace(default, notes=(assumed,))


def _animation(path: Path, names: tuple[str, ...], rate: Fraction | None) -> Order:
    frames = webp_frames(path)
    if not frames:
        raise Unusable("is an animation without frames; copy or download it again")
    marks = [Fraction(0)]
    for stay, _ in frames:
        marks.append(marks[-1] + Fraction(stay or _UNHURRIED_MS, 1000))
    notes: tuple[str, ...] = ()
    if rate is not None:
        notes += ("the rate is not used: an animation has its own times",)
    if hasty := sum(not stay for stay, _ in frames):
        notes += (f"{number(hasty, 'frame')} of 0 ms shown for {_UNHURRIED_MS} ms, as browsers do",)
    keys = frozenset(k for k, (_, key) in enumerate(frames) if key)
    return Order(names, Times(len(frames), None, tuple(marks)), Fraction(1, 1000), notes, keys)


def _by_exif(root: Path, names: tuple[str, ...]) -> Order:
    """In the order they were taken; raises _Untimed.  Opens every file until one has no time."""
    lost = DecodeStats()
    found: list[tuple[Taken, str]] = []
    for name in names:
        try:
            moment = taken(root / name)
        except Unusable as reason:
            count(lost, reason)
            continue
        if moment is None:
            raise _Untimed("the images have no times" if not found else f"{label(name)} has no time")
        found.append((moment, name))
    if len(found) < 2:
        raise _Untimed("fewer than two images have a time")
    offsets = {moment.offset for moment, _ in found}
    zoned = "" not in offsets
    clock = {name: moment.utc if zoned else moment.seconds for moment, name in found}
    found.sort(key=lambda pair: clock[pair[1]])
    names = tuple(name for _, name in found)
    for earlier, later in zip(names, names[1:], strict=False):
        if clock[earlier] == clock[later]:
            raise _Untimed(f"{label(earlier)} and {label(later)} were taken at the same time")
    marks = [clock[name] - clock[names[0]] for name in names]
    gaps = sorted(b - a for a, b in zip(marks, marks[1:], strict=False))
    marks.append(marks[-1] + gaps[(len(gaps) - 1) // 2])  # the last one stays as long as one does in the middle
    first = found[0][0]
    where = f"UTC{first.offset}" if first.offset else "local time"
    notes: tuple[str, ...] = (f"times are those of EXIF; the first image was taken at {first.text} ({where})",)
    if not zoned and len(offsets) > 1:
        notes += ("some images do not tell their time zone, so all times are taken as they stand",)
    tick = Fraction(1, 10 ** max(moment.digits for moment, _ in found))
    return Order(names, Times(len(names), None, tuple(marks)), tick, notes, lost=lost)


def count(stats: DecodeStats, reason: Unusable) -> None:
    """Count an image that cannot be shown: too large ones as skipped, all others as damaged."""
    if reason.large:
        stats.skipped += 1
    else:
        stats.damaged += 1


def number(count: int, thing: str) -> str:
    """So many things, in words."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
