"""The picture and the clip of an alert: held while they may be needed, written, and bounded on the disk.

Knows pictures, times and files; knows no rule and no queue.
"""

from __future__ import annotations

import io
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from streamvid.errors import SourceError
from streamvid.frames import Clip

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import OutputContainer
    from av.packet import Packet

JPEG_QUALITY = 90

TICKS = 90_000
"""Of a second: times in a clip are this exact."""

ENCODERS = ("libx264", "libopenh264", "h264", "mpeg4")
"""The first that this build of FFmpeg has writes the clips."""

SUFFIXES = (".jpg", ".mp4")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture, compressed."""

    pts: Fraction
    """In seconds of the stream."""

    duration: Fraction
    jpeg: bytes


class Ring:
    """The latest pictures of a stream as JPEG: a tenth or less of what they take as pixels.

    Args:
        megabytes: most it holds; beyond, the oldest go and clips begin later.
    """

    def __init__(self, megabytes: int = 64) -> None:
        self._most = megabytes << 20
        self._pictures: deque[Picture] = deque()
        self._bytes = 0

    def add(self, clip: Clip) -> None:
        """Take in the next pictures."""
        for pixels, pts, duration in zip(clip.pixels, clip.pts, clip.durations, strict=True):
            file = io.BytesIO()
            Image.fromarray(pixels.cpu().numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
            self._pictures.append(Picture(pts, duration, file.getvalue()))
            self._bytes += file.tell()
        while self._bytes > self._most and len(self._pictures) > 1:
            self._pop()

    def forget(self, before: Fraction) -> None:
        """Let go of what ended before this time."""
        while self._pictures and self._pictures[0].pts + self._pictures[0].duration <= before:
            self._pop()

    def between(self, start: Fraction, stop: Fraction) -> list[Picture]:
        """Those on screen in [start, stop), in order."""
        return [p for p in self._pictures if p.pts < stop and p.pts + p.duration > start]

    def at(self, moment: Fraction) -> Picture | None:
        """The one on screen at a moment, else the last before it; None if there is none."""
        return next((p for p in reversed(self._pictures) if p.pts <= moment), None)

    @property
    def stop(self) -> Fraction:
        """When the last picture ends; 0 without one."""
        return self._pictures[-1].pts + self._pictures[-1].duration if self._pictures else Fraction(0)

    def _pop(self) -> None:
        self._bytes -= len(self._pictures.popleft().jpeg)


class Shelf:
    """Where pictures and clips lie, of all streams together within a bound.

    Args:
        folder: ``MEMORY/alerts``; each stream has a folder in it.
        most_bytes: of all files together; beyond, the oldest are deleted.
        undelivered: ids of the alerts whose files go last.
    """

    def __init__(
        self, folder: Path, *, most_bytes: int, undelivered: Callable[[], Collection[str]] = lambda: ()
    ) -> None:
        self.folder, self.most_bytes, self._undelivered = folder, most_bytes, undelivered

    def path(self, stream: str, id: str, suffix: str) -> Path:
        """Where the file of an alert lies or will lie."""
        return (self.folder / stream / f"{id}{suffix}").absolute()

    def open(self, stream: str) -> None:
        """Make the folder of a stream; what an earlier run left unfinished is removed.

        Raises:
            SourceError: if it cannot be made.
        """
        try:
            (self.folder / stream).mkdir(parents=True, exist_ok=True)
            for part in (self.folder / stream).glob("*.part"):
                part.unlink(missing_ok=True)
        except OSError as reason:
            raise SourceError(
                f"cannot make {self.folder / stream} for pictures of alerts: {reason.strerror}; choose another memory"
            ) from None

    def tidy(self) -> int:
        """Delete the oldest files beyond the bound; returns how many."""
        files = [
            (entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path))
            for folder in os.scandir(self.folder)
            if folder.is_dir()
            for entry in os.scandir(folder)
            if entry.name.endswith(SUFFIXES)
        ]
        total = sum(size for _, size, _ in files)
        if total <= self.most_bytes:
            return 0
        spared, gone = self._undelivered(), 0
        for _, size, path in sorted(files, key=lambda f: (f[2].stem in spared, f[0])):
            if total <= self.most_bytes:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                total, gone = total - size, gone + 1
        return gone


def write_picture(picture: Picture, path: Path) -> None:
    """Save one picture.

    Raises:
        SourceError: if it cannot be written.
    """
    with _whole(path) as part:
        part.write_bytes(picture.jpeg)


def write_clip(pictures: Sequence[Picture], path: Path, *, began: datetime) -> None:
    """Save pictures as MP4, each for as long as it was on screen.

    Args:
        pictures: in order of time; those of another size than the first are left out.
        path: where to; it appears when it is complete.
        began: the clock at the first picture; kept in the file.

    Raises:
        SourceError: if there are no pictures, or the file cannot be written.
    """
    import av
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    if not pictures:
        raise SourceError(f"{path.name} would have no picture: none of that time is held any more")
    with Image.open(io.BytesIO(pictures[0].jpeg)) as image:
        size = image.size
    width, height = size[0] // 2 * 2, size[1] // 2 * 2
    first, tick = pictures[0].pts, Fraction(1, TICKS)
    span = pictures[-1].pts + pictures[-1].duration - first
    rate = max(1, min(60, math.ceil(len(pictures) / span)))
    name = next((one for one in ENCODERS if one in av.codecs_available), "")
    if not name:
        raise SourceError(f"{path.name} cannot be written: this FFmpeg has none of {', '.join(ENCODERS)}")
    try:
        with _whole(path) as part, av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as out:
            out.metadata["creation_time"] = began.isoformat()
            options = {"crf": "23", "preset": "veryfast", "threads": "1"} if name == "libx264" else {}
            stream = out.add_stream(name, rate=rate, options=options)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = tick
            stays: dict[int, int] = {}
            for picture in pictures:
                with Image.open(io.BytesIO(picture.jpeg)) as image:
                    if image.size != size:
                        continue
                    pixels = np.asarray(image.convert("RGB"))[:height, :width]
                frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = round((picture.pts - first) * TICKS), tick
                stays[frame.pts] = max(1, round(picture.duration * TICKS))
                for packet in stream.encode(frame):
                    _mux(out, packet, stays)
            for packet in stream.encode(None):
                _mux(out, packet, stays)
    except av.FFmpegError as reason:
        raise SourceError(f"{path} cannot be written: {reason.strerror}") from None


def _mux(out: OutputContainer, packet: Packet[Any], stays: dict[int, int]) -> None:
    if packet.pts in stays:
        packet.duration = stays[packet.pts]
    out.mux(packet)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its name once it is complete."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as reason:
        raise SourceError(f"{path} cannot be written: {reason.strerror or reason}") from None
    finally:
        part.unlink(missing_ok=True)
