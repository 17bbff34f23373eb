"""A bounded queue between the stage that decodes and the stage that encodes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from streamvid.errors import SettingsError, near

Item = TypeVar("Item")


class Policy(StrEnum):
    """What happens to a frame that finds the buffer full."""

    WAIT = "wait"
    """Decoding waits; nothing is lost.  Right for files."""

    DROP_OLDEST = "drop-oldest"
    """The frame that waited longest goes: what is taken next is recent.  Right for watching live."""

    DROP_NEWEST = "drop-newest"
    """The new frame goes: what was taken first stays in order without holes near the start."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """How far decoding may run ahead of whoever takes the frames.

    Args:
        frames: most frames that wait, >= 1; more smooths out uneven work and holds more memory.
        megabytes: most memory they take together; large frames wait in smaller numbers, never
            fewer than two.
        policy: what happens when the buffer is full.

    Raises:
        SettingsError: if a value is out of range.
    """

    frames: int = 8
    megabytes: int = 256
    policy: Policy | str = Policy.WAIT

    def __post_init__(self) -> None:
        if self.frames < 1 or self.megabytes < 1:
            raise SettingsError(
                f"a buffer needs room for a frame and a megabyte, got {self.frames} and {self.megabytes}"
            )
        if self.policy not in tuple(Policy):
            raise SettingsError(f"unknown buffer policy {self.policy!r}; {near(self.policy, tuple(Policy))}")

    def capacity(self, frame_bytes: int) -> int:
        """How many frames of this size wait at most."""
        return max(min(2, self.frames), min(self.frames, (self.megabytes << 20) // max(1, frame_bytes)))


class Closed(Exception):
    """Nobody takes or brings any more."""


class Buffer(Generic[Item]):
    """A queue with room for ``capacity`` items; one side puts, the other gets, either may end it.

    Args:
        capacity: most items that wait, >= 1.
        policy: what happens to an item that finds no room.
        drop: told of every item that is thrown away.
    """

    def __init__(
        self, capacity: int, policy: Policy | str = Policy.WAIT, drop: Callable[[Item], None] | None = None
    ) -> None:
        self.dropped = 0
        """Items thrown away because there was no room."""

        self._capacity, self._policy, self._drop = capacity, Policy(policy), drop
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._finished = self._closed = False
        self._failure: BaseException | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Add an item, as the policy says if there is no room; raises Closed if nobody takes any more."""
        lost: Item | None = None
        with self._changed:
            if self._policy is Policy.WAIT:
                self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                raise Closed
            if len(self._items) < self._capacity:
                self._items.append(item)
            else:
                self.dropped += 1
                if self._policy is Policy.DROP_OLDEST:
                    lost = self._items.popleft()
                    self._items.append(item)
                else:
                    lost = item
            self._changed.notify_all()
        if lost is not None and self._drop is not None:
            self._drop(lost)

    def finish(self, last: Item | None = None, failure: BaseException | None = None) -> None:
        """Nothing more will be put: ``last`` finds room in any case, and after it ``failure`` is raised."""
        with self._changed:
            if last is not None and not self._closed:
                self._items.append(last)
            self._finished, self._failure = True, failure
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Item:
        """The item that waited longest.

        Raises:
            StopIteration: if nothing more comes.
            TimeoutError: if nothing came in ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._finished or self._closed, timeout):
                raise TimeoutError
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._failure is not None and not self._closed:
                failure, self._failure = self._failure, None
                raise failure
            raise StopIteration

    def close(self) -> None:
        """Nobody takes any more: what waits is thrown away, uncounted, and ``put`` raises Closed."""
        with self._changed:
            self._closed = True
            waiting, self._items = list(self._items), deque()
            self._changed.notify_all()
        if self._drop is not None:
            for item in waiting:
                self._drop(item)
