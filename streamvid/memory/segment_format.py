"""What a segment file looks like: spans of tokens, checksummed, best tokens first.

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

This module knows bytes; who writes and reads files of them is `segments`.  All numbers are little-endian.

Format 2 says for every block the size of its codec header and the codebook it needs; spans of format 1, which
had neither, are read as before and may stand in one file with spans of format 2.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.codec import CODECS, Codec
from streamvid.memory.keys import MemoryKey
from streamvid.tokens import VideoTokens

VERSION = 2
CHUNK_ROWS = 64

FILE_START = struct.Struct("<8sHHII")
"""magic, version, 0, bytes of JSON, crc32 of all that and the JSON"""

SPAN_START = struct.Struct("<4sHHIIQI")
"""magic, version, 0, bytes of meta, bytes of codec headers, bytes of the whole span, crc32 of the head"""

CRC = struct.Struct("<I")

KEY_BYTES = 1 << 20
"""No key is larger; bounds what a damaged header can make us read."""

FILE_MAGIC = b"SVIDSEG\n"
SPAN_MAGIC = b"SPAN"

ROW = np.dtype(
    [
        ("row", "<u4"),  # place in the span as it came: raster and time order
        ("position", "<i4", (3,)),
        ("pts_seconds", "<f8"),
        ("duration_seconds", "<f8"),
        ("size", "<f4"),
        ("score", "<f4"),
    ]
)

ROW_BYTES = ROW.itemsize
"""Of a token row besides its features and layers."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}

HEADER_BYTES_1 = {"fp16": 0, "fp32": 0, "sq8": 8}
"""Bytes a dimension of the codec headers of format 1, which did not say their sizes."""

KEYS_CHUNK = 0xFFFFFFFF
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
        return ROW.itemsize + sum(CODECS[name].row_bytes(self.width) for name in self.codecs)


def file_header(key: MemoryKey) -> bytes:
    """The first bytes of a segment file of one source."""
    text = key.to_json().encode("ascii")
    head = FILE_START.pack(FILE_MAGIC, VERSION, 0, len(text), 0)[: -CRC.size]
    return head + CRC.pack(zlib.crc32(text, zlib.crc32(head))) + text


def intact_header(data: bytes) -> bool:
    """Whether a file begins with a header as written, even if in a format that cannot be read here."""
    if len(data) < FILE_START.size:
        return False
    magic, _, _, size, crc = FILE_START.unpack_from(data)
    text = data[FILE_START.size : FILE_START.size + size]
    return bool(magic == FILE_MAGIC and zlib.crc32(text, zlib.crc32(data[: FILE_START.size - CRC.size])) == crc)


def header_key(path: Path) -> MemoryKey:
    """The key that a segment file says it is of.

    Raises:
        BankError: if it cannot be read, or its header is not as written.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_START.size)
            size = FILE_START.unpack(data)[3] if len(data) == FILE_START.size else 0
            data += file.read(min(size, KEY_BYTES))
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror}; check permissions") from error
    if not intact_header(data):
        raise BankError(f"{path} does not begin as a segment file does: it is damaged or another program's")
    return MemoryKey.from_json(data[FILE_START.size :].decode("ascii"))


def keys_copy(head: SpanHead, keys: Tensor) -> tuple[int, bytes]:
    """Where in its file a span ends with the copy of its retrieval keys, and these bytes."""
    data = keys.numpy().astype("<f4").tobytes()
    data += CRC.pack(chunk_crc(data, head.crc, KEYS_CHUNK))
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
    if dtype not in DTYPES:
        raise ValueError(f"features must be one of {', '.join(DTYPES)}, got {dtype}")
    if bool(torch.isnan(tokens.score).any()):
        raise ValueError("scores order the tokens of a span and must be numbers, got nan")
    order = torch.argsort(tokens.score, descending=True, stable=True).cpu()
    table = np.zeros(len(tokens), ROW)
    table["row"] = order.numpy()
    for name in ("position", "pts_seconds", "duration_seconds", "size", "score"):
        table[name] = getattr(tokens, name).detach().cpu()[order].numpy()
    codecs = (codec, *(layer_codecs if layer_codecs is not None else (codec,) * len(tokens.layers)))
    values = (tokens.features, *tokens.layers)
    blocks = [c.encode(x.detach().cpu()[order]) for c, x in zip(codecs, values, strict=True)]
    rows = np.concatenate([table.view(np.uint8).reshape(len(tokens), ROW.itemsize), *(b.rows for b in blocks)], axis=1)
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
    before, crc = span_start(meta, state, num_bytes=total, key=key)
    parts = [before]
    for number, first in enumerate(chunks):
        data = rows[first : first + CHUNK_ROWS].tobytes()
        parts += [data, CRC.pack(chunk_crc(data, crc, number))]
    parts += [trailer, CRC.pack(chunk_crc(trailer, crc, KEYS_CHUNK))]
    data = b"".join(parts)
    assert len(data) == total
    notes = tuple(dict.fromkeys(b.note for b in blocks if b.note))
    return EncodedSpan(data, codec=blocks[0].codec, notes=notes)


def span_start(meta: bytes, state: bytes, *, num_bytes: int, key: MemoryKey) -> tuple[bytes, int]:
    """Everything of a span before its first chunk, and the checksum in it that seeds those of the chunks.

    Args:
        meta: as from `span_meta`.
        state: all codec headers.
        num_bytes: of the whole span, as from `span_bytes`.
        key: of the source.
    """
    fixed = SPAN_START.pack(SPAN_MAGIC, VERSION, 0, len(meta), len(state), num_bytes, 0)[: -CRC.size]
    crc = head_crc(fixed, meta + state, key.digest)
    return b"".join((fixed, CRC.pack(crc), meta, state)), crc


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
    return SPAN_START.size + meta_bytes + header_bytes + tokens * row_bytes + CRC.size * (chunks + 1) + key_bytes


def head_crc(fixed: bytes, text: bytes, digest: str) -> int:
    """Checksum of a span's head: of its fixed part up to the checksum, and of meta and codec headers."""
    return zlib.crc32(text, zlib.crc32(fixed, zlib.crc32(digest.encode("ascii"))))


def chunk_crc(data: bytes | memoryview, head_crc: int, number: int) -> int:
    """Checksum of a span's n-th chunk, or with `KEYS_CHUNK` of its retrieval keys."""
    return zlib.crc32(data, zlib.crc32(struct.pack("<II", head_crc, number)))
