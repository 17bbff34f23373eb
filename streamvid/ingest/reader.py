"""What a decoder knows of one source: facts, passes over its pictures, and sampling made exact."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Protocol, Self

from streamvid.errors import SourceError
from streamvid.ingest.adaptive import AdaptiveSampler, adaptive_plan, cells_of
from streamvid.ingest.pictures import DecodeStats, Pictures
from streamvid.ingest.sampling import KeySampler, Plan, Sampler, Sampling, SamplingReport, Shot, chosen_keys, exact


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

    chosen: str = ""
    """Why this decoder, as half a sentence."""

    live: bool = False
    """Whether it has no end and can be read only once, as it comes."""

    streams: tuple[str, ...] = ()
    """What the container holds, one phrase a stream, the chosen one marked with a star."""

    colour: str = ""
    """Pixel format and what is said of matrix, range and transfer, as FFmpeg names them."""

    notes: tuple[str, ...] = ()
    """What a reader should know: mirrored, not square pixels, high dynamic range, a header that lies."""


class Shots(Protocol):
    """Sampled pictures in order, one by one; ``report`` and ``stats`` are up to date at any moment."""

    @property
    def stats(self) -> DecodeStats:
        """What happened while decoding, so far."""

    @property
    def report(self) -> SamplingReport:
        """What was looked at, so far."""

    def __next__(self) -> Shot: ...

    def close(self) -> None:
        """Let go of the source; closing twice is allowed."""


class Readable(Protocol):
    """What a source needs of a reader, wherever it runs."""

    info: SourceInfo

    @property
    def end(self) -> Fraction:
        """When the last picture is gone, in container seconds."""

    def plan(self, sampling: Sampling) -> Plan:
        """The sampling made exact for this source."""

    def sample(self, plan: Plan, *, size: tuple[int, int] | None = None) -> Shots:
        """The pictures of a plan."""

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """How many pictures appear in ``[start, stop)``."""

    def state(self) -> bytes | None:
        """The reader, to be made again elsewhere; None if it cannot be."""

    def close(self) -> None:
        """Let go of whatever is held open; closing twice is allowed."""


class Reader(ABC):
    """A video that can be looked at any number of times, as one decoder sees it.

    Nothing is held in memory between calls.  Every pass reads on its own, so several may run
    side by side; a live source has one pass only.
    """

    info: SourceInfo

    @abstractmethod
    def pictures(self, *, keys_only: bool = False) -> Pictures:
        """A new pass over all pictures, from the first; ``keys_only`` decodes key frames and nothing else."""

    def close(self) -> None:  # noqa: B027 - a reader that holds nothing has nothing to let go of
        """Let go of whatever is held open; closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> bytes | None:
        """The reader, to be made again elsewhere; None if it cannot be, as with a camera."""
        return None if self.info.live else pickle.dumps(self)

    def sample(self, plan: Plan, *, size: tuple[int, int] | None = None) -> Shots:
        """The pictures of a plan; ``size`` is (H, W), None for the full one."""
        name = self.info.name
        if plan.keys:
            return KeySampler(self.pictures(keys_only=True), plan, size=size, name=name)
        if plan.adaptive is not None:
            cells = cells_of(self.info.height, self.info.width, plan.adaptive.cells)
            return AdaptiveSampler(self.pictures(), plan, cells=cells, size=size, name=name)
        return Sampler(self.pictures(), plan, size=size, name=name)

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
        bounded = sampling.count is not None or (sampling.max_frames is not None and not sampling.keys)
        needed = bounded and not (info.live and stop is not None)
        end = self.end if needed or info.duration is not None else None
        if (stop is not None and stop <= info.start) or (end is not None and start >= end):
            asked = f"from {float(exact(sampling.start or 0)):g} s"
            asked += f" to {float(stop):g} s" if stop is not None else ""
            raise SourceError(
                f"{info.name} shows nothing {asked}: it runs from {float(info.start):g} to {float(self.end):g} s"
            )
        if end is not None:
            stop = end if stop is None else min(stop, end)
        fps = None if sampling.fps is None else exact(sampling.fps)
        if sampling.keys:
            return self._keys_plan(sampling, Plan(start, stop, fps, sampling.max_frames, keys=True))
        if sampling.adaptive is not None:
            return adaptive_plan(sampling.adaptive, Plan(start, stop, fps, sampling.max_frames))
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

    def _keys_plan(self, sampling: Sampling, plan: Plan) -> Plan:
        """A plan for key frames; only with ``max_frames`` they are counted first, which decodes them."""
        if sampling.max_frames is None:
            return plan
        with self.pictures(keys_only=True) as pictures:
            there = sum(1 for _ in chosen_keys(pictures, plan))
        if there <= sampling.max_frames:
            return plan
        note = f"max_frames={sampling.max_frames} takes that many of {there} key frames"
        return replace(plan, share=Fraction(sampling.max_frames, there), notes=(note,))

    def _measured_end(self) -> Fraction:
        end = self.info.start
        with self.pictures() as pictures:
            for picture in pictures:
                end = picture.pts + picture.duration
        return end
