"""Recall by the model's own attention: what the question's tokens look at when they see each span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import fill_in_order, fits, spaced, with_neighbours


@dataclass
class Attention(MemoryMethod):
    """Read the spans the language model itself attends to when it reads the question.

    The best ``tokens_each`` tokens of a span stand for it.  They are laid before the question, some spans at
    a time, and go through the first layers of the model.  A span's score is the attention that the
    question's tokens pay its best token, against what they pay the opening of the prompt, mean of those
    layers.  The best spans are then read whole, with their neighbours.  No image-text encoder is needed;
    where there is one, it chooses the ``candidates``.

    Paper: ReKV, "Streaming Video Question-Answering with In-context Video KV-Cache Retrieval", arXiv
    2503.00540.
    Differs from the paper: spans are remembered as tokens and not as keys and values of every layer (a
    hundredth of the bytes), so representatives pass through the model again for each question; the layers
    down to one depth decide together for all; and what is retrieved is read with its own times, in order.

    Args:
        tokens_each: tokens that stand for a span, >= 1; more see smaller things and cost more.
        candidates: most spans looked at, >= 1: the most similar to the question, or evenly spaced ones
            where there is no encoder; bounds the cost whatever the memory.
        depth: 0..1, how far down the language model attention is read; 0 is the first layer alone, deeper
            reads more layers and costs more.
        neighbours: spans on either side of a chosen one that come with it, >= 0.
    """

    tokens_each: int = 16
    candidates: int = 512
    depth: float = 0.5
    neighbours: int = 1

    paper: ClassVar[str] = "after ReKV, In-context Video KV-Cache Retrieval, arXiv 2503.00540"

    def __post_init__(self) -> None:
        if self.tokens_each < 1 or self.candidates < 1 or self.neighbours < 0:
            raise ValueError(
                f"tokens_each and candidates must be >= 1 and neighbours >= 0, got {self.tokens_each}, "
                f"{self.candidates} and {self.neighbours}"
            )
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be in [0, 1], got {self.depth}")

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; all of the budget that candidates and neighbours can take."""
        stored = memory.tokens
        if fits(stored, budget):
            return stored.clone()
        if memory.attention is None:
            raise ValueError("attention asks the model which spans it looks at, and there is none; use relevance")
        rows = self._candidates(memory, signals)
        score = memory.attention(rows, self.tokens_each, self.depth)
        order = rows[torch.argsort(score, descending=True, stable=True)]
        order = with_neighbours(order[:budget], len(stored), neighbours=self.neighbours)
        return fill_in_order(stored, order, budget)

    def _candidates(self, memory: MemoryView, signals: Signals) -> Tensor:
        """(C,) int64 spans to look at, rising."""
        rows = memory.tokens.nonzero().squeeze(1)
        if len(rows) <= self.candidates:
            return rows
        similarity = memory.relevance(signals.question)
        if similarity is None:
            return rows[spaced(self.candidates, len(rows))]
        best = torch.argsort(similarity[rows], descending=True, stable=True)[: self.candidates]
        return rows[best].sort().values
