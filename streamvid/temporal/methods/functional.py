"""Arithmetic that several methods share; knows tensors, no views and no settings."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def top_in_order(score: Tensor, count: int) -> Tensor:
    """Indices of the highest scores, ascending; of equal scores the earlier one is taken.

    Args:
        score: (N,) float.
        count: how many; more than N means all.

    Returns:
        (min(count, N),) int64.
    """
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values


def consecutive_cosine(x: Tensor) -> Tensor:
    """Cosine similarity of each row with the next; rows of zeros resemble nothing (0, not NaN).

    Args:
        x: (N, D).

    Returns:
        (max(N - 1, 0),) float32.
    """
    if len(x) < 2:
        return x.new_zeros(0, dtype=torch.float32)
    unit = F.normalize(x.float(), dim=-1)
    return (unit[:-1] * unit[1:]).sum(-1)


def density_peaks(x: Tensor, *, neighbours: int = 4) -> Tensor:
    """How well each row would stand for others: in a dense place, yet far from any denser row.

    Density is ``exp(-mean squared distance to the nearest rows)``, where a row counts as its own
    nearest; distances are divided by ``sqrt(D)``.  A row that nobody exceeds in density gets the
    largest distance of all, so identical rows score alike and never NaN.

    Args:
        x: (N, D).
        neighbours: rows the density looks at, itself included; fewer where there are fewer.

    Returns:
        (N,) float32, density times distance.
    """
    x = x.float()
    distance = torch.cdist(x, x) / math.sqrt(x.shape[-1])
    nearest = distance.topk(min(neighbours, len(x)), dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    farthest = distance.max()
    denser = density[None, :] > density[:, None]
    to_denser = distance.masked_fill(~denser, float("inf")).amin(-1)
    return density * to_denser.minimum(farthest)


def latest_per_cell(rows: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """What stands in each cell at the end of a stretch of frames.

    ::

        frame 0   a b c          (- : nothing kept in this cell)
        frame 1   - d -    ->    a d c

    Args:
        rows: (K,) int64 token indices of the stretch, later tokens having larger indices.
        cell: (N,) int64 cell of every token.
        num_cells: cells of a frame.

    Returns:
        (M,) int64 tokens in the order of their cells; cells without a token are left out.
    """
    last = rows.new_full((num_cells,), -1).scatter_reduce_(0, cell[rows], rows, "amax")
    return last[last >= 0]


def fill_evenly(capacity: Tensor, total: int, *, extra: Literal["first", "last"] = "first") -> Tensor:
    """Spread a total evenly over places of limited room; what one place cannot take goes to the others.

    ``fill_evenly([2, 9, 9], 13)`` is ``[2, 6, 5]``.

    Args:
        capacity: (S,) int64, >= 0.
        total: what to spread, >= 0; more than all the room fills every place.
        extra: who gets one more when it does not come out even: the first places with room left or
            the last ones.

    Returns:
        (S,) int64, at most ``capacity`` each, adding up to ``min(total, capacity.sum())``.
    """
    if total >= int(capacity.sum()):
        return capacity.clone()
    low, high = 0, int(capacity.max())
    while low < high:  # the highest level that all places can be filled to
        level = (low + high + 1) // 2
        if int(capacity.clamp(max=level).sum()) <= total:
            low = level
        else:
            high = level - 1
    share = capacity.clamp(max=low)
    left = total - int(share.sum())
    room = (capacity > low).nonzero().squeeze(1)
    share[room[:left] if extra == "first" else room[len(room) - left :]] += 1
    return share


def spaced(count: int, total: int) -> Tensor:
    """(count,) distinct indices below ``total``, each in the middle of an equal stretch; count <= total."""
    return (torch.arange(count) * 2 + 1) * total // (2 * max(count, 1))
