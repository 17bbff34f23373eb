"""What the spans of one source are stored with: within limits, durable, one writer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.bounds import Holding, Room
from streamvid.memory.codec import Codec
from streamvid.memory.folder import reported
from streamvid.memory.index import unit
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import State
from streamvid.memory.segment_format import encode_span
from streamvid.memory.segments import SegmentWriter
from streamvid.tokens import VideoTokens

if TYPE_CHECKING:
    from streamvid.memory.bank import Bank


class Writer:
    """Stores the spans of one source, in time order; made by `Bank.writer`.

    Each span is on the disk when `append` returns.  A source that is left without `finish` stays open and
    goes on from ``stop`` the next time.
    """

    def __init__(self, bank: Bank, key: MemoryKey, *, path: str, name: str) -> None:
        self.notes: list[str] = []
        """What the user should hear, each thing once."""
        self._bank = bank
        self._key = key
        self._path = path
        self._name = name
        self._lock = bank._locked(key, name)
        self._segments: SegmentWriter | None = None
        self._source_id = 0
        self._start: Fraction | None = None
        self._stop: Fraction | None = None
        self._width: int | None = None
        self._room: Room | None = None
        """What makes room; None before the first span, and without limits."""
        self._learnable: int | None = None
        """Tokens of this model in the folder, which codecs could learn from; None if not counted."""

    @property
    def source_id(self) -> int:
        """Of the source being written."""
        self._opened()
        return self._source_id

    @property
    def stop(self) -> Fraction | None:
        """Seconds, exact: where the last stored span ends; None if nothing is stored."""
        return self._stop

    def __enter__(self) -> Self:
        """Take the source for writing.

        Raises:
            BankError: if another writer has it, it is complete already, or the folder cannot be written.
        """
        bank, catalog = self._bank, self._bank._catalog
        with reported(bank.folder):
            self._lock.__enter__()
            try:
                source = catalog.source(self._key.digest)
                if source is None:
                    source = catalog.add_source(self._key, path=self._path, name=self._name)
                if source.state is State.COMPLETE:
                    raise BankError(
                        f"{source.name} is completely remembered (source {source.id}); use it, or remove it first"
                    )
                last, place = catalog.last_span(source.id), catalog.last_place(source.id)
                self._source_id = source.id
                self._start = last.start if last else None
                self._stop = last.stop if last else None
                self._width = catalog.key_width(source.id)
                self._segments = SegmentWriter(
                    bank.folder / source.folder,
                    key=self._key,
                    segment_bytes=bank._segment_bytes,
                    last=place,
                )
            except BaseException:
                self._lock.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._segments is not None:
            self._segments.close()
            self._segments = None
        self._lock.__exit__(None, None, None)

    def append(self, tokens: VideoTokens, *, start: Fraction, stop: Fraction, keys: Tensor) -> None:
        """Store one span.

        Args:
            tokens: of the span, in raster and time order.
            start: seconds, exact; not before the start of the span before.
            stop: seconds, exact; the span covers ``[start, stop)``.
            keys: (K, Dk) float, what the span is found by; made unit length, rows of zeros left out.  A span
                without any is still found by its time.

        Raises:
            ValueError: if times or shapes do not fit.
            BankError: if the disk or the limit is full, or features are not finite; all earlier spans stay.
        """
        segments, bank = self._opened(), self._bank
        if not start < stop or (self._start is not None and start < self._start):
            before = f" and not before {self._start}, where the last one starts" if self._start is not None else ""
            raise ValueError(f"a span must start before it stops{before}, got {start} to {stop}")
        if keys.ndim != 2 or (self._width is not None and keys.shape[1] != self._width):
            raise ValueError(f"keys must be (K, {self._width or 'Dk'}), got {keys.shape = }")
        keys = unit(keys[(keys != 0).any(dim=1)])
        codec, *layer_codecs = self._codecs(tokens)
        span = encode_span(
            tokens, start=start, stop=stop, key=self._key, keys=keys, codec=codec, layer_codecs=layer_codecs
        )
        self._check_limit(
            segments.cost(span.data), log_bytes=bank._catalog.growth_bytes(keys), tokens=len(tokens), stop=stop
        )
        segments = self._opened()
        cost = segments.cost(span.data)
        with reported(bank.folder):
            file, offset = segments.append(span.data)
            try:
                bank._catalog.add_span(
                    self._source_id,
                    start=start,
                    stop=stop,
                    tokens=len(tokens),
                    file=file,
                    offset=offset,
                    num_bytes=len(span.data),
                    disk_bytes=cost,
                    grid=tokens.grid,
                    codec=span.codec,
                    keys=keys,
                )
            except Exception:  # not KeyboardInterrupt: it may come just after the commit, and the span is in then
                segments.undo()
                raise
        if self._room is not None:
            self._room.holding.added(file=file, num_bytes=len(span.data), disk_bytes=cost, tokens=len(tokens))
        self._start, self._stop, self._width = start, stop, keys.shape[1]
        self.notes += [note for note in span.notes if note not in self.notes]
        if self._learnable is not None:
            self._learnable += len(tokens)

    def describe(self, summary: Mapping[str, Any]) -> None:
        """Say something about the source while it is written: JSON values, in place of those of the same names."""
        self._opened()
        with reported(self._bank.folder):
            self._bank._catalog.describe_source(self._source_id, summary)

    def gap(self, start: Fraction, stop: Fraction, reason: str) -> None:
        """Note a stretch of which nothing was seen.

        Args:
            start: seconds, exact.  A gap that still lasts is noted again, with the same start.
            stop: seconds, exact; the gap covers ``[start, stop)``.
            reason: one line for people.
        """
        self._opened()
        if not start < stop:
            raise ValueError(f"a gap must start before it stops, got {start} to {stop}")
        with reported(self._bank.folder):
            self._bank._catalog.add_gap(self._source_id, start=start, stop=stop, reason=reason)

    def finish(self, summary: Mapping[str, Any], *, duration: Fraction | None = None) -> None:
        """Mark the source complete; the writer takes no more spans.

        Args:
            summary: JSON values worth showing later, for example frames decoded and kept.
            duration: of the video in seconds; None: until the last span stops.
        """
        segments = self._opened()
        self._bank._catalog.finish_source(
            self._source_id, summary=summary, duration=self._stop if duration is None else duration
        )
        segments.close()
        self._segments = None

    def _codecs(self, tokens: VideoTokens) -> tuple[Codec, ...]:
        """The codecs of the next span; they learn first, once the folder holds enough tokens of the model."""
        bank, model = self._bank, self._key.model
        width, num_layers = tokens.features.shape[1], len(tokens.layers)
        wanted = bank.codecs.wanted(model, width=width, num_layers=num_layers)
        if wanted:
            if self._learnable is None:
                self._learnable = sum(s.tokens for s in bank.sources() if s.key.model == model)
            if self._learnable >= wanted:
                first = bank._first_tokens(model, wanted)
                self._learnable = len(first[0])
                if len(first[0]) >= wanted:
                    books = bank.codecs.learn(model, first)
                    self._check_limit(sum(len(book.to_bytes()) for book in books))
                    with reported(bank.folder):
                        bank.codecs.keep(books)
        return bank.codecs.of(model, width=width, num_layers=num_layers)

    def _check_limit(
        self, disk_bytes: int, *, log_bytes: int = 0, tokens: int = 0, stop: Fraction | None = None
    ) -> None:
        """Make room within the limits, or refuse what goes beyond them, before anything is written."""
        bank = self._bank
        if not bank.limits.bounds_memory:
            return
        if self._room is None:
            source = bank._catalog.source_by_id(self._source_id)
            if source is None:
                raise BankError(f"{self._name} was removed from {bank.folder} while it was written; start again")
            self._room = Room(bank, Holding(bank, source, self._segments))
        holding = self._room.holding
        before = holding.tokens
        try:
            with reported(bank.folder):
                self._room.make(disk_bytes=disk_bytes, log_bytes=log_bytes, tokens=tokens, stop=stop)
        finally:
            self._segments = holding.segments  # room was made in it: another file may be written now
            if self._learnable is not None:
                self._learnable -= before - holding.tokens

    def _opened(self) -> SegmentWriter:
        if self._segments is None:
            raise ValueError("this writer is not open: use it inside its with block, before finish")
        return self._segments
