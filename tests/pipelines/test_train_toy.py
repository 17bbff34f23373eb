"""The training program: its lessons are true, its attention is exact, and it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from streamvid.toy.world import HELD_OUT_PAIRS, sample_scene
from streamvid_pipelines import train_toy
from streamvid_pipelines.toy_lessons import Curriculum, build_sample, collate, draw_samples, label, tokenizer


def samples(count: int, plain: bool) -> list[object]:
    rng = np.random.default_rng(4)
    scenes = [sample_scene(seed, seconds=10, events=2, held_out=False) for seed in range(count)]
    return [build_sample(scene, rng, rows=4, columns=4, plain=plain) for scene in scenes]


def test_lessons_are_laid_out_as_the_adapter_lays_out_a_video() -> None:
    """Training and answering must see the same tokens at the same positions."""
    from streamvid.models import checkpoints
    from streamvid.tokens import VideoTokens

    sample = samples(1, plain=True)[0]
    frames, rows, columns = sample.labels.owner.shape  # type: ignore[attr-defined]
    adapter = checkpoints.load(checkpoints.find("toy", device="cpu", say=print), device="cpu", dtype="auto")
    frame, row, column = (
        t.flatten() for t in torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
    )
    count = len(frame)
    tokens = VideoTokens(
        features=torch.zeros(count, adapter.info.hidden_size),
        grid=(frames, rows, columns),
        position=torch.stack([frame, row, column], 1),
        pts_seconds=frame.double(),
        duration_seconds=torch.ones(count, dtype=torch.float64),
        size=torch.ones(count),
        score=torch.zeros(count),
    )
    prompt = adapter.prompt(tokens, "what happens?")
    asked = next(q for q in sample.questions if q.kind == "what_happens")  # type: ignore[attr-defined]
    ids = [*sample.ids, *asked.ids[: asked.answer_start]]  # type: ignore[attr-defined]
    assert prompt.input_ids[0].tolist() == ids
    assert prompt.position_ids[1:, 0, : len(sample.ids)].T.tolist() == [list(p) for p in sample.positions]  # type: ignore[attr-defined]


def test_what_is_asked_about_is_never_reduced_away() -> None:
    for share in (0.1, 0.5, 1.0):
        for long in (False, True):
            for sample in draw_samples(3, 6, share=share, seed=1, long=long):
                kept = set(sample.labels.owner[sample.keep].tolist())
                assert set(range(len(sample.scene.events))) <= kept


def test_times_in_answers_are_times_that_stand_in_the_prompt() -> None:
    words = tokenizer()
    for sample in draw_samples(5, 8, share=1.0, seed=2):
        text = words.decode(sample.ids)
        for question in sample.questions:
            if question.kind == "when":
                answer = words.decode(question.ids[question.answer_start :], skip_special_tokens=True)
                assert f"{answer.split()[0]}." in text


def test_held_out_pairs_are_never_drawn_in_training() -> None:
    rng = np.random.default_rng(0)
    scenes = [Curriculum(share).draw(rng) for share in (0.0, 0.5, 1.0) for _ in range(60)] + [
        Curriculum.draw_long(rng) for _ in range(20)
    ]
    assert not {(e.color, e.shape) for scene in scenes for e in scene.events} & HELD_OUT_PAIRS


def test_every_step_shows_new_scenes() -> None:
    """A constant seed once made every step show the same scenes: the loss fell beautifully."""
    seen = [tuple(s.scene.seed for s in draw_samples(step, 2, share=0.5, seed=37)) for step in range(5)]
    assert len(set(seen)) == 5


def test_labels_agree_with_the_drawing() -> None:
    scene = sample_scene(8, seconds=10, events=2, background="plain", clean=True)
    starts = np.arange(10.0)
    found = label(scene, starts, 4, 4)
    frames = scene.draw(list(starts + 0.25), height=64, width=64).astype(int)
    empty = scene.backdrop(64, 64)
    changed = np.abs(frames - empty).max(-1).reshape(10, 4, 16, 4, 16).max((2, 4)) > 20
    assert (changed[found.share > 0.05]).all()
    assert not changed[(found.share == 0) & (found.owner < 0)].mean() > 0.1


def test_many_questions_in_one_pass_equal_each_question_alone() -> None:
    """The packed attention gives every answer the logits it has alone after the video."""
    model = train_toy.initial_model()
    reader = train_toy.Reader(model).eval()
    sample = samples(1, plain=False)[0]
    batch = collate([sample])  # type: ignore[list-item]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
        features = torch.randn(int(batch.visual.sum()), train_toy.text_width(model)) * 0.3
        together = reader(batch, features, None)[0]
        alone = []
        for question in sample.questions:  # type: ignore[attr-defined]
            single = build_single(sample, question)
            alone.append(reader(single, features, None)[0])
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


def build_single(sample: object, question: object) -> object:
    from dataclasses import replace

    return collate([replace(sample, questions=[question])])  # type: ignore[type-var, list-item]


@pytest.mark.slow
def test_the_program_trains_resumes_and_writes_a_checkpoint(tmp_path: Path) -> None:
    train_toy.train_tower(tmp_path, 2, 1)
    train_toy.train_language(tmp_path, 2, 1)
    train_toy.train_joint(tmp_path, 1, 1)
    train_toy.train_joint(tmp_path, 2, 1)
    assert torch.load(tmp_path / "joint.pt", weights_only=True)["step"] == 2
    train_toy.export(tmp_path, tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "qwen3_vl"
    assert json.loads((tmp_path / "model" / "video_preprocessor_config.json").read_text())["fps"] == 2
