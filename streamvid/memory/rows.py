"""Rows entered as a whole: of sources and spans that come from segments, an archive or another folder.

The caller holds the transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamvid.memory.care import segment_files
from streamvid.memory.catalog import Catalog
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import SourceRecord, SpanRecord, State
from streamvid.memory.segment_format import SpanHead
from streamvid.memory.segments import SegmentReader

SOURCE_COLUMNS = ("path", "name", "created", "state", "duration", "summary", "stop", "pinned")
"""What the segments do not say of a source."""

HISTORY = {
    "answers": ("question", "answer", "receipt", "created"),
    "gaps": ("start", "stop", "reason", "created"),
    "expired": ("start", "stop", "spans", "tokens", "reason", "created"),
}
"""Tables that go with a source and are told by nothing but the catalogue, with their columns."""


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
        span_id = insert(
            catalog,
            "spans",
            source_id=source.id,
            ordinal=ordinal,
            file=reader.path.name,
            level=level,
            **span_columns(head),
        )
        insert(catalog, "keys", span_id=span_id, width=keys.shape[1], vectors=keys.numpy().astype("<f4").tobytes())
    count_spans(catalog, source.id)
    catalog.execute("UPDATE sources SET bytes = ? WHERE id = ?", sum(segment_files(folder).values()), source.id)


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
    return insert(catalog, "sources", **ids, digest=key.digest, key=key.to_json(), **columns)


def insert_history(catalog: Catalog, table: str, source_id: int, row: dict[str, Any]) -> None:
    """Enter a row of one of the `HISTORY` tables in a caller's transaction."""
    insert(catalog, table, source_id=source_id, **{name: row[name] for name in HISTORY[table]})


def insert(catalog: Catalog, table: str, **columns: object) -> int:
    """Enter one row; returns its id."""
    cursor = catalog.execute(
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", *columns.values()
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def expire(catalog: Catalog, span: SpanRecord, reason: str) -> None:
    """Forget a span and say so in the table of what was expired."""
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


def count_spans(catalog: Catalog, source_id: int) -> None:
    """Make the sums of a source follow from its spans."""
    catalog.execute(
        "UPDATE sources SET spans = (SELECT COUNT(*) FROM spans WHERE source_id = sources.id), "
        "tokens = (SELECT COALESCE(SUM(tokens), 0) FROM spans WHERE source_id = sources.id), "
        # A source goes on where it was, even if its end was lost: the loss is told as expired.
        "stop = COALESCE(stop, "
        "(SELECT stop FROM spans WHERE source_id = sources.id ORDER BY stop_seconds DESC LIMIT 1)) WHERE id = ?",
        source_id,
    )


def number_spans(catalog: Catalog, source_id: int) -> None:
    """Ordinals in time order."""
    # Negative first: an ordinal is taken by one span at a time.
    catalog.execute(
        "UPDATE spans SET ordinal = -1 - ranked.place FROM (SELECT id, ROW_NUMBER() OVER (ORDER BY start_seconds, id) "
        "- 1 AS place FROM spans WHERE source_id = ?) AS ranked WHERE ranked.id = spans.id",
        source_id,
    )
    catalog.execute("UPDATE spans SET ordinal = -1 - ordinal WHERE source_id = ?", source_id)


def _now() -> str:
    return datetime.now(UTC).isoformat()
