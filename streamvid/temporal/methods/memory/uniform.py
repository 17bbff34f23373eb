"""Uniform: the control that looks at evenly spaced moments, whatever was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import spaced


@dataclass
class Uniform(MemoryMethod):
    """Read evenly spaced spans whole, as many as the budget pays for.

    What is left of the budget goes to one more span in the middle of the widest gap.  On a memory
    that was not reduced this is uniform sampling of the video.

    Not a published method: the control that recall has to beat at the same budget.
    """

    paper: ClassVar[str] = "control: evenly spaced spans, whole"

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; all of the budget if that much is stored."""
        if budget < 0:
            raise ValueError(f"budget must be at least 0 tokens, got {budget}")
        stored = memory.tokens
        given = torch.zeros_like(stored)
        count = len(stored)
        while count and int(stored[spaced(count, len(stored))].sum()) > budget:
            count -= 1
        given[spaced(count, len(stored))] = stored[spaced(count, len(stored))]
        left = budget - int(given.sum())
        while left > 0 and bool((given < stored).any()):
            here = _middle_of_widest_gap(given, stored)
            more = min(int(stored[here] - given[here]), left)
            given[here] += more
            left -= more
        return given


def _middle_of_widest_gap(given: Tensor, stored: Tensor) -> int:
    """The span with tokens left to give that is farthest from every span that is read, the earliest of equals."""
    read = torch.nonzero(given > 0).squeeze(1)
    open_ = torch.nonzero(given < stored).squeeze(1)
    if not len(read):
        return int(open_[len(open_) // 2])
    distance = (open_[:, None] - read[None]).abs().amin(1)
    return int(open_[int(distance.argmax())])
