"""One clock for all connections of a live source: where a picture lies by its own time and by when it came.

Knows times only.  Between two pictures of a connection the source's own times are the truth;
when it was, only the receipt tells.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

TOLERANCE_SECONDS = 2
"""How far a source's clock may run from the receipt of its pictures before it is not believed."""

LATENCY_SECONDS = 1.0
"""What cameras and networks usually keep a picture for at most; it cannot be measured from here."""

_SETTLE_SECONDS = 10
"""After connecting, kept pictures come all at once; until then an early one only tells how late the first was."""

_KEPT_SECONDS = 60
"""How many seconds of pictures a server may have kept and give at once when it is connected to, as playlists do."""

_WINDOW_SECONDS = 10
"""How long pictures must be late, all of them, before it is the clock and not the network."""

_NONE = Fraction(0)


def steady() -> float:
    """A clock in seconds that is never set and goes on while the machine sleeps, where the system has such a one."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    # That of time.monotonic stands still there while the machine sleeps.
    return time.clock_gettime(time.CLOCK_MONOTONIC) if sys.platform == "darwin" else time.monotonic()


@dataclass(frozen=True, slots=True)
class Placed:
    """A picture on the one clock."""

    pts: Fraction
    leap: Fraction | None = None
    """How many seconds the source's clock was moved for it, above 0 forward; None where it was believed."""


class Wall:
    """Places the pictures of connection after connection; times rise for ever.

    The first picture of a connection is placed by its receipt, those after it by their own times.
    If these run more than 2 s away from the receipt, the clock is set anew: forward at once;
    back, pictures are left out until the time is there again.

    Args:
        received: whether pictures come in real time; False places them one after another by their own times.
    """

    def __init__(self, *, received: bool = True) -> None:
        self._received = received
        self._fresh = True
        self._offset = Fraction(0)
        self._pts = self._at = self._since = Fraction(0)
        self._early = Fraction(0)
        self._recent: deque[tuple[Fraction, Fraction]] = deque()
        self.end = Fraction(0)
        """When the last picture placed so far is gone."""

        self.waits = False
        """Whether pictures are left out, because the source's clock runs ahead, until the time is there again."""

        self.lead = 0.0
        """How many seconds before its time, by the receipt, the earliest picture of this connection came."""

    @property
    def accuracy_seconds(self) -> float:
        """How far a picture may lie from its true time: latency that nobody sees, and how late the first one came."""
        return LATENCY_SECONDS + self.lead if self._received else 0.0

    def connected(self) -> None:
        """What comes next belongs to a new connection."""
        self._fresh, self.waits = True, False

    def place(self, pts: Fraction, duration: Fraction, received: Fraction) -> Placed | None:
        """Where a picture lies; None if it has to be left out.

        Args:
            pts: its time by the source.
            duration: how long it stays; when it came is known when it has gone, so this is taken off.
            received: when it was here, on the one clock.
        """
        came = received - duration
        if self._fresh:
            self._fresh = False
            self._set(pts, came)
            return self._put(pts, duration, came)
        step, elapsed = pts - self._pts, max(came - self._at, _NONE)
        if step <= 0 and step > -TOLERANCE_SECONDS:
            return None
        late = came - (pts + self._offset)
        settling = came - self._since <= _SETTLE_SECONDS
        ahead = self._early - late > (_KEPT_SECONDS if settling else TOLERANCE_SECONDS)
        if step < 0 or (self._received and ahead and step - elapsed > TOLERANCE_SECONDS):
            before = pts + self._offset
            self._set(pts, came)
            return self._put(pts, duration, came, pts + self._offset - before)
        if not self._received:
            return self._put(pts, duration, came)
        if self.waits:
            self._pts, self._at = pts, came
            if came < self.end:
                return None
            self.waits = False
            self._set(pts, came)
            return self._put(pts, duration, came)
        if settling:
            self._early = min(self._early, late)
            self.lead = float(max(-self._early, _NONE))
        elif late < self._early - TOLERANCE_SECONDS:
            self.waits = True
            self._pts, self._at = pts, came
            return None
        lag = self._lag(late, came)
        if lag > TOLERANCE_SECONDS:
            self._offset += lag
            self._recent.clear()
            return self._put(pts, duration, came, lag)
        return self._put(pts, duration, came)

    def _lag(self, late: Fraction, came: Fraction) -> Fraction:
        """How much later than at first all pictures of the window came; 0 while it is not full."""
        self._recent.append((came, late))
        full = came - self._recent[0][0] >= _WINDOW_SECONDS
        if not full:
            return Fraction(0)
        lag = min(lateness for _, lateness in self._recent) - self._early
        while came - self._recent[0][0] >= _WINDOW_SECONDS:
            self._recent.popleft()
        return lag

    def _set(self, pts: Fraction, came: Fraction) -> None:
        """From now on times count from here: the receipt, but never before what was placed already."""
        self._offset = (max(came, self.end) if self._received else self.end) - pts
        self._since, self._early, self.lead = came, Fraction(0), 0.0
        self._recent.clear()

    def _put(self, pts: Fraction, duration: Fraction, came: Fraction, leap: Fraction | None = None) -> Placed:
        self._pts, self._at = pts, came
        placed = pts + self._offset
        self.end = max(self.end, placed + duration)
        return Placed(placed, leap)
