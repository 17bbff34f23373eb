"""Every sample clip has its truth beside it, and every sample program runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamvid.ingest import open_source
from streamvid.toy.questions import KINDS
from streamvid_pipelines.ask import ask

SAMPLES = Path(__file__).parents[1] / "samples"
CLIPS = sorted(SAMPLES.glob("*.mp4"))
PROGRAMS = sorted(SAMPLES.glob("*.py"))


def test_there_are_samples() -> None:
    assert len(CLIPS) >= 3 and len(PROGRAMS) >= 3


@pytest.mark.parametrize("clip", CLIPS, ids=lambda p: p.stem)
def test_clips_have_their_truth_beside_them(clip: Path) -> None:
    truth = json.loads(clip.with_suffix(".json").read_text())
    with open_source(clip) as source:
        assert source.info.duration == truth["seconds"]
        assert 20 <= truth["seconds"] <= 60
    assert truth["events"]
    assert {q["kind"] for q in truth["questions"]} <= set(KINDS)
    assert clip.stat().st_size < 1 << 20


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.stem)
def test_programs_run(program: Path, tmp_path: Path) -> None:
    environment = os.environ | {"STREAMVID_MEMORY": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "shape" in done.stdout or "tokens" in done.stdout
    assert len(program.read_text().splitlines()) < 60


def test_a_shape_that_stays_is_cited_for_as_long_as_it_stays(tmp_path: Path) -> None:
    """Only its first frame was encoded; the tokens of that one stand for all that look the same."""
    answer = ask(SAMPLES / "three_shapes.mp4", "is there a blue square?", model="toy", memory=tmp_path, threads=1)[0]
    assert answer.text == "yes"
    assert answer.spans == ((12.0, 17.0),)


def test_the_readme_command_gives_the_readme_answer(tmp_path: Path) -> None:
    """What the README shows is what the first command prints."""
    clip = SAMPLES / "three_shapes.mp4"
    truth = json.loads(clip.with_suffix(".json").read_text())
    happens = next(q for q in truth["questions"] if q["kind"] == "what_happens")
    environment = os.environ | {"STREAMVID_MEMORY": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "streamvid_cli.app", "ask", str(clip), "what happens?", "--model", "toy"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(happens["answer"])
    readme = (SAMPLES.parent / "README.md").read_text()
    assert done.stdout.strip() in readme
