"""What is not a video is refused in one line that teaches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest import Sampling, open_source, redact
from streamvid.ingest.named import find
from tests.ingest.synthetic import even, write, write_sound


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mp4 whose index comes first, so that a cut leaves pictures."""
    return write(tmp_path_factory.mktemp("v") / "holiday.mp4", even(60), noise=30, container={"movflags": "faststart"})


def refusal(path: str | Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message and "Errno" not in message
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def test_missing_file_suggests_the_near_one(video: Path) -> None:
    assert "did you mean holiday.mp4?" in refusal(video.with_name("holliday.mp4"))
    assert "did you mean holiday.mp4?" in refusal(video.with_name("Holiday.MP4"))
    assert "did you mean holiday.mp4?" in refusal(video.with_name("holiday.mkv"))


def test_missing_folder_is_named_as_such(tmp_path: Path) -> None:
    assert "nor does its folder" in refusal(tmp_path / "nowhere" / "x.mp4")


def test_folder_names_a_video_in_it(video: Path) -> None:
    assert refusal(video.parent).endswith(f"for example {video}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"hello there\n" * 1000, "is a text file"),
        ("größer\n".encode() * 1000, "is a text file"),
        ("wide text".encode("utf-16"), "is a text file"),
        (b"#EXTM3U\n#EXTINF:3,\n/etc/passwd\n", "outside its own folder"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "is a text file"),
        (bytes(range(256)) * 64, "no video format"),
        (
            b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom\x00\x00\x01\x00mdat" + b"\x01" * 500,
            "no index (moov box)",
        ),
        (b"\x00\x00\x00\x18stypmsdh\x00\x00\x00\x00msdhmsix\x00\x00\x01\x00moof" + b"\x01" * 500, "without its header"),
    ],
    ids=["empty", "lfs", "html", "text", "utf8", "utf16", "m3u8", "concat", "bytes", "no-moov", "segment"],
)
def test_content_tells_what_a_file_is(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    assert words in refusal(path)


def test_sound_only(tmp_path: Path) -> None:
    assert "sound only" in refusal(write_sound(tmp_path / "song.mp4"))


def test_index_lost_with_the_end(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", even(30)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "no index (moov box)" in refusal(cut)


def test_header_without_pictures(video: Path, tmp_path: Path) -> None:
    whole = video.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: whole.index(b"mdat") + 4])
    assert "holds no picture" in refusal(cut)


def test_cut_file_plays_what_is_left_and_says_so(video: Path, tmp_path: Path) -> None:
    whole = video.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: whole.index(b"mdat") + (len(whole) - whole.index(b"mdat")) // 3])
    with open_source(cut) as source:
        frames = list(source.frames(Sampling(fps=5)))
        assert 0 < frames[-1].pts < 4
        assert source.info.duration is not None and source.info.duration < 4
        assert "header says 6 s" in source.info.notes[0]


def test_encrypted(tmp_path: Path) -> None:
    secret = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00112233445566778899aabbccddeeff"}
    secret["encryption_kid"] = "a7e61c373e219033c21091fa607bf3b8"
    assert "encrypted" in refusal(write(tmp_path / "drm.mp4", even(10), container=secret))


def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "not a regular file" in refusal(tmp_path / "pipe.mp4")


def test_stdin_and_addresses_are_not_read_yet() -> None:
    assert "standard input" in refusal("-")
    message = refusal("rtsp://admin:hunter2@camera.local:554/live?token=abc")
    assert "hunter2" not in message and "admin" not in message and "abc" not in message
    assert "rtsp://camera.local:554/live" in message


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://a:b@host/x.mp4", "http://host/x.mp4"),
        ("http://host/x.mp4?sig=1#f", "http://host/x.mp4?..."),
        ("http://a@b:c@host/", "http://host/"),
        ("/home/me/a@b.mp4", "/home/me/a@b.mp4"),
    ],
)
def test_redacted_addresses_keep_the_place_and_lose_the_secret(address: str, shown: str) -> None:
    assert redact(address) == shown


def test_odd_names_are_only_names(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-video.mp4", "a b%03d.mp4", "concat:x.mp4", "film", "ünï.mp4"):
        Path(name).write_bytes(video.read_bytes())
        assert len(list(open_source(name).frames(Sampling(count=2)))) == 2


def test_name_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    refusal(tmp_path / "a\nb.mp4")


def test_unknown_decoder_suggests_the_near_one(video: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean pyav"):
        open_source(video, decoder="pyva")


def test_unreadable_file_says_permissions(video: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "locked.mp4"
    path.write_bytes(video.read_bytes())
    path.chmod(0)
    assert "permissions" in refusal(path)


def test_a_file_that_vanishes_before_it_is_opened(video: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.mp4"
    path.write_bytes(video.read_bytes())
    named = find(path)
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read any more: No such file"):
        open_source(named)
