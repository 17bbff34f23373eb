"""Staying within limits: old spans are made smaller, and expired when they cannot be any smaller.

Knows spans, files and levels; how tokens are folded is a method's to say.  A merged span is on the disk before
the catalogue points to it, and what it is made of goes after: a process killed anywhere leaves memory whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from streamvid.budget import Limits
from streamvid.errors import BankError, SettingsError
from streamvid.memory.database import COMMIT_BYTES
from streamvid.memory.index import unit
from streamvid.memory.merging import merged_tokens
from streamvid.memory.records import MergedSpan, SourceRecord, SpanRecord
from streamvid.memory.segment_format import encode_span
from streamvid.memory.segments import SegmentWriter
from streamvid.memory.source_files import DEAD, DEAD_URGENT, SourceFiles
from streamvid.temporal.methods.memory.merge_time import MergeTime, diverse

if TYPE_CHECKING:
    from streamvid.memory.bank import Bank

FILES = 256
"""Segment files that a limit is divided into at least: space is given back a file at a time."""

SMALLEST_FILE = 16 << 10

BATCH = 32
"""Pairs of spans that are merged in one write and one transaction at most."""

SLACK = 32
"""A 32nd of a limit is freed beyond what is needed, so that there is peace for a while."""

LOG_BYTES = 4 * COMMIT_BYTES
"""What a batch of merged spans may add to the catalogue's log."""

SPACE, AGE = "space", "age"
"""Reasons of expiry."""


def segment_bytes(limits: Limits, wanted: int) -> int:
    """Size of segment files that suits limits: at most ``wanted``, and a 256th of the smallest byte limit."""
    smallest = min((n for n in (limits.disk_bytes, limits.source_bytes) if n is not None), default=None)
    return wanted if smallest is None else min(wanted, max(SMALLEST_FILE, smallest // FILES))


def reserve_bytes(limit: int) -> int:
    """What is kept free below a byte limit, for making room: a batch, and what is moved out of a file."""
    return 2 * (limit // FILES)


def fitting_tokens(limits: Limits, bytes_per_token: int, already: int, *, device: str = "cpu") -> int:
    """How many visual tokens of an answer fit, before anything is allocated for them.

    Args:
        limits: ``answer_tokens``, and ``ram_bytes`` or ``vram_bytes``, whichever the device has.
        bytes_per_token: what one token takes in a prefill: keys and values of all layers and the widest
            activations, >= 1.
        already: bytes in use now, weights included.
        device: of the language model, as torch names it.

    Returns:
        1 to ``limits.answer_tokens``.

    Raises:
        SettingsError: if there is no room for a single token.
    """
    if bytes_per_token < 1 or already < 0:
        raise ValueError(f"bytes_per_token must be at least 1 and already at least 0, got {bytes_per_token}, {already}")
    on_cpu = device.split(":")[0] == "cpu"
    limit = limits.ram_bytes if on_cpu else limits.vram_bytes
    if limit is None:
        return limits.answer_tokens
    count = (limit - already) // bytes_per_token
    if count < 1:
        what = "main memory" if on_cpu else f"memory of {device}"
        raise SettingsError(
            f"{what} may hold {limit} bytes and {already} are in use, which leaves no room for a token of "
            f"{bytes_per_token} bytes; raise the limit, or choose a smaller model"
        )
    return min(limits.answer_tokens, count)


class Holding(SourceFiles):
    """One source, held for writing, while room is made in it.

    Counts spans by level, too, from an index of all its spans once, and keeps count from there on: the caller
    says what it appends.

    Args:
        bank: where the source is.
        source: which the caller holds for writing.
        segments: what it is written with; None: a new segment file is begun when something is written.
        method: how spans are merged.
    """

    def __init__(
        self, bank: Bank, source: SourceRecord, segments: SegmentWriter | None, *, method: MergeTime | None = None
    ) -> None:
        super().__init__(bank, source, segments)
        self.tokens, self.spans = source.tokens, source.spans
        self.merged_spans = self.expired_spans = 0
        """Spans that were merged into others, and spans that were forgotten, since it was taken."""
        self._method = method or MergeTime()
        self._levels = self._catalog.level_counts(source.id)

    def added(self, *, file: str, num_bytes: int, disk_bytes: int, tokens: int) -> None:
        """Count a span that the caller appended."""
        self._wrote(file, num_bytes, disk_bytes)
        self._levels[0] = self._levels.get(0, 0) + 1
        self.tokens += tokens
        self.spans += 1

    def merge(self, *, urgent: bool = False) -> bool:
        """Merge some of the oldest pairs of the fullest level; of equally full levels the finest.

        Args:
            urgent: move what is alive out of files with less dead space too.

        Returns:
            False if there is nothing to merge: no level has more than the method's ``least`` spans.
        """
        level = min(self._levels, key=lambda n: (-self._levels[n], n), default=0)
        count = self._levels.get(level, 0)
        if count <= self._method.least:
            return False
        pairs = min(BATCH, max(1, count // 16))
        entries = self._catalog.oldest(self.source.id, 2 * pairs, level=level)
        size, taken = 0, 0
        for first in range(0, len(entries) - 1, 2):
            size += sum(span.num_bytes for span, _ in entries[first : first + 2])
            if taken and size > self._bank._segment_bytes:
                break
            taken = first + 2
        if not taken:
            raise BankError(
                f"the spans of {self.source.name} are not in order of age; run: "
                f"streamvid memory repair --memory {self._bank.folder}"
            )
        self._merge(entries[:taken])
        self.merged_spans += taken
        self.reclaim(DEAD_URGENT if urgent else DEAD)
        return True

    def expire(self, count: int, *, reason: str, before: Fraction | None = None) -> bool:
        """Forget the oldest spans; the newest one always stays.

        Args:
            count: how many at most.
            reason: what the catalogue will say.
            before: only spans that stop at or before this.

        Returns:
            False if there is none to forget.
        """
        spans = [span for span, _ in self._catalog.oldest(self.source.id, min(count, self.spans - 1))]
        if before is not None:
            late = next((n for n, span in enumerate(spans) if span.stop > before), len(spans))
            spans = spans[:late]
        if not spans:
            return False
        self._catalog.expire_spans(self.source.id, spans, reason=reason)
        self.expired_spans += len(spans)
        for span in spans:
            self._gone(span)
        self.reclaim(DEAD)
        return True

    def _merge(self, entries: Sequence[tuple[SpanRecord, torch.Tensor]]) -> None:
        """Merge spans two by two: written, then swapped in the catalogue, in one go."""
        model = self.source.key.model
        data: list[bytes] = []
        made: list[MergedSpan] = []
        tokens = self._read([span for span, _ in entries])
        for first in range(0, len(entries), 2):
            (a, keys_a), (b, keys_b) = entries[first : first + 2]
            out = merged_tokens(tokens[first : first + 2], self._method)
            keys = torch.cat([k for k in (keys_a, keys_b) if k.shape[1]] or [keys_a])
            keys = unit(keys[diverse(keys, self._method.keys)])
            codec, *layer_codecs = self._bank.codecs.of(model, width=out.features.shape[1], num_layers=len(out.layers))
            start, stop = min(a.start, b.start), max(a.stop, b.stop)
            span = encode_span(
                out, start=start, stop=stop, key=self.source.key, keys=keys, codec=codec, layer_codecs=layer_codecs
            )
            made.append(
                MergedSpan(
                    replaced=(a.id, b.id),
                    start=start,
                    stop=stop,
                    tokens=len(out),
                    file="",
                    offset=sum(len(one) for one in data),
                    num_bytes=len(span.data),
                    grid=out.grid,
                    codec=span.codec,
                    level=max(a.level, b.level) + 1,
                    keys=keys,
                )
            )
            data.append(span.data)
        self._append(
            b"".join(data),
            lambda file, offset, cost: self._catalog.merge_spans(
                self.source.id,
                [replace(span, file=file, offset=offset + span.offset) for span in made],
                disk_bytes=cost,
            ),
        )
        for span_, _ in entries:
            self._gone(span_)
        for merged in made:
            self._levels[merged.level] = self._levels.get(merged.level, 0) + 1
            self.tokens += merged.tokens
        self.spans += len(made)

    def _gone(self, span: SpanRecord) -> None:
        self._live[span.file] -= span.num_bytes
        self._levels[span.level] -= 1
        if not self._levels[span.level]:
            del self._levels[span.level]
        self.tokens -= span.tokens
        self.spans -= 1


class Folder:
    """Makes room in a memory folder as a whole, in what nobody else writes and nobody keeps.

    What can be made anew goes first: saved indexes, kept keys and values.  Then sources give way: of those that
    are not pinned and not being written elsewhere, the one with most bytes per hour, time and again.  When none
    can be merged further, the oldest source expires its oldest spans.

    Args:
        bank: the memory.
        own: a source that the caller holds for writing; None: none.
    """

    def __init__(self, bank: Bank, own: Holding | None = None) -> None:
        self.merged_spans = self.expired_spans = self.freed_bytes = 0
        """Done so far to sources other than ``own``, and copies of which nothing is lost."""
        self._bank, self._limits, self._own = bank, bank.limits, own

    @contextmanager
    def held(self, source_id: int) -> Iterator[Holding | None]:
        """A source to make room in: the caller's own, or one taken for it; None if another has it or it is gone."""
        if self._own is not None and source_id == self._own.source.id:
            yield self._own
            return
        bank = self._bank
        source = bank._catalog.source_by_id(source_id)
        with ExitStack() as stack:
            try:
                if source is not None:
                    stack.enter_context(bank._locked(source.key, source.name))
                    source = bank._catalog.source_by_id(source_id)
            except BankError:
                source = None
            if source is None:
                yield None
                return
            holding = Holding(bank, source, None)
            try:
                yield holding
            finally:
                holding.close()
                self.merged_spans += holding.merged_spans
                self.expired_spans += holding.expired_spans
                self.freed_bytes += source.num_bytes - holding.num_bytes

    def drop_copies(self) -> bool:
        """Delete what can be made anew: saved indexes, and kept keys and values of prompts; False if there is none."""
        catalog = self._bank._catalog
        indexes, kept = catalog.snapshot_bytes(), list((self._bank.folder / "kv").glob("*.safetensors"))
        if indexes:
            with catalog.transaction():
                catalog.execute("DELETE FROM snapshots")
            self._bank._snapshots.sweep()
        for path in kept:
            indexes += path.stat().st_size
            path.unlink(missing_ok=True)
        self.freed_bytes += indexes
        return bool(indexes or kept)

    def merge_heaviest(self, need: int, limit: int) -> int:
        """Merge in the source with most bytes per hour, time and again; returns the bytes that are lacking."""
        spent: set[int] = set()
        catalog = self._bank._catalog
        while need > 0:
            loads = [load for load in catalog.loads() if not load.pinned and load.source_id not in spent]
            if not loads:
                break
            heaviest = max(loads, key=lambda load: load.bytes_per_hour)
            with self.held(heaviest.source_id) as holding:
                if holding is None:
                    spent.add(heaviest.source_id)
                    continue
                freed, more = self.relieve(holding, min(need, max(limit // (2 * FILES), SMALLEST_FILE)), limit)
            need -= freed
            if not more:
                spent.add(heaviest.source_id)
        catalog.give_back()
        return need

    def expire_oldest(self, need: int) -> int:
        """Expire the oldest spans of the oldest source, then of the next; returns the bytes that are lacking."""
        catalog = self._bank._catalog
        for load in catalog.loads():
            if need <= 0:
                break
            if load.pinned:
                continue
            with self.held(load.source_id) as holding:
                if holding is None:
                    continue
                before = holding.num_bytes
                while before - holding.num_bytes < need:
                    if not holding.expire(1, reason=SPACE):
                        holding.reclaim(DEAD_URGENT)
                        break
                need -= before - holding.num_bytes
        catalog.give_back()
        return need

    def relieve(self, holding: Holding, need: int, limit: int) -> tuple[int, bool]:
        """Merge until so many bytes are free; returns how many are, and whether more could be."""
        before = holding.num_bytes
        while before - holding.num_bytes < need:
            if not holding.merge(urgent=holding.num_bytes > before + limit // (2 * FILES)):
                holding.reclaim(DEAD_URGENT)
                return before - holding.num_bytes, False
        return before - holding.num_bytes, True


class Room(Folder):
    """Sees to it that what one writer appends fits the limits.

    A writer whose source weighs most makes room in it before the folder is full, so that others, which cannot
    touch it meanwhile, need not give way for it.

    Args:
        bank: the memory.
        holding: the source of the writer.
    """

    def __init__(self, bank: Bank, holding: Holding) -> None:
        super().__init__(bank, holding)
        self.holding = holding
        self._calm = 0
        """Bytes of the folder up to which nobody is asked whether to make room early."""
        self._aged: Fraction | None = None

    def make(self, *, disk_bytes: int, log_bytes: int = 0, tokens: int = 0, stop: Fraction | None = None) -> None:
        """Make room for what is about to be written.

        Args:
            disk_bytes: what it adds to segment files.
            log_bytes: what it may add to the catalogue.
            tokens: how many it has.
            stop: where it ends, in seconds; what is too old by then is expired.

        Raises:
            BankError: if there is no way to stay within the limits; nothing was changed that need not be.
        """
        if stop is not None and self._limits.keep_seconds is not None:
            self._forget(stop, self._limits.keep_seconds)
        if self._limits.source_tokens is not None:
            self._fit_tokens(tokens, self._limits.source_tokens)
        if self._limits.source_bytes is not None:
            self._fit_source(disk_bytes, self._limits.source_bytes)
        if self._limits.disk_bytes is not None:
            self._fit_folder(disk_bytes + log_bytes, self._limits.disk_bytes)

    def _forget(self, stop: Fraction, keep_seconds: float) -> None:
        if self._aged is not None and stop < self._aged:
            return
        keep = Fraction(keep_seconds)
        self._aged = stop + keep / FILES
        if self._bank._catalog.pinned(self.holding.source.id):
            return
        while self.holding.expire(BATCH, reason=AGE, before=stop - keep):
            pass

    def _fit_tokens(self, tokens: int, limit: int) -> None:
        holding = self.holding
        if holding.tokens + tokens <= limit:
            return
        self._unpinned(f"may remember {limit} tokens, has {holding.tokens}, and needs {tokens} more")
        low = limit - max(tokens, limit // SLACK)
        while holding.tokens > low:
            if not (holding.merge() or holding.expire(1, reason=SPACE)):
                break
        if holding.tokens + tokens > limit:
            raise BankError(
                f"{holding.source.name} may remember {limit} tokens and a single span has {tokens}; raise the limit"
            )

    def _fit_source(self, disk_bytes: int, limit: int) -> None:
        holding = self.holding
        high = limit - reserve_bytes(limit)
        if holding.num_bytes + disk_bytes <= high:
            return
        self._unpinned(f"may hold {limit} bytes, holds {holding.num_bytes}, and needs {disk_bytes} more")
        self.relieve(holding, holding.num_bytes + disk_bytes - high + limit // SLACK, limit)
        while holding.num_bytes + disk_bytes > high:
            if not holding.expire(1, reason=SPACE):
                break
        if holding.num_bytes + disk_bytes > limit:
            raise BankError(
                f"{holding.source.name} may hold {limit} bytes, holds {holding.num_bytes} in its last span, and needs "
                f"{disk_bytes} more; raise the limit"
            )

    def _fit_folder(self, cost: int, limit: int) -> None:
        used = self._bank.usage()
        high = limit - reserve_bytes(limit) - LOG_BYTES
        low = high - limit // SLACK
        if used + cost <= max(low, self._calm):
            return
        if self.drop_copies():
            used = self._bank.usage()
            if used + cost <= low:
                return
        if used + cost <= high:
            self._calm = min(high, used + cost + limit // (4 * FILES))
            loads = [load for load in self._bank._catalog.loads() if not load.pinned]
            heaviest = max(loads, key=lambda load: load.bytes_per_hour, default=None)
            if heaviest is not None and heaviest.source_id == self.holding.source.id:
                self.relieve(self.holding, limit // FILES, limit)
                self._calm = 0
            return
        self._calm = 0
        # Twice: what a power cut left in the files of a source is counted only once the source is taken.
        for _ in range(2):
            left = self.merge_heaviest(used + cost - low, limit)
            if left > 0:
                # For peace, merging is enough; expire only what is needed at once.
                self.expire_oldest(left - limit // SLACK)
            used = self._bank.usage()
            if used + cost <= limit:
                return
        raise BankError(self._full(used, cost, limit))

    def _unpinned(self, what: str) -> None:
        source = self.holding.source
        if self._bank._catalog.pinned(source.id):
            raise BankError(
                f"{source.name} {what}, and it is kept whole (--keep); raise the limit, or let go of it, then run "
                "the same again: it goes on after the last stored span"
            )

    def _full(self, used: int, cost: int, limit: int) -> str:
        loads = self._bank._catalog.loads()
        kept = sum(load.pinned for load in loads)
        if kept == len(loads):
            why = "all its sources are kept whole (--keep)"
        elif kept:
            why = f"{kept} of its {len(loads)} sources are kept whole (--keep) and the others cannot be made smaller"
        else:
            why = "its sources cannot be made smaller or are being written elsewhere"
        return (
            f"memory in {self._bank.folder} may hold {limit} bytes, holds {used}, and needs {cost} more, and {why}; "
            "remove a source or raise the limit, then run the same again: it goes on after the last stored span"
        )
