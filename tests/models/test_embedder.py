"""Dual encoders: the bundled one, and tiny random ones of the real families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from streamvid.errors import SettingsError, UnsupportedError
from streamvid.models import checkpoints
from streamvid.models.embedder import DualEncoder, Embedder
from streamvid.toy.model import build_tokenizer
from streamvid.toy.world import sample_scene


@pytest.fixture(scope="module")
def toy() -> Embedder:
    found = checkpoints.find_embedder("toy", model="toy", device="cpu")
    assert found is not None
    return found


def write(folder: Path, family: str) -> Path:
    """A random checkpoint of a family, in the Hugging Face layout."""
    tokenizer = build_tokenizer(largest_number=9)
    words = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    eyes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "clip":
            CLIPModel(CLIPConfig(text_config=words, vision_config=eyes, projection_dim=8)).save_pretrained(folder)
        else:
            SiglipModel(SiglipConfig(text_config=words, vision_config=eyes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_real_families_load_and_give_unit_vectors_of_one_space(family: str, tmp_path: Path) -> None:
    encoder = DualEncoder.load(write(tmp_path, family), name=family)
    with torch.inference_mode():
        seen = encoder.frames(torch.randint(0, 256, (3, 40, 60, 3), dtype=torch.uint8))
        said = encoder.texts(["what happens?", "a much longer question about nothing " * 9])
    assert seen.shape == (3, encoder.width) and said.shape == (2, encoder.width)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(said.norm(dim=1), torch.ones(2))
    assert encoder.fingerprint != ""


def test_chunks_do_not_change_vectors(toy: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        whole = toy.frames(frames)
        monkeypatch.setattr(DualEncoder, "FRAMES_AT_ONCE", 2)
        torch.testing.assert_close(toy.frames(frames), whole)


def test_the_bundled_encoder_finds_the_shape_that_was_asked_for(toy: Embedder) -> None:
    """For every event of unseen scenes, its frame must fit its question better than every other event's does."""
    right = total = 0
    with torch.inference_mode():
        for seed in range(40, 60):
            scene = sample_scene(seed, seconds=16, events=3, held_out=False)
            middles = [(e.start_seconds + e.end_seconds) / 2 for e in scene.events]
            keys = toy.frames(torch.from_numpy(scene.draw(middles, height=128, width=128)))
            asked = toy.texts([f"which way does the {e.name} move?" for e in scene.events])
            best = (asked @ keys.T).argmax(1)
            right += int((best == torch.arange(3)).sum())
            total += 3
    assert right / total >= 0.95


def test_a_language_model_is_no_dual_encoder() -> None:
    with pytest.raises((UnsupportedError, ValueError)):
        DualEncoder.load(checkpoints.toy_folder(), name="toy")


def test_unknown_embedders_are_named_and_none_is_none() -> None:
    assert checkpoints.find_embedder("none", model="toy", device="cpu") is None
    with pytest.raises(SettingsError, match="siglip"):
        checkpoints.find_embedder("google/siglip3", model="x", device="cpu")
