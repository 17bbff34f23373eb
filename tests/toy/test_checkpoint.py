"""The bundled toy model: an ordinary checkpoint, small enough, and as good as the README says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from streamvid.models.checkpoints import toy_encoder_folder, toy_folder
from streamvid_pipelines.ask import Request, load
from streamvid_pipelines.measure_toy import QUARTER, asked_scenes, run


def test_it_loads_like_any_other_checkpoint() -> None:
    model = AutoModelForImageTextToText.from_pretrained(toy_folder())
    tokenizer = AutoTokenizer.from_pretrained(toy_folder())
    parameters = sum(p.numel() for p in model.parameters())
    assert model.config.model_type == "qwen3_vl"
    assert 2e6 <= parameters <= 6e6
    assert model.dtype == torch.float32
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "What happens?"}]}], add_generation_prompt=True
    )["input_ids"]
    assert tokenizer.unk_token_id not in ids


def test_it_is_small() -> None:
    files = [path for folder in (toy_folder(), toy_encoder_folder()) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16 << 20


def test_any_text_can_be_tokenised_and_numbers_are_one_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_folder())
    for number in (0, 7, 42, 599, 3599):
        assert len(tokenizer(str(number)).input_ids) == 1
    text = "the xylophone plays at 99999 o'clock"
    assert tokenizer.decode(tokenizer(text).input_ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.slow
def test_answers_are_as_good_as_the_bars(tmp_path: Path) -> None:
    """24 clips of seeds nobody trained on; the full table is measured by ``measure_toy``."""
    loaded = load(Request(model="toy"), lambda text: None)
    scores = {}
    for reduce in ("none", QUARTER):
        scenes = asked_scenes(range(700_000, 700_024), held_out=False)
        scores[reduce] = run(scenes, Request(model="toy", reduce=reduce), loaded, tmp_path, size="128", fps=10)
    assert scores["none"].share() >= 0.9
    assert scores[QUARTER].share() >= scores["none"].share() - 0.05
    assert scores[QUARTER].tokens_given <= 0.25 * scores[QUARTER].tokens_seen
    assert scores["none"].cited / scores["none"].citable >= 0.9
