"""Where frames come from: one way to open whatever a user names."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any, Self, TypeVar

from streamvid.errors import SettingsError, UnsupportedError
from streamvid.frames import Frame
from streamvid.ingest.arrays import ArrayReader
from streamvid.ingest.buffer import Ahead
from streamvid.ingest.choice import DECODERS, only_auto
from streamvid.ingest.isolation import RemoteReader
from streamvid.ingest.named import Decoding, Named, find, make, maker
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.reader import Readable, Shots, SourceInfo
from streamvid.ingest.ring import RecordTo
from streamvid.ingest.sampling import Plan, Sampling, SamplingReport, Seconds
from streamvid.ingest.spool import Spool, spool_stdin

Result = TypeVar("Result")

__all__ = ["DECODERS", "SampledFrames", "Source", "open_source"]


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
        import torch  # here, so that looking at files does not wait for it

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

    def __init__(self, reader: Readable, spool: Spool | None = None) -> None:
        self.reader = reader
        self._spool = spool
        self._latest: SampledFrames | None = None

    @property
    def info(self) -> SourceInfo:
        """What is known about the source."""
        return self.reader.info

    def close(self) -> None:
        """Let go of whatever is held open; closing twice is allowed."""
        if self._latest is not None:
            self._latest.close()
        self.reader.close()
        if self._spool is not None:
            self._spool.close()

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

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(reader, *arguments)`` where the reader is; all of it must be picklable."""
        if isinstance(self.reader, RemoteReader):
            result: Result = self.reader.call(function, *arguments)
            return result
        return function(self.reader, *arguments)

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """How many pictures appear in ``[start, stop)``; decodes unless the decoder knows better."""
        return self.reader.count_pictures(start, stop)


def open_source(
    source: Any,
    *,
    decoder: str = "auto",
    rate: Seconds | None = None,
    times: Iterable[Seconds] | None = None,
    threads: int | None = None,
    hwaccel: str | None = None,
    stall_seconds: float = 30.0,
    isolate: bool = True,
    ahead: Ahead | None = None,
    record: RecordTo | None = None,
) -> Source:
    """Open whatever holds pictures and decode the first one, so that what cannot work fails here.

    Args:
        source: a file of any container and codec FFmpeg knows (its name's ending does not matter);
            a folder or glob of images; "-" for standard input; an http(s) address of a film or an
            HLS or DASH playlist; ``lavfi:GRAPH``; ``camera:0``; a live stream (rtsp, rtmp, srt,
            udp ...); an array or list of arrays (N, H, W, 3); or a ``Named`` from ``find``.
        decoder: one of ``DECODERS``; "auto" chooses, ``info.decoder`` and ``info.chosen`` tell.
        rate: pictures a second for what has no times of its own: images, arrays, raw streams.
        times: when each picture of an array appears, in seconds, instead of ``rate``.
        threads: processor threads for decoding, >= 1; None takes what the machine has.
        hwaccel: hardware to decode with, such as "cuda"; where it cannot, a note says so.
        stall_seconds: a source without any progress for so long is given up, > 0.
        isolate: decode in another process, where a crash or a hang hurts nobody.  Costs 0.2 s for
            the first source and a copy of every frame; False decodes in this process.
        ahead: how many decoded frames may wait to be taken, and what happens to those that find no
            room; in this process nothing runs ahead.
        record: where the packets of a live source are written down while it is read; see ``Supervised``,
            which also keeps their times.

    Raises:
        SourceError: one line on why this cannot be read.
        UnsupportedError: if it has no packets that can be recorded.
        SettingsError: if a setting makes no sense.
    """
    settings = Decoding(decoder, threads, hwaccel, stall_seconds, record)
    if not isinstance(source, (str, os.PathLike, Named)):
        only_auto(decoder, "an array", "arrays are not decoded")
        if record is not None:
            raise UnsupportedError("an array is no stream of packets, so it is not recorded; leave record out")
        return Source(ArrayReader(source, fps=rate, times=times))
    if times is not None:
        raise SettingsError("times are for arrays; a file has its own, images and raw streams take a rate")
    spool = None
    if isinstance(source, str) and source == "-":
        spool = spool_stdin(sys.stdin.buffer)
        source = replace(find(spool.path, rate=rate), name=spool.name)
    try:
        named = source if isinstance(source, Named) else find(source, rate=rate)
        if not isolate:
            return Source(make(named, settings), spool)
        remote = RemoteReader(maker(named, settings), name=named.name, stall_seconds=stall_seconds, ahead=ahead)
        return Source(remote, spool)
    except BaseException:
        if spool is not None:
            spool.close()
        raise
