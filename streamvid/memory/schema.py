"""The tables of the catalogue, version by version, and whether a file is one of ours."""

from __future__ import annotations

from pathlib import Path

from streamvid.errors import BankError

FILE_NAME = "catalog.sqlite3"

APPLICATION_ID = 0x53764D42
"""Marks the SQLite file as ours ("SvMB"), so that a foreign one is refused."""

CREATE_MIGRATIONS = "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied TEXT NOT NULL)"

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
    (
        # Checksums of what the rows say; see seals.py, which fills them in.
        *(
            f"ALTER TABLE {table} ADD COLUMN seal INTEGER"
            for table in ("sources", "answers", "gaps", "expired", "snapshots", "digests", "migrations")
        ),
        # That of a span covers that of its keys, whose table is too large to be written anew.
        "ALTER TABLE spans ADD COLUMN keys_seal INTEGER",
        "ALTER TABLE spans ADD COLUMN seal INTEGER",
        # SQLite keeps the last id it gave in a table that cannot be sealed.
        "CREATE TABLE last_ids (name TEXT PRIMARY KEY, id INTEGER NOT NULL, seal INTEGER)",
        "INSERT INTO last_ids (name, id) SELECT told.column1, COALESCE((SELECT seq FROM sqlite_sequence "
        "WHERE sqlite_sequence.name = told.column1), 0) FROM (VALUES ('sources'), ('spans'), ('answers'), ('gaps'), "
        "('expired'), ('snapshots')) AS told",
    ),
)
"""Statements that lead from each schema version to the next; a released entry is never edited."""


class NewerCatalogError(BankError):
    """The catalogue was written by a newer streamvid; it was left as it is."""


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
    refuse(
        path,
        version=int.from_bytes(head[60:64], "big"),
        application=int.from_bytes(head[68:72], "big"),
        used=False,
    )


def refuse(path: Path, *, version: int, application: int, used: bool) -> None:
    """Refuse what is another program's, or a newer streamvid's, by what the file says of itself."""
    if application != APPLICATION_ID and (application or version or used):
        raise BankError(f"{path} is another program's SQLite file; choose another memory folder")
    if version > len(MIGRATIONS):
        raise NewerCatalogError(
            f"{path} was written by a newer streamvid (format {version}, this one knows {len(MIGRATIONS)}); "
            "it was left as it is: update streamvid, or choose another memory folder"
        )
