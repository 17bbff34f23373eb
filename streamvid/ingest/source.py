"""Where frames come from: one way to open whatever a user names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Self

import torch

from streamvid.errors import SettingsError, near
from streamvid.frames import Frame
from streamvid.ingest.files import check_file, label
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.reader import Readable, Shots, SourceInfo
from streamvid.ingest.sampling import Plan, Sampling, SamplingReport

DECODERS = ("auto", "pyav")
"""What ``open_source`` takes as ``decoder``."""


class SampledFrames(Iterator[Frame]):
    """Frames of a source at the planned times; ends by itself.

    ``report`` and ``stats`` are up to date at any moment.  ``close`` (or the end of a ``with``
    block) lets go of the source earlier.
    """

    def __init__(self, shots: Shots) -> None:
        self._shots = shots

    @property
    def stats(self) -> DecodeStats:
        """What happened while decoding, so far."""
        return self._shots.stats

    @property
    def report(self) -> SamplingReport:
        """What was looked at, so far."""
        return self._shots.report

    def __next__(self) -> Frame:
        shot = next(self._shots)
        return Frame(torch.from_numpy(shot.pixels), shot.pts, shot.duration)

    def close(self) -> None:
        """Let go of the source."""
        self._shots.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Source:
    """A video that can be looked at any number of times; a context manager.

    Nothing is held in memory between calls.  Every ``frames`` call reads on its own, so
    several may run side by side.  All times are container seconds: add nothing, subtract
    nothing; ``info.start`` says when the first picture appears.
    """

    def __init__(self, reader: Readable) -> None:
        self.reader = reader
        self._latest: SampledFrames | None = None

    @property
    def info(self) -> SourceInfo:
        """What is known about the source."""
        return self.reader.info

    def close(self) -> None:
        """Let go of whatever is held open; closing twice is allowed."""
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def plan(self, sampling: Sampling) -> Plan:
        """The sampling made exact for this source; raises SourceError if the span lies outside of it."""
        return self.reader.plan(sampling)

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
        self._latest = SampledFrames(self.reader.sample(self.plan(sampling or Sampling()), size=size))
        return self._latest

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
        return self.reader.end

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """How many pictures appear in ``[start, stop)``; decodes unless the decoder knows better."""
        return self.reader.count_pictures(start, stop)


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
    from streamvid.ingest.openers import FileOpener
    from streamvid.ingest.pyav import PyavReader

    return Source(PyavReader(FileOpener(found, label(path))))
