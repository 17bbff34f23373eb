"""Recall that deals tokens out by relevance: many to the best spans, a gist of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streamvid.signals import Signal, Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import (
    fill_by_weight,
    fits,
    gist,
    standing_out,
    widened,
)


@dataclass
class Adaptive(MemoryMethod):
    """Give every span tokens by how well it fits the question, and hold more back the clearer the question is.

    Relevance in standard deviations above the mean becomes a weight ``exp(z / temperature)``; a neighbour of
    a relevant span weighs as much as that span.  ``1 - gist_share`` of the budget is dealt out in
    proportion to the weights, at least ``least`` tokens a span or none: a sharp question gives few spans
    all they have, a vague one gives many spans their best tokens.  The rest is a gist, evenly over the
    spans.  A question that points somewhere (see ``pointing``) is dealt out over those spans only, and what
    they cannot take is not spent.

    Args:
        temperature: > 0; smaller gives the best spans more of the budget.
        gist_share: 0..1 of the budget spent evenly on everything.
        least: tokens a span gets if it gets any, >= 1; larger reads fewer spans.
        neighbours: spans on either side that weigh as much as the best beside them, >= 0.
        pointing: standard deviations above the mean from which on the best span stands out.
    """

    temperature: float = 0.5
    gist_share: float = 0.15
    least: int = 16
    neighbours: int = 1
    pointing: float = 2.5

    paper: ClassVar[str] = "ours: tokens in proportion to exp(relevance)"
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.QUESTION})

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.least < 1 or self.neighbours < 0:
            raise ValueError(
                f"temperature must be > 0, least >= 1 and neighbours >= 0, got {self.temperature}, {self.least} and "
                f"{self.neighbours}"
            )
        if not 0 <= self.gist_share <= 1:
            raise ValueError(f"gist_share must be in [0, 1], got {self.gist_share}")

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; see the class."""
        stored = memory.tokens
        if fits(stored, budget):
            return stored.clone()
        similarity = self.relevance(memory, signals)
        meant = standing_out(similarity, pointing=self.pointing)
        z = (similarity - similarity.mean()) / max(float(similarity.std(correction=0)), 1e-6)
        weight = (widened(z, self.neighbours) / self.temperature).double()
        weight = (weight - weight.max()).clamp(min=-60).exp()  # far below any token's worth, and still positive
        open_ = stored > 0
        if meant is not None:
            open_ &= widened(meant.float(), self.neighbours) > 0
        rest = int(budget * self.gist_share)
        given = self._dealt(stored, weight, z, open_, budget - rest)
        if meant is None:
            rest = budget - int(given.sum())
        return given + gist(stored - given, rest, tokens_each=self.least)

    def _dealt(self, stored: Tensor, weight: Tensor, z: Tensor, open_: Tensor, share: int) -> Tensor:
        """The heaviest spans the share pays for: ``least`` tokens each, what is left by weight.

        A span comes before the neighbours that weigh as much because of it.
        """
        given = torch.zeros_like(stored)
        rows = open_.nonzero().squeeze(1)
        if not share or not len(rows):
            return given
        rows = rows[torch.argsort(z[rows], descending=True, stable=True)]
        best = torch.argsort(weight[rows], descending=True, stable=True)[: max(1, share // self.least)]
        rows = rows[best].sort().values
        least = stored[rows].clamp(max=min(self.least, share))
        more = fill_by_weight(stored[rows] - least, weight[rows], share - int(least.sum()))
        given[rows] = least + more
        return given
