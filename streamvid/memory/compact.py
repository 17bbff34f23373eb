"""Giving back the space of what a memory folder does not remember any more."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.care import INCOMING, blocks, segment_files
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import SourceRecord, SpanRecord
from streamvid.memory.segment_format import file_header
from streamvid.memory.segments import segment_name, sync_folder, write_at


@dataclass(slots=True)
class Compacted:
    """What a compaction gave back."""

    before_bytes: int = 0
    after_bytes: int = 0
    sources: int = 0
    """Whose files were written anew."""

    notes: list[str] = field(default_factory=list)


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
            if fresh is not None and rewrite(bank, fresh):
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


def rewrite(bank: Bank, source: SourceRecord) -> bool:
    """Write the files of a source anew from the first with loose bytes on; it is held for writing."""
    catalog, folder = bank._catalog, bank.folder / source.folder
    lead = len(file_header(source.key))
    sizes = segment_files(folder)
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
            total = sum(n for name, n in segment_files(folder).items() if name not in stale)
            catalog.execute("UPDATE sources SET bytes = ? WHERE id = ?", total, source.id)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    if not holed:
        with catalog.transaction():
            total = sum(segment_files(folder).values())
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


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
