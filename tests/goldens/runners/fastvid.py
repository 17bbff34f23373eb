"""Runs ``FastVid`` on the video part of a prompt and puts the prompt together again."""

from __future__ import annotations

import math

import torch

from streamvid.budget import Budget
from streamvid.signals import Signals
from streamvid.temporal.methods.embedding.fastvid import FastVid
from streamvid.tokens import VideoTokens
from tests.goldens import Case, difference, first, scalar, tensor

VARIANTS = {0: "parallel", 1: "sequential", 2: "qwen"}
SETTINGS = ("dyseg_c", "dyseg_tau", "dyseg_ignore", "stprune_d", "dtm_p", "dtm_beta")


def run(case: Case) -> str | None:
    """Compare scenes, kept places and the sequence that the language model would read."""
    video = tensor(case, "video_tokens")
    frames, cells, width = video.shape
    attention = tensor(case, "frame_attn")
    method = FastVid(
        budget=Budget(keep_ratio=scalar(case, "retention_ratio")),
        variant=VARIANTS[scalar(case, "variant")],
        **{name: scalar(case, name) for name in SETTINGS if name in case},
    )
    columns = math.isqrt(cells) if "newline" in case else cells
    if "grid_thw" in case:
        columns = int(case["grid_thw"][2]) // 2
    tokens = _tokens(video, (frames, cells // columns, columns))
    features = tensor(case, "frame_global_features")
    plan = method.reduce(tokens, Signals(frame_features=features, received_attention=attention.flatten()))
    if plan is None:
        return "nothing was reduced"
    kept = tokens.reduce(plan)

    prefix, suffix = tensor(case, "prefix"), tensor(case, "suffix")
    frame, row, column = kept.position.T
    line = columns + 1 if "newline" in case else columns
    rows = frames * (cells // columns)
    places = [len(prefix) + (frame * (cells // columns) + row) * line + column]
    parts = [kept.features]
    if "newline" in case:  # a row that still has a token keeps the token that ends it
        alive = (frame * (cells // columns) + row).unique()
        places.append(len(prefix) + alive * line + columns)
        parts.append(tensor(case, "newline").expand(len(alive), width))
    length = len(prefix) + rows * line + len(suffix)
    index = torch.cat([torch.arange(len(prefix)), *places, torch.arange(length - len(suffix), length)])
    hidden = torch.cat([prefix, *parts, suffix])
    index, order = index.sort()

    found = [
        difference("segment_sizes", method.segments(features), case["segment_sizes"]),
        difference("keep_indexs", index, case["keep_indexs"]),
        difference("hidden_out", hidden[order], case["hidden_out"]),
    ]
    if "position_ids" in case:
        found.append(difference("position_ids", index, case["position_ids"]))
    if "frame_context_num" in case:
        context = torch.bincount(frame, minlength=frames) - scalar(case, "salient_per_frame")
        found.append(difference("frame_context_num", context, case["frame_context_num"]))
    if "position_ids_in" in case:
        found.append(
            difference("position_ids_out", tensor(case, "position_ids_in")[:, index], case["position_ids_out"])
        )
    if "cache_position_out" in case:
        found.append(difference("cache_position_out", index, case["cache_position_out"]))
    return first(*found)


def _tokens(video: torch.Tensor, grid: tuple[int, int, int]) -> VideoTokens:
    count = grid[0] * grid[1] * grid[2]
    position = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    return VideoTokens(
        features=video.flatten(0, 1),
        grid=grid,
        position=position,
        pts_seconds=position[:, 0].double(),
        duration_seconds=torch.ones(count, dtype=torch.float64),
        size=torch.ones(count),
        score=torch.zeros(count),
    )
