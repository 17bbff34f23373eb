"""Readers that crash, hang, fail or dawdle, for the process that decodes; loaded there by name."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from streamvid.errors import SourceError
from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
from streamvid.ingest.pulse import PULSE
from streamvid.ingest.reader import Reader, SourceInfo


class Numbered(Picture):
    def __init__(self, number: int) -> None:
        self.number, self.pts, self.duration = number, Fraction(number), Fraction(1)

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        height, width = size if size is not None else (4, 6)
        return np.full((height, width, 3), self.number, dtype=np.uint8)

    def grey(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        return np.full(size, self.number, dtype=np.uint8)


class HostilePictures(Pictures):
    def __init__(self, act: str, at: int, count: int) -> None:
        self.stats = DecodeStats()
        self._act, self._at, self._count, self._next = act, at, count, 0

    def __next__(self) -> Numbered:
        number = self._next
        if number == self._at:
            act(self._act)
        if number == self._count:
            raise StopIteration
        self._next += 1
        self.stats.decoded += 1
        PULSE.beat()
        return Numbered(number)

    def close(self) -> None:
        self._next = self._count


def act(what: str) -> None:
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "exit":
        os._exit(3)
    elif what == "fade":  # ends slowly: its pipes are gone, it is still there
        os.closerange(3, 1024)
        threading.Event().wait()
    elif what == "hang":
        threading.Event().wait()
    elif what == "refuse":
        raise SourceError("the tape is torn; mend it")
    elif what == "blunder":
        raise ZeroDivisionError("a mistake of ours")
    elif what == "dawdle":  # slow, but getting on
        for _ in range(12):
            time.sleep(0.3)
            PULSE.beat()


class HostileReader(Reader):
    def __init__(self, what: str, at: int, count: int = 6, *, opening: bool = False, live: bool = False) -> None:
        if opening:
            act(what)
        self._what, self._at, self._count = what, at, count
        self.info = SourceInfo(
            "/x", "x", "fake", "fake", 6, 4, Fraction(count), Fraction(0), Fraction(1), None, 0, "fake", live=live
        )

    def pictures(self, *, keys_only: bool = False) -> HostilePictures:
        return HostilePictures(self._what, self._at, self._count)


def pid(reader: Reader) -> int:
    return os.getpid()


def loaded(reader: Reader, module: str) -> bool:
    return module in sys.modules
