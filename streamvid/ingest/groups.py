"""Targets that are decoded together, and how they are read: from one key frame, and no further than needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from fractions import Fraction
from itertools import chain, dropwhile
from math import floor
from typing import Literal, NamedTuple

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from streamvid.ingest.convert import Converter
from streamvid.ingest.disposable import Disposal
from streamvid.ingest.film import LEAP_SECONDS, Decoder, Film
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.timeline import Distrust, Spot, Timeline

_SEEK_ATTEMPTS = 4
"""Seeks that may land after the moment they were for."""

_NEAR_PICTURES = 3
"""If so few pictures lie between the last target and the next key frame, decoding on is cheaper than seeking."""

_MOST_JOINED = 16
"""Groups are not joined beyond this many targets, so that there is work for every thread."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A picture that is on screen at one or more targets."""

    pts: Fraction
    gone: Fraction | None
    """When the next picture appears; None if it is the last."""

    duration: Fraction
    targets: int
    pixels: NDArray[np.uint8]
    worker: int
    counts: tuple[int, ...]
    """All that this worker has counted up to here."""


def grouped(ticks: list[int], decoder: Decoder, film: Film) -> list[list[int]]:
    """Targets that are decoded in one go, by the key frames in the container's index.

    Only how much is decoded depends on these: what is on screen is told by packets.
    """
    stream = decoder.stream
    first = _key_packet(decoder, ticks[0])  # Matroska reads its index when somebody seeks
    entries = stream.index_entries
    place = entries.search_timestamp(first.dts if first.dts is not None else first.pts) if len(entries) else -1
    if place < 0:
        return [ticks]
    # MOV indexes when pictures are decoded.  How much later key frames are shown the second one tells: the first
    # of a film may be held back less.
    delay = max(0, first.pts - entries[place].timestamp)
    place = entries.search_timestamp(entries[place].timestamp + 1, backward=False)
    if delay and place >= 0:
        second = _key_packet(decoder, entries[place].timestamp + delay)
        if second.dts == entries[place].timestamp:
            delay = max(0, second.pts - second.dts)
    near = round(_NEAR_PICTURES * film.step / film.time_base)
    groups: list[list[int]] = []
    following: int | None = None
    for tick in ticks:
        if groups and (following is None or tick < following):
            groups[-1].append(tick)
            continue
        place = entries.search_timestamp(tick - delay)
        key = entries[place].timestamp + delay if place >= 0 else None
        adjacent = groups and key is not None and key == following and key - groups[-1][-1] <= near
        if adjacent and len(groups[-1]) < _MOST_JOINED:
            groups[-1].append(tick)
        else:
            groups.append([tick])
        place = entries.search_timestamp(tick - delay + 1, backward=False)
        following = entries[place].timestamp + delay if place >= 0 else None
    return groups


def _key_packet(decoder: Decoder, tick: int) -> _Timed:
    """The packet that a seek finds."""
    try:
        decoder.container.seek(tick, stream=decoder.stream)
        packet = next(decoder.packets(), None)
    except av.error.FFmpegError:
        packet = None
    if packet is None or packet.pts is None:
        raise Distrust
    return _Timed(packet.pts, packet.dts)


class _Timed(NamedTuple):
    """A packet's times in ticks."""

    pts: int
    dts: int | None


class GroupReader:
    """Reads groups of targets with one decoder.

    Args:
        film: what to read.
        groups: targets, in groups.
        size: (H, W) to scale to; None keeps the full size.
        threads: threads of the decoder.
        worker: its number among those that share the groups.
        opened: a decoder, and the first packet of the file if it has not been decoded; None opens one.
    """

    def __init__(
        self,
        film: Film,
        groups: list[list[int]],
        size: tuple[int, int] | None,
        threads: int,
        worker: int,
        opened: tuple[Decoder, Packet[VideoStream] | None] | None,
    ) -> None:
        assert film.look is not None, "the first picture tells how all are seen"
        self._film = film
        self._groups = groups
        self._size = size
        self._worker = worker
        self._look = film.look
        self._converter = Converter(film.look, film.name)
        self._stats = DecodeStats()
        if opened is None:
            self._decoder = Decoder(film, self._stats)
            self._decoder.use_threads(threads)
            first = next(self._decoder.packets(), None)
        else:
            self._decoder, first = opened
            self._decoder.count_in(self._stats)
        self._context = self._decoder.stream.codec_context
        self._codec = self._context.codec.canonical_name
        self._disposal = Disposal(self._codec, self._context.extradata)
        self._first = first
        if first is not None:
            self._warm_up(first)

    def close(self) -> None:
        """Close the file."""
        self._decoder.close()

    def read(self, part: int) -> Iterator[Taken]:
        """The pictures on screen at a group's targets; raises Distrust if anything is not as it should be."""
        group = self._groups[part]
        line = Timeline(self._codec, group, round(LEAP_SECONDS / self._film.time_base))
        for packet in self._packets(group[0]):
            line.add(packet)
            for sent, spot in line.decided():
                yield from self._shown(self._decoded(sent, skip=spot is None), line)
                if sent is None:
                    self._context.flush_buffers()
            if not line.left:
                break
        if line.expected:
            # Nothing after this is wanted: the decoder gives what it holds back without being fed more.
            yield from self._shown(self._decoded(None), line)
        if line.left or line.expected:
            raise Distrust

    def _packets(self, tick: int) -> Iterator[Packet[VideoStream]]:
        """Packets from a key frame at or before a moment; not always the last one, which ``Timeline`` finds."""
        failed = self._stats.skipped
        for packet in self._from_start() if self._film.linear else self._from_key(tick):
            if self._stats.skipped > failed:
                raise Distrust
            yield packet

    def _from_start(self) -> Iterator[Packet[VideoStream]]:
        """Packets from the first key frame; those before it, of a stream recorded from the middle, show nothing."""
        assert self._first is not None
        begin = floor(self._film.start / self._film.time_base)
        packets = chain((self._first,), self._decoder.packets())
        return dropwhile(
            lambda packet: not packet.is_keyframe and packet.pts is not None and packet.pts < begin, packets
        )

    def _from_key(self, tick: int) -> Iterator[Packet[VideoStream]]:
        goal = tick
        for _ in range(_SEEK_ATTEMPTS):
            try:
                self._decoder.container.seek(goal, stream=self._decoder.stream)
            except av.error.FFmpegError:
                raise Distrust from None
            packets = self._decoder.packets()
            first = next(packets, None)
            if first is None:
                raise Distrust
            if first.pts is None or first.pts <= tick:
                break
            # MOV seeks by dts: where pictures are held back for longer than at the start of the film, it lands late.
            goal = min(first.pts, first.pts if first.dts is None else first.dts) - 1
        assert first is not None
        self._stats.seeks += first.pts is not None and first.pts > floor(self._film.start / self._film.time_base)
        return chain((first,), packets)

    def _decoded(self, packet: Packet[VideoStream] | None, *, skip: bool = False) -> list[VideoFrame]:
        """What comes out when a packet goes in; what nothing refers to is passed over if it may be skipped."""
        if packet is not None:
            mode: Literal["NONREF", "DEFAULT"] = "NONREF" if skip and self._disposal.passed_over(packet) else "DEFAULT"
            if mode != self._context.skip_frame:
                self._context.skip_frame = mode
            needed = self._disposal.needed(packet)
            if skip:
                if needed is None:
                    return []
                packet = needed
        try:
            return self._context.decode(packet)
        except (av.error.FFmpegError, ValueError):
            raise Distrust from None

    def _shown(self, frames: list[VideoFrame], line: Timeline) -> Iterator[Taken]:
        """Those of the frames that are on screen at targets."""
        for frame in frames:
            self._stats.decoded += 1
            if frame.pts is None:
                raise Distrust
            if line.key is not None and frame.pts < line.key:
                continue  # it leads the key frame and needs pictures before it
            if frame.is_corrupt or frame.interlaced_frame or not line.found(frame.pts):
                raise Distrust
            spot = line.expected.pop(frame.pts, None)
            if spot is not None:
                yield self._taken(frame, spot)
                if not line.left and not line.expected:
                    return

    def _taken(self, frame: VideoFrame, spot: Spot) -> Taken:
        base = self._film.time_base
        pts = spot.pts * base
        gone = None if spot.gone is None else spot.gone * base
        if gone is not None:
            stay = gone - pts
        elif frame.duration > 0:
            stay = frame.duration * base
        elif self._film.end is not None and self._film.end > pts:
            stay = self._film.end - pts
        else:
            raise Distrust
        self._stats.rescaled += (frame.height, frame.width) != self._look.size
        pixels = self._converter.convert(frame, self._size)
        return Taken(pts, gone, stay, spot.targets, pixels, self._worker, astuple(self._stats))

    def _warm_up(self, first: Packet[VideoStream]) -> None:
        """Show a fresh decoder the first packet of the file without decoding a picture.

        The first packet of H.264 may name the encoder, whose 4:4:4 pictures are read in its own
        way, and parameters may be stored there only.
        """
        if self._codec in ("h264", "hevc"):
            self._context.skip_frame = "ALL"
            self._decoded(first)
            self._context.skip_frame = "DEFAULT"
