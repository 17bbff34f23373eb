"""Segment files of a source that is held for writing: what in them is alive, where new spans go, what goes.

Knows files and where spans lie in them; which spans are merged or forgotten is another's to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from streamvid.errors import BankError
from streamvid.memory.records import SourceRecord, SpanRecord
from streamvid.memory.segment_format import file_header
from streamvid.memory.segments import SegmentReader, SegmentWriter, segment_name
from streamvid.tokens import VideoTokens

if TYPE_CHECKING:
    from streamvid.memory.bank import Bank

MOVED_BYTES = 4 << 20
"""Bytes of live spans that are copied in one write."""

DEAD = 0.5
"""Share of a segment file that must be dead before what is alive is moved away and the file deleted."""

DEAD_URGENT = 0.125
"""The same when there is no other way to get room."""


class SourceFiles:
    """The segment files of one source, held for writing.

    Counts live bytes by file from an index of all its spans once, and keeps count from there on.  Files that a
    process did not live to delete are deleted.

    Args:
        bank: where the source is.
        source: which the caller holds for writing.
        segments: what it is written with; None: a new segment file is begun when something is written.
    """

    def __init__(self, bank: Bank, source: SourceRecord, segments: SegmentWriter | None) -> None:
        self.source = source
        self.segments = segments
        self._bank, self._catalog = bank, bank._catalog
        self._folder = bank.folder / source.folder
        self._live = self._catalog.live_bytes(source.id)
        self._lead = len(file_header(source.key))
        self._sizes = {path.name: path.stat().st_size for path in self._folder.glob("*.seg")}
        for name in self._sizes.keys() - self._live.keys():
            if name != self._current:
                (self._folder / name).unlink()
                del self._sizes[name]
        if self.num_bytes != source.num_bytes:
            self._catalog.set_bytes(source.id, self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Size of its segment files."""
        return sum(self._sizes.values())

    @property
    def _current(self) -> str | None:
        return None if self.segments is None else self.segments._name

    def close(self) -> None:
        """Close the segment file, and delete it if it was begun and not written to."""
        if self.segments is not None:
            self.segments.close()
            if self._current not in self._sizes:
                (self._folder / str(self._current)).unlink(missing_ok=True)

    def reclaim(self, dead: float) -> None:
        """Delete segment files without live spans, and empty those of which more than a share is dead.

        While more than an eighth of the source is dead, an eighth of a file is enough, the deadest first.
        """
        gone, num_bytes = sum(map(self._dead, self._sizes)), self.num_bytes
        for name in sorted(self._sizes, key=self._dead, reverse=True):
            # More than an eighth dead in all is too much: spans would be merged though there is room.
            share = dead if 8 * gone <= num_bytes else DEAD_URGENT
            live = self._live.get(name, 0)
            if self._dead(name) <= share * self._sizes[name]:
                continue
            if name == self._current:
                self._roll()
            if live:
                self._move(name)
            (self._folder / name).unlink()
            del self._sizes[name]
            self._live.pop(name, None)
            gone, num_bytes = sum(map(self._dead, self._sizes)), self.num_bytes
            self._catalog.set_bytes(self.source.id, num_bytes)

    def _dead(self, name: str) -> int:
        return self._sizes[name] - self._lead - self._live.get(name, 0)

    def _read(self, spans: Sequence[SpanRecord]) -> list[VideoTokens]:
        found = []
        reader: SegmentReader | None = None
        try:
            for span in spans:
                path = self._folder / span.file
                if reader is None or reader.path != path:
                    if reader is not None:
                        reader.close()
                    reader = SegmentReader(path, key=self.source.key, codecs=self._bank.codecs)
                found.append(reader.read(span.offset))
        finally:
            if reader is not None:
                reader.close()
        return found

    def _move(self, name: str) -> None:
        """Copy the live spans of a file, as they are, to the end of what is written."""
        spans = self._catalog.in_file(self.source.id, name)
        with open(self._folder / name, "rb") as file:
            while spans:
                sizes = itertools.accumulate(num_bytes for _, _, num_bytes in spans)
                count = max(1, sum(1 for _ in itertools.takewhile(lambda size: size <= MOVED_BYTES, sizes)))
                self._copy(file, spans[:count])
                spans = spans[count:]

    def _copy(self, file: BinaryIO, spans: Sequence[tuple[int, int, int]]) -> None:
        data, places, end = [], [], 0
        for span_id, offset, num_bytes in spans:
            file.seek(offset)
            data.append(file.read(num_bytes))
            if len(data[-1]) != num_bytes:
                raise BankError(
                    f"{file.name} ends before its last span; run: streamvid memory repair --memory {self._bank.folder}"
                )
            places.append((span_id, end))
            end += num_bytes
        self._append(
            b"".join(data),
            lambda name, offset, cost: self._catalog.move_spans(
                self.source.id, [(i, offset + at) for i, at in places], file=name, disk_bytes=cost
            ),
        )

    def _append(self, data: bytes, enter: Callable[[str, int, int], None]) -> None:
        """Write bytes, then have them entered under their file, offset and cost; taken back if that fails."""
        if self.segments is None:
            self._roll()
        assert self.segments is not None
        cost = self.segments.cost(data)
        file, offset = self.segments.append(data)
        try:
            enter(file, offset, cost)
        except Exception:  # not KeyboardInterrupt: it may come just after the commit, and the span is in then
            self.segments.undo()
            raise
        self._wrote(file, len(data), cost)

    def _roll(self) -> None:
        """Begin a new segment file, so that no other is being written."""
        last = max([*self._sizes, *([self._current] if self._current else [])], default="")
        name = segment_name(int(Path(last).stem) + 1 if last else 0)
        self.close()
        self.segments = SegmentWriter(
            self._folder, key=self.source.key, segment_bytes=self._bank._segment_bytes, last=(name, 0)
        )

    def _wrote(self, file: str, num_bytes: int, disk_bytes: int) -> None:
        self._sizes[file] = self._sizes.get(file, 0) + disk_bytes
        self._live[file] = self._live.get(file, 0) + num_bytes
