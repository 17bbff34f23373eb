"""How neighbouring spans become one: tokens of one place that follow each other are folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from streamvid.temporal.methods.memory.merge_time import MergeTime
from streamvid.tokens import VideoTokens


def merged_tokens(parts: Sequence[VideoTokens], method: MergeTime) -> VideoTokens:
    """The tokens of neighbouring spans as one span of about half as many.

    Frames are put together two by two, so that a merged span has as many frames as each of its parts and each
    of them lasts twice as long.  A token lies in the row and column of the largest it is made of, appears with
    the first of them and lasts until the last one ends.

    Args:
        parts: in time order, of one width.
        method: says which tokens become one.
    """
    tokens = VideoTokens.cat(list(parts))
    if not len(tokens):
        return replace(tokens, grid=(1, *tokens.grid[1:]))
    _, frame = torch.unique(tokens.position[:, 0], return_inverse=True)
    frame = frame // 2
    num_frames = int(frame.max()) + 1
    stop = tokens.pts_seconds + tokens.duration_seconds
    begin = torch.full((num_frames,), float("inf"), dtype=torch.float64)
    begin.scatter_reduce_(0, frame, tokens.pts_seconds, "amin")
    tokens = replace(
        tokens,
        position=torch.cat([frame[:, None], tokens.position[:, 1:]], dim=1),
        grid=(num_frames, *tokens.grid[1:]),
    )
    plan = method.consolidate(tokens, (len(tokens) + 1) // 2)
    out = tokens.reduce(plan)
    rows, columns, _ = plan.entries()
    first = torch.full((plan.num_outputs,), num_frames).scatter_reduce_(0, rows, frame[columns], "amin")
    last = torch.full((plan.num_outputs,), float("-inf"), dtype=torch.float64)
    last.scatter_reduce_(0, rows, stop[columns], "amax")
    out = replace(
        out,
        position=torch.cat([first[:, None], out.position[:, 1:]], dim=1),
        pts_seconds=begin[first],
        duration_seconds=last - begin[first],
    )
    _, height, width = out.grid
    place = (first * height + out.position[:, 1]) * width + out.position[:, 2]
    return out.select(torch.argsort(place, stable=True))
