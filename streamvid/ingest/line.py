"""One connection to a live source, made and read by a thread of its own, so that nobody else waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from streamvid.errors import StreamvidError
from streamvid.frames import Frame
from streamvid.ingest.buffer import Ahead, Buffer, Closed
from streamvid.ingest.isolation import Leash
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.reader import SourceInfo


class Reading(Iterator[Frame], Protocol):
    """Frames of one pass over a source."""

    @property
    def stats(self) -> DecodeStats:
        """What happened while decoding, so far."""


class Opened(Protocol):
    """A source that has been connected to."""

    @property
    def info(self) -> SourceInfo:
        """What is known about it."""

    def close(self) -> None:
        """Leave it."""


Connect = Callable[[], tuple[Opened, Reading]]
"""Connects and begins to read."""


@dataclass(frozen=True, slots=True)
class Came:
    """A picture and when it was here, by the monotonic clock, in seconds."""

    info: SourceInfo
    """What is known about the source since it was connected to."""

    frame: Frame
    received: float
    rescaled: int
    """How many pictures so far had another size than the first one."""

    jumps: int
    """How often so far the source's clock fell or leapt."""

    lost: int
    """Frames that were thrown away so far because nobody took them."""

    damaged: int = 0
    """Pictures that came damaged so far, and packets that could not be read."""


class Line(Protocol):
    """The pictures of one connection."""

    def take(self, seconds: float) -> Came:
        """What comes next.

        Raises:
            TimeoutError: if nothing comes for so long.
            StopIteration: if the source ended.
            StreamvidError: if it failed.
        """

    def cut(self) -> None:
        """Leave the source, whatever it does; from any thread, and more than once."""

    def join(self, seconds: float) -> bool:
        """Whether nothing of it runs any more, within so many seconds."""


class ThreadLine:
    """A connection that a thread makes and reads.

    Args:
        connect: connects and begins to read.
        ahead: how many pictures wait, and what happens to those that find no room.
        now: the monotonic clock.
    """

    def __init__(self, connect: Connect, ahead: Ahead, now: Callable[[], float]) -> None:
        self._connect, self._ahead, self._now = connect, ahead, now
        self._events: Buffer[Came] = Buffer(ahead.frames, ahead.policy)
        self._leash = Leash()
        self._thread = threading.Thread(target=self._run, daemon=True, name="streamvid-line")
        self._thread.start()

    def take(self, seconds: float) -> Came:
        """See ``Line``."""
        came = self._events.get(timeout=seconds)
        return replace(came, lost=came.lost + self._events.dropped)

    def cut(self) -> None:
        """See ``Line``."""
        self._events.close()
        self._leash.cut()

    def join(self, seconds: float) -> bool:
        """Whether the thread ended in this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failure: BaseException | None = None
        with self._leash:
            source: Opened | None = None
            try:
                source, frames = self._connect()
                for frame in frames:
                    stats = frames.stats
                    broken = stats.damaged + stats.skipped
                    self._events.put(
                        Came(source.info, frame, self._now(), stats.rescaled, stats.jumps, stats.dropped, broken)
                    )
            except Closed:
                pass
            except Exception as reason:  # whatever it was, the other side must hear of it
                failure = reason
            finally:
                if source is not None:
                    with suppress(StreamvidError):
                        source.close()
        self._events.finish(failure=failure)
