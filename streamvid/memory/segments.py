"""Segment files: spans of tokens, appended, checksummed, best tokens first.

::

    file    file header (key)  span  span  span ...
    span    head: sizes, meta JSON, codec state | chunk | chunk | ... | retrieval keys
    chunk   up to 64 token rows | crc32
    row     place, times, size, score | features | layer 0 | layer 1 ...

Rows stand in falling score order, so the best k tokens of a span are its head and its first
ceil(k / 64) chunks, and nothing else is read.  Checksums are seeded: with the key in the head, with the
head's checksum and the place in each chunk, so that an intact chunk of another span or another video is
as wrong as a flipped bit.  The retrieval keys at the end are a copy of the catalogue's, from which a lost
catalogue can be rebuilt; answering never reads them.

This module knows bytes and files; which spans there are is the catalogue's to say.  All numbers are
little-endian.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.codec import CODECS, Bytes2D, Codec
from streamvid.memory.keys import MemoryKey
from streamvid.tokens import VideoTokens

VERSION = 1
CHUNK_ROWS = 64

_FILE = struct.Struct("<8sHHII")
"""magic, version, 0, bytes of JSON, crc32 of all that and the JSON"""

_SPAN = struct.Struct("<4sHHIIQI")
"""magic, version, 0, bytes of meta, bytes of codec state, bytes of the whole span, crc32 of the head"""

_CRC = struct.Struct("<I")

_FILE_MAGIC = b"SVIDSEG\n"
_SPAN_MAGIC = b"SPAN"

_ROW = np.dtype(
    [
        ("row", "<u4"),  # place in the span as it came: raster and time order
        ("position", "<i4", (3,)),
        ("pts_seconds", "<f8"),
        ("duration_seconds", "<f8"),
        ("size", "<f4"),
        ("score", "<f4"),
    ]
)

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}

_KEYS_CHUNK = 0xFFFFFFFF
"""Stands for the chunk number in the checksum of the retrieval keys."""


@dataclass(frozen=True, slots=True)
class EncodedSpan:
    """A span ready to be written."""

    data: bytes
    codec: str
    """What its features are stored as."""

    notes: tuple[str, ...]
    """What the user should hear: why another codec than the one asked for was used."""


@dataclass(frozen=True, slots=True)
class SpanHead:
    """What a span says about itself."""

    start: Fraction
    """Seconds, exact; the span covers ``[start, stop)``."""

    stop: Fraction
    tokens: int
    grid: tuple[int, int, int]
    width: int
    """D"""

    dtype: torch.dtype
    """Of the features as they came."""

    codecs: tuple[str, ...]
    """Of the features, then of each layer."""

    key_shape: tuple[int, int]
    """(K, Dk) of the retrieval keys."""

    offset: int
    """Where the span begins in its file."""

    rows_offset: int
    """Where its first chunk begins."""

    num_bytes: int
    """Size of the whole span."""

    state: bytes
    crc: int

    @property
    def row_bytes(self) -> int:
        """Size of one token row."""
        return _ROW.itemsize + sum(CODECS[name].row_bytes(self.width) for name in self.codecs)


def file_header(key: MemoryKey) -> bytes:
    """The first bytes of a segment file of one source."""
    text = key.to_json().encode("ascii")
    head = _FILE.pack(_FILE_MAGIC, VERSION, 0, len(text), 0)[: -_CRC.size]
    return head + _CRC.pack(zlib.crc32(text, zlib.crc32(head))) + text


def encode_span(
    tokens: VideoTokens, *, start: Fraction, stop: Fraction, key: MemoryKey, keys: Tensor, codec: Codec
) -> EncodedSpan:
    """Lay out one span.

    Args:
        tokens: in raster and time order; may be empty.
        start: seconds, exact.
        stop: seconds, exact; the span covers ``[start, stop)``.
        key: of the source the span belongs to.
        keys: (K, Dk) float32 retrieval keys.
        codec: for features and layers.

    Raises:
        ValueError: if a score is not a number, or a dtype is not one of float16, bfloat16, float32, float64.
        BankError: if features are not finite.
    """
    dtype = str(tokens.features.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"features must be one of {', '.join(_DTYPES)}, got {dtype}")
    if bool(torch.isnan(tokens.score).any()):
        raise ValueError("scores order the tokens of a span and must be numbers, got nan")
    order = torch.argsort(tokens.score, descending=True, stable=True).cpu()
    table = np.zeros(len(tokens), _ROW)
    table["row"] = order.numpy()
    for name in ("position", "pts_seconds", "duration_seconds", "size", "score"):
        table[name] = getattr(tokens, name).detach().cpu()[order].numpy()
    blocks = [codec.encode(x.detach().cpu()[order]) for x in (tokens.features, *tokens.layers)]
    rows = np.concatenate([table.view(np.uint8).reshape(len(tokens), _ROW.itemsize), *(b.rows for b in blocks)], axis=1)
    meta = json.dumps(
        {
            "key": key.digest,
            "start": str(start),
            "stop": str(stop),
            "grid": list(tokens.grid),
            "tokens": len(tokens),
            "width": tokens.features.shape[1],
            "dtype": dtype,
            "codecs": [b.codec for b in blocks],
            "keys": list(keys.shape),
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode("ascii")
    state = b"".join(b.header for b in blocks)
    trailer = keys.detach().cpu().numpy().astype("<f4").tobytes()
    chunks = range(0, len(tokens), CHUNK_ROWS)
    total = _SPAN.size + len(meta) + len(state) + rows.size + _CRC.size * (len(chunks) + 1) + len(trailer)
    fixed = _SPAN.pack(_SPAN_MAGIC, VERSION, 0, len(meta), len(state), total, 0)[: -_CRC.size]
    crc = _head_crc(fixed, meta + state, key.digest)
    parts = [fixed, _CRC.pack(crc), meta, state]
    for number, first in enumerate(chunks):
        data = rows[first : first + CHUNK_ROWS].tobytes()
        parts += [data, _CRC.pack(_chunk_crc(data, crc, number))]
    parts += [trailer, _CRC.pack(_chunk_crc(trailer, crc, _KEYS_CHUNK))]
    data = b"".join(parts)
    assert len(data) == total
    notes = tuple(dict.fromkeys(b.note for b in blocks if b.note))
    return EncodedSpan(data, codec=blocks[0].codec, notes=notes)


class SegmentReader:
    """Reads spans of one segment file; a context manager.

    Args:
        path: the file.
        key: of the source it must belong to.

    Raises:
        BankError: if the file is missing, damaged, or another source's.
    """

    def __init__(self, path: Path, *, key: MemoryKey) -> None:
        self.path = path
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
        fixed = self._bytes(offset, _SPAN.size, span=offset)
        magic, version, _, meta_bytes, state_bytes, total, crc = _SPAN.unpack(fixed)
        if magic != _SPAN_MAGIC:
            raise self._damaged(offset, "no span begins there")
        if version > VERSION:
            raise self._newer(version)
        text = self._bytes(offset + _SPAN.size, meta_bytes + state_bytes, span=offset)
        if _head_crc(fixed[: -_CRC.size], text, self._digest) != crc:
            raise self._damaged(offset, "the head does not match its checksum")
        meta: dict[str, Any] = json.loads(text[:meta_bytes])
        return SpanHead(
            start=Fraction(meta["start"]),
            stop=Fraction(meta["stop"]),
            tokens=meta["tokens"],
            grid=(meta["grid"][0], meta["grid"][1], meta["grid"][2]),
            width=meta["width"],
            dtype=_DTYPES[meta["dtype"]],
            codecs=tuple(meta["codecs"]),
            key_shape=(meta["keys"][0], meta["keys"][1]),
            offset=offset,
            rows_offset=offset + _SPAN.size + len(text),
            num_bytes=total,
            state=text[meta_bytes:],
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
        table = rows[:, : _ROW.itemsize].copy().view(_ROW).reshape(count)
        order = np.argsort(table["row"], kind="stable")
        table, rows = table[order], rows[order]
        features = []
        place, used = _ROW.itemsize, 0
        for name in head.codecs:
            codec = CODECS[name]
            wide, state = codec.row_bytes(head.width), codec.header_bytes(head.width)
            block = codec.decode(head.state[used : used + state], rows[:, place : place + wide], width=head.width)
            features.append(block.to(head.dtype))
            place, used = place + wide, used + state
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
        data = self._bytes(offset + head.num_bytes - size - _CRC.size, size + _CRC.size, span=offset)
        if _CRC.unpack(data[size:])[0] != _chunk_crc(data[:size], head.crc, _KEYS_CHUNK):
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

    def _rows(self, head: SpanHead, count: int) -> Bytes2D:
        """(count, row bytes): the first rows, checked chunk by chunk, from one read."""
        if not count:
            return np.empty((0, head.row_bytes), np.uint8)
        size = head.row_bytes
        last = min(-(-count // CHUNK_ROWS) * CHUNK_ROWS, head.tokens)
        firsts = range(0, last, CHUNK_ROWS)
        data = memoryview(self._bytes(head.rows_offset, last * size + _CRC.size * len(firsts), span=head.offset))
        parts: list[Bytes2D] = []
        place = 0
        for number, first in enumerate(firsts):
            num_rows = min(CHUNK_ROWS, last - first)
            chunk = data[place : place + num_rows * size]
            place += len(chunk) + _CRC.size
            if _CRC.unpack(data[place - _CRC.size : place])[0] != _chunk_crc(chunk, head.crc, number):
                raise self._damaged(
                    head.offset, f"tokens {first} to {first + num_rows - 1} do not match their checksum"
                )
            parts.append(np.frombuffer(chunk, np.uint8).reshape(num_rows, size))
        rows: NDArray[np.uint8] = np.concatenate(parts)[:count]
        return rows

    def _check_file(self, key: MemoryKey) -> None:
        fixed = self._bytes(0, _FILE.size, span=0)
        magic, version, _, text_bytes, crc = _FILE.unpack(fixed)
        if magic != _FILE_MAGIC:
            raise self._damaged(0, "it is not a segment file")
        if version > VERSION:
            raise self._newer(version)
        text = self._bytes(_FILE.size, text_bytes, span=0)
        if zlib.crc32(text, zlib.crc32(fixed[: -_CRC.size])) != crc:
            raise self._damaged(0, "the file header does not match its checksum")
        if text.decode("ascii") != key.to_json():
            raise BankError(
                f"{self.path} belongs to another source than the catalogue says; "
                "it was not used: remove this source from memory and ask again"
            )

    def _bytes(self, offset: int, count: int, *, span: int) -> bytes:
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


def _head_crc(fixed: bytes, text: bytes, digest: str) -> int:
    return zlib.crc32(text, zlib.crc32(fixed, zlib.crc32(digest.encode("ascii"))))


def _chunk_crc(data: bytes | memoryview, head_crc: int, number: int) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack("<II", head_crc, number)))
