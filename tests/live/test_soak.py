"""Six hours before a camera: nothing grows, nothing is lost unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.live import Stream, watch
from streamvid.memory.bank import Bank
from streamvid.memory.verify import verify
from streamvid_pipelines.ask import Request, load
from streamvid_pipelines.live.settings import LiveRequest

LIMIT = 6_000_000
"""The limit of the memory, reached after two hours."""


@pytest.mark.slow
def test_six_hours_leave_memory_flat_and_whole(tmp_path: Path) -> None:
    """With outages, and once an hour two minutes in which the camera is faster than the model."""
    stream = Stream.of(6 * 3600, seed=2)
    asks = stream.asks(seed=2, hourly=1)
    loaded = load(Request(model="toy", threads=1), lambda text: None)
    request = LiveRequest(model="toy", memory=tmp_path, fps=2, disk_bytes=LIMIT, budget=1024, threads=1)
    run = watch(stream, asks, request, loaded)

    late = [point for point in run.points if point.hours >= 2]
    assert max(point.rss for point in late) - late[0].rss < 12e6, [round(point.rss / 1e6, 1) for point in run.points]
    assert run.most_disk <= LIMIT
    assert late[-1].disk > LIMIT / 2, "the limit was reached"

    counts = {name: run.last[f"frames_{name}"] for name in ("read", "watched", "thinned", "dropped")}
    away = sum(gap.stop - gap.start for gap in stream.gaps)
    assert counts["read"] == 2 * (stream.seconds - away)
    assert counts["watched"] + counts["thinned"] + counts["dropped"] == counts["read"]
    assert counts["thinned"] > 100, "there was pressure"
    rushes = sum(stop - start for start, stop in stream.rushes)
    assert counts["thinned"] + counts["dropped"] <= 2 * 2 * rushes, "and frames are taken again when it is over"
    assert run.last["lag_seconds"] == 0 and run.last["fps_now"] == run.last["fps_wanted"]

    assert run.gaps == [(float(gap.start), float(gap.stop), gap.reason) for gap in stream.gaps]
    assert run.last["losses"] == len(stream.gaps) == run.last["gaps"]
    assert run.last["connects"] == len(stream.gaps) + 1
    score = run.scores["live"]
    assert score.share("now") >= 0.9 and score.share("gap") == 1, score.wrong
    with Bank.open(tmp_path, read_only=True) as bank:
        assert not verify(bank).problems
