"""The catalogue: what is remembered and where, in SQLite.

It is the truth about a memory folder: a span that is not in it does not exist, and an index is rebuilt
from it.  Knows rows; reads no segment and no video.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.database import now
from streamvid.memory.history import History
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import (
    Load,
    MergedSpan,
    SourceRecord,
    SpanRecord,
    State,
    key_vectors,
    source_record,
    span_record,
)
from streamvid.memory.seals import seal_keys

ENTRIES = 256
"""Spans whose keys are in memory at once while a source is looked through."""


class Catalog(History):
    """The catalogue of one memory folder: one connection, for one thread of one process.

    Other processes read while one writes (write-ahead log); a writer waits up to 30 s for another.
    A commit is on the disk when it returns.  Opened, and failing, as `Database`.
    """

    def source(self, digest: str) -> SourceRecord | None:
        """The source with this key digest, if there is one."""
        rows = self._rows("SELECT * FROM sources WHERE digest = ?", digest)
        return source_record(rows[0]) if rows else None

    def sources(self) -> list[SourceRecord]:
        """All sources, oldest first."""
        return [source_record(row) for row in self._rows("SELECT * FROM sources ORDER BY id")]

    def add_source(self, key: MemoryKey, *, path: str, name: str) -> SourceRecord:
        """Enter a new, open source without spans."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO sources (digest, key, path, name, created, state) VALUES (?, ?, ?, ?, ?, ?)",
                (key.digest, key.to_json(), path, name, now(), State.OPEN.value),
            )
        source = self.source(key.digest)
        assert source is not None
        return source

    def finish_source(self, source_id: int, *, summary: Mapping[str, Any], duration: Fraction | None) -> None:
        """Mark a source complete; what was said of it before stays where ``summary`` does not say otherwise."""
        with self.transaction():
            self._say(source_id, summary)
            self._db.execute(
                "UPDATE sources SET state = ?, duration = ? WHERE id = ?",
                (State.COMPLETE.value, None if duration is None else str(duration), source_id),
            )

    def describe_source(self, source_id: int, summary: Mapping[str, Any]) -> None:
        """Put values into the summary of a source, in place of those of the same names."""
        with self.transaction():
            self._say(source_id, summary)

    def _say(self, source_id: int, summary: Mapping[str, Any]) -> None:
        row = self._db.execute("SELECT summary FROM sources WHERE id = ?", (source_id,)).fetchone()
        if row is not None:
            told = {**json.loads(row["summary"]), **summary}
            self._db.execute(
                "UPDATE sources SET summary = ? WHERE id = ?", (json.dumps(told, sort_keys=True), source_id)
            )

    def remove_source(self, source_id: int) -> None:
        """Remove a source with its spans, keys and answers."""
        with self.transaction():
            self._db.execute("DELETE FROM sources WHERE id = ?", (source_id,))

    def segment_bytes(self) -> int:
        """Size of all segment files, as far as they are in the catalogue."""
        return int(self._rows("SELECT COALESCE(SUM(bytes), 0) AS total FROM sources")[0]["total"])

    def add_span(
        self,
        source_id: int,
        *,
        start: Fraction,
        stop: Fraction,
        tokens: int,
        file: str,
        offset: int,
        num_bytes: int,
        disk_bytes: int,
        grid: tuple[int, int, int],
        codec: str,
        keys: Tensor,
    ) -> None:
        """Enter a span that is safely on the disk, after the last one of its source.

        Args:
            source_id: of an open source.
            start: seconds, exact.
            stop: seconds, exact; the span covers ``[start, stop)``.
            tokens: how many it has.
            file: name of its segment file.
            offset: where it begins there.
            num_bytes: its size.
            disk_bytes: what it added to the disk: its size, and a file header where it is the first.
            grid: (T, H, W) before any reduction.
            codec: what its features are stored as.
            keys: (K, Dk) float32, unit length.
        """
        vectors = keys.numpy().astype("<f4").tobytes()
        with self.transaction():
            cursor = self._db.execute(
                "INSERT INTO spans (source_id, ordinal, start, stop, start_seconds, stop_seconds, tokens, file, "
                "offset, bytes, grid, codec, keys_seal) "
                "SELECT id, (SELECT COALESCE(MAX(ordinal) + 1, 0) FROM spans WHERE source_id = sources.id), "
                "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM sources WHERE id = ?",
                (
                    str(start),
                    str(stop),
                    float(start),
                    float(stop),
                    tokens,
                    file,
                    offset,
                    num_bytes,
                    json.dumps(grid),
                    codec,
                    seal_keys(keys.shape[1], vectors),
                    source_id,
                ),
            )
            if cursor.rowcount != 1:
                raise BankError(
                    f"source {source_id} is no longer in {self.path}: it was removed meanwhile; start again"
                )
            self._db.execute(
                "INSERT INTO keys (span_id, width, vectors) VALUES (?, ?, ?)",
                (cursor.lastrowid, keys.shape[1], vectors),
            )
            self._db.execute(
                "UPDATE sources SET spans = spans + 1, tokens = tokens + ?, bytes = bytes + ?, stop = ? WHERE id = ?",
                (tokens, disk_bytes, str(stop), source_id),
            )

    def spans(self, source_id: int, *, ends: int | None = None) -> list[SpanRecord]:
        """The spans of a source in time order; with ``ends`` only so many oldest and newest."""
        return [span_record(row) for row in self._ends("spans", source_id, ends, order="ordinal")]

    def each_span(self, source_id: int) -> Iterator[SpanRecord]:
        """The spans of a source in time order, one in memory at a time."""
        with self._reported():
            for row in self._db.execute("SELECT * FROM spans WHERE source_id = ? ORDER BY ordinal", (source_id,)):
                yield span_record(row)

    def span(self, span_id: int) -> SpanRecord | None:
        """One span; None if there is no such any more."""
        rows = self._rows("SELECT * FROM spans WHERE id = ?", span_id)
        return span_record(rows[0]) if rows else None

    def source_ids(self) -> list[int]:
        """The ids of all sources, oldest first."""
        return [row["id"] for row in self._rows("SELECT id FROM sources ORDER BY id")]

    def source_by_id(self, source_id: int) -> SourceRecord | None:
        """One source; None if there is no such any more."""
        rows = self._rows("SELECT * FROM sources WHERE id = ?", source_id)
        return source_record(rows[0]) if rows else None

    def span_ids(self, source_id: int, *, by_place: bool = False) -> array[int]:
        """The ids of a source's spans, 8 bytes each: in time order, or as they lie in the files."""
        order = "file, offset" if by_place else "ordinal"
        with self._reported():
            rows = self._db.execute(f"SELECT id FROM spans WHERE source_id = ? ORDER BY {order}", (source_id,))
            return array("q", (row["id"] for row in rows))

    def entries(self, span_ids: Sequence[int]) -> Iterator[tuple[SpanRecord, Tensor]]:
        """Spans with their keys, (K, Dk) float32, in the order asked; those that are gone are left out."""
        for first in range(0, len(span_ids), ENTRIES):
            ids = span_ids[first : first + ENTRIES]
            rows = self._rows(
                "SELECT spans.*, keys.width, keys.vectors FROM spans LEFT JOIN keys ON keys.span_id = spans.id "
                f"WHERE spans.id IN ({','.join('?' * len(ids))})",
                *ids,
            )
            found = {row["id"]: row for row in rows}
            for row in (found[i] for i in ids if i in found):
                yield span_record(row), key_vectors(row["width"], row["vectors"])

    def span_columns(self, source_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All spans of a source in time order, as four columns (S,) however many they are.

        Returns:
            ids int64, start and stop in seconds float64, tokens int64.
        """
        with self._reported():
            rows = self._db.execute(
                "SELECT id, tokens, start_seconds, stop_seconds FROM spans WHERE source_id = ? ORDER BY ordinal",
                (source_id,),
            )
            rows.row_factory = None
            table = np.fromiter(rows, np.dtype([("id", "i8"), ("tokens", "i8"), ("start", "f8"), ("stop", "f8")]))
        id_, tokens, start, stop = (torch.from_numpy(table[name].copy()) for name in ("id", "tokens", "start", "stop"))
        return id_, start, stop, tokens

    def loads(self) -> list[Load]:
        """What each source weighs, oldest first."""
        rows = self._rows(
            "SELECT id, bytes, spans, pinned, stop, "
            "(SELECT MIN(start_seconds) FROM spans WHERE source_id = sources.id) AS first FROM sources ORDER BY id"
        )
        return [
            Load(
                source_id=row["id"],
                num_bytes=row["bytes"],
                spans=row["spans"],
                pinned=bool(row["pinned"]),
                seconds=0.0 if row["first"] is None else float(Fraction(row["stop"])) - row["first"],
            )
            for row in rows
        ]

    def pinned(self, source_id: int) -> bool:
        """Whether a source is kept when space is made."""
        rows = self._rows("SELECT pinned FROM sources WHERE id = ?", source_id)
        return bool(rows and rows[0]["pinned"])

    def level_counts(self, source_id: int) -> dict[int, int]:
        """How many spans of each level a source has; walks over an index of all its spans."""
        rows = self._rows("SELECT level, COUNT(*) AS count FROM spans WHERE source_id = ? GROUP BY level", source_id)
        return {row["level"]: row["count"] for row in rows}

    def live_bytes(self, source_id: int) -> dict[str, int]:
        """By segment file, bytes of the spans that are in the catalogue; walks over an index of them all."""
        rows = self._rows("SELECT file, SUM(bytes) AS live FROM spans WHERE source_id = ? GROUP BY file", source_id)
        return {row["file"]: row["live"] for row in rows}

    def last_place(self, source_id: int) -> tuple[str, int] | None:
        """The last segment file of a source and where its last span ends there; None if nothing is stored."""
        rows = self._rows(
            "SELECT file, offset + bytes AS stop FROM spans WHERE source_id = ? "
            "ORDER BY file DESC, offset DESC LIMIT 1",
            source_id,
        )
        return (rows[0]["file"], rows[0]["stop"]) if rows else None

    def oldest(self, source_id: int, count: int, *, level: int = -1) -> list[tuple[SpanRecord, Tensor]]:
        """The first spans of a source in time with their keys, (K, Dk) float32.

        Args:
            source_id: of the source.
            count: how many at most.
            level: begin with the first span of this level; -1: with the first of all.
        """
        first = 0
        if level >= 0:
            found = self._rows(
                "SELECT MIN(ordinal) AS first FROM spans WHERE source_id = ? AND level = ?", source_id, level
            )[0]["first"]
            if found is None:
                return []
            first = found
        rows = self._rows(
            "SELECT spans.*, keys.width, keys.vectors FROM spans LEFT JOIN keys ON keys.span_id = spans.id "
            "WHERE source_id = ? AND ordinal >= ? ORDER BY ordinal LIMIT ?",
            source_id,
            first,
            count,
        )
        return [(span_record(row), key_vectors(row["width"], row["vectors"])) for row in rows]

    def in_file(self, source_id: int, file: str) -> list[tuple[int, int, int]]:
        """Id, offset and size of the spans in a segment file, as they lie there."""
        rows = self._rows(
            "SELECT id, offset, bytes FROM spans WHERE source_id = ? AND file = ? ORDER BY offset", source_id, file
        )
        return [(row["id"], row["offset"], row["bytes"]) for row in rows]

    def merge_spans(self, source_id: int, merged: Sequence[MergedSpan], *, disk_bytes: int) -> None:
        """Put merged spans, which are safely on the disk, in place of what they are made of; all or none.

        Args:
            source_id: of the source, which the caller holds for writing.
            merged: the new spans.
            disk_bytes: what writing them added to the disk.
        """
        with self.transaction():
            for span in merged:
                marks = ",".join("?" * len(span.replaced))
                vectors = span.keys.numpy().astype("<f4").tobytes()
                told = self._db.execute(
                    f"SELECT COUNT(*), MIN(ordinal), SUM(tokens) FROM spans WHERE source_id = ? AND id IN ({marks})",
                    (source_id, *span.replaced),
                ).fetchone()
                if told[0] != len(span.replaced):
                    raise BankError(
                        f"source {source_id} changed while room was made in {self.path}; run the same again"
                    )
                self._db.execute(f"DELETE FROM spans WHERE id IN ({marks})", span.replaced)
                cursor = self._db.execute(
                    "INSERT INTO spans (source_id, ordinal, start, stop, start_seconds, stop_seconds, tokens, file, "
                    "offset, bytes, grid, codec, level, keys_seal) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        source_id,
                        told[1],
                        str(span.start),
                        str(span.stop),
                        float(span.start),
                        float(span.stop),
                        span.tokens,
                        span.file,
                        span.offset,
                        span.num_bytes,
                        json.dumps(span.grid),
                        span.codec,
                        span.level,
                        seal_keys(span.keys.shape[1], vectors),
                    ),
                )
                self._db.execute(
                    "INSERT INTO keys (span_id, width, vectors) VALUES (?, ?, ?)",
                    (cursor.lastrowid, span.keys.shape[1], vectors),
                )
                self._db.execute(
                    "UPDATE sources SET spans = spans - ?, tokens = tokens - ? WHERE id = ?",
                    (told[0] - 1, told[2] - span.tokens, source_id),
                )
            self._db.execute("UPDATE sources SET bytes = bytes + ? WHERE id = ?", (disk_bytes, source_id))

    def expire_spans(self, source_id: int, spans: Sequence[SpanRecord], *, reason: str) -> None:
        """Forget spans, the oldest of their source, and say so in the table of what was expired.

        What is expired for one reason, one after the other, is one row there.
        """
        tokens = sum(span.tokens for span in spans)
        stop = max(span.stop for span in spans)
        with self.transaction():
            self._db.execute(f"DELETE FROM spans WHERE id IN ({','.join('?' * len(spans))})", [s.id for s in spans])
            self._db.execute(
                "UPDATE sources SET spans = spans - ?, tokens = tokens - ? WHERE id = ?",
                (len(spans), tokens, source_id),
            )
            last = self._db.execute(
                "SELECT id, stop, reason FROM expired WHERE source_id = ? ORDER BY id DESC LIMIT 1", (source_id,)
            ).fetchone()
            if last is not None and last["reason"] == reason and Fraction(last["stop"]) <= stop:
                self._db.execute(
                    "UPDATE expired SET stop = ?, spans = spans + ?, tokens = tokens + ?, created = ? WHERE id = ?",
                    (str(stop), len(spans), tokens, now(), last["id"]),
                )
            else:
                self._db.execute(
                    "INSERT INTO expired (source_id, start, stop, spans, tokens, reason, created) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (source_id, str(spans[0].start), str(stop), len(spans), tokens, reason, now()),
                )

    def move_spans(self, source_id: int, places: Sequence[tuple[int, int]], *, file: str, disk_bytes: int) -> None:
        """Say where copies of spans are that are safely on the disk.

        Args:
            source_id: of the source.
            places: id and new offset of each.
            file: name of the segment file they are in now.
            disk_bytes: what the copies added to the disk.
        """
        with self.transaction():
            self._db.executemany(
                "UPDATE spans SET file = ?, offset = ? WHERE id = ? AND source_id = ?",
                [(file, offset, span_id, source_id) for span_id, offset in places],
            )
            self._db.execute("UPDATE sources SET bytes = bytes + ? WHERE id = ?", (disk_bytes, source_id))

    def set_bytes(self, source_id: int, num_bytes: int) -> None:
        """Say what the segment files of a source hold."""
        with self.transaction():
            self._db.execute("UPDATE sources SET bytes = ? WHERE id = ?", (num_bytes, source_id))

    def last_span(self, source_id: int) -> SpanRecord | None:
        """The last span of a source, if it has any."""
        rows = self._rows("SELECT * FROM spans WHERE source_id = ? ORDER BY ordinal DESC LIMIT 1", source_id)
        return span_record(rows[0]) if rows else None

    def keys(self, source_id: int) -> list[Tensor]:
        """Per span in time order: (K, Dk) float32, unit length."""
        rows = self._rows(
            "SELECT keys.width, keys.vectors FROM spans JOIN keys ON keys.span_id = spans.id "
            "WHERE spans.source_id = ? ORDER BY spans.ordinal",
            source_id,
        )
        return [key_vectors(row["width"], row["vectors"]) for row in rows]

    def set_pinned(self, source_id: int, pinned: bool) -> None:
        """Keep a source when space is made, or no longer."""
        with self.transaction():
            self._db.execute("UPDATE sources SET pinned = ? WHERE id = ?", (int(pinned), source_id))
