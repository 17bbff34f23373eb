"""`streamvid live` and `ask --stream` as a user or a script meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamvid.toy.video import write_video
from streamvid.toy.world import sample_scene
from streamvid_cli.app import run
from streamvid_cli.live import split_stream


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("live") / "scene.mp4"
    write_video(sample_scene(5, seconds=30, clean=True), path, height=64, width=64, fps=4)
    return path


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMVID_MEMORY", str(tmp_path / "memory"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "memory"


def started(*arguments: object, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "streamvid_cli.app", "live", *map(str, arguments)],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def watching(film: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that watches a film for ever, as JSON lines; it has seen something."""
    process = started(f"cam={film}", "--loop", "--model", "toy", "--overload", "all", "--threads", 1, "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "connected"
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(["ask", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
def test_another_process_asks_and_sigterm_ends_it_in_order(
    watching: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    until = time.monotonic() + 60
    while True:
        code, out, err = ask(capsys, "--stream", "cam", "what is there right now?", "--json")
        if code == 0 or time.monotonic() > until:
            break
        assert "nothing was seen of cam yet" in err
    assert code == 0, err
    live = json.loads(out)
    assert live["receipt"]["cache"] == "live" and live["question"] == "what is there right now?"
    watching.send_signal(signal.SIGTERM)
    told, said = watching.communicate(timeout=60)
    assert watching.returncode == 0, said
    last = json.loads(told.splitlines()[-1])
    assert last["event"] == "ended" and not last["running"]
    seen = last["streams"][0]["frames_watched"]
    assert seen > 0
    code, out, err = ask(capsys, "--stream", "cam", "what happens?", "--json", "--model", "toy")
    assert code == 0, err
    past = json.loads(out)
    assert past["receipt"]["cache"] == "hit"
    assert past["receipt"]["frames_remembered"] == seen
    assert any("not watched now" in text for text in past["receipt"]["warnings"])


@pytest.mark.slow
def test_sigkill_loses_at_most_the_clip_at_hand(
    watching: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    time.sleep(2)
    watching.kill()
    watching.wait(10)
    assert run(["memory", "verify"]) == 0
    capsys.readouterr()
    code, out, err = ask(capsys, "--stream", "cam", "what happens?", "--model", "toy")
    assert code == 0 and out.strip(), err


@pytest.mark.slow
def test_piped_questions_are_answered_on_stdout(film: Path) -> None:
    process = started(
        f"cam={film}", "--model", "toy", "--overload", "all", "--threads", 1, "--loop", "--for", 20,
        stdin=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stderr is not None and process.stdout is not None
    heard = []
    for line in process.stderr:
        heard.append(line)
        if "h264" in line:
            break
    time.sleep(1)
    process.stdin.write("what happens?\ncam: how many shapes are there?\ndog: what?\n")
    process.stdin.flush()
    answers = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert all(answer.strip() for answer in answers)
    assert "watching cam into" in "".join(heard)
    assert "lag" in err and "RSS" in err, "the last status"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "there is nothing to watch"),
        (["a=camera:0", "a=camera:1", "--model", "toy"], "two streams are called 'a'"),
        (["camera:0", "--fps", "0"], "fps must be above 0"),
        (["camera:0", "--config", "/nowhere/c.toml"], "cannot read /nowhere/c.toml"),
        (["a/b=camera:0", "--overload", "some"], "unknown overload policy 'some'"),
        (["/nowhere/film.mp4", "--model", "toy"], "/nowhere/film.mp4"),
    ],
)
def test_slips_are_one_line_and_exit_1(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert run(["live", *arguments]) == 1
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], err
    assert "Traceback" not in err


def test_a_stream_that_is_not_remembered_is_said_so(capsys: pytest.CaptureFixture[str], own_memory: Path) -> None:
    code, _, err = ask(capsys, "--stream", "front", "who came?", "--model", "toy")
    assert code == 1 and "there is no memory in" in err
    code, _, err = ask(capsys, "--model", "toy")
    assert code == 2 and "which video?" in err


@pytest.mark.parametrize(
    "line, expected",
    [
        ("front: who came?", ("front", "who came?")),
        ("who came?", (None, "who came?")),
        ("front:", (None, "front:")),
        ("between 10:00 and 10:05: who?", (None, "between 10:00 and 10:05: who?")),
    ],
)
def test_a_question_may_name_its_stream(line: str, expected: tuple[Any, str]) -> None:
    assert split_stream(line, ["front", "back"]) == expected


def test_nothing_is_left_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir(tmp_path))
    assert run(["live"]) == 1
    assert set(os.listdir(tmp_path)) == before
