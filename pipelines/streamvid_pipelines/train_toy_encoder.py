"""Trains the toy dual encoder: ``python -m streamvid_pipelines.train_toy_encoder --out DIR``.

A small CLIP model that says how well a text fits a frame.  Texts name a colour, a shape or both,
bare or inside a question; a frame fits a text if what it shows agrees with everything the text
names.  Texts that name nothing ("what happens?") fit every frame that shows a shape.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from streamvid.toy.model import build_tokenizer
from streamvid.toy.questions import WORDINGS
from streamvid.toy.world import COLORS, SHAPES, sample_scene
from streamvid_pipelines.toy_lessons import TRAINING_SEEDS

SIDE = 64
MEAN = STD = (0.5, 0.5, 0.5)


def tokenizer() -> PreTrainedTokenizerFast:
    """The toy tokenizer, small numbers only, every text closed by an end token (where CLIP pools)."""
    made = build_tokenizer(largest_number=99)
    end = "<|im_end|>"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, made.convert_tokens_to_ids(end))]
    )
    made.model_max_length = 32
    return made


def build(words: PreTrainedTokenizerFast) -> CLIPModel:
    """About 0.6 million parameters."""
    end = words.convert_tokens_to_ids("<|im_end|>")
    text = {
        "vocab_size": len(words), "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 3, "max_position_embeddings": 32, "eos_token_id": end, "bos_token_id": end,
        "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 3,
        "image_size": SIDE, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(3)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def draw(rng: np.random.Generator, scenes: int) -> tuple[Tensor, np.ndarray]:
    """Frames, (F, 3, SIDE, SIDE), and (F, 2) what each shows: colour and shape, -1 for nothing."""
    images, shown = [], []
    for _ in range(scenes):
        seed = int(rng.integers(TRAINING_SEEDS, 1 << 40))
        scene = sample_scene(seed, seconds=12, events=2, held_out=False)
        times = rng.uniform(0, scene.seconds, 4)
        height, width = [(64, 64), (64, 64), (48, 64), (48, 80)][int(rng.integers(4))]
        frames = torch.from_numpy(scene.draw(list(times), height=height, width=width)).permute(0, 3, 1, 2)
        if (height, width) != (SIDE, SIDE):
            frames = F.interpolate(frames.contiguous(), (SIDE, SIDE), mode="bicubic", antialias=True)
        images.append(frames.float() / 127.5 - 1)
        for time in times:
            here = [e for e in scene.events if e.start_seconds <= time < e.end_seconds]
            shown.append((list(COLORS).index(here[0].color), SHAPES.index(here[0].shape)) if here else (-1, -1))
    return torch.cat(images), np.array(shown)


def texts(rng: np.random.Generator, count: int, shown: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Texts and (n, 2) what each names, -1 for nothing; half name something that is really on a frame."""
    out, named = [], []
    real = shown[shown[:, 0] >= 0]
    for _ in range(count):
        if len(real) and rng.random() < 0.6:
            color, shape = real[int(rng.integers(len(real)))]
        else:
            color, shape = int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))
        names = list(COLORS)[color], SHAPES[shape]
        mode = rng.random()
        if mode < 0.5:
            kinds = ("direction", "after", "when", "is_there")
            options = WORDINGS[kinds[int(rng.integers(4))]]
            text = (
                options[int(rng.integers(len(options)))].format(name=" ".join(names))
                if rng.random() < 0.75
                else " ".join(names)
            )
            named.append((color, shape))
        elif mode < 0.7:
            options = WORDINGS["color"]
            text = options[int(rng.integers(len(options)))].format(shape=names[1]) if rng.random() < 0.7 else names[1]
            named.append((-1, shape))
        elif mode < 0.9:
            options = WORDINGS["shape"]
            text = options[int(rng.integers(len(options)))].format(color=names[0]) if rng.random() < 0.7 else names[0]
            named.append((color, -1))
        else:
            kinds = ("what_happens", "count", "first", "last")
            options = WORDINGS[kinds[int(rng.integers(4))]]
            text = options[int(rng.integers(len(options)))]
            named.append((-1, -1))
        out.append(text)
    return out, np.array(named)


def fits(shown: np.ndarray, named: np.ndarray) -> Tensor:
    """(F, n) bool: the frame shows something, and all the text names agrees with it."""
    color = (named[None, :, 0] < 0) | (named[None, :, 0] == shown[:, None, 0])
    shape = (named[None, :, 1] < 0) | (named[None, :, 1] == shown[:, None, 1])
    return torch.from_numpy((shown[:, None, 0] >= 0) & color & shape)


def train(out: Path, steps: int) -> None:
    """Train, log the share of right fits among fitting and not fitting pairs, and write the folder."""
    words = tokenizer()
    model = build(words).train()
    bias = torch.nn.Parameter(torch.tensor(-3.0))
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=1e-3, weight_decay=0.02, fused=True)
    hits: list[tuple[float, float]] = []
    for step in range(steps):
        rng = np.random.default_rng((41, step))
        rate = 1e-3 * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, shown = draw(rng, 16)
        asked, named = texts(rng, 64, shown)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs = words(asked, padding=True, return_tensors="pt")
            image = model.get_image_features(pixel_values=images).pooler_output
            text = model.get_text_features(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask
            ).pooler_output
        similarity = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
        score = similarity * model.logit_scale.exp() + bias
        label = fits(shown, named)
        weight = torch.where(label, 2.0, 1.0)
        loss = F.binary_cross_entropy_with_logits(score, label.float(), weight=weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        hits.append((float((score[label] > 0).float().mean()), float((score[~label] < 0).float().mean())))
        if (step + 1) % 100 == 0:
            recent = np.nanmean(np.array(hits[-100:]), axis=0)
            print(
                json.dumps(
                    {
                        "step": step + 1,
                        "loss": round(float(loss.detach()), 4),
                        "fits": round(float(recent[0]), 3),
                        "others": round(float(recent[1]), 3),
                    }
                ),
                flush=True,
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(model, words, out)


def save(model: CLIPModel, words: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint folder, weights as float16."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    words.save_pretrained(out)
    model.config.save_pretrained(out)
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    image = {
        "image_processor_type": "CLIPImageProcessor", "size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN,
        "image_std": STD, "do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False,
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.steps)


if __name__ == "__main__":
    main()
