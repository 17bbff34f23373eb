"""Search of a memory: the moments that look like a text or a picture, in one video or in all of them.

Knows what it asks of a memory, an index and an image-text encoder; how those work is theirs.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from os.path import isfile
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from streamvid.errors import BankError, SettingsError
from streamvid.ingest.images import ImageFiles
from streamvid.ingest.sampling import Sampling
from streamvid.ingest.source import open_source
from streamvid.ingest.stills import rgb_of

Query: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor
"""A text, or a picture: a file, a Pillow image, or (H, W, 3) uint8."""

SPANS_A_MOMENT = 32
"""Spans looked at for each moment that is wanted, where neighbours are joined: bounds the work in a still video."""

JOIN_SIMILARITY = 0.05
"""How much less similar than the best span of a moment those may be that are joined to it."""

NAMED = 3
"""Videos named in a note; the rest are counted."""


class Key(Protocol):
    """What a source's memory depends on."""

    @property
    def embedder(self) -> str:
        """Fingerprint of what made the retrieval keys; "none" if there are none."""


class Source(Protocol):
    """One remembered video."""

    @property
    def id(self) -> int:
        """In the memory."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def spans(self) -> int:
        """How many spans are remembered of it."""

    @property
    def key(self) -> Key:
        """What its memory depends on."""


class Span(Protocol):
    """One remembered span of a source."""

    @property
    def id(self) -> int:
        """In the memory; what indexes give."""

    @property
    def source_id(self) -> int:
        """Of its source."""

    @property
    def start(self) -> Fraction:
        """Seconds, exact."""

    @property
    def stop(self) -> Fraction:
        """Seconds, exact; the span covers ``[start, stop)``."""


SourceT = TypeVar("SourceT", bound=Source)
SpanT = TypeVar("SpanT", bound=Span)


class Searcher(Protocol):
    """An index over the keys of a memory; ids are span ids."""

    note: str
    """What the user should hear about it."""

    @property
    def said(self) -> str:
        """What it is, in one line."""

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Ids (M,) int64 of the best spans, each once, and similarity (M,), falling; M = min(k, all)."""


class Memory(Protocol[SourceT, SpanT]):
    """What is searched; `streamvid.memory.bank.Bank` is one."""

    def sources(self) -> list[SourceT]:
        """All sources."""

    def source(self, which: int | str) -> SourceT:
        """One source, by id, key, name or path."""

    def records(self, span_ids: Sequence[int], /) -> list[SpanT]:
        """Spans by id, in the order asked; those that are gone are left out."""

    def index(self, source_id: int | None, *, embedder: str | None = None, kind: str = "auto") -> Searcher:
        """An index over one source, or over all of one embedder, that is up to date."""


class Encoder(Protocol):
    """Pictures and texts to unit vectors; `streamvid.models.embedder.Embedder` is one."""

    fingerprint: str

    def frames(self, pixels: Tensor) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, Dk)."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (n, Dk)."""


@dataclass(frozen=True, slots=True)
class Found(Generic[SourceT, SpanT]):
    """One moment of a remembered video."""

    source: SourceT
    span: SpanT
    """The most similar one; its tokens are ``bank.read([(found.span, count)])``."""

    start_seconds: float
    stop_seconds: float
    """The moment is ``[start, stop)``."""

    similarity: float
    """Cosine of the query and the most similar key, in [-1, 1]; higher is better.  Pictures compare with pictures
    near 1 and with texts far lower: compare only what one query found."""

    spans: tuple[SpanT, ...]
    """All that were joined, in time order; the span alone where nothing was joined."""


@dataclass(frozen=True, slots=True)
class Findings(Sequence[Found[SourceT, SpanT]]):
    """The moments a search found, best first, and what it did not search."""

    found: tuple[Found[SourceT, SpanT], ...]
    not_searched: tuple[SourceT, ...]
    """Sources whose keys another encoder made, or none did: the query compares with none of them."""

    searched_by: str
    """The index, in one line."""

    notes: tuple[str, ...]
    """What the user should hear, ``not_searched`` in words among it."""

    def __len__(self) -> int:
        return len(self.found)

    @overload
    def __getitem__(self, index: int) -> Found[SourceT, SpanT]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Found[SourceT, SpanT], ...]: ...
    def __getitem__(self, index: int | slice) -> Found[SourceT, SpanT] | tuple[Found[SourceT, SpanT], ...]:
        return self.found[index]


def search(
    bank: Memory[SourceT, SpanT],
    query: Query,
    *,
    embedder: Encoder | None,
    source: int | str | None = None,
    top: int = 10,
    join_seconds: float | None = None,
    kind: str = "auto",
) -> Findings[SourceT, SpanT]:
    """The moments of a memory that are most like a text or a picture, best first.

    The query becomes a vector, an index gives the spans whose keys are nearest, and only the records of these
    are read: what a search touches grows with ``top`` and with the number of videos, not with that of spans.

    With ``join_seconds`` spans are taken best first, and one that lies next to a moment already found and is
    nearly as similar as its best, by 0.05, makes that moment longer; a span between two makes them one::

        spans, best first   12-16   40-44   16-20   20-24   90-94
        similarity           0.31    0.30    0.28    0.22    0.21
        join_seconds=0      12-20, 40-44, 20-24, 90-94

    Args:
        bank: the memory.
        query: a text, or a picture: a `Path` to an image file, a Pillow image, or (H, W, 3) uint8 RGB.
        embedder: what made the keys, and makes the query's vector.
        source: one video by its id, key, name or path; None searches all that this embedder made keys of.
        top: how many moments at most, >= 1.
        join_seconds: similar spans of a video that are no farther apart become one moment, >= 0; None leaves
            each by itself.  Larger gives fewer, longer moments.  At most 32 times ``top`` spans are looked at.
        kind: of index, as in `streamvid.memory.bank.Bank.index`.

    Raises:
        SettingsError: if the text is blank, there is no embedder, or no such kind of index.
        SourceError: if an image file cannot be read.
        BankError: if nothing there can be searched with this embedder.
        ValueError: if a picture has another shape, or a number is out of range.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}; it is how many moments are wanted")
    if join_seconds is not None and not join_seconds >= 0:
        raise ValueError(f"join_seconds must be at least 0, got {join_seconds}; None joins nothing")
    if embedder is None:
        raise SettingsError("a search needs an image-text encoder and there is none; see: streamvid doctor")
    picked = bank.source(source) if source is not None else None
    sources = {s.id: s for s in ([picked] if picked is not None else bank.sources()) if s.spans}
    others = tuple(s for s in sources.values() if s.key.embedder != embedder.fingerprint)
    if len(others) == len(sources):
        raise BankError(_nothing(others, picked))
    vector = _embed(query, embedder)
    index = bank.index(picked.id if picked is not None else None, embedder=embedder.fingerprint, kind=kind)
    notes = [index.note] if index.note else []
    if others:
        notes.append(f"not searched, as their keys are not this encoder's: {_names(others)}; watch them again with it")
    asked, most = top, top if join_seconds is None else SPANS_A_MOMENT * top
    while True:
        ids, similarity = index.search(vector, asked)
        likeness = dict(zip(ids.tolist(), similarity.tolist(), strict=True))
        spans = [span for span in bank.records(list(likeness)) if span.source_id in sources]
        moments = _moments(spans, likeness, join_seconds)[:top]
        # Less alike than this, no further span makes one of these moments longer, nor one of two.
        settled = len(moments) == top and float(similarity[-1]) < moments[-1].similarity - JOIN_SIMILARITY
        if settled or len(ids) < asked or asked >= most:
            break
        asked = min(2 * asked, most)
    found = tuple(
        Found(
            source=sources[moment.spans[0].source_id],
            span=moment.spans[0],
            start_seconds=float(moment.start),
            stop_seconds=float(moment.stop),
            similarity=moment.similarity,
            spans=tuple(sorted(moment.spans, key=lambda span: span.start)),
        )
        for moment in moments
    )
    return Findings(found, others, index.said, tuple(notes))


@dataclass(slots=True, eq=False)
class _Moment(Generic[SpanT]):
    """Spans that belong together."""

    similarity: float
    start: Fraction
    stop: Fraction
    spans: list[SpanT]
    """The best one first."""


def _moments(spans: Sequence[SpanT], likeness: Mapping[int, float], join_seconds: float | None) -> list[_Moment[SpanT]]:
    """Moments of spans that come best first, best first; `search` says which spans are joined."""
    fresh = [_Moment(likeness[span.id], span.start, span.stop, [span]) for span in spans]
    if join_seconds is None:
        return fresh
    lanes: dict[int, list[_Moment[SpanT]]] = {}  # by source: the moments so far in time order
    for moment in fresh:
        lane = lanes.setdefault(moment.spans[0].source_id, [])
        first = last = bisect(lane, moment.start, key=lambda other: other.start)

        def joins(other: _Moment[SpanT], apart: Fraction, span: _Moment[SpanT] = moment) -> bool:
            return apart <= join_seconds and span.similarity >= other.similarity - JOIN_SIMILARITY

        if first and moment.start < lane[first - 1].stop:
            first -= 1  # in a gap that was joined over: part of that moment however alike
        else:
            while first and joins(lane[first - 1], moment.start - lane[first - 1].stop):
                first -= 1
            while last < len(lane) and joins(lane[last], lane[last].start - moment.stop):
                last += 1
        together = sorted([*lane[first:last], moment], key=lambda other: -other.similarity)
        lane[first:last] = [
            _Moment(
                together[0].similarity,
                min(other.start for other in together),
                max(other.stop for other in together),
                [span for other in together for span in other.spans],
            )
        ]
    return sorted((moment for lane in lanes.values() for moment in lane), key=lambda moment: -moment.similarity)


def _embed(query: Query, embedder: Encoder) -> Tensor:
    """(Dk,) of a text or a picture."""
    if not isinstance(query, str):
        with torch.inference_mode():
            return embedder.frames(_pixels(query)[None])[0]
    if not query.strip():
        raise SettingsError('the query is empty; say what to look for, as in "a red circle"')
    if Path(query).suffix and isfile(query):
        raise SettingsError(
            f"{query!r} is taken as a text and is also a file; to search with a picture give Path({query!r})"
        )
    with torch.inference_mode():
        return embedder.texts([query])[0]


def _pixels(picture: Path | Image.Image | NDArray[np.uint8] | Tensor) -> Tensor:
    """(H, W, 3) uint8 of a picture."""
    if isinstance(picture, Path):
        ImageFiles.file(picture, name=str(picture))
        with open_source(picture) as source:
            return next(iter(source.frames(Sampling(max_frames=1)))).pixels
    if isinstance(picture, Image.Image):
        return torch.from_numpy(np.array(rgb_of(picture), dtype=np.uint8))
    pixels = torch.as_tensor(picture)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.numel() or pixels.dtype != torch.uint8:
        slip = "; permute it to put colours last" if pixels.ndim == 3 and pixels.shape[0] == 3 else ""
        slip += "; multiply values in [0, 1] by 255 and round" if pixels.is_floating_point() else ""
        raise ValueError(f"a picture must be (H, W, 3) uint8 RGB, got {tuple(pixels.shape)} {pixels.dtype}{slip}")
    return pixels


def _nothing(others: Sequence[Source], picked: Source | None) -> str:
    """Why there is nothing to search."""
    if not others:
        what = f"{picked.name} has" if picked is not None else "this memory has"
        return f"{what} no spans to search yet; watch a video first, with the same encoder"
    return (
        f"nothing here was remembered with this encoder: {_names(others)}; load that encoder, or watch again with this"
    )


def _names(sources: Sequence[Source]) -> str:
    """Some sources, each with what made its keys."""
    named = [
        f"{s.name} ({'without an encoder' if s.key.embedder == 'none' else 'encoder ' + s.key.embedder[:12]})"
        for s in sources[:NAMED]
    ]
    return ", ".join(named) + (f" and {len(sources) - NAMED} more" if len(sources) > NAMED else "")
