"""Is all as it was written?  Reads a memory folder against its checksums and changes nothing.

Reads segments by their checksums alone: no span is decoded, and no codec, codebook or faiss is needed.
Holds one chunk of tokens and 8 bytes a span in memory, however large the folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.beside import Books, examine_codebooks, examine_spare
from streamvid.memory.care import LISTED, UNREADABLE, Kind, Problem, Progress, segment_files, start_bytes, times
from streamvid.memory.catalog import Catalog
from streamvid.memory.prefix import intact_tokens
from streamvid.memory.records import SourceRecord, SpanRecord
from streamvid.memory.segment_format import SpanHead, file_header, header_key, intact_header
from streamvid.memory.segments import SegmentReader


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
    _books: Books = field(default_factory=Books)
    _removed: dict[tuple[Fraction, Fraction], tuple[str, int]] | None = None
    """Whole spans that no row names, by time; only collected for a repair."""

    def add(self, problem: Problem) -> None:
        """Count a problem, and list it while the list is short."""
        self.num_problems += 1
        if len(self.problems) < LISTED:
            self.problems.append(problem)


MEANING = {
    "sources": "its name, path, dates, summary or counts may be wrong",
    "spans": "its time, place or level may be wrong",
    "answers": "a question, its answer or the receipt may be wrong",
    "gaps": "where nothing was seen, or why, may be wrong",
    "expired": "what was expired, or why, may be wrong",
    "snapshots": "a saved index may be taken for another",
    "digests": "a file may be taken for another",
    "migrations": "when the format was brought up to date may be wrong",
    "last_ids": "an id may be given twice",
}
"""What it means that a row is not as it was written."""

SPARE_TABLES = ("snapshots", "digests")
"""Whose rows can be made anew."""


def verify(bank: Bank, sources: Iterable[SourceRecord] | None = None, *, progress: Progress | None = None) -> Verified:
    """Read everything that is remembered and compare it with its checksums; changes nothing.

    Finds every changed byte of segment files, codebooks, saved indexes, kept keys and values, and of what the
    catalogue says: each row has a checksum of its own, tables and indexes must be as they were made, SQLite's
    ``integrity_check`` must hold, and rows must say what the segments say.  Bytes after the last span of a
    source's last file may be a killed writer's unfinished span and are only counted, as are saved indexes that
    the catalogue does not name.

    Args:
        bank: may be open for reading only, and may be written meanwhile.
        sources: which; None for all, with catalogue, codebooks and what is of no source.
        progress: told after each span.
    """
    catalog, seen = bank._catalog, Verified()
    try:
        if sources is None:
            for line in [*catalog.integrity(), *(f"{name} is not as it was made" for name in catalog.wrong_tables())]:
                seen.add(Problem(Kind.CATALOGUE, f"the catalogue is damaged: {line}"))
            for name in catalog.wrong_sequences():
                seen.add(Problem(Kind.TALLY, f"the catalogue's last id of {name} is not as it was written"))
        known = catalog.source_ids() if sources is None else [s.id for s in sources]
        total = catalog.segment_bytes() if sources is None else sum(s.num_bytes for s in _records(catalog, known))
        for source_id in known if sources is not None else (None,):
            for problem in examine_seals(catalog, source_id):
                seen.add(problem)
    except BankError as error:
        seen.add(Problem(Kind.CATALOGUE, str(error)))
        return seen
    for source_id in known:
        try:
            source = catalog.source_by_id(source_id)
            if source is None:
                continue
            seen.sources += 1
            for problem in examine(bank, source, seen, progress, total):
                seen.add(problem)
        except BankError as error:
            seen.add(Problem(Kind.CATALOGUE, str(error), source_id))
        except UNREADABLE as error:
            seen.add(Problem(Kind.CATALOGUE, f"the catalogue's rows of source {source_id} make no sense: {error}"))
    every = sources is None
    try:
        for problem in examine_codebooks(bank.folder / "codebooks", seen._books, every=every):
            seen.add(problem)
        for problem in examine_spare(bank, None if every else {*known}):
            seen.add(problem)
    except (BankError, *UNREADABLE) as error:
        seen.add(Problem(Kind.CATALOGUE, f"saved indexes could not be looked at: {error}"))
    return seen


def examine_seals(catalog: Catalog, source_id: int | None) -> Iterator[Problem]:
    """Rows that do not fit their checksums, of one source or all, and what that may mean."""
    names: dict[int | None, str] = {}
    for row in catalog.broken_rows(source_id=source_id):
        if row.source_id not in names:
            found = catalog.execute("SELECT CAST(name AS BLOB) FROM sources WHERE id = ?", row.source_id).fetchone()
            data = found[0] if found is not None else None
            names[row.source_id] = data.decode("utf-8", "replace") if isinstance(data, bytes) else ""
        kind = Kind.ROW if row.table == "spans" else Kind.SPARE if row.table in SPARE_TABLES else Kind.TEXT
        what = "keys" if row.keys else row.table
        meaning = "its keys may be wrong" if row.keys else MEANING[row.table]
        name = f"{names[row.source_id]}: " if names[row.source_id] else ""
        yield Problem(
            kind,
            f"{name}row {row.rowid} of {what} in the catalogue is not as it was written: {meaning}",
            row.source_id,
            row=row,
        )


def _records(catalog: Catalog, ids: Iterable[int]) -> Iterator[SourceRecord]:
    for source_id in ids:
        source = catalog.source_by_id(source_id)
        if source is not None:
            yield source


def examine(
    bank: Bank, source: SourceRecord, seen: Verified, progress: Progress | None, total: int
) -> Iterator[Problem]:
    """Everything about one source that is not as written; counts what it reads into ``seen``."""
    catalog = bank._catalog
    folder = bank.folder / source.folder
    unclaimed = segment_files(folder)
    yield from _examine_rows(catalog, source)
    entries = catalog.entries(catalog.span_ids(source.id, by_place=True))
    last = catalog.execute("SELECT MAX(file) FROM spans WHERE source_id = ?", source.id).fetchone()[0]
    for name, group in itertools.groupby(entries, key=lambda entry: entry[0].file):
        unclaimed.pop(name, None)
        for problem in _examine_file(catalog, folder / name, source, group, seen, tail=name == last):
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
    catalog: Catalog,
    path: Path,
    source: SourceRecord,
    entries: Iterable[tuple[SpanRecord, Tensor]],
    seen: Verified,
    *,
    tail: bool,
) -> Iterator[Problem]:
    file = f"{source.folder}/{path.name}"

    def problem(
        kind: Kind, text: str, *, offset: int | None = None, span: SpanRecord | None = None, intact: int = 0
    ) -> Problem:
        return Problem(kind, f"{source.name}: {file}: {text}", source.id, file, offset, span, intact)

    try:
        reader = SegmentReader(path, key=source.key)
    except BankError as error:
        if path.exists() and not _foreign(path, source):
            kind = Kind.NEWER if intact_header(start_bytes(path, source)) else Kind.HEADER
            yield problem(kind, str(error), offset=0)
            return
        reason = "belongs to another source" if path.exists() else "is missing"
        for row, _ in entries:
            yield problem(Kind.SPAN, f"the file {reason}, span {times(row)} with it", offset=row.offset, span=row)
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
                yield problem(kind, f"span {times(row)}: {error}", offset=row.offset, span=row)
                continue
            place = max(place, row.offset + head.num_bytes)
            seen._books.need(head.books, source, row)
            try:
                reader.check(head)
            except BankError as error:
                intact, why = intact_tokens(reader, head), str(error).partition(";")[0]
                yield problem(Kind.SPAN, f"span {times(row)}: {why}", offset=row.offset, span=row, intact=intact)
                continue
            wrong = _differences(row, head)
            if wrong:
                yield problem(Kind.ROW, f"span {times(row)}: the catalogue says {wrong}", offset=row.offset, span=row)
            try:
                if not torch.equal(reader.keys(row.offset), keys):
                    yield problem(
                        Kind.ROW, f"span {times(row)}: the catalogue's keys differ", offset=row.offset, span=row
                    )
            except BankError as error:
                kind = Kind.KEYS if keys.shape == head.key_shape and catalog.keys_fit(row.id) else Kind.SPAN
                yield problem(kind, f"span {times(row)}: {error}", offset=row.offset, span=row, intact=head.tokens)
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
