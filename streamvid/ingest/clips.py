"""Frames into clips, one clip in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

from streamvid.frames import Clip, Frame


def clips(frames: Iterable[Frame], frames_per_clip: int = 16) -> Iterator[Clip]:
    """Consecutive frames in clips of ``frames_per_clip``; the last clip may be shorter, none is empty.

    Args:
        frames: frames with rising times, all of one size.
        frames_per_clip: even and at least 2, because vision towers take frames in pairs.
            Larger is faster and needs more memory.
    """
    check(frames_per_clip)
    return _group(frames, frames_per_clip)


def check(frames_per_clip: int) -> None:
    """Raise ValueError for a length no vision tower takes."""
    if frames_per_clip < 2 or frames_per_clip % 2:
        raise ValueError(f"frames_per_clip must be even and at least 2, got {frames_per_clip}")


def followed(frames: Iterable[Frame], frames_per_clip: int = 16) -> Iterator[tuple[Clip, Fraction | None]]:
    """The same clips, each with the time of the frame after it, None after the last; waits for that frame."""
    check(frames_per_clip)
    waiting: list[Frame] = []
    for frame in frames:
        if len(waiting) == frames_per_clip:
            pts = frame.pts
            yield _stack(waiting), pts
        waiting.append(frame)
        del frame
    if waiting:
        yield _stack(waiting), None


def _group(frames: Iterable[Frame], frames_per_clip: int) -> Iterator[Clip]:
    waiting: list[Frame] = []
    for frame in frames:
        waiting.append(frame)
        del frame
        if len(waiting) == frames_per_clip:
            yield _stack(waiting)
    if waiting:
        yield _stack(waiting)


def _stack(waiting: list[Frame]) -> Clip:
    """Stack and forget the frames, so that the clip is all there is while somebody works on it."""
    clip = Clip.of(waiting)
    waiting.clear()
    return clip
