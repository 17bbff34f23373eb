"""Recent: the control that reads only the end of the timeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView


@dataclass
class Recent(MemoryMethod):
    """Read the last spans whole, backwards from the end, until the budget is spent.

    The span in which it runs out gives only what is left, so that the budget is used like any other
    method's.

    Not a published method: the control that recall has to beat at the same budget.
    """

    paper: ClassVar[str] = "control: the last spans, whole"

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; all of the budget if that much is stored."""
        if budget < 0:
            raise ValueError(f"budget must be at least 0 tokens, got {budget}")
        tokens = memory.tokens
        after = tokens.flip(0).cumsum(0).flip(0) - tokens  # tokens stored later than each span
        return (budget - after).clamp(min=0).minimum(tokens)
