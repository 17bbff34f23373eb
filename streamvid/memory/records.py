"""What the catalogue says, row by row: frozen records, and reading them from rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.keys import MemoryKey


class State(StrEnum):
    """Whether a source is still being watched."""

    OPEN = "open"
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One remembered source."""

    id: int
    """Never used again after the source is removed."""

    key: MemoryKey
    path: str
    """Where the video was; for people, never used to find memory."""

    name: str
    created: datetime
    state: State
    duration: Fraction | None
    """Of the video in seconds; None until it is complete."""

    summary: Mapping[str, Any]
    """What ``finish`` was given."""

    spans: int
    tokens: int
    num_bytes: int
    """Of its segment files."""

    stop: Fraction | None
    """Seconds, exact: where the last stored span ends and an interrupted ingest goes on; None if nothing is stored."""

    pinned: bool
    """Kept when space is made."""

    @property
    def folder(self) -> str:
        """Of its segment files, relative to the memory folder."""
        return f"segments/{self.key.short}-{self.id}"


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One remembered span."""

    id: int
    source_id: int
    ordinal: int
    """Rises in time order within the source; merged spans leave gaps."""

    start: Fraction
    """Seconds, exact; the span covers ``[start, stop)``."""

    stop: Fraction
    tokens: int
    file: str
    """Name of the segment file in the source's folder."""

    offset: int
    num_bytes: int
    grid: tuple[int, int, int]
    codec: str
    """What its features are stored as."""

    level: int
    """How many times it was merged with its neighbours to save space; 0 is as watched."""


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One answer that was given from memory."""

    id: int
    source_id: int
    question: str
    answer: str
    receipt: Mapping[str, Any]
    created: datetime


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One saved index."""

    source_id: int | None
    """Whose keys it holds; None: those of every source of this embedder."""

    embedder: str
    """Fingerprint of what made the keys."""

    kind: str
    width: int
    """Length of a key."""

    vectors: int
    """How many keys it holds."""

    last_span_id: int
    """It holds the keys of all spans of its scope up to this one, as they were when it was saved."""

    file: str
    """Name in the folder of saved indexes."""

    num_bytes: int
    digest: str
    """sha256 of the file."""


@dataclass(frozen=True, slots=True)
class GapRecord:
    """A stretch of a source of which nothing was seen."""

    source_id: int
    start: Fraction
    """Seconds, exact; the gap covers ``[start, stop)``."""

    stop: Fraction
    reason: str
    created: datetime


@dataclass(frozen=True, slots=True)
class Totals:
    """How much there is of what happened to a source."""

    answers: int
    gaps: int
    gap_seconds: float
    expired: int
    """Entries of what expired, each of one or many spans."""

    expired_spans: int
    expired_seconds: float
    """Of the entries with spans; where only a part of a span is lost, its time is still remembered."""


@dataclass(frozen=True, slots=True)
class ExpiredRecord:
    """A stretch of a source that was remembered once and is not any more."""

    source_id: int
    start: Fraction
    """Seconds, exact; what is gone lay within ``[start, stop)``."""

    stop: Fraction
    spans: int
    tokens: int
    reason: str
    created: datetime


@dataclass(frozen=True, slots=True)
class MergedSpan:
    """A span on the disk that is to stand for some neighbouring ones."""

    replaced: tuple[int, ...]
    """Ids of the spans it is made of, in time order; it takes the place of the first."""

    start: Fraction
    stop: Fraction
    tokens: int
    file: str
    offset: int
    num_bytes: int
    grid: tuple[int, int, int]
    codec: str
    level: int
    keys: Tensor
    """(K, Dk) float32, unit length."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a source weighs when room is needed."""

    source_id: int
    num_bytes: int
    spans: int
    pinned: bool
    seconds: float
    """From the start of its first span to the stop of its last."""

    @property
    def bytes_per_hour(self) -> float:
        """Of what is remembered of it; the source with most makes room first."""
        return self.num_bytes / max(self.seconds, 1e-3) * 3600


def source_record(row: sqlite3.Row) -> SourceRecord:
    """A row of sources.

    Raises:
        BankError: if it makes no sense.
    """
    with _row_reported("sources", row):
        key = MemoryKey.from_json(row["key"])
        if key.digest != row["digest"]:
            raise BankError(
                f"the catalogue's key of source {row['id']} ({row['name']}) is damaged; "
                "restore the catalogue from a copy, or choose another memory folder"
            )
        return SourceRecord(
            id=row["id"],
            key=key,
            path=row["path"],
            name=row["name"],
            created=datetime.fromisoformat(row["created"]),
            state=State(row["state"]),
            duration=None if row["duration"] is None else Fraction(row["duration"]),
            summary=json.loads(row["summary"]),
            spans=row["spans"],
            tokens=row["tokens"],
            num_bytes=row["bytes"],
            stop=None if row["stop"] is None else Fraction(row["stop"]),
            pinned=bool(row["pinned"]),
        )


def span_record(row: sqlite3.Row) -> SpanRecord:
    """A row of spans.

    Raises:
        BankError: if it makes no sense.
    """
    with _row_reported("spans", row):
        frames, rows, columns = json.loads(row["grid"])
        return SpanRecord(
            id=row["id"],
            source_id=row["source_id"],
            ordinal=row["ordinal"],
            start=Fraction(row["start"]),
            stop=Fraction(row["stop"]),
            tokens=row["tokens"],
            file=row["file"],
            offset=row["offset"],
            num_bytes=row["bytes"],
            grid=(frames, rows, columns),
            codec=row["codec"],
            level=row["level"],
        )


def key_vectors(width: int | None, data: bytes | None) -> Tensor:
    """(K, width) float32: a row of keys, or none.

    Raises:
        BankError: if they are no whole vectors.
    """
    if not width or not data:
        return torch.zeros(0, width or 0)
    if len(data) % (4 * width):
        raise BankError(
            f"the catalogue holds {len(data)} bytes of keys of {width} numbers: it is damaged; "
            "rebuild it with: streamvid memory repair"
        )
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).reshape(-1, width)


@contextmanager
def _row_reported(table: str, row: sqlite3.Row) -> Iterator[None]:
    """Turn values that cannot be read into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise BankError(
            f"the catalogue's row {row['id']} of {table} is damaged ({error}); "
            "rebuild the catalogue with: streamvid memory repair"
        ) from error
