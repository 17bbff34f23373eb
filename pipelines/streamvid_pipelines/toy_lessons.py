"""What the toy model is taught from: scenes laid out as token sequences with the truth about every cell.

Knows scenes, questions and the tokenizer; knows no network.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamvid.toy.model import LARGEST_NUMBER, build_tokenizer
from streamvid.toy.questions import ask_all
from streamvid.toy.world import ACTIONS, COLORS, SHAPES, Scene, sample_scene

TRAINING_SEEDS = 1_000_000
"""Training scenes have seeds from here on; evaluation uses seeds below."""

SURE_SHARE = 0.22
"""A cell covered at least this much must show what covers it; below a tenth of that it is background."""

SIZES = (((4, 4), (64, 64)), ((4, 4), (64, 64)), ((3, 4), (48, 64)), ((3, 5), (48, 80)))
"""((rows, columns), (height, width)): square frames half of the time, 4:3 and 16:9 the rest."""


@dataclass
class Labels:
    """What every cell of every frame pair shows: (F, rows, columns) each; class 0 is background."""

    shape: np.ndarray
    color: np.ndarray
    action: np.ndarray
    share: np.ndarray
    owner: np.ndarray
    onset: np.ndarray
    """0 background, 1 the owner's first frame pair, 2 a later one."""


def label(scene: Scene, starts: np.ndarray, rows: int, columns: int) -> Labels:
    """Cell labels for frame pairs that start at ``starts`` (seconds)."""
    owner, share = scene.cells(list(starts + 0.25), rows=rows, columns=columns)
    table = np.array(
        [(0, 0, 0, -1)]
        + [
            (SHAPES.index(e.shape) + 1, list(COLORS).index(e.color) + 1, ACTIONS.index(e.action) + 1, e.start_seconds)
            for e in scene.events
        ]
    )
    rowed = table[owner + 1]
    first = np.full(len(table), -1.0)
    for index, event in enumerate(scene.events):
        alive = starts[(starts >= event.start_seconds) & (starts < event.end_seconds)]
        first[index + 1] = alive.min() if len(alive) else -1
    onset = np.where(owner < 0, 0, np.where(first[owner + 1] == starts[:, None, None], 1, 2))
    return Labels(rowed[..., 0], rowed[..., 1], rowed[..., 2], share, owner, onset)


@functools.lru_cache(maxsize=200_000)
def token_ids(text: str) -> tuple[int, ...]:
    """Ids of a text; every text is tokenised once."""
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)


@functools.cache
def tokenizer() -> Any:
    """The toy tokenizer, built once."""
    return build_tokenizer()


LONG_SECONDS = 36
"""Scenes longer than this are laid out as recall would leave them, and not asked what cannot be told from that."""

WHOLE_STORY = ("what_happens", "count")


def keep_mask(labels: Labels, rng: np.random.Generator) -> np.ndarray:
    """Which cells stay, as a reduction would leave them: everything, a random part, or what changed."""
    frames = labels.owner.shape[0]
    keep = np.ones(labels.owner.shape, dtype=bool)
    mode = rng.random()
    if frames > LONG_SECONDS:
        change = np.ones(keep.shape, dtype=bool)
        change[1:] = labels.owner[1:] != labels.owner[:-1]
        change |= (labels.action > 0) & (labels.action <= len(ACTIONS) - 1) & (labels.share > 0.05)
        keep = (change & (rng.random(keep.shape) < rng.uniform(0.6, 1.0))) | (
            rng.random(keep.shape) < rng.uniform(0, 0.05)
        )
        empty = (labels.owner < 0).reshape(frames, -1).all(1)
        keep[empty & (rng.random(frames) < rng.uniform(0.5, 1.0))] = False
    elif mode < 0.35:
        return keep
    elif mode < 0.6:
        ratio = rng.uniform(0.15, 0.9)
        keep = rng.random(keep.shape) < ratio
        keep |= (labels.owner >= 0) & (rng.random(keep.shape) < 0.5)
    else:
        change = np.ones(keep.shape, dtype=bool)
        change[1:] = (labels.owner[1:] != labels.owner[:-1]) | (np.abs(labels.share[1:] - labels.share[:-1]) > 0.04)
        change |= (labels.action > 0) & (labels.action <= len(ACTIONS) - 1) & (labels.share > 0.05)
        keep = change | (rng.random(keep.shape) < rng.uniform(0, 0.3))
    if frames <= LONG_SECONDS and rng.random() < 0.3:
        empty = (labels.owner < 0).reshape(frames, -1).all(1)
        keep[empty & (rng.random(frames) < rng.uniform(0.2, 1.0))] = False
    # whatever is asked about must remain visible: the clearest cell of each event's first pair and of one other
    for index in np.unique(labels.owner[labels.owner >= 0]):
        where = np.flatnonzero((labels.owner == index).reshape(frames, -1).any(1))
        for frame in {where[0], where[int(rng.integers(len(where)))]}:
            shares = np.where(labels.owner[frame] == index, labels.share[frame], -1)
            keep[frame][np.unravel_index(shares.argmax(), shares.shape)] = True
    if not keep.any():
        keep[0] = True
    return keep


@dataclass
class Asked:
    """One question with its answer, after the video: tokens, and where the answer starts."""

    kind: str
    ids: tuple[int, ...]
    answer_start: int
    subject: int
    """Index of the event the question is about, -1 for none or several."""


@dataclass
class Sample:
    """One scene as the model will see it: the video's tokens once, then many questions about it."""

    scene: Scene
    labels: Labels
    keep: np.ndarray
    ids: list[int]
    positions: list[tuple[int, int, int]]
    visual: list[int]
    """Index in ``ids`` of each kept cell, in order."""
    next_position: int
    """Where every question starts counting."""
    questions: list[Asked]
    offsets: np.ndarray
    """(F,) what was added to the time of each frame pair."""


def build_sample(scene: Scene, rng: np.random.Generator, *, rows: int, columns: int, plain: bool) -> Sample:
    """Lay a scene out as the model will see it.  ``plain`` keeps everything, words canonically and starts at zero."""
    starts = np.arange(scene.seconds, dtype=np.float64)
    labels = label(scene, starts, rows, columns)
    keep = np.ones(labels.owner.shape, dtype=bool) if plain else keep_mask(labels, rng)
    offsets, digit = np.zeros(len(starts), dtype=np.int64), 2
    if not plain:
        offsets += _time_jumps(labels, rng)
        digit = 2 if rng.random() < 0.7 else int(rng.integers(0, 10))
    pad = token_ids("<|video_pad|>")[0]
    opening, closing = token_ids("<|vision_start|>"), token_ids("<|vision_end|>")
    ids = list(token_ids("<|im_start|>user\n"))
    positions = [(p, p, p) for p in range(len(ids))]
    clock = len(ids)
    visual: list[int] = []
    for frame, start in enumerate(starts):
        cells = np.argwhere(keep[frame])
        if not len(cells):
            continue
        stamp = (*token_ids(f"<{int(start) + int(offsets[frame])}.{digit} seconds>"), *opening)
        ids.extend(stamp)
        positions.extend((p, p, p) for p in range(clock, clock + len(stamp)))
        clock += len(stamp)
        visual.extend(range(len(ids), len(ids) + len(cells)))
        ids.extend([pad] * len(cells))
        positions.extend((clock, clock + int(y), clock + int(x)) for y, x in cells)
        clock += max(rows, columns)
        ids.extend(closing)
        positions.append((clock, clock, clock))
        clock += 1
    asked = []
    for item in ask_all(scene, seed=None if plain else int(rng.integers(1 << 30))):
        if scene.seconds > LONG_SECONDS and item.kind in WHOLE_STORY:
            continue
        answer = item.answer
        if item.kind == "when":
            begins_at = int(answer.split()[0])
            answer = f"{begins_at + int(offsets[begins_at])} seconds"
        question = (*token_ids(item.question), *token_ids("<|im_end|>\n<|im_start|>assistant\n"))
        begins = [e.start_seconds for e in scene.events]
        subject = begins.index(item.spans[0][0]) if item.spans and item.kind != "count" else -1
        asked.append(
            Asked(item.kind, (*question, *token_ids(answer), *token_ids("<|im_end|>")), len(question), subject)
        )
    return Sample(scene, labels, keep, ids, positions, visual, clock, asked, offsets)


def _time_jumps(labels: Labels, rng: np.random.Generator) -> np.ndarray:
    """(F,) seconds to add to each frame pair: the scene starts late, and stretches without events are longer.

    Memories are full of gaps; what is asked about may stand minutes away from everything else.
    """
    frames = labels.owner.shape[0]
    base = 0
    if rng.random() < 0.55:
        base = int(rng.integers(0, 60) if rng.random() < 0.4 else rng.integers(0, 1500))
    offsets = np.full(frames, base, dtype=np.int64)
    empty = np.flatnonzero((labels.owner < 0).reshape(frames, -1).all(1))
    if len(empty) and rng.random() < 0.45:
        for place in rng.choice(empty, size=int(rng.integers(1, 4))):
            offsets[place:] += int(rng.integers(1, 60) if rng.random() < 0.4 else rng.integers(1, 650))
    most: np.ndarray = np.minimum(offsets, LARGEST_NUMBER - frames)
    return most


@dataclass
class Batch:
    """Samples side by side: ``lead`` places for the video, then all questions of the sample packed."""

    samples: list[Sample]
    ids: Tensor
    positions: Tensor
    mask: Tensor
    """(B, 1, L - lead, L) bool: what the questions may see."""
    lead: int
    starts: list[list[int]]
    """Where each question of each sample starts."""
    about: Tensor
    """(A, 7) int64: sample, place just before the answer; the subject's shape, colour, action, order, time token."""
    targets: Tensor
    visual: Tensor
    """(B, L) bool."""
    shape: Tensor
    color: Tensor
    action: Tensor
    share: Tensor
    onset: Tensor
    order: Tensor
    number: Tensor
    """Labels of every kept cell, flat, in sequence order; ``number`` is the token of its time."""


def collate(samples: list[Sample]) -> Batch:
    """Pad samples to one length and gather the labels of their kept cells."""
    count = len(samples)
    lead = max(len(s.ids) for s in samples)
    total = lead + max(sum(len(q.ids) for q in s.questions) for s in samples)
    ids = torch.full((count, total), tokenizer().pad_token_id)
    positions = torch.zeros(3, count, total, dtype=torch.long)
    targets = torch.full((count, total), -100)
    segments = torch.full((count, total), -1)
    visual = torch.zeros(count, total, dtype=torch.bool)
    starts: list[list[int]] = []
    about: list[tuple[int, ...]] = []
    flat: dict[str, list[np.ndarray]] = {
        k: [] for k in ("shape", "color", "action", "share", "onset", "order", "number")
    }
    zero = token_ids("0")[0]
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.tensor(sample.ids)
        positions[:, row, :length] = torch.tensor(sample.positions).T
        segments[row, :length] = 0
        visual[row, torch.tensor(sample.visual)] = True
        start = lead
        starts.append([])
        for number, question in enumerate(sample.questions, start=1):
            stop = start + len(question.ids)
            ids[row, start:stop] = torch.tensor(question.ids)
            positions[:, row, start:stop] = torch.arange(stop - start) + sample.next_position
            segments[row, start:stop] = number
            answer = torch.tensor(question.ids[question.answer_start :])
            targets[row, start + question.answer_start : stop] = answer
            starts[-1].append(start)
            if question.subject >= 0:
                event = sample.scene.events[question.subject]
                about.append(
                    (
                        row,
                        start + question.answer_start - 1,
                        SHAPES.index(event.shape),
                        list(COLORS).index(event.color),
                        ACTIONS.index(event.action),
                        min(question.subject, 3),
                        zero + int(sample.offsets[event.start_seconds]) + event.start_seconds,
                    )
                )
            start = stop
        for name in ("shape", "color", "action", "share", "onset"):
            flat[name].append(getattr(sample.labels, name)[sample.keep])
        flat["order"].append(np.minimum(sample.labels.owner[sample.keep] + 1, 4))
        frame = np.nonzero(sample.keep)[0]
        flat["number"].append(zero + sample.offsets[frame] + frame)
    labels = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in flat.items()}
    asking, seen = segments[:, lead:, None], segments[:, None, :]
    causal = torch.arange(lead, total)[:, None] >= torch.arange(total)[None, :]
    mask = ((asking == seen) | (seen == 0)) & causal
    return Batch(
        samples,
        ids,
        positions,
        mask[:, None],
        lead,
        starts,
        torch.tensor(about or torch.zeros(0, 7).tolist(), dtype=torch.long).view(-1, 7),
        targets,
        visual,
        **labels,
    )


@dataclass(frozen=True)
class Curriculum:
    """How hard the scenes are at a step: share of the stage that has passed, 0..1."""

    share: float
    sizes: tuple[tuple[int, int], ...] = ((4, 4),)

    def draw(self, rng: np.random.Generator) -> Scene:
        """A scene as hard as the curriculum has them now."""
        most = 1 if self.share < 0.06 else 2 if self.share < 0.15 else 3
        seconds = int(rng.integers(8, 11)) if self.share < 0.15 else int(rng.integers(12, 18))
        if self.share > 0.6 and rng.random() < 0.25:
            seconds = int(rng.integers(16, 33))
        most = min(most, seconds // 4)
        events = 0 if rng.random() < 0.04 else int(rng.integers(1, most + 1))
        if self.share >= 0.15 and rng.random() < 0.3:
            events = most
        if self.share > 0.6 and rng.random() < 0.05:
            events = min(4, seconds // 4)
        seed = int(rng.integers(TRAINING_SEEDS, 1 << 40))
        return sample_scene(seed, seconds=seconds, events=events, held_out=False)

    @staticmethod
    def draw_long(rng: np.random.Generator) -> Scene:
        """A minute or two with many events, of which recall leaves a part: what long memories look like."""
        seconds = int(rng.integers(40, 121))
        seed = int(rng.integers(TRAINING_SEEDS, 1 << 40))
        return sample_scene(seed, seconds=seconds, events=int(rng.integers(4, 11)), held_out=False)


def draw_samples(
    step: int, count: int, *, share: float, seed: int, rows: int = 4, columns: int = 4, long: bool = False
) -> Iterator[Sample]:
    """New scenes for one step, as hard as the curriculum has them at this share of the stage."""
    rng = np.random.default_rng((seed, step))
    level = Curriculum(share)
    for _ in range(count):
        scene = level.draw_long(rng) if long else level.draw(rng)
        yield build_sample(scene, rng, rows=rows, columns=columns, plain=False)


def pixels(samples: list[Sample], rows: int, columns: int, size: tuple[int, int]) -> Tensor:
    """Patches of all frame pairs of all samples, (frames * rows * columns * 4, 3*2*8*8), in merge order."""
    height, width = size
    out = []
    for sample in samples:
        times = np.arange(sample.scene.seconds * 2) / 2
        frames = sample.scene.draw(list(times), height=height, width=width)
        out.append(torch.from_numpy(frames))
    video = torch.cat(out).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    pairs = len(video) // 2
    grid = video.view(pairs, 2, 3, rows, 2, 8, columns, 2, 8)
    return grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(pairs * rows * columns * 4, -1)


def flat_labels(samples: list[Sample]) -> dict[str, Tensor]:
    """Labels of all cells of all samples, flat, in the order of ``pixels``."""
    return {
        name: torch.from_numpy(np.concatenate([getattr(s.labels, name).reshape(-1) for s in samples]))
        for name in ("shape", "color", "action", "share")
    }
