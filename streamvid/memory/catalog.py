"""The catalogue: what is remembered and where, in SQLite.

It is the truth about a memory folder: a span that is not in it does not exist, and an index is rebuilt
from it.  Knows rows; reads no segment and no video.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.keys import MemoryKey

FILE_NAME = "catalog.sqlite3"

APPLICATION_ID = 0x53764D42
"""Marks the SQLite file as ours ("SvMB"), so that a foreign one is refused."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE sources (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            digest TEXT NOT NULL UNIQUE,
            key TEXT NOT NULL,
            path TEXT NOT NULL,
            name TEXT NOT NULL,
            created TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('open', 'complete')),
            duration TEXT,
            summary TEXT NOT NULL DEFAULT '{}',
            spans INTEGER NOT NULL DEFAULT 0,
            tokens INTEGER NOT NULL DEFAULT 0,
            bytes INTEGER NOT NULL DEFAULT 0,
            stop TEXT
        )""",
        """CREATE TABLE spans (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            source_id INTEGER NOT NULL REFERENCES sources (id) ON DELETE CASCADE,
            ordinal INTEGER NOT NULL,
            start TEXT NOT NULL,
            stop TEXT NOT NULL,
            start_seconds REAL NOT NULL,
            stop_seconds REAL NOT NULL,
            tokens INTEGER NOT NULL,
            file TEXT NOT NULL,
            offset INTEGER NOT NULL,
            bytes INTEGER NOT NULL,
            grid TEXT NOT NULL,
            codec TEXT NOT NULL,
            UNIQUE (source_id, ordinal)
        )""",
        "CREATE INDEX spans_by_time ON spans (source_id, start_seconds)",
        # Apart from the spans, so that listing a million spans does not walk over their keys.
        """CREATE TABLE keys (
            span_id INTEGER PRIMARY KEY REFERENCES spans (id) ON DELETE CASCADE,
            width INTEGER NOT NULL,
            vectors BLOB NOT NULL
        )""",
        """CREATE TABLE answers (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            source_id INTEGER NOT NULL REFERENCES sources (id) ON DELETE CASCADE,
            question TEXT NOT NULL,
            answer TEXT NOT NULL,
            receipt TEXT NOT NULL,
            created TEXT NOT NULL
        )""",
        "CREATE INDEX answers_by_source ON answers (source_id)",
        """CREATE TABLE digests (
            path TEXT PRIMARY KEY,
            stamp TEXT NOT NULL,
            digest TEXT NOT NULL
        )""",
    ),
    (
        # 0 is as watched; each merging with neighbours adds one.
        "ALTER TABLE spans ADD COLUMN level INTEGER NOT NULL DEFAULT 0",
        # Kept when space is made.
        "ALTER TABLE sources ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE gaps (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            source_id INTEGER NOT NULL REFERENCES sources (id) ON DELETE CASCADE,
            start TEXT NOT NULL,
            stop TEXT NOT NULL,
            reason TEXT NOT NULL,
            created TEXT NOT NULL
        )""",
        "CREATE INDEX gaps_by_source ON gaps (source_id)",
        # What was remembered once and is not any more, so that an answer can say so.
        """CREATE TABLE expired (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            source_id INTEGER NOT NULL REFERENCES sources (id) ON DELETE CASCADE,
            start TEXT NOT NULL,
            stop TEXT NOT NULL,
            spans INTEGER NOT NULL,
            tokens INTEGER NOT NULL,
            reason TEXT NOT NULL,
            created TEXT NOT NULL
        )""",
        "CREATE INDEX expired_by_source ON expired (source_id)",
        # Saved indexes; each holds the keys of all spans of its scope up to last_span_id.
        """CREATE TABLE snapshots (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            source_id INTEGER REFERENCES sources (id) ON DELETE CASCADE,
            embedder TEXT NOT NULL,
            kind TEXT NOT NULL,
            width INTEGER NOT NULL,
            vectors INTEGER NOT NULL,
            last_span_id INTEGER NOT NULL,
            file TEXT NOT NULL,
            bytes INTEGER NOT NULL,
            digest TEXT NOT NULL,
            created TEXT NOT NULL
        )""",
    ),
    (
        # Making room asks for the oldest spans of a level and for what is still alive in a file.
        "CREATE INDEX spans_by_level ON spans (source_id, level, ordinal)",
        "CREATE INDEX spans_by_place ON spans (source_id, file, offset, bytes)",
    ),
)
"""Statements that lead from each schema version to the next; a released entry is never edited."""

BUSY_SECONDS = 30.0

LOG_PAGES = 100
"""Pages of 4 KiB at which the log is folded into the file; bounds what a fold can add to the disk."""

ENTRIES = 256
"""Spans whose keys are in memory at once while a source is looked through."""

COPY_TRIES = 5
"""How often a catalogue that is being written elsewhere is copied before giving up."""

COMMIT_BYTES = 64 << 10
"""What entering one span may add to the log besides its keys: about ten pages, more when an index splits."""


class NewerCatalogError(BankError):
    """The catalogue was written by a newer streamvid; it was left as it is."""


class State(StrEnum):
    """Whether a source is still being watched."""

    OPEN = "open"
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One remembered source."""

    id: int
    """Never used again after the source is removed."""

    key: MemoryKey
    path: str
    """Where the video was; for people, never used to find memory."""

    name: str
    created: datetime
    state: State
    duration: Fraction | None
    """Of the video in seconds; None until it is complete."""

    summary: Mapping[str, Any]
    """What ``finish`` was given."""

    spans: int
    tokens: int
    num_bytes: int
    """Of its segment files."""

    stop: Fraction | None
    """Seconds, exact: where the last stored span ends and an interrupted ingest goes on; None if nothing is stored."""

    pinned: bool
    """Kept when space is made."""

    @property
    def folder(self) -> str:
        """Of its segment files, relative to the memory folder."""
        return f"segments/{self.key.short}-{self.id}"


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One remembered span."""

    id: int
    source_id: int
    ordinal: int
    """Rises in time order within the source; merged spans leave gaps."""

    start: Fraction
    """Seconds, exact; the span covers ``[start, stop)``."""

    stop: Fraction
    tokens: int
    file: str
    """Name of the segment file in the source's folder."""

    offset: int
    num_bytes: int
    grid: tuple[int, int, int]
    codec: str
    """What its features are stored as."""

    level: int
    """How many times it was merged with its neighbours to save space; 0 is as watched."""


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One answer that was given from memory."""

    id: int
    source_id: int
    question: str
    answer: str
    receipt: Mapping[str, Any]
    created: datetime


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One saved index."""

    source_id: int | None
    """Whose keys it holds; None: those of every source of this embedder."""

    embedder: str
    """Fingerprint of what made the keys."""

    kind: str
    width: int
    """Length of a key."""

    vectors: int
    """How many keys it holds."""

    last_span_id: int
    """It holds the keys of all spans of its scope up to this one, as they were when it was saved."""

    file: str
    """Name in the folder of saved indexes."""

    num_bytes: int
    digest: str
    """sha256 of the file."""


@dataclass(frozen=True, slots=True)
class GapRecord:
    """A stretch of a source of which nothing was seen."""

    source_id: int
    start: Fraction
    """Seconds, exact; the gap covers ``[start, stop)``."""

    stop: Fraction
    reason: str
    created: datetime


@dataclass(frozen=True, slots=True)
class ExpiredRecord:
    """A stretch of a source that was remembered once and is not any more."""

    source_id: int
    start: Fraction
    """Seconds, exact; what is gone lay within ``[start, stop)``."""

    stop: Fraction
    spans: int
    tokens: int
    reason: str
    created: datetime


@dataclass(frozen=True, slots=True)
class MergedSpan:
    """A span on the disk that is to stand for some neighbouring ones."""

    replaced: tuple[int, ...]
    """Ids of the spans it is made of, in time order; it takes the place of the first."""

    start: Fraction
    stop: Fraction
    tokens: int
    file: str
    offset: int
    num_bytes: int
    grid: tuple[int, int, int]
    codec: str
    level: int
    keys: Tensor
    """(K, Dk) float32, unit length."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a source weighs when room is needed."""

    source_id: int
    num_bytes: int
    spans: int
    pinned: bool
    seconds: float
    """From the start of its first span to the stop of its last."""

    @property
    def bytes_per_hour(self) -> float:
        """Of what is remembered of it; the source with most makes room first."""
        return self.num_bytes / max(self.seconds, 1e-3) * 3600


class Catalog:
    """The catalogue of one memory folder: one connection, for one thread of one process.

    Other processes read while one writes (write-ahead log); a writer waits up to 30 s for another.
    A commit is on the disk when it returns.

    Args:
        path: the SQLite file; made if missing, unless ``read_only``.
        read_only: change nothing in it, not even its format.  Where the folder cannot be written and a log
            lies beside the file that cannot be read in place, or the format is older, a private copy is
            read; ``note`` says so.  On such a folder a writer elsewhere is not noticed.

    Raises:
        BankError: if the file is not a catalogue, is damaged, is from a newer version (it is then left
            exactly as it is), or cannot be read or written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.note = ""
        """What the user should hear about how it was opened; empty if nothing."""
        self._private: tempfile.TemporaryDirectory[str] | None = None
        refuse_foreign(path)
        if read_only:
            self._open_reading()
            return
        with self._reported():
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            with self._reported():
                self._check()
                self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # does nothing once there are tables
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
                self._db.execute("PRAGMA foreign_keys = ON")
                self._migrate()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the last one to close folds the log into the file."""
        with self._reported():
            self._db.close()
        if self._private is not None:
            self._private.cleanup()

    def source(self, digest: str) -> SourceRecord | None:
        """The source with this key digest, if there is one."""
        rows = self._rows("SELECT * FROM sources WHERE digest = ?", digest)
        return _source(rows[0]) if rows else None

    def sources(self) -> list[SourceRecord]:
        """All sources, oldest first."""
        return [_source(row) for row in self._rows("SELECT * FROM sources ORDER BY id")]

    def add_source(self, key: MemoryKey, *, path: str, name: str) -> SourceRecord:
        """Enter a new, open source without spans."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO sources (digest, key, path, name, created, state) VALUES (?, ?, ?, ?, ?, ?)",
                (key.digest, key.to_json(), path, name, _now(), State.OPEN.value),
            )
        source = self.source(key.digest)
        assert source is not None
        return source

    def finish_source(self, source_id: int, *, summary: Mapping[str, Any], duration: Fraction | None) -> None:
        """Mark a source complete."""
        with self.transaction():
            self._db.execute(
                "UPDATE sources SET state = ?, summary = ?, duration = ? WHERE id = ?",
                (
                    State.COMPLETE.value,
                    json.dumps(summary, sort_keys=True),
                    None if duration is None else str(duration),
                    source_id,
                ),
            )

    def remove_source(self, source_id: int) -> None:
        """Remove a source with its spans, keys and answers."""
        with self.transaction():
            self._db.execute("DELETE FROM sources WHERE id = ?", (source_id,))

    def segment_bytes(self) -> int:
        """Size of all segment files, as far as they are in the catalogue."""
        return int(self._rows("SELECT COALESCE(SUM(bytes), 0) AS total FROM sources")[0]["total"])

    def own_bytes(self) -> int:
        """Size of the catalogue with its log."""
        return sum(self._size(suffix) for suffix in ("", "-wal", "-shm"))

    def growth_bytes(self, keys: Tensor) -> int:
        """The most that entering one more span with these keys can add to `own_bytes`."""
        return self._size("-wal") + COMMIT_BYTES + 2 * 4 * keys.numel()

    def _size(self, suffix: str) -> int:
        try:
            return os.stat(f"{self.path}{suffix}").st_size
        except FileNotFoundError:
            return 0

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
        with self.transaction():
            cursor = self._db.execute(
                "INSERT INTO spans (source_id, ordinal, start, stop, start_seconds, stop_seconds, tokens, file, "
                "offset, bytes, grid, codec) "
                "SELECT id, (SELECT COALESCE(MAX(ordinal) + 1, 0) FROM spans WHERE source_id = sources.id), "
                "?, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM sources WHERE id = ?",
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
                    source_id,
                ),
            )
            if cursor.rowcount != 1:
                raise BankError(
                    f"source {source_id} is no longer in {self.path}: it was removed meanwhile; start again"
                )
            self._db.execute(
                "INSERT INTO keys (span_id, width, vectors) VALUES (?, ?, ?)",
                (cursor.lastrowid, keys.shape[1], keys.numpy().astype("<f4").tobytes()),
            )
            self._db.execute(
                "UPDATE sources SET spans = spans + 1, tokens = tokens + ?, bytes = bytes + ?, stop = ? WHERE id = ?",
                (tokens, disk_bytes, str(stop), source_id),
            )

    def spans(self, source_id: int) -> list[SpanRecord]:
        """The spans of a source in time order."""
        rows = self._rows("SELECT * FROM spans WHERE source_id = ? ORDER BY ordinal", source_id)
        return [_span(row) for row in rows]

    def span(self, span_id: int) -> SpanRecord | None:
        """One span; None if there is no such any more."""
        rows = self._rows("SELECT * FROM spans WHERE id = ?", span_id)
        return _span(rows[0]) if rows else None

    def source_ids(self) -> list[int]:
        """The ids of all sources, oldest first."""
        return [row["id"] for row in self._rows("SELECT id FROM sources ORDER BY id")]

    def source_by_id(self, source_id: int) -> SourceRecord | None:
        """One source; None if there is no such any more."""
        rows = self._rows("SELECT * FROM sources WHERE id = ?", source_id)
        return _source(rows[0]) if rows else None

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
                yield _span(row), _vectors(row["width"], row["vectors"])

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        """One statement within `transaction` or `snapshot`, for what looks after the catalogue as a whole."""
        with self._reported():
            return self._db.execute(sql, values)

    def integrity(self) -> list[str]:
        """What SQLite finds wrong with the file: pages, indexes, constraints; empty if nothing."""
        found = [str(row[0]) for row in self._rows("PRAGMA integrity_check(20)")]
        found += [f"row {row[1]} of {row[0]} has no {row[2]}" for row in self._rows("PRAGMA foreign_key_check")[:20]]
        return [line for line in found if line != "ok"]

    def vacuum(self) -> None:
        """Give back the space of rows that are gone."""
        with self._reported():
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

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
        return [(_span(row), _vectors(row["width"], row["vectors"])) for row in rows]

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
                    "offset, bytes, grid, codec, level) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
                    ),
                )
                self._db.execute(
                    "INSERT INTO keys (span_id, width, vectors) VALUES (?, ?, ?)",
                    (cursor.lastrowid, span.keys.shape[1], span.keys.numpy().astype("<f4").tobytes()),
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
                    (str(stop), len(spans), tokens, _now(), last["id"]),
                )
            else:
                self._db.execute(
                    "INSERT INTO expired (source_id, start, stop, spans, tokens, reason, created) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (source_id, str(spans[0].start), str(stop), len(spans), tokens, reason, _now()),
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

    def give_back(self, *, share: float = 0.125, pages: int = 64) -> None:
        """Give back space of rows that are gone, a little at a time, where more than a share of the file is free.

        Does nothing on a catalogue from before format 3, which only `vacuum` makes smaller.
        """
        with self._reported():
            while self._pragma("freelist_count") > max(16, share * self._pragma("page_count")):
                before = self._pragma("page_count")
                self._db.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
                if self._pragma("page_count") == before:
                    return

    def last_span(self, source_id: int) -> SpanRecord | None:
        """The last span of a source, if it has any."""
        rows = self._rows("SELECT * FROM spans WHERE source_id = ? ORDER BY ordinal DESC LIMIT 1", source_id)
        return _span(rows[0]) if rows else None

    def keys(self, source_id: int) -> list[Tensor]:
        """Per span in time order: (K, Dk) float32, unit length."""
        rows = self._rows(
            "SELECT keys.width, keys.vectors FROM spans JOIN keys ON keys.span_id = spans.id "
            "WHERE spans.source_id = ? ORDER BY spans.ordinal",
            source_id,
        )
        return [_vectors(row["width"], row["vectors"]) for row in rows]

    def embedder_sources(self, embedder: str) -> list[int]:
        """The ids of all sources whose keys were made by one embedder, oldest first."""
        rows = self._rows("SELECT id FROM sources WHERE json_extract(key, '$.embedder') = ? ORDER BY id", embedder)
        return [row["id"] for row in rows]

    def version(self) -> tuple[int, int]:
        """Another value whenever anything may have changed, by whomever; good while it is open."""
        return self._pragma("data_version"), self._db.total_changes

    def scope_size(self, source_ids: Sequence[int], *, until: int = 2**63 - 1) -> tuple[int, int]:
        """How many spans with ids up to ``until`` some sources have, and the highest id; (0, 0) without any."""
        row = self._rows(
            "SELECT COUNT(*) AS spans, COALESCE(MAX(id), 0) AS last FROM spans "
            "WHERE source_id IN (SELECT value FROM json_each(?)) AND id <= ?",
            json.dumps(list(source_ids)),
            until,
        )[0]
        return row["spans"], row["last"]

    def keys_per_span(self, source_ids: Sequence[int], *, width: int) -> float:
        """How many keys of this width a span of some sources has, about: the mean of a few."""
        row = self._rows(
            "SELECT AVG(length(vectors)) AS bytes FROM (SELECT id FROM spans WHERE source_id IN "
            "(SELECT value FROM json_each(?)) LIMIT 64) AS few JOIN keys ON keys.span_id = few.id",
            json.dumps(list(source_ids)),
        )[0]
        return (row["bytes"] or 0) / (4 * width)

    def scope_ids(self, source_ids: Sequence[int], *, after: int = 0) -> Tensor:
        """(S,) int64, rising: the spans of some sources with ids higher than ``after``."""
        # The newest few by the order of the table, all of them by the index, which is far smaller.
        way = "spans NOT INDEXED" if after else "spans"
        with self._reported():
            rows = self._db.execute(
                f"SELECT id FROM {way} WHERE source_id IN (SELECT value FROM json_each(?)) AND id > ?",
                (json.dumps(list(source_ids)), after),
            )
            rows.row_factory = None
            ids = np.fromiter(chain.from_iterable(rows), np.int64)
        return torch.from_numpy(np.sort(ids))

    def keys_of(self, span_ids: Tensor, *, width: int) -> tuple[Tensor, Tensor]:
        """All keys of some spans, as two tensors however many spans there are.

        Args:
            span_ids: (S,) int64, each once; those that are gone are left out.
            width: Dk; spans with keys of another width are left out, as they cannot be compared.

        Returns:
            ids (M,) int64, together per span and rising, and keys (M, Dk) float32, unit length.
        """
        with self._reported():
            rows = self._db.execute(
                "SELECT span_id, vectors FROM keys WHERE width = ? AND length(vectors) % ? = 0 "
                "AND span_id IN (SELECT value FROM json_each(?)) ORDER BY span_id",
                (width, 4 * width, json.dumps(span_ids.tolist())),
            )
            rows.row_factory = None
            found = rows.fetchall()
        ids = np.fromiter((row[0] for row in found), np.int64, len(found))
        counts = np.fromiter((len(row[1]) for row in found), np.int64, len(found)) // (4 * width)
        keys = np.frombuffer(bytearray().join(row[1] for row in found), "<f4").reshape(-1, width)
        return torch.from_numpy(np.repeat(ids, counts)), torch.from_numpy(keys.astype(np.float32, copy=False))

    def keys_after(
        self, source_ids: Sequence[int], span_id: int = 0, *, width: int, block_spans: int = 4096
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys of all spans with higher ids than one, as in `keys_of`, a block at a time.

        Spans are those there are when the first block is asked for, and not held meanwhile: one that is
        removed before its block comes is left out, and writers go on.
        """
        ids = self.scope_ids(source_ids, after=span_id)
        for first in range(0, len(ids), block_spans):
            yield self.keys_of(ids[first : first + block_spans], width=width)

    def add_snapshot(self, snapshot: SnapshotRecord) -> None:
        """Enter a saved index that is safely on the disk, in place of all older ones of its scope and kind."""
        with self.transaction():
            self._db.execute(
                "DELETE FROM snapshots WHERE source_id IS ? AND embedder = ? AND kind = ?",
                (snapshot.source_id, snapshot.embedder, snapshot.kind),
            )
            self._db.execute(
                "INSERT INTO snapshots (source_id, embedder, kind, width, vectors, last_span_id, file, bytes, digest, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    snapshot.source_id,
                    snapshot.embedder,
                    snapshot.kind,
                    snapshot.width,
                    snapshot.vectors,
                    snapshot.last_span_id,
                    snapshot.file,
                    snapshot.num_bytes,
                    snapshot.digest,
                    _now(),
                ),
            )

    def snapshots(self) -> list[SnapshotRecord]:
        """All saved indexes, newest first."""
        return [
            SnapshotRecord(
                source_id=row["source_id"],
                embedder=row["embedder"],
                kind=row["kind"],
                width=row["width"],
                vectors=row["vectors"],
                last_span_id=row["last_span_id"],
                file=row["file"],
                num_bytes=row["bytes"],
                digest=row["digest"],
            )
            for row in self._rows("SELECT * FROM snapshots ORDER BY id DESC")
        ]

    def snapshot_bytes(self) -> int:
        """Size of all saved indexes, as far as they are in the catalogue."""
        return int(self._rows("SELECT COALESCE(SUM(bytes), 0) AS total FROM snapshots")[0]["total"])

    def key_width(self, source_id: int) -> int | None:
        """Dk of a source's keys; None before its first span."""
        rows = self._rows(
            "SELECT width FROM keys JOIN spans ON keys.span_id = spans.id WHERE source_id = ? LIMIT 1", source_id
        )
        return int(rows[0]["width"]) if rows else None

    def add_answer(self, source_id: int, *, question: str, answer: str, receipt: Mapping[str, Any]) -> int:
        """Keep an answer; returns its id."""
        with self.transaction():
            cursor = self._db.execute(
                "INSERT INTO answers (source_id, question, answer, receipt, created) VALUES (?, ?, ?, ?, ?)",
                (source_id, question, answer, json.dumps(receipt, sort_keys=True), _now()),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def answers(self, source_id: int) -> list[AnswerRecord]:
        """The answers given from a source, oldest first."""
        rows = self._rows("SELECT * FROM answers WHERE source_id = ? ORDER BY id", source_id)
        return [
            AnswerRecord(
                id=row["id"],
                source_id=row["source_id"],
                question=row["question"],
                answer=row["answer"],
                receipt=json.loads(row["receipt"]),
                created=datetime.fromisoformat(row["created"]),
            )
            for row in rows
        ]

    def set_pinned(self, source_id: int, pinned: bool) -> None:
        """Keep a source when space is made, or no longer."""
        with self.transaction():
            self._db.execute("UPDATE sources SET pinned = ? WHERE id = ?", (int(pinned), source_id))

    def gaps(self, source_id: int) -> list[GapRecord]:
        """The stretches of a source of which nothing was seen, in time order."""
        rows = self._rows("SELECT * FROM gaps WHERE source_id = ?", source_id)
        found = [
            GapRecord(
                source_id=row["source_id"],
                start=Fraction(row["start"]),
                stop=Fraction(row["stop"]),
                reason=row["reason"],
                created=datetime.fromisoformat(row["created"]),
            )
            for row in rows
        ]
        return sorted(found, key=lambda gap: gap.start)

    def expired(self, source_id: int) -> list[ExpiredRecord]:
        """What of a source was remembered once and is not any more, in the order it went."""
        rows = self._rows("SELECT * FROM expired WHERE source_id = ? ORDER BY id", source_id)
        return [
            ExpiredRecord(
                source_id=row["source_id"],
                start=Fraction(row["start"]),
                stop=Fraction(row["stop"]),
                spans=row["spans"],
                tokens=row["tokens"],
                reason=row["reason"],
                created=datetime.fromisoformat(row["created"]),
            )
            for row in rows
        ]

    def content_digest(self, path: str, *, stamp: str) -> str | None:
        """The remembered digest of a file, if it was remembered under this very stamp."""
        rows = self._rows("SELECT digest FROM digests WHERE path = ? AND stamp = ?", path, stamp)
        return str(rows[0]["digest"]) if rows else None

    def remember_digest(self, path: str, *, stamp: str, digest: str) -> None:
        """Remember the digest of a file under a stamp, in place of an older one."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO digests (path, stamp, digest) VALUES (?, ?, ?) "
                "ON CONFLICT (path) DO UPDATE SET stamp = excluded.stamp, digest = excluded.digest",
                (path, stamp, digest),
            )

    def forget_digest(self, path: str) -> None:
        """Forget the digest of a file that is gone."""
        with self.transaction():
            self._db.execute("DELETE FROM digests WHERE path = ?", (path,))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing; waits for another writer."""
        if self.read_only:
            raise BankError(
                f"{self.path} is open for reading only; nothing can be stored in it: "
                "check permissions, or choose another memory folder"
            )
        with self._reported():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Several readings of one and the same state, whatever others write meanwhile."""
        with self._reported():
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("COMMIT")

    def _rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self._reported():
            return self._db.execute(sql, values).fetchall()

    def _open_reading(self) -> None:
        """Connect without changing anything, to the file itself where that can be done."""
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        writable = os.access(self.path.parent, os.W_OK)
        if not writable and not self._size("-wal"):
            uri += "&immutable=1"  # without it SQLite wants to make a log; nobody here can write one
        try:
            with self._reported():
                self._connect(uri)
                old = self._pragma("user_version") < len(MIGRATIONS)
        except BankError as error:
            if not isinstance(error.__cause__, sqlite3.OperationalError) or writable:
                raise
            reason = "the log beside it cannot be read in place"
        else:
            if not old:
                return
            self._db.close()
            reason = "it is of an older format"
        self._private = tempfile.TemporaryDirectory(prefix="streamvid-")
        try:
            copy = self._copied(Path(self._private.name))
            with self._reported():
                Catalog(copy).close()  # brings the format up to date and folds the log
                self._connect(f"{copy.as_uri()}?mode=ro&immutable=1")
        except BaseException:
            self._private.cleanup()
            raise
        self.note = f"{self.path} was copied to be read: {reason}; what is stored meanwhile is not seen"

    def _connect(self, uri: str) -> None:
        self._db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._check()
        except BaseException:
            self._db.close()
            raise

    def _copied(self, folder: Path) -> Path:
        """A copy of the file and its log of one and the same moment."""
        for _ in range(COPY_TRIES):
            before = self._stamp()
            for suffix in ("", "-wal"):
                try:
                    shutil.copyfile(f"{self.path}{suffix}", folder / f"{FILE_NAME}{suffix}")
                except FileNotFoundError:
                    (folder / f"{FILE_NAME}{suffix}").unlink(missing_ok=True)
                except OSError as error:
                    raise BankError(
                        f"cannot copy {self.path} to {folder}: {error.strerror}; free some space there, or set TMPDIR"
                    ) from error
            if self._stamp() == before:
                return folder / FILE_NAME
        raise BankError(f"{self.path} changed while it was copied to be read; run again when its writer is done")

    def _stamp(self) -> list[tuple[int, int]]:
        paths = [Path(f"{self.path}{suffix}") for suffix in ("", "-wal")]
        return [(p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.exists()]

    def _check(self) -> None:
        """Like `refuse_foreign`, by SQLite, which also sees what is still in the log."""
        _refuse(
            self.path,
            version=self._pragma("user_version"),
            application=self._pragma("application_id"),
            used=bool(self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]),
        )

    def _migrate(self) -> None:
        """Bring an older schema up to date, all steps or none."""
        if self._pragma("user_version") == len(MIGRATIONS):
            return
        with self.transaction():
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied TEXT NOT NULL)"
            )
            for version in range(self._pragma("user_version"), len(MIGRATIONS)):
                for statement in MIGRATIONS[version]:
                    self._db.execute(statement)
                self._db.execute("INSERT INTO migrations (version, applied) VALUES (?, ?)", (version + 1, _now()))
            self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn SQLite's errors into one line that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            for start, advice in _ADVICE.items():
                if code.startswith(start):
                    raise BankError(f"{self.path} {advice}") from error
            raise BankError(f"{self.path} cannot be used: {error} ({code}); nothing stored was changed") from error


def refuse_foreign(path: Path) -> None:
    """Look at a catalogue's first bytes before SQLite does: opening it alone would leave files beside it.

    Raises:
        BankError: if it is no catalogue, or from a newer version.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BankError(
            f"cannot read {path}: {error.strerror}; check permissions, or choose another memory folder"
        ) from error
    if not head:
        return
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise BankError(f"{path} is not a streamvid catalogue; choose another memory folder")
    # Offsets from https://www.sqlite.org/fileformat.html#the_database_header
    _refuse(
        path,
        version=int.from_bytes(head[60:64], "big"),
        application=int.from_bytes(head[68:72], "big"),
        used=False,
    )


def _refuse(path: Path, *, version: int, application: int, used: bool) -> None:
    if application != APPLICATION_ID and (application or version or used):
        raise BankError(f"{path} is another program's SQLite file; choose another memory folder")
    if version > len(MIGRATIONS):
        raise NewerCatalogError(
            f"{path} was written by a newer streamvid (format {version}, this one knows {len(MIGRATIONS)}); "
            "it was left as it is: update streamvid, or choose another memory folder"
        )


_ADVICE = {
    "SQLITE_FULL": "cannot grow: the disk is full; free some space and run the same again, it goes on after the last "
    "stored span",
    "SQLITE_BUSY": f"was being written by another process for {BUSY_SECONDS:.0f} s; run again when that one is done",
    "SQLITE_READONLY": "cannot be written; check permissions, or choose another memory folder",
    "SQLITE_CANTOPEN": "cannot be opened; check permissions, or choose another memory folder",
    "SQLITE_NOTADB": "is not a streamvid catalogue; choose another memory folder",
    "SQLITE_CORRUPT": "is damaged; restore it from a copy, or choose another memory folder",
}
"""By the start of SQLite's error name."""


def _source(row: sqlite3.Row) -> SourceRecord:
    with _row_reported("sources", row):
        key = MemoryKey.from_json(row["key"])
        if key.digest != row["digest"]:
            raise BankError(
                f"the catalogue's key of source {row['id']} ({row['name']}) is damaged; "
                "restore the catalogue from a copy, or choose another memory folder"
            )
        return SourceRecord(
            id=row["id"],
            key=key,
            path=row["path"],
            name=row["name"],
            created=datetime.fromisoformat(row["created"]),
            state=State(row["state"]),
            duration=None if row["duration"] is None else Fraction(row["duration"]),
            summary=json.loads(row["summary"]),
            spans=row["spans"],
            tokens=row["tokens"],
            num_bytes=row["bytes"],
            stop=None if row["stop"] is None else Fraction(row["stop"]),
            pinned=bool(row["pinned"]),
        )


def _span(row: sqlite3.Row) -> SpanRecord:
    with _row_reported("spans", row):
        frames, rows, columns = json.loads(row["grid"])
        return SpanRecord(
            id=row["id"],
            source_id=row["source_id"],
            ordinal=row["ordinal"],
            start=Fraction(row["start"]),
            stop=Fraction(row["stop"]),
            tokens=row["tokens"],
            file=row["file"],
            offset=row["offset"],
            num_bytes=row["bytes"],
            grid=(frames, rows, columns),
            codec=row["codec"],
            level=row["level"],
        )


def _vectors(width: int | None, data: bytes | None) -> Tensor:
    if not width or not data:
        return torch.zeros(0, width or 0)
    if len(data) % (4 * width):
        raise BankError(
            f"the catalogue holds {len(data)} bytes of keys of {width} numbers: it is damaged; "
            "rebuild it with: streamvid memory repair"
        )
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).reshape(-1, width)


@contextmanager
def _row_reported(table: str, row: sqlite3.Row) -> Iterator[None]:
    """Turn values that cannot be read into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise BankError(
            f"the catalogue's row {row['id']} of {table} is damaged ({error}); "
            "rebuild the catalogue with: streamvid memory repair"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat()
