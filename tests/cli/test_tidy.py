"""``streamvid memory tidy``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamvid.memory.bank import Bank
from streamvid_cli.app import run
from tests.memory.spans import KEY, store


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A video of ten spans of two seconds."""
    monkeypatch.setenv("STREAMVID_MEMORY", str(tmp_path / "memory"))
    monkeypatch.delenv("STREAMVID_DEBUG", raising=False)
    with Bank.open(tmp_path / "memory", codec="fp16") as bank:
        store(bank, KEY, range(10))
    return tmp_path / "memory"


def test_what_is_too_old_is_forgotten_once(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run(["memory", "tidy", "--keep", "0.1m", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["expired_spans"], told["merged_spans"], told["notes"]) == (7, 0, [])
    assert told["freed_bytes"] > 0 and told["folder"] == str(folder)
    assert run(["memory", "tidy", "--keep", "6"]) == 0
    assert capsys.readouterr().out == "0 spans merged, 0 expired, 0.00 MB given back\n"
    with Bank.open(folder) as bank:
        assert len(bank.spans(1)) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --keep, --disk or --source-disk"),
        (["--keep", "soon"], "as in 90m or 7d"),
        (["--keep", ""], "as in 90m or 7d"),
        (["--keep", "0d"], "must be more than 0 seconds"),
    ],
)
def test_limits_that_mean_nothing_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(["memory", "tidy", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and says in err


def test_a_limit_that_cannot_be_reached_is_a_note(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    with Bank.open(folder) as bank:
        bank.pin(1)
    assert run(["memory", "tidy", "--disk", "0.00001"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("0 spans merged") and "kept whole" in " ".join(err.split())
