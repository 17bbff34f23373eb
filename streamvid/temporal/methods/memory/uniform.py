"""Uniform: the control that looks at evenly spaced moments, whatever was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import fits, spaced

FEW = 8
"""So many spans are still placed one by one into the widest gaps; more at once, evenly among those left."""


@dataclass
class Uniform(MemoryMethod):
    """Read evenly spaced spans whole, as many as the budget pays for.

    What is left of the budget goes to spans in the middle of the widest gaps.  On a memory
    that was not reduced this is uniform sampling of the video.

    Not a published method: the control that recall has to beat at the same budget.
    """

    paper: ClassVar[str] = "control: evenly spaced spans, whole"

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span; all of the budget if that much is stored."""
        stored = memory.tokens
        if fits(stored, budget):
            return stored.clone()
        given = torch.zeros_like(stored)
        left = budget
        while left > 0:
            open_ = (given < stored).nonzero().squeeze(1)
            count = _paid_for(stored[open_], left)
            if count > FEW or (count and not given.any()):
                here = open_[spaced(count, len(open_))]
                given[here] = stored[here]
            else:
                middle = _middle_of_widest_gap(given, open_)
                given[middle] = min(left, int(stored[middle]))
            left = budget - int(given.sum())
        return given


def _paid_for(sizes: Tensor, budget: int) -> int:
    """How many evenly spaced places a budget pays for whole, while one more would exceed it."""
    low, high = 0, len(sizes)
    while low < high:
        count = (low + high + 1) // 2
        if int(sizes[spaced(count, len(sizes))].sum()) <= budget:
            low = count
        else:
            high = count - 1
    return low


def _middle_of_widest_gap(given: Tensor, open_: Tensor) -> int:
    """The open span that is farthest from every span that is read, the earliest of equals."""
    if not given.any():
        return int(open_[len(open_) // 2])
    place = torch.arange(len(given))
    far = 2 * len(given)
    before = torch.where(given > 0, place, -far).cummax(0).values
    after = torch.where(given > 0, place, far).flip(0).cummin(0).values.flip(0)
    distance = (place - before).minimum(after - place)[open_]
    return int(open_[int((distance == distance.max()).nonzero()[0])])
