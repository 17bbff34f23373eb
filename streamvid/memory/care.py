"""What looking after a memory folder speaks of: problems, what was done about them, and files in its folders."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from streamvid.errors import BankError
from streamvid.memory.records import SourceRecord, SpanRecord
from streamvid.memory.seals import Broken
from streamvid.memory.segment_format import file_header

LISTED = 1000
"""Problems that are listed; more are counted."""

BLOCK_BYTES = 1 << 20

BROKEN = "broken"
"""Folder in the memory folder for what a repair set aside; it may be deleted."""

INCOMING = "incoming"
"""Folder in the memory folder for a source that is not all there yet."""

UNREADABLE = (ValueError, TypeError, ZeroDivisionError, sqlite3.Error)
"""What reading damaged rows may raise besides our own errors."""

Progress = Callable[[int, int], None]
"""Told bytes read so far and bytes in all."""


class Kind(StrEnum):
    """What is not as written."""

    CATALOGUE = "catalogue"
    """The catalogue as a whole: mended by building it anew from the segments."""

    ROW = "row"
    """What the catalogue says of a span: mended from the span."""

    TEXT = "text"
    """What nothing but the catalogue says: kept as it is, as only a copy of the catalogue could mend it."""

    TALLY = "tally"
    """Counts of a source: mended by counting."""

    HEADER = "header"
    """Start of a segment file: mended from the catalogue."""

    SPAN = "span"
    """Tokens: lost."""

    KEYS = "keys"
    """The copy of the retrieval keys in the segment: mended from the catalogue."""

    LOOSE = "loose"
    """Bytes of no span: mended by writing the file anew without them."""

    CODEBOOK = "codebook"
    """What spans were encoded with: only a copy of the file mends it."""

    SPARE = "spare"
    """What can be made anew: removed."""

    NEWER = "newer"
    """Whole, but in a format this streamvid does not know: left alone."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was written."""

    kind: Kind
    text: str
    source_id: int | None = None
    file: str = ""
    """Relative to the memory folder; empty where it is the catalogue."""

    offset: int | None = None
    span: SpanRecord | None = None
    intact: int = 0
    """Of the tokens of a damaged span: how many of the best are as written."""

    row: Broken | None = None
    """The row that does not fit its seal."""


@dataclass(slots=True)
class Repaired:
    """What a repair did, or would do."""

    done: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """What is not remembered any more."""

    lost_spans: int = 0
    doubtful: list[str] = field(default_factory=list)
    """What is not as it was written, is told by nothing else, and was kept as it is."""

    left: list[str] = field(default_factory=list)
    """What could not be mended."""

    def lose(self, text: str) -> None:
        """Say what is lost, while the list is short."""
        if len(self.lost) < LISTED:
            self.lost.append(text)

    def doubt(self, text: str) -> None:
        """Say what may be wrong, while the list is short."""
        if len(self.doubtful) < LISTED:
            self.doubtful.append(text)


def blocks(fd: int, offset: int, count: int) -> Iterator[bytes]:
    """A range of a file, at most 1 MiB at a time.

    Raises:
        BankError: if the file ends before.
    """
    while count:
        data = os.pread(fd, min(count, BLOCK_BYTES), offset)
        if not data:
            raise BankError("a segment file ended before its last span; run: streamvid memory repair")
        yield data
        offset, count = offset + len(data), count - len(data)


def segment_files(folder: Path) -> dict[str, int]:
    """Sizes by name, in order."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.seg"))}


def start_bytes(path: Path, source: SourceRecord) -> bytes:
    """As much of a file as its header should have."""
    with open(path, "rb") as file:
        return file.read(len(file_header(source.key)))


def times(span: SpanRecord) -> str:
    """For people."""
    return f"{float(span.start):.3f}-{float(span.stop):.3f} s"
