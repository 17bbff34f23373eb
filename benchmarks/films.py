"""Films for ``decode.py``, and what is asked of them: long, made in seconds, every picture wearing its own number.

A loop of 30 s is drawn and encoded once for each codec, size and GOP; the long film repeats the
loop's packets with later times.  GOPs are closed and of fixed length, so a repeated loop decodes
exactly as the first one did, and the number drawn in the picture repeats with it.

What is drawn: a fractal texture that pans, patches of another texture that cross it on paths of
their own, and fresh grain in every picture.  Motion and grain make P and B pictures cost bits, as
they do in a recording; a film of flat colours would decode several times faster.

The number is written as ten blocks, white for 1, with the opposite blocks below them, so it can be
read from any scaled copy by comparing each block with the one under it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import cos, sin
from pathlib import Path

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

FPS = 25
LOOP = 750
"""Pictures in a loop: a multiple of both GOP lengths, and 30 s."""

BITS = 10
CELL = 18
"""The side of a block is the picture's height divided by this."""

_UNSURE = 40
"""Blocks that differ by less than this cannot be told apart."""

HEIGHTS = {"720p": 720, "1080p": 1080}

KBITS = {"720p": 1200, "1080p": 2000}
"""What H.264 is encoded at, in kbit/s: near what video sites serve."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How a codec is encoded."""

    encoder: str
    suffix: str
    share: float
    """Bits it is given for each bit of H.264; 0 for constant quality."""

    def options(self, gop: int) -> dict[str, str]:
        """Fast presets, their own B pictures, key frames exactly every ``gop`` pictures and closed GOPs."""
        if self.encoder == "libx264":
            return {"preset": "fast", "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0"}
        if self.encoder == "libx265":
            fixed = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:log-level=error"
            return {"preset": "veryfast", "x265-params": fixed}
        if self.encoder == "libvpx-vp9":
            return {"deadline": "good", "cpu-used": "5", "row-mt": "1", "keyint_min": str(gop)}
        # Its rate control gives short GOPs far too little.
        return {"preset": "9", "crf": "35", "svtav1-params": f"keyint={gop}:scd=0:irefresh-type=2"}


CODINGS = {
    "h264": Coding("libx264", "mp4", 1.0),
    "hevc": Coding("libx265", "mp4", 0.6),
    "vp9": Coding("libvpx-vp9", "webm", 0.6),
    "av1": Coding("libsvtav1", "mp4", 0.0),
}


@dataclass(frozen=True, slots=True)
class Film:
    """One film of the set."""

    codec: str
    size: str
    gop: int
    seconds: int
    """A multiple of the loop, which is 30 s."""

    def __post_init__(self) -> None:
        if self.seconds < 1 or self.seconds * FPS % LOOP:
            raise SystemExit(f"films are made of loops of {LOOP // FPS} s, {self.seconds} s is no multiple of that")
        if LOOP % self.gop:
            raise SystemExit(f"a loop of {LOOP} pictures cannot be cut into GOPs of {self.gop}")

    def __str__(self) -> str:
        return f"{self.codec} {self.size} GOP {self.gop} {self.seconds} s"

    @property
    def name(self) -> str:
        """What it is called on disk."""
        return f"{self.codec}-{self.size}-gop{self.gop}-{self.seconds}s.{CODINGS[self.codec].suffix}"

    def number_at(self, moment: Fraction) -> int:
        """The number of the picture on screen at a moment in seconds."""
        return int(moment * FPS) % LOOP

    def make(self, folder: Path) -> Path:
        """The film's path; encoded and written first if it is not there."""
        path = folder / self.name
        if not path.exists():
            print(f"making {self.name}", file=sys.stderr, flush=True)
            loop = folder / "loops" / Film(self.codec, self.size, self.gop, LOOP // FPS).name
            if not loop.exists():
                loop.parent.mkdir(parents=True, exist_ok=True)
                _in_place(loop, lambda part: _encode_loop(self, part))
            _in_place(path, lambda part: _repeat(loop, part, self.seconds * FPS // LOOP))
        return path


@dataclass(frozen=True, slots=True)
class Ask:
    """How many frames of a film are wanted."""

    text: str
    """A number of frames, or a rate such as 1fps."""

    def __str__(self) -> str:
        return self.text if self.count is None else f"{self.count} frames"

    @property
    def count(self) -> int | None:
        """So many frames, evenly spread; None if a rate is asked for."""
        return None if self.text.endswith("fps") else int(self.text)

    @property
    def fps(self) -> Fraction | None:
        """So many frames a second; None if a count is asked for."""
        return Fraction(self.text[:-3]) if self.text.endswith("fps") else None

    def moments(self, seconds: int) -> list[Fraction]:
        """Target times in a film that starts at 0."""
        rate = self.fps or Fraction(self.count or 1, seconds)
        number = self.count or int(seconds * rate)
        return [k / rate for k in range(number)]


def read_number(corner: NDArray[np.uint8]) -> int | None:
    """The number in a picture's ``corner_shape`` corner, ``(h, w, 3)``; None if it cannot be read."""
    height, width = corner.shape[0] / 2, corner.shape[1] / BITS
    grey = corner.astype(np.float32).mean(axis=2)
    number = 0
    for bit in range(BITS):
        across = slice(int((bit + 0.3) * width), max(int((bit + 0.7) * width), int((bit + 0.3) * width) + 1))
        above = grey[int(0.3 * height) : int(0.7 * height), across].mean()
        below = grey[int(1.3 * height) : int(1.7 * height), across].mean()
        if abs(above - below) < _UNSURE:
            return None
        number |= int(above > below) << bit
    return number


def corner_shape(height: int) -> tuple[int, int]:
    """(h, w) of the corner that holds the number, for a picture of this height."""
    return round(2 * height / CELL), round(BITS * height / CELL)


def _in_place(path: Path, write: Callable[[Path], None]) -> None:
    """Write under another name first, so that a film that exists is whole."""
    part = path.with_name(f"part-{path.name}")
    write(part)
    part.rename(path)


def _fractal(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Noise of halving amplitude at doubling detail, mean 0, deviation about 1."""
    total = np.zeros((height, width), np.float32)
    cell = 256
    while cell >= 2:
        coarse = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
        rows = np.arange(height, dtype=np.float32) / cell
        columns = np.arange(width, dtype=np.float32) / cell
        r, c = rows.astype(int), columns.astype(int)
        fr, fc = (rows - r)[:, None], (columns - c)[None]
        upper = coarse[r][:, c] * (1 - fc) + coarse[r][:, c + 1] * fc
        lower = coarse[r + 1][:, c] * (1 - fc) + coarse[r + 1][:, c + 1] * fc
        total += (upper * (1 - fr) + lower * fr) * (cell / 256) ** 0.7
        cell //= 2
    return np.asarray(total / total.std(), dtype=np.float32)


def _draw(size: str) -> Iterator[NDArray[np.uint8]]:
    """The pictures of a loop as planar YUV 4:2:0, ``(H * 3 / 2, W)``."""
    height = HEIGHTS[size]
    width = height * 16 // 9
    rng = np.random.default_rng(7)
    room = 256
    luma = np.clip(_fractal(rng, height + room, width + room) * 38 + 120, 20, 230).astype(np.int16)
    chroma = [
        np.clip(_fractal(rng, (height + room) // 2, (width + room) // 2) * 14 + 128, 40, 215).astype(np.uint8)
        for _ in range(2)
    ]
    other = np.clip(_fractal(rng, height, width) * 45 + 140, 20, 230).astype(np.int16)
    grain = [np.round(rng.standard_normal((height, width)) * 2.5).astype(np.int16) for _ in range(8)]
    side = height // 5
    paths = rng.uniform(0.2, 1.0, (6, 4))
    for number in range(LOOP):
        t = number / FPS
        y, x = (int((0.5 + 0.5 * turn) * (room - 2)) & ~1 for turn in (sin(0.31 * t), cos(0.23 * t)))
        picture = luma[y : y + height, x : x + width].copy()
        for place, (a, b, phase, tilt) in enumerate(paths):
            top = int((0.5 + 0.5 * sin(a * t + 6 * phase)) * (height - side))
            left = int((0.5 + 0.5 * cos(b * t + 6 * tilt)) * (width - side))
            corner = place * side // 2
            picture[top : top + side, left : left + side] = other[corner : corner + side, corner : corner + side]
        shift = tuple(int(n) for n in rng.integers(0, height, 2))
        picture += np.roll(grain[number % len(grain)], shift, (0, 1))
        _write_number(picture, number)
        planes = [np.clip(picture, 16, 235).astype(np.uint8)]
        for plane in chroma:
            cut = plane[y // 2 : (y + height) // 2, x // 2 : (x + width) // 2].copy()
            cut[: corner_shape(height)[0] // 2 + 1, : corner_shape(height)[1] // 2 + 1] = 128
            planes.append(cut.reshape(height // 4, width))
        yield np.concatenate(planes)


def _write_number(picture: NDArray[np.int16], number: int) -> None:
    side = picture.shape[0] / CELL
    for bit in range(BITS):
        left, right = round(bit * side), round((bit + 1) * side)
        one = bool(number >> bit & 1)
        picture[: round(side), left:right] = 220 if one else 30
        picture[round(side) : round(2 * side), left:right] = 30 if one else 220


def _encode_loop(film: Film, path: Path) -> None:
    coding, height = CODINGS[film.codec], HEIGHTS[film.size]
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    with av.open(str(path), "w") as out:
        stream = out.add_stream(coding.encoder, rate=FPS, options=coding.options(film.gop))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = height * 16 // 9, height, "yuv420p"
        stream.codec_context.gop_size = film.gop
        stream.bit_rate = int(KBITS[film.size] * 1000 * coding.share)
        for number, picture in enumerate(_draw(film.size)):
            frame = VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _repeat(loop: Path, path: Path, times: int) -> None:
    """The loop's packets over and over, each round later by one loop."""
    with av.open(str(loop)) as source, av.open(str(path), "w") as out:
        stream = source.streams.video[0]
        base = stream.time_base
        assert base is not None
        packets = [packet for packet in source.demux(stream) if packet.size]
        _check(loop, packets)
        target = out.add_stream_from_template(stream, opaque=True)  # no encoder by the decoder's name is needed
        stamps = [(packet.pts, packet.dts, packet.duration) for packet in packets]
        for turn in range(times):
            later = int(turn * LOOP / FPS / base)
            for packet, (pts, dts, duration) in zip(packets, stamps, strict=True):
                assert pts is not None and dts is not None
                packet.stream, packet.time_base = target, base
                packet.pts, packet.dts, packet.duration = pts + later, dts + later, duration
                out.mux_one(packet)


def _check(loop: Path, packets: list[Packet[VideoStream]]) -> None:
    """Refuse a loop that is not what its name says."""
    times = sorted(packet.pts * packet.time_base for packet in packets if packet.pts is not None)
    if times != [Fraction(number, FPS) for number in range(LOOP)]:
        raise SystemExit(f"{loop.name} has {len(times)} pictures with unexpected times; this encoder cannot be used")
    keys = [packet.pts * packet.time_base * FPS for packet in packets if packet.is_keyframe and packet.pts is not None]
    gop = int(loop.name.split("-gop")[1].split("-")[0])
    if keys != list(range(0, LOOP, gop)):
        raise SystemExit(f"{loop.name} has key frames at {[int(k) for k in keys]}, not every {gop} pictures")
