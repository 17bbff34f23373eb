"""An answer never comes from another clip's memory: every pair of clips, files and settings."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from streamvid.memory.bank import Bank
from streamvid.models import checkpoints
from streamvid_pipelines.ask import AskVideo, Loaded, Request, load

COLORS = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (40, 60, 230)}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(Request(model="toy", threads=1), lambda text: None)


def clip(path: Path, color: tuple[int, int, int]) -> Path:
    """Twenty pictures of one colour; the file has one size whatever the colour."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        picture = np.broadcast_to(np.array(color, np.uint8), (64, 64, 3))
        for _ in range(20):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        out.mux(stream.encode())
    with path.open("ab") as file:
        size = 4096 - path.stat().st_size
        file.write(size.to_bytes(4, "big") + b"free" + bytes(size - 8))
    return path


def opened(path: Path, loaded: Loaded, memory: Path, **changes: Any) -> AskVideo:
    return AskVideo(path, replace(Request(model="toy", reduce="none"), **changes), loaded, Bank.open(memory))


def seen(path: Path, loaded: Loaded, memory: Path) -> tuple[str, str, str]:
    """(cache, key, colour of the tokens that an answer was given)."""
    ask = opened(path, loaded, memory)
    receipt = ask.ask("what happens?").receipt
    assert ask.source is not None
    spans = ask.bank.spans(ask.source.id)
    features = ask.bank.read([(span, span.tokens) for span in spans])[0].features.mean(0)
    return receipt.cache, receipt.key, str(features.round(decimals=3).tolist())


def test_clips_of_equal_size_and_length_under_every_name(loaded: Loaded, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    clips = {name: clip(tmp_path / f"{name}.mp4", color) for name, color in COLORS.items()}
    assert {path.stat().st_size for path in clips.values()} == {4096}
    first = {name: seen(path, loaded, memory) for name, path in clips.items()}
    assert [cache for cache, _, _ in first.values()] == ["miss"] * 3
    for a, b in combinations(first.values(), 2):
        assert a[1] != b[1] and a[2] != b[2]
    video = tmp_path / "video.mp4"
    for name in ("red", "green", "blue", "red", "blue"):
        # One name, other contents, with the times of the first: moved over, copied over, written over.
        stamp = clips["red"].stat().st_mtime_ns
        for put in (shutil.copy2, lambda a, b: os.replace(shutil.copy2(a, tmp_path / "part"), b), _overwrite):
            put(clips[name], video)
            os.utime(video, ns=(stamp, stamp))
            assert seen(video, loaded, memory) == ("hit", *first[name][1:])
    assert len(Bank.open(memory).sources()) == 3


def _overwrite(source: Path, target: Path) -> None:
    with target.open("r+b") as file:
        file.write(source.read_bytes())


def test_an_edit_that_keeps_size_and_time_is_seen(loaded: Loaded, tmp_path: Path) -> None:
    path, memory = clip(tmp_path / "a.mp4", COLORS["red"]), tmp_path / "memory"
    old = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(old, old))
    before = seen(path, loaded, memory)
    time.sleep(0.02)
    stamp = path.stat()
    _overwrite(clip(tmp_path / "b.mp4", COLORS["blue"]), path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_mtime_ns == stamp.st_mtime_ns and path.stat().st_size == stamp.st_size
    after = seen(path, loaded, memory)
    assert after[0] == "miss" and after[1:] != before[1:]


def checkpoint(folder: Path, change: str) -> Loaded:
    """The toy model with one thing about it changed."""
    shutil.copytree(checkpoints.toy_folder(), folder)
    if change == "weights":
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif change:
        path = folder / "video_preprocessor_config.json"
        settings = json.loads(path.read_text())
        settings |= {"mean": {"image_mean": [0.4, 0.5, 0.5]}, "fps": {"fps": 3}, "frames": {"max_frames": 99}}[change]
        path.write_text(json.dumps(settings))
    return load(Request(model=str(folder), threads=1, embedder="none"), lambda text: None)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fps": {"fps": 1.0},
    "fps-again": {"fps": 1.5},
    "frames": {"max_frames": 8},
    "from": {"start_seconds": 0.5},
    "to": {"stop_seconds": 1.5},
    "keys": {"sample": "keys"},
    "adaptive": {"sample": "adaptive"},
    "decoder": {"decoder": "pyav"},
    "rlt": {"reduce": "rlt"},
    "rlt-setting": {"reduce": "rlt:threshold=0.2"},
    "fastvid": {"reduce": "fastvid"},
    "fastvid-setting": {"reduce": "fastvid:keep_ratio=0.5"},
    "order": {"reduce": "rlt,fastvid"},
}


def test_every_pair_of_settings_models_and_processors_has_keys_of_its_own(loaded: Loaded, tmp_path: Path) -> None:
    path, memory = clip(tmp_path / "a.mp4", COLORS["red"]), tmp_path / "memory"
    keys = {name: opened(path, loaded, memory, **changes).key().digest for name, changes in SETTINGS.items()}
    for change in ("", "weights", "mean", "fps", "frames"):
        made = checkpoint(tmp_path / f"model-{change}", change)
        keys[f"model {change}"] = opened(path, made, memory).key().digest
        half = replace(made, adapter=_named(made.adapter, dtype="bfloat16"))
        keys[f"model {change} in bfloat16"] = opened(path, half, memory).key().digest
    same = [(a, b) for a, b in combinations(keys, 2) if keys[a] == keys[b]]
    assert not same
    # What acts when a question is asked shares a memory.
    for changes in ({"recall": "uniform"}, {"budget": 9}, {"max_new_tokens": 3}, {"reduce": "frame_fusion"}):
        assert opened(path, loaded, memory, **changes).key().digest == keys["plain"], changes


def _named(adapter: Any, **changes: Any) -> Any:
    """The same adapter that tells other things about itself."""
    import copy

    twin = copy.copy(adapter)
    twin.info = replace(adapter.info, **changes)
    return twin


def test_the_receipt_tells_what_was_found_and_under_which_key(loaded: Loaded, tmp_path: Path) -> None:
    path, memory = clip(tmp_path / "a.mp4", COLORS["red"]), tmp_path / "memory"
    found = {}
    for name in ("plain", "fps", "rlt", "plain", "fps", "rlt"):
        ask = opened(path, loaded, memory, **SETTINGS[name])
        receipt = ask.ask("what happens?").receipt
        assert receipt.cache == ("hit" if name in found else "miss")
        assert found.setdefault(name, receipt.key) == receipt.key == ask.key().short
    assert len(set(found.values())) == 3
