"""From a decoded frame to the picture a viewer would see: upright, square pixels, ordinary range, no comb.

What belongs to a whole source is decided once, from its first frame (``look_of``); what may change from
frame to frame, such as pixel format, colour matrix and interlacing, is read from each frame.

All scaling is done by swscale on its way from the stored format to RGB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from math import floor

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter
from numpy.typing import NDArray

from streamvid.errors import SourceError

_Bytes = NDArray[np.uint8]
_Words = NDArray[np.uint16]
_Floats = NDArray[np.float32]

_LARGEST_SIDE = 16384
_MOST_WIDENING = 4
"""A shape of pixels that would give more pixels than this times the stored ones is taken for a slip."""

_HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
"""Transfer characteristics (ISO/IEC 23091-2) that need tone mapping on an ordinary screen."""

_BT709_CORNERS = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_BT2020_CORNERS = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
_P3_CORNERS = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
"""CIE xy of pure red, green and blue (BT.709, BT.2020, SMPTE EG 432-1); white is D65 in all three."""

_KNOWN_MATRICES = frozenset({0, 1, 2, 4, 5, 6, 7, 9})
"""What swscale can turn into RGB, as in ISO/IEC 23091-2: RGB, BT.709, unspecified, FCC, BT.601 twice, 240M, BT.2020."""

_BT2020_CONSTANT = 10
"""BT.2020 with constant luminance; nearer to plain BT.2020 than to anything else."""

_FEW_LINES = 16
"""Pictures lower than this are not deinterlaced: there is hardly anything between the lines."""

_WHITE_NITS = 203.0
"""Brightness of a white sheet of paper in HDR (BT.2408)."""

_KNEE = 0.6
"""Share of that brightness up to which tones keep their light; what is above is pressed together."""

_USUAL_PEAK = 1000.0
_HIGHEST_PEAK = 10000.0

_GAMMA = 2.4
"""What an SDR screen does with the signal (BT.1886 with a black of zero)."""

_BAND_PIXELS = 1 << 16
"""Tone mapping goes over the picture in bands of about so many pixels: they stay in the processor's cache."""


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

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) after turning what has (H, W) before, and back: turning twice changes nothing."""
        return (size[1], size[0]) if self.transpose else size

    def apply(self, image: _Bytes) -> _Bytes:
        """``(H, W, ...)`` upright; the same array if nothing is to do."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        if self.flip_x:
            image = image[:, ::-1]
        if self.flip_y:
            image = image[::-1]
        return np.ascontiguousarray(image)


@dataclass(frozen=True, slots=True)
class Look:
    """How the pictures of one source are meant to be seen; made by ``look_of``, can be pickled."""

    size: tuple[int, int]
    """(H, W) of the first picture as stored; the caller counts those that differ."""

    shown: tuple[int, int]
    """(H, W) of every picture upright and with square pixels: what conversion gives when no size is asked."""

    upright: Upright = field(default_factory=Upright)

    transfer: int = ColorTrc.UNSPECIFIED
    """Transfer characteristics of the first picture, for later ones that name none."""

    primaries: int = ColorPrimaries.UNSPECIFIED
    """Colour primaries of the first picture, for later ones that name none."""

    peak_nits: float = _USUAL_PEAK
    """Brightest light in the film if it is PQ, in cd/m2; it becomes the white of the screen."""


def look_of(frame: VideoFrame, sample_aspect_ratio: Fraction | None) -> tuple[Look, tuple[str, ...]]:
    """What the first frame and its stream ask for, and a note for everything a reader should know of it.

    Args:
        frame: the first frame as it was decoded.
        sample_aspect_ratio: width of a stored pixel by its height; None if the stream does not say.
    """
    told = _side_data(frame)
    upright, notes = _upright(told.get(SideType.DISPLAYMATRIX, b""))
    size = frame.height, frame.width
    shown, stretched = _square(size, sample_aspect_ratio, upright)
    look = Look(size, shown, upright, frame.color_trc, frame.color_primaries, _peak(told))
    notes += stretched
    if frame.color_trc in _HDR:
        notes += (f"high dynamic range ({_HDR[ColorTrc(frame.color_trc)]}) is tone-mapped to SDR",)
    elif frame.color_primaries == ColorPrimaries.BT2020:
        notes += ("BT.2020 colours are brought into those of BT.709",)
    if frame.colorspace not in _KNOWN_MATRICES:
        taken = "BT.2020" if frame.colorspace == _BT2020_CONSTANT else "BT.601"
        notes += (f"colour matrix {frame.colorspace} is not known here and taken as {taken}; colours may be off",)
    if frame.interlaced_frame and frame.height >= _FEW_LINES:
        notes += ("interlaced: the first field is shown and the lines between are interpolated",)
    if _transparent(frame):
        notes += ("parts are transparent and shown in the colours stored there",)
    return look, notes


class Converter:
    """Turns frames of one source into pictures; keeps swscale's state, so one is made for each pass.

    - **Colour**: matrix and range are those each frame names.  An unnamed matrix is BT.601 at every size,
      as in FFmpeg, OpenCV, decord and torchcodec: models were trained on what those give, and most files that
      name none were written by tools that computed with BT.601.
    - **High dynamic range** (PQ, HLG) and BT.2020 primaries become BT.709 with SDR white (``_ToSdr``).  Other
      primaries are close to BT.709 and left as they are.
    - **Interlaced** frames are shown as their first field only, so that no other frame is needed.  Lines between
      are interpolated along edges (FFmpeg's ``estdif``).  If no more than half of the lines are asked for,
      the field is scaled as it is, which is some 20 times faster and moves it up by a quarter of its line distance.
    - **Transparency** is left out: colours are those stored under it.
    - Pictures of the stored size in 8 bit SDR are exactly what swscale gives by default (BICUBIC); all others
      go through planar RGB with exact rounding, which is faster and nearer to the formulas (1 level, not 3).

    Args:
        look: what ``look_of`` found.
        name: what to call the source in messages.
    """

    def __init__(self, look: Look, name: str) -> None:
        self.deinterlaced = 0
        """Pictures of which a field was taken."""

        self._look = look
        self._name = name
        self._scaler = VideoReformatter()
        self._grey_scaler = VideoReformatter()

    def convert(self, frame: VideoFrame, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """``(H, W, 3)`` RGB, upright and contiguous.

        Args:
            frame: as it was decoded; it is not changed.
            size: (H, W) of the upright picture; None for ``Look.shown``.

        Raises:
            SourceError: if the pixel format cannot be converted.
        """
        height, width = self._look.upright.size(size or self._look.shown)
        try:
            if frame.interlaced_frame and frame.height >= _FEW_LINES:
                self.deinterlaced += 1
                frame = _field(frame) if height * 2 <= frame.height else _interpolated(frame)
            image = self._rgb(frame, height, width)
        except (av.error.FFmpegError, ValueError) as reason:
            raise self._refusal(frame) from reason
        return self._look.upright.apply(image)

    def grey(self, frame: VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
        """``(h, w)`` thumbnail of the stored brightness, upright: made to be compared, not to be seen.

        Every stored pixel counts alike (area average), so that small things leave a trace.  Range, transfer
        and shape of pixels are left as stored; of an interlaced frame the first field is taken.

        Args:
            frame: as it was decoded; it is not changed.
            size: (h, w) of the upright thumbnail.

        Raises:
            SourceError: if the pixel format cannot be converted.
        """
        height, width = self._look.upright.size(size)
        try:
            if frame.interlaced_frame and frame.height >= _FEW_LINES:
                frame = _field(frame)
            # Without exact rounding, flat areas get brighter the more they shrink.
            mean = Interpolation.AREA | Interpolation.ACCURATE_RND
            shown = self._scale(self._grey_scaler, frame, height, width, "gray", mean)
            image: _Bytes = np.asarray(shown.to_ndarray(), dtype=np.uint8)
        except (av.error.FFmpegError, ValueError) as reason:
            raise self._refusal(frame) from reason
        return self._look.upright.apply(image)

    def _rgb(self, frame: VideoFrame, height: int, width: int) -> _Bytes:
        tones = self._tones(frame)
        exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
        if tones is not None:
            return tones.apply(*_planes(self._scale(self._scaler, frame, height, width, "gbrp16le", exact)))
        if (frame.height, frame.width) == (height, width) and _depth(frame) <= 8:
            shown = self._scale(self._scaler, frame, height, width, "rgb24", Interpolation.BICUBIC)
        else:
            shown = self._scale(self._scaler, frame, height, width, "gbrp", exact)
        return np.asarray(shown.to_ndarray(), dtype=np.uint8)

    def _scale(
        self, scaler: VideoReformatter, frame: VideoFrame, height: int, width: int, kind: str, how: Interpolation
    ) -> VideoFrame:
        """The frame in another size and format; a matrix swscale refuses is replaced."""
        matrix = None
        if frame.colorspace not in _KNOWN_MATRICES:
            matrix = Colorspace.BT2020 if frame.colorspace == _BT2020_CONSTANT else Colorspace.ITU601
        return scaler.reformat(
            frame, width, height, kind, src_colorspace=matrix, dst_colorspace=matrix, interpolation=how, threads=1
        )

    def _tones(self, frame: VideoFrame) -> _ToSdr | None:
        """What brings the frame to SDR; None if it is there."""
        look = self._look
        transfer = frame.color_trc if frame.color_trc != ColorTrc.UNSPECIFIED else look.transfer
        primaries = frame.color_primaries if frame.color_primaries != ColorPrimaries.UNSPECIFIED else look.primaries
        if transfer in _HDR:
            return _to_sdr(transfer, primaries, look.peak_nits if transfer == ColorTrc.SMPTE2084 else _USUAL_PEAK)
        return _to_sdr(ColorTrc.BT709, primaries, _WHITE_NITS) if primaries == ColorPrimaries.BT2020 else None

    def _refusal(self, frame: VideoFrame) -> SourceError:
        return SourceError(
            f"{self._name} has pictures of a kind that cannot be shown: {frame.format.name}; convert it to H.264 first"
        )


@dataclass(frozen=True)
class _ToSdr:
    """Brings light of HDR or wide-gamut pictures to an SDR screen.

    1. The signal becomes light, 1.0 being the brightness of white paper (203 cd/m2): PQ by SMPTE ST 2084, HLG by
       BT.2100 for a screen of 1000 cd/m2 (gamma 1.2), anything else by BT.1886.
    2. Light above 0.6 is pressed into what is left up to 1.0, by the curve of Reinhard et al., "Photographic Tone
       Reproduction for Digital Images" (2002), equation 4: it starts with slope 1 and ends with the peak of the
       film at 1.0.  White paper gets 233 of 255.  Red, green and blue go by themselves, so that glare turns white,
       as on film; kept in proportion, it would turn pink or green.
    3. Primaries become those of BT.709; what lies outside is clipped.
    4. Light becomes the signal by the inverse of BT.1886.
    """

    transfer: int
    primaries: int
    peak_nits: float

    def apply(self, red: _Words, green: _Words, blue: _Words) -> _Bytes:
        """``(H, W, 3)`` from three ``(H, W)`` planes as swscale scales them to 16 bit: white is 255 * 256."""
        height, width = red.shape
        image = np.empty((height, width, 3), dtype=np.uint8)
        rows = max(1, _BAND_PIXELS // width)
        for top in range(0, height, rows):
            band = slice(top, top + rows)
            self._band([np.take(self._light, plane[band]) for plane in (red, green, blue)], image[band])
        return image

    def _band(self, light: list[_Floats], image: _Bytes) -> None:
        if self.transfer == ColorTrc.ARIB_STD_B67:
            scene = np.float32(0.2627) * light[0] + np.float32(0.6780) * light[1] + np.float32(0.0593) * light[2]
            gain = np.take(self._screen_gain, (scene * np.float32(65535)).astype(np.uint16))
            for plane in light:
                plane *= gain
                plane *= np.take(self._tone_gain, (plane * np.float32(65535 / self._top)).astype(np.uint16))
        for channel, (r, g, b) in enumerate(self._matrix):
            mixed = r * light[0] + g * light[1] + b * light[2]
            np.clip(mixed, 0, 1, out=mixed)
            np.sqrt(mixed, out=mixed)  # a table over the root has its steps where the eye sees them
            mixed *= np.float32(65535)
            image[..., channel] = np.take(self._signal, mixed.astype(np.uint16))

    @property
    def _top(self) -> float:
        """The most light the first step can give, as a multiple of white."""
        return (_HIGHEST_PEAK if self.transfer == ColorTrc.SMPTE2084 else _USUAL_PEAK) / _WHITE_NITS

    @cached_property
    def _light(self) -> _Floats:
        """Light by signal: of the scene for HLG, of the screen and tone-mapped for anything else."""
        signal = np.minimum(np.arange(65536) / (255 * 256), 1.0)
        if self.transfer == ColorTrc.ARIB_STD_B67:
            a, b, c = 0.17883277, 0.28466892, 0.55991073
            light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        elif self.transfer == ColorTrc.SMPTE2084:
            m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
            root = signal ** (1 / m2)
            light = self._mapped((np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * self._top)
        else:
            light = signal**_GAMMA
        return light.astype(np.float32)

    @cached_property
    def _screen_gain(self) -> _Floats:
        """Light on the screen by light in the scene, over the light in the scene (HLG)."""
        scene = np.arange(65536) / 65535
        return (scene**0.2 * self._top).astype(np.float32)

    @cached_property
    def _tone_gain(self) -> _Floats:
        """What tone mapping leaves of light, by light up to the most there is (HLG)."""
        light = np.maximum(np.arange(65536), 1) / 65535 * self._top
        return (self._mapped(light) / light).astype(np.float32)

    def _mapped(self, light: NDArray[np.float64]) -> NDArray[np.float64]:
        """Light after tone mapping."""
        most = (max(self.peak_nits / _WHITE_NITS, 1.0) - _KNEE) / (1 - _KNEE)
        above = np.clip((light - _KNEE) / (1 - _KNEE), 0, most)
        return np.minimum(light, _KNEE) + (1 - _KNEE) * above * (1 + above / most**2) / (1 + above)

    @cached_property
    def _matrix(self) -> _Floats:
        """``(3, 3)``: RGB of BT.709 from RGB of the film."""
        if self.primaries == ColorPrimaries.BT709:
            return np.eye(3, dtype=np.float32)
        corners = _P3_CORNERS if self.primaries == ColorPrimaries.SMPTE432 else _BT2020_CORNERS
        return np.asarray(np.linalg.solve(_to_xyz(_BT709_CORNERS), _to_xyz(corners)), dtype=np.float32)

    @cached_property
    def _signal(self) -> _Bytes:
        """SDR signal by the square root of light."""
        signal = (np.arange(65536) / 65535) ** (2 / _GAMMA)
        return np.rint(signal * 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _to_sdr(transfer: int, primaries: int, peak_nits: float) -> _ToSdr:
    return _ToSdr(transfer, primaries, peak_nits)


def _to_xyz(corners: tuple[tuple[float, float], ...]) -> NDArray[np.float64]:
    """``(3, 3)``: CIE XYZ from linear RGB whose primaries have these xy and whose white is D65."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in (*corners, (0.3127, 0.3290))]).T
    return np.asarray(columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3]))


def _square(size: tuple[int, int], ratio: Fraction | None, upright: Upright) -> tuple[tuple[int, int], tuple[str, ...]]:
    """(H, W) upright with square pixels, and a note if that is not the stored shape.

    The side that is too short grows and none shrinks, so that no pixel is lost; halves are rounded up.
    A ratio of 0 means that nobody knows it.
    """
    height, width = size
    if ratio is None or ratio <= 0 or ratio == 1:
        return upright.size(size), ()
    told = f"pixels are {ratio.numerator}:{ratio.denominator} wide to high"
    if ratio > 1:
        wanted = height, floor(width * ratio + Fraction(1, 2))
    else:
        wanted = floor(height / ratio + Fraction(1, 2)), width
    largest = _MOST_WIDENING * height * width
    if wanted[0] * wanted[1] > largest or max(wanted) > max(_LARGEST_SIDE, *size):
        return upright.size(size), (f"{told}, which is hardly meant; they are taken as square",)
    shown = upright.size(wanted)
    if wanted == size:
        return shown, ()
    change = "widened" if shown[1] > upright.size(size)[1] else "stretched"
    return shown, (f"{told}; pictures are {change} to {shown[1]}x{shown[0]}",)


def _upright(matrix: bytes) -> tuple[Upright, tuple[str, ...]]:
    """What a display matrix asks for, and a note if it asks for something odd.

    The matrix maps stored (x, y) to shown (x', y'): ``x' = a x + c y``, ``y' = b x + d y``.
    """
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


def _peak(told: dict[SideType, bytes]) -> float:
    """Brightest light in the film, in cd/m2: what it measured, else what its screen could show, else 1000."""
    level = np.frombuffer(told.get(SideType.CONTENT_LIGHT_LEVEL, b"")[:4], dtype=np.uint32)
    peak = float(level[0]) if level.size else 0.0
    screen = np.frombuffer(told.get(SideType.MASTERING_DISPLAY_METADATA, b"")[:88], dtype=np.int32)
    if not peak and screen.size == 22 and screen[21] and screen[19] > 0:
        peak = float(screen[18]) / float(screen[19])
    return min(max(peak, _WHITE_NITS), _HIGHEST_PEAK) if peak > 0 else _USUAL_PEAK


def _side_data(frame: VideoFrame) -> dict[SideType, bytes]:
    """Side data of the frame, as far as it is of use here.

    All other kinds are taken off a copy of the frame first: PyAV 18.1 cannot name the newer ones, and frees the
    name of a colour profile twice.
    """
    wanted = SideType.DISPLAYMATRIX, SideType.CONTENT_LIGHT_LEVEL, SideType.MASTERING_DISPLAY_METADATA
    others = set(range(_SIDE_TYPES)) - {kind.value for kind in wanted}
    bare = _filtered(frame, *(("sidedata", f"mode=delete:type={kind}") for kind in sorted(others)))
    return {kind: bytes(side) for kind in wanted if isinstance(side := bare.side_data.get(kind.name), SideData)}


_SIDE_TYPES = 64
"""More than there are kinds of side data; FFmpeg 8.1 has some 35."""


def _interpolated(frame: VideoFrame) -> VideoFrame:
    """The first field, and lines interpolated along edges where the second one was."""
    return _filtered(frame, ("estdif", "mode=frame:deint=all"))


def _field(frame: VideoFrame) -> VideoFrame:
    """The first field: every other line, not copied."""
    return _filtered(frame, ("separatefields", None))


def _filtered(frame: VideoFrame, *filters: tuple[str, str | None]) -> VideoFrame:
    """What the filters make of one frame by itself; a fresh graph each time, so that nothing is left of another."""
    graph = Graph()
    graph.threads = 1
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))]
    nodes += [graph.add(name, settings) for name, settings in filters]
    graph.link_nodes(*nodes, graph.add("buffersink"))
    graph.configure()
    graph.vpush(frame)
    graph.vpush(None)
    made = graph.vpull()
    made.colorspace, made.color_range = frame.colorspace, frame.color_range
    return made


def _planes(frame: VideoFrame) -> tuple[_Words, _Words, _Words]:
    """``(H, W)`` red, green and blue of a ``gbrp16le`` frame."""
    green, blue, red = (
        np.frombuffer(memoryview(plane), dtype="<u2").reshape(frame.height, -1)[:, : frame.width]
        for plane in frame.planes
    )
    return red, green, blue


def _depth(frame: VideoFrame) -> int:
    """Most bits of any of its channels."""
    return max(component.bits for component in frame.format.components)


def _transparent(frame: VideoFrame) -> bool:
    """Whether some of the frame is meant to be seen through."""
    if not any(component.is_alpha for component in frame.format.components):
        return False
    try:
        shown = VideoReformatter().reformat(frame, format="rgba", threads=1)
        return bool(np.asarray(shown.to_ndarray(), dtype=np.uint8)[..., 3].min() < 255)
    except (av.error.FFmpegError, ValueError):
        return False  # nothing of this kind can be shown; whoever wants to see it is told
