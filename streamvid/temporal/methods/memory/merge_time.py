"""Merge-time: what is long ago is remembered with fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streamvid.errors import SettingsError
from streamvid.reduction import Reduction
from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
from streamvid.temporal.methods.functional import fill_evenly, fits
from streamvid.tokens import VideoTokens


@dataclass
class MergeTime(MemoryMethod):
    """Fold neighbouring spans into one of about half their tokens, the oldest and finest first.

    Spans have levels: 0 as watched, one more each time two neighbours are merged.  When room is
    needed, the oldest pair of the fullest level is merged, of equally full levels the finest.  All levels
    so have about as many spans, each level twice as long as the one below, and the number of spans
    per doubling of age is about the same: resolution falls with the logarithm of age.

    Within a pair, tokens of one cell that follow each other in time are merged, those that differ
    least first (Ward's cost: squared distance times s t / (s + t) for sizes s and t).  Where that is
    not enough, cells are put together two by two in each direction.  Nothing is dropped: sizes add up.

    As a recall method it reads the same share of every span, so that what an answer sees of a moment
    falls with its age as memory does.

    Not a published method.  The levels are those of exponential histograms (Datar et al., "Maintaining
    Stream Statistics over Sliding Windows", 2002).

    Args:
        keys: retrieval keys that a merged span keeps, >= 1: the most diverse ones.  More find more
            of what it holds and cost more of the catalogue.
        least: spans of a level that are never merged, >= 2; larger keeps the near past finer and the far
            past shorter.
    """

    keys: int = 4
    least: int = 8

    paper: ClassVar[str] = "own: exponential histogram of spans, merged along time per cell"

    def __post_init__(self) -> None:
        if self.keys < 1 or self.least < 2:
            raise SettingsError(
                f"merge_time keeps at least 1 key of a span and 2 spans of a level, got keys={self.keys} and "
                f"least={self.least}; the defaults are 4 and 8"
            )

    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read: the same number of every span, as far as it has them."""
        if fits(memory.tokens, budget):
            return memory.tokens.clone()
        return fill_evenly(memory.tokens, budget, extra="last")

    def consolidate(self, tokens: VideoTokens, count: int) -> Reduction:
        """Fold tokens into at most ``count``; those at one and the same position become one in any case."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if not len(tokens):
            return Reduction.keep_all(0)
        _, height, width = tokens.grid
        group = torch.arange(len(tokens))
        position, size, features = tokens.position.cpu(), tokens.size.cpu().double(), tokens.features.float().cpu()
        shift = 0
        while True:
            cell = (position[:, 1] >> shift) * width + (position[:, 2] >> shift)
            place = (position[:, 1] * width + position[:, 2]) + height * width * position[:, 0]
            order = torch.argsort(place, stable=True)
            order = order[torch.argsort(cell[order], stable=True)]
            a, b = order[:-1], order[1:]
            beside = cell[a] == cell[b]
            cost = (features[a] - features[b]).square().sum(1).double() * size[a] * size[b] / (size[a] + size[b])
            cost = torch.where(place[a] == place[b], -1.0, cost).masked_fill(~beside, float("inf"))
            possible, forced = int(beside.sum()), int((cost < 0).sum())
            take = max(forced, min(len(order) - count, possible))
            joined = torch.zeros(len(order), dtype=torch.bool)
            joined[1 + torch.argsort(cost, stable=True)[:take]] = True
            label = torch.empty(len(order), dtype=torch.int64)
            label[order] = (~joined).long().cumsum(0) - 1
            group = label[group]
            if len(order) - take <= count:
                break
            plan = Reduction.merge(label, size)
            features, position, size = plan.apply(features), position[plan.leader()], plan.total(size)
            shift += 1
        first = torch.full((int(group.max()) + 1,), len(group))
        first.scatter_reduce_(0, group, torch.arange(len(group)), "amin")
        return Reduction.merge(torch.argsort(torch.argsort(first))[group], tokens.size)


def diverse(keys: Tensor, count: int) -> Tensor:
    """Which keys to keep so that those left out are close to one that stays.

    Starts with the key that is least like the others, then takes the one farthest from all taken.

    Args:
        keys: (K, Dk) float, unit length.
        count: how many, >= 1.

    Returns:
        (min(count, K),) int64, rising; of equal ones the earlier.
    """
    if len(keys) <= count:
        return torch.arange(len(keys))
    alike = keys.float() @ keys.float().T
    chosen = [int(alike.sum(1).argmin())]
    nearest = alike[chosen[0]].clone()
    for _ in range(count - 1):
        nearest[chosen] = float("inf")
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, alike[chosen[-1]])
    return torch.tensor(sorted(chosen))
