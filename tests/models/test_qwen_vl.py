"""The Qwen3-VL adapter against transformers' own pixel path."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from transformers import DynamicCache

from streamvid.models import qwen_vl
from streamvid.models.adapter import Encoded, GenerationStats
from streamvid.models.pixels import tubelet_times
from streamvid.reduction import Reduction
from streamvid.signals import Signals
from streamvid.temporal.methods.base import LayerView, LlmMethod
from streamvid.tokens import VideoTokens

from . import tiny

STEPS = 8


def encode(keep: torch.Tensor | None = None, frames: int = 8) -> Encoded:
    adapter, clip = tiny.qwen3_vl(), tiny.clip(frames)
    adapter.reset()
    view = adapter.view(clip, size=adapter.frame_size(height=60, width=80, num_frames=frames))
    times = [(float(a), float(b)) for a, b in tubelet_times(clip.pts, Fraction(1, 2), 2)]
    with torch.inference_mode():
        return adapter.encode(view, times, keep=keep)


def run(tokens: VideoTokens, methods: tuple[LlmMethod, ...] = (), steps: int = STEPS) -> torch.Tensor:
    """Logits of the prefill and of each step that follows, (1 + steps, V)."""
    adapter = tiny.qwen3_vl()
    prompt = adapter.prompt(tokens, "what happens?")
    cache = DynamicCache(config=adapter.model.config.text_config)
    with torch.inference_mode():
        rows = [adapter.prefill(prompt, cache, methods)[0]]
        for count in range(steps):
            token = int(rows[-1].argmax())
            index, position = prompt.input_ids.shape[1] + count, prompt.next_position + count
            rows.append(adapter.step(token, index=index, position=position, cache=cache))
    return torch.stack(rows)


def theirs(frames: int = 8) -> torch.Tensor:
    """The same from transformers' ``generate`` on pixels, with its own positions."""
    adapter, clip = tiny.qwen3_vl(), tiny.clip(frames)
    view = adapter.view(clip, size=adapter.frame_size(height=60, width=80, num_frames=frames))
    prompt = adapter.prompt(encode(frames=frames).tokens, "what happens?")
    time, rows, columns = view.grid
    with torch.inference_mode():
        out = adapter.model.generate(
            input_ids=prompt.input_ids,
            pixel_values_videos=adapter.pixels.patchify(view.pixels),
            video_grid_thw=torch.tensor([[time, rows * 2, columns * 2]]),
            mm_token_type_ids=prompt.visual[None].int() * 2,
            max_new_tokens=STEPS + 1,
            min_new_tokens=STEPS + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.cat(out.logits)


@pytest.mark.parametrize("frames", [8, 7, 2])
def test_keep_all_equals_transformers_exactly_in_prefill_and_every_step(frames: int) -> None:
    assert torch.equal(run(encode(frames=frames).tokens), theirs(frames))


def test_encoding_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode()
    monkeypatch.setattr(qwen_vl, "PATCHES_AT_ONCE", 1)  # every frame by itself
    parts = encode()
    torch.testing.assert_close(parts.tokens.features, whole.tokens.features, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.received_attention, whole.received_attention, rtol=0, atol=1e-6)


def test_cells_left_out_never_enter_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tiny.qwen3_vl()
    entered = []
    embed = adapter.model.model.visual.patch_embed
    handle = embed.register_forward_hook(lambda module, args, out: entered.append(len(out)))
    try:
        encoded = encode(keep=torch.tensor([0, 5, 13, 14, 40]))
    finally:
        handle.remove()
    assert sum(entered) == 5 * 4
    assert encoded.tokens.grid == (4, 4, 5)
    assert encoded.tokens.position.tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 3], [0, 2, 4], [2, 0, 0]]


def test_a_frame_that_keeps_every_cell_is_untouched_by_what_other_frames_lose() -> None:
    """Frames do not see each other: the padded ragged batch must not leak between them."""
    whole = encode()
    cells = len(whole.tokens) // 4
    keep = torch.cat([torch.arange(cells), torch.tensor([cells + 2]), torch.arange(2 * cells, 3 * cells)])
    part = encode(keep=keep)
    torch.testing.assert_close(part.tokens.features[:cells], whole.tokens.features[:cells], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        part.tokens.features[cells + 1 :], whole.tokens.features[2 * cells : 3 * cells], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(part.tokens.layers[1][:cells], whole.tokens.layers[1][:cells], rtol=0, atol=1e-5)


def test_attention_received_is_one_on_average_in_every_frame() -> None:
    keep = torch.tensor([0, 1, 2, 12, 30, 31])
    for chosen in (None, keep):
        encoded = encode(chosen)
        frame = encoded.tokens.position[:, 0]
        for index in frame.unique():
            assert encoded.received_attention[frame == index].mean() == pytest.approx(1.0, abs=1e-5)


def test_kept_tokens_keep_the_positions_they_had_among_all() -> None:
    adapter, whole = tiny.qwen3_vl(), encode()
    full = adapter.prompt(whole.tokens, "what happens?")
    keep = torch.tensor([0, 3, 12, 25, 26, 47, 79])
    part = adapter.prompt(whole.tokens.select(keep), "what happens?")
    places = full.position_ids[1:, 0, full.visual][:, keep]
    assert torch.equal(part.position_ids[1:, 0, part.visual], places)
    assert part.next_position == full.next_position


def test_frames_without_tokens_leave_no_trace_in_the_prompt() -> None:
    adapter, whole = tiny.qwen3_vl(), encode()
    second = whole.tokens.select(whole.tokens.position[:, 0] == 1)
    text = adapter.tokenizer.decode(adapter.prompt(second, "what happens?").input_ids[0])
    assert text.count("seconds>") == 1
    assert "< 4.2 seconds>" in text.replace("4 .2", "4.2") or "<4.2 seconds>" in text.replace(" ", "").replace(
        "seconds", " seconds"
    )


def test_a_question_with_the_models_own_video_marker_is_refused() -> None:
    with pytest.raises(qwen_vl.UnsupportedError, match="own video marker"):
        tiny.qwen3_vl().prompt(encode().tokens, "what is <|video_pad|>?")


@dataclass
class DropAt(LlmMethod):
    """Drops given visual tokens before the first layer, or after the attention half of a layer."""

    drop: tuple[int, ...] = ()
    layer: int = 0
    after: bool = False

    paper = "a control for tests"

    def reduce_layer(self, layer: LayerView, signals: Signals) -> Reduction | None:
        if layer.index != self.layer or layer.after_attention != self.after:
            return None
        visual = (layer.cell >= 0).nonzero().squeeze(1)
        keep = torch.ones(len(layer.cell), dtype=torch.bool)
        keep[visual[torch.tensor(self.drop)]] = False
        return Reduction.select(keep, len(keep))


def test_hosting_without_reducing_is_exact_and_leaves_nothing_behind() -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    plain = run(tokens)
    assert torch.equal(run(tokens, (DropAt(layer=99),)), plain)
    assert all("forward" not in layer.__dict__ for layer in adapter.model.model.language_model.layers)


def test_dropping_before_the_first_layer_equals_never_giving_the_tokens() -> None:
    """Catches wrong positions, masks or deepstack rows: the dropped token must leave no other trace."""
    tokens = encode().tokens
    drop = (1, 2, 7, 30, 31)
    kept = torch.tensor([i for i in range(len(tokens)) if i not in drop])
    torch.testing.assert_close(run(tokens, (DropAt(drop=drop),)), run(tokens.select(kept)), rtol=0, atol=2e-5)


def test_dropping_inside_equals_masking_in_all_later_layers() -> None:
    """Reducing then decoding equals masking then decoding, per layer."""
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    drop, at = (0, 4, 20, 21, 40), 1
    reduced = run(tokens, (DropAt(drop=drop, layer=at, after=True),))
    prompt = adapter.prompt(tokens, "what happens?")
    gone = prompt.visual.nonzero().squeeze(1)[torch.tensor(drop)]
    handles = []

    def hide(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        hidden = kwargs["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        rows, total = hidden.shape[1], hidden.shape[1]
        if rows == 1:
            total = kwargs["past_key_values"].get_seq_length(module.layer_idx) + 1  # type: ignore[attr-defined]
        mask = torch.ones(rows, total, dtype=torch.bool).tril(total - rows)
        mask[:, gone] = False
        mask |= torch.eye(rows, total, dtype=torch.bool) if rows > 1 else torch.zeros(rows, total, dtype=torch.bool)
        kwargs["attention_mask"] = mask[None, None]
        return args, kwargs

    try:
        for layer in adapter.model.model.language_model.layers[at + 1 :]:
            handles.append(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True))
        masked = run(tokens)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(reduced, masked, rtol=0, atol=2e-5)


def test_attention_rows_on_demand_equal_eager_attention() -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    caught = {}

    @dataclass
    class Look(LlmMethod):
        paper = "a control for tests"

        def reduce_layer(self, layer: LayerView, signals: Signals) -> Reduction | None:
            if layer.attention is not None:
                caught[layer.index] = layer.attention(3)
            return None

    run(tokens, (Look(),), steps=0)
    prompt = adapter.prompt(tokens, "what happens?")
    adapter.model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.inference_mode():
            outputs = {
                "video": qwen_vl.BaseModelOutputWithDeepstackFeatures(
                    pooler_output=(prompt.features,), deepstack_features=[(rows,) for rows in prompt.layers]
                )
            }
            out = adapter.model(
                input_ids=prompt.input_ids,
                position_ids=prompt.position_ids,
                mm_encoder_outputs=outputs,
                output_attentions=True,
            )
    finally:
        adapter.model.set_attn_implementation({"text_config": "sdpa"})
    for index, rows in caught.items():
        torch.testing.assert_close(rows, out.attentions[index][0, :, -3:], rtol=0, atol=1e-5)


def test_generate_streams_what_greedy_decoding_gives_and_counts_it() -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    stats = GenerationStats()
    prompt = adapter.prompt(tokens, "what happens?")
    with torch.inference_mode():
        text = "".join(adapter.generate(prompt, max_new_tokens=6, stats=stats))
    ids = run(tokens, steps=5).argmax(-1).tolist()
    assert text == adapter.tokenizer.decode(ids, skip_special_tokens=True)
    assert (stats.new_tokens, stats.stopped, stats.visual_tokens) == (6, "length", len(tokens))


def test_frame_features_carry_cells_that_were_not_encoded() -> None:
    """A static video reduced to its first frame must not look like a change of scene."""
    whole = encode()
    cells = len(whole.tokens) // 4
    first = encode(keep=torch.arange(cells))
    for row in first.frame_features[1:]:
        assert torch.equal(row, first.frame_features[0])
    torch.testing.assert_close(first.frame_features[0], whole.frame_features[0], rtol=0, atol=1e-5)
