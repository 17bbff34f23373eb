"""Looking things up in one source's memory: spans by time, by likeness to a text, and their tokens.

What is touched grows with what is looked at, not with what is remembered: a span costs 32 bytes here, its
keys are read when they matter, its record when its tokens are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamvid.errors import Vanished
from streamvid.memory.bank import Bank
from streamvid.memory.records import GapRecord, SourceRecord, SpanRecord
from streamvid.query.when import Range, When
from streamvid.receipt import Receipt
from streamvid.temporal.methods.functional import spaced

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

FOUND = 1024
"""Spans an approximate index is asked for."""

SAMPLED = 2048
"""Spans that tell what the others are like, where an approximate index searched: evenly spaced, compared exactly."""

DETAILED = 20_000
"""Spans up to which an event is looked for frame by frame; beyond, span by span."""


class Recollection:
    """One source's memory as one question sees it.

    Args:
        bank: the memory.
        source: what was watched.
        receipt: gets which index searched, and its notes.
        until: seconds up to which the source was watched, where that is more than is stored: a picture that
            does not change is not stored again.
        lost: gaps that are not on record, such as the time since nobody watches.
    """

    def __init__(
        self,
        bank: Bank,
        source: SourceRecord,
        receipt: Receipt,
        *,
        until: float | None = None,
        lost: Sequence[GapRecord] = (),
    ) -> None:
        self.bank, self.source, self._receipt, self._lost = bank, source, receipt, lost
        self.ids, self.view = bank.view(source.id)
        first, last = self._watched()
        self.seen = (first, last if until is None else max(last, until))
        """What of the source was watched, [start, stop) in seconds; of one still open, as far as it is stored."""

    def __len__(self) -> int:
        return len(self.ids)

    def records(self, rows: Tensor) -> list[SpanRecord]:
        """The spans of some rows (M,).

        Raises:
            Vanished: if one was merged or expired since the memory was looked at.
        """
        wanted = self.ids[rows].tolist()
        found = self.bank.records(wanted)
        if len(found) < len(wanted):
            raise Vanished(
                f"{len(wanted) - len(found)} of {len(wanted)} spans of {self.source.name} were merged or expired to "
                "make room since they were looked up; ask again"
            )
        return found

    def ask_for(self, vector: Tensor) -> None:
        """Compare every span with a question's vector (Dk,), for the recall methods."""
        if self.view.key_width and len(self):
            self.view = replace(self.view, similarity=self.similarity(vector))

    def similarity(self, vector: Tensor) -> Tensor:
        """(S,) float32 of every span's best key to a vector (Dk,), by the memory's index.

        An exact index compares every span.  An approximate one finds the best ``FOUND``, whose similarity is
        exact; every other span is taken to be as similar as the nearest in time of ``SAMPLED`` evenly spaced
        ones, and no more than the last of those found.
        """
        index = self.bank.index(self.source.id)
        if index.note:
            self._receipt.warn(index.note)
        self._receipt.index = index.said
        known, row_of = self.ids.sort()
        if index.exact or len(self) <= FOUND + SAMPLED:
            ids, best = index.search(vector, len(self))
            out = torch.full((len(self),), -1.0)
        else:
            ids, best = index.search(vector, FOUND)
            sample = spaced(SAMPLED, len(self))
            between = (sample[1:] + sample[:-1] + 1) // 2
            nearest = torch.bucketize(torch.arange(len(self)), between, right=True)
            out = self.view.likeness(vector, sample).clamp(max=float(best[-1]))[nearest]
            self._receipt.index += f"; {len(ids)} spans compared exactly, the others by {SAMPLED} samples"
        at = torch.searchsorted(known, ids).clamp(max=len(self) - 1)
        there = known[at] == ids  # the index may know spans that were stored since
        out[row_of[at[there]]] = best[there]
        return out

    def inside(self, when: When) -> Tensor:
        """(M,) rows of the spans that show what a question speaks of, rising; all where it names no time.

        Where nothing changed nothing was stored: a range that was watched, or the part of it that was, and has
        no spans is shown by the span before it.  What was not seen or is forgotten is shown by nothing.
        """
        view = self.view
        if not when:
            return torch.arange(len(self))
        inside = torch.zeros(len(self), dtype=torch.bool)
        lost = [(float(gap.start), float(gap.stop)) for gap in (*self.bank.gaps(self.source.id), *self._lost)]
        lost += [(float(past.start), float(past.stop)) for past in self.bank.expired(self.source.id) if past.spans]
        for start, stop in when.ranges:
            here = (view.start_seconds < stop) & (view.stop_seconds > start)
            watched = _without((max(start, self.seen[0]), min(stop, self.seen[1])), lost)
            if watched and not here.any():
                before = (view.start_seconds < watched[-1][0]).nonzero()
                here[before[-1:]] = True
            inside |= here
        return inside.nonzero().squeeze(1)

    def gaps(self, when: When) -> list[GapRecord]:
        """Stretches of which nothing was seen, as far as a question speaks of them."""
        if not when:
            return []
        found = [*self.bank.gaps(self.source.id), *self._lost]
        return [gap for gap in found if any(gap.start < stop and gap.stop > start for start, stop in when.ranges)]

    def find(self, name: str, embedder: Embedder) -> Range | None:
        """The stretch in which a named thing is seen: moments that stand clear of the others, around the best.

        Moments are frames, or spans where there are more than ``DETAILED``.
        """
        vector = embedder.texts([name.split(maxsplit=1)[1]])[0]  # without its article
        view = self.view
        if len(self) > DETAILED:
            return _stretch(self.similarity(vector), view.start_seconds, view.stop_seconds)
        keys = view.keys[torch.arange(len(self))]
        there = (keys != 0).any(dim=2)
        count = there.sum(1)
        step = (view.stop_seconds - view.start_seconds) / count.clamp(min=1)
        starts = (view.start_seconds[:, None] + step[:, None] * torch.arange(keys.shape[1]))[there]
        return _stretch((keys @ vector)[there], starts, starts + step.repeat_interleave(count))

    def keys(self, rows: Tensor) -> Tensor:
        """(M, K, Dk) of some rows."""
        return self.view.keys[rows]

    def _watched(self) -> Range:
        if not len(self):
            return 0.0, 0.0
        stored = float(self.view.start_seconds[0]), float(self.view.stop_seconds.max())
        summary = self.source.summary
        told = summary.get("start_seconds", stored[0]), summary.get("stop_seconds", stored[1])
        return min(stored[0], told[0]), max(stored[1], told[1])


def _without(whole: Range, lost: Sequence[Range]) -> list[Range]:
    """What is left of a range, in time order."""
    parts, at = [], whole[0]
    for start, stop in sorted(lost):
        if start >= whole[1]:
            break
        if start > at:
            parts.append((at, start))
        at = max(at, stop)
    if at < whole[1]:
        parts.append((at, whole[1]))
    return parts


def _stretch(similarity: Tensor, starts: Tensor, stops: Tensor) -> Range | None:
    """The first of the moments (N,) that stand clear of the others, with what adjoins it; None if none do.

    Clear means: the mean of the moments nearer to the best than to the median is three standard deviations
    of the others away from them, and they are less than half of all.  Of several stretches about as good
    as the best, the first.
    """
    if len(similarity) < 4:
        return None
    best, middle = float(similarity.max()), float(similarity.median())
    clear = similarity >= (best + middle) / 2
    if best - middle < 0.05 or 2 * int(clear.sum()) >= len(clear):
        return None
    others = similarity[~clear]
    if float(similarity[clear].mean() - others.mean()) < 3 * float(others.std(correction=0)):
        return None
    peak = int((similarity >= best - 0.1 * (best - middle)).nonzero()[0])
    low = (~clear[:peak]).nonzero()
    high = (~clear[peak:]).nonzero()
    first = int(low[-1]) + 1 if len(low) else 0
    last = peak + int(high[0]) - 1 if len(high) else len(clear) - 1
    return float(starts[first]), float(stops[last])
