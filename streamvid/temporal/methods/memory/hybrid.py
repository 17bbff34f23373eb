"""Recall by relevance, with the neighbours of what fits, a gist of the rest and the recent past."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView


@dataclass
class Hybrid(MemoryMethod):
    """Spend most of the budget where the question points, the rest on everything else.

    If all remembered tokens fit the budget, all are given.  Otherwise, in this order:
    the last ``recent_share`` of the budget goes to the newest spans, whole; ``relevant_share``
    to the spans most similar to the question, chosen one after another by maximal marginal
    relevance (a span like one already chosen counts less), each with its neighbours, whole; what
    is left is dealt out evenly over the remaining spans, best tokens first, so that no part of
    the timeline is blank.  Without a question vector the relevant share is dealt out too.

    Args:
        relevant_share: 0..1; larger gives fewer spans more detail.
        recent_share: 0..1; larger keeps more of the end of the video.
        diversity: 0..1 weight of being unlike what was already chosen; 0 is relevance alone.
        neighbours: spans on either side of a chosen one that come with it, so that events are not cut.
    """

    relevant_share: float = 0.65
    recent_share: float = 0.1
    diversity: float = 0.2
    neighbours: int = 1

    paper = "ours; marginal relevance after Carbonell and Goldstein, SIGIR 1998"

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) tokens to read of each span; see the class."""
        stored = memory.tokens
        if int(stored.sum()) <= budget:
            return stored.clone()
        given = torch.zeros_like(stored)
        left = self._whole(given, stored, range(len(stored) - 1, -1, -1), int(budget * self.recent_share))
        left += budget - int(budget * self.recent_share)
        if signals.question is not None:
            share = min(left, int(budget * self.relevant_share))
            left = left - share + self._relevant(given, memory, signals.question, share)
        self._deal(given, stored, left)
        return given

    def _relevant(self, given: Tensor, memory: MemoryView, question: Tensor, share: int) -> int:
        """Give whole spans by marginal relevance; returns what is left of the share."""
        similarity = relevance(memory, question)
        mean = memory.keys.sum(1)
        mean = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-6)
        closest = torch.zeros(len(similarity))
        open_ = torch.ones(len(similarity), dtype=torch.bool)
        spread = float(similarity.max() - similarity.min()) or 1.0
        for _ in range(len(similarity)):
            if share <= 0:
                break
            merit = (similarity - similarity.min()) / spread * (1 - self.diversity) - closest * self.diversity
            best = int(merit.masked_fill(~open_, float("-inf")).argmax())
            if not bool(open_[best]):
                break
            open_[best] = False
            closest = torch.maximum(closest, mean @ mean[best])
            order = [best, *(best + step * sign for step in range(1, self.neighbours + 1) for sign in (-1, 1))]
            share = self._whole(given, memory.tokens, [i for i in order if 0 <= i < len(given)], share)
        return share

    @staticmethod
    def _whole(given: Tensor, stored: Tensor, order: range | list[int], share: int) -> int:
        """Fill spans in order until the share is spent; returns what is left."""
        for index in order:
            if share <= 0:
                break
            more = min(int(stored[index] - given[index]), share)
            given[index] += more
            share -= more
        return share

    @staticmethod
    def _deal(given: Tensor, stored: Tensor, left: int) -> None:
        """Deal out what is left evenly among spans that still have tokens to give."""
        while left > 0:
            room = stored - given
            takers = (room > 0).nonzero().squeeze(1)
            if not len(takers):
                return
            each = left // len(takers)
            if each == 0:
                places = torch.linspace(0, len(takers) - 1, left).round().long()
                given[takers[places]] += 1
                return
            more = room[takers].clamp_max(each)
            given[takers] += more
            left -= int(more.sum())


def relevance(memory: MemoryView, question: Tensor) -> Tensor:
    """(S,) similarity of each span's best key to the question."""
    return (memory.keys @ question.float()).amax(1)
