"""``streamvid probe``, and ``ask`` of things that are no plain video file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.cli.test_cli import call, own_memory, video
from tests.ingest.synthetic import even, write
from tests.ingest.web import serving

__all__ = ["own_memory", "video"]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("probe") / "film.mp4", [*even(20), *even(10, start=5)], rotation=90)


def test_probe_tells_what_a_file_is(capsys: pytest.CaptureFixture[str], film: Path) -> None:
    code, out, err = call(capsys, "probe", film)
    assert (code, err) == (0, "")
    for words in ("h264", "32x160 (turned by", "6 s (6) from 0 s, 30 pictures", "1/1", "decoder: pyav", "*0 video"):
        assert words in out
    assert "read:" not in out


def test_probe_json_is_exact(capsys: pytest.CaptureFixture[str], film: Path) -> None:
    code, out, _ = call(capsys, "probe", film, "--decode", "--json")
    told = json.loads(out)
    assert code == 0 and told["usable"] is True
    assert (told["duration"], told["duration_seconds"], told["frames"]) == ("6", 6.0, 30)
    assert (told["width"], told["height"], told["codec"], told["decoder"]) == (32, 160, "h264", "pyav")
    assert told["decoder_reason"] and told["streams"] and "matrix" in told["color"]
    read = told["decoded"]
    assert (read["frames"], read["first_pts"], read["last_pts"]) == (30, "0", "59/10")
    assert read["gaps"] == [[1.9, 5.0]] and read["damage"]["damaged"] == 0


def test_a_refused_file_leaves_the_others_alone(capsys: pytest.CaptureFixture[str], film: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    code, out, err = call(capsys, "probe", empty, film, tmp_path / "none.mp4")
    assert code == 1
    assert [line[:8] for line in err.splitlines()] == ["refused:", "refused:"] and "is empty" in err
    assert "30 pictures" in out
    code, out, err = call(capsys, "probe", empty, film, "--json")
    assert code == 1 and err == ""
    assert [row["usable"] for row in json.loads(out)] == [False, True]
    assert "is empty" in json.loads(out)[0]["reason"]


def test_wrong_settings_are_no_refusals(capsys: pytest.CaptureFixture[str], film: Path) -> None:
    code, out, err = call(capsys, "probe", film, "--decoder", "pyaw")
    assert (code, out) == (1, "") and "did you mean pyav" in err
    assert call(capsys, "probe")[0] == 2


def test_live_sources_are_not_read_to_their_end(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "probe", "lavfi:testsrc=size=64x48")
    assert code == 0 and "no end" in out
    code, _, err = call(capsys, "probe", "lavfi:testsrc=size=64x48", "--decode")
    assert code == 1 and "has no end" in err


def ask(capsys: pytest.CaptureFixture[str], source: object, *more: object) -> dict[str, object]:
    code, out, err = call(capsys, "ask", source, "what happens?", "--model", "toy", "--json", "-q", *more)
    assert code == 0, err
    answer: dict[str, object] = json.loads(out)
    return answer


def test_every_way_to_name_a_video_gives_the_same_answer(
    capsys: pytest.CaptureFixture[str], video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ask(capsys, video)
    with serving() as web:
        address = web.put("/a.mp4", video.read_bytes())
        remote = ask(capsys, address)
        requests = len(web.asked)
        again = ask(capsys, address)
        assert again["receipt"]["cache"] == "hit"  # type: ignore[index]
        assert len(web.asked) - requests <= 2
    assert remote["answer"] == again["answer"] == plain["answer"] and remote["spans"] == plain["spans"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(video.read_bytes()), isatty=lambda: False))
    piped = ask(capsys, "-")
    assert piped["answer"] == plain["answer"]
    assert piped["receipt"]["cache"] == "hit"  # type: ignore[index]


def test_a_changed_address_is_watched_again(capsys: pytest.CaptureFixture[str], video: Path, film: Path) -> None:
    with serving() as web:
        address = web.put("/a.mp4", video.read_bytes(), etag='"one"')
        ask(capsys, address)
        web.put("/a.mp4", film.read_bytes(), etag='"two"')
        assert ask(capsys, address)["receipt"]["cache"] == "miss"  # type: ignore[index]


def test_sources_without_an_end_want_to_know_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "ask", "lavfi:testsrc=size=64x64", "what happens?", "--model", "toy")
    assert (code, out) == (1, "") and "--to" in err
    answer = ask(capsys, "lavfi:testsrc=size=64x64:rate=10", "--to", "4", "--fps", "2")
    receipt = answer["receipt"]
    assert receipt["frames_remembered"] == 8  # type: ignore[index]
    assert any("another run watches it again" in warning for warning in receipt["warnings"])  # type: ignore[index]


def test_images_are_asked_like_a_film(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "shots"
    folder.mkdir()
    for k in range(8):
        Image.new("RGB", (64, 64), (30 * k, 0, 0)).save(folder / f"{k}.png")
    first = ask(capsys, folder, "--rate", "2", "--fps", "2")
    assert first["receipt"]["frames_remembered"] == 8  # type: ignore[index]
    assert first["receipt"]["decoder"] == "pillow"  # type: ignore[index]
    assert ask(capsys, folder, "--rate", "2", "--fps", "2")["receipt"]["cache"] == "hit"  # type: ignore[index]
    assert ask(capsys, folder, "--rate", "1", "--fps", "2")["receipt"]["cache"] == "miss"  # type: ignore[index]


@pytest.mark.parametrize("sample", ["keys", "adaptive"])
def test_other_samplings_are_other_memories_with_honest_receipts(
    capsys: pytest.CaptureFixture[str], video: Path, sample: str
) -> None:
    plain = ask(capsys, video)["receipt"]
    other = ask(capsys, video, "--sample", sample)["receipt"]
    assert other["cache"] == "miss" and other["key"] != plain["key"]  # type: ignore[index]
    assert (plain["sampling"], other["sampling"]) == ("rate", sample)  # type: ignore[index]
    assert 0 < other["frames_remembered"] < 160  # type: ignore[index]
    if sample == "adaptive":
        assert other["frames_looked_at"] > other["frames_remembered"]  # type: ignore[index]
    code, _, err = call(capsys, "ask", video, "what happens?", "--sample", "key", "--model", "toy")
    assert code == 1 and "did you mean keys" in err


def test_the_receipt_says_which_decoder_and_why(capsys: pytest.CaptureFixture[str], video: Path) -> None:
    receipt = ask(capsys, video)["receipt"]
    assert receipt["decoder"] == "pyav" and receipt["decoder_reason"]  # type: ignore[index]
    assert receipt["decoding"]["decoded"] > 0  # type: ignore[index]
    _, _, err = call(capsys, "ask", video, "what happens?", "--model", "toy", "--explain")
    assert "decoded by pyav" in err
