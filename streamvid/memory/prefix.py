"""What is left of a span whose tokens are damaged: everything before the first damaged chunk.

Tokens lie in falling score order in checked chunks, so that is the span as a smaller budget would read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.keys import MemoryKey
from streamvid.memory.segment_format import (
    CHUNK_ROWS,
    CRC,
    KEYS_CHUNK,
    SpanHead,
    chunk_crc,
    file_header,
    span_bytes,
    span_meta,
    span_start,
)
from streamvid.memory.segments import SegmentReader, segment_name, sync_folder, write_at


def intact_tokens(reader: SegmentReader, head: SpanHead) -> int:
    """How many of a span's best tokens are as written; holds one chunk in memory."""
    count = 0
    for _, rows in _chunks(reader, head):
        count += rows
    return count


def shortened(reader: SegmentReader, head: SpanHead, *, key: MemoryKey, keys: Tensor, tokens: int) -> bytes:
    """A span anew with its best tokens only, and other retrieval keys; decodes nothing.

    Args:
        reader: of the file it lies in.
        head: of the span.
        key: of the source.
        keys: (K, Dk) float32.
        tokens: how many to keep, at most `intact_tokens`: a whole number of chunks, or all.
    """
    trailer = keys.detach().cpu().numpy().astype("<f4").tobytes()
    meta = span_meta(
        key=key,
        start=head.start,
        stop=head.stop,
        grid=head.grid,
        tokens=tokens,
        width=head.width,
        dtype=str(head.dtype).removeprefix("torch."),
        blocks=[(c, len(h), b) for c, h, b in zip(head.codecs, head.headers, head.books, strict=True)],
        keys=(keys.shape[0], keys.shape[1]),
    )
    state = b"".join(head.headers)
    total = span_bytes(
        meta_bytes=len(meta),
        header_bytes=len(state),
        tokens=tokens,
        row_bytes=head.row_bytes,
        key_bytes=len(trailer),
    )
    before, crc = span_start(meta, state, num_bytes=total, key=key)
    parts = [before]
    left = tokens
    for number, (data, rows) in enumerate(_chunks(reader, head)):
        if not left:
            break
        parts += [data, CRC.pack(chunk_crc(data, crc, number))]
        left -= rows
    assert not left
    parts += [trailer, CRC.pack(chunk_crc(trailer, crc, KEYS_CHUNK))]
    return b"".join(parts)


def write_spans(
    folder: Path, key: MemoryKey, spans: Iterable[tuple[int, bytes]], *, limit: int
) -> list[tuple[int, str, int, int]]:
    """Write spans into new files behind all others of a source, on the disk on return.

    Args:
        folder: of the source.
        key: of the source.
        spans: id and bytes of each.
        limit: size of a file in bytes, which one span alone may pass.

    Returns:
        Of each span: id, file, offset and size.
    """
    header = file_header(key)
    number = max((int(path.stem) for path in folder.glob("*.seg")), default=-1)
    places: list[tuple[int, str, int, int]] = []
    fd, end = -1, 0
    try:
        for span_id, data in spans:
            if fd < 0 or end + len(data) > limit:
                if fd >= 0:
                    os.fsync(fd)
                    os.close(fd)
                number += 1
                path = folder / segment_name(number)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                write_at(fd, header, 0)
                end = len(header)
            write_at(fd, data, end)
            places.append((span_id, segment_name(number), end, len(data)))
            end += len(data)
        if fd >= 0:
            os.fsync(fd)
    finally:
        if fd >= 0:
            os.close(fd)
    sync_folder(folder)
    return places


def _chunks(reader: SegmentReader, head: SpanHead) -> Iterator[tuple[bytes, int]]:
    """Bytes and rows of each chunk up to the first that is not as written."""
    place = head.rows_offset
    for number, first in enumerate(range(0, head.tokens, CHUNK_ROWS)):
        rows = min(CHUNK_ROWS, head.tokens - first)
        size = rows * head.row_bytes
        try:
            data = reader.bytes_at(place, size + CRC.size, span=head.offset)
        except BankError:
            return
        chunk = data[:size]
        if CRC.unpack(data[size:])[0] != chunk_crc(chunk, head.crc, number):
            return
        yield chunk, rows
        place += size + CRC.size
