"""Coverage: a little of the whole timeline, evenly in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import fill_evenly, fits


@dataclass
class Coverage(MemoryMethod):
    """Read some tokens at evenly spaced instants, whatever was asked and however spans lie.

    ::

        time     0 . . . . 10 . . . . 20 . . . . 30 . . . . 40
        spans    |------------ a ------------|b|c|d|e|f|- g -|
        uniform, 3 of 7 spans    b, d, f
        coverage, 4 instants     a, a, b, g

    Spans are of very different length where nothing happened, was left out or was merged: evenly in spans
    is then not evenly in time.  An instant that no span covers goes to the nearest.  The spans that were
    hit share the budget as evenly as their tokens allow; what they cannot take goes to all others alike.

    Args:
        tokens_each: tokens that pay for one instant, >= 1; smaller looks at more instants with less detail.
    """

    tokens_each: int = 16

    paper: ClassVar[str] = "ours: evenly spaced instants"

    def __post_init__(self) -> None:
        if self.tokens_each < 1:
            raise ValueError(f"tokens_each must be at least 1, got {self.tokens_each}")

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; all of the budget if that much is stored."""
        stored = memory.tokens
        if fits(stored, budget):
            return stored.clone()
        given = torch.zeros_like(stored)
        if not budget:
            return given
        rows = _at_even_times(memory, max(1, budget // self.tokens_each))
        given[rows] = fill_evenly(stored[rows], budget)
        return given + fill_evenly(stored - given, budget - int(given.sum()))


def _at_even_times(memory: MemoryView, count: int) -> Tensor:
    """(M,) spans with tokens nearest to evenly spaced instants, rising, each once."""
    rows = memory.tokens.nonzero().squeeze(1)
    start, stop = memory.start_seconds[rows], memory.stop_seconds[rows]
    first, last = start[0], stop.max()
    instants = first + (torch.arange(count, dtype=torch.float64) + 0.5) * (last - first) / count
    before = (torch.searchsorted(start, instants, right=True) - 1).clamp(min=0)
    after = (before + 1).clamp(max=len(rows) - 1)
    nearer = start[after] - instants < instants - stop[before]
    hit: Tensor = torch.unique(rows[torch.where(nearer, after, before)])
    return hit
