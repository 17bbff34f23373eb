"""What waits for the model is bounded, what is lost is counted, and gaps are never lost."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest

from streamvid.errors import SettingsError, SourceError
from streamvid.frames import Frame
from streamvid.ingest.supervised import Gap, Notice
from streamvid_pipelines.live.feed import COARSEST, SPOKEN, Feed, Overload
from tests.live.cameras import FakeCamera, Item, frame

TWO = Fraction(2)


def feed_of(items: list[Item], **settings: object) -> Feed:
    feed = Feed(FakeCamera(items), **{"fps": TWO, "frames": 4, **settings})  # type: ignore[arg-type]
    feed.start()
    return feed


def times(frames: list[Frame]) -> list[float]:
    return [float(frame.pts) for frame in frames]


def test_the_oldest_goes_where_only_the_latest_counts() -> None:
    feed = feed_of([frame(n / 2) for n in range(10)], overload="latest")
    assert feed.join(5)
    assert feed.waiting == 4 and feed.counts.dropped == 6
    assert times(feed.take(8)[0]) == [3, 3.5, 4, 4.5]


def test_nothing_goes_where_all_counts() -> None:
    feed = feed_of([frame(n / 2) for n in range(20)], overload=Overload.ALL)
    seen: list[float] = []
    while len(seen) < 20:
        assert feed.waiting <= 4
        seen += times(feed.take(2)[0])
        time.sleep(0.002)
    assert seen == [n / 2 for n in range(20)]
    assert feed.join(5) and feed.counts.dropped == feed.counts.thinned == 0


def test_large_frames_wait_in_smaller_numbers() -> None:
    feed = feed_of([frame(n / 2, side=600) for n in range(8)], overload="latest", megabytes=3, frames=8)
    assert feed.join(5)
    assert feed.waiting == 2, "1.08 MB each, and room for 3 MB"


def test_the_rate_steps_down_under_pressure_and_comes_back() -> None:
    """A model that takes nothing for a while, then everything at once: the rate falls by halves and recovers."""
    camera = FakeCamera([])
    feed = Feed(camera, fps=TWO, frames=8)
    kept: list[float] = []
    for number in range(400):  # 200 s: nobody takes anything for the first 60
        feed._put(frame(number / 2))
        if number / 2 > 60:
            kept += times(feed.take(8)[0])
    assert feed.counts.thinned > 50 and feed.counts.dropped > 0
    steps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    late = [step for at, step in zip(kept, steps, strict=False) if at > 62]
    assert max(late) > 4, "frames became rare"
    assert late[-20:] == [0.5] * 20, "and are all taken again at the end"
    assert feed.stride == 1
    assert all(step * 2 == int(step * 2) for step in late), "they stay even"


def test_the_rate_is_not_lowered_without_end() -> None:
    feed = Feed(FakeCamera([]), fps=TWO, frames=4)
    for number in range(4000):
        feed._put(frame(number / 2, side=4))
    assert feed.stride == COARSEST
    assert feed.waiting == 4


def test_gaps_and_notices_keep_their_place() -> None:
    gap, notice = Gap(Fraction(1), Fraction(9), "refused"), Notice(Fraction(9), "connected", "here")
    feed = feed_of([frame(0), frame(0.5), gap, notice, frame(9), Notice(Fraction(9), "alive", "silent")])
    assert feed.join(5)
    frames, said, following = feed.take(8)
    assert times(frames) == [0, 0.5] and not said
    assert following == 1, "the gap ends the last frame"
    assert feed.spoken
    assert feed.take(8) == ([], [gap, notice], None)
    assert times(feed.take(8)[0]) == [9]
    assert feed.take(8) == ([], [], None)


def test_frames_of_two_sizes_are_never_taken_together() -> None:
    feed = feed_of([frame(0), frame(0.5), frame(1, side=32)])
    assert feed.join(5)
    assert times(feed.take(8)[0]) == [0, 0.5]
    assert times(feed.take(8)[0]) == [1]


def test_of_many_gaps_the_oldest_become_one() -> None:
    items: list[Item] = [Gap(Fraction(2 * n), Fraction(2 * n + 1), f"gap {n}") for n in range(SPOKEN + 20)]
    feed = feed_of(items)
    assert feed.join(5)
    said = feed.take(8)[1]
    gaps = [item for item in said if isinstance(item, Gap)]
    assert len(gaps) == SPOKEN
    assert gaps[0].start == 0 and gaps[-1].reason == f"gap {SPOKEN + 19}"
    assert all(a.stop <= b.start for a, b in zip(gaps, gaps[1:], strict=False))


def test_a_failure_ends_it_and_is_kept() -> None:
    feed = feed_of([frame(0), SourceError("wrong password")])
    assert feed.join(5)
    assert feed.ended and str(feed.failure) == "wrong password"
    assert times(feed.take(8)[0]) == [0], "what came before can still be taken"


def test_it_can_be_left_while_it_waits() -> None:
    feed = feed_of([frame(0), threading.Event(), frame(1)])
    while not feed.waiting:
        time.sleep(0.002)
    feed.close()
    assert feed.join(5)
    full = feed_of([frame(n) for n in range(9)], overload="all")
    while full.waiting < 4:
        time.sleep(0.002)
    full.close()
    assert full.join(5)


@pytest.mark.parametrize("settings", [{"overload": "adaptve"}, {"frames": 1}, {"megabytes": 0}])
def test_what_makes_no_sense_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Feed(FakeCamera([]), **{"fps": TWO, **settings})  # type: ignore[arg-type]
