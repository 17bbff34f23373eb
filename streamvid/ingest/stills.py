"""One image file: which format it has, whether it is whole, when it was taken, and its pixels.  Pillow does the work.

Formats are told by their first bytes and opened by their own class: whatever else Pillow has
plugins for is out of reach, and its bound on pixels, a setting of the whole process, stays as it is.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from streamvid.ingest.convert import Upright

MAX_PIXELS = 2**28
"""An image whose header claims more pixels than this is not decoded."""

RANGELESS = frozenset({"I", "F", "LAB", "HSV"})
"""Pillow's kinds of pixels that no rule makes RGB: nothing says what their black and white are, or FFmpeg has none."""

_TAIL_BYTES = 1 << 16

_OPENERS: dict[str, Callable[[IO[bytes]], ImageFile]] = {
    "avif": AvifImageFile,
    "bmp": BmpImageFile,
    "jpeg": JpegImageFile,
    "jpeg2000": Jpeg2KImageFile,
    "png": PngImageFile,
    "pnm": PpmImageFile,
    "tiff": TiffImageFile,
    "webp": WebPImageFile,
}

_STARTS = (
    (rb"\xff\xd8\xff", "jpeg"),
    (rb"\x89PNG\r\n\x1a\n", "png"),
    (rb"RIFF....WEBPVP8[ LX].{14}", "webp"),
    (rb"BM....\0\0\0\0....[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "bmp"),
    (rb"II[*+]\0|MM\0[*+]", "tiff"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "jpeg2000"),
    (rb"P[456][ \t\r\n]", "pnm"),
)
"""How a file begins, by format; AVIF is told by its brands."""

_TURNS = {
    2: Upright(flip_x=True),
    3: Upright(flip_x=True, flip_y=True),
    4: Upright(flip_y=True),
    5: Upright(transpose=True),
    6: Upright(transpose=True, flip_x=True),
    7: Upright(transpose=True, flip_x=True, flip_y=True),
    8: Upright(transpose=True, flip_y=True),
}
"""By EXIF orientation (CIPA DC-008, tag 0x0112)."""

_FILTER = threading.Lock()
"""Python's warning filters belong to the whole process, so one thread at a time may change them."""


class Unusable(Exception):
    """One image that cannot be shown; says why as the end of a sentence."""

    def __init__(self, why: str, *, large: bool = False) -> None:
        super().__init__(why)
        self.large = large


@dataclass(frozen=True, slots=True)
class Still:
    """A decoded image and what its file said."""

    pixels: NDArray[np.uint8]
    """``(H, W, 3)`` RGB or ``(H, W)`` grey, upright, of the size asked for."""

    size: tuple[int, int]
    """(H, W) of the whole upright image."""

    format: str
    mode: str
    """Kind of the stored pixels as Pillow names it, such as RGB, P or CMYK."""

    upright: Upright
    """How the stored pixels were turned."""

    transparent: bool
    """Whether some of it is meant to be seen through."""


@dataclass(frozen=True, slots=True)
class Taken:
    """When an image was taken, as its EXIF says."""

    seconds: Fraction
    """On the local clock, since the beginning of 1970."""

    digits: int
    """Decimals of the second."""

    offset: str
    """From UTC to the local clock, such as "+02:00"; empty if not told."""

    text: str
    """The moment in words, without the offset."""

    @property
    def utc(self) -> Fraction:
        """The same moment on the clock of UTC; only with an offset."""
        ahead = 60 * int(self.offset[1:3]) + int(self.offset[4:6])
        return self.seconds - 60 * (ahead if self.offset[0] == "+" else -ahead)


def format_of(head: bytes) -> str | None:
    """The image format of a file by its first 64 bytes or more; None for all that is not read here."""
    for start, name in _STARTS:
        if re.match(start, head, re.DOTALL):
            return name
    return "avif" if b"avif" in brands(head) or b"avis" in brands(head) else None


def brands(head: bytes) -> list[bytes]:
    """The brands that an MP4 family file names at its start, the major one first; empty for other files."""
    if head[4:8] != b"ftyp":
        return []
    stop = min(int.from_bytes(head[:4], "big"), len(head))
    return [head[8:12], *(head[k : k + 4] for k in range(16, stop - 3, 4))]


def png_chunks(head: bytes) -> Iterator[bytes]:
    """The names of a PNG's chunks, as far as the bytes go."""
    start = 8
    while start + 8 <= len(head):
        yield head[start + 4 : start + 8]
        start += 12 + int.from_bytes(head[start : start + 4], "big")


@contextmanager
def blaming() -> Iterator[None]:
    """Turn whatever Pillow raises into Unusable: on damaged bytes its plugins raise nearly everything."""
    try:
        yield
    except Unusable:
        raise
    except MemoryError:  # asked for by a damaged header, or by an image that is too large for this machine
        raise Unusable("needs more memory than there is; scale it down or copy it again") from None
    except Image.DecompressionBombError:
        raise Unusable("has more pixels than Pillow decodes; scale it down first", large=True) from None
    except Exception as reason:
        if isinstance(reason, FileNotFoundError):
            why = "is gone; check the path"
        elif isinstance(reason, OSError) and reason.errno is not None:
            why = f"cannot be read: {reason.strerror}"
        else:
            why = "is cut off; copy it again" if "truncated" in str(reason) else "is damaged; copy it again"
        raise Unusable(why) from reason


@contextmanager
def opened(path: Path) -> Iterator[tuple[str, ImageFile]]:
    """Format and image of a file, by its header only; raises Unusable, also for what happens inside of the block."""
    with blaming(), path.open("rb") as file:
        kind = format_of(file.read(64))
        if kind is None:
            raise Unusable("is no image of a format that is read here")
        file.seek(0)
        with _quietly():
            image = _OPENERS[kind](file)
        width, height = image.size
        if width * height > MAX_PIXELS:
            limit = f"{width}x{height} pixels and at most {MAX_PIXELS} in all are decoded"
            raise Unusable(f"has {limit}; scale it down first", large=True)
        yield kind, image


def check(path: Path) -> None:
    """Raise Unusable unless the header is sound and, for JPEG and PNG, the end is there; decodes nothing."""
    with opened(path) as (kind, image):
        if image.fp is not None and not _ends(image.fp, kind):
            raise Unusable("is cut off; copy it again")


def load(path: Path, size: tuple[int, int], *, grey: bool = False) -> Still:
    """Decode an image at ``size`` (H, W); raises Unusable.

    A JPEG much larger than that is decoded at a half, a quarter or an eighth, and at no less
    than twice ``size``.
    """
    with opened(path) as (kind, image):
        upright = turn_of(image)
        width, height = image.size
        mode = image.mode
        if isinstance(image, JpegImageFile):
            down, across = upright.size(size)
            image.draft("L" if grey else None, (2 * across, 2 * down))
        image.load()
        if isinstance(image, PngImageFile):
            upright = turn_of(image)  # may come after the pixels
        left = Upright() if isinstance(image, TiffImageFile) else upright  # Pillow turns a TIFF while loading it
        pixels = render(image, size, left, grey=grey)
        return Still(pixels, left.size((height, width)), kind, mode, upright, transparent(image))


def turn_of(image: Image.Image) -> Upright:
    """What EXIF says of the image's orientation; none if it says nothing that makes sense."""
    with _quietly():
        return _TURNS.get(_exif(image).get(ExifTags.Base.Orientation, 1), Upright())


def render(image: Image.Image, size: tuple[int, int], upright: Upright, *, grey: bool = False) -> NDArray[np.uint8]:
    """Pixels of a loaded image at ``size`` (H, W), upright."""
    shown = grey_of(image) if grey else rgb_of(image)
    wanted = upright.size(size)[::-1]
    if shown.size != wanted:
        shown = shown.resize(wanted, Image.Resampling.BOX if grey else Image.Resampling.BICUBIC)
    return upright.apply(np.array(shown, dtype=np.uint8))


def rgb_of(image: Image.Image) -> Image.Image:
    """The image in RGB as FFmpeg gives it: transparency dropped, palettes looked up, 16 bits rounded to 8."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return grey_of(image).convert("RGB")
    if image.mode in RANGELESS:
        raise Unusable(f"has pixels of a kind that cannot be shown: {image.mode}; save it with 8 or 16 bits in RGB")
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]  # else Pillow looks at it, with a warning
    return image.convert("RGB")


def transparent(image: Image.Image) -> bool:
    """Whether some of a loaded image is meant to be seen through."""
    if "A" in image.getbands():
        return bool(np.asarray(image.getchannel("A")).min() < 255)
    return "transparency" in image.info


def grey_of(image: Image.Image) -> Image.Image:
    """The image's brightness."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    return image if image.mode == "L" else rgb_of(image).convert("L")


def taken(path: Path) -> Taken | None:
    """When the image was taken; None if it does not say.  Reads the header only; raises Unusable."""
    with opened(path) as (_, image), _quietly():
        said = _exif(image).get_ifd(ExifTags.IFD.Exif)
    clock = _text(said.get(ExifTags.Base.DateTimeOriginal))
    try:
        moment = datetime.strptime(clock, "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None
    part = _text(said.get(ExifTags.Base.SubsecTimeOriginal))
    part = part if re.fullmatch("[0-9]{1,9}", part) else ""
    offset = _text(said.get(ExifTags.Base.OffsetTimeOriginal))
    offset = offset if re.fullmatch("[+-][0-9]{2}:[0-9]{2}", offset) else ""
    seconds = (moment - datetime(1970, 1, 1)) // timedelta(seconds=1) + Fraction(int(part or 0), 10 ** len(part))
    return Taken(seconds, len(part), offset, str(moment) + (f".{part}" if part else ""))


def webp_frames(path: Path) -> list[tuple[int, bool]]:
    """Of every frame of an animated WebP, how many ms it stays and whether it covers all that was before.

    Reads chunk headers only ("WebP Container Specification", RFC 9649, section 2.7).
    """
    frames: list[tuple[int, bool]] = []
    with blaming(), path.open("rb") as file:
        head = file.read(30)
        canvas = head[24:30]
        start = 30
        while len(chunk := file.read(24)) >= 8:
            if chunk[:4] == b"ANMF" and len(chunk) == 24:
                covers = chunk[14:20] == canvas and bool(chunk[23] & 2)
                frames.append((int.from_bytes(chunk[20:23], "little"), covers or not frames))
            length = int.from_bytes(chunk[4:8], "little")
            start += 8 + length + length % 2
            file.seek(start)
    return frames


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's warnings of tags that make no sense."""
    with _FILTER, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _exif(image: Image.Image) -> Image.Exif:
    """EXIF without decoding: a PNG asked for what it does not have yet would be read to its end."""
    if isinstance(image, PngImageFile) and image.tile and "exif" not in image.info:
        return Image.Exif()
    return image.getexif()


def _text(value: object) -> str:
    return value.strip(" \0") if isinstance(value, str) else ""


def _ends(file: IO[bytes], kind: str) -> bool:
    """Whether a file of a format that marks its end has that mark; something else may follow it."""
    mark = {"jpeg": b"\xff\xd9", "png": b"IEND"}.get(kind)
    if mark is None:
        return True
    size = file.seek(0, 2)
    start = _scan(file) if kind == "jpeg" else 0
    file.seek(max(start, size - _TAIL_BYTES))
    if mark in file.read():
        return True
    file.seek(start)
    return mark in file.read()


def _scan(file: IO[bytes]) -> int:
    """Where the pixels of a JPEG begin: a preview before them has a start and an end of its own."""
    start = 2
    while True:
        file.seek(start)
        segment = file.read(4)
        if len(segment) < 4 or segment[0] != 0xFF or segment[1] == 0xDA:
            return start
        start += 1 if segment[1] == 0xFF else 2 + int.from_bytes(segment[2:], "big")
