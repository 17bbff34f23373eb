"""The toy model's tokenizer, configuration and processor files: an ordinary Qwen3-VL checkpoint, made small.

Knows the vocabulary of the toy world and the shape of the network; the weights come from the
training program in ``streamvid_pipelines.train_toy``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

from streamvid.toy.questions import NUMBERS, WORDINGS
from streamvid.toy.world import ACTIONS, COLORS, SHAPES

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "[UNK]",
)
LARGEST_NUMBER = 3599
"""Whole numbers up to this (an hour in seconds) are single tokens, so a time is copied in one step."""

_EXTRA_WORDS = (
    "system user assistant you are a helpful an the it there is no yes nothing happens then at seconds second "
    "stays still move moves left right up down and or of in on to from between before until while during "
    "who what when where which why how many did does do was were shape shapes color colour object objects video "
    "clip scene first last next appear appears appeared leave leaves left disappear disappears come comes go goes "
    "see seen me tell about describe short answer summarise summarize please thing things not red"
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def build_tokenizer(*, largest_number: int = LARGEST_NUMBER) -> PreTrainedTokenizerFast:
    """Word pieces over the toy world's words, whole numbers to an hour, and single characters for the rest."""
    words: dict[str, None] = dict.fromkeys(_EXTRA_WORDS.split())
    for text in (*(w for options in WORDINGS.values() for w in options), *ACTIONS, *SHAPES, *COLORS, *NUMBERS):
        words.update(dict.fromkeys(text.replace("?", " ").replace(".", " ").split()))
    pieces = [word for word in sorted(words) if "{" not in word]
    pieces += ["<", ">", "seconds>", *(f".{digit}" for digit in range(10)), *"?.,:;!'\"()[]-+/%&"]
    pieces += [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces += [f"##{chr(c)}" for c in range(ord("a"), ord("z") + 1)]
    pieces += [str(number) for number in range(largest_number + 1)] + [f"##{digit}" for digit in range(10)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys((*SPECIAL, *pieces)))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"seconds>|\d+|\.\d+|[a-z]+|[^\sa-z\d]"), behavior="removed", invert=True
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL[:-1]])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """A Qwen3-VL configuration of about 3.5 million parameters."""
    ids = {name: int(str(tokenizer.convert_tokens_to_ids(name))) for name in SPECIAL}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 8, 8],
                "mrope_interleaved": True,
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_heads": 3,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 192,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def processor_files() -> dict[str, dict[str, Any]]:
    """The JSON files a Qwen3-VL checkpoint carries for pixels: about 64 x 64 pixels a frame, two frames a second."""
    shared = {
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
    }
    return {
        "preprocessor_config.json": {
            **shared,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64},
        },
        "video_preprocessor_config.json": {
            **shared,
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": 2048, "longest_edge": 7200 * 64 * 64},
            "cap_pixels_per_frame": True,
            "max_video_tokens": 16,
            "fps": 2,
            "min_frames": 2,
            "max_frames": 7200,
            "do_sample_frames": True,
        },
    }


def write_files(folder: Path) -> None:
    """Write everything but the weights: configuration, tokenizer, chat template and processor files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_config(tokenizer).save_pretrained(folder)
    for name, content in processor_files().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
