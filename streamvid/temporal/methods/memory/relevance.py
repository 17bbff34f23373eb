"""Recall by relevance alone: the spans most like the question, whole, best first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streamvid.signals import Signal, Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import fill_in_order, fits, with_neighbours


@dataclass
class Relevance(MemoryMethod):
    """Read the spans that fit the question best, whole and best first, until the budget is spent.

    Each comes with its neighbours.  Two spans that look alike both count, so that a long scene that fits
    the question can use up the budget; ``mmr`` is the remedy.

    Args:
        neighbours: spans on either side of a chosen one that come with it, >= 0, so that events are not
            cut; larger reads fewer places and more around each.
    """

    neighbours: int = 1

    paper: ClassVar[str] = "plain retrieval: best spans first"
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.QUESTION})

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise ValueError(f"neighbours must be at least 0 spans, got {self.neighbours}")

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; all of the budget if that much is stored."""
        stored = memory.tokens
        if fits(stored, budget):
            return stored.clone()
        similarity = self.relevance(memory, signals)
        order = torch.argsort(similarity, descending=True, stable=True)
        order = order[stored[order] > 0][:budget]  # a span has at least one token: no more than budget can be paid for
        order = with_neighbours(order, len(stored), neighbours=self.neighbours)
        return fill_in_order(stored, order, budget)
