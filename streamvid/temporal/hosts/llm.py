"""Carries out llm-stage methods: decoder layers run as two halves, and the sequence may shrink at each seam.

Knows the submodule names that the Llama and Qwen families share (``input_layernorm``,
``self_attn``, ``post_attention_layernorm``, ``mlp``); knows no method.  Installs itself on the
loaded model for the time of one answer and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import LayerView, LlmMethod


class LayerHost:
    """The running state of one prompt while its decoder layers are hosted."""

    def __init__(
        self,
        layers: Sequence[Any],
        methods: Sequence[LlmMethod],
        *,
        cell: Tensor,
        deepstack: Sequence[Tensor] = (),
        rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        """Prepare for one prompt.

        Args:
            layers: the decoder layers.
            methods: llm-stage methods in order, each with fresh state.
            cell: (L,) spatial cell of each prompt token, -1 for text.
            deepstack: rows (N, D) to add to the visual tokens after the first layers.
            rotate: the family's rotary function, ``(q, k, cos, sin) -> (q, k)``.
        """
        self.layers, self.methods, self.rotate = list(layers), list(methods), rotate
        self.cell = cell.cpu()
        self.length = len(self.cell)
        self.alive = torch.arange(self.length)
        """Prompt index of the token that leads each row still there."""

        self.deepstack = [_widen(rows, self.cell >= 0) for rows in deepstack]
        """(L, D) for each of the first layers, zero for text; reduced along with the sequence."""

    @property
    def visual_alive(self) -> int:
        """Visual tokens still in the sequence."""
        return int((self.cell[self.alive] >= 0).sum())

    @contextmanager
    def installed(self) -> Iterator[LayerHost]:
        """Replace the layers' ``forward`` while the block runs; always undone."""
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = _Halves(self, index, layer)
            yield self
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def reduce(self, index: int, hidden: Tensor, *, after: bool, attention: Callable[[int], Tensor] | None) -> Tensor:
        """Ask every method at this point and carry out what it says, on (1, L, D)."""
        for method in self.methods:
            view = LayerView(
                index=index,
                num_layers=len(self.layers),
                after_attention=after,
                hidden=hidden[0],
                cell=self.cell[self.alive].to(hidden.device),
                positions=self.alive.to(hidden.device),
                original_length=self.length,
                attention=attention,
            )
            plan = method.reduce_layer(view, Signals())
            if plan is None or plan.is_identity:
                continue
            hidden = plan.apply(hidden[0])[None]
            self.alive = self.alive[plan.leader().cpu()]
            self.deepstack = [plan.apply(rows) for rows in self.deepstack]
            attention = None  # rows and columns no longer match; a later method at this seam sees none
        return hidden

    def add_deepstack(self, index: int, hidden: Tensor) -> Tensor:
        """Add the rows the model itself would have added after this layer, for tokens still there."""
        if index >= len(self.deepstack):
            return hidden
        return hidden + self.deepstack[index].to(hidden.device, hidden.dtype)[None]


def _widen(rows: Tensor, visual: Tensor) -> Tensor:
    """(N, D) rows of visual tokens as (L, D) rows of the whole sequence."""
    wide = rows.new_zeros(len(visual), rows.shape[1])
    wide[visual.to(rows.device)] = rows
    return wide


class _Halves:
    """One decoder layer as attention half and feed-forward half with seams between."""

    def __init__(self, host: LayerHost, index: int, layer: Any) -> None:
        self.host, self.index, self.layer = host, index, layer

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        host, layer = self.host, self.layer
        prefill = hidden_states.shape[1] > 1
        if prefill and self.index == 0:
            hidden_states = host.reduce(0, hidden_states, after=False, attention=None)
        cos, sin = position_embeddings
        mask = attention_mask
        if prefill:
            keep = host.alive.to(cos.device)
            cos, sin = cos[:, keep], sin[:, keep]
            if mask is not None:
                mask = mask[..., keep.to(mask.device), :][..., keep.to(mask.device)]
        elif mask is not None:
            # one new token: it may see every entry this layer's own cache holds, and itself
            mask = mask[..., -(past_key_values.get_seq_length(self.index) + 1) :]
        normed = layer.input_layernorm(hidden_states)
        attended, _ = layer.self_attn(
            hidden_states=normed,
            position_embeddings=(cos, sin),
            attention_mask=mask,
            position_ids=None,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        if prefill:
            hidden_states = host.reduce(
                self.index,
                hidden_states,
                after=True,
                attention=lambda queries: _rows(layer.self_attn, normed, cos, sin, queries, host.rotate),
            )
        hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        return host.add_deepstack(self.index, hidden_states) if prefill else hidden_states


def _rows(
    attention: Any,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    queries: int,
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention of the last few queries over the sequence, (Hh, queries, L) float32, causal.

    Recomputed from the layer's own projections, so the fast kernels stay in use for everything else.
    """
    length = normed.shape[1]
    q = attention.q_proj(normed[:, -queries:]).view(1, queries, -1, attention.head_dim)
    k = attention.k_proj(normed).view(1, length, -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, _ = rotate(q, q, cos[:, -queries:], sin[:, -queries:])
    k, _ = rotate(k, k, cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.float() @ k.float().transpose(-1, -2)) * attention.scaling
    ahead = (
        torch.arange(length, device=q.device)[None] > torch.arange(length - queries, length, device=q.device)[:, None]
    )
    rows: Tensor = scores.masked_fill(ahead, float("-inf")).softmax(-1)[0]
    return rows
