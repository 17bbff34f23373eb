"""Runs ``FrameFusion``: one merging step, a whole prefill with stand-in layers, or the budget formula."""

from __future__ import annotations

import torch

from streamvid.errors import SettingsError
from streamvid.signals import Signals
from streamvid.temporal.methods.base import LayerView
from streamvid.temporal.methods.llm.frame_fusion import FrameFusion, cell_similarity, fold_runs, pruning_ratio
from tests.goldens import Case, difference, first, scalar, tensor


def run(case: Case) -> str | None:
    """Tell the three kinds of case apart by their arrays."""
    if "sparsity_padded" in case:
        return _ratios(case)
    return _prefill(case) if "call_info" in case else _merge_step(case)


def _ratios(case: Case) -> str | None:
    for row, cost in enumerate(case["cost"]):
        merged = [round(float(s), 6) for s in case["sparsity_padded"][row] if s >= 0]
        try:
            ratio = pruning_ratio(merged, round(float(cost), 6), scalar(case, "num_layers"))
        except SettingsError:
            ratio = -1.0
        differs = difference(f"ratio[{row}]", torch.tensor(ratio), case["ratio"][row])
        if differs or (ratio < 0) != bool(case["raises"][row]):
            return differs or f"raises[{row}]: {ratio < 0}"
    return None


def _merge_step(case: Case) -> str | None:
    hidden, cell = tensor(case, "hidden_states"), tensor(case, "patch_type")
    similarity, index = cell_similarity(hidden, cell)
    marked = similarity >= scalar(case, "similarity_lower_bound")
    plan = fold_runs(marked, index, len(hidden))
    keep = torch.zeros(len(hidden), dtype=torch.int64)
    keep[plan.leader()] = 1
    return first(
        difference("token_index_by_patch", index, case["token_index_by_patch"]),
        difference("similarity_by_patch", similarity, case["similarity_by_patch"]),
        difference("merge_index_by_patch", marked.nonzero().squeeze(1), case["merge_index_by_patch"]),
        difference("keep_mask", keep, case["keep_mask"]),
        difference("merged_kept", plan.apply(hidden), case["merged_kept"]),
    )


def _prefill(case: Case) -> str | None:
    hidden, cell = tensor(case, "hidden_states"), tensor(case, "patch_type")
    length = len(hidden)
    attention = tensor(case, "attn_at_pruning") if "attn_at_pruning" in case else None
    method = FrameFusion(
        cost=scalar(case, "cost"),
        similarity_lower_bound=scalar(case, "similarity_lower_bound"),
        ratio_lower_bound=scalar(case, "ratio_lower_bound"),
        attention_queries=1 if attention is None else attention.shape[1],
        num_layers_reference=scalar(case, "num_layers"),
        keep_text=False,
    )
    positions = torch.arange(length)
    for call, expected in enumerate(case["call_info"]):
        if call:
            hidden = 1.5 * torch.tanh(hidden @ tensor(case, "layer_weights")[call])
        before, settled = len(hidden), method.merging_done and method.pruning_done
        view = LayerView(
            index=max(call - 1, 0),
            num_layers=scalar(case, "num_layers"),
            after_attention=call > 0,
            hidden=hidden,
            cell=cell,
            positions=positions,
            original_length=length,
            attention=None if attention is None or not call else lambda n: attention[:, -n:],
        )
        plan = method.reduce_layer(view, Signals())
        if plan is not None:
            hidden, lead = plan.apply(hidden), plan.leader()
            cell, positions = cell[lead], positions[lead]
        info = torch.tensor([before, len(hidden), method.merging_done, method.pruning_done])
        differs = difference(f"call_info[{call}]", info, expected)
        if differs is None and not settled and f"keep_positions_{call}" in case:
            differs = first(
                difference(f"keep_positions_{call}", positions, case[f"keep_positions_{call}"]),
                difference(f"hidden_out_{call}", hidden, case[f"hidden_out_{call}"]),
            )
        if differs is not None:
            return differs
    return difference("sparsity_list", torch.tensor(method.merged), case["sparsity_list"])
