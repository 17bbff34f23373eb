"""The adapter on a GPU gives what it gives on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamvid.memory.bank import Bank
from streamvid.toy.video import write_video
from streamvid.toy.world import sample_scene
from streamvid_pipelines.ask import AskVideo, Request, load


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", ["none", "rlt,fastvid", "rlt,frame_fusion:cost=0.8"])
def test_answers_on_a_gpu_equal_those_on_the_cpu(tmp_path: Path, reduce: str) -> None:
    assert torch.cuda.is_available(), "this machine is meant to have a GPU"
    path = tmp_path / "scene.mp4"
    write_video(sample_scene(3, clean=True), path, height=64, width=64)
    texts = []
    for device in ("cpu", "cuda"):
        request = Request(model="toy", device=device, reduce=reduce)
        with Bank.open(tmp_path / device) as bank:
            texts.append(AskVideo(path, request, load(request, print), bank).ask("what happens?").text)
    assert texts[0] == texts[1]
