"""Live sources over HTTP: motion JPEG and playlists that move on; cut, silent, refused and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamvid.errors import SourceError
from streamvid.frames import Frame
from streamvid.ingest import Gap, Notice, Patience, Sampling, Supervised, open_source
from streamvid.ingest.named import find
from tests.ingest.endless import endless, segments
from tests.ingest.synthetic import number
from tests.ingest.test_gst import rises, watch

QUICK = Patience(stall_seconds=3, first_delay=0.1, longest_delay=0.3)


def frames_of(items: list[Frame | Gap | Notice]) -> list[Frame]:
    return [item for item in items if isinstance(item, Frame)]


def test_motion_jpeg_is_read_as_it_comes_at_the_pace_it_comes() -> None:
    """Its parts have no times; counted at FFmpeg's 25 a second these twenty would take 0.8 s instead of 2."""
    with endless() as server, Supervised(server.url("/mjpeg"), patience=QUICK) as watched:
        frames = frames_of(watch(watched, "Frame", 20))
        assert watched.live and watched.connects == 1
        shown = [number(frame.pixels) for frame in frames]
        assert shown == list(range(shown[0], shown[0] + 20))
        assert 1.6 < frames[-1].pts - frames[0].pts < 2.6
        assert watched.accuracy_seconds < 2


def test_motion_jpeg_says_where_its_times_come_from_and_names_no_memory() -> None:
    with endless() as server:
        with open_source(server.url("/mjpeg"), stall_seconds=10) as source:
            assert source.info.live and source.info.codec == "mjpeg"
            assert any("each appears when it is here" in note for note in source.info.notes)
            assert len(list(source.frames(Sampling(fps=5, stop=1)))) == 5
        assert find(server.url("/mjpeg")).identity() is None


def test_motion_jpeg_that_is_cut_or_silent_leaves_a_gap_and_goes_on() -> None:
    with endless() as server, Supervised(server.url("/mjpeg"), patience=QUICK, sampling=5) as watched:
        items = watch(watched, "Frame", 5)
        server.cut()
        items += watch(watched, "lost") + watch(watched, "Gap") + watch(watched, "Frame", 5)
        server.silent.set()
        items += watch(watched, "lost")
        server.silent.clear()
        items += watch(watched, "Gap") + watch(watched, "Frame", 3)
        reasons = [item.reason for item in items if isinstance(item, Gap)]
        assert rises(items) and reasons[0].startswith("the connection ended") and len(reasons) == 2
        assert "3 s" in reasons[1]


def test_an_address_that_refuses_fails_at_once() -> None:
    with endless() as server:
        server.status = 401
        with pytest.raises(SourceError, match="needs a login .401."):
            list(Supervised(server.url("/mjpeg"), patience=QUICK))
        server.status = 404
        with pytest.raises(SourceError, match="does not exist .404."):
            list(Supervised(server.url("/mjpeg"), patience=QUICK))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty segments of a second."""
    return segments(tmp_path_factory.mktemp("hls"), 60)


@pytest.mark.slow
def test_a_playlist_that_moves_on_gives_steady_times_although_pictures_come_in_bursts(folder: Path) -> None:
    with endless(folder) as server, Supervised(server.url("/live.m3u8"), patience=QUICK) as watched:
        frames = frames_of(watch(watched, "Frame", 80))
        steps = {b.pts - a.pts for a, b in zip(frames, frames[1:], strict=False)}
        shown = [number(frame.pixels) for frame in frames]
        assert max(steps) - min(steps) < 0.001 and 0.099 < min(steps) < 0.101
        assert shown == list(range(shown[0], shown[0] + 80))
        assert watched.live and watched.losses == 0 and watched.dropped == 0
        assert 2.5 < watched.accuracy_seconds < 7  # three segments at once, and a second as for every camera


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [None, 0.25])
def test_a_playlist_that_is_away_for_a_while_is_found_again(folder: Path, sampling: float | None) -> None:
    with endless(folder) as server, Supervised(server.url("/live.m3u8"), patience=QUICK, sampling=sampling) as watched:
        items = watch(watched, "Frame", 40 if sampling is None else 2)
        server.closed.set()
        server.cut()
        items += watch(watched, "lost")
        server.closed.clear()
        items += watch(watched, "Gap") + watch(watched, "Frame", 20 if sampling is None else 2)
        assert rises(items) and watched.connects == 2
        assert not [item for item in items if isinstance(item, Notice) and item.kind == "clock"]
