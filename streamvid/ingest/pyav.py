"""Decoding by PyAV: exact times, the right stream, damage counted, jumps only where they change nothing.

What FFmpeg leaves to its caller is handled here: rotation, missing and falling times, sizes
that change, packets that fail, headers that lie.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from pathlib import Path

import av
import numpy as np
from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from streamvid.errors import SourceError
from streamvid.ingest.files import why_unreadable
from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
from streamvid.ingest.reader import Reader, SourceInfo

_FALL_SECONDS = 1
_LEAP_SECONDS = 10
"""A time that falls or leaps by more than this waits for the next one: either that
confirms it (a new clock, a long still picture) or the time was damaged."""

_READ_ATTEMPTS = 16
"""Reads that may fail one after another before the rest of a file is given up."""

_NOT_THE_FILM = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails

_INDEXED = ("mov", "matroska")
"""Containers with an index of key frames.  In transport streams a backward seek may land late or nowhere."""

_RESETTING = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"})
"""Codecs whose decoders start clean, or tell that they did not, at a key frame.

H.263 and MPEG-4 part 2 are left out: phone files mark key frames that are none, and the
decoder draws broken pictures without a word.
"""

_HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics (ISO/IEC 23091-2) that need tone mapping on an ordinary screen."""


@dataclass(frozen=True, slots=True)
class Upright:
    """How a stored picture becomes upright: transpose first, then flip."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def degrees(self) -> int:
        """The clockwise turn in it; what remains is a mirror."""
        if self.transpose:
            return 90 if self.flip_x or not self.flip_y else 270
        return 180 if self.flip_y else 0

    @property
    def mirrored(self) -> bool:
        """Whether it is more than a turn."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """``(H, W, ...)`` upright; the same array if nothing is to do."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        if self.flip_x:
            image = image[:, ::-1]
        if self.flip_y:
            image = image[::-1]
        return np.ascontiguousarray(image)


@dataclass(slots=True)
class Film:
    """The chosen stream of one file and what opening it has taught; every pass over it reads this."""

    path: Path
    name: str
    index: int
    """Stream index in the container."""

    step: Fraction
    """A guess of the seconds between pictures, for those that have no time."""

    jumps: bool
    """Whether container and codec allow jumps to key frames."""

    by_dts: bool = False
    show_damaged: bool = False
    upright: Upright = field(default_factory=Upright)
    size: tuple[int, int] | None = None
    """(H, W) of the first picture as stored; later pictures are scaled to it."""

    start: Fraction = Fraction(0)
    end: Fraction | None = None
    keys: tuple[Fraction, ...] | None = None
    """When indexed key frames are shown, in seconds; None until somebody wants to jump."""

    def key_before(self, seconds: Fraction) -> Fraction | None:
        """When the last indexed key frame at or before a moment is shown; None if there is no index."""
        if self.keys is None:
            self.keys = self._read_keys() if self.jumps else ()
        place = bisect_right(self.keys, seconds)
        return self.keys[place - 1] if place else None

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """All packets that are shown, read and not decoded."""
        with closing(_Decoder(self)) as decoder:
            yield from decoder.shown_packets()

    def tail_end(self, claimed: Fraction) -> Fraction | None:
        """End of the last picture, from the packets after the last key frame; None if that does not work."""
        with closing(_Decoder(self)) as decoder:
            try:
                decoder.seek(claimed)
                end = _end_of(decoder.shown_packets(), self.step)
            except (av.error.FFmpegError, OverflowError):
                return None
        return end if end is not None and end > self.start else None

    def _read_keys(self) -> tuple[Fraction, ...]:
        with closing(_Decoder(self)) as decoder:
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


_QUARTERS = {270: Upright(True, True, False), 180: Upright(False, True, True), 90: Upright(True, False, True)}
"""By FFmpeg's counterclockwise angle."""

_NAMED_PROFILES = frozenset({"png", "apng"})
"""Codecs whose frames must not be asked for side data: PyAV 18.1 frees the name of a colour profile twice."""


class PyavReader(Reader):
    """A file read by PyAV.

    Args:
        path: absolute path of a file that exists.
        name: what to call it in messages.

    Raises:
        SourceError: if there is no video stream or no picture in it decodes.
    """

    def __init__(self, path: Path, *, name: str) -> None:
        container = _open(path, name)
        try:
            stream = _choose_stream(container, name)
            codec = stream.codec_context.codec.canonical_name
            kind = container.format.name
            jumps = codec in _RESETTING and kind.startswith(_INDEXED)
            self._film = film = Film(path, name, stream.index, _step(stream), jumps)
            film.by_dts = kind == "avi" and self._stamps_fall()
            first, notes = self._first_picture()
            frame = first.frame
            film.upright, turned = _upright(frame, codec)
            film.size = (frame.height, frame.width)
            film.start = first.pts
            claimed = _claimed_end(container, stream)
            film.end = None if claimed is None else film.tail_end(claimed)
            if film.end is None and kind.startswith("mov"):
                film.end = _end_of(film.packets(), film.step)  # cut off: what is left is soon read
            height, width = film.size[::-1] if film.upright.transpose else film.size
            duration = None if film.end is None else film.end - film.start
            said = Fraction(container.duration or 0, 1_000_000)
            if film.end is not None and duration is not None and said > max(film.end, duration) * Fraction(5, 4) + 2:
                notes += (f"the header says {float(said):g} s, the pictures end after {float(duration):.4g} s",)
            self.info = SourceInfo(
                path=str(path),
                name=name,
                container=kind,
                codec=codec,
                width=width,
                height=height,
                duration=duration,
                start=film.start,
                time_base=stream.time_base or Fraction(0),
                average_rate=stream.average_rate,
                rotation=film.upright.degrees,
                decoder="pyav",
                notes=notes + turned + _notes(frame, stream),
            )
        finally:
            container.close()

    def pictures(self) -> PyavPictures:
        """A new pass over all pictures of the chosen stream."""
        return PyavPictures(self._film)

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """Shown packets with a time in ``[start, stop)``, without decoding where packets have times."""
        count = 0
        for packet in self._film.packets():
            if packet.pts is None:
                return super().count_pictures(start, stop)
            count += start <= packet.pts * packet.time_base < stop
        return count

    def _measured_end(self) -> Fraction:
        end = _end_of(self._film.packets(), self._film.step)
        return end if end is not None and end > self.info.start else super()._measured_end()

    def _stamps_fall(self) -> bool:
        """Whether the pts of the first frames fall: AVI stores none, and those FFmpeg invents may be wrong."""
        with closing(_Decoder(self._film)) as decoder:
            stamps = [frame.pts for frame, _ in zip(decoder.frames(), range(8), strict=False)]
        known = [stamp for stamp in stamps if stamp is not None]
        return known != sorted(set(known))

    def _first_picture(self) -> tuple[PyavPicture, tuple[str, ...]]:
        """The first picture, and what had to be accepted to get one."""
        film = self._film
        for film.show_damaged in (False, True):
            with self.pictures() as pictures:
                first = next(pictures, None)
            if first is not None:
                notes: tuple[str, ...] = ()
                if film.show_damaged:
                    notes += ("every picture is damaged and shown as far as it decodes",)
                if pictures.stats.untimed:
                    rate = float(1 / film.step)
                    notes += (f"the stream stores no times; they are counted at {rate:g} pictures a second",)
                return first, notes
            if not pictures.stats.damaged:
                break
        if pictures.stats.skipped:
            reason = f"all {pictures.stats.skipped} packets failed; the file is damaged or encrypted"
        else:
            reason = "the header is there, the pictures are missing; copy or download it again"
        raise SourceError(f"{film.name} holds no picture that can be decoded: {reason}")


class PyavPicture(Picture):
    """A decoded frame that is converted when somebody wants to see it."""

    __slots__ = ("_owner", "frame")

    def __init__(self, frame: VideoFrame, pts: Fraction, duration: Fraction, owner: PyavPictures) -> None:
        self.frame = frame
        self.pts = pts
        self.duration = duration
        self._owner = owner

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """``(H, W, 3)`` RGB, upright."""
        return self._owner.convert(self.frame, size)

    def grey(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """``(h, w)`` brightness, upright."""
        return self._owner.grey(self.frame, size)


class PyavPictures(Pictures):
    """One pass over a film."""

    def __init__(self, film: Film) -> None:
        self.stats = DecodeStats()
        self._film = film
        self._reformatter = VideoReformatter()
        self._decoder: _Decoder | None = _Decoder(film, self.stats)
        self._frames = self._decoder.frames()
        self._goal: Fraction | None = None
        self._jumps = True
        self._landing: Fraction | None = None
        self._key: Fraction | None = None
        self._found_key = False
        self._tried = film.start
        self._troubles = 0
        self._given: Fraction | None = None
        self._forget_clock()

    def skip_to(self, seconds: Fraction) -> None:
        """Allow a jump to the last key frame at or before ``seconds``."""
        self._goal = seconds

    def close(self) -> None:
        """Close the file."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    def __next__(self) -> PyavPicture:
        if self._decoder is None:
            raise StopIteration
        if self._goal is not None:
            goal, self._goal = self._goal, None
            self._jump(goal)
        while True:
            picture = self._next_placed()
            if self._landing is not None and not self._landed(picture):
                self._read_again()
                continue
            if picture is None:
                self.close()
                raise StopIteration
            if self._given is not None and picture.pts <= self._given:
                continue
            self._given = picture.pts
            if self._landing is not None and picture.pts > self._landing:
                self._landing = None
            return picture

    def convert(self, frame: VideoFrame, size: tuple[int, int] | None) -> NDArray[np.uint8]:
        """RGB of the source's one size, or of ``size``, upright; range and matrix are those the frame names."""
        height, width = self._film.size or (frame.height, frame.width)
        if (height, width) != (frame.height, frame.width):
            self.stats.rescaled += 1
        if size is not None:
            height, width = size[::-1] if self._film.upright.transpose else size
        try:
            shown = self._reformatter.reformat(
                frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC, threads=1
            )
            image = np.asarray(shown.to_ndarray(), dtype=np.uint8)
        except (av.error.FFmpegError, ValueError) as reason:
            kind = frame.format.name
            raise SourceError(f"{self._film.name} has pictures of a kind that cannot be shown: {kind}") from reason
        return self._film.upright.apply(image)

    def grey(self, frame: VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Brightness only, averaged down to ``size``."""
        height, width = size[::-1] if self._film.upright.transpose else size
        shown = self._reformatter.reformat(frame, width, height, "gray", interpolation=Interpolation.AREA, threads=1)
        return self._film.upright.apply(np.asarray(shown.to_ndarray(), dtype=np.uint8))

    def _forget_clock(self) -> None:
        self._last: Fraction | None = None
        self._interval: Fraction | None = None
        self._offset = Fraction(0)
        self._ready: deque[PyavPicture] = deque()
        self._held: tuple[VideoFrame, Fraction] | None = None

    def _next_placed(self) -> PyavPicture | None:
        """The next picture that has a credible time; None at the end."""
        while not self._ready:
            frame = next(self._frames, None)
            if frame is not None:
                self._place(frame)
            elif self._held is not None:
                held, self._held = self._held, None
                self._commit(*held)
            else:
                return None
        return self._ready.popleft()

    def _place(self, frame: VideoFrame) -> None:
        """Find the frame's time; what is shown goes to the pictures that are ready."""
        self.stats.decoded += 1
        if self._landing is not None and self._leading(frame):
            return
        if frame.is_corrupt and not self._film.show_damaged:
            self.stats.damaged += 1
            return
        base = frame.time_base or Fraction(0)
        stamps = (frame.dts, frame.pts) if self._film.by_dts else (frame.pts, frame.dts)
        stamp = stamps[0] if stamps[0] is not None else stamps[1]
        if stamp is None or not base:
            self.stats.untimed += 1
            time = self._last + self._film.step - self._offset if self._last is not None else Fraction(0)
        else:
            time = stamp * base
        if self._held is not None and self._last is not None:
            held, self._held = self._held, None
            if self._last < time + self._offset <= self._last + _LEAP_SECONDS:
                self.stats.misplaced += 1
            else:
                self._commit(*held)
        if self._last is not None:
            step = time + self._offset - self._last
            if step < -_FALL_SECONDS or step > _LEAP_SECONDS:
                self._held = frame, time
                return
        self._commit(frame, time)

    def _commit(self, frame: VideoFrame, time: Fraction) -> None:
        pts = time + self._offset
        if self._last is not None and pts <= self._last:
            if self._last - pts <= _FALL_SECONDS:
                self.stats.misplaced += 1
                return
            self.stats.jumps += 1
            self._jumps = False
            self._offset += self._last + self._film.step - pts
            pts = time + self._offset
        if self._last is not None:
            self._interval = pts - self._last
        self._last = pts
        self._ready.append(PyavPicture(frame, pts, self._stay(frame, pts), self))

    def _stay(self, frame: VideoFrame, pts: Fraction) -> Fraction:
        """How long the picture stays if it is the last: as it says, else as the file does, else as the one before."""
        timed = frame.pts is not None or frame.dts is not None
        if timed and frame.duration > 0 and frame.time_base:
            return frame.duration * frame.time_base
        if self._film.end is not None and self._film.end > pts:
            return self._film.end - pts
        return self._interval or self._film.step

    def _jump(self, goal: Fraction) -> None:
        """Seek if the index promises a key frame between what was read and the goal."""
        decoder = self._decoder
        if decoder is None or not self._jumps:
            return
        key = self._film.key_before(goal)
        reached = decoder.read_until if decoder.read_until is not None else self._film.start
        if key is None or key <= max(reached, self._tried):
            return
        self._tried = key
        if decoder.read_until is None:
            # The first packet of H.264 may name the encoder, whose 4:4:4 pictures are read in its own way.
            next(self._frames, None)
        try:
            decoder.seek(goal)
        except av.error.FFmpegError:
            self._read_again()
            return
        self.stats.seeks += 1
        self._frames = decoder.frames()
        self._landing = goal
        self._key = None
        self._found_key = False
        self._troubles = self.stats.skipped + self.stats.damaged
        self._forget_clock()

    def _landed(self, picture: PyavPicture | None) -> bool:
        """Whether what comes after a jump is what the index promised: its key frame first, then nothing broken."""
        if self.stats.skipped + self.stats.damaged > self._troubles:
            return False
        if picture is None or self._found_key:
            return self._found_key
        if self._key is None:
            first = self._decoder.first if self._decoder is not None else None
            if first is None or not first.is_keyframe or first.pts is None:
                return False
            self._key = first.pts * first.time_base
            if self._landing is None or self._key > self._landing:
                return False
        self._found_key = picture.pts == self._key
        return self._found_key

    def _leading(self, frame: VideoFrame) -> bool:
        """Whether the frame is shown before the key frame jumped to: it needs pictures that were not decoded."""
        first = self._decoder.first if self._decoder is not None else None
        return first is not None and first.pts is not None and frame.pts is not None and frame.pts < first.pts

    def _read_again(self) -> None:
        """Leave a jump that cannot be trusted: from the start in order, up to where we were."""
        self.close()
        # What was counted will be met again; only the work is done twice.
        done = self.stats
        done.skipped = done.damaged = done.misplaced = done.untimed = done.jumps = 0
        done.restarts += 1
        self._jumps = False
        self._landing = self._key = None
        self._decoder = _Decoder(self._film, self.stats)
        self._frames = self._decoder.frames()
        self._forget_clock()


class _Decoder:
    """An open container with one stream: packets and frames of it, failures counted and passed over."""

    def __init__(self, film: Film, stats: DecodeStats | None = None) -> None:
        self._name = film.name
        self._stats = stats or DecodeStats()
        self.container = _open(film.path, film.name)
        self.stream = next(stream for stream in self.container.streams.video if stream.index == film.index)
        self.stream.thread_type = ThreadType.AUTO
        self.first: Packet[VideoStream] | None = None
        """The first packet since the latest seek."""

        self.read_until: Fraction | None = None
        """Latest time of any packet read so far, in seconds."""

    def close(self) -> None:
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
            except av.error.FFmpegError:
                self._stats.skipped += 1
                failed += 1
                if failed >= _READ_ATTEMPTS:
                    return
                source = self.container.demux(self.stream)
                continue
            failed = 0
            if packet.has_sidedata("encryption_info"):
                raise SourceError(f"{self._name} is encrypted (DRM); give a file without copy protection")
            if self.first is None:
                self.first = packet
            if packet.pts is not None:
                pts = packet.pts * packet.time_base
                self.read_until = pts if self.read_until is None else max(pts, self.read_until)
            yield packet

    def shown_packets(self) -> Iterator[Packet[VideoStream]]:
        """Packets that hold data and are not hidden by an edit list."""
        return (packet for packet in self.packets() if packet.size and not packet.is_discard)

    def seek(self, seconds: Fraction) -> None:
        """Go to the key frame at or before a moment, as far as the container can."""
        base = self.stream.time_base
        self.container.seek(floor(seconds / base) if base else 0, stream=self.stream)

    def frames(self) -> Iterator[VideoFrame]:
        """Frames in the order they are shown."""
        for packet in self.packets():
            try:
                yield from packet.decode()
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, ValueError):
                self._stats.skipped += 1


def _open(path: Path, name: str) -> InputContainer:
    try:
        # Only this very file: no demuxer may follow a name that it finds inside.
        return av.open(str(path), container_options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError, OSError):
        raise SourceError(f"{name} {why_unreadable(path)}") from None


def _choose_stream(container: InputContainer, name: str) -> VideoStream:
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


def _claimed_end(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """When the video ends as the header has it, in seconds; None if it does not say."""
    if stream.duration and stream.time_base:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    if container.duration:
        return Fraction(container.duration + (container.start_time or 0), 1_000_000)
    return None


def _step(stream: VideoStream) -> Fraction:
    """A guess of the time between pictures, for those that have none."""
    rate = stream.average_rate
    return 1 / rate if rate is not None and 0 < rate <= 480 else Fraction(1, 25)


def _end_of(packets: Iterator[Packet[VideoStream]], step: Fraction) -> Fraction | None:
    """When the last of the packets is gone from the screen; None if none has a time."""
    last = before = None
    stay: int | None = None
    base = Fraction(0)
    leap: Packet[VideoStream] | None = None
    for packet in packets:
        if packet.pts is None:
            continue
        base = packet.time_base
        if last is not None and leap is None and (packet.pts - last) * base > _LEAP_SECONDS:
            leap = packet  # to be believed if the next one is near it
            continue
        if leap is not None and leap.pts is not None and abs(packet.pts - leap.pts) * base <= _LEAP_SECONDS:
            last, before, stay = leap.pts, last, leap.duration
        leap = None
        if last is None or packet.pts > last:
            last, before, stay = packet.pts, last, packet.duration
        elif packet.pts != last and (before is None or packet.pts > before):
            before = packet.pts
    if leap is not None and leap.pts is not None:
        last, before, stay = leap.pts, last, leap.duration
    if last is None:
        return None
    if stay:
        return (last + stay) * base
    return last * base + ((last - before) * base if before is not None else step)


def _upright(frame: VideoFrame, codec: str) -> tuple[Upright, tuple[str, ...]]:
    """What the frame's display matrix asks for, and a note if it asks for something odd.

    The matrix maps stored (x, y) to shown (x', y'): ``x' = a x + c y``, ``y' = b x + d y``.
    """
    if not frame.rotation:
        return Upright(), ()
    if codec in _NAMED_PROFILES:
        return _QUARTERS.get(frame.rotation % 360, Upright()), ()
    try:
        side = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows no name for some newer kinds of side data and then gives none at all
        return _QUARTERS.get(frame.rotation % 360, Upright()), ()
    matrix = bytes(side) if isinstance(side, SideData) else b""
    if len(matrix) != 36:
        return Upright(), ()
    a, b, _, c, d, *_ = (int(x) for x in np.frombuffer(matrix, dtype=np.int32))
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if straight and not b and not c:
        turn = Upright(False, a < 0, d < 0)
    elif crossed and not a and not d:
        turn = Upright(True, c < 0, b < 0)
    else:
        return Upright(), ("the display matrix is no quarter turn and is ignored",)
    return turn, ("the picture is mirrored, as the file asks",) if turn.mirrored else ()


def _notes(frame: VideoFrame, stream: VideoStream) -> tuple[str, ...]:
    """What the pictures have that is not carried out."""
    notes = []
    ratio = stream.sample_aspect_ratio
    if ratio and ratio != 1:
        notes.append(f"pixels are {ratio.numerator}:{ratio.denominator} wide to high and are taken as square")
    if frame.color_trc in _HDR:
        notes.append(f"high dynamic range ({_HDR[frame.color_trc]}), shown without tone mapping")
    if frame.interlaced_frame:
        notes.append("interlaced, shown without deinterlacing")
    return tuple(notes)
