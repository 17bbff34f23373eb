"""Images with known pictures, whole and broken, made with Pillow."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from streamvid.ingest.images import ImageFiles, ImagesReader
from streamvid.ingest.sampling import Sampler, Sampling, Shot

SIZE = (24, 32)


def plain(level: int, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("RGB", size[::-1], (level, 100, 200))


def smooth(size: tuple[int, int] = (48, 64)) -> Image.Image:
    """Every pixel differs from every other, and from its mirror, and neighbours differ little."""
    y, x = np.mgrid[: size[0], : size[1]]
    return Image.fromarray(np.stack([x * 3, y * 4, x + y], -1).astype(np.uint8))


def folder(path: Path, count: int, *, name: str = "frame{}.png", first: int = 0) -> Path:
    """Images whose red is 10 times their number."""
    path.mkdir(exist_ok=True)
    for k in range(first, first + count):
        plain(10 * k).save(path / name.format(k))
    return path


def reds(shots: list[Shot]) -> list[int]:
    return [round(shot.pixels[..., 0].mean() / 10) for shot in shots]


def read(
    reader: ImagesReader, sampling: Sampling | None = None, size: tuple[int, int] | None = None
) -> tuple[list[Shot], Sampler]:
    sampler = reader.sample(reader.plan(sampling or Sampling()), size=size)
    assert isinstance(sampler, Sampler)
    return list(sampler), sampler


def opened(path: Path | str, rate: Any = None) -> ImagesReader:
    return ImagesReader(ImageFiles.find(path), rate=rate)


def only(path: Path) -> NDArray[np.uint8]:
    return next(opened(path).pictures()).pixels()


def exif(
    time: str | None = None, sub: str | None = None, offset: str | None = None, orientation: int | None = None
) -> Image.Exif:
    data = Image.Exif()
    inner = data.get_ifd(ExifTags.IFD.Exif)
    for tag, value in (
        (ExifTags.Base.DateTimeOriginal, time),
        (ExifTags.Base.SubsecTimeOriginal, sub),
        (ExifTags.Base.OffsetTimeOriginal, offset),
    ):
        if value is not None:
            inner[tag] = value
    if orientation is not None:
        data[ExifTags.Base.Orientation] = orientation
    return data


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def spoil(path: Path) -> None:
    """Make pixels of a PNG wrong and leave its header and its end as they are."""
    data = path.read_bytes()
    start = data.index(b"IDAT") + 4
    path.write_bytes(data[:start] + bytes(255 - byte for byte in data[start : start + 20]) + data[start + 20 :])


SAVED: dict[str, dict[str, Any]] = {
    "a.png": {},
    "a.jpg": {"quality": 95, "subsampling": 0},
    "a.webp": {"lossless": True},
    "a.bmp": {},
    "a.tif": {},
    "lzw.tiff": {"compression": "tiff_lzw"},
    "a.avif": {"quality": 95, "subsampling": "4:4:4"},
    "a.jp2": {},
    "a.ppm": {},
}


def broken(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"hello" * 50, "cut": data[: len(data) // 2], "head": data[:40]}[how])


def animation(path: Path, durations: list[int], *, size: tuple[int, int] = (30, 40), **how: Any) -> Path:
    """A square that moves over a still background, so that frames are parts of the canvas."""
    frames = []
    for k in range(len(durations)):
        frame = smooth(size)
        frame.paste((250, 10 * k, 0), (k, k, k + 8, k + 8))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, lossless=True, **how)
    return path


def frames_of(path: Path) -> list[tuple[int, NDArray[np.uint8]]]:
    found = []
    with Image.open(path) as image:
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            image.load()
            found.append((image.info["timestamp"], np.asarray(image.convert("RGB"))))
    return found
