"""The SQLite file under the catalogue: opened, brought up to date, in transactions; knows no table."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory import seals
from streamvid.memory.schema import APPLICATION_ID, CREATE_MIGRATIONS, FILE_NAME, MIGRATIONS, refuse, refuse_foreign

BUSY_SECONDS = 30.0

LOG_PAGES = 100
"""Pages of 4 KiB at which the log is folded into the file; bounds what a fold can add to the disk."""

COPY_TRIES = 5
"""How often a catalogue that is being written elsewhere is copied before giving up."""

COMMIT_BYTES = 64 << 10
"""What entering one span may add to the log besides its keys: about ten pages, more when an index splits."""

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


class Database:
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
                seals.install(self._db)
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

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        """One statement within `transaction` or `snapshot`, for what looks after the catalogue as a whole."""
        with self._reported():
            return self._db.execute(sql, values)

    def integrity(self) -> list[str]:
        """What SQLite finds wrong with the file: pages, indexes, constraints; empty if nothing."""
        found = [str(row[0]) for row in self._rows("PRAGMA integrity_check(20)")]
        found += [f"row {row[1]} of {row[0]} has no {row[2]}" for row in self._rows("PRAGMA foreign_key_check")[:20]]
        return [line for line in found if line != "ok"]

    def wrong_tables(self) -> list[str]:
        """Tables and indexes that are not as they were made."""
        with self._reported():
            return seals.wrong_schema(self._db)

    def wrong_sequences(self) -> list[str]:
        """Tables whose last id was changed."""
        with self._reported():
            return list(seals.wrong_sequences(self._db))

    def mend_sequence(self, table: str) -> None:
        """Make the last id of a table what it was, in the caller's transaction."""
        with self._reported():
            seals.mend_sequence(self._db, table)

    def keys_fit(self, span_id: int) -> bool:
        """Whether the keys of a span are as they were entered."""
        with self._reported():
            return seals.keys_fit(self._db, span_id)

    def reseal(self, table: str, rowid: int) -> bool:
        """Seal a row that does not fit as it is, in the caller's transaction; False if it fits, or is gone."""
        with self._reported():
            if seals.fits(self._db, table, rowid):
                return False
            return seals.renew(self._db, table, rowid)

    def broken_rows(self, *, source_id: int | None = None) -> Iterator[seals.Broken]:
        """The rows that do not fit their seals: of one source, or all; holds 1024 rows in memory."""
        with self._reported():
            for table, columns in seals.SEALED.items():
                if source_id is None or table == "sources" or "source_id" in columns:
                    yield from seals.broken(self._db, table, source_id=source_id)

    def vacuum(self) -> None:
        """Give back the space of rows that are gone."""
        with self._reported():
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

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

    def version(self) -> tuple[int, int]:
        """Another value whenever anything may have changed, by whomever; good while it is open."""
        return self._pragma("data_version"), self._db.total_changes

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
                type(self)(copy).close()  # brings the format up to date and folds the log
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
        refuse(
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
            seals.note_broken(self._db)
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(CREATE_MIGRATIONS)
            for version in range(self._pragma("user_version"), len(MIGRATIONS)):
                for statement in MIGRATIONS[version]:
                    self._db.execute(statement)
                self._db.execute("INSERT INTO migrations (version, applied) VALUES (?, ?)", (version + 1, now()))
            seals.seal_all(self._db)
            self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn SQLite's errors into one line that says what to do."""
        try:
            yield
        except UnicodeDecodeError as error:  # SQLite quotes what it cannot read
            raise BankError(f"{self.path} {_ADVICE['SQLITE_CORRUPT']}") from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            for start, advice in _ADVICE.items():
                if code.startswith(start):
                    raise BankError(f"{self.path} {advice}") from error
            raise BankError(f"{self.path} cannot be used: {error} ({code}); nothing stored was changed") from error


def now() -> str:
    """For people: nothing depends on it."""
    return datetime.now(UTC).isoformat()
