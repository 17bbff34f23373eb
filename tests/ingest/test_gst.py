"""Live sources from an RTSP server that we did not write: killed, stopped, locked, and changing in mid-stream."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from streamvid.errors import SourceError
from streamvid.frames import Frame
from streamvid.ingest.supervised import Gap, Notice, Patience, Supervised
from tests.ingest.gst import GstServer, gst_server, pack
from tests.ingest.synthetic import even, number, write

QUICK = Patience(stall_seconds=3, first_delay=0.1, longest_delay=0.3)
LOCK = "me:s@cr:t/%"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of ten pictures a second, with B-frames; each shows its number."""
    folder = tmp_path_factory.mktemp("gst")
    part = write(folder / "film.ts", even(60), gop=10, bframes=2, noise=20, size=(64, 320))
    return pack(folder / "film", [part])


def live(server: GstServer, user: str = "") -> str:
    return f"rtsp://{user}127.0.0.1:{server.port}/live"


def watch(watched: Supervised, until: str, count: int = 1, limit: float = 20) -> list[Frame | Gap | Notice]:
    """What is given until there were so many of a kind: "Frame", "Gap" or that of a notice."""
    given: list[Frame | Gap | Notice] = []
    end = time.monotonic() + limit
    while count:
        given.append(next(watched))
        item = given[-1]
        count -= (item.kind if isinstance(item, Notice) else type(item).__name__) == until
        assert time.monotonic() < end, f"no {until} in {limit} s: {[g for g in given if not isinstance(g, Frame)][-5:]}"
    return given


def rises(items: list[Frame | Gap | Notice]) -> bool:
    """Whether frames and gaps follow each other without overlap."""
    at = None
    for item in items:
        if isinstance(item, Notice):
            continue
        start, stop = (item.start, item.stop) if isinstance(item, Gap) else (item.pts, item.pts + item.duration)
        if stop <= start or (at is not None and start < at):
            return False
        at = stop
    return True


def test_pictures_of_a_strange_server_come_in_order_at_their_own_pace(film: Path) -> None:
    with gst_server(film) as server, Supervised(live(server), patience=QUICK) as watched:
        frames = [item for item in watch(watched, "Frame", 20) if isinstance(item, Frame)]
        steps = [round((b.pts - a.pts) * 10) for a, b in zip(frames, frames[1:], strict=False)]
        shown = [(number(b.pixels) - number(a.pixels)) % 60 for a, b in zip(frames, frames[1:], strict=False)]
        assert steps == shown and sum(steps) >= 19
        assert 1 <= watched.accuracy_seconds < 3


@pytest.mark.slow
def test_twenty_restarts_leave_twenty_gaps_on_one_clock(film: Path) -> None:
    with gst_server(film) as server, Supervised(live(server), patience=QUICK, sampling=5) as watched:
        items = watch(watched, "Frame")
        for _ in range(20):
            server.kill()
            items += watch(watched, "lost")
            time.sleep(watched.accuracy_seconds)  # a shorter gap may lie within what is known of the time
            server.start()
            items += watch(watched, "Gap") + watch(watched, "Frame")
        assert rises(items) and (watched.connects, watched.losses) == (21, 20)
        gaps = [item for item in items if isinstance(item, Gap)]
        assert len(gaps) == 20 and all(gap.reason.startswith("the connection ended") for gap in gaps)
        assert max(gap.stop - gap.start for gap in gaps) < 6


@pytest.mark.slow
def test_a_server_that_hangs_is_left_and_found_again(film: Path) -> None:
    with gst_server(film) as server, Supervised(live(server), patience=QUICK, sampling=5) as watched:
        items = watch(watched, "Frame", 5)
        server.pause()
        begun = time.monotonic()
        items += watch(watched, "lost")
        assert 2 < time.monotonic() - begun < 6
        server.resume()
        items += watch(watched, "Gap") + watch(watched, "Frame", 3)
        assert rises(items)


@pytest.mark.slow
def test_another_resolution_in_mid_stream_is_told_and_scaled(film: Path, tmp_path: Path) -> None:
    small = write(tmp_path / "a.ts", even(20), gop=10, bframes=0, noise=20, size=(64, 320))
    large = write(tmp_path / "b.ts", even(20), gop=10, bframes=0, noise=20, size=(128, 640))
    with gst_server(pack(tmp_path / "film", [small, large])) as server, Supervised(live(server)) as watched:
        items = watch(watched, "size", 2) + watch(watched, "Frame", 2)
        shapes = {tuple(item.pixels.shape) for item in items if isinstance(item, Frame)}
        assert len(shapes) == 1 and watched.losses == 0 and rises(items)


@pytest.mark.parametrize("how", [(), ("--basic",)], ids=["digest", "basic"])
def test_a_locked_server_opens_to_the_right_password_only(
    film: Path, how: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with gst_server(film, "--user", LOCK, *how) as server:
        with pytest.raises(SourceError, match="401") as refusal:
            next(Supervised(live(server, "me:secret-wrong@"), patience=Patience(stall_seconds=8)))
        assert "secret-wrong" not in str(refusal.value)
        monkeypatch.setenv("STREAMVID_USER", "me")
        monkeypatch.setenv("STREAMVID_PASSWORD", LOCK.partition(":")[2])
        with Supervised(live(server), patience=QUICK) as watched:
            items = watch(watched, "Frame")
            assert not any(LOCK[3:] in item.text for item in items if isinstance(item, Notice))


def test_what_is_not_there_fails_at_once(film: Path) -> None:
    with gst_server(film) as server:
        address = live(server).replace("/live", "/garden")
        with pytest.raises(SourceError, match=r"no such stream \(404\)"):
            list(Supervised(address, tick=20))
    with pytest.raises(SourceError, match="names a server that is not known"):
        list(Supervised("rtsp://no.such.host.invalid/live", tick=20))
    closed = Supervised(live(server), patience=QUICK, tick=20)  # nobody listens: that may change
    first = next(closed)
    closed.close()
    assert isinstance(first, Notice) and first.kind == "retry" and "refused the connection" in first.text
