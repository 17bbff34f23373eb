"""Checksums of the catalogue's rows: written with every row by whoever writes it, compared by a verification.

A seal is the crc32 of all that a row says.  Keys are large and are sealed in the row of their span.  Every
writing connection seals by triggers of its own, which no other program has: a row that was changed beneath us
keeps a seal that does not fit, and a later change by us leaves it so.  Only a repair renews it.
"""

from __future__ import annotations

import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import Any

from streamvid.memory.schema import CREATE_MIGRATIONS, MIGRATIONS

SEALED: dict[str, tuple[str, ...]] = {
    "sources": (
        "id",
        "digest",
        "key",
        "path",
        "name",
        "created",
        "state",
        "duration",
        "summary",
        "spans",
        "tokens",
        "bytes",
        "stop",
        "pinned",
    ),
    "spans": (
        "id",
        "source_id",
        "ordinal",
        "start",
        "stop",
        "start_seconds",
        "stop_seconds",
        "tokens",
        "file",
        "offset",
        "bytes",
        "grid",
        "codec",
        "level",
        "keys_seal",
    ),
    "answers": ("id", "source_id", "question", "answer", "receipt", "created"),
    "gaps": ("id", "source_id", "start", "stop", "reason", "created"),
    "expired": ("id", "source_id", "start", "stop", "spans", "tokens", "reason", "created"),
    "snapshots": (
        "id",
        "source_id",
        "embedder",
        "kind",
        "width",
        "vectors",
        "last_span_id",
        "file",
        "bytes",
        "digest",
        "created",
    ),
    "digests": ("path", "stamp", "digest"),
    "migrations": ("version", "applied"),
    "last_ids": ("name", "id"),
}
"""What is sealed of each table.  A migration that adds a column to one seals its rows anew."""

NUMBERED = ("sources", "spans", "answers", "gaps", "expired", "snapshots")
"""Tables whose ids are never used again; the last one given is kept, sealed, in ``last_ids``."""

BATCH = 1024
"""Rows in memory at once."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that is not as it was written."""

    table: str
    rowid: int
    source_id: int | None
    """Whose it says it is; None where the table does not go with sources."""

    keys: bool
    """Whether it is the keys of a span that are not, or are missing; its row may be as written."""


def seal(table: str, *values: object) -> int:
    """crc32 of what a row says; text that is no UTF-8 comes with ``surrogateescape``."""
    return zlib.crc32(ascii((table, *values)).encode("ascii"))


def seal_keys(width: int | None, vectors: bytes | None) -> int:
    """crc32 of the keys of a span."""
    if not isinstance(width, int) or not isinstance(vectors, bytes):
        return -1
    return zlib.crc32(vectors, zlib.crc32(b"%d" % width))


def install(db: sqlite3.Connection) -> None:
    """Let a connection seal whatever it writes from here on."""
    db.create_function("seal", -1, seal, deterministic=True)
    db.create_function("seal_keys", 2, seal_keys, deterministic=True)
    for table, columns in SEALED.items():
        old = f"seal('{table}', {', '.join(f'OLD.{name}' for name in columns)})"
        new = f"seal('{table}', {', '.join(f'NEW.{name}' for name in columns)})"
        last = f"UPDATE last_ids SET id = NEW.id WHERE name = '{table}' AND id < NEW.id;" if table in NUMBERED else ""
        db.execute(
            f"CREATE TEMP TRIGGER IF NOT EXISTS seal_new_{table} AFTER INSERT ON main.{table} BEGIN "
            f"UPDATE {table} SET seal = {new} WHERE rowid = NEW.rowid; {last} END"
        )
        # A row that did not fit before must not fit because something else in it was changed.
        db.execute(
            f"CREATE TEMP TRIGGER IF NOT EXISTS seal_{table} AFTER UPDATE OF {', '.join(columns)} ON main.{table} "
            f"BEGIN UPDATE {table} SET seal = CASE WHEN OLD.seal IS {old} THEN {new} ELSE OLD.seal END "
            "WHERE rowid = NEW.rowid; END"
        )
    db.execute(
        "CREATE TEMP TRIGGER IF NOT EXISTS seal_new_keys AFTER INSERT ON main.keys BEGIN "
        "UPDATE spans SET keys_seal = seal_keys(NEW.width, NEW.vectors) "
        "WHERE id = NEW.span_id AND keys_seal IS NOT seal_keys(NEW.width, NEW.vectors); END"
    )
    db.execute(
        "CREATE TEMP TRIGGER IF NOT EXISTS seal_keys AFTER UPDATE OF width, vectors ON main.keys BEGIN "
        "UPDATE spans SET keys_seal = seal_keys(NEW.width, NEW.vectors) "
        "WHERE id = NEW.span_id AND keys_seal IS seal_keys(OLD.width, OLD.vectors); END"
    )


def note_broken(db: sqlite3.Connection) -> None:
    """Before a migration, in its transaction: what does not fit its seal, for `seal_all` to leave so."""
    db.execute("CREATE TEMP TABLE damaged (name, row, PRIMARY KEY (name, row))")
    for table, columns in SEALED.items():
        there = {row[1] for row in db.execute(f"PRAGMA main.table_info({table})")}
        if "seal" in there:
            found = broken(db, table, columns=tuple(name for name in columns if name in there))
            db.executemany(
                "INSERT OR IGNORE INTO damaged VALUES (?, ?)",
                (("keys" if row.keys else table, row.rowid) for row in found),
            )


def seal_all(db: sqlite3.Connection) -> None:
    """Seal every row as it is now, in the caller's transaction, but those of `note_broken`, which fit no seal then.

    Of a format without seals, what is damaged already is not noticed.
    """
    rows = db.cursor()
    rows.row_factory = None
    with _AnyText(db):
        after = -1
        while found := rows.execute(
            "SELECT span_id, width, vectors FROM keys WHERE span_id > ? ORDER BY span_id LIMIT ?", (after, BATCH)
        ).fetchall():
            db.executemany(
                "UPDATE spans SET keys_seal = ? WHERE id = ?",
                [(seal_keys(width, vectors), span_id) for span_id, width, vectors in found],
            )
            after = _forward(after, found)
        db.execute("UPDATE spans SET keys_seal = NULL WHERE id IN (SELECT row FROM damaged WHERE name = 'keys')")
        for table, columns in SEALED.items():
            after = -1
            while found := rows.execute(
                f"SELECT rowid, {', '.join(columns)} FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT ?",
                (after, BATCH),
            ).fetchall():
                db.executemany(
                    f"UPDATE {table} SET seal = ? WHERE rowid = ?", [(seal(table, *row[1:]), row[0]) for row in found]
                )
                after = _forward(after, found)
        for table in SEALED:
            db.execute(
                f"UPDATE {table} SET seal = NULL WHERE rowid IN (SELECT row FROM damaged WHERE name = ?)", (table,)
            )
    db.execute("DROP TABLE temp.damaged")


def broken(
    db: sqlite3.Connection, table: str, *, source_id: int | None = None, columns: tuple[str, ...] | None = None
) -> Iterator[Broken]:
    """The rows of a table that do not fit their seals.

    Args:
        db: open; need not be able to write.
        table: one of `SEALED`.
        source_id: only rows of this source, of a table that goes with sources; None for all.
        columns: what was sealed of it when the seals were written; None: what is sealed now.
    """
    columns = SEALED[table] if columns is None else columns
    of = "" if source_id is None else f"AND main.{'id' if table == 'sources' else 'source_id'} = {int(source_id)} "
    keys, join = "", ""
    if table == "spans":
        keys, join = ", keys.width, keys.vectors", "LEFT JOIN keys ON keys.span_id = main.id "
    rows = db.cursor()
    rows.row_factory = None
    after = -(1 << 63)
    width = len(columns) + 2
    owner = columns.index("id" if table == "sources" else "source_id") + 1 if {"source_id", "state"} & {*columns} else 0
    while True:
        with _AnyText(db):
            found = rows.execute(
                f"SELECT main.rowid, {', '.join(f'main.{name}' for name in columns)}, main.seal{keys} "
                f"FROM {table} AS main {join}WHERE main.rowid > ? {of}ORDER BY main.rowid LIMIT ?",
                (after, BATCH),
            ).fetchall()
        if not found:
            return
        for row in found:
            if row[width - 1] != seal(table, *row[1 : width - 1]):
                yield Broken(table, row[0], row[owner] if owner else None, keys=False)
            if keys and row[columns.index("keys_seal") + 1] != seal_keys(*row[width:]):
                yield Broken(table, row[0], row[owner] if owner else None, keys=True)
        after = _forward(after, found)


def _forward(after: int, found: list[tuple[Any, ...]]) -> int:
    """The last row of a batch; in a damaged tree rows may come again and again."""
    ids = [after, *(row[0] for row in found)]
    if any(a >= b for a, b in pairwise(ids)):
        raise sqlite3.DatabaseError("rows do not stand in order: it is damaged")
    return int(ids[-1])


def fits(db: sqlite3.Connection, table: str, rowid: int) -> bool:
    """Whether a row is there and fits its seal; that of its keys, if it has some, is not looked at."""
    columns = SEALED[table]
    with _AnyText(db):
        row = db.execute(f"SELECT {', '.join(columns)}, seal FROM {table} WHERE rowid = ?", (rowid,)).fetchone()
    return row is not None and row[-1] == seal(table, *tuple(row)[:-1])


def keys_fit(db: sqlite3.Connection, span_id: int) -> bool:
    """Whether the keys of a span are there and fit their seal."""
    row = db.execute(
        "SELECT keys_seal, width, vectors FROM spans JOIN keys ON keys.span_id = spans.id WHERE spans.id = ?",
        (span_id,),
    ).fetchone()
    return row is not None and row[0] == seal_keys(row[1], row[2])


def renew(db: sqlite3.Connection, table: str, rowid: int) -> bool:
    """Seal a row as it is, in the caller's transaction; for a repair, which says so.  False if it is gone."""
    columns = SEALED[table]
    with _AnyText(db):
        row = db.execute(f"SELECT {', '.join(columns)} FROM {table} WHERE rowid = ?", (rowid,)).fetchone()
    if row is not None:
        db.execute(f"UPDATE {table} SET seal = ? WHERE rowid = ?", (seal(table, *row), rowid))
    return row is not None


def wrong_sequences(db: sqlite3.Connection) -> Iterator[str]:
    """Tables whose last given id SQLite says otherwise than we do, or has passed."""
    for table in NUMBERED:
        [(ours,)] = db.execute("SELECT (SELECT id FROM last_ids WHERE name = ?)", (table,)).fetchall()
        [(theirs,)] = db.execute("SELECT (SELECT seq FROM sqlite_sequence WHERE name = ?)", (table,)).fetchall()
        [(highest,)] = db.execute(f"SELECT COALESCE(MAX(id), 0) FROM {table}").fetchall()
        if ours is None or ours != (theirs or 0) or highest > ours:
            yield table


def mend_sequence(db: sqlite3.Connection, table: str) -> int:
    """Make SQLite and us say the same last id, in the caller's transaction; returns it."""
    [(ours,)] = db.execute("SELECT (SELECT id FROM last_ids WHERE name = ?)", (table,)).fetchall()
    [(theirs,)] = db.execute("SELECT (SELECT seq FROM sqlite_sequence WHERE name = ?)", (table,)).fetchall()
    [(rowid,)] = db.execute("SELECT (SELECT rowid FROM last_ids WHERE name = ?)", (table,)).fetchall()
    [(highest,)] = db.execute(f"SELECT COALESCE(MAX(id), 0) FROM {table}").fetchall()
    # The sealed one is right; without it, too high is only a gap in the numbers.
    told = ours if rowid is not None and fits(db, "last_ids", rowid) else max(theirs or 0, highest)
    last = max(int(told), int(highest))
    db.execute("DELETE FROM last_ids WHERE name = ?", (table,))
    db.execute("INSERT INTO last_ids (name, id) VALUES (?, ?)", (table, last))
    db.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
    db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, last))
    return last


def wrong_schema(db: sqlite3.Connection) -> list[str]:
    """Tables and indexes that are not as the migrations make them."""
    should, have = _told(made_schema(len(MIGRATIONS))), _told(schema(db))
    return sorted(name for name in should.keys() | have.keys() if should.get(name) != have.get(name))


@cache
def made_schema(version: int) -> tuple[tuple[str, str, str, str], ...]:
    """Kind, name, table and SQL of all that the first so many migrations make."""
    db = sqlite3.connect(":memory:")
    try:
        for statement in (CREATE_MIGRATIONS, *chain.from_iterable(MIGRATIONS[:version])):
            db.execute(statement)
        return tuple(schema(db))
    finally:
        db.close()


def schema(db: sqlite3.Connection) -> list[tuple[str, str, str, str]]:
    """Kind, name, table and SQL of all that there is, in SQLite's order; text that cannot be read as it is."""
    rows = db.cursor()
    rows.row_factory = None
    with _AnyText(db):
        found = rows.execute("SELECT type, name, tbl_name, COALESCE(sql, '') FROM main.sqlite_master").fetchall()
    return [(str(kind), str(name), str(of), str(sql)) for kind, name, of, sql in found]


def _told(rows: Iterable[tuple[str, str, str, str]]) -> dict[str, tuple[str, str, str]]:
    # Where SQLite puts a blank in the text of an added column is not for us to say.
    return {name: (kind, of, same_sql(sql)) for kind, name, of, sql in rows if name != "sqlite_stat1"}


def same_sql(sql: str) -> str:
    """SQL without what may differ between two files of one format."""
    return re.sub(r"[ \t\n\f\r]", "", sql)  # no other character is blank to SQLite


class _AnyText:
    """Text as it is, even if it is no UTF-8; a context manager."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._before = self._db.text_factory
        self._db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")

    def __exit__(self, *_: object) -> None:
        self._db.text_factory = self._before
