"""Recall by marginal relevance: like the question, and unlike what was already chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from streamvid.signals import Signal, Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import fill_in_order, fits, relevant_order, with_neighbours


@dataclass
class Mmr(MemoryMethod):
    """Read whole spans chosen one after another: similar to the question, different from those chosen.

    A span is worth ``(1 - diversity) * relevance - diversity * similarity to the nearest chosen span``,
    relevance scaled to 0..1 over all spans.  Each comes with its neighbours; the budget is spent whole.

    Paper: "The Use of MMR, Diversity-Based Reranking", Carbonell and Goldstein, SIGIR 1998.
    Differs from the paper: only the ``pool`` most relevant spans are weighed against each other, the others
    follow by relevance, so that the cost does not grow with the memory; and a negative similarity counts as 0.

    Args:
        diversity: 0..1, one minus the paper's lambda; 0 is ``relevance``, larger spreads the choice.
        neighbours: spans on either side of a chosen one that come with it, >= 0.
        pool: spans weighed against each other, >= 1; larger is nearer to the paper and slower.
    """

    diversity: float = 0.3
    neighbours: int = 1
    pool: int = 256

    paper: ClassVar[str] = "Maximal marginal relevance, Carbonell and Goldstein, SIGIR 1998"
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.QUESTION})

    def __post_init__(self) -> None:
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity must be in [0, 1], got {self.diversity}")
        if self.neighbours < 0 or self.pool < 1:
            raise ValueError(f"neighbours must be >= 0 and pool >= 1, got {self.neighbours} and {self.pool}")

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; all of the budget if that much is stored."""
        stored = memory.tokens
        if fits(stored, budget):
            return stored.clone()
        similarity = self.relevance(memory, signals)
        order = relevant_order(similarity, memory.keys, stored > 0, diversity=self.diversity, pool=self.pool)
        order = with_neighbours(order[:budget], len(stored), neighbours=self.neighbours)
        return fill_in_order(stored, order, budget)
