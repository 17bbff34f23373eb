"""Mending a memory folder as far as it can be mended."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from streamvid.budget import Limits
from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.beside import examine_codebooks
from streamvid.memory.care import BROKEN, LISTED, Kind, Problem, Progress, Repaired
from streamvid.memory.catalog import Catalog
from streamvid.memory.compact import rewrite
from streamvid.memory.database import now
from streamvid.memory.mending import mend_rows, mend_sequences, remove_spare
from streamvid.memory.prefix import shortened, write_spans
from streamvid.memory.rebuild import build, catalogue_damage, mend_headers, rebuild
from streamvid.memory.records import SourceRecord, SpanRecord
from streamvid.memory.rows import count_spans, expire, insert, insert_history, number_spans, span_columns
from streamvid.memory.schema import FILE_NAME
from streamvid.memory.segment_format import keys_copy
from streamvid.memory.segments import SegmentReader, sync_folder, write_at
from streamvid.memory.verify import Verified, examine, examine_seals

ROWS = 100_000
"""Rows that do not fit their checksums that one repair mends."""


def repair(folder: Path, *, dry_run: bool = False, progress: Progress | None = None) -> Repaired:
    """Mend a memory folder as far as it can be.

    A lost or damaged catalogue is built anew from the segments; names, answers and gaps are taken over as
    far as the old one can be read, which stays beside it as ``catalog.sqlite3.broken-N``.  Rows and keys are
    mended from the segments and the other way round.  What nothing but the catalogue says is kept as it is and
    listed as doubtful, or dropped where it makes no sense.  Of damaged spans the best tokens up to the first
    damaged chunk are kept; what is lost is entered as expired.  Files they lay in, and files of no source, are
    moved to ``FOLDER/broken``; saved indexes and kept keys and values that are damaged are removed.  Whenever it
    is killed, running it again finishes it.

    Args:
        folder: of the memory.
        dry_run: only say what would be done.
        progress: told after each span.

    Raises:
        BankError: if this is no memory folder, is from a newer version, or is being written.
    """
    result = Repaired()
    reason = catalogue_damage(folder)
    with ExitStack() as stack:
        if reason and dry_run:
            built = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamvid-"))) / FILE_NAME
            build(folder, built, result, dry_run=True)
            bank = stack.enter_context(Bank(folder, Catalog(built), codec="fp16", limits=Limits(), segment_bytes=1))
        else:
            if reason:
                rebuild(folder, result)
            bank = stack.enter_context(Bank.open(folder, create=False, read_only=dry_run))
            if bank.read_only and not dry_run:
                raise BankError(
                    f"{folder} cannot be written: repair it where it can be, or make a copy and repair that"
                )
        if reason:
            result.done.insert(0, f"catalogue built anew from the segments: {reason}")
        seen = Verified()
        total = bank._catalog.segment_bytes()
        mend_sequences(bank, result, dry_run=dry_run)
        rows: dict[int | None, list[Problem]] = {}
        for count, problem in enumerate(examine_seals(bank._catalog, None)):
            if count == ROWS:
                result.left.append(f"more than {ROWS} rows are not as they were written: repair again")
                break
            rows.setdefault(problem.source_id, []).append(problem)
        for source in bank.sources():
            try:
                with ExitStack() as held:
                    if not dry_run:
                        held.enter_context(bank._locked(source.key, source.name))
                    _mend(bank, source, seen, result, progress, total, dry_run=dry_run)
                    mend_rows(bank, rows.pop(source.id, []), result, source=source, dry_run=dry_run)
            except BankError as error:
                rows.pop(source.id, None)
                result.left.append(str(error))
        mend_rows(bank, [p for problems in rows.values() for p in problems], result, dry_run=dry_run)
        _set_aside_orphans(bank, result, dry_run=dry_run)
        for problem in examine_codebooks(folder / "codebooks", seen._books, every=True):
            if problem.kind is Kind.CODEBOOK:
                result.left.append(problem.text)
            else:
                where = BROKEN if dry_run else _set_aside(folder, folder / problem.file)
                result.done.append(f"{problem.text}: moved to {where}")
        remove_spare(bank, result, dry_run=dry_run)
    return result


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
    mend_headers(folder, source, result, dry_run=dry_run)
    seen._removed = {}
    gone: list[tuple[SpanRecord, int]] = []
    reasons: list[str] = []
    spoiled: set[str] = set()
    touched = False
    for problem in examine(bank, source, seen, progress, total):
        if problem.kind in (Kind.NEWER, Kind.CODEBOOK):
            result.left.append(problem.text)
        elif problem.kind is Kind.HEADER:
            if not dry_run:
                result.left.append(problem.text)
        elif problem.kind is Kind.SPAN:
            assert problem.span is not None
            gone.append((problem.span, problem.intact))
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
    removed = seen._removed
    found = {span.id: removed[span.start, span.stop] for span, _ in gone if (span.start, span.stop) in removed}
    partly = {span.id: intact for span, intact in gone if intact and span.id not in found}
    for (span, intact), reason in zip(gone, reasons, strict=True):
        if span.id in found:
            result.done.append(f"{reason}: found at another place")
            continue
        spoiled.add(span.file)
        result.lost_spans += not intact
        if len(result.lost) < LISTED:
            rest = (
                f"its best {intact} of {span.tokens} tokens are kept" if intact < span.tokens else "its keys are lost"
            )
            result.lost.append(f"{reason}: {rest}" if intact else reason)
    if dry_run:
        return
    places = _keep_prefixes(bank, source, [(span, partly[span.id]) for span, _ in gone if span.id in partly])
    if gone or touched:
        with catalog.transaction():
            for span, intact in gone:
                if span.id in found:
                    catalog.execute("UPDATE spans SET file = ?, offset = ? WHERE id = ?", *found[span.id], span.id)
                elif span.id in places:
                    _shorten(catalog, span, intact, *places[span.id])
                else:
                    expire(catalog, span, "damaged")
            count_spans(catalog, source.id)
    for span, _ in gone:
        if span.id in found or span.id in places:
            _mend_span(bank, source, catalog.span(span.id) or span, Kind.ROW)
    _cut_tail(bank, source, result)
    if spoiled:
        for name in sorted(spoiled):
            if (folder / name).exists():
                kept = _set_aside(bank.folder, folder / name, copy=True)
                result.done.append(f"{source.folder}/{name} is kept as {kept}")
        fresh = catalog.source_by_id(source.id)
        assert fresh is not None
        rewrite(bank, fresh)


def _keep_prefixes(
    bank: Bank, source: SourceRecord, spans: list[tuple[SpanRecord, int]]
) -> dict[int, tuple[str, int, int]]:
    """Write damaged spans anew with their best tokens that are as written; by id: file, offset and size."""
    catalog, folder = bank._catalog, bank.folder / source.folder

    def anew() -> Iterator[tuple[int, bytes]]:
        for span, tokens in spans:
            with SegmentReader(folder / span.file, key=source.key) as reader:
                head = reader.head(span.offset)
                try:
                    keys = reader.keys(span.offset)
                except BankError:
                    [(_, keys)] = catalog.entries([span.id])
                    if not catalog.keys_fit(span.id):  # it is still found by its time
                        keys = torch.zeros(0, head.key_shape[1])
                yield span.id, shortened(reader, head, key=source.key, keys=keys, tokens=tokens)

    if not spans:
        return {}
    try:
        places = write_spans(folder, source.key, anew(), limit=bank._segment_bytes)
    except OSError as error:
        raise BankError(
            f"cannot write what is left of {source.name} to {folder}: {error.strerror}; "
            "free some space and repair again; nothing of it was changed"
        ) from error
    return {span_id: (file, offset, size) for span_id, file, offset, size in places}


def _shorten(catalog: Catalog, span: SpanRecord, tokens: int, file: str, offset: int, num_bytes: int) -> None:
    """Let a row stand for what is left of its span, and say what is not, in the caller's transaction."""
    catalog.execute(
        "UPDATE spans SET file = ?, offset = ?, bytes = ?, tokens = ? WHERE id = ?",
        file,
        offset,
        num_bytes,
        tokens,
        span.id,
    )
    told = {
        "start": str(span.start),
        "stop": str(span.stop),
        "spans": 0,
        "tokens": span.tokens - tokens,
        "reason": f"damaged; the best {tokens} of {span.tokens} tokens are still remembered",
        "created": now(),
    }
    if tokens < span.tokens:
        insert_history(catalog, "expired", span.source_id, told)


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
            insert(catalog, "keys", span_id=span.id, width=own.shape[1], vectors=own.numpy().astype("<f4").tobytes())
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
        number_spans(catalog, source.id)


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
