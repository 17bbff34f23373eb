"""M-RoPE positions of a prompt whose frames stand between text: one clock, rows and columns from it."""

from __future__ import annotations

import torch
from torch import Tensor


def interleaved(visual: Tensor, frame: Tensor, row: Tensor, column: Tensor, extent: int) -> tuple[Tensor, int]:
    """Positions where every frame is its own block between text tokens (Qwen3-VL).

    Text counts up by one.  A frame's tokens share the clock as their time and add their row and
    column to it; after the frame the clock has moved on by ``extent`` however few of its tokens
    are left, so kept tokens have the positions they would have had among all.

    Args:
        visual: (L,) bool, where visual tokens stand.
        frame: (N,) int64 frame of each visual token, rising by runs.
        row: (N,) int64 row of each visual token in the frame's full grid.
        column: (N,) int64 column of each.
        extent: the larger side of that grid.

    Returns:
        ``positions (3, L)`` int64 time, height, width, and the position of the next token.
    """
    length = len(visual)
    step = torch.ones(length, dtype=torch.int64)
    place = visual.nonzero().squeeze(1)
    step[place] = 0
    if len(place):
        last = torch.ones(len(place), dtype=torch.bool)
        last[:-1] = frame[1:] != frame[:-1]
        step[place[last]] = extent
    clock = torch.cumsum(step, 0) - step
    positions = clock.expand(3, length).clone()
    positions[1, place] += row
    positions[2, place] += column
    return positions, int(step.sum())
