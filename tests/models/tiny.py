"""Tiny random-weight models of the real architectures, made in a moment."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from streamvid.frames import Clip
from streamvid.models.pixels import PixelSettings
from streamvid.models.qwen_vl import Qwen3VL
from streamvid.toy.model import build_tokenizer

PIXELS = PixelSettings(
    patch_size=8,
    temporal_patch_size=2,
    merge_size=2,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    shortest_edge=2048,
    longest_edge=1 << 24,
    max_video_tokens=24,
    cap_pixels_per_frame=True,
    fps=2.0,
    min_frames=2,
    max_frames=256,
)


@cache
def qwen3_vl() -> Qwen3VL:
    """A Qwen3-VL of 4 decoder layers, 3 tower blocks and two deepstack taps, with grouped-query attention."""
    tokenizer = build_tokenizer(largest_number=99)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
    mark = {
        t: tokenizer.convert_tokens_to_ids(t)
        for t in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    }
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=mark["<|image_pad|>"],
        video_token_id=mark["<|video_pad|>"],
        vision_start_token_id=mark["<|vision_start|>"],
        vision_end_token_id=mark["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Qwen3VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # large enough that attention is far from uniform and a wrong position or mask shows
                parameter.copy_(
                    torch.randn_like(parameter) * 0.15
                    if parameter.ndim > 1
                    else parameter + torch.randn_like(parameter) * 0.1
                )
    return Qwen3VL(model, tokenizer, PIXELS, name="tiny", fingerprint="tiny")


def write(folder: Path) -> Path:
    """The tiny model as a checkpoint folder in the Hugging Face layout."""
    adapter = qwen3_vl()
    adapter.model.save_pretrained(folder)
    adapter.tokenizer.save_pretrained(folder)
    video = {
        "patch_size": PIXELS.patch_size,
        "temporal_patch_size": PIXELS.temporal_patch_size,
        "merge_size": PIXELS.merge_size,
        "image_mean": PIXELS.mean,
        "image_std": PIXELS.std,
        "size": {"shortest_edge": PIXELS.shortest_edge, "longest_edge": PIXELS.longest_edge},
        "max_video_tokens": PIXELS.max_video_tokens,
        "fps": PIXELS.fps,
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def clip(frames: int = 8, height: int = 60, width: int = 80, seed: int = 0) -> Clip:
    """Random pictures, two a second from 3 s on."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)
    return Clip(pixels, tuple(3 + Fraction(i, 2) for i in range(frames)), (Fraction(1, 2),) * frames)
