"""The commands as a user or a script meets them: stdout, stderr, exit codes, JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamvid.temporal.methods.registry import methods
from streamvid.toy.video import write_video
from streamvid.toy.world import sample_scene
from streamvid_cli.app import COMMANDS, command, run


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "scene.mp4"
    write_video(sample_scene(3, clean=True), path, height=64, width=64, fps=10)
    return path


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMVID_MEMORY", str(tmp_path / "memory"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("STREAMVID_DEBUG", raising=False)
    return tmp_path / "memory"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_ask_puts_the_answer_on_stdout_and_the_receipt_on_stderr(
    capsys: pytest.CaptureFixture[str], video: Path
) -> None:
    code, out, err = call(capsys, "ask", video, "what happens?", "--model", "toy")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert "cache: miss" in err and "tokens given" in err
    code, again, err = call(capsys, "ask", video, "what happens?", "--model", "toy")
    assert again == out
    assert "cache: hit" in err


def test_ask_json_is_one_object_and_an_array_for_several(capsys: pytest.CaptureFixture[str], video: Path) -> None:
    _, out, _ = call(capsys, "ask", video, "what happens?", "--model", "toy", "--json")
    one = json.loads(out)
    assert {"answer", "spans", "receipt", "question"} <= one.keys()
    needed = {"cache", "frames_decoded", "frames_encoded", "tokens_seen", "tokens_given", "stages", "warnings"}
    assert needed <= one["receipt"].keys()
    _, out, _ = call(
        capsys, "ask", video, "what happens?", "how many shapes are there?", "--model", "toy", "--json", "-q"
    )
    several = json.loads(out)
    assert [a["question"] for a in several] == ["what happens?", "how many shapes are there?"]
    assert several[0]["receipt"]["cache"] == "hit"
    assert several[0]["receipt"]["frames_decoded"] == 0


def test_questions_can_be_piped_in(video: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "streamvid_cli.app",
            "ask",
            str(video),
            "--model",
            "toy",
            "--memory",
            str(tmp_path),
            "-q",
        ],
        input="what happens?\n\nhow many shapes are there?\n",
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join(str(root / part) for part in ("", "cli", "pipelines"))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_output_that_is_no_terminal_is_plain(capsys: pytest.CaptureFixture[str], video: Path) -> None:
    _, out, err = call(capsys, "ask", video, "what happens?", "--model", "toy")
    assert "\x1b" not in out + err and "\r" not in out + err


def test_explain_shows_stages_spans_and_methods(capsys: pytest.CaptureFixture[str], video: Path) -> None:
    _, _, err = call(capsys, "ask", video, "what happens?", "--model", "toy", "--explain")
    for word in ("encode", "what the model read", "00:0", "method rlt", "peak RSS"):
        assert word in err


def bad_files(folder: Path, video: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no video, and a word the message must have."""
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("dear diary, today I\n" * 20)
    (folder / "cut.mp4").write_bytes(video.read_bytes()[: video.stat().st_size // 3])
    return {
        "missing": (folder / "scen.mp4", "scen.mp4"),
        "folder": (folder, "folder"),
        "empty": (folder / "empty.mp4", "empty"),
        "text": (folder / "text.mp4", "text"),
        "truncated": (folder / "cut.mp4", "cut.mp4"),
    }


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated"])
def test_bad_files_are_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, video: Path, kind: str
) -> None:
    path, word = bad_files(tmp_path, video)[kind]
    code, out, err = call(capsys, "ask", path, "what happens?", "--model", "toy")
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--reduce", "rtl"), "rlt"),
        (("--reduce", "fastvid:keep_ratio=2"), "keep_ratio"),
        (("--budget", "0"), "at least 1"),
        (("--model", "tyo"), "toy"),
        (("--model", "/nowhere/model"), "no model"),
        (("--from", "soon"), "--from"),
        (("--from", "100"), "runs from"),
        (("--fps", "-1"), "fps"),
        (("--memory", "/proc/nothing"), "memory"),
        (("--device", "tpu9"), "device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_settings_are_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], video: Path, arguments: tuple[str, ...], word: str
) -> None:
    base = () if "--model" in arguments else ("--model", "toy")
    code, out, err = call(capsys, "ask", video, "what happens?", *base, *arguments)
    assert (code, out) == (1, "")
    assert word in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_an_empty_question_is_refused(capsys: pytest.CaptureFixture[str], video: Path) -> None:
    code, _, err = call(capsys, "ask", video, "", "--model", "toy")
    assert code == 1 and "empty" in err


def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "ask")[0] == 2
    assert call(capsys, "ask", "x.mp4", "q", "--no-such-option")[0] == 2
    assert call(capsys, "nonsense")[0] == 2


def test_a_memory_of_a_newer_version_is_left_alone(
    capsys: pytest.CaptureFixture[str], video: Path, own_memory: Path
) -> None:
    call(capsys, "ask", video, "what happens?", "--model", "toy")
    import sqlite3

    path = own_memory / "catalog.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    before = {p.name: p.read_bytes() for p in own_memory.rglob("*") if p.is_file() and "-" not in p.name}
    code, _, err = call(capsys, "ask", video, "what happens?", "--model", "toy")
    assert code == 1 and "newer" in err
    assert before == {p.name: p.read_bytes() for p in own_memory.rglob("*") if p.is_file() and "-" not in p.name}


def test_toy_stands_in_loudly_and_no_toy_forbids_it(
    capsys: pytest.CaptureFixture[str], video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamvid.models.checkpoints.cached", lambda repository: None)
    code, out, err = call(capsys, "ask", video, "what happens?", "--json")
    assert code == 0
    assert "NOTE" in err and "TOY" in err
    assert any("TOY" in warning for warning in json.loads(out)["receipt"]["warnings"])
    code, out, err = call(capsys, "ask", video, "what happens?", "--no-toy")
    assert (code, out) == (1, "")
    assert "--no-toy" in err


def test_interrupting_leaves_a_memory_that_goes_on(tmp_path: Path) -> None:
    long = tmp_path / "long.mp4"
    write_video(sample_scene(5, seconds=400, events=20, clean=True), long, height=64, width=64, fps=10)
    memory = tmp_path / "memory"
    command = [
        sys.executable,
        "-m",
        "streamvid_cli.app",
        "ask",
        str(long),
        "what happens?",
        "--model",
        "toy",
        "--memory",
        str(memory),
    ]
    process = subprocess.Popen(
        [*command, "--fps", "10", "--reduce", "none"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # A shell that runs the tests in the background makes them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    segments = memory / "segments"
    deadline = time.monotonic() + 60
    while not any(found.is_file() and found.stat().st_size > 100_000 for found in segments.rglob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    done = subprocess.run(
        [*command, "--fps", "10", "--reduce", "none", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    receipt = json.loads(done.stdout)["receipt"]
    assert receipt["cache"] == "partial"
    assert receipt["frames_remembered"] == 4000
    assert receipt["frames_sampled"] < 4000


def test_methods_list_has_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "methods", "list")
    assert [line.split("\t")[0] for line in out.splitlines()[1:]] == list(methods())
    _, out, _ = call(capsys, "methods", "list", "--json")
    assert {m["id"] for m in json.loads(out)} == set(methods())
    code, out, _ = call(capsys, "methods", "show", "fastvid")
    assert code == 0 and "dyseg_c" in out and "2503.11187" in out
    code, _, err = call(capsys, "methods", "show", "fastvdi")
    assert code == 1 and "fastvid" in err


def test_readme_method_table_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "methods", "list", "--markdown")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert out.strip() in readme, "run `streamvid methods list --markdown` and put it into README.md"


def test_models_and_doctor_say_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "models", "list", "--json")
    assert any(m["name"] == "toy" and m["here"] for m in json.loads(out))
    code, out, _ = call(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert {p["package"] for p in report["packages"]} >= {"torch", "faiss-cpu", "decord"}
    assert all(p["install"].startswith("pip install") for p in report["packages"])
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and "streamvid" in out


def test_memory_can_be_listed_shown_and_forgotten(capsys: pytest.CaptureFixture[str], video: Path) -> None:
    call(capsys, "ask", video, "what happens?", "--model", "toy")
    _, out, _ = call(capsys, "memory", "list", "--json")
    source = json.loads(out)["sources"][0]
    assert source["name"] == "scene.mp4" and source["state"] == "complete"
    _, out, _ = call(capsys, "memory", "show", source["id"], "--json")
    shown = json.loads(out)
    assert shown["answers"][0]["question"] == "what happens?"
    assert shown["spans"] and shown["megabytes_per_hour"] > 0
    code, out, _ = call(capsys, "memory", "show", "scene.mp4")
    assert code == 0 and "Q: what happens?" in out
    code, _, err = call(capsys, "memory", "rm", "scne.mp4")
    assert code == 1 and "scene.mp4" in err
    assert call(capsys, "memory", "rm", source["key"])[0] == 0
    _, out, _ = call(capsys, "memory", "list", "--json")
    assert json.loads(out)["sources"] == []


def test_toy_render_writes_the_contract(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, _ = call(
        capsys,
        "toy",
        "render",
        "--seed",
        9,
        "--out",
        tmp_path / "x.mp4",
        "--seconds",
        12,
        "--size",
        "96x64",
        "--events",
        2,
        "--background",
        "gradient",
    )
    assert code == 0
    truth = json.loads((tmp_path / "x.json").read_text())
    assert len(truth["events"]) == 2
    assert {"shape", "color", "action", "start_seconds", "end_seconds"} == truth["events"][0].keys()
    assert {"question", "answer", "kind"} == truth["questions"][0].keys()
    code, _, err = call(capsys, "toy", "render", "--out", tmp_path / "y.mp4", "--events", 99)
    assert code == 1 and "events" in err


def test_a_bug_is_one_line_unless_debug_is_asked_for(
    capsys: pytest.CaptureFixture[str], video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamvid_pipelines.ask.open_ask", None)
    code, _, err = call(capsys, "ask", video, "what happens?", "--model", "toy")
    assert code == 1 and "bug in streamvid" in err and "--debug" in err and "Traceback" not in err
    monkeypatch.setenv("STREAMVID_DEBUG", "")  # so that what --debug sets is undone
    with pytest.raises(TypeError):
        call(capsys, "--debug", "ask", video, "what happens?", "--model", "toy")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "ask" in out


def test_the_list_of_commands_says_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in COMMANDS.items():
        assert command(name).help.split("\n\n")[0] == said
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    assert call(capsys, "memory")[1].count("--install-completion") == 0


def test_what_needs_no_model_does_not_wait_for_torch(video: Path) -> None:
    program = (
        "import sys\nfrom streamvid_cli.app import run\n"
        f"code = run(['--help']) + run(['probe', {str(video)!r}])\n"
        "sys.exit(code or ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
