"""The catalogue: what is remembered and where, in SQLite.

It is the truth about a memory folder: a span that is not in it does not exist, and an index is rebuilt
from it.  Knows rows; reads no segment and no video.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from fractions import Fraction
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
)
"""Statements that lead from each schema version to the next; a released entry is never edited."""

BUSY_SECONDS = 30.0

LOG_PAGES = 100
"""Pages of 4 KiB at which the log is folded into the file; bounds what a fold can add to the disk."""

COMMIT_BYTES = 64 << 10
"""What entering one span may add to the log besides its keys: about ten pages, more when an index splits."""


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


class Catalog:
    """The catalogue of one memory folder: one connection, for one thread of one process.

    Other processes read while one writes (write-ahead log); a writer waits up to 30 s for another.
    A commit is on the disk when it returns.

    Raises:
        BankError: if the file is not a catalogue, is damaged, is from a newer version (it is then left
            exactly as it is), or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_foreign(path)
        with self._reported():
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            with self._reported():
                self._check()
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
        return [
            torch.from_numpy(np.frombuffer(row["vectors"], "<f4").astype(np.float32)).reshape(
                -1 if row["width"] else 0, row["width"]
            )
            for row in rows
        ]

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

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing; waits for another writer."""
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
        raise BankError(
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
    )


def _span(row: sqlite3.Row) -> SpanRecord:
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


def _now() -> str:
    return datetime.now(UTC).isoformat()
