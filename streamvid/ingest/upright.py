"""How a stored picture becomes upright."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

_HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics (ISO/IEC 23091-2) that need tone mapping on an ordinary screen."""


@dataclass(frozen=True, slots=True)
class Upright:
    """How a stored picture becomes upright: transpose first, then flip."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def degrees(self) -> int:
        """The clockwise turn in it; what remains is a mirror."""
        if self.transpose:
            return 90 if self.flip_x or not self.flip_y else 270
        return 180 if self.flip_y else 0

    @property
    def mirrored(self) -> bool:
        """Whether it is more than a turn."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """``(H, W, ...)`` upright; the same array if nothing is to do."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        if self.flip_x:
            image = image[:, ::-1]
        if self.flip_y:
            image = image[::-1]
        return np.ascontiguousarray(image)


_QUARTERS = {270: Upright(True, True, False), 180: Upright(False, True, True), 90: Upright(True, False, True)}
"""By FFmpeg's counterclockwise angle."""

_NAMED_PROFILES = frozenset({"png", "apng"})
"""Codecs whose frames must not be asked for side data: PyAV 18.1 frees the name of a colour profile twice."""


def upright_of(frame: VideoFrame, codec: str) -> tuple[Upright, tuple[str, ...]]:
    """What the frame's display matrix asks for, and a note if it asks for something odd.

    The matrix maps stored (x, y) to shown (x', y'): ``x' = a x + c y``, ``y' = b x + d y``.
    """
    if not frame.rotation:
        return Upright(), ()
    if codec in _NAMED_PROFILES:
        return _QUARTERS.get(frame.rotation % 360, Upright()), ()
    try:
        side = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows no name for some newer kinds of side data and then gives none at all
        return _QUARTERS.get(frame.rotation % 360, Upright()), ()
    matrix = bytes(side) if isinstance(side, SideData) else b""
    if len(matrix) != 36:
        return Upright(), ()
    a, b, _, c, d, *_ = (int(x) for x in np.frombuffer(matrix, dtype=np.int32))
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if straight and not b and not c:
        turn = Upright(False, a < 0, d < 0)
    elif crossed and not a and not d:
        turn = Upright(True, c < 0, b < 0)
    else:
        return Upright(), ("the display matrix is no quarter turn and is ignored",)
    return turn, ("the picture is mirrored, as the file asks",) if turn.mirrored else ()


def notes_of(frame: VideoFrame, stream: VideoStream) -> tuple[str, ...]:
    """What the pictures have that is not carried out."""
    notes = []
    ratio = stream.sample_aspect_ratio
    if ratio and ratio != 1:
        notes.append(f"pixels are {ratio.numerator}:{ratio.denominator} wide to high and are taken as square")
    if frame.color_trc in _HDR:
        notes.append(f"high dynamic range ({_HDR[frame.color_trc]}), shown without tone mapping")
    if frame.interlaced_frame:
        notes.append("interlaced, shown without deinterlacing")
    return tuple(notes)
