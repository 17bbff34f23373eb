"""Trains the toy model from scratch: ``python -m streamvid_pipelines.train_toy --out DIR``.

Three stages, each resumable on its own:

``tower``     pixels -> codes.  Every merged token learns to be the sum of fixed code vectors of
              the shape, colour and motion it shows (zero where there is only background).
``language``  codes -> answers.  The language model reads scenes written directly in those codes,
              with noise, so that it learns to reason before any pixel is rendered.
``joint``     pixels -> answers.  Tower and language model together, on rendered frames, with the
              tower's code loss kept on.

``tower`` and ``language`` do not depend on each other and can run side by side on one core each.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from streamvid.temporal.hosts.vision import run_tower
from streamvid.toy.model import LARGEST_NUMBER, build_config, write_files
from streamvid.toy.questions import KINDS
from streamvid.toy.world import ACTIONS, COLORS, SHAPES, sample_scene
from streamvid_pipelines.toy_lessons import (
    SIZES,
    SURE_SHARE,
    TRAINING_SEEDS,
    Batch,
    build_sample,
    collate,
    draw_samples,
    flat_labels,
    pixels,
    token_ids,
    tokenizer,
)

CODE_SEED = 7
CODE_NORM = 0.8

SINCE_WEIGHT = 0.6
"""Copying a time from far away is what is learnt last; it gets a louder teacher."""

SEEN_WEIGHT = 0.5
"""Of the code loss while both learn: the tower must not drift from what made it readable."""

TOWER_RATE = 0.25
"""Learning rate of the tower in the joint stage, as a share of the language model's."""

LONG_SHARE = 0.2
"""Part of the joint steps that show long scenes."""

FROZEN_SHARE = 0.5
"""Part of the joint stage in which the tower stands still: the language model gets used to real features first."""


def codes(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed random code vectors of shapes, colours and actions, rows of one orthogonal frame."""
    generator = torch.Generator().manual_seed(CODE_SEED)
    frame = torch.linalg.qr(torch.randn(width, width, generator=generator))[0] * CODE_NORM
    first, second = len(SHAPES), len(SHAPES) + len(COLORS)
    return frame[:first], frame[first:second], frame[second : second + len(ACTIONS)]


def block_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, *, scaling: float, lead: int, **_: Any
) -> tuple[Tensor, None]:
    """Attention of a video and many questions that see the video and themselves but not each other.

    Exactly what each question would compute alone after the video, at the price of one pass.
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    video = F.scaled_dot_product_attention(
        q[:, :, :lead], k[:, :, :lead], v[:, :, :lead], is_causal=True, scale=scaling
    )
    asked = F.scaled_dot_product_attention(q[:, :, lead:], k, v, attn_mask=attention_mask, scale=scaling)
    return torch.cat([video, asked], dim=2).transpose(1, 2), None


AttentionInterface.register("toy_blocks", block_attention)


class Reader(nn.Module):
    """The language model with the dense heads that exist only while training."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, tap: int = 1) -> None:
        super().__init__()
        self.model = model
        width = text_width(model)
        self.onset = nn.Linear(width, 3)
        self.order = nn.Linear(width, 5)
        self.number = nn.Linear(width, width, bias=False)
        self.subject = nn.ModuleList(nn.Linear(width, size) for size in (len(SHAPES), len(COLORS), len(ACTIONS), 4))
        self.since = nn.Linear(width, width, bias=False)
        self.caught: dict[str, Tensor] = {}
        layers = model.model.language_model.layers
        layers[tap].register_forward_hook(functools.partial(self._catch, "middle"))
        layers[-2].register_forward_hook(functools.partial(self._catch, "late"))

    def _catch(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.caught[name] = output

    def forward(self, batch: Batch, features: Tensor, deep: list[Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits at the answer positions and the dense losses."""
        text = self.model.model.language_model
        embeds = text.embed_tokens(batch.ids)
        embeds = embeds.masked_scatter(batch.visual[..., None], features.to(embeds.dtype))
        hidden = text(
            inputs_embeds=embeds,
            position_ids=batch.positions,
            attention_mask=batch.mask,
            lead=batch.lead,
            use_cache=False,
            visual_pos_masks=batch.visual if deep is not None else None,
            deepstack_visual_embeds=deep,
        ).last_hidden_state
        asked = batch.targets[:, 1:] != -100
        logits = self.model.lm_head(hidden[:, :-1][asked])
        middle = self.caught["middle"][batch.visual].float()
        sure = (batch.share >= SURE_SHARE) | (batch.share < SURE_SHARE / 10)
        losses = {
            "onset": F.cross_entropy(self.onset(middle[sure]), batch.onset[sure]),
            "order": F.cross_entropy(self.order(middle[sure]), batch.order[sure]),
        }
        seen = (batch.share >= SURE_SHARE).nonzero().squeeze(1)
        seen = seen[torch.randperm(len(seen))[:96]]
        table = text.embed_tokens.weight[token_ids("0")[0] : token_ids("0")[0] + 3600]
        guess = self.number(middle[seen]) @ table.float().T
        losses["number"] = F.cross_entropy(guess, batch.number[seen] - token_ids("0")[0]) if len(seen) else guess.sum()
        if len(batch.about):
            late = self.caught["late"][batch.about[:, 0], batch.about[:, 1]].float()
            losses["subject"] = sum(
                (F.cross_entropy(head(late), batch.about[:, 2 + i]) for i, head in enumerate(self.subject)),
                start=late.new_zeros(()),
            )
            losses["since"] = F.cross_entropy(self.since(late) @ table.float().T, batch.about[:, 6] - token_ids("0")[0])
        self.caught.clear()
        return logits.float(), losses


def oracle_features(batch: Batch, width: int, rng: torch.Generator) -> Tensor:
    """Visual tokens written directly in codes, with noise and with doubt at the edges of shapes."""
    shape, color, action = (torch.cat([torch.zeros(1, width), table]) for table in codes(width))
    seen = torch.rand(batch.share.shape, generator=rng) < (batch.share / SURE_SHARE).clamp(0, 1)
    amount = torch.where(batch.share >= SURE_SHARE, 1.0, batch.share / SURE_SHARE)[:, None]
    slip = torch.rand(3, len(batch.share), generator=rng) < 0.02
    parts = []
    for table, truth, wrong in zip((shape, color, action), (batch.shape, batch.color, batch.action), slip, strict=True):
        other = torch.randint(1, len(table), truth.shape, generator=rng)
        parts.append(table[torch.where(wrong & (truth > 0), other, truth)])
    total = (parts[0] + parts[1] + parts[2]) * amount * seen[:, None]
    return total + torch.randn(total.shape, generator=rng) * 0.02


def answer_loss(batch: Batch, logits: Tensor) -> Tensor:
    """Cross-entropy over all answer tokens."""
    asked = batch.targets[:, 1:]
    return F.cross_entropy(logits, asked[asked != -100])


def exact(batch: Batch, logits: Tensor) -> list[tuple[str, bool]]:
    """(kind, every token of the answer right) for each question of the batch; equals greedy decoding's exact match."""
    asked = batch.targets[:, 1:] != -100
    right = torch.zeros_like(batch.targets, dtype=torch.bool)
    right[:, 1:][asked] = logits.argmax(-1) == batch.targets[:, 1:][asked]
    out = []
    for row, sample in enumerate(batch.samples):
        for start, question in zip(batch.starts[row], sample.questions, strict=True):
            out.append(
                (question.kind, bool(right[row, start + question.answer_start : start + len(question.ids)].all()))
            )
    return out


def see(
    model: Qwen3VLForConditionalGeneration, patches: Tensor, rows: int, columns: int, keep: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Tower features and deepstack rows of the cells of all frame pairs, or of the kept ones only.

    Args:
        model: the model being trained.
        patches: of all frame pairs, from ``pixels``.
        rows: cells from top to bottom.
        columns: cells from left to right.
        keep: (cells of all frame pairs,) bool; cells left out never enter the tower.
    """
    tower = model.model.visual
    cells = rows * columns
    grid = torch.tensor([[1, rows * 2, columns * 2]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=tower.num_grid_per_side, mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners, spatial_merge_size=2, kwargs={},
    )  # fmt: skip
    places = get_vision_position_ids(grid, 2, kwargs={})
    patches = patches.view(-1, 4, patches.shape[-1])
    kept = torch.arange(len(patches)) if keep is None else keep.nonzero().squeeze(1)
    lengths = [n * 4 for n in torch.bincount(kept // cells, minlength=len(patches) // cells).tolist() if n]
    cell = kept % cells
    output = run_tower(
        tower,
        patches[kept].flatten(0, 1),
        interp_indices=indices.view(cells, 4, -1)[cell].flatten(0, 1),
        interp_weights=weights.view(cells, 4, -1)[cell].flatten(0, 1),
        position_ids=places.view(cells, 4, -1)[cell].flatten(0, 1),
        lengths=lengths,
    )
    return output.features, list(output.layers)


def code_loss(features: Tensor, labels: dict[str, Tensor], width: int) -> tuple[Tensor, dict[str, float]]:
    """How far the tokens are from the codes of what they show, and how often the nearest code is right."""
    features = features.float()
    share = labels["share"]
    sure = (share >= SURE_SHARE) | (share < SURE_SHARE / 10)
    features, chosen = features[sure], {k: v[sure] for k, v in labels.items()}
    loss = features.new_zeros(())
    target = torch.zeros_like(features)
    found = {}
    object_here = chosen["shape"] > 0
    for name, table in zip(("shape", "color", "action"), codes(width), strict=True):
        score = features @ table.T * (12 / CODE_NORM**2)
        score = torch.cat([torch.full_like(score[:, :1], 6.0), score], dim=1)
        weight = torch.where(object_here, 1.0, 0.25)
        loss = loss + (F.cross_entropy(score, chosen[name], reduction="none") * weight).sum() / weight.sum()
        target = target + torch.cat([torch.zeros(1, width), table])[chosen[name]]
        hit = score.argmax(1) == chosen[name]
        found[name] = float(hit[object_here].float().mean()) if object_here.any() else 1.0
    found["empty"] = float((features[~object_here].norm(dim=1) < CODE_NORM / 2).float().mean())
    return loss + F.mse_loss(features, target) * 20, found


def text_width(model: Qwen3VLForConditionalGeneration) -> int:
    """Hidden size of the language model."""
    return int(model.model.language_model.embed_tokens.weight.shape[1])


def digit_codes(width: int) -> Tensor:
    """(3600, width) first embeddings of the numbers: a sum of one code for each of four digits.

    Copying a time from its stamp into an answer is then learnt once for forty digits instead of
    once for every number; training changes the rows freely afterwards.
    """
    generator = torch.Generator().manual_seed(CODE_SEED + 1)
    digits = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:40].view(4, 10, width) * 0.6
    numbers = torch.arange(LARGEST_NUMBER + 1)
    return torch.stack([digits[place, numbers // 10**place % 10] for place in range(4)]).sum(0)


def initial_model() -> Qwen3VLForConditionalGeneration:
    """The model before any training; deepstack adds nothing yet."""
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(build_config(tokenizer()))
    with torch.no_grad():
        table = model.model.language_model.embed_tokens.weight
        table.normal_(0, 0.08)
        first = token_ids("0")[0]
        table[first : first + LARGEST_NUMBER + 1] = digit_codes(table.shape[1])
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
    model.model.language_model.set_attn_implementation("toy_blocks")
    model.train()
    return model


def schedule(step: int, steps: int, peak: float, warm: int = 150) -> float:
    """Linear warm-up, flat, then a fall to a twentieth over the last 30 %."""
    if step < warm:
        return peak * (step + 1) / warm
    tail = 0.7 * steps
    if step < tail:
        return peak
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - tail) / (steps - tail))))


class Run:
    """One stage's optimiser, checkpoint and log."""

    def __init__(
        self,
        out: Path,
        stage: str,
        modules: dict[str, nn.Module],
        steps: int,
        peak: float,
        slower: nn.Module | None = None,
    ) -> None:
        self.path = out / f"{stage}.pt"
        self.log_path = out / f"{stage}.jsonl"
        self.modules, self.steps, self.peak = modules, steps, peak
        slow = {id(p) for p in slower.parameters()} if slower is not None else set()
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in dict.fromkeys(p for module in modules.values() for p in module.parameters()):
            if parameter.requires_grad:
                kind = (TOWER_RATE if id(parameter) in slow else 1.0, 0.03 if parameter.ndim >= 2 else 0.0)
                groups.setdefault(kind, []).append(parameter)
        self.rates = [rate for rate, _ in groups]
        self.parameters = [parameter for group in groups.values() for parameter in group]
        parts = [{"params": group, "weight_decay": decay} for (_, decay), group in groups.items()]
        self.optimizer = torch.optim.AdamW(parts, lr=peak, betas=(0.9, 0.98), fused=True)
        self.step = 0
        out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            fresh = [module.load_state_dict(state[name], strict=False).missing_keys for name, module in modules.items()]
            if not any(fresh):  # a checkpoint from before a head was added loses only the optimiser's state
                self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def update(self, loss: Tensor) -> None:
        """One optimiser step."""
        rate = schedule(self.step, self.steps, self.peak)
        for group, share in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def log(self, **values: Any) -> None:
        """Append a line to the log and print it."""
        line = json.dumps({"step": self.step, "time": round(time.time()), **values})
        with self.log_path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def train_tower(out: Path, steps: int, clips: int) -> None:
    """Stage ``tower``."""
    model = initial_model()
    width = text_width(model)
    tower = model.model.visual
    run = Run(out, "tower", {"tower": tower}, steps, 2e-3)
    sums: dict[str, float] = {}
    while run.step < steps:
        rng = np.random.default_rng((11, run.step))
        (rows, columns), size = SIZES[int(rng.integers(len(SIZES)))]
        samples = [
            build_sample(
                sample_scene(
                    int(rng.integers(TRAINING_SEEDS, 1 << 40)),
                    seconds=8,
                    events=2,
                    held_out=False,
                ),
                rng,
                rows=rows,
                columns=columns,
                plain=True,
            )
            for _ in range(clips)
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features, _ = see(model, pixels(samples, rows, columns, size), rows, columns)
        loss, found = code_loss(features, flat_labels(samples), width)
        run.update(loss)
        for key, value in {"loss": float(loss.detach()), **found}.items():
            sums[key] = sums.get(key, 0.0) + value
        if run.step % 50 == 0:
            run.log(**{k: round(v / 50, 4) for k, v in sums.items()})
            sums = {}
        if run.step % 500 == 0 or run.step == steps:
            run.save()


def train_language(out: Path, steps: int, clips: int) -> None:
    """Stage ``language``."""
    model = initial_model()
    width = text_width(model)
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    reader = Reader(model)
    run = Run(out, "language", {"reader": reader}, steps, 1.5e-3)
    tally: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    sums: dict[str, float] = {}
    while run.step < steps:
        torch.manual_seed(run.step)
        batch = collate(list(draw_samples(run.step, clips, share=run.step / steps, seed=23)))
        features = oracle_features(batch, width, torch.Generator().manual_seed(run.step))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, dense = reader(batch, features, None)
        answer = answer_loss(batch, logits)
        run.update(answer + 0.3 * sum(dense.values()) + SINCE_WEIGHT * dense.get("since", 0))
        _note(tally, sums, batch, logits, answer, dense)
        if run.step % 50 == 0:
            _report(run, tally, sums, 50)
        if run.step % 250 == 0 or run.step == steps:
            run.save()


def train_joint(out: Path, steps: int, clips: int) -> None:
    """Stage ``joint``; starts from the other two stages' checkpoints."""
    model = initial_model()
    width = text_width(model)
    reader = Reader(model)
    if not (out / "joint.pt").exists():
        reader.load_state_dict(torch.load(out / "language.pt", weights_only=True)["reader"], strict=False)
        model.model.visual.load_state_dict(torch.load(out / "tower.pt", weights_only=True)["tower"])
    run = Run(out, "joint", {"reader": reader}, steps, 8e-4, slower=model.model.visual)
    tally: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    sums: dict[str, float] = {}
    while run.step < steps:
        torch.manual_seed(run.step)
        rng = np.random.default_rng((31, run.step))
        (rows, columns), size = SIZES[int(rng.integers(len(SIZES)))]
        share = max(run.step / steps, 0.2)
        long = rng.random() < LONG_SHARE
        count = max(1, clips // 2) if long else clips
        samples = list(draw_samples(run.step, count, share=share, seed=37, rows=rows, columns=columns, long=long))
        batch = collate(samples)
        kept = torch.from_numpy(np.concatenate([s.keep.reshape(-1) for s in samples]))
        labels = flat_labels(samples)
        before_tower = (
            long or rng.random() < 0.6
        )  # cells leave before the tower (run lengths) or after it (density pruning)
        learning = run.step >= FROZEN_SHARE * steps
        patches = pixels(samples, rows, columns, size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.set_grad_enabled(learning):
                features, deep = see(model, patches, rows, columns, kept if before_tower else None)
            if before_tower:
                labels = {name: values[kept] for name, values in labels.items()}
            else:
                whole, features, deep = features, features[kept], [layer[kept] for layer in deep]
            logits, dense = reader(batch, features, deep)
        seen, found = code_loss(features if before_tower else whole, labels, width)
        answer = answer_loss(batch, logits)
        run.update(answer + 0.2 * sum(dense.values()) + SINCE_WEIGHT * dense.get("since", 0) + SEEN_WEIGHT * seen)
        _note(tally, sums, batch, logits, answer, dense)
        for key, value in found.items():
            sums[f"seen_{key}"] = sums.get(f"seen_{key}", 0.0) + value
        if run.step % 50 == 0:
            _report(run, tally, sums, 50)
        if run.step % 100 == 0 or run.step == steps:
            run.save()


def _note(
    tally: dict[str, list[bool]],
    sums: dict[str, float],
    batch: Batch,
    logits: Tensor,
    answer: Tensor,
    dense: dict[str, Tensor],
) -> None:
    for kind, right in exact(batch, logits):
        tally[kind].append(right)
    for key, value in {"answer": answer, **dense}.items():
        sums[key] = sums.get(key, 0.0) + float(value.detach())


def _report(run: Run, tally: dict[str, list[bool]], sums: dict[str, float], count: int) -> None:
    every = [right for rights in tally.values() for right in rights]
    run.log(
        exact=round(sum(every) / max(len(every), 1), 3),
        **{kind: round(sum(r) / len(r), 2) for kind, r in tally.items() if r},
        **{key: round(value / count, 4) for key, value in sums.items()},
    )
    for rights in tally.values():
        rights.clear()
    sums.clear()


def export(out: Path, folder: Path) -> None:
    """Write the checkpoint folder from the ``joint`` stage, weights as float16 on disk."""
    from safetensors.torch import save_file

    model = initial_model()
    reader = Reader(model)
    reader.load_state_dict(torch.load(out / "joint.pt", weights_only=True)["reader"])
    write_files(folder)
    tensors = {
        name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--stage", choices=("tower", "language", "joint", "export", "all"), default="all")
    parser.add_argument("--steps", type=int, help="steps of the stage (defaults: 3500, 1700, 4300)")
    parser.add_argument("--clips", type=int, help="scenes in a step (defaults: 12, 8, 8)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", type=Path, help="where the checkpoint folder is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage in ("tower", "all"):
        train_tower(args.out, args.steps or 3500, args.clips or 12)
    if args.stage in ("language", "all"):
        train_language(args.out, args.steps or 1700, args.clips or 8)
    if args.stage in ("joint", "all"):
        train_joint(args.out, args.steps or 4300, args.clips or 8)
    if args.stage in ("export", "all") and args.export:
        export(args.out, args.export)


if __name__ == "__main__":
    main()
