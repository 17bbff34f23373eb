"""Runs ``Rlt`` on clips of raw frames."""

from __future__ import annotations

import torch

from streamvid.signals import Signals
from streamvid.temporal.methods.base import PixelView
from streamvid.temporal.methods.pixel.rlt import Rlt
from tests.goldens import Case, difference, first, scalar, tensor

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


def run(case: Case) -> str | None:
    """Compare masks, lengths, positions and the pixels of what is kept."""
    tubelet, side, width = (scalar(case, name) for name in ("tubelet_size", "patch_size", "embed_dims"))
    grid = tuple(case["grid"].tolist())
    method = Rlt(threshold=scalar(case, "threshold"))
    frames = (tensor(case, "frames_u8").float() / 255 - MEAN) / STD
    masks, lengths, places, sums, means = [], [], [], [], []
    for clip in frames:
        method.reset()  # clips of one file are separate streams
        pixels = clip.permute(0, 3, 1, 2)
        view = PixelView(pixels, std=STD, tubelet=tubelet, cell=side)
        if view.grid != grid:
            return f"grid: {view.grid}, expected {grid}"
        plan = method.select(view, Signals())
        masks.append(plan.spread(torch.ones(plan.num_outputs)).long())
        runs = plan.spread(method.run_lengths(plan, view.grid)).reshape(grid).permute(1, 2, 0).flatten()
        lengths.append(runs[runs > 0])
        places.append(plan.apply(_wave_table(plan.num_inputs, width)))
        kept = plan.apply(_tubelets(pixels, tubelet, side))
        sums.append(kept.flatten(1).double().sum(1))
        means.append(kept.flatten(1).abs().mean(1))
    return first(
        difference("token_mask", torch.stack(masks), case["token_mask"]),
        difference("num_tokens", torch.stack(masks).sum(1), case["num_tokens"]),
        difference("token_lengths_hwt_order", torch.cat(lengths), case["token_lengths_hwt_order"]),
        difference("pos_embeds", torch.cat(places), case["pos_embeds"], atol=1e-4),
        # sums of some thousand terms of either sign
        difference("patches_checksum", torch.cat(sums), case["patches_checksum"], atol=5e-3),
        difference("patch_abs_mean", torch.cat(means), case["patch_abs_mean"]),
    )


def _tubelets(pixels: torch.Tensor, tubelet: int, side: int) -> torch.Tensor:
    """(F, C, H, W) -> (T * rows * columns, C, tubelet, side, side)."""
    frames, channels, height, width = pixels.shape
    split = pixels.reshape(frames // tubelet, tubelet, channels, height // side, side, width // side, side)
    return split.permute(0, 3, 5, 2, 1, 4, 6).flatten(0, 2)


def _wave_table(count: int, width: int) -> torch.Tensor:
    """(count, width) sines on even and cosines on odd channels, base 10000."""
    channel = torch.arange(width)
    angle = torch.arange(count)[:, None] / 10000 ** (2 * (channel // 2) / width).double()
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
