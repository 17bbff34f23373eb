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
from collections.abc import Callable
from dataclasses import astuple, fields
from fractions import Fraction
from math import ceil

import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from streamvid.ingest.crew import Crew
from streamvid.ingest.film import Decoder, Film
from streamvid.ingest.groups import GroupReader, Taken, grouped
from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
from streamvid.ingest.sampling import Plan
from streamvid.ingest.timeline import Distrust

_MOST_THREADS = 8
_WAITING_BYTES = 64 << 20
"""Pictures that wait to be taken may fill so much memory; two for each thread are always allowed."""


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
        self._crew: Crew[Taken] | None = None
        self._dismiss: weakref.finalize[..., SparsePictures] | None = None
        self._counts: dict[int, tuple[int, ...]] = {}
        self._targets = 0
        self._latest: SparsePicture | None = None
        self._taken: Taken | None = None
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
        taken = self._take()
        # The picture given last may be met again, by the next group.
        while self._taken is not None and taken.pts == self._taken.pts:
            taken = self._take()
        if latest is not None and taken.pts < latest.pts:
            raise Distrust
        self._taken = taken
        if latest is not None and taken.pts == latest.pts:
            latest.fill(taken.duration, taken.pixels)
            return self._after()
        self._latest = SparsePicture(taken.pts, taken.duration, taken.pixels)
        return self._latest

    def _take(self) -> Taken:
        assert self._crew is not None
        taken = self._crew.take()
        if taken is None:
            raise Distrust
        self._targets += taken.targets
        self._counts[taken.worker] = taken.counts
        self._count()
        return taken

    def _after(self) -> Picture:
        assert self._taken is not None
        if self._taken.gone is None:
            self.close()
            raise StopIteration
        self._latest = SparsePicture(self._taken.gone, self._film.step, self._taken.pixels, seen=False)
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

    def _begin(self) -> Crew[Taken]:
        """Group the targets, share out the processors and start reading."""
        film = self._film
        container, self._container = self._container, None
        decoder = Decoder(film, container=container)
        try:
            first = next(decoder.packets(), None) if container is None else None
            ticks = target_ticks(self._plan, film.time_base)
            groups = [ticks] if film.linear else grouped(ticks, decoder, film)
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

        def make(worker: int) -> GroupReader:
            opened = (decoder, first) if ready and not worker else None
            return GroupReader(film, groups, size, threads // workers, worker, opened)

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
