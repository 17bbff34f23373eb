"""``streamvid memory`` as a user or a script meets it."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamvid.memory.bank import Bank
from streamvid.memory.kv import KeptKv
from streamvid.memory.records import SnapshotRecord
from streamvid.memory.schema import FILE_NAME
from streamvid_cli import memory as memory_command
from streamvid_cli.app import run
from tests.memory.spans import KEY, source_key, store


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two videos, an answer, a gap and something expired."""
    monkeypatch.setenv("STREAMVID_MEMORY", str(tmp_path / "memory"))
    monkeypatch.delenv("STREAMVID_DEBUG", raising=False)
    with Bank.open(tmp_path / "memory", codec="fp16") as bank:
        first = store(bank, KEY, range(4))
        store(bank, source_key("b"), range(2), name="b.mp4")
        receipt = {"spans": [{"start_seconds": 2.002, "stop_seconds": 4.004, "tokens": 5}]}
        bank.save_answer(first, question="what?", answer="a red circle", receipt=receipt)
        with bank._catalog.transaction():
            when = "2020-01-01T00:00:00+00:00"
            bank._catalog.execute(
                "INSERT INTO gaps (source_id, start, stop, reason, created) VALUES (?, '10', '25', 'camera away', ?)",
                first,
                when,
            )
            bank._catalog.execute(
                "INSERT INTO expired (source_id, start, stop, spans, tokens, reason, created) "
                "VALUES (?, '30', '60', 7, 70, 'older than a day', ?)",
                first,
                when,
            )
    return tmp_path / "memory"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(["memory", *(str(a) for a in arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that says why not."""
    code, out, err = call(capsys, *arguments)
    assert code == 1 and out == ""
    [line] = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_list_says_gaps_expired_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "keep", "b.mp4")[1] == "b.mp4 is kept when space is made\n"
    a, b = called(capsys, "list")["sources"]
    assert (a["gaps"], a["gap_seconds"], a["expired"], a["expired_seconds"]) == (1, 15, 7, 30)
    assert (a["pinned"], b["pinned"], b["gaps"]) == (False, True, 0)
    _, out, _ = call(capsys, "list")
    header, first, second = (line.split("\t") for line in out.splitlines())
    assert first[header.index("gaps")] == "1 (00:15)" and first[header.index("expired")] == "7 (00:30)"
    assert (first[header.index("kept")], second[header.index("kept")]) == ("", "yes")
    assert called(capsys, "unkeep", "2")["pinned"] is False


def test_show_says_what_was_not_seen_and_what_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    shown = called(capsys, "show", "a.mp4")
    assert shown["gap_spans"] == [{"start": 10, "stop": 25, "reason": "camera away"}]
    assert shown["expired_spans"][0]["reason"] == "older than a day"
    assert len(shown["spans"]) == 4 and shown["megabytes_per_hour"] > 0
    _, out, _ = call(capsys, "show", "1")
    assert "not seen: 00:10-00:25  camera away" in out
    assert "not remembered any more: 00:30-01:00  7 spans, older than a day" in out


def test_show_says_what_an_hour_takes_in_each_codec(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    shown = called(capsys, "show", "a.mp4")
    hour = shown["hour"]
    seconds = shown["seconds"]
    assert hour["megabytes"] == pytest.approx(shown["bytes"] / 1e6 / seconds * 3600)
    assert hour["tokens"] == pytest.approx(shown["tokens"] / seconds * 3600)
    assert hour["spans"] == pytest.approx(4 / seconds * 3600)
    assert (hour["width"], hour["layers"], hour["codec"], hour["stored_as"]) == (16, 1, "fp16", {"fp16": 4})
    sizes = [hour["by_codec"][codec] for codec in ("fp32", "fp16", "sq8", "sq8+sq4", "sq4")]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.2 * sizes[-1]
    # Nothing is learned for fp16: what is computed is what lies there, but for the file header, once an hour.
    assert hour["by_codec"]["fp16"] == pytest.approx(hour["megabytes"], rel=0.02)
    _, out, _ = call(capsys, "show", "a.mp4")
    lines = out.splitlines()
    [used] = [line for line in lines if line.endswith("in use")]
    assert used == f"fp16\t{hour['by_codec']['fp16']:.2f}\tin use"
    assert f"{hour['megabytes']:.2f} MB of segments; features of its spans: 4 as fp16" in out
    assert lines[-len(hour["by_codec"]) - 1] == "codec\tMB an hour\t"


def test_show_goes_on_where_a_file_is_damaged(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for path in folder.rglob("*.seg"):
        path.write_bytes(b"x")
    code, out, err = call(capsys, "show", "a.mp4", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["hour"] is None and len(shown["spans"]) == 4
    assert "note: what an hour takes in each codec is not known" in err.replace("\n", " ")


def fill(folder: Path, spans: int, others: int) -> None:
    """Let the first video have so many spans in all, and so many more gaps, stretches forgotten and answers."""
    with Bank.open(folder) as bank, bank._catalog.transaction():
        execute = bank._catalog.execute
        columns = "start, stop, start_seconds, stop_seconds, tokens, file, offset, bytes, grid, codec"
        numbers = "WITH RECURSIVE n (i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?) "
        execute(
            f"{numbers} INSERT INTO spans (source_id, ordinal, {columns}, level) "
            "SELECT 1, i, i, i + 1, i, i + 1, 10, '000000.seg', i, 1, '[1, 1, 10]', 'fp16', i < 8 FROM n",
            *(4, spans),
        )
        execute("UPDATE sources SET spans = ?, stop = ? WHERE id = 1", spans, str(spans))
        for table, names, values in (
            ("gaps", "start, stop, reason", "i, i || '/1', 'away'"),
            ("expired", "start, stop, spans, tokens, reason", "i, (2 * i + 1) || '/2', 1, 1, 'old'"),
            ("answers", "question, answer, receipt", "'q' || i, 'a', '{}'"),
        ):
            execute(
                f"{numbers} INSERT INTO {table} (source_id, {names}, created) "
                f"SELECT 1, {values}, '2020-01-01T00:00:00+00:00' FROM n",
                *(0, others),
            )


def test_show_of_many_spans_is_one_screen(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, 1001, 30)
    with monkeypatch.context() as patch:
        for name in ("each_span", "_read_span"):
            patch.setattr(Bank, name, lambda *_: pytest.fail("all spans were read"))
        _, out, _ = call(capsys, "show", "1")
        shown = called(capsys, "show", "1")
    lines = out.splitlines()
    assert len(lines) <= 50
    assert "1,001 spans: 4 merged 1 times (seconds, tokens):" in lines
    assert "  ... 991 spans between; --spans shows all" in lines
    at = lines.index("  ... 991 spans between; --spans shows all")
    assert lines[at + 1].startswith("  16:36-16:37") and lines[at + 5] == "  16:40-16:41  10"
    assert lines[at - 1] == "  00:04-00:05  10  merged 1 times"
    assert "  ... 27 gaps between; --spans shows all" in lines
    assert "  ... 27 stretches not remembered any more between; --spans shows all" in lines
    assert "  ... 27 answers between; --spans shows all" in lines
    assert "Q: what?" in lines and "Q: q29" in lines and "Q: q9" not in lines
    assert shown["left_out"] == {"spans": 1001} and shown["spans"] == [] == shown["levels"]
    assert (shown["num_spans"], shown["levels_of_spans"]) == (1001, {"0": 997, "1": 4})
    assert len(shown["answers"]) == 31 and len(shown["gap_spans"]) == 31
    assert (shown["gaps"], shown["gap_seconds"], shown["expired_seconds"]) == (31, 15.0, 30 + 30 * 0.5)
    every = called(capsys, "show", "1", "--spans")
    assert every["left_out"] == {} and len(every["spans"]) == 1001 and every["levels"][3:9] == [0, 1, 1, 1, 1, 0]
    _, out, _ = call(capsys, "show", "1", "--spans")
    assert len(out.splitlines()) > 1090 and "between" not in out and "Q: q9" in out


def test_show_leaves_long_histories_out_too(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    fill(folder, 1000, 1001)
    shown = called(capsys, "show", "1")
    assert shown["left_out"] == {"gap_spans": 1002, "expired_spans": 1002, "answers": 1002}
    assert len(shown["spans"]) == 1000 and shown["gap_spans"] == shown["answers"] == []
    assert "left_out" in shown and called(capsys, "show", "2")["left_out"] == {}


def test_answers_are_a_history(capsys: pytest.CaptureFixture[str]) -> None:
    [answer] = called(capsys, "answers")
    assert answer["question"] == "what?" and answer["spans"] == [[2.002, 4.004]] and answer["name"] == "a.mp4"
    assert called(capsys, "answers", "b.mp4") == []
    _, out, _ = call(capsys, "answers", "a.mp4")
    assert "Q: what?\nA: a red circle\nfrom: 00:02-00:04" in out


def test_verify_is_0_or_1_with_a_list(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = called(capsys, "verify")
    assert (seen["sources"], seen["spans"], seen["problems"]) == (2, 6, [])
    code, out, err = call(capsys, "verify", "b.mp4")
    assert code == 0 and "1 videos, 2 spans" in out and "all as written" in out and err == ""
    path = next(folder.rglob("*.seg"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(memory_command, "PROGRESS_SECONDS", 0.0)
    code, out, err = call(capsys, "verify", "--json")
    assert code == 1
    [problem] = json.loads(out)["problems"]
    assert problem["kind"] == "span" and problem["file"] == str(path.relative_to(folder))
    assert "verifying 0/0 MB" in err
    code, out, _ = call(capsys, "verify")
    assert code == 1 and "1 problems" in out


def row(folder: Path) -> None:
    """As another program would change it."""
    db = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
    db.execute("UPDATE answers SET answer = 'a blue circle'")
    db.close()


def kept_kv(folder: Path) -> None:
    with Bank.open(folder) as bank:
        bank.keep_kv(bank.source(1), KeptKv([(2, "a")], [(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4))]))
    flip(next((folder / "kv").iterdir()))


def saved_index(folder: Path) -> None:
    data = b"an index" * 9
    with Bank.open(folder) as bank:
        (folder / "index").mkdir()
        (folder / "index" / "x.index").write_bytes(data)
        bank._catalog.add_snapshot(
            SnapshotRecord(
                source_id=1,
                embedder=KEY.embedder,
                kind="hnsw",
                width=8,
                vectors=4,
                last_span_id=2,
                file="x.index",
                num_bytes=len(data),
                digest=hashlib.sha256(data).hexdigest(),
            )
        )
    flip(folder / "index" / "x.index")


def codebook(folder: Path) -> None:
    with Bank.open(folder, codec="pq") as bank:
        store(bank, source_key("c"), range(60), name="c.mp4")
    flip(next((folder / "codebooks").glob("*.book")))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "kind", "left"),
    [(row, "text", False), (kept_kv, "spare", False), (saved_index, "spare", False), (codebook, "codebook", True)],
)
def test_whatever_is_damaged_verify_is_1_and_repair_is_1_where_it_stays(
    capsys: pytest.CaptureFixture[str], folder: Path, damage: Callable[[Path], None], kind: str, left: bool
) -> None:
    assert call(capsys, "verify")[0] == 0
    damage(folder)
    code, out, err = call(capsys, "verify", "--json")
    assert code == 1 and err == ""
    assert {p["kind"] for p in json.loads(out)["problems"]} == {kind}
    code, out, err = call(capsys, "verify")
    assert code == 1 and out.startswith(f"{kind}: ") and "repair --dry-run" in err
    assert call(capsys, "repair")[0] == int(left)
    assert call(capsys, "verify")[0] == int(left)


def test_repair_says_what_is_lost_before_and_after(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert call(capsys, "repair") == (0, "nothing to mend\n", "")
    path = next(folder.rglob("*.seg"))
    data = bytearray(path.read_bytes())
    data[data.index(b"SPAN") + 500] ^= 1  # in the first chunk: nothing of the span is left
    path.write_bytes(data)
    planned = called(capsys, "repair", "--dry-run")
    assert planned["lost_spans"] == 1 and path.read_bytes() == bytes(data)
    code, out, _ = call(capsys, "repair")
    assert code == 0 and "lost: " in out and planned["lost"][0] in out
    assert call(capsys, "verify")[0] == 0


def test_a_memory_goes_away_and_comes_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    archive = tmp_path / "all.tar"
    assert called(capsys, "export", archive)["sources"] == ["a.mp4", "b.mp4"]
    there = tmp_path / "there"
    moved = called(capsys, "import", archive, "--memory", there)
    assert moved["sources"] == ["a.mp4", "b.mp4"] and moved["spans"] == 6
    code, out, err = call(capsys, "import", archive, "--memory", there)
    assert code == 0 and err.count("remembered already") == 2 and out.startswith("remembered 0 videos")
    assert called(capsys, "rm", "a.mp4", "--memory", there)["name"] == "a.mp4"
    before = called(capsys, "compact", "--memory", there)
    assert before["after"] <= before["before"]
    assert called(capsys, "merge", tmp_path / "memory", "--memory", there)["sources"] == ["a.mp4"]
    assert [a["question"] for a in called(capsys, "answers", "--memory", there)] == ["what?"]
    assert called(capsys, "verify", "--memory", there)["num_problems"] == 0


def test_an_archive_goes_through_pipes(tmp_path: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "streamvid_cli.app", "memory"]
    out = subprocess.run([*command, "export", "-", "b.mp4"], capture_output=True, check=True)
    done = subprocess.run(
        [*command, "import", "-", "--memory", str(tmp_path / "there")],
        input=out.stdout,
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b"remembered 1 videos, 2 spans")


def test_what_cannot_be_done_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    diary = tmp_path / "diary"
    diary.write_text("dear diary " * 99)
    for command in ("list", "verify", "repair", "compact", "answers"):
        assert "file; choose a folder" in failed(capsys, command, "--memory", diary), command
    assert diary.read_text() == "dear diary " * 99
    assert "there is no memory in" in failed(capsys, "verify", "--memory", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    assert "did you mean b.mp4" in failed(capsys, "show", "c.mp4")
    assert "cannot read" in failed(capsys, "import", tmp_path / "no.tar")
    call(capsys, "export", tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    assert "a.tar is cut short" in failed(capsys, "import", tmp_path / "a.tar", "--memory", tmp_path / "there")
    assert "is there already" in failed(capsys, "export", tmp_path / "a.tar")
    assert "merged with itself" in failed(capsys, "merge", folder)
    next(folder.rglob("*.seg")).unlink()
    assert "No such file" in failed(capsys, "export", tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()
    with sqlite3.connect(folder / FILE_NAME) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for command in ("list", "verify", "repair", "compact"):
        assert "newer streamvid" in failed(capsys, command)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with sqlite3.connect(foreign / FILE_NAME) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    for command in ("list", "verify", "repair", "compact"):
        assert "another program's" in failed(capsys, command, "--memory", foreign)


def test_a_folder_that_cannot_be_written_is_read(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only mount; the user of the tests may be allowed everything, so the question is answered no."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and real(path, mode))
    assert len(called(capsys, "list")["sources"]) == 2
    assert called(capsys, "verify")["num_problems"] == 0
    code, _, err = call(capsys, "rm", "a.mp4")
    assert code == 1 and "note: " in err and "open for reading only" in err
    assert len(called(capsys, "list")["sources"]) == 2
