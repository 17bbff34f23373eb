"""FrameFusion: tokens that repeat from frame to frame are merged layer by layer, the least looked at pruned once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from streamvid.errors import SettingsError
from streamvid.reduction import Reduction
from streamvid.signals import Signals
from streamvid.temporal.methods.base import LayerView, LlmMethod
from streamvid.temporal.methods.functional import consecutive_cosine, top_in_order

FIRST_OF_CELL = -2.0
"""Similarity of a cell's first token, which has nothing before it to merge into."""


@dataclass
class FrameFusion(LlmMethod):
    """Merge what stays the same in a cell, then prune what the last tokens hardly look at, to a compute budget.

    Called before layer 0 and then between attention and feed-forward of every layer, in two phases:

    *Merging*: each visual token is compared with the token of the same cell that comes before it.  A row
    of tokens at or above ``similarity_lower_bound`` folds into the token before the row, as a plain
    mean.  This repeats at every call until too few merge to be worth it (``ratio_lower_bound``).  If the
    bound would merge at least what the budget asks for, only the most similar are merged, as many as
    the budget asks for, and everything is finished::

        one cell, frames 0..4      a  a' a" b  b'         similar to the one before: a' a" b'
        afterwards                 A        B             A = mean(a, a', a"), B = mean(b, b')

    *Pruning*: once, at the first call after merging ended that is shown attention: the visual tokens with
    the most attention from the last ``attention_queries`` tokens continue, as many as make the
    remaining layers fit the budget.

    Paper: "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision
    Language Models", arXiv 2501.01986.
    As in the released code a merged token counts as one at the next merge, and the number of tokens
    pruned to is rounded to nearest, halves to even.

    Differs from the released code:
        - The number of layers is the model's own; there it is always 28 (``num_layers_reference``).
        - Run lengths are integers; there they are stored like hidden states, and in bfloat16 are not
          exact above 256.
        - Rows of zeros are similar to nothing; there they give NaN.
        - Text between frames (time stamps) always survives.  There it can be pruned; ``keep_text=False``
          does the same.
        - Merging that goes on to the last layer ends there.

    Args:
        cost: compute to spend on the prefill, as a share of what it takes without reduction, in (0, 1];
            smaller removes more.
        similarity_lower_bound: cosine from which two tokens are the same, in [-1, 1]; smaller merges more.
        ratio_lower_bound: merging ends when a call merges less than this share of the visual tokens, in
            [0, 1]; larger ends sooner.
        attention_queries: last tokens of the prompt whose attention decides the pruning, >= 1: 1 for
            Qwen2, 4 for Qwen2-VL in the released code.
        num_layers_reference: layers the budget is reckoned with; None for as many as the model has.
        keep_text: whether text between the first and the last visual token is safe from pruning.

    Raises:
        SettingsError: if a setting is out of range; at a call, if more was spent in the layers so far
            than ``cost`` allows for all.
    """

    paper: ClassVar[str] = (
        "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language Models, "
        "arXiv 2501.01986"
    )
    causal: ClassVar[bool] = False

    cost: float = 0.3
    similarity_lower_bound: float = 0.6
    ratio_lower_bound: float = 0.1
    attention_queries: int = 1
    num_layers_reference: int | None = None
    keep_text: bool = True

    merging_done: bool = field(init=False, repr=False, compare=False, default=False)
    """Whether no further tokens of this prompt will be merged."""
    pruning_done: bool = field(init=False, repr=False, compare=False, default=False)
    """Whether no further tokens of this prompt will be pruned."""
    merged: list[float] = field(init=False, repr=False, compare=False, default_factory=list)
    """Share of the visual tokens that each call merged, as far as it was below the budget."""
    _span: tuple[int, int] | None = field(init=False, repr=False, compare=False, default=None)
    """First and last visual token of the original prompt; None before the first call."""

    def __post_init__(self) -> None:
        if not 0 < self.cost <= 1:
            raise SettingsError(
                f"cost is a share of the full prefill and must be in (0, 1], got {self.cost}; "
                "to spend everything leave the method out"
            )
        if not -1 <= self.similarity_lower_bound <= 1:
            raise SettingsError(
                f"similarity_lower_bound is a cosine and must be in [-1, 1], got {self.similarity_lower_bound}"
            )
        if not 0 <= self.ratio_lower_bound <= 1:
            raise SettingsError(f"ratio_lower_bound is a share and must be in [0, 1], got {self.ratio_lower_bound}")
        if self.attention_queries < 1:
            raise SettingsError(f"attention_queries must be at least 1, got {self.attention_queries}")
        if self.num_layers_reference is not None and self.num_layers_reference < 1:
            raise SettingsError(f"num_layers_reference must be at least 1, got {self.num_layers_reference}")

    def reset(self) -> None:
        """Start a new prompt."""
        self.merging_done = self.pruning_done = False
        self.merged = []
        self._span = None

    def reduce_layer(self, layer: LayerView, signals: Signals) -> Reduction | None:
        """Merge or prune at this point; a call before layer 0 starts a new prompt."""
        if layer.index == 0 and not layer.after_attention:
            self.reset()
        if self.merging_done and self.pruning_done:
            return None
        num_visual = int((layer.cell >= 0).sum())
        num_layers = self.num_layers_reference or layer.num_layers
        if num_visual == 0 or len(self.merged) >= num_layers:
            self.merging_done = self.pruning_done = True
            return None
        if self._span is None:
            seen = layer.positions[layer.cell >= 0]
            self._span = int(seen[0]), int(seen[-1])
        ratio = pruning_ratio(self.merged, self.cost, num_layers)
        if self.merging_done:
            return self._prune(layer, ratio)
        return self._merge(layer, ratio, num_visual)

    def _merge(self, layer: LayerView, ratio: float, num_visual: int) -> Reduction | None:
        similarity, index = cell_similarity(layer.hidden, layer.cell)
        marked = similarity >= self.similarity_lower_bound
        share = int(marked.sum()) / num_visual
        if share < ratio:
            self.merged.append(share)
            self.merging_done = share < self.ratio_lower_bound
        else:
            marked = torch.zeros_like(marked)
            marked[top_in_order(similarity, int(ratio * num_visual))] = True
            self.merging_done = self.pruning_done = True
        return fold_runs(marked, index, len(layer.hidden)) if bool(marked.any()) else None

    def _prune(self, layer: LayerView, ratio: float) -> Reduction | None:
        assert self._span is not None
        if layer.attention is None:
            return None
        self.pruning_done = True
        start, last = self._span
        candidates = (layer.positions >= start) & (layer.positions <= last)
        if self.keep_text:
            candidates &= layer.cell >= 0
        rows = candidates.nonzero().squeeze(1)
        count = round(len(rows) * (1 - ratio))
        if count >= len(rows):
            return None
        score = layer.attention(self.attention_queries).float().mean((0, 1))[rows]
        keep = ~candidates
        keep[rows[top_in_order(score, count)]] = True
        return Reduction.select(keep, len(keep))


def cell_similarity(hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """How much each visual token resembles the one before it in the same cell.

    Args:
        hidden: (L, D).
        cell: (L,) int64 spatial cell, -1 for text.

    Returns:
        similarity: (V,) float32 cosine, in the order of cells and then of the sequence; -2 for the first
            token of a cell.
        index: (V,) int64 place of each in the sequence.
    """
    index = torch.argsort(cell, stable=True)[int((cell < 0).sum()) :]
    cosine = consecutive_cosine(hidden[index])
    same = cell[index][1:] == cell[index][:-1]
    similarity = cosine.new_full((len(index),), FIRST_OF_CELL)
    similarity[1:] = torch.where(same, cosine, FIRST_OF_CELL)
    return similarity, index


def fold_runs(marked: Tensor, index: Tensor, length: int) -> Reduction:
    """Fold every row of marked tokens into the unmarked one right before it, as their plain mean.

    Args:
        marked: (V,) bool in the order of ``index``; the first token of a cell is never marked.
        index: (V,) int64 place in the sequence, as ``cell_similarity`` gives it.
        length: L, tokens of the sequence; those not in ``index`` stay as they are.
    """
    place = torch.arange(len(index), device=index.device)
    head = torch.where(marked, 0, place).cummax(0).values
    target = torch.arange(length, device=index.device)
    target[index] = index[head]
    stays = target == torch.arange(length, device=index.device)
    return Reduction.merge((stays.cumsum(0) - 1)[target])


def pruning_ratio(merged: Sequence[float], cost: float, num_layers: int) -> float:
    """What share of the visual tokens to remove now, so that all layers together spend the budget.

    Args:
        merged: share that each layer so far removed, of what it was given.
        cost: budget as a share of all layers at full length.
        num_layers: layers of the model.

    Returns:
        A share in [0, 1]; 0 when what is left may stay.

    Raises:
        SettingsError: if the layers so far spent more than the budget.
    """
    length, spent = 1.0, 0.0
    for share in merged:
        length *= 1 - share
        spent += length
    left = num_layers * cost - spent
    if left < 0:
        raise SettingsError(
            f"cost must be at least {spent / num_layers:.3f} here, got {cost:g}: the first {len(merged)} of "
            f"{num_layers} layers already spent more; "
            "raise cost, or merge more early with a lower similarity_lower_bound"
        )
    remaining = (num_layers - len(merged)) * length
    return max(0.0, 1 - left / remaining) if remaining > 0 else 0.0
