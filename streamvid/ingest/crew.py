"""Threads that share the parts of a long piece of work and hand over what they make in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
Made = TypeVar("Made", covariant=True)


class Hand(Protocol[Made]):
    """What one thread works with."""

    def read(self, part: int) -> Iterator[Made]:
        """What a part consists of; parts come with rising numbers."""

    def close(self) -> None:
        """Let go of it; called by the thread that used it."""


class Crew(Generic[T]):
    """Threads that work on parts, each on one at a time; ``take`` gives what they made, in order of parts.

    A thread that is ahead waits while ``limit`` things wait to be taken.  The one whose part is next
    may always add one, so that nobody waits for ever.  No thread outlives ``close``, nor keeps the
    program from ending.

    Args:
        make: makes what a thread with this number works with; called in that thread.
        parts: number of parts.
        limit: things that may wait to be taken, and one more.
        workers: number of threads; 0 works when something is asked for.
    """

    def __init__(self, make: Callable[[int], Hand[T]], *, parts: int, limit: int, workers: int) -> None:
        self._make = make
        self._parts = parts
        self._limit = limit
        self._change = threading.Condition()
        self._ready: dict[int, deque[T]] = {}
        self._failed: dict[int, BaseException] = {}
        self._done: set[int] = set()
        self._claimed = self._next = self._waiting = 0
        self._closed = False
        self._alone = None if workers else self._work_alone()
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"streamvid-decode-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> T | None:
        """The next thing, None after the last; raises what went wrong where the next thing would have been made."""
        if self._alone is not None:
            return next(self._alone, None)
        with self._change:
            while not self._closed and self._next < self._parts:
                ready = self._ready.get(self._next)
                if ready:
                    self._waiting -= 1
                    self._change.notify_all()
                    return ready.popleft()
                if self._next in self._failed:
                    raise self._failed[self._next]
                if self._next in self._done:
                    self._ready.pop(self._next, None)
                    self._next += 1
                    self._change.notify_all()
                else:
                    self._change.wait()
        return None

    def close(self) -> None:
        """Stop all threads and wait for them; closing twice is allowed."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        if self._alone is not None:
            self._alone.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _work_alone(self) -> Generator[T, None, None]:
        with closing(self._make(0)) as hand:
            for part in range(self._parts):
                yield from hand.read(part)

    def _work(self, number: int) -> None:
        hand: Hand[T] | None = None
        part = -1
        try:
            while (part := self._claim()) < self._parts:
                if hand is None:
                    hand = self._make(number)
                for made in hand.read(part):
                    if not self._put(part, made):
                        return
                self._finish(part)
        except BaseException as reason:  # whoever takes must hear of it
            self._finish(part, reason)
        finally:
            if hand is not None:
                hand.close()

    def _claim(self) -> int:
        """The number of the next part that nobody works on; out of range if there is none or nobody wants more."""
        with self._change:
            part = self._parts if self._closed else self._claimed
            self._claimed = part + 1
            return part

    def _put(self, part: int, made: T) -> bool:
        """Wait for room and add it; False if nobody wants it any more."""
        with self._change:
            ready = self._ready.setdefault(part, deque())
            while not self._closed and self._waiting >= self._limit and (part != self._next or ready):
                self._change.wait()
            if not self._closed:
                ready.append(made)
                self._waiting += 1
                self._change.notify_all()
            return not self._closed

    def _finish(self, part: int, reason: BaseException | None = None) -> None:
        with self._change:
            if reason is not None:
                self._failed[part] = reason
            self._done.add(part)
            self._change.notify_all()
