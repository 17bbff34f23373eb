"""Memory on its way: one archive of some sources, and sources of another folder.

::

    archive   tar: memory.json | source | source | ... | end.json
    source    <key>/source.json | <key>/books/*.book | <key>/000000.seg ... | <key>/seal.json

An ordinary tar file, written and read front to back, so that a pipe will do.  Segments hold the spans that
are remembered, in time order, and nothing else; the same memory gives the same bytes.  A seal is the sha256
of everything since the seal before, so that every changed or missing byte is found before a source is
entered.  Paths are for people: nothing in an archive depends on where it was made.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from streamvid.errors import BankError
from streamvid.memory.bank import SEGMENT_BYTES, Bank
from streamvid.memory.care import BLOCK_BYTES, INCOMING, blocks
from streamvid.memory.codebooks import Codebook
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import SourceRecord
from streamvid.memory.rows import HISTORY, SOURCE_COLUMNS, enter_spans, insert_history, insert_source
from streamvid.memory.segment_format import SpanHead, file_header
from streamvid.memory.segments import SegmentReader, segment_name, sync_folder

FORMAT = 1
"""Of archives; raised when an older streamvid could not read them."""

TEXT_BYTES = 1 << 30
"""No JSON in an archive is larger; bounds what a damaged size can make us read."""

_TAR_BLOCK = 512


@dataclass(slots=True)
class Moved:
    """What came or went."""

    sources: list[str] = field(default_factory=list)
    """Names of those that did."""

    skipped: list[str] = field(default_factory=list)
    """Why others did not."""

    spans: int = 0
    num_bytes: int = 0
    """Of segments."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One file of a source on its way: its name there, size, and bytes."""

    name: str
    size: int
    data: Iterable[bytes]


def export_archive(bank: Bank, sources: Iterable[SourceRecord], file: BinaryIO) -> Moved:
    """Write sources into one archive, front to back.

    A source that is being written is taken as it is at that moment.

    Args:
        bank: may be open for reading only.
        sources: which; taken in the order of their ids, each once.
        file: where to; need not be seekable.

    Raises:
        BankError: if a segment is missing or damaged.
        OSError: if the file does not take it.
    """
    result, out = Moved(), _TarWriter(file)
    chosen = sorted({s.id: s for s in sources}.values(), key=lambda s: s.id)
    out.text("memory.json", {"format": FORMAT, "program": "streamvid", "sources": len(chosen)})
    for source in chosen:
        with bank._catalog.snapshot():
            told = _describe(bank, source)
            out.text(f"{source.key.short}/source.json", told)
            for piece in _pieces(bank, source):
                out.piece(f"{source.key.short}/{piece.name}", piece)
                result.num_bytes += piece.size
        out.seal(f"{source.key.short}/seal.json")
        result.sources.append(source.name)
        result.spans += sum(count for _, count in told["levels"])
    out.seal("end.json")
    out.end()
    return result


def export_file(bank: Bank, sources: Iterable[SourceRecord], path: Path) -> Moved:
    """Write sources into an archive file, which is there as a whole or not at all.

    Raises:
        BankError: if there is such a file already, it cannot be written, or a segment is damaged.
    """
    if path.exists():
        raise BankError(f"{path} is there already and was left as it is; choose another name, or delete it first")
    temporary = path.with_name(f"{path.name}.part")
    try:
        try:
            with open(temporary, "wb") as file:
                result = export_archive(bank, sources, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.absolute().parent)
        except OSError as error:
            raise BankError(f"cannot write {path}: {error.strerror}; choose another place with room") from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return result


def import_archive(bank: Bank, file: BinaryIO, *, name: str) -> Moved:
    """Enter the sources of an archive; each comes wholly or not at all.

    A source whose key is known is skipped, whatever of it is remembered here.

    Args:
        bank: where to.
        file: the archive; need not be seekable.
        name: what messages call it.

    Raises:
        BankError: if the archive is damaged, cut short, or from a newer version, or there is no room; sources
            before the damage are entered, and the message counts them.
    """
    result = Moved()
    try:
        _import(bank, _TarReader(file, name), result)
    except BankError as error:
        entered = f"; {len(result.sources)} sources before that were entered" if result.sources else ""
        raise BankError(f"{error}{entered}") from error
    return result


def merge(bank: Bank, other: Bank) -> Moved:
    """Enter all sources of another memory folder; each comes wholly or not at all, known keys are skipped.

    Args:
        bank: where to.
        other: where from; it is only read.

    Raises:
        BankError: if a segment of the other is damaged, or there is no room.
    """
    if bank.folder.resolve() == other.folder.resolve():
        raise BankError(f"{bank.folder} cannot be merged with itself; name another memory folder")
    result = Moved()
    for source in other.sources():
        if _known(bank, source.key, source.name, result):
            continue
        with other._catalog.snapshot():
            told = _describe(other, source)
            with _Stage(bank, source.key) as stage:
                for piece in _pieces(other, source):
                    stage.take(piece)
                stage.enter(told, result)
    return result


def _known(bank: Bank, key: MemoryKey, name: str, result: Moved) -> bool:
    known = bank.find(key)
    if known is not None:
        result.skipped.append(f"{name} is remembered already, as source {known.id} ({known.name}): skipped")
    return known is not None


def _describe(bank: Bank, source: SourceRecord) -> dict[str, Any]:
    """What the segments do not say of a source; JSON values."""
    catalog = bank._catalog
    row = catalog.execute("SELECT * FROM sources WHERE id = ?", source.id).fetchone()
    levels = catalog.execute("SELECT level FROM spans WHERE source_id = ? ORDER BY ordinal", source.id)
    return {
        "key": source.key.to_json(),
        **{name: row[name] for name in SOURCE_COLUMNS},
        # Runs of equal ones: a million spans take a line.
        "levels": [[level, len(list(run))] for level, run in itertools.groupby(r["level"] for r in levels)],
        **{
            table: [
                {name: r[name] for name in columns}
                for r in catalog.execute(f"SELECT * FROM {table} WHERE source_id = ? ORDER BY id", source.id)
            ]
            for table, columns in HISTORY.items()
        },
    }


def _pieces(bank: Bank, source: SourceRecord) -> Iterator[_Piece]:
    """The codebooks of a source, then its segments; take each before the next."""
    for path in sorted((bank.folder / "codebooks").glob("*.book")):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise BankError(f"codebook {path} is damaged; restore it from a copy before its sources go anywhere")
        if Codebook.from_bytes(data).model == source.key.model:
            yield _Piece(f"books/{path.name}", len(data), [data])
    header = file_header(source.key)
    sizes = [len(header)]
    counts = [0]
    rows = bank._catalog.execute("SELECT bytes FROM spans WHERE source_id = ? ORDER BY ordinal", source.id)
    for row in rows:
        if counts[-1] and sizes[-1] + row["bytes"] > SEGMENT_BYTES:
            sizes.append(len(header))
            counts.append(0)
        sizes[-1] += row["bytes"]
        counts[-1] += 1
    ids = bank._catalog.span_ids(source.id)
    first = 0
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        data_ids = ids[first : first + count]
        first += count
        yield _Piece(segment_name(number), size, _span_bytes(bank, source, data_ids, header))


def _span_bytes(bank: Bank, source: SourceRecord, ids: Any, header: bytes) -> Iterator[bytes]:
    yield header
    folder = bank.folder / source.folder
    name, fd = "", -1
    try:
        for span, _ in bank._catalog.entries(ids):
            if span.file != name:
                if fd >= 0:
                    os.close(fd)
                    fd = -1
                try:
                    fd = os.open(folder / span.file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise BankError(
                        f"cannot read {folder / span.file}: {error.strerror}; "
                        f"repair this memory, or remove {source.name}"
                    ) from error
                name = span.file
            yield from blocks(fd, span.offset, span.num_bytes)
    finally:
        if fd >= 0:
            os.close(fd)


class _Stage:
    """A source that is not all there yet, in ``FOLDER/incoming``; a context manager that leaves none behind.

    What a killed process left there is deleted when the same source comes again.
    """

    def __init__(self, bank: Bank, key: MemoryKey) -> None:
        self._bank, self._key = bank, key
        self._folder = bank.folder / INCOMING / key.digest
        self._held = ExitStack()

    def __enter__(self) -> _Stage:
        self._held.enter_context(self._bank._locked(self._key, f"source {self._key.short}"))
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "books").mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # another one may be coming
            self._folder.parent.rmdir()
        self._held.close()

    def take(self, piece: _Piece) -> None:
        """Write one file, on the disk when it returns."""
        limit = self._bank.limits.disk_bytes
        if limit is not None and self._bank.usage() + self._staged() + piece.size > limit:
            raise BankError(
                f"memory in {self._bank.folder} may hold {limit} bytes and this source does not fit; "
                "remove a source or raise the limit"
            )
        try:
            with open(self._folder / piece.name, "wb") as file:
                for data in piece.data:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BankError(
                f"cannot write to {self._bank.folder}: {error.strerror}; free some space and run the same again"
            ) from error

    def enter(self, told: dict[str, Any], result: Moved) -> None:
        """Check every byte, then make it a source."""
        bank, catalog, key = self._bank, self._bank._catalog, self._key
        files = sorted(self._folder.glob("*.seg"))
        levels = (level for level, count in told["levels"] for _ in range(count))
        books: set[str] = set()
        books_folder = bank.folder / "codebooks"
        for path in sorted((self._folder / "books").glob("*.book")):
            if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem:
                raise BankError(f"codebook {path.name} is not what its name says; make the archive again")
            books_folder.mkdir(exist_ok=True)
            os.replace(path, books_folder / path.name)
        if books_folder.is_dir():
            sync_folder(books_folder)
        (self._folder / "books").rmdir()
        sync_folder(self._folder)
        with catalog.transaction():
            row = insert_source(catalog, key, told)
            source = catalog.source_by_id(row)
            assert source is not None
            enter_spans(catalog, source, self._folder, _checked(files, key, levels, books))
            missing = sorted(book for book in books if not (books_folder / f"{book}.book").exists())
            if missing:
                raise BankError(f"codebook {missing[0]} did not come with {source.name}; export it again")
            for table in HISTORY:
                for one in told[table]:
                    insert_history(catalog, table, source.id, one)
            target = bank.folder / source.folder
            shutil.rmtree(target, ignore_errors=True)  # of a killed process: no source has this id
            os.rename(self._folder, target)
            sync_folder(target.parent)
        entered = catalog.source_by_id(source.id)
        assert entered is not None
        result.sources.append(entered.name)
        result.spans += entered.spans
        result.num_bytes += entered.num_bytes

    def _staged(self) -> int:
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())


def _checked(
    files: Iterable[Path], key: MemoryKey, levels: Iterator[int], books: set[str]
) -> Iterator[tuple[SegmentReader, SpanHead, int]]:
    """Every span of some files, each byte of it read."""
    for path in files:
        size = path.stat().st_size
        with SegmentReader(path, key=key) as reader:
            place = len(file_header(key))
            while place < size:
                head = reader.head(place)
                reader.check(head)
                books |= {book for book in head.books if book}
                level = next(levels, None)
                if level is None:
                    raise BankError(f"{path} has more spans than were counted; make the archive again")
                yield reader, head, level
                place += head.num_bytes
    if next(levels, None) is not None:
        raise BankError(f"{key.short} has fewer spans than were counted; make the archive again")


def _import(bank: Bank, archive: _TarReader, result: Moved) -> None:
    told = archive.text("memory.json")
    if told.get("program") != "streamvid":
        raise BankError(f"{archive.name} is not a streamvid archive; make one with: streamvid memory export")
    form = told.get("format")
    if form != FORMAT:
        raise BankError(f"{archive.name} has format {form} and this streamvid reads up to {FORMAT}; update streamvid")
    if not isinstance(told.get("sources"), int):
        raise archive.damaged("it does not say how many sources it holds")
    for _ in range(told["sources"]):
        _import_source(bank, archive, result)
    archive.seal("end.json")
    archive.end()


def _import_source(bank: Bank, archive: _TarReader, result: Moved) -> None:
    path, size = archive.member()
    if not path.endswith("/source.json"):
        raise archive.damaged(f"{path} stands where a source should begin")
    told = archive.json(path, size)
    try:
        key, name = MemoryKey.from_json(told["key"]), str(told["name"])
    except (KeyError, ValueError, TypeError) as error:
        raise archive.damaged(f"{path} names no source") from error
    stage = None
    with ExitStack() as stack:
        if not _known(bank, key, name, result):
            stage = stack.enter_context(_Stage(bank, key))
        while True:
            path, size = archive.member()
            folder, _, inner = path.partition("/")
            if folder != key.short:
                raise archive.damaged(f"{path} stands among the files of {key.short}")
            if inner == "seal.json":
                break
            if not re.fullmatch(r"\d{6}\.seg|books/[0-9a-f]{64}\.book", inner):
                raise archive.damaged(f"{path} is no file of a source")
            data = archive.data(size)
            if stage is None:
                for _ in data:
                    pass
            else:
                stage.take(_Piece(inner, size, data))
        archive.check_seal(path, size)
        if stage is not None:
            stage.enter(told, result)


def _tar_header(name: str, size: int) -> bytes:
    """One block that says a name and a size and nothing of this machine."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


class _TarWriter:
    """Members with nothing of this machine in them, and the sha256 since the last seal."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def text(self, name: str, value: Any) -> None:
        data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
        self.piece(name, _Piece(name, len(data), [data]))

    def piece(self, name: str, piece: _Piece) -> None:
        self._write(_tar_header(name, piece.size))
        written = 0
        for data in piece.data:
            self._write(data)
            written += len(data)
        if written != piece.size:
            raise BankError(f"{name} changed while it was exported; run the same again")
        self._write(bytes(-written % _TAR_BLOCK))

    def seal(self, name: str) -> None:
        digest, self._hash = self._hash.hexdigest(), hashlib.sha256()
        self.text(name, {"sha256": digest})

    def end(self) -> None:
        self._write(bytes(2 * _TAR_BLOCK))

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)


class _TarReader:
    """Reads what `_TarWriter` wrote and nothing else, front to back."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self._file = file
        self._hash = hashlib.sha256()
        self._sealed = ""

    def member(self) -> tuple[str, int]:
        """Name and size of the next file; its bytes must be taken before the one after."""
        before = self._hash.hexdigest()
        raw = self._take(_TAR_BLOCK)
        try:
            member = tarfile.TarInfo.frombuf(raw, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise self.damaged(f"a file's name and size cannot be read, {error}") from error
        if _tar_header(member.name, member.size) != raw:
            raise self.damaged(f"{member.name} does not begin as it was written")
        if member.name.endswith("/seal.json") or member.name == "end.json":
            self._sealed = before
            self._hash = hashlib.sha256(raw)
        return member.name, member.size

    def data(self, size: int) -> Iterator[bytes]:
        """The bytes of the file, at most 1 MiB at a time."""
        left = size
        while left:
            data = self._take(min(left, BLOCK_BYTES))
            left -= len(data)
            yield data
        if any(self._take(-size % _TAR_BLOCK)):
            raise self.damaged("there is something between two files")

    def json(self, name: str, size: int) -> dict[str, Any]:
        """The file as JSON."""
        if size > TEXT_BYTES:
            raise self.damaged(f"{name} cannot be {size} bytes")
        try:
            value = json.loads(b"".join(self.data(size)))
        except ValueError as error:
            raise self.damaged(f"{name} is no JSON") from error
        if not isinstance(value, dict):
            raise self.damaged(f"{name} is not what it should be")
        return value

    def text(self, expected: str) -> dict[str, Any]:
        """The next file, which must have this name, as JSON."""
        name, size = self.member()
        if name != expected:
            raise BankError(f"{self.name} is not a streamvid archive; make one with: streamvid memory export")
        return self.json(name, size)

    def seal(self, expected: str) -> None:
        """The next file, which must be this seal."""
        name, size = self.member()
        if name != expected:
            raise self.damaged(f"{name} stands where {expected} should")
        self.check_seal(name, size)

    def check_seal(self, name: str, size: int) -> None:
        """Take a seal and compare it.

        Raises:
            BankError: if anything before it is not as written.
        """
        sealed = self._sealed
        if self.json(name, size) != {"sha256": sealed}:
            raise self.damaged(f"what comes before {name} is not as it was written")

    def end(self) -> None:
        """Nothing but the end of a tar file follows."""
        if any(self._take(2 * _TAR_BLOCK)) or self._file.read(1):
            raise self.damaged("something follows its end")

    def damaged(self, reason: str) -> BankError:
        return BankError(f"{self.name} is damaged: {reason}; get the archive again, or export it anew")

    def _take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._file.read(count - len(data))
            if not part:
                raise BankError(f"{self.name} is cut short; get the archive again, or export it anew")
            data += part
        self._hash.update(data)
        return data
