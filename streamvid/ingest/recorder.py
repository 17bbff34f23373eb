"""Packets of a live source written down beside their decoding, as they came, into files that a kill leaves readable.

Works where the source is decoded.  What the files mean is the business of ``ring``.
"""

from __future__ import annotations

import io
from bisect import insort
from contextlib import suppress
from fractions import Fraction
from typing import Any, cast

import av
from av.container import OutputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from streamvid.errors import SourceError, UnsupportedError
from streamvid.ingest.film import LEAP_SECONDS
from streamvid.ingest.ring import RecordTo, append_line, give_up, read_json, write_json
from streamvid.ingest.wall import steady

_MOVFLAGS = "empty_moov+default_base_moof+frag_every_frame+frag_discont+skip_trailer"
"""A fragment a packet: a kill costs the last one.  Times are those that are given, not counted from 0."""

_RAW = ("rawvideo", "wrapped_avframe")
_FALL_SECONDS = 1
_RETRY_SECONDS = 5.0
_REMEMBERED = 256
"""Packets that may wait in the decoder for their pictures to be shown."""

_UNTIMED = 32
"""Packets that may come before the first that says when it is decoded."""

_REORDERED = 4
"""Pictures that may be shown before one that was sent earlier, where a source does not say when to decode."""

_HEAD_BYTES = 4096
_START_CODES = (b"\0\0\1", b"\0\0\0\1")
_SEQUENCE = {"h264": 7, "hevc": 33}
"""Kind of the units that hold the parameters of a sequence."""


class Recorder:
    """Writes the packets of one connection.

    Times in files are ticks of the source, moved by a constant so that they begin near 0.  Where the
    source's clock falls, or leaps by more than 10 s, they go on as if it had not, and ``ticks.jsonl``
    says which second of the connection comes next.

    What cannot be written, as on a full disk, is left out up to the next key frame, and
    ``trouble.json`` says so; decoding goes on.

    Args:
        to: where, and how long it is kept.
        stream: what is recorded, of an open container.
        step: seconds between pictures, a guess.
        name: the source in messages.
        timeless: whether the times of packets mean nothing, so that their arrival counts.

    Raises:
        UnsupportedError: if its packets cannot be recorded.
        SourceError: if nothing can be written into the folder.
    """

    def __init__(self, to: RecordTo, stream: VideoStream, *, step: Fraction, name: str, timeless: bool = False) -> None:
        codec = stream.codec_context.codec.canonical_name
        if codec in _RAW:
            raise UnsupportedError(
                f"{name} sends raw pictures, which are not recorded; give a source that compresses, "
                "as camera:0?format=mjpeg, or leave --record out"
            )
        self._stream, self._codec, self._timeless = stream, codec, timeless
        self._base = Fraction(1, 90000) if timeless or not stream.time_base else stream.time_base
        self._step = max(1, round(step / self._base))
        self._to, self._part = to, to.part()
        self._check(name)
        try:
            self._part.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise SourceError(f"{name} cannot be recorded: {reason.strerror or reason}; give another folder") from None
        self._file: io.FileIO | None = None
        self._out: OutputContainer | None = None
        self._target: Any = None
        self._number = self._run = 0
        self._begin = 0
        self._last: int | None = None
        self._shift = 0
        self._window: list[int] = []
        self._early: list[tuple[bytes, bool, int | None]] = []
        self._waiting: list[tuple[int, Fraction]] = []
        self._guesses = False
        self._known: dict[int, int] = {}
        self._offset: Fraction | None = None
        self._size = (0, 0)
        self._new_header = self._stale = False
        self._extradata = bytes(stream.codec_context.extradata or b"")
        self._sequence = _sequence(codec, self._extradata) if self._extradata.startswith(_START_CODES) else None
        self._sick: str | None = (read_json(to.folder / "trouble.json") or {}).get("why")
        self._retry = 0.0
        self._closed = False

    def take(self, packet: Packet[VideoStream]) -> None:
        """Write a packet; it is as it was afterwards, so that it can be decoded."""
        if self._closed or not packet.size:
            return
        if self._last is None and packet.dts is None and not self._timeless and len(self._early) < _UNTIMED:
            self._early.append((bytes(packet), packet.is_keyframe, packet.pts))
            return
        if self._early:
            self._take_early(packet)
        kept = packet.pts, packet.dts, packet.duration, packet.time_base, packet.stream
        try:
            self._put(packet)
        finally:
            packet.stream, packet.time_base = kept[4], kept[3]
            packet.pts, packet.dts, packet.duration = kept[:3]

    def _take_early(self, packet: Packet[VideoStream]) -> None:
        """What came before the first time of decoding: RTSP does not tell those of the first packets."""
        early, self._early = self._early, []
        self._guesses = packet.dts is None
        known = [pts for *_, pts in early if pts is not None] + [packet.pts or 0]
        first = packet.dts if packet.dts is not None else min(known)
        for k, (data, key, pts) in enumerate(early):
            before = cast("Packet[VideoStream]", Packet(data))
            guess = first - (len(early) - k) * self._step
            before.is_keyframe, before.time_base = key, self._base
            before.pts = pts if pts is not None else guess
            before.dts = None if self._guesses else min(guess, before.pts)
            self._put(before)
        waiting, self._waiting = self._waiting, []
        for pts, seconds in waiting:
            self.shown(pts, seconds)

    def shown(self, pts: int | None, seconds: Fraction) -> None:
        """A picture of a packet that was taken is shown at ``seconds`` of the connection."""
        if self._early and pts is not None:
            self._waiting.append((pts, seconds))
            return
        tick = self._known.pop(pts, None) if pts is not None else self._last if self._timeless else None
        if tick is None:
            return
        offset = seconds - tick * self._base
        # Where times mean nothing, a picture is dated when it has been decoded and a packet when it came.
        if self._offset is not None and abs(offset - self._offset) <= (Fraction(1, 20) if self._timeless else 0):
            return
        with suppress(OSError):  # whoever cannot write this cannot write packets, and those say so
            append_line(self._part / "ticks.jsonl", {"tick": tick, "base": str(self._base), "connection": str(seconds)})
            self._offset = offset

    def close(self) -> None:
        """End the file; closing twice is allowed."""
        self._closed = True
        with suppress(OSError, av.error.FFmpegError):
            self._end()

    def _put(self, packet: Packet[VideoStream]) -> None:
        raw = packet.pts
        pts, dts = self._times(packet)
        self._known[raw if raw is not None else pts] = pts
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        if packet.is_keyframe:
            self._turn(packet, pts)
        if self._out is None:
            return
        try:
            packet.pts, packet.dts, packet.stream = pts, dts, self._target
            if self._timeless:
                packet.time_base, packet.duration = self._base, 0
            self._out.mux_one(packet)
        except (OSError, av.error.FFmpegError) as reason:
            self._fail(reason)

    def _times(self, packet: Packet[VideoStream]) -> tuple[int, int]:
        """When the packet is shown and decoded, in ticks of the file."""
        if self._timeless:
            here = round(Fraction(steady()) / self._base)
            pts: int | None = here
            dts: int | None = here
        else:
            pts, dts = packet.pts, packet.dts
        pts = pts if pts is not None else dts
        if pts is None:
            assert self._last is not None
            pts = dts = self._last + self._step - self._shift
        if self._guesses:
            dts = self._decoded_at(pts)
        elif dts is None:
            dts = pts if self._last is None else min(pts, self._last + 1 - self._shift)
        if self._last is None:
            self._shift = -dts
        else:
            step = dts + self._shift - self._last
            if step * self._base < -_FALL_SECONDS or step * self._base > LEAP_SECONDS:
                self._shift += self._step - step
                self._window.clear()
        first = dts + self._shift
        self._last = first if self._last is None else max(first, self._last + 1)
        return max(pts + self._shift, self._last), self._last

    def _decoded_at(self, pts: int) -> int:
        """A time of decoding for a source that tells none: pictures in order of showing, some steps earlier."""
        if not self._window:
            self._window = [pts - (k + 1) * self._step for k in reversed(range(_REORDERED))]
        insort(self._window, pts)
        return self._window.pop(0)

    def _turn(self, packet: Packet[VideoStream], pts: int) -> None:
        """Begin another file at a key frame, if it is time or if the pictures change."""
        changed = self._changed(packet)
        if self._stale:
            self._fail(ValueError("its pictures changed; it is recorded again from the next connection on"))
            return
        full = (pts - self._begin) * self._base >= Fraction(self._to.segment_seconds)
        if self._out is not None and not changed and not full:
            return
        if steady() < self._retry:
            return
        try:
            self._end()
            if changed or self._sick is not None:
                self._run += 1
            give_up(self._to.folder, keep_seconds=self._to.keep_seconds, keep_bytes=self._to.keep_bytes)
            self._start(packet, pts)
        except (OSError, ValueError, av.error.FFmpegError) as reason:
            self._fail(reason)
        else:
            if self._sick is not None:
                self._sick = None
                (self._to.folder / "trouble.json").unlink(missing_ok=True)

    def _start(self, packet: Packet[VideoStream], pts: int) -> None:
        self._number += 1
        self._begin = pts
        self._part.mkdir(parents=True, exist_ok=True)
        path = self._part / f"{self._number:08d}-{pts}-{self._run}.mp4"
        self._file = io.FileIO(path, "xb")
        self._out = out = _container(self._file)
        size = self._measured(packet) if self._new_header else None
        if size is None:
            self._target = out.add_stream_from_template(self._stream, opaque=True)
            self._target.time_base = self._base
        else:
            # Its header is made of what the packet says, not of what the connection began with.
            self._target = out.add_mux_stream(self._codec, width=size[0], height=size[1], time_base=self._base)

    def _changed(self, packet: Packet[VideoStream]) -> bool:
        """Whether pictures from here on have other parameters."""
        if self._codec in _SEQUENCE:
            data = bytes(memoryview(packet)[:_HEAD_BYTES])
            if not data.startswith(_START_CODES):
                self._stale = self._stale or self._other_parameters(packet)
                return False
            found = _sequence(self._codec, data)
            before = self._sequence
            if found is None or found == before:
                return False
            self._sequence = found
            self._new_header = self._new_header or before is not None
            return before is not None
        context = self._stream.codec_context
        size, self._size = self._size, (context.width, context.height)
        return size not in ((0, 0), self._size)

    def _other_parameters(self, packet: Packet[VideoStream]) -> bool:
        """Whether a packet without start codes comes with other parameters than the connection began with."""
        return packet.has_sidedata("new_extradata") and bytes(packet.get_sidedata("new_extradata")) != self._extradata

    def _measured(self, packet: Packet[VideoStream]) -> tuple[int, int] | None:
        """Width and height of the packet's picture, decoded for that alone; None if it cannot be."""
        context = cast(VideoCodecContext, av.CodecContext.create(self._codec, "r"))
        context.thread_count = 1
        with suppress(av.error.FFmpegError, IndexError):
            frames = [*context.decode(Packet(bytes(packet))), *context.decode(None)]
            return frames[0].width, frames[0].height
        return None

    def _end(self) -> None:
        out, file = self._out, self._file
        self._out = self._file = self._target = None
        try:
            if out is not None:
                out.close()
        finally:
            if file is not None:
                file.close()

    def _fail(self, reason: Exception) -> None:
        """Write nothing up to a later key frame."""
        with suppress(OSError, av.error.FFmpegError):
            self._end()
        self._retry = steady() + _RETRY_SECONDS
        why = f"{getattr(reason, 'strerror', None) or reason}"
        if why != self._sick:
            self._sick = why
            with suppress(OSError):
                write_json(self._to.folder / "trouble.json", {"why": why})

    def _check(self, name: str) -> None:
        """Raise UnsupportedError if files of this kind cannot hold the codec."""
        try:
            _container(io.BytesIO()).add_stream_from_template(self._stream, opaque=True)
        except ValueError:
            raise UnsupportedError(
                f"{name} sends {self._codec}, which MP4 does not hold; leave --record out, or let it send H.264"
            ) from None


def _sequence(codec: str, data: bytes) -> bytes | None:
    """The parameters of pictures that a packet with start codes begins with; None if there are none."""
    for unit in data.split(b"\0\0\1"):
        unit = unit.rstrip(b"\0")
        kind = unit[0] & 31 if codec == "h264" and unit else unit[0] >> 1 & 63 if unit else -1
        if kind == _SEQUENCE.get(codec):
            return unit
    return None


def _container(file: io.FileIO | io.BytesIO) -> OutputContainer:
    options = {"movflags": _MOVFLAGS, "use_editlist": "0", "avoid_negative_ts": "disabled", "flush_packets": "1"}
    return av.open(file, "w", format="mp4", options=options)
