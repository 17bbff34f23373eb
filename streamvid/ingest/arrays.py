"""Frames that are in memory already as a source: arrays, tensors and Pillow images, with times of their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest.convert import Upright
from streamvid.ingest.images import ImagesPictures
from streamvid.ingest.order import Order, Times, number
from streamvid.ingest.reader import Reader, SourceInfo
from streamvid.ingest.sampling import Seconds, exact
from streamvid.ingest.stills import RANGELESS, Still, Unusable, blaming, render, turn_of


class ArrayReader(Reader):
    """Frames in memory, shown at a rate or at stated times.

    Nothing is copied: a ``uint8`` frame that lies in one piece, RGB last, is given at its own
    size as a view, so who writes into it writes into the array.  Frames of another size are
    scaled to the first one's.

    Args:
        frames: an array or tensor ``(N, H, W, 3)`` or ``(N, 3, H, W)``, or a list of ``(H, W, 3)`` or
            ``(3, H, W)`` ones or of Pillow images, which are turned upright as their EXIF says.  Where both
            layouts fit, RGB is last.  RGB in ``uint8``, or in floats from 0 to 1, which become the nearest of
            256 levels.  OpenCV gives BGR: turn it with ``frames[..., ::-1]``.
        fps: frames a second, above 0; higher makes them go by faster.  Frame k appears at ``k / fps``.
        times: instead of ``fps``: the second at which each frame appears, strictly rising.  The last one stays
            as long as the one before it, a single one 1 s.
        name: what to call the source in messages.

    Raises:
        SourceError: if there are no frames, or they have another shape or kind, or floats beyond 0 to 1.
        SettingsError: if not exactly one of ``fps`` and ``times`` is given, or it makes no sense.
    """

    def __init__(
        self,
        frames: Any,
        *,
        fps: Seconds | None = None,
        times: Iterable[Seconds] | None = None,
        name: str = "frames in memory",
    ) -> None:
        self._rows = _Rows(_frames_of(frames, name))
        count = len(self._rows.frames)
        clock, notes = _clock(count, fps, times)
        try:
            height, width = self._size = self._rows.rgb(0).shape[:2]
        except Unusable as reason:
            raise SourceError(f"frame 0 of {name} {reason}") from None
        start, end = clock.at(0), clock.at(count)
        marks = clock.marks or (clock.at(1),)
        tick = Fraction(1, lcm(*(mark.denominator for mark in marks)))
        self._order = Order((), clock, tick)
        self.info = SourceInfo(
            path=name,
            name=name,
            container="arrays",
            codec="rawvideo",
            width=width,
            height=height,
            duration=end - start,
            start=start,
            time_base=tick,
            average_rate=count / (end - start),
            rotation=0,
            decoder="numpy",
            chosen="the frames are in memory",
            streams=(f"* {number(count, 'frame')}, {width}x{height}",),
            colour="rgb24",
            notes=notes,
        )

    def pictures(self, *, keys_only: bool = False) -> ImagesPictures:
        """A new pass; every frame stands for itself, so ``keys_only`` changes nothing."""
        return ImagesPictures(self._rows, self._order, range(self._order.times.count), self._size, None)

    def state(self) -> None:
        """None: the frames stay in the process that has them."""

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """How many frames have a time in ``[start, stop)``."""
        return sum(start <= self._order.times.at(k) < stop for k in range(self._order.times.count))

    def identity(self) -> str:
        """A hash of all pixels and times; the same for the same frames in another layout. Raises SourceError."""
        clock = self._order.times
        whole = hashlib.sha256()
        for k in range(clock.count):
            try:
                pixels = self._rows.rgb(k)
            except Unusable as reason:
                raise SourceError(f"frame {k} of {self.info.name} {reason}") from None
            whole.update(f"{clock.at(k)} {pixels.shape}\n".encode())
            whole.update(np.ascontiguousarray(pixels).data)
        whole.update(f"{clock.at(clock.count)}\n".encode())
        return whole.hexdigest()


class _Rows:
    """Frames by number."""

    def __init__(self, frames: list[NDArray[Any] | Image.Image]) -> None:
        self.frames = frames

    def check(self, k: int) -> None:
        """Nothing to see: frames were checked when they were given."""

    def load(self, k: int, size: tuple[int, int], *, grey: bool = False) -> Still:
        """Frame k at ``size``; raises Unusable if it is a Pillow image that does not decode."""
        frame = self.rgb(k)
        whole = frame.shape[0], frame.shape[1]
        if grey or size != whole:
            pixels = render(Image.fromarray(np.ascontiguousarray(frame)), size, Upright(), grey=grey)
        else:
            # Whoever makes a tensor of it wants memory that may be written to, in one piece.
            pixels = np.require(frame, requirements=["C", "W"])
        return Still(pixels, whole, "rawvideo", "RGB", Upright(), False)

    def rgb(self, k: int) -> NDArray[np.uint8]:
        """Frame k, ``(H, W, 3)``, as a view where it is one."""
        frame = self.frames[k]
        if isinstance(frame, Image.Image):
            with blaming():
                frame.load()
                upright = turn_of(frame)
                return render(frame, upright.size(frame.size[::-1]), upright)
        if frame.dtype == np.uint8:
            return frame
        return np.rint(frame * np.float32(255)).astype(np.uint8)


def _frames_of(frames: Any, name: str) -> list[NDArray[Any] | Image.Image]:
    """Every frame as a checked Pillow image or ``(H, W, 3)`` view."""
    if isinstance(frames, list | tuple):
        rows = [frame if isinstance(frame, Image.Image) else _array(frame, name) for frame in frames]
    elif hasattr(frames, "__next__"):
        raise SourceError(f"{name} come from an iterator, which can be read only once; give list(frames)")
    elif isinstance(frames, Image.Image):
        raise SourceError(f"{name} are one Pillow image; give a list of them, [image]")
    else:
        array = _array(frames, name)
        if array.ndim == 3 and 3 in (array.shape[0], array.shape[-1]):
            raise SourceError(f"{name} of shape {array.shape} are one frame; give a list of frames, [frame]")
        if array.ndim != 4:
            raise SourceError(f"{name} have the shape {array.shape}; it must be (N, H, W, 3) or (N, 3, H, W)")
        rows = list(array)
    if not rows:
        raise SourceError(f"{name} are none; give at least one")
    return [_checked(row, f"frame {k} of {name}") for k, row in enumerate(rows)]


def _array(value: Any, name: str) -> NDArray[Any]:
    """An array, or a tensor of any library that makes one of it without a copy."""
    if isinstance(value, str | os.PathLike):
        raise SourceError(f"{name} hold a file name; open images on disk by their folder or a pattern such as '*.jpg'")
    for step in ("detach", "cpu", "numpy"):
        if hasattr(value, step):
            try:
                value = getattr(value, step)()
            except (TypeError, RuntimeError) as reason:
                cause = str(reason).partition("\n")[0]
                raise SourceError(f"{name} make no numpy array ({cause}); give uint8 in main memory") from None
    try:
        return np.asarray(value)
    except ValueError:
        raise SourceError(f"{name} make no numpy array: their rows differ in length; give (H, W, 3) frames") from None


def _checked(frame: NDArray[Any] | Image.Image, name: str) -> NDArray[Any] | Image.Image:
    """The frame with RGB last, if it is one."""
    if isinstance(frame, Image.Image):
        if frame.mode in RANGELESS:
            raise SourceError(f"{name} has pixels of the kind {frame.mode}; convert it to RGB first")
        return frame
    if frame.ndim == 3 and frame.shape[-1] != 3 and frame.shape[0] == 3:
        frame = np.moveaxis(frame, 0, -1)
    if frame.ndim != 3 or frame.shape[-1] != 3 or not frame.size:
        raise SourceError(
            f"{name} has the shape {frame.shape}; it must be (H, W, 3) or (3, H, W): "
            "drop transparency with [..., :3], repeat grey with np.stack([grey] * 3, -1)"
        )
    if frame.dtype == np.uint8:
        return frame
    if not np.issubdtype(frame.dtype, np.floating):
        raise SourceError(f"{name} is {frame.dtype}; it must be uint8 from 0 to 255, or floats from 0 to 1")
    low, high = frame.min(), frame.max()
    if not (low >= 0 and high <= 1):
        raise SourceError(f"{name} has floats from {low:g} to {high:g}; they must be in 0 to 1, or give uint8")
    return frame


def _clock(count: int, fps: Seconds | None, times: Iterable[Seconds] | None) -> tuple[Times, tuple[str, ...]]:
    """When the frames appear, and what had to be assumed."""
    if fps is None and times is None:
        raise SettingsError(
            "frames in memory have no times; give fps=25, or times=[0, 0.04, ...] in seconds, one for each frame"
        )
    if fps is not None and times is not None:
        raise SettingsError("give fps or times, not both; times alone are enough")
    if fps is not None:
        rate = _seconds(fps, "fps")
        if rate <= 0:
            raise SettingsError(f"fps must be above 0, got {fps}; for slower than one a second give 0.1")
        return Times(count, rate), ()
    assert times is not None
    marks = [_seconds(time, "times") for time in times]
    if len(marks) != count:
        raise SettingsError(f"there are {len(marks)} times for {number(count, 'frame')}; give one for each")
    for k, (before, after) in enumerate(zip(marks, marks[1:], strict=False), start=1):
        if after <= before:
            fell = f"frame {k} comes at {float(after):g} s after {float(before):g} s"
            raise SettingsError(f"times must rise strictly and {fell}; sort the frames, drop doubles")
    if count == 1:
        return Times(1, None, (marks[0], marks[0] + 1)), ("a single frame; shown for 1 s",)
    return Times(count, None, (*marks, 2 * marks[-1] - marks[-2])), ("the last frame stays as long as the one before",)


def _seconds(value: Any, name: str) -> Fraction:
    """A number of any library, exact."""
    try:
        return exact(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError):
        raise SettingsError(f"{name} must be numbers, got {value!r}; give seconds or frames a second") from None
