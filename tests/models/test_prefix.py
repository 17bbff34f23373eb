"""Keys and values that one question leaves for the next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from streamvid.models.adapter import GenerationStats, Prompt
from streamvid.models.prefix import Prefix, blocks_of
from streamvid.temporal.methods.llm.frame_fusion import FrameFusion
from streamvid.tokens import VideoTokens

from . import tiny
from .test_qwen_vl import encode

STEPS = 6


def answer(prompt: Prompt, prefix: Prefix | None) -> tuple[str, GenerationStats]:
    stats = GenerationStats()
    with torch.inference_mode():
        text = "".join(tiny.qwen3_vl().generate(prompt, max_new_tokens=STEPS, stats=stats, prefix=prefix))
    return text, stats


def logits_after(prompt: Prompt, prefix: Prefix | None) -> torch.Tensor:
    adapter = tiny.qwen3_vl()
    cache = DynamicCache(config=adapter.model.config.text_config)
    with torch.inference_mode():
        return adapter.prefill(prompt if prefix is None else prefix.take(prompt, cache), cache)[0]


def frames_of(tokens: VideoTokens, first: int, last: int) -> VideoTokens:
    here = (tokens.position[:, 0] >= first) & (tokens.position[:, 0] < last)
    return tokens.select(here)


def test_the_second_question_prefills_itself_only() -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    first, second = (adapter.prompt(tokens, text) for text in ("what happens?", "how many shapes are there then?"))
    prefix = Prefix()
    _, stats = answer(first, prefix)
    assert stats.reused_tokens == 0 and prefix.num_bytes > 0
    end = int(first.visual.nonzero()[-1]) + 1
    assert prefix.length == end
    assert all(keys.shape == values.shape == (1, 2, end, 16) for keys, values in prefix.layers)
    text, stats = answer(second, prefix)
    assert stats.reused_tokens == end and stats.prompt_tokens == second.input_ids.shape[1]
    assert text == answer(second, None)[0]
    # And so on: what the second left serves the third.
    assert answer(first, prefix)[1].reused_tokens == end


def test_logits_are_those_of_a_whole_prefill() -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    prefix = Prefix()
    answer(adapter.prompt(tokens, "what happens?"), prefix)
    prompt = adapter.prompt(tokens, "when does the red circle appear?")
    torch.testing.assert_close(logits_after(prompt, prefix), logits_after(prompt, None), rtol=1e-4, atol=1e-5)


def test_only_the_frames_that_are_the_same_are_shared() -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    prefix = Prefix()
    answer(adapter.prompt(tokens, "what happens?"), prefix)
    half = VideoTokens.cat([frames_of(tokens, 0, 2), frames_of(tokens, 3, 4)])
    prompt = adapter.prompt(half, "what happens?")
    shared = blocks_of(prompt)[1][0]
    expected = logits_after(prompt, None)
    torch.testing.assert_close(logits_after(prompt, prefix), expected, rtol=1e-4, atol=1e-5)
    assert prefix.reused == shared < blocks_of(prompt)[-1][0]


@pytest.mark.parametrize("part", ["features", "layers", "position", "time"])
def test_anything_else_is_another_video(part: str) -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    prefix = Prefix()
    answer(adapter.prompt(tokens, "what happens?"), prefix)
    if part == "features":
        features = tokens.features.clone()
        features[0, 0] += 1e-6
        other = replace(tokens, features=features)
    elif part == "layers":
        changed = tokens.layers[1].clone()
        changed[0, 0] += 1e-6
        other = replace(tokens, layers=(tokens.layers[0], changed))
    elif part == "position":
        position = tokens.position.clone()
        position[0, 2], position[1, 2] = 1, 0
        other = replace(tokens, position=position)
    else:
        other = replace(tokens, pts_seconds=tokens.pts_seconds + 1)
    prompt = adapter.prompt(other, "what happens?")
    torch.testing.assert_close(logits_after(prompt, prefix), logits_after(prompt, None), rtol=0, atol=0)
    assert prefix.reused == 0


def test_an_answer_that_is_not_listened_to_leaves_keys_and_values_too() -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    prompt = adapter.prompt(tokens, "what happens?")
    prefix = Prefix()
    with torch.inference_mode():
        pieces = adapter.generate(prompt, max_new_tokens=STEPS, prefix=prefix)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert prefix.length == int(prompt.visual.nonzero()[-1]) + 1
    assert answer(prompt, prefix)[1].reused_tokens == prefix.length


def test_a_question_without_a_video_shares_nothing() -> None:
    adapter = tiny.qwen3_vl()
    prefix = Prefix()
    answer(adapter.prompt(None, "what happens?"), prefix)
    assert prefix.length == 0 and answer(adapter.prompt(None, "what happens?"), prefix)[1].reused_tokens == 0


def test_methods_between_the_layers_exclude_it() -> None:
    adapter, tokens = tiny.qwen3_vl(), encode().tokens
    with pytest.raises(ValueError, match="depends on its question"):
        list(
            adapter.generate(
                adapter.prompt(tokens, "what?"), max_new_tokens=1, methods=[FrameFusion()], prefix=Prefix()
            )
        )
