"""A catalogue built anew from the segments, with what can still be read of the old one."""

from __future__ import annotations

import difflib
import fcntl
import itertools
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Self

from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.care import BLOCK_BYTES, UNREADABLE, Repaired, segment_files, start_bytes
from streamvid.memory.catalog import Catalog
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import SourceRecord, State
from streamvid.memory.rows import HISTORY, count_spans, enter_spans, insert_history, insert_source, number_spans
from streamvid.memory.schema import FILE_NAME, MIGRATIONS, NewerCatalogError
from streamvid.memory.seals import SEALED, made_schema, same_sql, schema, seal
from streamvid.memory.segment_format import SpanHead, file_header, header_key, intact_header
from streamvid.memory.segments import SegmentReader, sync_folder, write_at


def catalogue_damage(folder: Path) -> str:
    """Why the catalogue has to be built anew; empty if it need not be."""
    path = folder / FILE_NAME
    segments = folder / "segments"
    kept = segments.is_dir() and bool(os.listdir(segments))
    if not path.exists() or not path.stat().st_size:
        if not kept:
            Bank.open(folder, create=False, read_only=True).close()  # says why it is no memory
            return ""
        return "it is missing"
    try:
        with Catalog(path, read_only=True) as catalog:
            found = catalog.integrity() + [f"{name} is not as it was made" for name in catalog.wrong_tables()]
            for source_id in [] if found else catalog.source_ids():
                catalog.source_by_id(source_id)
                for _ in catalog.entries(catalog.span_ids(source_id)):
                    pass
                list(_examine_times(catalog, source_id))
        return found[0] if found else ""
    except NewerCatalogError:
        raise
    except (BankError, *UNREADABLE) as error:
        if not kept or not os.access(path, os.R_OK):
            raise
        return str(error).split(";")[0]


def _examine_times(catalog: Catalog, source_id: int) -> Iterator[tuple[Fraction, Fraction]]:
    for table in ("gaps", "expired"):
        for row in catalog.execute(f"SELECT start, stop FROM {table} WHERE source_id = ?", source_id):
            yield Fraction(row["start"]), Fraction(row["stop"])


def rebuild(folder: Path, result: Repaired) -> None:
    """Put a catalogue built from the segments in the place of a damaged one; keeps a copy of that."""
    damaged, built = folder / FILE_NAME, folder / f"{FILE_NAME}.new"
    (folder / "locks").mkdir(exist_ok=True)
    with ExitStack() as held:
        opening = held.enter_context(open(folder / "locks" / "open.lock", "ab"))
        fcntl.flock(opening, fcntl.LOCK_EX)
        for path in sorted((folder / "locks").glob("*.lock")):
            if path.name == "open.lock":
                continue
            writing = held.enter_context(open(path, "ab"))
            try:
                fcntl.flock(writing, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BankError(f"{folder} is being written by another process; stop it and repair again") from None
        for suffix in ("", "-wal", "-shm"):
            Path(f"{built}{suffix}").unlink(missing_ok=True)
        build(folder, built, result, dry_run=False)
        with open(built, "rb") as new:
            os.fsync(new.fileno())
        number = next(n for n in itertools.count(1) if not Path(f"{damaged}.broken-{n}").exists())
        for suffix in ("-wal", ""):
            if Path(f"{damaged}{suffix}").exists():
                shutil.copyfile(f"{damaged}{suffix}", f"{damaged}.broken-{number}{suffix}")
                result.done.append(f"the old catalogue is kept as {FILE_NAME}.broken-{number}{suffix}")
        # A log must not meet a catalogue it is not of.
        for suffix in ("-wal", "-shm"):
            Path(f"{damaged}{suffix}").unlink(missing_ok=True)
        os.replace(built, damaged)
        sync_folder(folder)


def build(folder: Path, built: Path, result: Repaired, *, dry_run: bool) -> None:
    """Make a catalogue from the segments, with what can be read of the old one."""
    with _Salvage(folder / FILE_NAME) as old, Catalog(built) as catalog, catalog.transaction():
        found: dict[str, tuple[int, Path, MemoryKey]] = {}
        for path in sorted((folder / "segments").iterdir()):
            number = path.name.rpartition("-")[2]
            key = _folder_key(path) or old.key(number)
            if not number.isdecimal() or key is None or path.name != f"{key.short}-{number}":
                result.left.append(f"segments/{path.name} cannot be told whose it is")
                continue
            before = found.get(key.digest)
            if before is None or before[0] < int(number):
                found[key.digest] = (int(number), path, key)
        for source_id, path, key in sorted(found.values(), key=lambda one: one[0]):
            told = old.source(key)
            if not told:
                result.lose(f"segments/{path.name}: name, path and answers of source {source_id}")
            elif not told.get("whole", True):
                result.doubt(
                    f"{told.get('name')}: its name, path, dates and summary are as they were found, and not all "
                    "as they were written"
                )
            insert_source(catalog, key, told, source_id=source_id)
            source = catalog.source_by_id(source_id)
            assert source is not None
            if not dry_run:
                mend_headers(path, source, result, dry_run=False)
            known = old.all_live(source_id)
            level = partial(old.level, source_id) if known else None
            enter_spans(catalog, source, path, _walk(path, key, level, result))
            now = catalog.source_by_id(source_id)
            if known and now is not None and now.spans < old.live_spans(source_id):
                # A row told a wrong place, or spans are lost: better too many than too few.
                catalog.execute("DELETE FROM spans WHERE source_id = ?", source_id)
                enter_spans(catalog, source, path, _walk(path, key, None, result))
            _order(catalog, source_id)
            for table in HISTORY:
                for row in old.history(table, source_id):
                    insert_history(catalog, table, source_id, row)
                    if not row.get("whole", True):
                        result.doubt(
                            f"{told.get('name', path.name)}: a row of {table} was not as it was written: "
                            "it was taken over as it is"
                        )


def mend_headers(folder: Path, source: SourceRecord, result: Repaired, *, dry_run: bool) -> None:
    """Write the starts of a source's segment files anew where they are damaged."""
    header = file_header(source.key)
    for name in segment_files(folder):
        start = start_bytes(folder / name, source)
        if intact_header(start) or len(start) < len(header):
            continue
        result.done.append(f"{source.folder}/{name}: the file header is written anew")
        if not dry_run:
            fd = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
            try:
                write_at(fd, header, 0)
                os.fsync(fd)
            finally:
                os.close(fd)


def _folder_key(folder: Path) -> MemoryKey | None:
    for path in sorted(folder.glob("*.seg")):
        try:
            return header_key(path)
        except BankError:
            continue
    return None


def _walk(
    folder: Path, key: MemoryKey, level: Callable[[str, int], int | None] | None, result: Repaired
) -> Iterator[tuple[SegmentReader, SpanHead, int]]:
    """The spans that lie in a folder, in the order they were written; ``level`` says which count, and of what level."""
    for name in sorted(segment_files(folder)):
        header = file_header(key)
        with open(folder / name, "rb") as file:
            start = file.read(len(header))
        try:
            reader = SegmentReader(folder / name, key=key)
        except BankError as error:
            if intact_header(start):
                raise
            result.lose(f"{error}")
            continue
        with reader:
            place, size = len(header), (folder / name).stat().st_size
            while place < size:
                try:
                    head = reader.head(place)
                    if place + head.num_bytes > size:
                        raise BankError("the file ends before")
                    reader.keys(place)
                except BankError:
                    if reader.intact_head(place) and not _readable_head(reader, place):
                        raise
                    if reader.intact_head(place):
                        result.lose(f"{folder / name}: the span at {place} lost its keys or its end")
                    place = _next_span(folder / name, place + 1, size)
                    continue
                found = 0 if level is None else level(name, place)
                if found is not None:
                    yield reader, head, found
                place += head.num_bytes


def _readable_head(reader: SegmentReader, place: int) -> bool:
    try:
        reader.head(place)
    except BankError:
        return False
    return True


def _next_span(path: Path, place: int, size: int) -> int:
    """Where the next span may begin."""
    with open(path, "rb") as file:
        while place < size:
            file.seek(place)
            at = file.read(BLOCK_BYTES).find(b"SPAN")
            if at >= 0:
                return place + at
            place += BLOCK_BYTES - 3
    return size


def _order(catalog: Catalog, source_id: int) -> None:
    """Ordinals by time; a span written after others that lie within it was made of them and stands for them."""
    # A span that starts before one that was written earlier was merged.
    catalog.execute(
        "CREATE TEMP TABLE merged AS SELECT id, start_seconds AS start, stop_seconds AS stop FROM (SELECT *, "
        "MAX(start_seconds) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS latest "
        "FROM spans WHERE source_id = ?) WHERE start_seconds < latest",
        source_id,
    )
    last = 0
    while rows := catalog.execute("SELECT * FROM merged WHERE id > ? ORDER BY id LIMIT 1024", last).fetchall():
        for row in rows:
            catalog.execute(
                "DELETE FROM spans WHERE source_id = ? AND start_seconds >= ? AND stop_seconds <= ? AND id < ?",
                source_id,
                row["start"],
                row["stop"],
                row["id"],
            )
        last = rows[-1]["id"]
    catalog.execute("DROP TABLE temp.merged")
    number_spans(catalog, source_id)
    count_spans(catalog, source_id)


class _Salvage:
    """What can still be read of a damaged catalogue; whatever makes no sense is left out.

    Rows are moved into a temporary file, one at a time, so that a large catalogue takes no memory.
    """

    def __init__(self, path: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="streamvid-")
        self._db = sqlite3.connect(Path(self._folder.name) / "salvage.sqlite3", isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE spans (id INTEGER PRIMARY KEY, source_id, file, offset, level)")
        self._db.execute("CREATE TABLE rows (name, id, source_id, told, PRIMARY KEY (name, id))")
        if not path.exists() or not path.stat().st_size:
            return
        for suffix in ("", "-wal"):
            if Path(f"{path}{suffix}").exists():
                shutil.copyfile(f"{path}{suffix}", Path(self._folder.name) / f"{FILE_NAME}{suffix}")
        _mend_schema(Path(self._folder.name) / FILE_NAME)
        old = sqlite3.connect(Path(self._folder.name) / FILE_NAME)
        try:
            old.row_factory = sqlite3.Row
            old.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
            self._take(old)
        finally:
            old.close()
        self._db.execute("CREATE INDEX spans_by_place ON spans (source_id, file, offset)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._folder.cleanup()

    def _take(self, old: sqlite3.Connection) -> None:
        self._db.execute("BEGIN")
        for row in _readable(old, "spans"):
            self._db.execute(
                "INSERT OR IGNORE INTO spans VALUES (?, ?, ?, ?, ?)",
                [_plain(row.get(name, 0)) for name in ("id", "source_id", "file", "offset", "level")],
            )
        for table in ("sources", *HISTORY):
            for row in _readable(old, table):
                if "seal" in row:
                    row["whole"] = row["seal"] == seal(table, *(row.get(name) for name in SEALED[table]))
                told = json.dumps({name: _plain(value) for name, value in row.items()})
                owner = row.get("id" if table == "sources" else "source_id")
                self._db.execute(
                    "INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?)", (table, row.get("id"), _plain(owner), told)
                )
        self._db.execute("COMMIT")

    def _rows(self, table: str, source_id: int | None = None) -> Iterator[dict[str, Any]]:
        found = self._db.execute(
            "SELECT told FROM rows WHERE name = ? AND (? IS NULL OR source_id = ?) ORDER BY id",
            (table, source_id, source_id),
        )
        for row in found:
            yield json.loads(row["told"])

    def key(self, number: str) -> MemoryKey | None:
        """The key of the source with this id."""
        for row in self._rows("sources"):
            try:
                key = MemoryKey.from_json(row["key"])
            except (ValueError, TypeError, KeyError):
                continue
            if str(row.get("id")) == number and key.digest == row.get("digest"):
                return key
        return None

    def source(self, key: MemoryKey) -> dict[str, Any]:
        """Its columns that the segments do not say; empty if they are lost."""
        for row in self._rows("sources"):
            if row.get("digest") == key.digest or row.get("key") == key.to_json():
                try:
                    State(row["state"])
                    datetime.fromisoformat(row["created"])
                    json.loads(row["summary"])
                    for name in ("duration", "stop"):
                        Fraction(row[name] or 0)
                except (ValueError, TypeError, KeyError, ZeroDivisionError):
                    return {"name": str(row.get("name", "")), "path": str(row.get("path", "")), "whole": False}
                return row
        return {}

    def all_live(self, source_id: int) -> bool:
        """Whether the places of all its spans can be read."""
        said = [row.get("spans") for row in self._rows("sources", source_id)]
        return said == [self.live_spans(source_id)]

    def live_spans(self, source_id: int) -> int:
        """How many places of its spans can be read."""
        found = self._db.execute(
            "SELECT COUNT(*) FROM (SELECT DISTINCT file, offset FROM spans WHERE source_id = ?)", (source_id,)
        )
        return int(found.fetchone()[0])

    def level(self, source_id: int, file: str, offset: int) -> int | None:
        """The level of the span at a place; None if there was none."""
        row = self._db.execute(
            "SELECT level FROM spans WHERE source_id = ? AND file = ? AND offset = ?", (source_id, file, offset)
        ).fetchone()
        return None if row is None else int(row["level"] if isinstance(row["level"], int) else 0)

    def history(self, table: str, source_id: int) -> Iterator[dict[str, Any]]:
        """Its rows of one of the `HISTORY` tables."""
        for row in self._rows(table, source_id):
            try:
                datetime.fromisoformat(row["created"])
                for name in ("start", "stop"):
                    Fraction(row.get(name, 0))
                json.loads(row.get("receipt", "{}"))
                insertable = all(row[name] is not None for name in HISTORY[table])
            except (ValueError, TypeError, KeyError, ZeroDivisionError):
                continue
            if insertable:
                yield row


def _mend_schema(path: Path) -> None:
    """Write the schema as it was made into a copy of a damaged catalogue, so that its tables can be read.

    An entry is known by its name, or, where that is damaged, by being most like one that is missing.  What cannot be
    mended stays, and the rows of that table are lost.
    """
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA writable_schema = ON")  # first of all: a schema that makes no sense is then let through
        [(version,)] = db.execute("PRAGMA user_version").fetchall()
        missing = {
            entry[1]: entry for entry in made_schema(version if 0 < version <= len(MIGRATIONS) else len(MIGRATIONS))
        }
        strange: list[tuple[int, str]] = []
        numbers = [row[0] for row in db.execute("SELECT rowid FROM sqlite_master")]
        for number, (kind, name, of, sql) in zip(numbers, schema(db), strict=True):
            should = missing.pop(name, None)
            if should is None:
                strange.append((number, "\n".join((kind, name, of, sql))))
            elif (kind, of, same_sql(sql)) != (should[0], should[2], same_sql(should[3])):
                _enter_schema(db, number, should)
        for number, text in strange:
            like = {"\n".join(entry): entry for entry in missing.values()}
            for close in difflib.get_close_matches(text, like, n=1, cutoff=0.9):
                _enter_schema(db, number, missing.pop(like[close][1]))
    except (sqlite3.Error, OverflowError, UnicodeDecodeError):
        pass  # it is read as far as it can be
    finally:
        db.close()


def _enter_schema(db: sqlite3.Connection, number: int, entry: tuple[str, str, str, str]) -> None:
    kind, name, of, sql = entry
    db.execute(
        "UPDATE sqlite_master SET type = ?, name = ?, tbl_name = ?, sql = ? WHERE rowid = ?",
        (kind, name, of, sql or None, number),
    )


def _plain(value: object) -> object:
    """What JSON and SQLite can hold of a value that may be damaged."""
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(text, str) else text


def _readable(db: sqlite3.Connection, table: str) -> Iterator[dict[str, Any]]:
    """Rows up to the first that cannot be read, then those from the other end; some may come twice."""
    for order in ("ASC", "DESC"):
        try:
            for row in db.execute(f"SELECT * FROM {table} ORDER BY id {order}"):
                yield dict(row)
            return
        except (sqlite3.Error, OverflowError, UnicodeDecodeError):
            continue
