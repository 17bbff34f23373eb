"""Segment files: spans of tokens, appended, checksummed, best tokens first.

::

    file    file header (key)  span  span  span ...
    span    head: sizes, meta JSON, codec headers | chunk | chunk | ... | retrieval keys
    chunk   up to 64 token rows | crc32
    row     place, times, size, score | features | layer 0 | layer 1 ...

Rows stand in falling score order, so the best k tokens of a span are its head and its first
ceil(k / 64) chunks, and nothing else is read.  Checksums are seeded: with the key in the head, with the
head's checksum and the place in each chunk, so that an intact chunk of another span or another video is
as wrong as a flipped bit.  The retrieval keys at the end are a copy of the catalogue's, from which a lost
catalogue can be rebuilt; answering never reads them.

This module knows bytes and files; which spans there are is the catalogue's to say.  All numbers are
little-endian.

Format 2 says for every block the size of its codec header and the codebook it needs; spans of format 1, which
had neither, are read as before and may stand in one file with spans of format 2.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
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
from streamvid.memory.codec import CODECS, Bytes2D, Codec, FolderCodecs
from streamvid.memory.keys import MemoryKey
from streamvid.tokens import VideoTokens

VERSION = 2
CHUNK_ROWS = 64

_FILE = struct.Struct("<8sHHII")
"""magic, version, 0, bytes of JSON, crc32 of all that and the JSON"""

_SPAN = struct.Struct("<4sHHIIQI")
"""magic, version, 0, bytes of meta, bytes of codec headers, bytes of the whole span, crc32 of the head"""

_CRC = struct.Struct("<I")

KEY_BYTES = 1 << 20
"""No key is larger; bounds what a damaged header can make us read."""

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

ROW_BYTES = _ROW.itemsize
"""Of a token row besides its features and layers."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}

_HEADER_BYTES_1 = {"fp16": 0, "fp32": 0, "sq8": 8}
"""Bytes a dimension of the codec headers of format 1, which did not say their sizes."""

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

    books: tuple[str, ...]
    """Digests of the codebooks they need, empty where none; in the same order."""

    headers: tuple[bytes, ...]
    """Codec headers, in the same order."""

    key_shape: tuple[int, int]
    """(K, Dk) of the retrieval keys."""

    offset: int
    """Where the span begins in its file."""

    rows_offset: int
    """Where its first chunk begins."""

    num_bytes: int
    """Size of the whole span."""

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


def intact_header(data: bytes) -> bool:
    """Whether a file begins with a header as written, even if in a format that cannot be read here."""
    if len(data) < _FILE.size:
        return False
    magic, _, _, size, crc = _FILE.unpack_from(data)
    text = data[_FILE.size : _FILE.size + size]
    return bool(magic == _FILE_MAGIC and zlib.crc32(text, zlib.crc32(data[: _FILE.size - _CRC.size])) == crc)


def header_key(path: Path) -> MemoryKey:
    """The key that a segment file says it is of.

    Raises:
        BankError: if it cannot be read, or its header is not as written.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_FILE.size)
            size = _FILE.unpack(data)[3] if len(data) == _FILE.size else 0
            data += file.read(min(size, KEY_BYTES))
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror}; check permissions") from error
    if not intact_header(data):
        raise BankError(f"{path} does not begin as a segment file does: it is damaged or another program's")
    return MemoryKey.from_json(data[_FILE.size :].decode("ascii"))


def keys_copy(head: SpanHead, keys: Tensor) -> tuple[int, bytes]:
    """Where in its file a span ends with the copy of its retrieval keys, and these bytes."""
    data = keys.numpy().astype("<f4").tobytes()
    data += _CRC.pack(_chunk_crc(data, head.crc, _KEYS_CHUNK))
    return head.offset + head.num_bytes - len(data), data


def encode_span(
    tokens: VideoTokens,
    *,
    start: Fraction,
    stop: Fraction,
    key: MemoryKey,
    keys: Tensor,
    codec: Codec,
    layer_codecs: Sequence[Codec] | None = None,
) -> EncodedSpan:
    """Lay out one span.

    Args:
        tokens: in raster and time order; may be empty.
        start: seconds, exact.
        stop: seconds, exact; the span covers ``[start, stop)``.
        key: of the source the span belongs to.
        keys: (K, Dk) float32 retrieval keys.
        codec: for the features.
        layer_codecs: one for each layer; None: ``codec`` for all of them.

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
    codecs = (codec, *(layer_codecs if layer_codecs is not None else (codec,) * len(tokens.layers)))
    values = (tokens.features, *tokens.layers)
    blocks = [c.encode(x.detach().cpu()[order]) for c, x in zip(codecs, values, strict=True)]
    rows = np.concatenate([table.view(np.uint8).reshape(len(tokens), _ROW.itemsize), *(b.rows for b in blocks)], axis=1)
    meta = span_meta(
        key=key,
        start=start,
        stop=stop,
        grid=tokens.grid,
        tokens=len(tokens),
        width=tokens.features.shape[1],
        dtype=dtype,
        blocks=[(b.codec, len(b.header), b.book) for b in blocks],
        keys=(keys.shape[0], keys.shape[1]),
    )
    state = b"".join(b.header for b in blocks)
    trailer = keys.detach().cpu().numpy().astype("<f4").tobytes()
    chunks = range(0, len(tokens), CHUNK_ROWS)
    total = span_bytes(
        meta_bytes=len(meta),
        header_bytes=len(state),
        tokens=len(tokens),
        row_bytes=rows.shape[1],
        key_bytes=len(trailer),
    )
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


def span_meta(
    *,
    key: MemoryKey,
    start: Fraction,
    stop: Fraction,
    grid: tuple[int, int, int],
    tokens: int,
    width: int,
    dtype: str,
    blocks: Sequence[tuple[str, int, str]],
    keys: tuple[int, int],
) -> bytes:
    """What a span says about itself, as JSON.

    Args:
        key: of the source.
        start: seconds, exact.
        stop: seconds, exact.
        grid: (T, H, W) before any reduction.
        tokens: how many.
        width: D.
        dtype: of the features, as in ``float32``.
        blocks: of the features, then of each layer: codec, bytes of its header, digest of its codebook or "".
        keys: (K, Dk) of the retrieval keys.
    """
    meta = {
        "key": key.digest,
        "start": str(start),
        "stop": str(stop),
        "grid": list(grid),
        "tokens": tokens,
        "width": width,
        "dtype": dtype,
        "codecs": [codec for codec, _, _ in blocks],
        "headers": [size for _, size, _ in blocks],
        "books": [book for _, _, book in blocks],
        "keys": list(keys),
    }
    return json.dumps(meta, sort_keys=True, separators=(",", ":")).encode("ascii")


def span_bytes(*, meta_bytes: int, header_bytes: int, tokens: int, row_bytes: int, key_bytes: int) -> int:
    """Size of a span, exactly.

    Args:
        meta_bytes: of `span_meta`.
        header_bytes: of all codec headers.
        tokens: how many.
        row_bytes: of a whole token row: `ROW_BYTES`, then one row of each codec.
        key_bytes: of the retrieval keys.
    """
    chunks = -(-tokens // CHUNK_ROWS)
    return _SPAN.size + meta_bytes + header_bytes + tokens * row_bytes + _CRC.size * (chunks + 1) + key_bytes


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
        unknown = [name for name in meta["codecs"] if name not in CODECS]
        if unknown:
            raise BankError(
                f"{self.path} holds features stored as {unknown[0]}, which this streamvid cannot read; update streamvid"
            )
        if version == 1:
            sizes = [_HEADER_BYTES_1[name] * meta["width"] for name in meta["codecs"]]
        else:
            sizes = meta["headers"]
        ends = [meta_bytes + sum(sizes[: i + 1]) for i in range(len(sizes))]
        return SpanHead(
            start=Fraction(meta["start"]),
            stop=Fraction(meta["stop"]),
            tokens=meta["tokens"],
            grid=(meta["grid"][0], meta["grid"][1], meta["grid"][2]),
            width=meta["width"],
            dtype=_DTYPES[meta["dtype"]],
            codecs=tuple(meta["codecs"]),
            books=tuple(meta.get("books", [""] * len(sizes))),
            headers=tuple(text[end - size : end] for end, size in zip(ends, sizes, strict=True)),
            key_shape=(meta["keys"][0], meta["keys"][1]),
            offset=offset,
            rows_offset=offset + _SPAN.size + len(text),
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
        table = rows[:, : _ROW.itemsize].copy().view(_ROW).reshape(count)
        order = np.argsort(table["row"], kind="stable")
        table, rows = table[order], rows[order]
        features = []
        place = _ROW.itemsize
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

    def intact_head(self, offset: int) -> bool:
        """Whether the head at ``offset`` is as written, even if in a format that cannot be read here."""
        try:
            fixed = self._bytes(offset, _SPAN.size, span=offset)
            magic, _, _, meta_bytes, state_bytes, _, crc = _SPAN.unpack(fixed)
            text = self._bytes(offset + _SPAN.size, meta_bytes + state_bytes, span=offset)
        except BankError:
            return False
        return bool(magic == _SPAN_MAGIC and _head_crc(fixed[: -_CRC.size], text, self._digest) == crc)

    def check(self, head: SpanHead) -> None:
        """Read every token byte of a span and compare checksums, a chunk at a time; decodes nothing.

        Args:
            head: of the span, from this reader.

        Raises:
            BankError: if one byte is not as written.
        """
        num_chunks = -(-head.tokens // CHUNK_ROWS)
        tail = 4 * head.key_shape[0] * head.key_shape[1] + _CRC.size
        rows = head.offset + head.num_bytes - tail - head.rows_offset - _CRC.size * num_chunks
        if rows < 0 or (rows % head.tokens if head.tokens else rows):
            raise self._damaged(head.offset, "its parts do not add up to its size")
        place = head.rows_offset
        for number in range(num_chunks):
            count = min(CHUNK_ROWS, head.tokens - number * CHUNK_ROWS)
            size = rows // head.tokens * count
            data = self._bytes(place, size + _CRC.size, span=head.offset)
            if _CRC.unpack(data[size:])[0] != _chunk_crc(memoryview(data)[:size], head.crc, number):
                first = number * CHUNK_ROWS
                raise self._damaged(head.offset, f"tokens {first} to {first + count - 1} do not match their checksum")
            place += len(data)

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
