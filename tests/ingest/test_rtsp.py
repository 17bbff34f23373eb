"""Live streams over RTSP, from a server of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamvid.errors import SourceError
from streamvid.frames import Frame
from streamvid.ingest import Notice, Patience, Sampling, Supervised, open_source
from streamvid.ingest.buffer import Ahead
from tests.ingest.rtsp import rtsp
from tests.ingest.synthetic import even, numbers, write

SECRET = "hunter2"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw H.264 with its parameters at each key frame; six seconds, ten pictures a second."""
    path = tmp_path_factory.mktemp("rtsp") / "film.ts"
    return write(path, even(60), gop=10, bframes=0, noise=20)  # four packets a picture


def test_pictures_come_over_rtsp_with_their_times(film: Path) -> None:
    with rtsp(film) as server, open_source(f"rtsp://127.0.0.1:{server.port}/live", stall_seconds=20) as source:
        assert source.info.live and source.info.codec == "h264" and source.info.duration is None
        frames = list(source.frames(Sampling(fps=2, stop=4)))
        assert [float(frame.pts) for frame in frames] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5], abs=0.002)
        first = numbers(frames)[0]
        assert numbers(frames) == [first + 5 * k for k in range(8)]
        assert [line.split()[0] for line in server.requests][-3:] == ["DESCRIBE", "SETUP", "PLAY"]


def test_passwords_are_used_and_never_told(film: Path) -> None:
    with rtsp(film, user=f"me:{SECRET}") as server:
        address = f"rtsp://me:{SECRET}@127.0.0.1:{server.port}/live"
        with open_source(address, stall_seconds=20) as source:
            assert len(list(source.frames(Sampling(fps=1, stop=2)))) == 2
            assert SECRET not in repr(source.info) and SECRET not in source.info.path
        with pytest.raises(SourceError, match="user name or password") as refusal:
            open_source(address.replace(SECRET, "wrong-" + SECRET), stall_seconds=20)
        assert SECRET not in str(refusal.value)


def test_a_camera_that_falls_silent_is_given_up_with_what_came(film: Path) -> None:
    with rtsp(film, silent_after=120) as server:
        with open_source(f"rtsp://127.0.0.1:{server.port}/live", stall_seconds=6) as source:
            taken = []
            with pytest.raises(SourceError, match="no progress for 6 s") as refusal:
                for frame in source.frames(Sampling(fps=5, stop=100)):
                    taken.append(frame)
        assert 5 < len(taken) < 20 and f"127.0.0.1:{server.port}" in str(refusal.value)


def test_a_connection_that_is_cut_ends_the_stream(film: Path) -> None:
    with (
        rtsp(film, cut_after=120) as server,
        open_source(f"rtsp://127.0.0.1:{server.port}/live", stall_seconds=20) as source,
    ):
        frames = list(source.frames(Sampling(fps=5, stop=100)))
        assert 5 < len(frames) < 20 and frames[-1].pts < 4


def test_a_camera_whose_clock_leaps_an_hour_fills_it_with_nothing(tmp_path: Path) -> None:
    """Sampled at 2 a second, the picture before the leap would be given 7,200 times."""
    path = write(tmp_path / "film.ts", [*even(30), *even(30, start=3603)], gop=10, bframes=0, noise=20)
    with rtsp(path) as server:
        address = f"rtsp://127.0.0.1:{server.port}/live"
        frames, said = list[Frame](), list[str]()
        with Supervised(address, sampling=2, patience=Patience(stall_seconds=8), ahead=Ahead(9000)) as watched:
            for item in watched:
                frames += [item] if isinstance(item, Frame) else []
                said += [item.kind] if isinstance(item, Notice) else []
                if said[-1:] == ["lost"]:
                    break
        assert 8 < len(frames) < 16 and frames[-1].pts - frames[0].pts < 8
        assert "clock" in said and watched.dropped == 0
