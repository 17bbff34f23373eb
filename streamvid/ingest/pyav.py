"""Decoding by PyAV: exact times, the right stream, damage counted, jumps only where they change nothing.

What FFmpeg leaves to its caller is handled here: rotation, missing and falling times, sizes
that change, packets that fail, headers that lie.
"""

from __future__ import annotations

from collections import deque
from contextlib import closing
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from streamvid.errors import SourceError
from streamvid.ingest.convert import Converter, Look, look_of
from streamvid.ingest.describe import colour_of, streams_of
from streamvid.ingest.film import (
    INDEXED,
    LEAP_SECONDS,
    RESETTING,
    Decoder,
    Film,
    choose_stream,
    claimed_end,
    end_of,
    step_of,
)
from streamvid.ingest.openers import Opener, hardware_notes
from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
from streamvid.ingest.reader import Reader, Shots, SourceInfo
from streamvid.ingest.sampling import Plan, Sampler
from streamvid.ingest.sparse import SparsePictures, sparse_plan
from streamvid.ingest.wall import TOLERANCE_SECONDS, steady

_TICK = Fraction(1, 1000)
_FALL_SECONDS = 1
"""A time that falls by more than this waits for the next one: either that confirms it (a new
clock) or the time was damaged."""


class PyavReader(Reader):
    """A source read by PyAV.

    Args:
        opener: what to read.

    Raises:
        SourceError: if there is no video stream or no picture in it decodes.
    """

    def __init__(self, opener: Opener) -> None:
        self._spare: InputContainer | None = None
        container = opener.open()
        try:
            stream = choose_stream(container, opener.name)
            codec = stream.codec_context.codec.canonical_name
            kind = container.format.name
            jumps = codec in RESETTING and kind.startswith(INDEXED)
            self._film = film = Film(opener, stream.index, step_of(stream), jumps, stream.time_base or Fraction(0))
            if kind == "avi":
                film.by_dts, film.delay = self._stamps_fall()
            stream.thread_count = 1  # one picture and what sparse reading makes of this container later
            first, notes = self._first_picture(container)
            if film.show_damaged:  # the container was read to its end
                container = opener.open()
                stream = choose_stream(container, opener.name)
            film.marks_keys = codec in RESETTING and not film.by_dts and kind != "avi" and film.timed
            frame = first.frame
            film.linear = film.marks_keys and not jumps
            film.look, seen = look_of(frame, stream.sample_aspect_ratio)
            film.start = first.pts
            film.interlaced = frame.interlaced_frame
            claimed = claimed_end(container, stream)
            film.end = None if claimed is None else film.tail_end(claimed, container)
            if film.end is None and kind.startswith("mov"):
                film.end = end_of(film.stamps(film.packets()), film.step)  # cut off: what is left is soon read
            height, width = film.look.shown
            duration = None if film.end is None else film.end - film.start
            said = Fraction(container.duration or 0, 1_000_000)
            if film.end is not None and duration is not None and said > max(film.end, duration) * Fraction(5, 4) + 2:
                notes += (f"the header says {float(said):g} s, the pictures end after {float(duration):.4g} s",)
            self.info = SourceInfo(
                path=opener.where,
                name=opener.name,
                container=kind,
                codec=codec,
                width=width,
                height=height,
                duration=duration,
                start=film.start,
                time_base=film.time_base,
                average_rate=stream.average_rate,
                rotation=film.look.upright.degrees,
                decoder="pyav",
                streams=streams_of(container, stream),
                colour=colour_of(frame),
                notes=opener.notes + notes + seen + hardware_notes(opener, stream),
            )
        except BaseException:
            container.close()
            raise
        if film.sparse and film.jumps:
            self._spare = container
        else:
            container.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_spare": None}

    def close(self) -> None:
        """Let go of the container that opening left."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def sample(self, plan: Plan, *, size: tuple[int, int] | None = None) -> Shots:
        """The pictures of a plan; ``size`` is (H, W), None for the full one."""
        if sparse_plan(self._film, plan):
            spare, self._spare = self._spare, None
            pictures = SparsePictures(self._film, plan, size=size, in_order=self.pictures, container=spare)
            return Sampler(pictures, plan, size=size, name=self.info.name)
        self.close()
        return super().sample(plan, size=size)

    def pictures(self, *, keys_only: bool = False) -> PyavPictures:
        """A new pass over all pictures of the chosen stream, or over its key frames."""
        return PyavPictures(self._film, keys_only=keys_only)

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """Shown packets with a time in ``[start, stop)``, without decoding where packets have times."""
        count = 0
        for packet in self._film.packets():
            stamp = packet.dts if self._film.by_dts else packet.pts
            if stamp is None:
                return super().count_pictures(start, stop)
            count += start <= stamp * packet.time_base < stop
        return count

    def _measured_end(self) -> Fraction:
        end = end_of(self._film.stamps(self._film.packets()), self._film.step)
        return end if end is not None and end > self.info.start else super()._measured_end()

    def _stamps_fall(self) -> tuple[bool, Fraction]:
        """Whether the pts of the first frames fall, and how many seconds the first is decoded before it is shown.

        AVI stores no pts, and those FFmpeg invents may be wrong.
        """
        with closing(Decoder(self._film)) as decoder:
            frames = list(islice(decoder.frames(), 8))
            begin = decoder.first.dts if decoder.first is not None else None
        known = [frame.pts for frame in frames if frame.pts is not None]
        if known == sorted(set(known)):
            return False, Fraction(0)
        shown = frames[0].dts
        late = shown - begin if shown is not None and begin is not None else 0
        return True, late * self._film.time_base

    def _first_picture(self, container: InputContainer) -> tuple[PyavPicture, tuple[str, ...]]:
        """The first picture, and what had to be accepted to get one."""
        film = self._film
        for film.show_damaged in (False, True):
            pictures = PyavPictures(film, container=None if film.show_damaged else container)
            first = next(pictures, None)
            if film.show_damaged:
                pictures.close()
            if first is not None:
                notes: tuple[str, ...] = ()
                if film.show_damaged:
                    notes += ("every picture is damaged and shown as far as it decodes",)
                film.timed = not pictures.stats.untimed
                asked = film.opener.rate
                if film.timed and asked is not None:
                    notes += (f"the rate of {float(asked):g} is not used: the source has times of its own",)
                if not film.timed:
                    film.step = 1 / asked if asked is not None else film.step
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

    def __init__(self, film: Film, *, keys_only: bool = False, container: InputContainer | None = None) -> None:
        self.stats = DecodeStats()
        self._film = film
        self._keys_only = keys_only
        self._converter: Converter | None = None
        self._decoder: Decoder | None = Decoder(film, self.stats, keys_only=keys_only, container=container)
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
            if self._keys_only and not picture.frame.key_frame:
                continue
            self._given = picture.pts
            if self._landing is not None and picture.pts > self._landing:
                self._landing = None
            return picture

    def convert(self, frame: VideoFrame, size: tuple[int, int] | None) -> NDArray[np.uint8]:
        """RGB of the source's one size, or of ``size``, upright."""
        if (frame.height, frame.width) != self._look.size:
            self.stats.rescaled += 1
        return self._made().convert(frame, size)

    def grey(self, frame: VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Brightness only, averaged down to ``size``."""
        return self._made().grey(frame, size)

    @property
    def _look(self) -> Look:
        assert self._film.look is not None, "the first picture tells how all are seen"
        return self._film.look

    def _made(self) -> Converter:
        if self._converter is None:
            self._converter = Converter(self._look, self._film.name)
        return self._converter

    def _forget_clock(self) -> None:
        self._last: Fraction | None = None
        self._interval: Fraction | None = None
        self._offset = Fraction(0)
        self._ready: deque[PyavPicture] = deque()
        self._held: tuple[VideoFrame, Fraction, Fraction] | None = None
        self._came = Fraction(0)
        self._lead: Fraction | None = None

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
        # Where nobody waits for pictures it does not matter when they come.
        here = Fraction(0) if self._film.opener.slack is None else Fraction(round(steady() * 1000), 1000)
        if self._film.opener.timeless:
            self._commit(frame, here if self._last is None else max(here, self._last + _TICK), here)
            return
        if self._film.by_dts:
            stamp = frame.dts
        else:
            stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is None or not base:
            if self._film.opener.live and self._last is None and not self.stats.untimed:
                # RTSP servers tell the time of the second picture; that of the first is lost.
                self.stats.untimed += 1
                return
            # The last frames of AVI come after all of its chunks and have lost their number.
            self.stats.untimed += not self._film.by_dts
            time = self._last + self._film.step - self._offset if self._last is not None else Fraction(0)
        else:
            time = stamp * base - self._film.delay
        if self._held is not None and self._last is not None:
            held, self._held = self._held, None
            if self._last < time + self._offset <= self._last + LEAP_SECONDS:
                self.stats.misplaced += 1
            else:
                self._commit(*held)
        if self._last is not None:
            step = time + self._offset - self._last
            if step < -_FALL_SECONDS or step > LEAP_SECONDS:
                self._held = frame, time, here
                return
        self._commit(frame, time, here)

    def _commit(self, frame: VideoFrame, time: Fraction, here: Fraction) -> None:
        pts = time + self._offset
        if self._last is not None and pts <= self._last:
            if self._last - pts <= _FALL_SECONDS:
                self.stats.misplaced += 1
                return
            self.stats.jumps += 1
            self._jumps = False
            self._offset += self._last + self._film.step - pts
            pts = time + self._offset
        elif self._last is not None and (leap := self._leap(pts, pts - self._last, here - self._came)):
            self.stats.jumps += 1
            self._offset -= leap
            pts = time + self._offset
        self._came = here
        self._lead = pts - here if self._lead is None else max(self._lead, pts - here)
        if self._last is not None:
            self._interval = pts - self._last
        self._last = pts
        self._ready.append(PyavPicture(frame, pts, self._stay(frame, pts), self))

    def _leap(self, pts: Fraction, step: Fraction, elapsed: Fraction) -> Fraction:
        """How far the clock of a source in real time leapt ahead of the pictures' arrival; 0 where it is believed.

        Pictures that the network kept come faster than they were taken, but never before those that it did not keep.
        """
        slack = self._film.opener.slack
        if slack is None or self._lead is None:
            return Fraction(0)
        allowed = slack + TOLERANCE_SECONDS
        ahead = pts - (self._came + elapsed) - self._lead
        if step - elapsed <= allowed or ahead <= allowed:
            return Fraction(0)
        return step - max(elapsed, self._film.step)

    def _stay(self, frame: VideoFrame, pts: Fraction) -> Fraction:
        """How long the picture stays if it is the last: as it says, else as the file does, else as the one before."""
        timed = (frame.pts is not None or frame.dts is not None) and not self._film.opener.timeless
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
        self._decoder = Decoder(self._film, self.stats, keys_only=self._keys_only)
        self._frames = self._decoder.frames()
        self._forget_clock()
