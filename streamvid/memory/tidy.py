"""Limits where nobody writes: what is too old or too much goes from sources that are finished or were left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction

from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.bounds import (
    AGE,
    BATCH,
    FILES,
    LOG_BYTES,
    SLACK,
    SMALLEST_FILE,
    SPACE,
    Folder,
    Holding,
    reserve_bytes,
)

STEPS = 64
"""Batches of spans that one call merges or expires at most: seconds of work, however far above a limit memory is."""


@dataclass(slots=True)
class Tidied:
    """What `tidy` did."""

    sources: int = 0
    """From which something was expired, or in which something was merged, for their age or their own limits."""

    merged_spans: int = 0
    """Spans that were merged, two into one."""

    expired_spans: int = 0
    freed_bytes: int = 0
    """Of segment files and of what can be made anew, given back."""

    more: bool = False
    """Whether the steps were used up: call again."""

    notes: list[str] = field(default_factory=list)
    """What the user should hear: limits that could not be reached, times that could not be read."""


@dataclass(frozen=True, slots=True)
class _Due:
    """A source that is above a limit."""

    source_id: int
    before: Fraction | None
    """Spans that stop at or before this are too old; None: none is."""


def tidy(bank: Bank, *, now: datetime | None = None, steps: int = STEPS) -> Tidied:
    """Apply all limits of a bank to the sources that nobody writes.

    A writer keeps its own source within the limits; this does so for finished and abandoned ones.  Age counts by
    the wall clock where a source says when its second 0 was (``origin`` in its summary, ISO 8601 with a time
    zone), else from the end of what is stored of it, and acts once a span is a 256th of the age too old.  Tokens
    and bytes of a source, then bytes of the folder, are brought below their limits as a writer would.  Pinned
    sources, those being written, and the newest span of each are left alone.

    Where nothing is to be done that takes at most 5 statements and no lock, so a program that runs on may call it
    every minute.  Killed anywhere it leaves memory whole.

    Args:
        bank: opened with the limits, for writing.
        now: with a time zone; None: the present.
        steps: batches of work at most, >= 1; ``more`` says whether that was too few.  More takes longer at once.

    Raises:
        BankError: if the folder is open for reading only, or the disk does not take what is merged; what was
            done before stays done.
    """
    now = datetime.now(UTC) if now is None else now
    if now.tzinfo is None:
        raise ValueError(f"now must have a time zone, got {now}; for the present in UTC leave it out")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    told = Tidied()
    if not bank.limits.bounds_memory:
        return told
    if bank.read_only:
        raise BankError(f"{bank.folder} is open for reading only and cannot be tidied; open it for writing")
    folder = Folder(bank)
    left = steps
    try:
        for due in list(_due(bank, now, told.notes)):
            if left <= 0:
                told.more = True
                break
            with folder.held(due.source_id) as holding:
                if holding is None or holding.source.pinned:
                    continue
                left = _shrink(holding, due, bank, left)
                told.more |= left <= 0
                told.sources += bool(holding.merged_spans or holding.expired_spans)
        if bank.limits.disk_bytes is not None:
            _fit_folder(folder, bank, bank.limits.disk_bytes, left, told)
    except OSError as error:
        raise BankError(
            f"{bank.folder} could not be tidied: {error.strerror}; what was done so far stays, free some space or "
            "check permissions and run the same again"
        ) from error
    told.merged_spans, told.expired_spans = folder.merged_spans, folder.expired_spans
    told.freed_bytes = folder.freed_bytes
    return told


def _due(bank: Bank, now: datetime, notes: list[str]) -> Iterator[_Due]:
    """The sources above a limit of their own, oldest first, from one statement."""
    limits = bank.limits
    if limits.keep_seconds is None and limits.source_bytes is None and limits.source_tokens is None:
        return
    rows = bank._catalog.execute(
        "SELECT id, name, spans, tokens, bytes, stop, "
        "CASE WHEN json_valid(summary) THEN json_extract(summary, '$.origin') END AS origin, "
        "(SELECT stop FROM spans WHERE source_id = sources.id ORDER BY ordinal LIMIT 1) AS oldest "
        "FROM sources WHERE NOT pinned AND spans > 0 ORDER BY id"
    )
    for row in rows.fetchall():
        before = None
        if limits.keep_seconds is not None and row["spans"] > 1:
            keep = Fraction(limits.keep_seconds)
            end = max(Fraction(row["stop"]), _seconds_since(row["origin"], now, row["name"], notes))
            if Fraction(row["oldest"]) <= end - keep - keep / FILES:
                before = end - keep
        over = [
            f"may {what} {limit} {unit} and its last span has {count}"
            for what, unit, count, limit in (
                ("hold", "bytes", row["bytes"], limits.source_bytes),
                ("remember", "tokens", row["tokens"], limits.source_tokens),
            )
            if limit is not None and count > limit
        ]
        if over and row["spans"] == 1:
            notes.append(f"{row['name']} {over[0]}; raise the limit or remove it")
        elif over or before is not None:
            yield _Due(row["id"], before)


def _seconds_since(origin: object, now: datetime, name: str, notes: list[str]) -> Fraction:
    """From second 0 of a source until now, exact; 0 where it is not known."""
    if origin is None:
        return Fraction(0)
    try:
        begin = datetime.fromisoformat(str(origin))
    except ValueError:
        begin = None
    if begin is None or begin.tzinfo is None:
        notes.append(
            f"{name} says that it began at {origin!r}, which is not a time in ISO 8601 with a time zone; its age "
            "counts from the end of what is stored"
        )
        return Fraction(0)
    passed = now - begin
    return Fraction(passed.days * 86400 + passed.seconds) + Fraction(passed.microseconds, 10**6)


def _shrink(holding: Holding, due: _Due, bank: Bank, steps: int) -> int:
    """Bring one source below its limits; returns the steps that are left."""
    limits = bank.limits
    while due.before is not None and steps > 0 and holding.expire(BATCH, reason=AGE, before=due.before):
        steps -= 1
    if limits.source_tokens is not None and holding.tokens > limits.source_tokens:
        low = limits.source_tokens - limits.source_tokens // SLACK
        while steps > 0 and holding.tokens > low and (holding.merge() or holding.expire(1, reason=SPACE)):
            steps -= 1
    if limits.source_bytes is not None and holding.num_bytes > limits.source_bytes:
        low = limits.source_bytes - reserve_bytes(limits.source_bytes) - limits.source_bytes // SLACK
        while steps > 0 and holding.num_bytes > low:
            steps -= 1
            if not holding.merge() and not holding.expire(1, reason=SPACE):
                holding.reclaim(0)
                break
    return steps


def _fit_folder(folder: Folder, bank: Bank, limit: int, steps: int, told: Tidied) -> None:
    """Bring the folder below its limit, a 256th of it in a step."""
    high = limit - reserve_bytes(limit) - LOG_BYTES
    low = high - limit // SLACK
    used = bank.usage()
    if used <= high:
        return
    if folder.drop_copies():
        used = bank.usage()
    done = folder.merged_spans, folder.expired_spans, folder.freed_bytes
    part = max(limit // FILES, SMALLEST_FILE)
    while used > low:
        if steps <= 0:
            told.more = True
            return
        steps -= 1
        left = folder.merge_heaviest(min(part, used - low), limit)
        if left > 0 and used > high:
            folder.expire_oldest(min(left, used - high))
        used = bank.usage()
        before, done = done, (folder.merged_spans, folder.expired_spans, folder.freed_bytes)
        if done == before:
            break
    if used > limit:
        told.notes.append(
            f"memory in {bank.folder} may hold {limit} bytes and holds {used}, in sources that are kept whole, being "
            "written, or cannot be made smaller; remove a source or raise the limit"
        )
