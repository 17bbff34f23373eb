"""Cameras that exist in memory only: their clock is the test's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import torch

from streamvid.errors import SourceError
from streamvid.frames import Frame
from streamvid.ingest.supervised import Gap, Notice

NOON = datetime(2026, 3, 4, 12, tzinfo=UTC)

Item = Frame | Gap | Notice | SourceError | threading.Event


def frame(at: float, *, side: int = 64, value: int | None = None) -> Frame:
    """A picture of one colour, which tells when it was taken."""
    shade = int(at * 7) % 256 if value is None else value
    return Frame(torch.full((side, side, 3), shade, dtype=torch.uint8), Fraction(at), Fraction(1, 2))


class FakeCamera:
    """What `Supervised` looks like to an engine; gives what it is told to, and waits at events."""

    def __init__(self, items: Sequence[Item], *, origin: datetime | None = None, name: str = "fake") -> None:
        self.items, self.name = items, name
        self.origin = origin if origin is not None else NOON
        self.open_gap: Gap | None = None
        self.connects = self.losses = self.frames = self.dropped = 0
        self.accuracy_seconds, self.frozen, self.black, self.live = 1.0, False, False, True
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            if self.closed.is_set():
                return
            if isinstance(item, SourceError):
                raise item
            if isinstance(item, threading.Event):
                while not item.wait(0.01):
                    if self.closed.is_set():
                        return
                continue
            yield item

    def close(self) -> None:
        self.closed.set()

    def join(self, seconds: float) -> bool:
        return True

    def wall(self, seconds: Fraction) -> datetime:
        return self.origin + timedelta(seconds=float(seconds))
