"""One live source read ahead of the model, in a thread of its own and never beyond its bounds."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Protocol

from streamvid.errors import SettingsError, StreamvidError, near
from streamvid.frames import Frame
from streamvid.ingest.supervised import Gap, Notice

Item = Frame | Gap | Notice

SPOKEN = 64
"""Gaps and notices that wait at most; the oldest notice goes first, gaps become one."""

STEP_SECONDS = 4.0
"""Time between two changes of the rate, in stream seconds: what the last one did must be seen first."""

RECOVER_SECONDS = 20.0
"""Stream seconds without pressure after which the rate is raised again."""

COARSEST = 32
"""The rate is lowered to a 32nd of what was asked at most."""


class Overload(StrEnum):
    """What happens when the model is slower than the camera."""

    ADAPTIVE = "adaptive"
    """Fewer frames are taken, evenly, and again more when there is time.  If that does not help, as ``latest``."""

    LATEST = "latest"
    """The frames that waited longest are thrown away."""

    ALL = "all"
    """Reading waits: nothing is thrown away, and what is watched lies further and further back."""


class Events(Protocol):
    """What is read: ``ingest.supervised.Supervised``, or something like it."""

    def __iter__(self) -> Iterator[Item]: ...

    def close(self) -> None:
        """End the iteration, from any thread."""


@dataclass(slots=True)
class Counts:
    """What came and what became of it."""

    frames: int = 0
    """Read from the source."""

    thinned: int = 0
    """Left out because the rate was lowered."""

    dropped: int = 0
    """Thrown away because there was no room."""

    taken: int = 0
    """Given to the model."""


class Feed:
    """Frames that wait for the model, with the gaps and notices between them.

    Args:
        events: the source; iterated in a thread that `start` begins.
        fps: pictures a second that are asked of it; None where all are taken.
        overload: what happens when the model is slower.
        frames: most frames that wait, >= 2.
        megabytes: most memory they take together; large frames wait in smaller numbers, never fewer than two.
        wake: called when something came.

    Raises:
        SettingsError: if a setting makes no sense.
    """

    def __init__(
        self,
        events: Events,
        *,
        fps: Fraction | None,
        overload: Overload | str = Overload.ADAPTIVE,
        frames: int = 32,
        megabytes: int = 256,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        if overload not in tuple(Overload):
            raise SettingsError(f"unknown overload policy {overload!r}; {near(str(overload), tuple(Overload))}")
        if frames < 2 or megabytes < 1:
            raise SettingsError(f"a feed needs room for 2 frames and a megabyte, got {frames} and {megabytes}")
        self.counts = Counts()
        self.stride = 1
        """Of so many frames one is taken: more than 1 while the model is too slow."""

        self.ended = False
        """Nothing more will come."""

        self.failure: StreamvidError | None = None
        """Why it ended, if that was not asked for."""

        self.latest: Fraction | None = None
        """Stream seconds of the last frame that came, taken or not."""

        self._events, self._overload, self._wake = events, Overload(overload), wake
        self._interval = None if fps is None else 1 / fps
        self._frames, self._bytes = frames, megabytes << 20
        self._items: deque[Item] = deque()
        self._waiting = 0
        self._changed = threading.Condition()
        self._closed = False
        self._due: Fraction | None = None
        self._stepped: Fraction | None = None
        self._pressed: Fraction | None = None
        self._thread = threading.Thread(target=self._read, name="feed", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Leave the source; what waits can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._events.close()

    def join(self, seconds: float) -> bool:
        """Wait until reading has ended; False if it has not."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Frames that wait."""
        return self._waiting

    @property
    def spoken(self) -> bool:
        """Whether a gap or a notice comes next."""
        with self._changed:
            return bool(self._items) and not isinstance(self._items[0], Frame)

    @property
    def oldest(self) -> Fraction | None:
        """Stream seconds of the frame that waited longest."""
        with self._changed:
            return next((item.pts for item in self._items if isinstance(item, Frame)), None)

    def take(self, most: int) -> tuple[list[Frame], list[Gap | Notice], Fraction | None]:
        """What comes next: up to ``most`` frames without a gap between them, or what stands before them.

        Returns:
            Frames of one size; gaps and notices that come before them (frames are empty then); and the time of
            what follows the frames, None if it has not come.
        """
        frames: list[Frame] = []
        said: list[Gap | Notice] = []
        with self._changed:
            while self._items and not isinstance(self._items[0], Frame):
                spoken = self._items.popleft()
                assert not isinstance(spoken, Frame)
                said.append(spoken)
            if said:
                return frames, said, None
            while self._items and len(frames) < most:
                item = self._items[0]
                if isinstance(item, Notice):
                    if frames:
                        break
                if not isinstance(item, Frame) or (frames and item.pixels.shape != frames[0].pixels.shape):
                    break
                frames.append(item)
                self._items.popleft()
            self._waiting -= len(frames)
            self.counts.taken += len(frames)
            following = next(
                (item.start if isinstance(item, Gap) else item.pts for item in self._items
                 if not isinstance(item, Notice)), None
            )  # fmt: skip
            self._changed.notify_all()
        return frames, said, following

    def _read(self) -> None:
        try:
            for item in self._events:
                if self._closed:
                    break
                self._put(item)
                self._wake()
        except StreamvidError as reason:
            self.failure = reason
        except Exception as reason:  # a thread that dies in silence would be a stream that dies in silence
            self.failure = StreamvidError(f"reading failed, which is a bug: {type(reason).__name__}: {reason}")
        finally:
            self._events.close()
            self.ended = True
            self._wake()

    def _put(self, item: Item) -> None:
        with self._changed:
            if not isinstance(item, Frame):
                self._say(item)
                return
            self.counts.frames += 1
            self.latest = item.pts
            if self._thins(item.pts):
                self.counts.thinned += 1
                return
            room = max(2, min(self._frames, self._bytes // max(1, item.pixels.numel())))
            if self._overload is Overload.ALL:
                self._changed.wait_for(lambda: self._closed or self._waiting < room)
                if self._closed:
                    return
            elif self._waiting >= room:
                self._drop()
            self._items.append(item)
            self._waiting += 1
            self._adapt(item.pts, self._waiting / room)
            self._changed.notify_all()

    def _thins(self, pts: Fraction) -> bool:
        """Whether a frame is left out at the present rate."""
        if self.stride == 1 or self._interval is None:
            self._due = None
            return False
        if self._due is not None and pts < self._due - self._interval / 2:
            return True
        step = self.stride * self._interval
        self._due = pts + step if self._due is None or pts > self._due + step else self._due + step
        return False

    def _adapt(self, pts: Fraction, full: float) -> None:
        if self._overload is not Overload.ADAPTIVE or self._interval is None:
            return
        if full > 0.25:
            self._pressed = pts
        if self._stepped is not None and pts - self._stepped < STEP_SECONDS:
            return
        if full >= 0.75 and self.stride < COARSEST:
            self.stride, self._stepped = self.stride * 2, pts
        elif self.stride > 1 and (self._pressed is None or pts - self._pressed >= RECOVER_SECONDS):
            self.stride, self._stepped = self.stride // 2, pts
            self._pressed = pts

    def _drop(self) -> None:
        """Throw the frame away that waited longest."""
        for index, item in enumerate(self._items):
            if isinstance(item, Frame):
                del self._items[index]
                self._waiting -= 1
                self.counts.dropped += 1
                return

    def _say(self, item: Gap | Notice) -> None:
        if isinstance(item, Notice) and item.kind == "alive":
            return
        spoken = [index for index, other in enumerate(self._items) if not isinstance(other, Frame)]
        if len(spoken) >= SPOKEN:
            if isinstance(item, Notice):
                return
            self._join_oldest(spoken)
        self._items.append(item)

    def _join_oldest(self, spoken: list[int]) -> None:
        """Make room for one more gap: the oldest notice goes, or the oldest two gaps become one."""
        first = next((index for index in spoken if isinstance(self._items[index], Notice)), None)
        if first is None:
            first, second = spoken[:2]
            one, two = self._items[first], self._items[second]
            assert isinstance(one, Gap) and isinstance(two, Gap)
            self._items[second] = Gap(one.start, two.stop, two.reason)
        del self._items[first]
