"""Segment files read and written: spans appended, durable when they are said to be, checked when read.

Knows files in the layout of `segment_format`; which spans there are is the catalogue's to say.
"""

from __future__ import annotations

import json
import os
import zlib
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.codec import CODECS, Bytes2D, Codec, FolderCodecs
from streamvid.memory.keys import MemoryKey
from streamvid.memory.segment_format import (
    CHUNK_ROWS,
    CRC,
    DTYPES,
    FILE_MAGIC,
    FILE_START,
    HEADER_BYTES_1,
    KEYS_CHUNK,
    ROW,
    SPAN_MAGIC,
    SPAN_START,
    VERSION,
    SpanHead,
    chunk_crc,
    file_header,
    head_crc,
)
from streamvid.tokens import VideoTokens


class SegmentReader:
    """Reads spans of one segment file; a context manager.

    Args:
        path: the file.
        key: of the source it must belong to.
        codecs: of the memory folder; needed to read spans that name a codebook.

    Raises:
        BankError: if the file is missing, damaged, or another source's.
    """

    def __init__(self, path: Path, *, key: MemoryKey, codecs: FolderCodecs | None = None) -> None:
        self.path = path
        self._codecs = codecs
        self.bytes_read = 0
        self._digest = key.digest
        try:
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise BankError(
                f"cannot read {path}: {error.strerror}; restore the file, or remove this source and ask again"
            ) from error
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._check_file(key)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def head(self, offset: int) -> SpanHead:
        """What the span at ``offset`` says about itself."""
        fixed = self.bytes_at(offset, SPAN_START.size, span=offset)
        magic, version, _, meta_bytes, state_bytes, total, crc = SPAN_START.unpack(fixed)
        if magic != SPAN_MAGIC:
            raise self._damaged(offset, "no span begins there")
        if version > VERSION:
            raise self._newer(version)
        text = self.bytes_at(offset + SPAN_START.size, meta_bytes + state_bytes, span=offset)
        if head_crc(fixed[: -CRC.size], text, self._digest) != crc:
            raise self._damaged(offset, "the head does not match its checksum")
        meta: dict[str, Any] = json.loads(text[:meta_bytes])
        unknown = [name for name in meta["codecs"] if name not in CODECS]
        if unknown:
            raise BankError(
                f"{self.path} holds features stored as {unknown[0]}, which this streamvid cannot read; update streamvid"
            )
        if version == 1:
            sizes = [HEADER_BYTES_1[name] * meta["width"] for name in meta["codecs"]]
        else:
            sizes = meta["headers"]
        ends = [meta_bytes + sum(sizes[: i + 1]) for i in range(len(sizes))]
        return SpanHead(
            start=Fraction(meta["start"]),
            stop=Fraction(meta["stop"]),
            tokens=meta["tokens"],
            grid=(meta["grid"][0], meta["grid"][1], meta["grid"][2]),
            width=meta["width"],
            dtype=DTYPES[meta["dtype"]],
            codecs=tuple(meta["codecs"]),
            books=tuple(meta.get("books", [""] * len(sizes))),
            headers=tuple(text[end - size : end] for end, size in zip(ends, sizes, strict=True)),
            key_shape=(meta["keys"][0], meta["keys"][1]),
            offset=offset,
            rows_offset=offset + SPAN_START.size + len(text),
            num_bytes=total,
            crc=crc,
        )

    def read(self, offset: int, *, tokens: int | None = None) -> VideoTokens:
        """The best tokens of the span at ``offset``, in raster and time order, on the CPU.

        Args:
            offset: where the span begins.
            tokens: how many to read, at most what it has; None for all.

        Raises:
            BankError: if what is read is not what was written.
        """
        head = self.head(offset)
        count = head.tokens if tokens is None else tokens
        if not 0 <= count <= head.tokens:
            raise ValueError(f"this span has {head.tokens} tokens, asked for {tokens}")
        rows = self._rows(head, count)
        table = rows[:, : ROW.itemsize].copy().view(ROW).reshape(count)
        order = np.argsort(table["row"], kind="stable")
        table, rows = table[order], rows[order]
        features = []
        place = ROW.itemsize
        for name, book, header in zip(head.codecs, head.books, head.headers, strict=True):
            codec = self._codec(name, book)
            wide = codec.row_bytes(head.width)
            features.append(codec.decode(header, rows[:, place : place + wide], width=head.width).to(head.dtype))
            place += wide
        return VideoTokens(
            features=features[0],
            layers=tuple(features[1:]),
            grid=head.grid,
            position=torch.from_numpy(table["position"].astype(np.int64)),
            pts_seconds=torch.from_numpy(table["pts_seconds"].astype(np.float64)),
            duration_seconds=torch.from_numpy(table["duration_seconds"].astype(np.float64)),
            size=torch.from_numpy(table["size"].astype(np.float32)),
            score=torch.from_numpy(table["score"].astype(np.float32)),
        )

    def keys(self, offset: int) -> Tensor:
        """(K, Dk) float32: the retrieval keys of the span at ``offset``."""
        head = self.head(offset)
        count, width = head.key_shape
        size = 4 * count * width
        data = self.bytes_at(offset + head.num_bytes - size - CRC.size, size + CRC.size, span=offset)
        if CRC.unpack(data[size:])[0] != chunk_crc(data[:size], head.crc, KEYS_CHUNK):
            raise self._damaged(offset, "the retrieval keys do not match their checksum")
        return torch.from_numpy(np.frombuffer(data[:size], "<f4").astype(np.float32).reshape(count, width))

    def verify(self, offset: int) -> SpanHead:
        """Read every byte of the span at ``offset`` and check it.

        Raises:
            BankError: if one is not as written.
        """
        self.read(offset)
        self.keys(offset)
        return self.head(offset)

    def intact_head(self, offset: int) -> bool:
        """Whether the head at ``offset`` is as written, even if in a format that cannot be read here."""
        try:
            fixed = self.bytes_at(offset, SPAN_START.size, span=offset)
            magic, _, _, meta_bytes, state_bytes, _, crc = SPAN_START.unpack(fixed)
            text = self.bytes_at(offset + SPAN_START.size, meta_bytes + state_bytes, span=offset)
        except BankError:
            return False
        return bool(magic == SPAN_MAGIC and head_crc(fixed[: -CRC.size], text, self._digest) == crc)

    def check(self, head: SpanHead) -> None:
        """Read every token byte of a span and compare checksums, a chunk at a time; decodes nothing.

        Args:
            head: of the span, from this reader.

        Raises:
            BankError: if one byte is not as written.
        """
        num_chunks = -(-head.tokens // CHUNK_ROWS)
        tail = 4 * head.key_shape[0] * head.key_shape[1] + CRC.size
        rows = head.offset + head.num_bytes - tail - head.rows_offset - CRC.size * num_chunks
        if rows < 0 or (rows % head.tokens if head.tokens else rows):
            raise self._damaged(head.offset, "its parts do not add up to its size")
        place = head.rows_offset
        for number in range(num_chunks):
            count = min(CHUNK_ROWS, head.tokens - number * CHUNK_ROWS)
            size = rows // head.tokens * count
            data = self.bytes_at(place, size + CRC.size, span=head.offset)
            if CRC.unpack(data[size:])[0] != chunk_crc(memoryview(data)[:size], head.crc, number):
                first = number * CHUNK_ROWS
                raise self._damaged(head.offset, f"tokens {first} to {first + count - 1} do not match their checksum")
            place += len(data)

    def bytes_at(self, offset: int, count: int, *, span: int) -> bytes:
        """Bytes as they lie in the file, unchecked; ``span`` is where the span begins whose they are, for errors."""
        if offset < 0 or offset + count > self._size:  # before allocating: a damaged size may say anything
            raise self._damaged(span, f"it ends after {self._size} bytes, before the {offset + count} it should have")
        parts: list[bytes] = []
        missing = count
        while missing:
            try:
                part = os.pread(self._file.fileno(), missing, offset + count - missing)
            except OSError as error:
                raise self._damaged(span, f"cannot read: {error.strerror}") from error
            if not part:
                raise self._damaged(span, "it ended while it was read")
            parts.append(part)
            missing -= len(part)
        self.bytes_read += count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _codec(self, name: str, book: str) -> Codec:
        if not book:
            return CODECS[name]
        if self._codecs is None:
            raise ValueError(f"{self.path} names a codebook: open it with the codecs of its memory folder")
        return self._codecs.codec(name, book)

    def _rows(self, head: SpanHead, count: int) -> Bytes2D:
        """(count, row bytes): the first rows, checked chunk by chunk, from one read."""
        if not count:
            return np.empty((0, head.row_bytes), np.uint8)
        size = head.row_bytes
        last = min(-(-count // CHUNK_ROWS) * CHUNK_ROWS, head.tokens)
        firsts = range(0, last, CHUNK_ROWS)
        data = memoryview(self.bytes_at(head.rows_offset, last * size + CRC.size * len(firsts), span=head.offset))
        parts: list[Bytes2D] = []
        place = 0
        for number, first in enumerate(firsts):
            num_rows = min(CHUNK_ROWS, last - first)
            chunk = data[place : place + num_rows * size]
            place += len(chunk) + CRC.size
            if CRC.unpack(data[place - CRC.size : place])[0] != chunk_crc(chunk, head.crc, number):
                raise self._damaged(
                    head.offset, f"tokens {first} to {first + num_rows - 1} do not match their checksum"
                )
            parts.append(np.frombuffer(chunk, np.uint8).reshape(num_rows, size))
        rows: NDArray[np.uint8] = np.concatenate(parts)[:count]
        return rows

    def _check_file(self, key: MemoryKey) -> None:
        fixed = self.bytes_at(0, FILE_START.size, span=0)
        magic, version, _, text_bytes, crc = FILE_START.unpack(fixed)
        if magic != FILE_MAGIC:
            raise self._damaged(0, "it is not a segment file")
        if version > VERSION:
            raise self._newer(version)
        text = self.bytes_at(FILE_START.size, text_bytes, span=0)
        if zlib.crc32(text, zlib.crc32(fixed[: -CRC.size])) != crc:
            raise self._damaged(0, "the file header does not match its checksum")
        if text.decode("ascii") != key.to_json():
            raise BankError(
                f"{self.path} belongs to another source than the catalogue says; "
                "it was not used: remove this source from memory and ask again"
            )

    def _damaged(self, offset: int, reason: str) -> BankError:
        return BankError(
            f"{self.path} is damaged at offset {offset}: {reason}; remove this source from memory and ask again"
        )

    def _newer(self, version: int) -> BankError:
        return BankError(
            f"{self.path} has format {version} and this streamvid reads up to {VERSION}; "
            "update streamvid, or choose another memory folder"
        )


class SegmentWriter:
    """Appends spans to the segment files of one source: ``000000.seg``, ``000001.seg``, ...

    A span is on the disk, not only handed to the system, when `append` returns.  What lies after the
    last span the catalogue knows is the torn rest of a killed writer and is cut off first.

    Args:
        folder: of the source; made if missing.
        key: of the source.
        segment_bytes: a span that would make a file larger than this goes to a new one; larger means
            fewer files, smaller means that space of removed spans could be given back sooner.
        last: name of the last file and where its last catalogued span ends, if there is any.

    Raises:
        BankError: if the last file is shorter than the catalogue says.
        OSError: if the disk does not take it; the caller knows what to tell the user.
    """

    def __init__(self, folder: Path, *, key: MemoryKey, segment_bytes: int, last: tuple[str, int] | None) -> None:
        self._folder = folder
        self._key = key
        self._limit = segment_bytes
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        self._name, self._end = last if last is not None else (segment_name(0), 0)
        self._before = self._end
        for path in folder.glob("*.seg"):
            if path.name > self._name:
                path.unlink()
        self._fd = os.open(folder / self._name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(self._fd).st_size
            if size < self._end:
                raise BankError(
                    f"{folder / self._name} has {size} bytes and the catalogue {self._end}; "
                    "remove this source from memory and ask again"
                )
            os.ftruncate(self._fd, self._end)
            sync_folder(folder)
        except BaseException:
            os.close(self._fd)
            raise

    def cost(self, data: bytes) -> int:
        """Bytes that appending ``data`` adds to the disk."""
        fresh = self._end == 0 or self._rolls(data)
        return len(data) + (len(file_header(self._key)) if fresh else 0)

    def append(self, data: bytes) -> tuple[str, int]:
        """Write one span; returns the name of its file and its offset there."""
        if self._rolls(data):
            name = segment_name(int(Path(self._name).stem) + 1)
            fd = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.close(self._fd)
            self._fd, self._name, self._end = fd, name, 0
            sync_folder(self._folder)
        self._before = self._end
        lead = file_header(self._key) if self._end == 0 else b""
        try:
            write_at(self._fd, lead + data, self._end)
            os.fsync(self._fd)
        except OSError:
            self.undo()
            raise
        offset = self._end + len(lead)
        self._end = offset + len(data)
        return self._name, offset

    def undo(self) -> None:
        """Take back the last append: the disk or the catalogue did not take it."""
        os.ftruncate(self._fd, self._before)
        self._end = self._before

    def close(self) -> None:
        """Close the file; nothing is left to be written."""
        os.close(self._fd)

    def _rolls(self, data: bytes) -> bool:
        return self._end > 0 and self._end + len(data) > self._limit


def segment_name(number: int) -> str:
    """File name of a source's n-th segment; names sort like numbers."""
    return f"{number:06d}.seg"


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data``; a system may take it in parts."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make names in a folder as durable as the files they name."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
