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
from streamvid.tokens import VideoTokens
from streamvid.watch.texts import PROMPTS, Texts, vectors

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

FOUND = 1024
"""Spans an approximate index is asked for."""

SAMPLED = 2048
"""Spans that tell what the others are like, where an approximate index searched: evenly spaced, compared exactly."""

DETAILED = 20_000
"""Spans up to which an event is looked for frame by frame; beyond, span by span."""

CLEAR = 2.5
"""Standard deviations by which an event stands clear; higher finds fewer events, and fewer that are not there."""

SLACK = 0.4
"""What shows an event may fit another colour better by so many spreads among other texts."""

COMPARED = 256
"""Spans of a long event that are compared with other colours."""


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
        for start, stop in self._less_gaps(when):
            here = (view.start_seconds < stop) & (view.stop_seconds > start)
            watched = _without((max(start, self.seen[0]), min(stop, self.seen[1])), lost)
            if watched and not here.any():
                before = (view.start_seconds < watched[-1][0]).nonzero()
                here[before[-1:]] = True
            inside |= here
        return inside.nonzero().squeeze(1)

    def shown(
        self, when: When, rows: Tensor, parts: Sequence[VideoTokens], budget: int
    ) -> tuple[Tensor, list[VideoTokens]]:
        """What shows the time in question, of the tokens that were read of some rows (M,); not more than a budget.

        Tokens inside stay.  A cell that did not change was not stored again: its last token before a range stands
        for it when the range begins, unless it changes at once.  These make one frame; if the rows have none inside
        and none before, they come from the row before::

            stored       #    #  #     | #   #  |   #
            range                      [        )
            given               +      | #   #  |         +  what stood when it began

        Returns:
            Rows, rising, and the tokens of each.
        """
        kept: dict[int, list[VideoTokens]] = {}
        empty: list[float] = []
        for start, stop in self._less_gaps(when):
            found = False
            for row, part in zip(rows.tolist(), parts, strict=True):
                begin = part.pts_seconds
                inside = (begin < stop) & (begin + part.duration_seconds > start)
                before = (begin < start) & ~inside
                at_once = inside & (begin < start + part.duration_seconds)
                some = [_standing(part.select(before), part.select(at_once))] if bool(before.any()) else []
                some = [*some, part.select(inside)]
                if any(len(tokens) for tokens in some):
                    kept.setdefault(row, []).extend(some)
                    found = True
            if not found:
                empty.append(start)
        left = budget - sum(len(part) for some in kept.values() for part in some)
        for start in empty:
            earlier = (self.view.start_seconds < start).nonzero()
            if not len(earlier) or left < 1:
                continue
            (span,) = self.records(earlier[-1])
            (part,) = self.bank.read([(span, span.tokens)])
            part = _standing(part, part.select(torch.zeros(0, dtype=torch.int64)))
            part = part.select(part.score.argsort(descending=True, stable=True)[:left].sort().values)
            kept.setdefault(int(earlier[-1]), []).append(part)
            left -= len(part)
        order = sorted(kept)
        return torch.tensor(order, dtype=torch.int64), [VideoTokens.cat(kept[row]) for row in order]

    def gaps(self, when: When) -> list[GapRecord]:
        """Stretches of which nothing was seen, as far as a question speaks of them."""
        if not when:
            return []
        found = [*self.bank.gaps(self.source.id), *self._lost]
        return [gap for gap in found if any(gap.start < stop and gap.stop > start for start, stop in when.ranges)]

    def find(self, name: str, embedder: Embedder) -> Range | None:
        """The stretch in which a named thing is seen: moments that stand clear of the others, around the best.

        Moments are frames, or spans where there are more than ``DETAILED``.  What they show must not fit the same
        thing in another colour better.  None if nothing stands clear, or something else does.
        """
        what = name.split(maxsplit=1)[1]  # without its article
        vector = vectors([what], embedder, PROMPTS)[0]
        view = self.view
        if len(self) > DETAILED:
            similarity, starts, stops = self.similarity(vector), view.start_seconds, view.stop_seconds
        else:
            keys = view.keys[torch.arange(len(self))]
            there = (keys != 0).any(dim=2)
            count = there.sum(1)
            step = (view.stop_seconds - view.start_seconds) / count.clamp(min=1)
            starts = (view.start_seconds[:, None] + step[:, None] * torch.arange(keys.shape[1]))[there]
            similarity, stops = (keys @ vector)[there], starts + step.repeat_interleave(count)
        found = _stretch(similarity)
        if found is None:
            return None
        first, last = found
        if len(self) > DETAILED:
            some = view.keys[first + spaced(min(COMPARED, last + 1 - first), last + 1 - first)]
            shown = some[torch.arange(len(some)), (some @ vector).argmax(1)]
        else:
            shown = keys[there][first : last + 1]
        fit = Texts.of(what, embedder).fit(shown.mean(0))
        return None if fit.own < fit.rival - SLACK * fit.width else (float(starts[first]), float(stops[last]))

    def keys(self, rows: Tensor) -> Tensor:
        """(M, K, Dk) of some rows."""
        return self.view.keys[rows]

    def _less_gaps(self, when: When) -> list[Range]:
        """What was seen of the time in question: spans that were merged reach over the gaps between them."""
        gaps = [(float(gap.start), float(gap.stop)) for gap in self.gaps(when)]
        return [part for whole in when.ranges for part in _without(whole, gaps)]

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


def _standing(part: VideoTokens, gone: VideoTokens) -> VideoTokens:
    """The picture at the end of some tokens, less what is gone: the latest of every cell, at the time of the last."""
    order = part.pts_seconds.argsort(stable=True)
    columns = part.grid[2]
    cell = part.position[order, 1] * columns + part.position[order, 2]
    last = torch.full((part.grid[1] * columns,), -1).scatter_reduce_(0, cell, torch.arange(len(order)), "amax")
    last[gone.position[:, 1] * columns + gone.position[:, 2]] = -1
    here = part.select(order[last[last >= 0]])
    if not len(here):
        return here
    latest = here.pts_seconds.max()
    stop = (here.pts_seconds + here.duration_seconds).max()
    position = here.position.clone()
    position[:, 0] = position[:, 0].max()
    return replace(
        here,
        position=position,
        pts_seconds=latest.expand(len(here)).clone(),
        duration_seconds=(stop - latest).expand(len(here)).clone(),
    )


def _stretch(similarity: Tensor) -> tuple[int, int] | None:
    """The first of the moments (N,) that stand clear of the others, with what adjoins it: the first and the last.

    Clear means: the mean of the moments nearer to the best than to the median is ``CLEAR`` standard deviations
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
    if float(similarity[clear].mean() - others.mean()) < CLEAR * float(others.std(correction=0)):
        return None
    peak = int((similarity >= best - 0.1 * (best - middle)).nonzero()[0])
    low = (~clear[:peak]).nonzero()
    high = (~clear[peak:]).nonzero()
    first = int(low[-1]) + 1 if len(low) else 0
    return first, peak + int(high[0]) - 1 if len(high) else len(clear) - 1
