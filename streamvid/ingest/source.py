"""Where frames come from: what every source can do, and how one is opened."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Self

from streamvid.errors import SettingsError, SourceError, near
from streamvid.ingest.files import check_file, label
from streamvid.ingest.pictures import DecodeStats, Pictures
from streamvid.ingest.sampling import Plan, SampledFrames, Sampling, SamplingReport, exact

DECODERS = ("auto", "pyav")
"""What ``open_source`` takes as ``decoder``."""


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What is known about a source once its first picture has been decoded."""

    path: str
    """Absolute path; for anything but a file, the address without credentials."""

    name: str
    """The path as the user gave it, for messages; never holds credentials."""

    container: str
    """Container format as FFmpeg names it."""

    codec: str
    """Codec as FFmpeg names it, such as h264."""

    width: int
    """Width in pixels of the upright picture."""

    height: int
    """Height in pixels of the upright picture."""

    duration: Fraction | None
    """From the first picture's appearance to the last one's end, in seconds; None if only reading everything tells."""

    start: Fraction
    """Container time of the first picture in seconds; the clock of all frames, often but not always 0."""

    time_base: Fraction
    """The tick of the container's clock in seconds."""

    average_rate: Fraction | None
    """Pictures a second as the header claims; may be nonsense, so nothing is computed from it but guesses."""

    rotation: int
    """Clockwise turn, in degrees, that made the stored picture upright: 0, 90, 180 or 270."""

    decoder: str
    """Which decoder reads it."""

    notes: tuple[str, ...] = ()
    """What a reader should know: mirrored, not square pixels, high dynamic range, a header that lies."""


class Source(ABC):
    """A video that can be looked at any number of times; a context manager.

    Nothing is held in memory between calls.  Every ``frames`` call reads on its own, so
    several may run side by side.  All times are container seconds: add nothing, subtract
    nothing; ``info.start`` says when the first picture appears.
    """

    info: SourceInfo

    def __init__(self) -> None:
        self._latest: SampledFrames | None = None

    @abstractmethod
    def pictures(self) -> Pictures:
        """A new pass over all pictures, from the first."""

    def close(self) -> None:  # noqa: B027 - a source that holds nothing has nothing to let go of
        """Let go of whatever is held open; closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def frames(self, sampling: Sampling | None = None, *, size: tuple[int, int] | None = None) -> SampledFrames:
        """Frames at the sampled times, in order, one by one.

        Args:
            sampling: which moments; None takes every picture.
            size: (height, width) to scale to while converting.  None keeps the full size,
                which is what a model's own, exact resize wants.

        Raises:
            SourceError: if the span holds no picture, here where that is known, else when read.
        """
        if size is not None and min(size) < 1:
            raise ValueError(f"size must be (height, width) of at least 1, got {size}")
        taken = SampledFrames(self.pictures(), self.plan(sampling or Sampling()), size=size, name=self.info.name)
        self._latest = taken
        return taken

    @property
    def stats(self) -> DecodeStats:
        """What happened while decoding in the latest ``frames`` call."""
        return self._latest.stats if self._latest is not None else DecodeStats()

    @property
    def report(self) -> SamplingReport | None:
        """What the latest ``frames`` call looked at; None before there was one."""
        return self._latest.report if self._latest is not None else None

    @property
    def end(self) -> Fraction:
        """When the last picture is gone, in container seconds; reads everything once if the container does not tell."""
        return self.info.start + self.info.duration if self.info.duration is not None else self._measured_end()

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """How many pictures appear in ``[start, stop)``; decodes unless the decoder knows better."""
        with self.pictures() as pictures:
            return sum(start <= picture.pts < stop for picture in pictures)

    def plan(self, sampling: Sampling) -> Plan:
        """The sampling made exact for this source; see ``Sampling`` for its meaning.

        Raises:
            SourceError: if the span lies outside of the source.
        """
        info = self.info
        start = info.start if sampling.start is None else max(exact(sampling.start), info.start)
        stop = None if sampling.stop is None else exact(sampling.stop)
        bounded = sampling.count is not None or sampling.max_frames is not None
        end = self.end if bounded or info.duration is not None else None
        if (stop is not None and stop <= info.start) or (end is not None and start >= end):
            asked = f"from {float(exact(sampling.start or 0)):g} s"
            asked += f" to {float(stop):g} s" if stop is not None else ""
            raise SourceError(
                f"{info.name} shows nothing {asked}: it runs from {float(info.start):g} to {float(self.end):g} s"
            )
        if end is not None:
            stop = end if stop is None else min(stop, end)
        fps = None if sampling.fps is None else exact(sampling.fps)
        notes: tuple[str, ...] = ()
        if sampling.count is not None:
            assert stop is not None
            fps = sampling.count / (stop - start)
        if sampling.max_frames is not None:
            assert stop is not None
            wanted = ceil((stop - start) * fps) if fps is not None else self.count_pictures(start, stop)
            if wanted > sampling.max_frames:
                fewer = sampling.max_frames / (stop - start)
                asked = f"{float(fps):g} fps" if fps is not None else "every picture"
                notes = (f"max_frames={sampling.max_frames} turns {asked} into {float(fewer):.4g} fps",)
                fps = fewer
        return Plan(start, stop, fps, sampling.max_frames, notes)

    def _measured_end(self) -> Fraction:
        end = self.info.start
        with self.pictures() as pictures:
            for picture in pictures:
                end = picture.pts + picture.duration
        return end


def open_source(path: str | os.PathLike[str], *, decoder: str = "auto") -> Source:
    """Open a video file and decode its first picture, so that what cannot work fails here.

    Args:
        path: a file of any container and codec FFmpeg knows; its name's ending does not matter.
        decoder: one of ``DECODERS``; "auto" chooses, ``info.decoder`` tells which.

    Raises:
        SourceError: one line on why this is not a video that can be read.
        SettingsError: if there is no such decoder.
    """
    if decoder not in DECODERS:
        raise SettingsError(f"unknown decoder {decoder!r}; {near(decoder, DECODERS)}")
    found = check_file(path)
    # Decoders are imported where they are chosen: optional ones may not be installed.
    from streamvid.ingest.pyav import PyavSource

    return PyavSource(found, name=label(path))
