"""Care for a memory folder: is all as it was written, mend what can be mended, give back space.

Reads segments by their checksums alone: no span is decoded, and no codec, codebook or faiss is needed.
Holds one chunk of tokens and 8 bytes a span in memory, however large the folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamvid.budget import Limits
from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.catalog import FILE_NAME, Catalog, NewerCatalogError, SourceRecord, SpanRecord, State
from streamvid.memory.keys import MemoryKey
from streamvid.memory.segments import (
    SegmentReader,
    SpanHead,
    file_header,
    header_key,
    intact_header,
    keys_copy,
    segment_name,
    sync_folder,
    write_at,
)

LISTED = 1000
"""Problems that are listed; more are counted."""

BLOCK_BYTES = 1 << 20

BROKEN = "broken"
"""Folder in the memory folder for what a repair set aside; it may be deleted."""

INCOMING = "incoming"
"""Folder in the memory folder for a source that is not all there yet."""

Progress = Callable[[int, int], None]
"""Told bytes read so far and bytes in all."""


class Kind(StrEnum):
    """What is not as written."""

    CATALOGUE = "catalogue"
    """The catalogue as a whole: mended by building it anew from the segments."""

    ROW = "row"
    """What the catalogue says of a span: mended from the span."""

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


@dataclass(slots=True)
class Verified:
    """What a verification found."""

    sources: int = 0
    spans: int = 0
    num_bytes: int = 0
    """Read from segment files."""

    loose_bytes: int = 0
    """Of no span: removed ones, or an unfinished write; `compact` gives them back."""

    problems: list[Problem] = field(default_factory=list)
    """The first 1000."""

    num_problems: int = 0
    notes: list[str] = field(default_factory=list)
    _books: set[str] = field(default_factory=set)
    _removed: dict[tuple[Fraction, Fraction], tuple[str, int]] | None = None
    """Whole spans that no row names, by time; only collected for a repair."""

    def add(self, problem: Problem) -> None:
        """Count a problem, and list it while the list is short."""
        self.num_problems += 1
        if len(self.problems) < LISTED:
            self.problems.append(problem)


@dataclass(slots=True)
class Repaired:
    """What a repair did, or would do."""

    done: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """What is not remembered any more."""

    lost_spans: int = 0
    left: list[str] = field(default_factory=list)
    """What could not be mended."""


@dataclass(slots=True)
class Compacted:
    """What a compaction gave back."""

    before_bytes: int = 0
    after_bytes: int = 0
    sources: int = 0
    """Whose files were written anew."""

    notes: list[str] = field(default_factory=list)


def verify(bank: Bank, sources: Iterable[SourceRecord] | None = None, *, progress: Progress | None = None) -> Verified:
    """Read everything that is remembered and compare it with its checksums; changes nothing.

    Finds every changed byte of segment files and codebooks.  Of the catalogue it checks the structure of the
    file (SQLite's ``integrity_check``), each span's row and keys against the segment's own, each source
    against its digest, and the counts.  Names, paths, dates, answers, gaps and saved indexes have no second
    copy: a changed letter in them is not seen.  Bytes after the last span of a source's last file may be a
    killed writer's unfinished span and are only counted.

    Args:
        bank: may be open for reading only, and may be written meanwhile.
        sources: which; None for all, with catalogue and codebooks.
        progress: told after each span.
    """
    catalog, seen = bank._catalog, Verified()
    try:
        if sources is None:
            for line in catalog.integrity():
                seen.add(Problem(Kind.CATALOGUE, f"the catalogue is damaged: {line}"))
        known = catalog.source_ids() if sources is None else [s.id for s in sources]
        total = catalog.segment_bytes() if sources is None else sum(s.num_bytes for s in _records(catalog, known))
    except BankError as error:
        seen.add(Problem(Kind.CATALOGUE, str(error)))
        return seen
    for source_id in known:
        try:
            source = catalog.source_by_id(source_id)
            if source is None:
                continue
            seen.sources += 1
            for problem in _examine(bank, source, seen, progress, total):
                seen.add(problem)
        except BankError as error:
            seen.add(Problem(Kind.CATALOGUE, str(error), source_id))
    for problem in _codebooks(bank.folder / "codebooks", seen._books, every=sources is None):
        seen.add(problem)
    return seen


def repair(folder: Path, *, dry_run: bool = False, progress: Progress | None = None) -> Repaired:
    """Mend a memory folder as far as it can be.

    A lost or damaged catalogue is built anew from the segments; names, answers and gaps are taken over as
    far as the old one can be read, which stays beside it as ``catalog.sqlite3.broken-N``.  Rows and keys are
    mended from the segments and the other way round.  Damaged spans are forgotten and entered as expired;
    files they lay in, and files of no source, are moved to ``FOLDER/broken``.  Whenever it is killed, running
    it again finishes it.

    Args:
        folder: of the memory.
        dry_run: only say what would be done.
        progress: told after each span.

    Raises:
        BankError: if this is no memory folder, is from a newer version, or is being written.
    """
    result = Repaired()
    reason = _catalogue_damage(folder)
    with ExitStack() as stack:
        if reason and dry_run:
            built = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamvid-"))) / FILE_NAME
            _build(folder, built, result, dry_run=True)
            bank = stack.enter_context(Bank(folder, Catalog(built), codec="fp16", limits=Limits(), segment_bytes=1))
        else:
            if reason:
                _rebuild(folder, result)
            bank = stack.enter_context(Bank.open(folder, create=False, read_only=dry_run))
            if bank.read_only and not dry_run:
                raise BankError(
                    f"{folder} cannot be written: repair it where it can be, or make a copy and repair that"
                )
        if reason:
            result.done.insert(0, f"catalogue built anew from the segments: {reason}")
        seen = Verified()
        total = bank._catalog.segment_bytes()
        for source in bank.sources():
            try:
                with ExitStack() as held:
                    if not dry_run:
                        held.enter_context(bank._locked(source.key, source.name))
                    _mend(bank, source, seen, result, progress, total, dry_run=dry_run)
            except BankError as error:
                result.left.append(str(error))
        _set_aside_orphans(bank, result, dry_run=dry_run)
        result.left += [p.text for p in _codebooks(folder / "codebooks", seen._books, every=True)]
    return result


def compact(bank: Bank) -> Compacted:
    """Give back the space of removed spans, unfinished writes and rows that are gone.

    Files are written anew under new names, then the catalogue points there in one transaction, then the old
    ones go: readers see one or the other.  Needs as much free space as the largest source.  A source that is
    being written is left for another time.

    Raises:
        BankError: if the folder cannot be written, the disk is full, or a segment is missing.
    """
    if bank.read_only:
        raise BankError(f"{bank.folder} is open for reading only; compact it where it can be written")
    result = Compacted(before_bytes=_folder_bytes(bank.folder))
    for source in bank.sources():
        try:
            lock = bank._locked(source.key, source.name)
            lock.__enter__()
        except BankError as error:
            result.notes.append(str(error))
            continue
        try:
            fresh = bank._catalog.source_by_id(source.id)
            if fresh is not None and _rewrite(bank, fresh):
                result.sources += 1
        finally:
            lock.__exit__(None, None, None)
    bank._sweep()
    _clear_incoming(bank.folder)
    bank._catalog.vacuum()
    result.after_bytes = _folder_bytes(bank.folder)
    return result


def _clear_incoming(folder: Path) -> None:
    """What killed imports left."""
    for entry in sorted((folder / INCOMING).glob("*")):
        with open(folder / "locks" / f"{entry.name[:32]}.lock", "a+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(entry)


def _records(catalog: Catalog, ids: Iterable[int]) -> Iterator[SourceRecord]:
    for source_id in ids:
        source = catalog.source_by_id(source_id)
        if source is not None:
            yield source


def _examine(
    bank: Bank, source: SourceRecord, seen: Verified, progress: Progress | None, total: int
) -> Iterator[Problem]:
    """Everything about one source that is not as written; counts what it reads into ``seen``."""
    catalog = bank._catalog
    folder = bank.folder / source.folder
    unclaimed = _segment_files(folder)
    yield from _examine_rows(catalog, source)
    entries = catalog.entries(catalog.span_ids(source.id, by_place=True))
    last = catalog.execute("SELECT MAX(file) FROM spans WHERE source_id = ?", source.id).fetchone()[0]
    for name, group in itertools.groupby(entries, key=lambda entry: entry[0].file):
        unclaimed.pop(name, None)
        for problem in _examine_file(folder / name, source, group, seen, tail=name == last):
            if problem.span is not None and _moved(catalog, problem.span):
                note = f"{source.name} changed while it was read; verify it again when its writer is done"
                if note not in seen.notes:
                    seen.notes.append(note)
                continue
            yield problem
        if progress is not None:
            progress(seen.num_bytes, max(total, seen.num_bytes))
    seen.loose_bytes += sum(unclaimed.values())


def _moved(catalog: Catalog, span: SpanRecord) -> bool:
    now = catalog.span(span.id)
    return now is None or (now.file, now.offset) != (span.file, span.offset)


def _foreign(path: Path, source: SourceRecord) -> bool:
    """Whether a file is a whole one, of another source."""
    try:
        return header_key(path).digest != source.key.digest
    except (BankError, ValueError, TypeError):
        return False


def _examine_rows(catalog: Catalog, source: SourceRecord) -> Iterator[Problem]:
    """What the catalogue says twice."""
    count = tokens = 0
    before: Fraction | None = None
    with catalog.snapshot():
        now = catalog.source_by_id(source.id)
        rows = catalog.execute(
            "SELECT id, start, stop, start_seconds, stop_seconds, tokens FROM spans WHERE source_id = ? "
            "ORDER BY ordinal",
            source.id,
        )
        problems = []
        for row in rows:
            count, tokens = count + 1, tokens + row["tokens"]
            start, stop = Fraction(row["start"]), Fraction(row["stop"])
            if (float(start), float(stop)) != (row["start_seconds"], row["stop_seconds"]):
                problems.append(f"two times of span {row['id']} differ")
            if before is not None and start < before:
                problems.append(f"span {row['id']} stands out of its order")
            before = start
    if now is None:
        return
    for text in problems:
        yield Problem(Kind.ROW, f"{source.name}: the catalogue's {text}", source.id)
    for name, said, counted in (("spans", now.spans, count), ("tokens", now.tokens, tokens)):
        if said != counted:
            yield Problem(Kind.TALLY, f"{source.name}: the catalogue says {said} {name} and has {counted}", source.id)


def _examine_file(
    path: Path, source: SourceRecord, entries: Iterable[tuple[SpanRecord, Tensor]], seen: Verified, *, tail: bool
) -> Iterator[Problem]:
    file = f"{source.folder}/{path.name}"

    def problem(kind: Kind, text: str, *, offset: int | None = None, span: SpanRecord | None = None) -> Problem:
        return Problem(kind, f"{source.name}: {file}: {text}", source.id, file, offset, span)

    try:
        reader = SegmentReader(path, key=source.key)
    except BankError as error:
        if path.exists() and not _foreign(path, source):
            kind = Kind.NEWER if intact_header(_start(path, source)) else Kind.HEADER
            yield problem(kind, str(error), offset=0)
            return
        reason = "belongs to another source" if path.exists() else "is missing"
        for row, _ in entries:
            yield problem(Kind.SPAN, f"the file {reason}, span {_times(row)} with it", offset=row.offset, span=row)
        return
    with reader:
        place = len(file_header(source.key))
        for row, keys in entries:
            seen.spans += 1
            if row.offset > place:
                for text in _examine_loose(reader, place, row.offset, seen):
                    yield problem(Kind.LOOSE, text, offset=place)
            try:
                head = reader.head(row.offset)
            except BankError as error:
                kind = Kind.NEWER if reader.intact_head(row.offset) else Kind.SPAN
                end = row.offset + row.num_bytes
                if kind is Kind.NEWER or end >= path.stat().st_size or reader.intact_head(end):
                    place = max(place, end)  # it lay here; else the row may be what is wrong
                yield problem(kind, f"span {_times(row)}: {error}", offset=row.offset, span=row)
                continue
            place = max(place, row.offset + head.num_bytes)
            seen._books |= {book for book in head.books if book}
            try:
                reader.check(head)
            except BankError as error:
                yield problem(Kind.SPAN, f"span {_times(row)}: {error}", offset=row.offset, span=row)
                continue
            wrong = _differences(row, head)
            if wrong:
                yield problem(Kind.ROW, f"span {_times(row)}: the catalogue says {wrong}", offset=row.offset, span=row)
            try:
                if not torch.equal(reader.keys(row.offset), keys):
                    yield problem(
                        Kind.ROW, f"span {_times(row)}: the catalogue's keys differ", offset=row.offset, span=row
                    )
            except BankError as error:
                kind = Kind.KEYS if keys.shape == head.key_shape else Kind.SPAN
                yield problem(kind, f"span {_times(row)}: {error}", offset=row.offset, span=row)
        size = path.stat().st_size
        if size > place:
            texts = list(_examine_loose(reader, place, size, seen))
            for text in texts if not tail else []:
                yield problem(Kind.LOOSE, text, offset=place)
        seen.num_bytes += reader.bytes_read


def _examine_loose(reader: SegmentReader, start: int, stop: int, seen: Verified) -> Iterator[str]:
    """Bytes between spans: removed spans, whole; anything else is damage."""
    seen.loose_bytes += stop - start
    file = reader.path.name
    while start < stop:
        try:
            head = reader.head(start)
            reader.check(head)
            reader.keys(start)
            if start + head.num_bytes > stop:
                raise BankError("it reaches into the next span")
        except BankError:
            if not reader.intact_head(start):
                yield f"bytes {start} to {stop - 1} are of no span and not as any was written"
            return
        if seen._removed is not None:
            seen._removed[head.start, head.stop] = file, start
        start += head.num_bytes


def _differences(row: SpanRecord, head: SpanHead) -> str:
    said = (row.start, row.stop, row.tokens, row.grid, row.num_bytes, row.codec)
    true = (head.start, head.stop, head.tokens, head.grid, head.num_bytes, head.codecs[0])
    names = ("start", "stop", "tokens", "grid", "bytes", "codec")
    return ", ".join(f"{n} {a} and the span {b}" for n, a, b in zip(names, said, true, strict=True) if a != b)


def _codebooks(folder: Path, needed: set[str], *, every: bool) -> Iterator[Problem]:
    there = {path.stem: path for path in sorted(folder.glob("*.book"))}
    for digest in sorted(needed - there.keys()):
        yield Problem(
            Kind.CODEBOOK,
            f"codebook {digest} is missing and spans need it: restore {folder / digest}.book from a copy",
            file=f"codebooks/{digest}.book",
        )
    for digest, path in there.items():
        if (every or digest in needed) and _digest(path) != digest:
            yield Problem(
                Kind.CODEBOOK,
                f"codebook {path} is damaged: its bytes do not give its name; restore it from a copy",
                file=f"codebooks/{path.name}",
            )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _mend(
    bank: Bank,
    source: SourceRecord,
    seen: Verified,
    result: Repaired,
    progress: Progress | None,
    total: int,
    *,
    dry_run: bool,
) -> None:
    """Mend one source, which is held for writing unless it is a dry run."""
    catalog, folder = bank._catalog, bank.folder / source.folder
    _mend_headers(folder, source, result, dry_run=dry_run)
    seen._removed = {}
    gone: list[SpanRecord] = []
    reasons: list[str] = []
    spoiled: set[str] = set()
    touched = False
    for problem in _examine(bank, source, seen, progress, total):
        if problem.kind in (Kind.NEWER, Kind.CODEBOOK):
            result.left.append(problem.text)
        elif problem.kind is Kind.HEADER:
            if not dry_run:
                result.left.append(problem.text)
        elif problem.kind is Kind.SPAN:
            assert problem.span is not None
            gone.append(problem.span)
            reasons.append(problem.text)
        elif problem.kind is Kind.LOOSE:
            spoiled.add(Path(problem.file).name)
            result.done.append(f"{problem.text}: the file is written anew without them")
        else:
            touched = True
            result.done.append(f"{problem.text}: mended")
            if not dry_run and problem.span is not None:
                _mend_span(bank, source, problem.span, problem.kind)
            elif not dry_run and problem.kind is Kind.ROW:
                _mend_times(catalog, source)
    found = {span.id: seen._removed[span.start, span.stop] for span in gone if (span.start, span.stop) in seen._removed}
    for span, reason in zip(gone, reasons, strict=True):
        if span.id in found:
            result.done.append(f"{reason}: found at another place")
            continue
        spoiled.add(span.file)
        result.lost_spans += 1
        if len(result.lost) < LISTED:
            result.lost.append(reason)
    if dry_run:
        return
    if gone or touched:
        with catalog.transaction():
            for span in gone:
                if span.id in found:
                    catalog.execute("UPDATE spans SET file = ?, offset = ? WHERE id = ?", *found[span.id], span.id)
                else:
                    _expire(catalog, span, "damaged")
            _count(catalog, source.id)
    for span in gone:
        if span.id in found:
            _mend_span(bank, source, catalog.span(span.id) or span, Kind.ROW)
    _cut_tail(bank, source, result)
    if spoiled:
        for name in sorted(spoiled):
            if (folder / name).exists():
                kept = _set_aside(bank.folder, folder / name, copy=True)
                result.done.append(f"{source.folder}/{name} is kept as {kept}")
        fresh = catalog.source_by_id(source.id)
        assert fresh is not None
        _rewrite(bank, fresh)


def _mend_headers(folder: Path, source: SourceRecord, result: Repaired, *, dry_run: bool) -> None:
    header = file_header(source.key)
    for name in _segment_files(folder):
        start = _start(folder / name, source)
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


def _mend_span(bank: Bank, source: SourceRecord, span: SpanRecord, kind: Kind) -> None:
    """Make catalogue and segment say the same of one span, by the one whose checksum holds."""
    catalog, path = bank._catalog, bank.folder / source.folder / span.file
    with SegmentReader(path, key=source.key) as reader:
        head = reader.head(span.offset)
        if kind is Kind.KEYS:
            [(_, keys)] = catalog.entries([span.id])
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                place, data = keys_copy(head, keys)
                write_at(fd, data, place)
                os.fsync(fd)
            finally:
                os.close(fd)
            return
        own: Tensor | None
        try:
            own = reader.keys(span.offset)
        except BankError:  # the catalogue's are the better ones
            own = None
    with catalog.transaction():
        catalog.execute("DELETE FROM snapshots")  # they may hold the keys it had
        if own is not None:
            catalog.execute("DELETE FROM keys WHERE span_id = ?", span.id)
            _insert(catalog, "keys", span_id=span.id, width=own.shape[1], vectors=own.numpy().astype("<f4").tobytes())
        columns = span_columns(head)
        catalog.execute(
            f"UPDATE spans SET {', '.join(f'{name} = ?' for name in columns)} WHERE id = ?", *columns.values(), span.id
        )


def _mend_times(catalog: Catalog, source: SourceRecord) -> None:
    """Make the rounded times of all spans, and their order, follow from the exact ones."""
    with catalog.transaction():
        rows = catalog.execute("SELECT id, start, stop FROM spans WHERE source_id = ?", source.id)
        for row in rows.fetchall():
            catalog.execute(
                "UPDATE spans SET start_seconds = ?, stop_seconds = ? WHERE id = ?",
                float(Fraction(row["start"])),
                float(Fraction(row["stop"])),
                row["id"],
            )
        _number(catalog, source.id)


def span_columns(head: SpanHead) -> dict[str, object]:
    """What the catalogue says of a span, as far as the span itself says it."""
    return {
        "start": str(head.start),
        "stop": str(head.stop),
        "start_seconds": float(head.start),
        "stop_seconds": float(head.stop),
        "tokens": head.tokens,
        "offset": head.offset,
        "bytes": head.num_bytes,
        "grid": f"[{', '.join(map(str, head.grid))}]",
        "codec": head.codecs[0],
    }


def enter_spans(
    catalog: Catalog,
    source: SourceRecord,
    folder: Path,
    entries: Iterable[tuple[SegmentReader, SpanHead, int]],
) -> None:
    """Enter spans in a caller's transaction, in the order given, then count.

    Args:
        catalog: in a transaction.
        source: theirs, without spans.
        folder: their segment files, for the size of the source.
        entries: reader, head and level of each; keys are read from the segment.
    """
    for ordinal, (reader, head, level) in enumerate(entries):
        keys = reader.keys(head.offset)
        span_id = _insert(
            catalog,
            "spans",
            source_id=source.id,
            ordinal=ordinal,
            file=reader.path.name,
            level=level,
            **span_columns(head),
        )
        _insert(catalog, "keys", span_id=span_id, width=keys.shape[1], vectors=keys.numpy().astype("<f4").tobytes())
    _count(catalog, source.id)
    catalog.execute("UPDATE sources SET bytes = ? WHERE id = ?", sum(_segment_files(folder).values()), source.id)


def insert_source(catalog: Catalog, key: MemoryKey, told: dict[str, Any], *, source_id: int | None = None) -> int:
    """Enter a source without spans in a caller's transaction; returns its id.

    Args:
        catalog: in a transaction.
        key: of the source.
        told: its other columns, by name.
        source_id: None for a fresh one.
    """
    columns = {
        "path": "",
        "name": key.short,
        "created": _now(),
        "state": State.OPEN.value,
        "summary": "{}",
        **{name: told[name] for name in SOURCE_COLUMNS if told.get(name) is not None},
    }
    ids = {} if source_id is None else {"id": source_id}
    return _insert(catalog, "sources", **ids, digest=key.digest, key=key.to_json(), **columns)


SOURCE_COLUMNS = ("path", "name", "created", "state", "duration", "summary", "stop", "pinned")
"""What the segments do not say of a source."""

HISTORY = {
    "answers": ("question", "answer", "receipt", "created"),
    "gaps": ("start", "stop", "reason", "created"),
    "expired": ("start", "stop", "spans", "tokens", "reason", "created"),
}
"""Tables that go with a source and are told by nothing but the catalogue, with their columns."""


def insert_history(catalog: Catalog, table: str, source_id: int, row: dict[str, Any]) -> None:
    """Enter a row of one of the `HISTORY` tables in a caller's transaction."""
    _insert(catalog, table, source_id=source_id, **{name: row[name] for name in HISTORY[table]})


def _insert(catalog: Catalog, table: str, **columns: object) -> int:
    cursor = catalog.execute(
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", *columns.values()
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _expire(catalog: Catalog, span: SpanRecord, reason: str) -> None:
    catalog.execute("DELETE FROM spans WHERE id = ?", span.id)
    told = {
        "start": str(span.start),
        "stop": str(span.stop),
        "spans": 1,
        "tokens": span.tokens,
        "reason": reason,
        "created": _now(),
    }
    insert_history(catalog, "expired", span.source_id, told)


def _count(catalog: Catalog, source_id: int) -> None:
    catalog.execute(
        "UPDATE sources SET spans = (SELECT COUNT(*) FROM spans WHERE source_id = sources.id), "
        "tokens = (SELECT COALESCE(SUM(tokens), 0) FROM spans WHERE source_id = sources.id), "
        # A source goes on where it was, even if its end was lost: the loss is told as expired.
        "stop = COALESCE(stop, "
        "(SELECT stop FROM spans WHERE source_id = sources.id ORDER BY stop_seconds DESC LIMIT 1)) WHERE id = ?",
        source_id,
    )


def _cut_tail(bank: Bank, source: SourceRecord, result: Repaired) -> None:
    """Cut the unfinished write of a killed writer off the last file."""
    row = bank._catalog.execute(
        "SELECT file, MAX(offset + bytes) AS stop FROM spans WHERE source_id = ? "
        "GROUP BY file ORDER BY file DESC LIMIT 1",
        source.id,
    ).fetchone()
    if row is None:
        return
    path = bank.folder / source.folder / row["file"]
    if path.exists() and path.stat().st_size > row["stop"]:
        result.done.append(
            f"{source.folder}/{row['file']}: {path.stat().st_size - row['stop']} bytes after its end cut"
        )
        os.truncate(path, row["stop"])


def _set_aside(folder: Path, path: Path, *, copy: bool = False) -> str:
    """Move or copy something into ``FOLDER/broken`` under a name that is free there; returns where, relative."""
    target = folder / BROKEN
    target.mkdir(exist_ok=True)
    name = "-".join(path.relative_to(folder).parts[1:])
    number = next(n for n in itertools.count(1) if not (target / f"{name}.{n}").exists())
    if copy:
        temporary = target / f"{name}.{number}.tmp"
        shutil.copyfile(path, temporary)
        os.replace(temporary, target / f"{name}.{number}")
    else:
        os.rename(path, target / f"{name}.{number}")
    sync_folder(target)
    return f"{BROKEN}/{name}.{number}"


def _set_aside_orphans(bank: Bank, result: Repaired, *, dry_run: bool) -> None:
    """Files and folders of no source."""
    folders = list((bank.folder / "segments").iterdir())
    known = {source.folder for source in bank.sources()}
    for path in sorted(folders):
        if f"segments/{path.name}" not in known:
            where = BROKEN if dry_run else _set_aside(bank.folder, path)
            result.done.append(f"segments/{path.name} is of no source: moved to {where}")


def _rewrite(bank: Bank, source: SourceRecord) -> bool:
    """Write the files of a source anew from the first with loose bytes on; it is held for writing."""
    catalog, folder = bank._catalog, bank.folder / source.folder
    lead = len(file_header(source.key))
    sizes = _segment_files(folder)
    live = {
        row["file"]: int(row["live"]) + lead
        for row in catalog.execute(
            "SELECT file, SUM(bytes) AS live FROM spans WHERE source_id = ? GROUP BY file", source.id
        )
    }
    missing = sorted(live.keys() - sizes.keys())
    if missing:
        raise BankError(f"{folder / missing[0]} is missing; run: streamvid memory repair --memory {bank.folder}")
    holed = sorted(name for name in live if sizes[name] != live[name])
    stale = [name for name in sizes if name not in live or (holed and name >= holed[0])]
    if not stale:
        return False
    if holed:
        number = int(Path(max(sizes)).stem) + 1
        # The last files stay the last: where a source ends is told by the names.
        ids = catalog.span_ids(source.id, by_place=True)
        moving = (span for span, _ in catalog.entries(ids) if span.file >= holed[0])
        fresh: list[Path] = []
        try:
            places = list(_copy_spans(folder, source.key, moving, number, bank._segment_bytes, fresh))
        except OSError as error:
            for path in fresh:
                path.unlink(missing_ok=True)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise BankError(
                f"cannot compact {source.name}: "
                + ("the disk is full; free some space" if full else f"{error.strerror}; check the folder")
                + f" and run again; nothing was changed in {bank.folder}"
            ) from error
        sync_folder(folder)
        with catalog.transaction():
            for span_id, file, offset in places:
                catalog.execute(
                    "UPDATE spans SET file = ?, offset = ? WHERE id = ?", segment_name(file), offset, span_id
                )
            total = sum(n for name, n in _segment_files(folder).items() if name not in stale)
            catalog.execute("UPDATE sources SET bytes = ? WHERE id = ?", total, source.id)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    if not holed:
        with catalog.transaction():
            total = sum(_segment_files(folder).values())
            catalog.execute("UPDATE sources SET bytes = ? WHERE id = ?", total, source.id)
    return True


def _copy_spans(
    folder: Path, key: MemoryKey, spans: Iterable[SpanRecord], number: int, limit: int, fresh: list[Path]
) -> Iterator[tuple[int, int, int]]:
    """Copy spans into new files from ``number`` on; yields id, number of the file and offset there."""
    header = file_header(key)
    name, source_fd, fd, end = "", -1, -1, 0
    try:
        for span in spans:
            if span.file != name:
                if source_fd >= 0:
                    os.close(source_fd)
                name, source_fd = span.file, os.open(folder / span.file, os.O_RDONLY | os.O_CLOEXEC)
            if fd < 0 or end + span.num_bytes > limit:
                if fd >= 0:
                    os.fsync(fd)
                    os.close(fd)
                    number += 1
                path = folder / segment_name(number)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                fresh.append(path)
                write_at(fd, header, 0)
                end = len(header)
            yield span.id, number, end
            for data in blocks(source_fd, span.offset, span.num_bytes):
                write_at(fd, data, end)
                end += len(data)
        if fd >= 0:
            os.fsync(fd)
    finally:
        for one in (source_fd, fd):
            if one >= 0:
                os.close(one)


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


def _catalogue_damage(folder: Path) -> str:
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
            found = catalog.integrity()
            for source_id in [] if found else catalog.source_ids():
                catalog.source_by_id(source_id)
                for _ in catalog.entries(catalog.span_ids(source_id)):
                    pass
                list(_examine_times(catalog, source_id))
        return found[0] if found else ""
    except NewerCatalogError:
        raise
    except (BankError, ValueError, ZeroDivisionError) as error:
        if not kept or not os.access(path, os.R_OK):
            raise
        return str(error).split(";")[0]


def _examine_times(catalog: Catalog, source_id: int) -> Iterator[tuple[Fraction, Fraction]]:
    for table in ("gaps", "expired"):
        for row in catalog.execute(f"SELECT start, stop FROM {table} WHERE source_id = ?", source_id):
            yield Fraction(row["start"]), Fraction(row["stop"])


def _rebuild(folder: Path, result: Repaired) -> None:
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
        _build(folder, built, result, dry_run=False)
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


def _build(folder: Path, built: Path, result: Repaired, *, dry_run: bool) -> None:
    """Make a catalogue from the segments, with what can be read of the old one."""
    old = _Salvage(folder / FILE_NAME)
    with Catalog(built) as catalog, catalog.transaction():
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
                result.lost.append(f"segments/{path.name}: name, path and answers of source {source_id}")
            insert_source(catalog, key, told, source_id=source_id)
            source = catalog.source_by_id(source_id)
            assert source is not None
            if not dry_run:
                _mend_headers(path, source, result, dry_run=False)
            live = old.live(source_id)
            enter_spans(catalog, source, path, _walk(path, key, live, result))
            now = catalog.source_by_id(source_id)
            if live is not None and now is not None and now.spans < len(live):
                # A row told a wrong place, or spans are lost: better too many than too few.
                catalog.execute("DELETE FROM spans WHERE source_id = ?", source_id)
                enter_spans(catalog, source, path, _walk(path, key, None, result))
            _order(catalog, source_id)
            for table in HISTORY:
                for row in old.history(table, source_id):
                    insert_history(catalog, table, source_id, row)


def _folder_key(folder: Path) -> MemoryKey | None:
    for path in sorted(folder.glob("*.seg")):
        try:
            return header_key(path)
        except BankError:
            continue
    return None


def _walk(
    folder: Path, key: MemoryKey, live: dict[tuple[str, int], int] | None, result: Repaired
) -> Iterator[tuple[SegmentReader, SpanHead, int]]:
    """The spans that lie in a folder, in the order they were written; ``live`` says which count and their level."""
    for name in sorted(_segment_files(folder)):
        header = file_header(key)
        with open(folder / name, "rb") as file:
            start = file.read(len(header))
        try:
            reader = SegmentReader(folder / name, key=key)
        except BankError as error:
            if intact_header(start):
                raise
            result.lost.append(f"{error}")
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
                        result.lost.append(f"{folder / name}: the span at {place} lost its keys or its end")
                    place = _next_span(folder / name, place + 1, size)
                    continue
                if live is None:
                    yield reader, head, 0
                elif (name, place) in live:
                    yield reader, head, live[name, place]
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
    rows = catalog.execute(
        "SELECT id, start_seconds, stop_seconds FROM spans WHERE source_id = ? ORDER BY id", source_id
    )
    latest = float("-inf")
    merged = []
    for row in rows:
        if row["start_seconds"] < latest:
            merged.append((row["start_seconds"], row["stop_seconds"], row["id"]))
        latest = max(latest, row["start_seconds"])
    for start, stop, span_id in merged:
        catalog.execute(
            "DELETE FROM spans WHERE source_id = ? AND start_seconds >= ? AND stop_seconds <= ? AND id < ?",
            source_id,
            start,
            stop,
            span_id,
        )
    _number(catalog, source_id)
    _count(catalog, source_id)


def _number(catalog: Catalog, source_id: int) -> None:
    """Ordinals in time order."""
    # Negative first: an ordinal is taken by one span at a time.
    catalog.execute(
        "UPDATE spans SET ordinal = -1 - ranked.place FROM (SELECT id, ROW_NUMBER() OVER (ORDER BY start_seconds, id) "
        "- 1 AS place FROM spans WHERE source_id = ?) AS ranked WHERE ranked.id = spans.id",
        source_id,
    )
    catalog.execute("UPDATE spans SET ordinal = -1 - ordinal WHERE source_id = ?", source_id)


class _Salvage:
    """What can still be read of a damaged catalogue; whatever makes no sense is left out."""

    def __init__(self, path: Path) -> None:
        self._tables: dict[str, list[dict[str, Any]]] = {}
        if not path.exists() or not path.stat().st_size:
            return
        with tempfile.TemporaryDirectory(prefix="streamvid-") as folder:
            for suffix in ("", "-wal"):
                if Path(f"{path}{suffix}").exists():
                    shutil.copyfile(f"{path}{suffix}", Path(folder) / f"{FILE_NAME}{suffix}")
            db = sqlite3.connect(Path(folder) / FILE_NAME)
            try:
                db.row_factory = sqlite3.Row
                db.text_factory = lambda data: data.decode("utf-8", "replace")
                for table in ("sources", "spans", *HISTORY):
                    self._tables[table] = list(_readable(db, table))
            finally:
                db.close()

    def key(self, number: str) -> MemoryKey | None:
        """The key of the source with this id."""
        for row in self._tables.get("sources", []):
            try:
                key = MemoryKey.from_json(row["key"])
            except (ValueError, TypeError):
                continue
            if str(row["id"]) == number and key.digest == row["digest"]:
                return key
        return None

    def source(self, key: MemoryKey) -> dict[str, Any]:
        """Its columns that the segments do not say; empty if they are lost."""
        for row in self._tables.get("sources", []):
            if row["digest"] == key.digest or row["key"] == key.to_json():
                try:
                    State(row["state"])
                    datetime.fromisoformat(row["created"])
                    json.loads(row["summary"])
                    for name in ("duration", "stop"):
                        Fraction(row[name] or 0)
                except (ValueError, TypeError, ZeroDivisionError):
                    return {"name": str(row["name"]), "path": str(row["path"])}
                return row
        return {}

    def live(self, source_id: int) -> dict[tuple[str, int], int] | None:
        """Level by file and offset of its spans; None if not all can be read."""
        rows = [row for row in self._tables.get("spans", []) if row["source_id"] == source_id]
        said = [row["spans"] for row in self._tables.get("sources", []) if row["id"] == source_id]
        places = {(row["file"], row["offset"]): row.get("level", 0) for row in rows}
        return places if said == [len(places)] else None

    def history(self, table: str, source_id: int) -> Iterator[dict[str, Any]]:
        """Its rows of one of the `HISTORY` tables."""
        for row in self._tables.get(table, []):
            try:
                datetime.fromisoformat(row["created"])
                for name in ("start", "stop"):
                    Fraction(row.get(name, 0))
                json.loads(row.get("receipt", "{}"))
            except (ValueError, TypeError, ZeroDivisionError):
                continue
            if row["source_id"] == source_id:
                yield row


def _readable(db: sqlite3.Connection, table: str) -> Iterator[dict[str, Any]]:
    """Rows up to the first that cannot be read, then the same from the other end."""
    seen: set[int] = set()
    for order in ("ASC", "DESC"):
        try:
            for row in db.execute(f"SELECT * FROM {table} ORDER BY id {order}"):
                if row["id"] in seen:
                    break
                seen.add(row["id"])
                yield dict(row)
        except sqlite3.Error:
            continue


def _segment_files(folder: Path) -> dict[str, int]:
    """Sizes by name, in order."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.seg"))}


def _start(path: Path, source: SourceRecord) -> bytes:
    """As much of a file as its header should have."""
    with open(path, "rb") as file:
        return file.read(len(file_header(source.key)))


def _times(span: SpanRecord) -> str:
    return f"{float(span.start):.3f}-{float(span.stop):.3f} s"


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _now() -> str:
    return datetime.now(UTC).isoformat()
