"""Uniform: the control that reads the whole timeline alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import fill_evenly


@dataclass
class Uniform(MemoryMethod):
    """Read equally many tokens of every span, whatever was asked.

    A span that holds fewer than its share gives what it has and the rest goes to the others.  What
    does not come out even goes to evenly spaced spans; with fewer tokens than spans these are the only
    ones read, one token each.

    Not a published method: the control that recall has to beat at the same budget.
    """

    paper: ClassVar[str] = "control: the budget spread evenly over the timeline"

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; all of the budget if that much is stored."""
        if budget < 0:
            raise ValueError(f"budget must be at least 0 tokens, got {budget}")
        return fill_evenly(memory.tokens, budget, extra="spaced")
