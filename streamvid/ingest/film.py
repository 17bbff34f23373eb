"""One stream of one source: what opening it has taught, and an open decoder of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import av
from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from streamvid.errors import SourceError
from streamvid.ingest.convert import Look
from streamvid.ingest.openers import MAX_PIXELS, Opener
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.pulse import PULSE

_MOST_REORDERED = 17
"""Pictures that may come after one in the file and before it on screen: 16 in H.264 and HEVC, and that one."""

LEAP_SECONDS = 10
"""A time that leaps by more than this waits for the next one: either that confirms it (a long
still picture) or the time was damaged."""

_READ_ATTEMPTS = 16
"""Reads that may fail one after another before the rest of a file is given up."""

_NOT_THE_FILM = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails

INDEXED = ("mov", "matroska")
"""Containers with an index of key frames.  In transport streams a backward seek may land late or nowhere."""

RESETTING = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"})
"""Codecs whose decoders start clean, or tell that they did not, at a key frame.

H.263 and MPEG-4 part 2 are left out: phone files mark key frames that are none, and the
decoder draws broken pictures without a word.
"""


@dataclass(slots=True)
class Film:
    """The chosen stream of one file and what opening it has taught; every pass over it reads this."""

    opener: Opener
    index: int
    """Stream index in the container."""

    step: Fraction
    """A guess of the seconds between pictures, for those that have no time."""

    jumps: bool
    """Whether container and codec allow jumps to key frames."""

    time_base: Fraction
    by_dts: bool = False
    """Whether times are those of decoding: in AVI the numbers of its chunks, which are never out of order."""

    delay: Fraction = Fraction(0)
    """How many seconds pictures are shown before the time of decoding says so."""

    timed: bool = True
    """Whether pictures have times of their own."""

    linear: bool = False
    """Whether key frames are found only by reading all packets in order; most of them need not be decoded."""

    marks_keys: bool = False
    """Whether key frames can be told by their packets, and have times of their own."""

    show_damaged: bool = False
    interlaced: bool = False
    """Whether the first picture is made of two fields; these may come in packets of their own."""

    threads: int | None = None
    """How many threads may decode; None for one a processor, at most eight."""

    look: Look | None = None
    """How its pictures are meant to be seen; None until the first one is there."""

    start: Fraction = Fraction(0)
    end: Fraction | None = None
    keys: tuple[Fraction, ...] | None = None
    """When indexed key frames are shown, in seconds; None until somebody wants to jump."""

    tap: Callable[[Packet[VideoStream]], None] | None = None
    """Told of every packet before it is decoded, to write it down; leaves it as it was."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.opener.name

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the pictures it gives where no other size is asked for."""
        return self.look.shown if self.look is not None else None

    @property
    def sparse(self) -> bool:
        """Whether single pictures can be decoded from the key frame before them, by what its packets say."""
        return (self.jumps or self.linear) and not (self.by_dts or self.show_damaged or self.interlaced)

    def key_before(self, seconds: Fraction) -> Fraction | None:
        """When the last indexed key frame at or before a moment is shown; None if there is no index."""
        if self.keys is None:
            self.keys = self._read_keys() if self.jumps else ()
        place = bisect_right(self.keys, seconds)
        return self.keys[place - 1] if place else None

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """All packets that are shown, read and not decoded."""
        with closing(Decoder(self)) as decoder:
            yield from decoder.shown_packets()

    def stamps(self, packets: Iterator[Packet[VideoStream]]) -> Iterator[tuple[int, int | None, Fraction]]:
        """When packets are shown and how long, in ticks, and the tick; those without a time are left out.

        Where times are those of decoding the order is not that of showing, but the last is the last.
        """
        for packet in packets:
            stamp = packet.dts if self.by_dts else packet.pts
            if stamp is not None:
                yield stamp, packet.duration, packet.time_base

    def tail_end(self, claimed: Fraction, container: InputContainer | None = None) -> Fraction | None:
        """End of the last picture, from the packets after the last key frame; None if that does not work.

        A container that is given stays open and stands at its end afterwards.
        """
        decoder = Decoder(self, container=container)
        try:
            # The last one in the file need not be the last one shown, and where every packet counts as a key
            # frame, or none does, a jump lands right on it.
            decoder.seek_to_read(max(Fraction(0), claimed - _MOST_REORDERED * self.step))
            end = end_of(self.stamps(decoder.shown_packets()), self.step)
        except (av.error.FFmpegError, OverflowError):
            return None
        finally:
            if container is None:
                decoder.close()
        return end if end is not None and end > self.start else None

    def _read_keys(self) -> tuple[Fraction, ...]:
        with closing(Decoder(self)) as decoder:
            try:
                # Matroska reads its index when somebody seeks; where to does not matter here.
                decoder.seek(self.start)
            except av.error.FFmpegError:
                return ()
            first = next(decoder.packets(), None)
            if first is None or first.pts is None or not first.is_keyframe:
                return ()
            # MOV indexes when pictures are decoded; they are shown later by what the first one tells.
            stamps = sorted(entry.timestamp for entry in decoder.stream.index_entries if entry.is_keyframe)
            delay = first.pts - stamps[bisect_right(stamps, first.pts) - 1] if stamps else 0
            return tuple((stamp + max(0, delay)) * first.time_base for stamp in stamps)


class Decoder:
    """An open container with one stream: packets and frames of it, failures counted and passed over."""

    def __init__(
        self,
        film: Film,
        stats: DecodeStats | None = None,
        *,
        container: InputContainer | None = None,
        keys_only: bool = False,
    ) -> None:
        self._name, self._tap = film.name, film.tap
        self._stats = stats or DecodeStats()
        self.container = container if container is not None else film.opener.open()
        self.stream = next(stream for stream in self.container.streams.video if stream.index == film.index)
        if not self.stream.codec_context.is_open:
            self.stream.thread_type = ThreadType.AUTO
            if film.threads is not None:
                self.stream.thread_count = film.threads
            self.stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        self._keys_only = keys_only and film.marks_keys
        if self._keys_only:
            # Left to the demuxer (discard), MOV gives key frames the times of others.
            self.stream.codec_context.skip_frame = "NONKEY"
        self.first: Packet[VideoStream] | None = None
        """The first packet since the latest seek."""

        self.read_until: Fraction | None = None
        """Latest time of any packet read so far, in seconds."""

    def use_threads(self, count: int) -> bool:
        """Decode with so many threads; False if it has begun with another number."""
        context = self.stream.codec_context
        if not context.is_open:
            self.stream.thread_count = count
        return context.thread_count == count

    def count_in(self, stats: DecodeStats) -> None:
        """Count from now on there."""
        self._stats = stats

    def close(self) -> None:
        """Let go of the container."""
        self.container.close()

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Packets from where the container stands, the last one empty; reads that fail are tried again."""
        self.first = None
        failed = 0
        source = self.container.demux(self.stream)
        while True:
            try:
                packet = next(source)
            except StopIteration:
                return
            except IndexError:
                # A stream that began after the header was read; PyAV does not know it.
                source = self.container.demux(self.stream)
                continue
            except av.error.FFmpegError:
                self._stats.skipped += 1
                failed += 1
                if failed >= _READ_ATTEMPTS:
                    return
                source = self.container.demux(self.stream)
                continue
            failed = 0
            PULSE.beat()
            if packet.has_sidedata("encryption_info"):
                raise SourceError(f"{self._name} is encrypted (DRM); give a file without copy protection")
            if self.first is None:
                self.first = packet
            if packet.pts is not None:
                pts = packet.pts * packet.time_base
                self.read_until = pts if self.read_until is None else max(pts, self.read_until)
            if self._tap is not None:
                self._tap(packet)
            yield packet

    def shown_packets(self) -> Iterator[Packet[VideoStream]]:
        """Packets that hold data and are not hidden by an edit list."""
        return (packet for packet in self.packets() if packet.size and not packet.is_discard)

    def seek(self, seconds: Fraction) -> None:
        """Go to the key frame at or before a moment, as far as the container can."""
        base = self.stream.time_base
        self.container.seek(floor(seconds / base) if base else 0, stream=self.stream)

    def seek_to_read(self, seconds: Fraction) -> None:
        """Go to a moment, or shortly before, to read packets and not to decode them: groups may be very long."""
        entries = self.stream.index_entries
        base = self.stream.time_base
        # Only MOV knows every packet.
        if base and self.container.format.name.startswith("mov") and len(entries):
            place = max(0, entries.search_timestamp(floor(seconds / base), any_frame=True) - _MOST_REORDERED)
            self.container.seek(entries[place].timestamp, stream=self.stream, any_frame=True)
        else:
            self.seek(seconds)

    def frames(self) -> Iterator[VideoFrame]:
        """Frames in the order they are shown."""
        for packet in self.packets():
            if self._keys_only and packet.size and not packet.is_keyframe:
                continue
            try:
                yield from packet.decode()
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, ValueError):
                self._stats.skipped += 1


def choose_stream(container: InputContainer, name: str) -> VideoStream:
    """The film: not a cover picture, then the one with samples, the largest, the default, the first."""
    video = list(container.streams.video)
    films = [stream for stream in video if not stream.disposition & _NOT_THE_FILM]
    usable = [stream for stream in films if stream.codec_context is not None]
    if usable:
        indexed = container.format.name.startswith("mov")
        return max(
            usable,
            key=lambda stream: (
                not indexed or len(stream.index_entries) > 0,
                stream.width * stream.height,
                bool(stream.disposition & Disposition.default),
                -stream.index,
            ),
        )
    if films:
        raise SourceError(f"{name} has a video stream but no decoder for it here; convert it to H.264 first")
    if video:
        raise SourceError(f"{name} holds sound and a cover picture, no film; give a video")
    if container.streams.audio:
        raise SourceError(f"{name} holds sound only, no video stream; give a video")
    raise SourceError(f"{name} has no video stream; its header may be cut off: copy or download it again")


def claimed_end(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """When the video ends as the header has it, in seconds; None if it does not say."""
    if stream.duration and stream.time_base:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    if container.duration:
        return Fraction(container.duration + (container.start_time or 0), 1_000_000)
    return None


def step_of(stream: VideoStream) -> Fraction:
    """A guess of the time between pictures, for those that have none."""
    rate = stream.average_rate
    return 1 / rate if rate is not None and 0 < rate <= 480 else Fraction(1, 25)


def end_of(stamps: Iterator[tuple[int, int | None, Fraction]], step: Fraction) -> Fraction | None:
    """When the last of the packets is gone from the screen; None if none has a time; see ``Film.stamps``."""
    last = before = None
    stay: int | None = None
    base = Fraction(0)
    leap: tuple[int, int | None] | None = None
    for stamp, lasts, base in stamps:
        if last is not None and leap is None and (stamp - last) * base > LEAP_SECONDS:
            leap = stamp, lasts  # to be believed if the next one is near it
            continue
        if leap is not None and abs(stamp - leap[0]) * base <= LEAP_SECONDS:
            (last, stay), before = leap, last
        leap = None
        if last is None or stamp > last:
            last, before, stay = stamp, last, lasts
        elif stamp != last and (before is None or stamp > before):
            before = stamp
    if leap is not None:
        (last, stay), before = leap, last
    if last is None:
        return None
    if stay:
        return (last + stay) * base
    return last * base + ((last - before) * base if before is not None else step)
