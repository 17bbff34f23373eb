"""Standard input in a temporary file: complete, bounded, and gone afterwards, whatever happens."""

from __future__ import annotations

import gc
import io
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from streamvid.errors import SourceError
from streamvid.ingest.openers import FileOpener
from streamvid.ingest.pyav import PyavReader
from streamvid.ingest.spool import spool_stdin
from tests.ingest.synthetic import even, write

BYTES = bytes(range(256)) * 20_000


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_all_of_a_stream_is_in_the_file_until_it_is_closed(tmp_path: Path) -> None:
    with spool_stdin(io.BytesIO(BYTES), folder=tmp_path) as spool:
        assert spool.path.read_bytes() == BYTES and left(tmp_path) == [spool.path.name]
        assert spool.path.stat().st_mode & 0o077 == 0
    assert left(tmp_path) == []
    spool.close()


def test_a_pipe_that_gives_little_at_a_time_is_read_to_its_end(tmp_path: Path) -> None:
    class Dripping(io.RawIOBase):
        rest = memoryview(BYTES[:50_000])

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            count = min(len(buffer), 999, len(self.rest))
            buffer[:count], self.rest = self.rest[:count], self.rest[count:]
            return count

    with spool_stdin(Dripping(), folder=tmp_path) as spool:  # type: ignore[arg-type]
        assert spool.path.read_bytes() == BYTES[:50_000]


def test_no_more_than_a_piece_is_held_in_memory(tmp_path: Path) -> None:
    asked: list[int] = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(-1 if size is None else size)
            return super().read(size)

    with spool_stdin(Watched(BYTES), folder=tmp_path):
        assert set(asked) == {1 << 20} and len(asked) == len(BYTES) // (1 << 20) + 2


def test_a_video_comes_through(tmp_path: Path) -> None:
    film = write(tmp_path / "a.mp4", even(10))
    with film.open("rb") as stream, spool_stdin(stream) as spool:
        reader = PyavReader(FileOpener(spool.path, spool.name))
        assert reader.info.name == "standard input" and len(list(reader.pictures())) == 10


def test_a_bound_is_kept_and_nothing_is_left(tmp_path: Path) -> None:
    with spool_stdin(io.BytesIO(BYTES), max_bytes=len(BYTES), folder=tmp_path):
        pass
    with pytest.raises(SourceError, match=f"standard input holds more than {len(BYTES) - 1:,} bytes"):
        spool_stdin(io.BytesIO(BYTES), max_bytes=len(BYTES) - 1, folder=tmp_path)
    assert left(tmp_path) == []


def test_a_full_disk_is_seen_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    rooms = [300 << 20, 258 << 20, 256 << 20]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, rooms.pop(0)))
    with pytest.raises(SourceError, match="no room for standard input after 2,097,152 bytes.*set TMPDIR"):
        spool_stdin(io.BytesIO(BYTES), folder=tmp_path)
    assert left(tmp_path) == [] and not rooms


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: open_(Path("/dev/full") if mode == "wb" else self, mode))
    with pytest.raises(SourceError, match=r"no room for standard input after .*\(No space left on device\)"):
        spool_stdin(io.BytesIO(BYTES), folder=tmp_path)
    assert left(tmp_path) == []


def test_a_folder_that_takes_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="absent takes no temporary file: No such file or directory; set TMPDIR"):
        spool_stdin(io.BytesIO(BYTES), folder=tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "standard input is empty"),
        (b"no such file\n", "standard input is a text file"),
        (b"<!DOCTYPE html><html>" + b" " * 10_000, "standard input is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "standard input is a Git LFS pointer"),
    ],
)
def test_what_is_no_video_is_refused_and_nothing_is_left(tmp_path: Path, content: bytes, why: str) -> None:
    with pytest.raises(SourceError, match=why) as told:
        spool_stdin(io.BytesIO(content), folder=tmp_path)
    assert "streamvid-" not in str(told.value) and left(tmp_path) == []


def test_text_is_refused_before_all_of_it_is_read(tmp_path: Path) -> None:
    stream = io.BytesIO(b"words " * 1_000_000)
    with pytest.raises(SourceError, match="text file"):
        spool_stdin(stream, folder=tmp_path)
    assert stream.tell() == 1 << 20


def test_a_terminal_is_refused(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    try:
        with os.fdopen(theirs, "rb", buffering=0) as terminal:
            with pytest.raises(SourceError, match="is a terminal; pipe a video in, as in: cat video.mp4"):
                spool_stdin(terminal, folder=tmp_path)  # type: ignore[arg-type]
    finally:
        os.close(ours)
    assert left(tmp_path) == []


@pytest.mark.parametrize("reason", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_nothing_is_left_when_reading_fails(tmp_path: Path, reason: BaseException) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise reason
            return super().read(size)

    expected = SourceError if isinstance(reason, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as told:
        spool_stdin(Failing(BYTES), folder=tmp_path)
    assert left(tmp_path) == []
    if expected is SourceError:
        assert "standard input cannot be read: Input/output error" in str(told.value)


def test_a_pipe_that_does_not_wait_is_refused(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    with os.fdopen(ours, "rb", buffering=0) as stream:
        with pytest.raises(SourceError, match="set not to wait"):
            spool_stdin(stream, folder=tmp_path)  # type: ignore[arg-type]
    os.close(theirs)
    assert left(tmp_path) == []


def test_a_forgotten_spool_deletes_its_file(tmp_path: Path) -> None:
    spool = spool_stdin(io.BytesIO(BYTES), folder=tmp_path)
    assert len(left(tmp_path)) == 1
    del spool
    gc.collect()
    assert left(tmp_path) == []


def test_the_file_is_gone_when_the_program_ends_and_a_fork_leaves_it(tmp_path: Path) -> None:
    """The fork ends first, as a program does, and the parent still finds its file."""
    code = (
        "import os, sys; from streamvid.ingest.spool import spool_stdin\n"
        f"spool = spool_stdin(sys.stdin.buffer, folder={str(tmp_path)!r})\n"
        "if not os.fork(): sys.exit()\n"
        "os.wait(); print(spool.path.stat().st_size)"
    )
    ran = subprocess.run([sys.executable, "-c", code], input=BYTES, capture_output=True, check=True)
    assert int(ran.stdout) == len(BYTES) and left(tmp_path) == []
