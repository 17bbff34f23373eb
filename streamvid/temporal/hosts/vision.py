"""Runs a Qwen-VL vision tower over chosen patches, frames as a batch.

Knows how the tower's blocks are wired (two halves and a merger); knows no method and no
prompt.  The tower's own modules do the arithmetic: only the loop over frames, which is one
attention call per frame and layer in transformers, is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision


@dataclass(frozen=True, slots=True)
class TowerOutput:
    """What leaves the tower for the language model."""

    features: Tensor
    """(N, D): one row per merged token."""

    layers: tuple[Tensor, ...]
    """Deepstack rows, one (N, D) per tapped block."""

    received: Tensor | None
    """(N,) attention each merged token received in the last block, mean over heads and queries of
    its frame, times the number of tokens (1 is average); None unless asked for."""


def run_tower(
    tower: Any,
    patches: Tensor,
    *,
    interp_indices: Tensor,
    interp_weights: Tensor,
    position_ids: Tensor,
    lengths: list[int],
    with_received: bool = False,
) -> TowerOutput:
    """Encode patches of several frames; frames do not see each other.

    Args:
        tower: the checkpoint's vision model.
        patches: (P, channels * temporal * patch * patch), whole merge units, frame after frame.
        interp_indices: (P, K) rows of the learned position table that surround each patch.
        interp_weights: (P, K) their weights.
        position_ids: (P, 2) row and column of each patch.
        lengths: patches in each frame; their sum is P.
        with_received: also return the attention each token received (saliency for methods
            that want CLS attention on towers that have no CLS token).
    """
    hidden = tower.patch_embed(patches)
    place = (tower.pos_embed(interp_indices) * interp_weights[:, :, None]).sum(1)
    hidden = hidden + place.to(hidden.dtype)
    rotary = tower.rotary_pos_emb(hidden, position_ids)
    frames = _FrameBatch(lengths, hidden.device)
    taps = list(tower.deepstack_visual_indexes)
    layers: list[Tensor | None] = [None] * len(taps)
    received = None
    for index, block in enumerate(tower.blocks):
        q, k, v = _project(block, hidden, rotary)
        if with_received and index == len(tower.blocks) - 1:
            received = frames.received(q, k, block.attn.scaling, tower.spatial_merge_unit)
        hidden = hidden + block.attn.proj(frames.attend(q, k, v, block.attn.scaling))
        hidden = hidden + block.mlp(block.norm2(hidden))
        if index in taps:
            tap = taps.index(index)
            layers[tap] = tower.deepstack_merger_list[tap](hidden)
    features = tower.merger(hidden)
    return TowerOutput(features, tuple(layer for layer in layers if layer is not None), received)


def _project(block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one block, each (P, Hh, Dh)."""
    qkv = block.attn.qkv(block.norm1(hidden)).reshape(hidden.shape[0], 3, block.attn.num_heads, -1)
    q, k, v = qkv.unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *rotary)
    return q, k, v


class _FrameBatch:
    """Turns patch rows into a batch of frames and back; ragged frames are padded under a mask."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.count = len(lengths)
        self.longest = max(lengths)
        self.mask: Tensor | None = None
        self.slots: Tensor | None = None
        if any(length != self.longest for length in lengths):
            inside = torch.arange(self.longest, device=device) < torch.tensor(lengths, device=device)[:, None]
            self.slots = inside.flatten().nonzero().squeeze(1)
            self.mask = inside[:, None, None, :]

    def fold(self, rows: Tensor) -> Tensor:
        """(P, Hh, Dh) -> (F, Hh, longest, Dh)."""
        if self.slots is not None:
            padded = rows.new_zeros(self.count * self.longest, *rows.shape[1:])
            rows = padded.index_copy(0, self.slots, rows)
        return rows.reshape(self.count, self.longest, *rows.shape[1:]).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Attention inside each frame, (P, Hh * Dh)."""
        out = F.scaled_dot_product_attention(
            self.fold(q), self.fold(k), self.fold(v), attn_mask=self.mask, scale=scaling
        )
        out = out.transpose(1, 2).reshape(self.count * self.longest, -1)
        return out if self.slots is None else out[self.slots]

    def received(self, q: Tensor, k: Tensor, scaling: float, unit: int) -> Tensor:
        """Mean attention a merge unit receives within its frame, (P / unit,), 1 on average."""
        scores = self.fold(q).float() @ self.fold(k).float().transpose(-1, -2) * scaling
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask, float("-inf"))
        weights = scores.softmax(-1).mean(1)
        if self.mask is not None:
            queries = self.mask[:, 0, 0, :, None]
            column = (weights * queries).sum(1) / queries.sum(1) * queries.sum(1)
        else:
            column = weights.mean(1) * self.longest
        column = column.reshape(-1)
        if self.slots is not None:
            column = column[self.slots]
        return column.reshape(-1, unit).mean(1)
