"""Recall by relevance, with the neighbours of what fits, a gist of the rest and the recent past."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import spaced


@dataclass
class Hybrid(MemoryMethod):
    """Spend most of the budget where the question points, the rest on everything else.

    If all remembered tokens fit the budget, all are given.  Otherwise, in this order:
    ``recent_share`` of the budget goes to the newest spans, whole; ``relevant_share`` to the spans
    most similar to the question, chosen one after another by maximal marginal relevance (a span
    like one already chosen counts less), each with its neighbours, whole; what is left is a gist
    of the rest: evenly spaced spans, ``gist_tokens`` of the best tokens of each.

    A question may point somewhere clearly: some spans are then far more similar to it than spans
    usually are.  In that case only those that stand out count as relevant and the gist is held to
    ``gist_share``, even if the budget is not used up: more context than a question needs can make
    answers worse (toy needles among distractors: 95 % right on 1.6 % of the tokens, 45 % when the
    whole 5 % were spent).  A question about everything ("what happens?") points nowhere and
    uses the whole budget; so does recall without a question vector.

    Args:
        relevant_share: 0..1; larger gives fewer spans more detail.
        recent_share: 0..1; larger keeps more of the end of the video.
        gist_share: 0..1 of the budget spent on the rest when the question points somewhere.
        gist_tokens: tokens of each span of the gist, >= 1; fewer touch more of the timeline.
        diversity: 0..1 weight of being unlike what was already chosen; 0 is relevance alone.
        neighbours: spans on either side of a chosen one that come with it, so that events are not cut.
        pointing: standard deviations above the mean from which on the best span stands out.
    """

    relevant_share: float = 0.65
    recent_share: float = 0.1
    gist_share: float = 0.15
    gist_tokens: int = 16
    diversity: float = 0.2
    neighbours: int = 1
    pointing: float = 2.5

    paper = "ours; marginal relevance after Carbonell and Goldstein, SIGIR 1998"

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) tokens to read of each span; see the class."""
        stored = memory.tokens
        if int(stored.sum()) <= budget:
            return stored.clone()
        given = torch.zeros_like(stored)
        recent = int(budget * self.recent_share)
        left = budget - recent + self._whole(given, stored, range(len(stored) - 1, -1, -1), recent)
        if signals.question is not None and memory.keys.shape[-1]:
            similarity = relevance(memory, signals.question) if memory.similarity is None else memory.similarity
            standing_out = self._standing_out(similarity)
            share = min(left, max(1, int(budget * self.relevant_share)))
            left += self._relevant(given, memory, similarity, standing_out, share) - share
            if standing_out is not None:
                left = min(left, int(budget * self.gist_share))
        self._gist(given, stored, left)
        return given

    def _standing_out(self, similarity: Tensor) -> Tensor | None:
        """(S,) bool, or None if the question points nowhere."""
        if len(similarity) < 8:
            return None
        best, mean = float(similarity.max()), float(similarity.mean())
        if best - mean < self.pointing * float(similarity.std()):
            return None
        middle = float(similarity.median())
        return similarity >= middle + 0.5 * (best - middle)

    def _relevant(
        self, given: Tensor, memory: MemoryView, similarity: Tensor, standing_out: Tensor | None, share: int
    ) -> int:
        """Give whole spans by marginal relevance; returns what is left of the share."""
        mean = memory.keys.sum(1)
        mean = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-6)
        closest = torch.zeros(len(similarity))
        waiting = torch.ones(len(similarity), dtype=torch.bool) if standing_out is None else standing_out.clone()
        low = float(similarity.min())
        spread = float(similarity.max()) - low or 1.0
        while share > 0 and bool(waiting.any()):
            merit = (similarity - low) / spread * (1 - self.diversity) - closest * self.diversity
            best = int(merit.masked_fill(~waiting, float("-inf")).argmax())
            waiting[best] = False
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

    def _gist(self, given: Tensor, stored: Tensor, left: int) -> None:
        """Give evenly spaced spans their best tokens until the share is spent."""
        while left > 0:
            room = stored - given
            takers = (room > 0).nonzero().squeeze(1)
            if not len(takers):
                return
            count = max(1, min(len(takers), left // self.gist_tokens))
            chosen = takers[spaced(count, len(takers))]
            for index in chosen.tolist():
                more = min(int(room[index]), self.gist_tokens, left)
                given[index] += more
                left -= more


def relevance(memory: MemoryView, question: Tensor) -> Tensor:
    """(S,) similarity of each span's best key to the question."""
    return (memory.keys @ question.float()).amax(1)
