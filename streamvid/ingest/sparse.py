"""A few pictures of a long film: only what they need is decoded, several places at a time.

The targets are known before anything is decoded, so they are grouped by the key frame that
decoding has to start from.  For each group packets are read, which is cheap, until it is certain
which picture is on screen at each target and when the next one comes; decoding stops right after
the last of them, and of the pictures between those are left out that no other one refers to.
Groups need nothing of each other: threads with a container and a decoder each work on several.

What comes out is what reading in order gives, to the bit.  Where a group does not decode as the
container promised, the rest of the film is read in order instead.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from fractions import Fraction
from math import ceil, floor

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from streamvid.ingest.convert import Converter
from streamvid.ingest.crew import Crew
from streamvid.ingest.film import LEAP_SECONDS, Decoder, Film
from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
from streamvid.ingest.sampling import Plan
from streamvid.ingest.timeline import Distrust, Spot, Timeline, skip_mode

_MOST_THREADS = 8
_WAITING_BYTES = 64 << 20
"""Pictures that wait to be taken may fill so much memory; two for each thread are always allowed."""

_NEAR_PICTURES = 3
"""If so few pictures lie between the last target and the next key frame, decoding on is cheaper than seeking."""

_MOST_JOINED = 16
"""Groups are not joined beyond this many targets, so that there is work for every thread."""


@dataclass(frozen=True, slots=True)
class _Taken:
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


class SparsePicture(Picture):
    """A picture on screen at a target, or the one after it, of which only the time is known."""

    __slots__ = ("_pixels", "_source", "seen")

    def __init__(self, pts: Fraction, duration: Fraction, pixels: NDArray[np.uint8], *, seen: bool = True) -> None:
        self.pts = pts
        self.duration = duration
        self.seen = seen
        """Whether its pixels are its own; else they are those of the picture before, which stays if this is broken."""

        self._pixels = pixels
        self._source: Picture | None = None

    def fill(self, duration: Fraction, pixels: NDArray[np.uint8] | None, source: Picture | None = None) -> None:
        """Add what it shows: pixels, or another decoder's picture of the same time."""
        self.duration = duration
        self.seen = True
        self._source = source
        if pixels is not None:
            self._pixels = pixels

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """``(H, W, 3)`` RGB of the size that the plan was made for."""
        return self._pixels if self._source is None else self._source.pixels(size)

    def grey(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Brightness, where the picture was read in order."""
        assert self._source is not None, "sparse reading converts what was planned and nothing else"
        return self._source.grey(size)


class SparsePictures(Pictures):
    """One pass over the pictures that a plan with a rate asks for, and the one after each.

    To be given to a ``Sampler`` with the same plan and size: other pictures never come.

    Args:
        film: what to read; ``sparse_plan`` says whether it can be read this way.
        plan: targets.
        size: (H, W) to scale to; None keeps the full size.
        in_order: makes an ordinary pass, for what cannot be trusted.
        container: the film, open, to begin with; closed by this object.
    """

    def __init__(
        self,
        film: Film,
        plan: Plan,
        *,
        size: tuple[int, int] | None,
        in_order: Callable[[], Pictures],
        container: InputContainer | None = None,
    ) -> None:
        self.stats = DecodeStats()
        self._film = film
        self._plan = plan
        self._size = size
        self._in_order = in_order
        self._container = container
        self._crew: Crew[_Taken] | None = None
        self._dismiss: weakref.finalize[..., SparsePictures] | None = None
        self._counts: dict[int, tuple[int, ...]] = {}
        self._targets = 0
        self._latest: SparsePicture | None = None
        self._gone: Fraction | None = None
        self._rest: Pictures | None = None
        self._closed = False

    def close(self) -> None:
        """Stop all threads and close the file."""
        self._closed = True
        self._stop()
        if self._rest is not None:
            self._rest.close()
        if self._container is not None:
            self._container.close()
            self._container = None

    def __next__(self) -> Picture:
        if self._closed:
            raise StopIteration
        if self._rest is None:
            try:
                return self._next_sparse()
            except Distrust:
                self._leave()
        return self._next_in_order()

    def _next_sparse(self) -> Picture:
        """In turn a picture at a target and the time of the one after it, which may itself be at the next target."""
        if self._crew is None:
            self._crew = self._begin()
        latest = self._latest
        if latest is not None and latest.seen:
            return self._after()
        taken = self._crew.take()
        if taken is None or (latest is not None and taken.pts < latest.pts):
            raise Distrust
        self._targets += taken.targets
        self._counts[taken.worker] = taken.counts
        self._count()
        self._gone = taken.gone
        if latest is not None and taken.pts == latest.pts:
            latest.fill(taken.duration, taken.pixels)
            return self._after()
        self._latest = SparsePicture(taken.pts, taken.duration, taken.pixels)
        return self._latest

    def _after(self) -> Picture:
        if self._gone is None:
            self.close()
            raise StopIteration
        assert self._latest is not None
        self._latest = SparsePicture(self._gone, self._film.step, self._latest.pixels(), seen=False)
        return self._latest

    def _leave(self) -> None:
        """Go on in order from the first target that was not met."""
        self._stop()
        self._rest = self._in_order()
        assert self._plan.fps is not None
        self._rest.skip_to(self._plan.start + self._targets / self._plan.fps)

    def _stop(self) -> None:
        if self._dismiss is not None:
            self._dismiss()
        self._crew = self._dismiss = None

    def _next_in_order(self) -> Picture:
        assert self._rest is not None
        while True:
            picture = next(self._rest, None)
            self._count()
            if picture is None:
                self.close()
                raise StopIteration
            latest = self._latest
            if latest is None or picture.pts > latest.pts:
                self._latest = None
                return picture
            if picture.pts == latest.pts and not latest.seen:
                latest.fill(picture.duration, None, picture)

    def _count(self) -> None:
        """Add up what every worker and the pass in order have counted so far."""
        parts = list(self._counts.values())
        if self._rest is not None:
            parts.append(astuple(self._rest.stats))
        for field, counts in zip(fields(DecodeStats), zip(*parts, strict=True), strict=False):
            setattr(self.stats, field.name, sum(counts))
        self.stats.restarts += self._rest is not None

    def _begin(self) -> Crew[_Taken]:
        """Group the targets, share out the processors and start reading."""
        film = self._film
        container, self._container = self._container, None
        decoder = Decoder(film, container=container)
        try:
            first = next(decoder.packets(), None) if container is None else None
            ticks = target_ticks(self._plan, film.time_base)
            groups = _grouped(ticks, decoder, film)
        except BaseException:
            decoder.close()
            raise
        height, width = self._size or film.size or (1, 1)
        threads = film.threads or processors()
        limit = max(2 * threads, _WAITING_BYTES // (3 * height * width))
        workers = max(1, min(threads, len(groups), limit * len(groups) // len(ticks)))
        ready = decoder.use_threads(threads // workers)
        if not ready:
            decoder.close()

        def make(worker: int) -> _GroupReader:
            opened = (decoder, first) if ready and not worker else None
            return _GroupReader(film, groups, size, threads // workers, worker, opened)

        size = self._size
        crew = Crew(make, parts=len(groups), limit=limit, workers=0 if threads == 1 else workers)
        self._dismiss = weakref.finalize(self, crew.close)
        return crew


def sparse_plan(film: Film, plan: Plan) -> bool:
    """Whether a plan can be read this way: targets at a rate up to a known end, key frames that can be trusted."""
    return film.sparse and plan.mode == "rate" and plan.stop is not None


def processors() -> int:
    """How many threads are of use: the processors this process may run on, at most eight."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MOST_THREADS)


def target_ticks(plan: Plan, base: Fraction) -> list[int]:
    """The targets in ticks of the container's clock, rounded down: a picture is on screen if its pts is no later."""
    assert plan.fps is not None and plan.stop is not None
    count = ceil((plan.stop - plan.start) * plan.fps)
    if plan.max_frames is not None:
        count = min(count, plan.max_frames)
    first, step = plan.start / base, 1 / (plan.fps * base)
    below = first.denominator * step.denominator
    start, each = first.numerator * step.denominator, step.numerator * first.denominator
    return [(start + k * each) // below for k in range(count)]


def _grouped(ticks: list[int], decoder: Decoder, film: Film) -> list[list[int]]:
    """Targets that are decoded in one go, by the key frames in the container's index.

    Only how much is decoded depends on these: each group is read from the key frame that a
    seek finds, and what is on screen is told by packets.
    """
    stream = decoder.stream
    try:
        # Matroska reads its index when somebody seeks.
        decoder.container.seek(ticks[0], stream=stream)
        first = next(decoder.packets(), None)
    except av.error.FFmpegError:
        raise Distrust from None
    entries = stream.index_entries
    if first is None or first.pts is None or not len(entries):
        raise Distrust
    place = entries.search_timestamp(first.dts if first.dts is not None else first.pts)
    # MOV indexes when pictures are decoded; they are shown later by what the first one tells.
    delay = max(0, first.pts - entries[place].timestamp) if place >= 0 else 0
    near = round(_NEAR_PICTURES * film.step / film.time_base)
    groups: list[list[int]] = []
    key = following = None
    for tick in ticks:
        if groups and (following is None or tick < following):
            groups[-1].append(tick)
            continue
        place = entries.search_timestamp(tick - delay)
        here = entries[place].timestamp + delay if place >= 0 else None
        joined = bool(groups) and here == following and here is not None and len(groups[-1]) < _MOST_JOINED
        if groups and (here == key or (joined and here - groups[-1][-1] <= near)):  # type: ignore[operator]
            groups[-1].append(tick)
        else:
            groups.append([tick])
        key = here
        place = entries.search_timestamp(tick - delay + 1, backward=False)
        following = entries[place].timestamp + delay if place >= 0 else None
    return groups


class _GroupReader:
    """Reads groups of targets with one decoder.

    Args:
        film: what to read.
        groups: targets in ticks.
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
        self._skip = skip_mode(self._codec, self._context.extradata)
        if first is not None:
            self._warm_up(first)

    def close(self) -> None:
        """Close the file."""
        self._decoder.close()

    def read(self, part: int) -> Iterator[_Taken]:
        """The pictures on screen at a group's targets; raises Distrust if anything is not as it should be."""
        group = self._groups[part]
        line = Timeline(self._codec, group, round(LEAP_SECONDS / self._film.time_base))
        for packet in self._packets(group[0]):
            line.add(packet)
            for sent, spot in line.decided():
                yield from self._shown(self._decoded(sent, skip=spot is None), line)
            if not line.left:
                break
        # Nothing after this is wanted: the decoder gives what it holds back without being fed more.
        yield from self._shown(self._decoded(None), line)
        if line.left or line.expected:
            raise Distrust

    def _packets(self, tick: int) -> Iterator[Packet[VideoStream]]:
        """Packets from the key frame at or before a moment."""
        failed = self._stats.skipped
        try:
            self._decoder.container.seek(tick, stream=self._decoder.stream)
        except av.error.FFmpegError:
            raise Distrust from None
        begin = floor(self._film.start / self._film.time_base)
        for packet in self._decoder.packets():
            if self._stats.skipped > failed:
                raise Distrust
            if packet is self._decoder.first and packet.pts is not None and packet.pts > begin:
                self._stats.seeks += 1
            yield packet

    def _decoded(self, packet: Packet[VideoStream] | None, *, skip: bool = False) -> list[VideoFrame]:
        """What comes out when a packet goes in; what nothing refers to is passed over if it may be skipped."""
        if self._skip is not None and packet is not None:
            mode = self._skip if skip else "DEFAULT"
            if mode != self._context.skip_frame:
                self._context.skip_frame = mode
        try:
            return self._context.decode(packet)
        except (av.error.FFmpegError, ValueError):
            raise Distrust from None

    def _shown(self, frames: list[VideoFrame], line: Timeline) -> Iterator[_Taken]:
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

    def _taken(self, frame: VideoFrame, spot: Spot) -> _Taken:
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
        return _Taken(pts, gone, stay, spot.targets, pixels, self._worker, astuple(self._stats))

    def _warm_up(self, first: Packet[VideoStream]) -> None:
        """Show a fresh decoder the first packet of the file without decoding a picture.

        The first packet of H.264 may name the encoder, whose 4:4:4 pictures are read in its own
        way, and parameters may be stored there only.
        """
        if self._codec in ("h264", "hevc"):
            self._context.skip_frame = "ALL"
            self._decoded(first)
            self._context.skip_frame = "DEFAULT"
