"""Files of a recording that go on one after another, read as one film."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from io import RawIOBase, UnsupportedOperation
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer

from streamvid.errors import SourceError
from streamvid.ingest.openers import Opener, open_container

_BOX = 8
"""Bytes of the length and kind that each part of an MP4 file begins with."""


@dataclass(frozen=True)
class RecordedOpener(Opener):
    """Files of one run, read as one film."""

    files: tuple[Path, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The first of them."""
        return self.files[0].name

    @property
    def where(self) -> str:  # type: ignore[override]
        """The first of them."""
        return str(self.files[0])

    def open(self) -> InputContainer:
        """All of them from the first key frame."""
        try:
            return open_container(Joined(self.files), protocols="none", hwaccel=None)
        except FileNotFoundError:
            raise SourceError(
                f"{self.name} was given up a moment ago; keep more: --record-keep, --record-disk"
            ) from None
        except (av.error.FFmpegError, ValueError, OSError):
            raise SourceError(f"{self.name} holds no whole picture; the span before or after it may") from None


class Joined(RawIOBase):
    """Fragmented MP4 files one after another, with the header of the first and without torn ends."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._parts: list[tuple[int, int, int]] = []
        self._starts: list[int] = []
        self._size = self._place = 0
        try:
            for k, path in enumerate(files):
                handle = os.open(path, os.O_RDONLY)
                self._parts.append((handle, 0, 0))
                head, end = _extent(handle)
                begin = head if k else 0
                self._parts[-1] = handle, begin, max(begin, end)
                self._starts.append(self._size)
                self._size += max(0, end - begin)
        except BaseException:
            self.close()
            raise

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where it stands."""
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        """As files do."""
        self._place = max(0, offset + (0, self._place, self._size)[whence])
        return self._place

    def read(self, size: int = -1) -> bytes:
        """What comes next, of one file at most."""
        if self._place >= self._size:
            return b""
        place = bisect_right(self._starts, self._place) - 1
        handle, begin, end = self._parts[place]
        offset = begin + self._place - self._starts[place]
        data = os.pread(handle, end - offset if size < 0 else min(size, end - offset), offset)
        self._place += len(data)
        return data

    def write(self, data: Any) -> int:
        """Never."""
        raise UnsupportedOperation("what was recorded is not changed")

    def close(self) -> None:
        """Let go of the files."""
        for handle, _, _ in self._parts:
            os.close(handle)
        self._parts = []
        super().close()


def _extent(handle: int) -> tuple[int, int]:
    """Where the first fragment of a file begins and the last whole one ends; both 0 if there is none."""
    size, place, head, end = os.fstat(handle).st_size, 0, 0, 0
    while place + _BOX <= size:
        box = os.pread(handle, 16, place)
        length, kind = int.from_bytes(box[:4]), box[4:8]
        if length == 1:
            length = int.from_bytes(box[8:])
        if length < _BOX or place + length > size:
            break
        head = place if kind == b"moof" and not head else head
        place += length
        end = place if kind == b"mdat" else end
    return head, end
