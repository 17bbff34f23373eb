"""Standing questions on the command line: rehearsed, watched live, listed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from streamvid.toy.video import write_truth, write_video
from streamvid.toy.world import Event, Scene
from streamvid.watch.alerts import Alert, Alerts
from streamvid_cli.app import run

SCENE = Scene(
    7,
    44,
    "plain",
    (
        Event("circle", "red", "moves right", 16, 20, 0.3, 0.5, 0.4, 0.18),
        Event("square", "blue", "moves up", 32, 36, 0.5, 0.6, 0.3, 0.18),
    ),
    tones=((120.0, 120.0, 130.0),),
)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write_truth(SCENE, folder / "yard.json")
    return write_video(SCENE, folder / "yard.mp4", height=128, width=128, fps=4)


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMVID_MEMORY", str(tmp_path / "memory"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.delenv("STREAMVID_DEBUG", raising=False)
    return tmp_path / "memory"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


TOY = ("--model", "toy", "--threads", 1)


def test_a_rule_is_rehearsed_and_judged_and_nothing_stays_behind(
    capsys: pytest.CaptureFixture[str], recording: Path, own_memory: Path
) -> None:
    truth = recording.with_suffix(".json")
    code, out, err = call(capsys, "watch-replay", "a red circle appears", recording, "--truth", truth, *TOY)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("[00:16-00:") and "'red circle' fits by" in lines[0] and "(model: yes)" in lines[0]
    assert lines[-1] == "precision 100.0%, recall 100.0%: 1 of 1 events found"
    assert "00:44 watched in" in err and "times real time" in err
    assert not own_memory.exists()


def test_json_tells_hits_refusals_and_what_was_missed(
    capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path
) -> None:
    truth = tmp_path / "truth.csv"
    truth.write_text("start,stop,what\n0:16,0:20,red circle\n2,4,red circle\n")
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "red circle"\nwhat = "red circle appears"\n')
    code, out, _ = call(capsys, "watch-replay", rules, recording, "--truth", truth, "--json", "-q", *TOY)
    told = json.loads(out)
    assert code == 0
    assert [(hit["rule"], int(hit["at_seconds"]), hit["confirmed"]) for hit in told["hits"]] == [
        ("red circle", 16, True)
    ]
    judged = told["truth"]["red circle"]
    assert (judged["precision"], judged["recall"]) == (1.0, 0.5)
    assert judged["missed"] == [[2.0, 4.0]] and judged["missed_because_the_model_refused"] == []


def test_what_the_model_did_not_confirm_is_shown_and_is_no_hit(
    capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "red circle"\nwhat = "red circle appears"\nconfirm = "is there a green star?"\n')
    truth = recording.with_suffix(".json")
    code, out, _ = call(capsys, "watch-replay", rules, recording, "--truth", truth, "-q", *TOY)
    assert code == 0
    assert out.startswith("no hits\nnot confirmed: [00:16-")
    assert "precision - (no hits), recall 0.0%" in out
    assert "missed: [00:16-00:20] (named by the trigger, refused by the model)" in out


def test_several_recordings_are_several_reports(
    capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path
) -> None:
    other = write_video(replace(SCENE, seconds=8, events=()), tmp_path / "empty.mp4", height=128, width=128, fps=4)
    code, out, _ = call(capsys, "watch-replay", "a blue square appears", other, recording, "--json", "-q", *TOY)
    empty, found = json.loads(out)
    assert code == 0
    assert empty["hits"] == [] and empty["recording"].endswith("empty.mp4")
    assert [int(hit["at_seconds"]) for hit in found["hits"]] == [32]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("", "{}"), "a rule needs a sentence"),
        (("no such.toml", "{}"), "cannot read"),
        (("a red circle appears", "{}", "--truth", "{}.none"), "cannot read the truth"),
        (("a red circle appears", "{}", "--tolerance", "-1"), "at least 0"),
        (("a red circle appears", "{}.none"), "none"),
        (("a red circle appears", "{}", "--embedder", "none", "--model", "toy"), "watch for any change"),
    ],
)
def test_slips_are_one_line(
    capsys: pytest.CaptureFixture[str], recording: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = [argument.replace("{}", str(recording)) for argument in arguments]
    code, out, err = call(capsys, "watch-replay", *given)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and out == "" and len(errors) == 1 and said in errors[0]


def test_live_delivers_what_it_watches_for(
    capsys: pytest.CaptureFixture[str], recording: Path, own_memory: Path, tmp_path: Path
) -> None:
    out_file = tmp_path / "alerts.jsonl"
    watched = ("live", f"yard={recording}", "--watch", "a red circle appears", "--overload", "all", *TOY)
    code, _, err = call(capsys, *watched, "--then", f"jsonl {out_file}", "-q")
    assert code == 0, err
    [alert] = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert alert["rule"] == "a red circle appears" and 16 <= alert["start_seconds"] < 17
    assert Path(alert["clip"]).stat().st_size > 1000 and Path(alert["frame"]).exists()
    code, out, _ = call(capsys, "alerts", "list", "--json")
    told = json.loads(out)
    assert [(one["id"], one["state"]) for one in told["alerts"]] == [(alert["id"], "done")]
    assert code == 0 and told["counts"]["done"] == 1


def test_live_prints_alerts_where_nothing_else_is_asked_for(
    capsys: pytest.CaptureFixture[str], recording: Path
) -> None:
    watched = ("live", f"yard={recording}", "--watch", "a red circle appears", "--overload", "all", *TOY)
    _, out, _ = call(capsys, *watched, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    [alert] = [event for event in events if event["event"] == "alert"]
    assert alert["stream"] == "yard" and alert["confirmed"] is True


def test_then_without_watch_is_a_slip(capsys: pytest.CaptureFixture[str], recording: Path) -> None:
    code, _, err = call(capsys, "live", recording, "--then", "jsonl x.jsonl")
    assert code == 1 and "nothing is watched for" in err


def test_what_failed_is_sent_again(capsys: pytest.CaptureFixture[str], own_memory: Path) -> None:
    code, _, err = call(capsys, "alerts", "list")
    assert code == 1 and "no alerts were ever raised" in err
    alert = Alert(rule="r", stream="s", start=Fraction(1), stop=Fraction(2), wall=1.0, score=1.0, reason="seen")
    with Alerts(own_memory) as alerts:
        alerts.raise_(alert)
        alerts.mark(1, "a", state="failed", attempts=1, next_try=0, note="answers 404", actions=["a"])
    _, out, err = call(capsys, "alerts", "list")
    assert f"{alert.id}\tfailed\t" in out and "answers 404" in out and "1 failed" in err
    code, out, _ = call(capsys, "alerts", "retry", alert.id)
    assert code == 0 and "waits again" in out
    code, _, err = call(capsys, "alerts", "retry", "nothing")
    assert code == 1 and "no alert has the id" in err
