"""Small videos with known pictures at known times, made with PyAV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS = 10


def picture(number: int, size: tuple[int, int] = (32, 160)) -> NDArray[np.uint8]:
    """A picture that shows its number as ten black or white bars."""
    height, width = size
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, dtype=np.uint8) * 200 + 25, width // BITS)
    row = np.pad(row, (0, width - len(row)), mode="edge")
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number(pixels: Tensor) -> int:
    """The number that a decoded picture shows."""
    bars = pixels.float().mean(dim=(0, 2))
    bar = len(bars) / BITS
    return sum(1 << bit for bit in range(BITS) if bars[int(bar * (bit + 0.5))] > 125)


def numbers(frames: Sequence[object]) -> list[int]:
    return [number(frame.pixels) for frame in frames]  # type: ignore[attr-defined]


def write(
    path: Path,
    times: Sequence[Fraction | float],
    *,
    last: Fraction | float = Fraction(1, 10),
    size: tuple[int, int] = (32, 160),
    gop: int = 12,
    bframes: int = 2,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
    rotation: int = 0,
    kind: str | None = None,
    first: int = 0,
    noise: int = 0,
) -> Path:
    """Pictures ``first``, ``first + 1``, ... at the given seconds; the last one stays for ``last``."""
    tick = Fraction(1, 1000)
    stamps = [round(Fraction(time).limit_denominator(1000) / tick) for time in times]
    stays = {a: b - a for a, b in zip(stamps, [*stamps[1:], stamps[-1] + round(Fraction(last) / tick)], strict=True)}
    settings = {
        "crf": "10",
        "preset": "ultrafast",
        "g": str(gop),
        "bf": str(bframes),
        "threads": "1",
        **(options or {}),
    }
    with av.open(str(path), "w", format=kind, container_options=dict(container or {})) as file:
        stream = file.add_stream(codec, rate=25, options=settings if codec == "libx264" else dict(options or {}))
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.time_base = stream.codec_context.time_base = tick
        if rotation:
            stream.set_display_rotation(rotation)
        for k, stamp in enumerate(stamps):
            image = picture(first + k, size)
            if noise:
                image += np.random.default_rng(k).integers(0, noise, image.shape, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = stamp, tick
            _mux(file, stream.encode(frame), stays, tick)
        _mux(file, stream.encode(None), stays, tick)
    return path


def _mux(file: av.container.OutputContainer, packets: list[av.Packet], stays: dict[int, int], tick: Fraction) -> None:
    for packet in packets:
        packet.duration = stays[round(packet.pts * packet.time_base / tick)]
        file.mux(packet)


def even(count: int, fps: int = 10, start: float = 0.0) -> list[Fraction]:
    return [Fraction(start).limit_denominator(1000) + Fraction(k, fps) for k in range(count)]


def write_sound(path: Path, codec: str = "aac") -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=48000, layout="mono")
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, k * 1024
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_two(path: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """One video stream per size; stream ``i`` shows the number ``i``."""
    with av.open(str(path), "w") as file:
        streams = []
        for height, width in sizes:
            stream = file.add_stream("libx264", rate=10, options={"threads": "1", "preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            streams.append(stream)
        for k in range(10):
            for i, (stream, size) in enumerate(zip(streams, sizes, strict=True)):
                frame = av.VideoFrame.from_ndarray(picture(i, size), format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 10)
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode(None))
    return path


def same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two lists of frames are equal in times and pixels."""
    return len(a) == len(b) and all(
        (x.pts, x.duration) == (y.pts, y.duration) and torch.equal(x.pixels, y.pixels)  # type: ignore[attr-defined]
        for x, y in zip(a, b, strict=True)
    )
