"""Arithmetic that several methods share; knows tensors, no views and no settings."""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Rows(Protocol):
    """A tensor, or what is read row by row when it is indexed."""

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


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


def fits(stored: Tensor, budget: int) -> bool:
    """Whether all that is stored fits a budget of tokens.

    Raises:
        ValueError: if the budget is negative.
    """
    if budget < 0:
        raise ValueError(f"budget must be at least 0 tokens, got {budget}")
    return int(stored.sum()) <= budget


def fill_in_order(capacity: Tensor, order: Tensor, total: int) -> Tensor:
    """Fill places one after the other, each wholly, until the total is spent.

    ``fill_in_order([4, 4, 4], [2, 0, 1], 6)`` is ``[2, 0, 4]``.

    Args:
        capacity: (S,) int64, >= 0.
        order: (M,) int64, distinct places; those left out get nothing.
        total: what to spend, >= 0.

    Returns:
        (S,) int64, at most ``capacity`` each and ``total`` in all.
    """
    room = capacity[order]
    before = room.cumsum(0) - room
    share = torch.zeros_like(capacity)
    share[order] = (total - before).clamp(min=0).minimum(room)
    return share


def fill_by_weight(capacity: Tensor, weight: Tensor, total: int) -> Tensor:
    """Spread a total in proportion to weights over places of limited room.

    What a full place cannot take goes to the others, again in proportion; whole numbers by largest
    remainder, of equal ones the earlier place first.  ``fill_by_weight([9, 9, 9], [3, 2, 1], 12)`` is
    ``[6, 4, 2]``, and with room for only 4 in the first place ``[4, 5, 3]``.

    Args:
        capacity: (S,) int64, >= 0.
        weight: (S,) float, > 0.
        total: what to spread, >= 0; more than all the room fills every place.

    Returns:
        (S,) int64, at most ``capacity`` each, adding up to ``min(total, capacity.sum())``.
    """
    if total >= int(capacity.sum()):
        return capacity.clone()
    weight = weight.double()
    order = torch.argsort(capacity / weight, stable=True)
    room, part = capacity[order].double(), weight[order]
    left = total - (room.cumsum(0) - room)
    level = left / part.flip(0).cumsum(0).flip(0)  # what a unit of weight gets if all places before are full
    full = torch.zeros_like(capacity, dtype=torch.bool)
    full[order] = (room <= level * part).long().cumprod(0).bool()
    rest = (total - capacity[full].sum()).double() / weight[~full].sum()
    exact = torch.where(full, capacity.double(), (rest * weight).minimum(capacity.double()))
    share = exact.floor().long()
    lacking = total - int(share.sum())
    open_ = torch.where(share < capacity, exact - share, -1.0)
    share[torch.argsort(open_, descending=True, stable=True)[:lacking]] += 1
    return share


def with_neighbours(order: Tensor, total: int, *, neighbours: int) -> Tensor:
    """Each place followed by those beside it, nearest first, so that an event is not cut at its edges.

    ``with_neighbours([5, 7], 10, neighbours=1)`` is ``[5, 4, 6, 7, 8]``: what was named already is not
    named again.

    Args:
        order: (M,) int64, distinct places below ``total``.
        total: places there are.
        neighbours: how many on either side, >= 0; larger gives fewer events more of what surrounds them.

    Returns:
        (K,) int64, distinct, K >= M.
    """
    steps = torch.arange(1, neighbours + 1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.stack([-steps, steps], dim=1).flatten()])
    named = (order[:, None] + offsets).flatten()
    named = named[(named >= 0) & (named < total)]
    place = torch.arange(len(named))
    first = torch.full((total,), len(named)).scatter_reduce_(0, named, place, "amin")
    return named[first[named] == place]


def marginal_relevance(merit: Tensor, rows: Tensor, *, diversity: float) -> Tensor:
    """The order in which candidates are chosen when being like one already chosen counts against them.

    Every step takes the best of ``(1 - diversity) * merit - diversity * (cosine to the nearest chosen)``,
    where a negative cosine counts as 0.  The choice is one after another by nature: P steps on vectors of
    P, and one (P, P) table, so the caller bounds P.

    Args:
        merit: (P,) float, 0..1.
        rows: (P, D) float, unit length or zero.
        diversity: 0..1; 0 orders by merit alone, larger spreads the choice.

    Returns:
        (P,) int64, all candidates; of equal ones the earlier first.
    """
    alike = rows @ rows.T
    value = merit.float() * (1 - diversity)
    closest = torch.zeros_like(value)
    order = torch.empty(len(merit), dtype=torch.int64)
    for place in range(len(merit)):
        best = (value - closest * diversity).argmax()
        order[place] = best
        value[best] = float("-inf")
        closest = torch.maximum(closest, alike[best])
    return order


def standing_out(similarity: Tensor, *, pointing: float) -> Tensor | None:
    """Which places a question points to; None if it points nowhere.

    It points somewhere if the best place is ``pointing`` standard deviations above the mean; all places
    nearer to the best than to the median are then meant.

    Args:
        similarity: (S,) float; below 8 places there is no telling and the answer is None.
        pointing: larger asks for a clearer best place.

    Returns:
        (S,) bool, or None.
    """
    if len(similarity) < 8:
        return None
    best, mean = float(similarity.max()), float(similarity.mean())
    if best <= mean or best - mean < pointing * float(similarity.std()):
        return None
    middle = float(similarity.median())
    return similarity >= middle + 0.5 * (best - middle)


def gist(room: Tensor, total: int, *, tokens_each: int) -> Tensor:
    """A little of evenly spaced places: as many places as the total pays for, ``tokens_each`` of each.

    What is left when all places were touched goes round again, until the total is spent.

    Args:
        room: (S,) int64, >= 0.
        total: what to spend, >= 0.
        tokens_each: >= 1; smaller touches more places.

    Returns:
        (S,) int64, at most ``room`` each, adding up to ``min(total, room.sum())``.
    """
    share = torch.zeros_like(room)
    left = total
    while left > 0:
        part = (room - share).clamp(max=tokens_each)
        takers = part.nonzero().squeeze(1)
        if not len(takers):
            break
        usual = -(-int(part.sum()) // len(takers))
        chosen = takers[spaced(max(1, min(len(takers), left // usual)), len(takers))]
        more = fill_in_order(part, chosen, left)
        share += more
        left -= int(more.sum())
    return share


def relevant_order(similarity: Tensor, keys: Rows, open_: Tensor, *, diversity: float, pool: int) -> Tensor:
    """Spans by marginal relevance, the first ``pool`` weighed against each other, the others by similarity.

    Args:
        similarity: (S,) float, to the question.
        keys: (S, K, Dk) float, unit length or zero; only those of the pool are touched.
        open_: (S,) bool, which spans to order.
        diversity: see `marginal_relevance`.
        pool: >= 1; bounds the cost whatever S.

    Returns:
        (M,) int64, the open spans; of equal ones the earlier first.
    """
    rows = open_.nonzero().squeeze(1)
    rows = rows[torch.argsort(similarity[rows], descending=True, stable=True)]
    first = rows[:pool].sort().values
    mean = F.normalize(keys[first].sum(1), dim=1, eps=1e-6)
    low = similarity.min()
    spread = (similarity.max() - low).clamp(min=1e-12)
    chosen = marginal_relevance((similarity[first] - low) / spread, mean, diversity=diversity)
    return torch.cat([first[chosen], rows[pool:]])


def widened(x: Tensor, by: int) -> Tensor:
    """(N,) float: the largest value within ``by`` places on either side of each."""
    return F.max_pool1d(x[None], 2 * by + 1, stride=1, padding=by)[0] if len(x) else x
