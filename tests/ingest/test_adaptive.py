"""Frames chosen by change: small subjects, noise, exposure, cuts, the floor, budgets; and key frames alone."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import product
from math import ceil, floor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest import (
    DecodeStats,
    Picture,
    Pictures,
    Reader,
    Sampling,
    SamplingReport,
    Shot,
    SourceInfo,
    open_source,
)
from streamvid.ingest.adaptive import Change, ChangeDetector, Pace, adaptive_plan, cells_of
from streamvid.ingest.sampling import Adaptive, Plan
from tests.ingest.synthetic import even, number, write

VIDEOS = Path(__file__).parents[3] / "shared" / "videos" / "natural"
Grey = NDArray[np.uint8]
SIZE = 108, 192


class DrawnPicture(Picture):
    def __init__(self, drawn: Grey, order: int, pts: Fraction, duration: Fraction) -> None:
        self.drawn, self.order, self.pts, self.duration = drawn, order, pts, duration

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        return np.full((1, 1, 3), self.order % 256, dtype=np.uint8)

    def grey(self, size: tuple[int, int]) -> Grey:
        return np.asarray(Image.fromarray(self.drawn).resize(size[::-1], Image.Resampling.BOX))


class DrawnPictures(Pictures):
    """Pictures drawn one by one when they are asked for; those alive are known."""

    def __init__(self, draw: Callable[[int], Grey], times: list[Fraction]) -> None:
        self.stats = DecodeStats()
        self.alive: list[weakref.ref[DrawnPicture]] = []
        self._draw, self._times, self._place = draw, times, 0

    def __next__(self) -> DrawnPicture:
        k = self._place
        if k + 1 >= len(self._times):
            raise StopIteration
        self._place += 1
        made = DrawnPicture(self._draw(k), k, self._times[k], self._times[k + 1] - self._times[k])
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(made)]
        return made

    def close(self) -> None:
        pass


class DrawnReader(Reader):
    """Pictures from a function of their number; ``times`` ends with when the last one is gone."""

    def __init__(self, draw: Callable[[int], Grey], times: list[Fraction], size: tuple[int, int] = SIZE) -> None:
        self._draw, self._times = draw, times
        height, width = size
        self.info = SourceInfo(
            "/x", "x", "fake", "fake", width, height, times[-1] - times[0], times[0], Fraction(1), None, 0, "fake"
        )

    def pictures(self, *, keys_only: bool = False) -> DrawnPictures:
        return DrawnPictures(self._draw, self._times)


def chosen(reader: Reader, sampling: Sampling | None = None) -> tuple[list[Shot], SamplingReport]:
    shots = reader.sample(reader.plan(sampling or Sampling(adaptive=Adaptive())))
    taken: list[Shot] = list(shots)  # type: ignore[call-overload]
    return taken, shots.report


def film(pictures: list[Grey], fps: int = 10) -> DrawnReader:
    return DrawnReader(pictures.__getitem__, even(len(pictures) + 1, fps))


def numbers_of(shots: Iterable[Shot], fps: int = 10) -> list[int]:
    return [int(shot.pts * fps) for shot in shots]


def scenery(seed: int, contrast: float = 35.0, kind: str = "soft") -> NDArray[np.float64]:
    """A still picture of brightness 120: soft hills, the same with hard steps, or nothing at all."""
    random = np.random.default_rng(seed)
    height, width = SIZE
    hills = np.zeros(SIZE)
    for step in (6, 12, 24, 48):
        coarse = random.normal(size=(height // step + 2, width // step + 2)).astype(np.float32)
        wide = Image.fromarray(coarse).resize(
            (coarse.shape[1] * step, coarse.shape[0] * step), Image.Resampling.BILINEAR
        )
        hills += np.asarray(wide)[:height, :width] * step**0.5
    hills *= contrast / hills.std()
    if kind == "hard":
        hills = np.round(hills / 25) * 25
    return 120 + (hills - hills.mean()) * (kind != "flat")


def seen(scene: NDArray[np.float64], noise: float = 0, seed: int = 0) -> Grey:
    """What a camera makes of it."""
    grain = np.random.default_rng(seed).normal(size=scene.shape) * noise if noise else 0.0
    return np.clip(np.round(scene + grain), 0, 255).astype(np.uint8)


def with_subject(
    scene: NDArray[np.float64], share: float, contrast: float, at: tuple[float, float]
) -> NDArray[np.float64]:
    """A square of ``share`` of the picture, lighter or darker than what it hides, its corner at ``at``."""
    out = scene.copy()
    side = max(2, round((share * scene.size) ** 0.5))
    y, x = (round(where * length) for where, length in zip(at, scene.shape, strict=True))
    under = out[y : y + side, x : x + side]
    out[y : y + side, x : x + side] = under.mean() + (contrast if under.mean() < 128 else -contrast)
    return out


def walk(share: float, contrast: float, noise: float, start: tuple[float, float], kind: str = "soft") -> list[Grey]:
    """65 pictures in which a subject stands, moves by 2 % of the width in 10 of them, and stands again."""
    scene = scenery(7, kind=kind)
    pictures = []
    for k in range(65):
        steps = min(max(k - 26, 0), 10)
        at = start[0], start[1] + 0.02 * steps
        pictures.append(seen(with_subject(scene, share, contrast, at), noise, seed=k))
    return pictures


@pytest.mark.parametrize("kind", ["soft", "hard", "flat"])
@pytest.mark.parametrize(
    ("share", "contrast", "noise", "start"),
    [
        (0.002, 60, 0, (0.5, 0.4)),
        (0.002, 80, 4, (0.02, 0.05)),
        (0.004, 40, 0, (0.9, 0.7)),
        (0.004, 50, 4, (0.5, 0.4)),
        (0.004, 80, 8, (0.02, 0.75)),
        (0.01, 40, 0, (0.85, 0.01)),
        (0.01, 80, 10, (0.4, 0.3)),
    ],
    ids=str,
)
def test_every_move_of_a_small_subject_is_a_frame(
    share: float, contrast: float, noise: float, start: tuple[float, float], kind: str
) -> None:
    """A subject of 0.4 % of the picture that moves in 10 of 65 pictures gives all 10, and little besides."""
    shots, report = chosen(film(walk(share, contrast, noise, start, kind)))
    kept = numbers_of(shots)
    assert set(range(27, 37)) <= set(kept)
    assert len(kept) <= 10 + ceil(Fraction(65, 20)) + 2
    assert report.looked == 65 and report.left_out == 0 and report.mode == "adaptive"


@pytest.mark.parametrize("noise", [0, 3, 8, 20])
@pytest.mark.parametrize("kind", ["soft", "hard", "flat"])
def test_a_noisy_still_scene_keeps_only_the_floor(noise: float, kind: str) -> None:
    scene = scenery(3, kind=kind)
    shots, report = chosen(film([seen(scene, noise, seed=k) for k in range(200)]))
    assert numbers_of(shots) == list(range(0, 200, 20))
    assert report.longest_gap == 0 and report.looked == 200


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_exposure_that_pumps_is_not_motion_and_does_not_hide_it(kind: str) -> None:
    scene = scenery(5, contrast=55, kind=kind)
    gains = [1 + 0.2 * np.sin(2 * np.pi * k / 60) for k in range(200)]
    pumped, _ = chosen(film([seen(scene * gain, 3, seed=k) for k, gain in enumerate(gains)]))
    assert len(pumped) <= 12
    at = [(0.5, 0.3 + 0.02 * min(max(k - 100, 0), 10)) for k in range(200)]
    moving = [seen(with_subject(scene, 0.004, 60, at[k]) * gain, 3, seed=k) for k, gain in enumerate(gains)]
    shots, _ = chosen(film(moving))
    assert len(set(range(101, 111)) & set(numbers_of(shots))) >= 9


def test_soft_light_is_no_subject() -> None:
    """A lamp that brightens a part of the picture by 25 grey levels in four seconds."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    lamp = 25 * np.exp(-(((y - 60) / 25) ** 2) - ((x - 130) / 25) ** 2)
    shots, _ = chosen(film([seen(scenery(6) + lamp * min(k / 40, 1), 2, seed=k) for k in range(80)]))
    assert numbers_of(shots) == [0, 20, 40, 60]


def test_noise_in_a_part_of_the_picture_is_no_subject() -> None:
    """Most of it is black and without any noise, so that the noise of the whole is none."""
    scene = scenery(8)
    pictures = [seen(scene, 16, seed=k) for k in range(200)]
    for drawn in pictures:
        drawn[: SIZE[0] * 2 // 3] = 0
    shots, _ = chosen(film(pictures))
    kept = numbers_of(shots)
    assert len([k for k in kept if k >= 20]) <= 10


def test_a_cut_is_a_frame_at_once_even_when_the_burst_is_spent() -> None:
    """The subject moves all the time, so that the store of frames is empty when the scene changes."""
    scenes = [scenery(1), scenery(2)]
    at = [(0.5, 0.1 + 0.6 * (k % 20) / 20) for k in range(120)]
    pictures = [seen(with_subject(scenes[k >= 83], 0.01, 60, at[k])) for k in range(120)]
    shots, report = chosen(film(pictures), Sampling(adaptive=Adaptive(burst=3, steady_fps=1)))
    kept = numbers_of(shots)
    assert 83 in kept and report.left_out > 50
    assert len(kept) <= 3 + 12 + 2


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_slow_fade_is_kept_a_few_times_on_the_way(end: float) -> None:
    """Four seconds to black, or to another scene."""
    one, other = scenery(1), scenery(2) * end
    shares = [min(max((k - 20) / 40, 0), 1) for k in range(80)]
    shots, _ = chosen(film([seen(one * (1 - share) + other * share) for share in shares]))
    during = [k for k in numbers_of(shots) if 20 < k <= 60]
    assert 3 <= len(during) <= 10
    assert max(b - a for a, b in zip([20, *during], [*during, 60], strict=True)) < 20


def test_a_turning_camera_keeps_to_the_steady_rate() -> None:
    wide = np.concatenate([scenery(1), scenery(2), scenery(3)], axis=1)
    pictures = [seen(wide[:, 3 * k : 3 * k + SIZE[1]]) for k in range(120)]
    shots, report = chosen(film(pictures), Sampling(adaptive=Adaptive(burst=5, steady_fps=2)))
    assert 12 <= len(shots) <= 5 + 2 * 12 + 1
    assert report.longest_gap <= 1


@pytest.mark.parametrize("brick", [6, 12, 24])
def test_a_camera_that_begins_to_turn_is_not_a_thousand_subjects(brick: int) -> None:
    """Bricks pass by at half a cell a look for two seconds; a frame each time they have moved enough, not each look."""
    shades = np.random.default_rng(0).uniform(60, 180, (SIZE[0] // brick + 1, 2 * SIZE[1] // brick))
    wall = np.kron(shades, np.ones((brick, brick)))[: SIZE[0]]
    at = [min(max(k - 40, 0), 20) for k in range(80)]
    shots, _ = chosen(film([seen(wall[:, x : x + SIZE[1]], 2, seed=k) for k, x in enumerate(at)]))
    turning = [k for k in numbers_of(shots) if 41 <= k <= 61]
    assert 2 <= len(turning) <= 10


def test_what_a_subject_leaves_and_brings_is_kept_once() -> None:
    """It appears, stays, and is gone: one frame each, besides the floor."""
    scene = scenery(4)
    there = with_subject(scene, 0.004, 60, (0.5, 0.5))
    shots, _ = chosen(film([seen(there if 33 <= k < 71 else scene, 3, seed=k) for k in range(100)]))
    kept = numbers_of(shots)
    assert kept == [0, 20, 33, 53, 71, 91]


def test_the_detector_holds_no_more_after_a_thousand_looks() -> None:
    def held(thing: object) -> int:
        if isinstance(thing, np.ndarray):
            return thing.nbytes
        slots = (
            vars(thing)
            if hasattr(thing, "__dict__")
            else {s: getattr(thing, s) for s in getattr(thing, "__slots__", ())}
        )
        return sum(held(value) for value in slots.values())

    random = np.random.default_rng(0)
    detector = ChangeDetector(Adaptive())
    sizes = []
    for k in range(1000):
        if detector.look(random.integers(0, 255, (27, 48), dtype=np.uint8)) is not Change.NONE and k % 3:
            detector.keep()
        sizes.append(held(detector))
    assert sizes[10] > 27 * 48 and max(sizes[10:]) == sizes[10]


def test_few_pictures_are_alive_at_any_time() -> None:
    scene = scenery(1)
    drawn = seen(scene)
    pictures = DrawnPictures(lambda k: drawn, even(301))
    reader = DrawnReader(lambda k: drawn, even(301))
    reader.pictures = lambda *, keys_only=False: pictures  # type: ignore[method-assign, assignment, misc]
    shots = reader.sample(reader.plan(Sampling(fps=Fraction(1, 10), adaptive=Adaptive())))
    most = 0
    for _ in shots:  # type: ignore[attr-defined]
        most = max(most, sum(ref() is not None for ref in pictures.alive))
    assert 1 <= most <= 3


def test_a_source_that_breaks_off_still_gives_the_frame_that_was_held() -> None:
    def draw(k: int) -> Grey:
        if k == 7:
            raise SourceError("the cable was pulled")
        return np.full(SIZE, 90, dtype=np.uint8)

    reader = DrawnReader(draw, even(50))
    shots = reader.sample(reader.plan(Sampling(adaptive=Adaptive())))
    first = next(shots)
    # The picture before the last one read is not looked at: nobody knows when it went.
    assert (first.pts, first.duration) == (0, Fraction(6, 10))
    with pytest.raises(SourceError, match="cable"):
        next(shots)


def test_a_second_pass_and_a_reset_detector_decide_the_same() -> None:
    reader = film(walk(0.004, 60, 4, (0.3, 0.3)))
    (first, report), (second, again) = chosen(reader), chosen(reader)
    assert [(s.pts, s.duration) for s in first] == [(s.pts, s.duration) for s in second] and report == again
    detector = ChangeDetector(Adaptive())
    looks = [picture.grey((54, 96)) for picture in reader.pictures()]
    before = [detector.look(grey) for grey in looks]
    detector.reset()
    assert [detector.look(grey) for grey in looks] == before
    assert before[0] is Change.CUT and Change.SUBJECT in before


def still(times: list[Fraction]) -> DrawnReader:
    drawn = np.full((4, 4), 100, dtype=np.uint8)
    return DrawnReader(lambda k: drawn, times, (4, 4))


def floor_by_hand(
    times: list[Fraction], fps: Fraction, looks: Fraction, start: Fraction, stop: Fraction
) -> list[Fraction]:
    """When frames appear if nothing ever changes: look by look, with the rule as it is documented."""
    given: list[Fraction] = []
    shown = None
    k = 0
    while (target := start + k / looks) < stop:
        number = bisect_right(times[:-1], target) - 1
        pts = target if number == shown else max(times[number], start)
        if not given or start + (k + 1) / looks > given[-1] + 1 / fps:
            given.append(pts)
        shown = number
        k += 1
    return given


gaps = st.lists(st.fractions(Fraction(1, 60), 2, max_denominator=60), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    begin=st.fractions(-5, 5000, max_denominator=90),
    gaps=gaps,
    fps=st.fractions(Fraction(1, 4), 3, max_denominator=12),
    looks=st.integers(6, 15),
    span=st.tuples(st.fractions(0, 1, max_denominator=9), st.fractions(0, 1, max_denominator=9)),
)
def test_the_floor_is_kept_exactly(begin, gaps, fps, looks, span) -> None:
    times = [begin]
    for gap in gaps:
        times.append(times[-1] + gap)
    start, stop = (begin + (times[-1] - begin) * share for share in sorted(span))
    start, stop = (start, stop) if start < stop else (begin, times[-1])
    sampling = Sampling(fps=fps, start=start, stop=stop, adaptive=Adaptive(max_fps=looks))
    shots, report = chosen(still(times), sampling)
    pts = [shot.pts for shot in shots]
    assert pts == floor_by_hand(times, fps, Fraction(looks), start, stop)
    assert pts[0] == start
    assert all(b - a <= 1 / fps for a, b in zip(pts, [*pts[1:], stop], strict=True))
    assert all(shot.duration > 0 for shot in shots)
    assert all(a.pts + a.duration <= b.pts for a, b in zip(shots, shots[1:], strict=False))
    assert shots[-1].pts + shots[-1].duration <= stop
    assert report.longest_gap == unseen_by_hand(times, Fraction(looks), start, stop)
    assert report.frames == len(shots) and (report.start, report.stop) == (start, stop)


def unseen_by_hand(times: list[Fraction], looks: Fraction, start: Fraction, stop: Fraction) -> Fraction:
    """Longest stretch without a picture that was looked at."""
    met = {bisect_right(times[:-1], start + k / looks) - 1 for k in range(ceil((stop - start) * looks))}
    longest, until = Fraction(0), start
    for met_one in sorted(met):
        longest = max(longest, times[met_one] - until)
        until = times[met_one + 1]
    return max(longest, stop - until)


def test_frames_last_as_long_as_nothing_changes() -> None:
    """A picture that differs and is not given ends the frame before, and counts as unseen."""
    one, other = seen(scenery(1)), seen(with_subject(scenery(1), 0.02, 80, (0.4, 0.4)))
    pictures = [other if k in (5, 6, 7) or 12 <= k < 15 else one for k in range(40)]
    shots, report = chosen(film(pictures), Sampling(fps=Fraction(1, 4), adaptive=Adaptive(burst=1, steady_fps=1)))
    assert [(s.pts, s.duration) for s in shots] == [
        (0, Fraction(1, 2)),
        (Fraction(1, 2), Fraction(3, 10)),
        (Fraction(3, 2), Fraction(5, 2)),
    ]
    assert report.left_out == 4 + 0 and report.longest_gap == Fraction(4, 10)
    assert "4 changed pictures were left out by steady_fps=1 after a burst of 1" in report.notes[-1]


def busy(seconds: int, seed: int = 0) -> DrawnReader:
    """Another picture each time."""
    random = np.random.default_rng(seed)
    levels = random.integers(0, 2, (seconds * 10, 4, 4), dtype=np.uint8) * 200
    return DrawnReader(lambda k: np.kron(levels[k], np.ones((4, 4), dtype=np.uint8)), even(seconds * 10 + 1), (16, 16))


@pytest.mark.parametrize("limit", [1, 2, 5, 20, 61, 300])
def test_a_limit_covers_a_busy_film_to_its_end(limit: int) -> None:
    shots, report = chosen(busy(120), Sampling(max_frames=limit, adaptive=Adaptive()))
    pts = [shot.pts for shot in shots]
    assert report.fps is not None and len(pts) <= limit
    assert all(b - a <= 1 / report.fps for a, b in zip(pts, [*pts[1:], Fraction(120)], strict=True))
    assert report.fps == Fraction(1, 2) or any(f"max_frames={limit} turns a floor" in note for note in report.notes)
    assert report.left_out > 0 and f"and max_frames={limit}" in report.notes[-1] or limit == 1
    if limit >= 20:
        assert len(pts) >= limit * 0.9
        quarters = [sum(30 * q <= time < 30 * q + 30 for time in pts) for q in range(4)]
        assert max(quarters) <= 2.5 * min(quarters) + 2


def test_a_limit_is_kept_for_the_event_at_the_end() -> None:
    scene = scenery(2)
    at = [(0.5, 0.2 + 0.02 * min(max(k - 560, 0), 20)) for k in range(600)]
    drawn = [seen(with_subject(scene, 0.006, 70, at[k])) for k in range(600)]
    shots, report = chosen(film(drawn), Sampling(max_frames=40, adaptive=Adaptive()))
    assert set(range(561, 581)) <= set(numbers_of(shots)) and len(shots) <= 40
    assert report.left_out == 0


@settings(max_examples=100, deadline=None)
@given(
    seconds=st.integers(1, 300),
    limit=st.integers(1, 80),
    fps=st.fractions(Fraction(1, 10), 2, max_denominator=10),
    looks=st.integers(4, 12),
    changes=st.lists(st.sampled_from([Change.NONE, Change.SUBJECT, Change.SCENE, Change.CUT]), min_size=1, max_size=40),
)
def test_a_limit_is_never_passed_and_the_floor_never_starved(seconds, limit, fps, looks, changes) -> None:
    """The pace alone, with any order of changes and the floor's rule around it."""
    adaptive = Adaptive(max_fps=looks, steady_fps=2)
    plan = adaptive_plan(adaptive, Plan(Fraction(0), Fraction(seconds), fps, limit))
    assert plan.fps is not None
    pace, given = Pace(plan), [Fraction(0)]
    pace.floor()
    for k in range(1, seconds * looks):
        now = Fraction(k, looks)
        change = changes[k * len(changes) // (seconds * looks)] if k % 3 else changes[k % len(changes)]
        if Fraction(k + 1, looks) > given[-1] + 1 / plan.fps:
            pace.floor()
            given.append(now)
        elif change is not Change.NONE and pace.change(now, change):
            given.append(now)
    assert len(given) <= limit and pace.full == (len(given) == limit)


def test_small_pictures_have_the_shape_of_the_large() -> None:
    assert cells_of(1080, 1920, 5184) == (54, 96)
    assert cells_of(1920, 1080, 5184) == (96, 54)
    assert cells_of(8, 6, 5184) == (8, 6)
    assert cells_of(4, 40000, 5184)[0] == 1


@pytest.mark.parametrize(
    "bad",
    [{"max_fps": 0}, {"steady_fps": 20}, {"steady_fps": 0}, {"burst": 0}, {"subject": 0}, {"scene": -1}]
    + [{"cut": float("nan")}, {"cells": 10}],
    ids=str,
)
def test_impossible_settings_are_refused_at_once(bad: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(bad)) if "max_fps" not in bad else "max_fps"):
        Adaptive(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("both", "word"),
    [
        ({"keys": True, "adaptive": Adaptive()}, "not both"),
        ({"keys": True, "count": 3}, "max_frames"),
        ({"adaptive": Adaptive(), "count": 3}, "max_frames"),
        ({"adaptive": Adaptive(), "fps": 6}, "half of max_fps=10"),
    ],
    ids=str,
)
def test_what_excludes_each_other_is_refused(both: dict[str, object], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        Sampling(**both)  # type: ignore[arg-type]


def test_a_plan_can_be_sent_to_a_process_without_torch() -> None:
    plan = still(even(50)).plan(Sampling(fps=1, max_frames=2, adaptive=Adaptive(burst=7)))
    assert pickle.loads(pickle.dumps(plan)) == plan and plan.mode == "adaptive"
    code = "import sys, streamvid.ingest.adaptive, streamvid.ingest.reader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def key_times(path: Path) -> list[Fraction]:
    """When key frames are shown, from the packets alone."""
    with av.open(str(path)) as file:
        return sorted(
            p.pts * p.time_base for p in file.demux(video=0) if p.size and p.is_keyframe and p.pts is not None
        )


def keys_by_hand(
    keys: list[Fraction], stay: Fraction, fps: Fraction | None, limit: int | None, start: Fraction, stop: Fraction
) -> list[Fraction]:
    """Times of the frames, key frame by key frame."""
    on = [max(key, start) for key in keys if key < stop and key + stay > start]
    if fps is not None:
        first: dict[int, Fraction] = {}
        for time in on:
            first.setdefault(floor((time - start) * fps), time)
        on = list(first.values())
    if limit is not None and len(on) > limit:
        on = [on[ceil(Fraction(k * len(on), limit))] for k in range(limit)]
    return on


@pytest.fixture(scope="module", params=[("mp4", 12, 2), ("mp4", 7, 0), ("mkv", 9, 2), ("mkv", 25, 1)], ids=str)
def keyed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ending, gop, bframes = request.param
    path = tmp_path_factory.mktemp("keys") / f"film.{ending}"
    return write(path, even(97), gop=gop, bframes=bframes, options={"sc_threshold": "0"})


@pytest.mark.parametrize("span", [(None, None), (1.25, 7), (3.6, None), (None, 4.85)], ids=str)
def test_key_frames_are_those_of_the_container(keyed: Path, span: tuple[float | None, float | None]) -> None:
    keys, stay = key_times(keyed), Fraction(1, 10)
    start, stop = Fraction(str(span[0] or 0)), min(Fraction(str(span[1] or 99)), Fraction(97, 10))
    with open_source(keyed) as source:
        for fps, limit in product([None, Fraction(1, 3), Fraction(1), Fraction(5, 7)], [None, 1, 3, 5, 100]):
            sampling = Sampling(fps=fps, max_frames=limit, start=span[0], stop=span[1], keys=True)
            shots = source.reader.sample(source.plan(sampling))
            taken: list[Shot] = list(shots)  # type: ignore[call-overload]
            assert [shot.pts for shot in taken] == keys_by_hand(keys, stay, fps, limit, start, stop)
            pts, ends = [shot.pts for shot in taken], [shot.pts + shot.duration for shot in taken]
            gaps = [b - a for a, b in zip([start, *ends], [*pts, stop], strict=True)]
            assert min(gaps) >= 0 and shots.report.longest_gap == max(gaps)
            assert shots.report.mode == "keys" and shots.report.frames == len(taken)
            assert all(number_of(shot) == floor(10 * max(k for k in keys if k <= shot.pts)) for shot in taken)
            assert shots.stats.decoded <= len(keys)


def number_of(shot: Shot) -> int:
    return number(torch.from_numpy(shot.pixels))


def test_one_key_frame_is_said_to_be_the_only_one(tmp_path: Path) -> None:
    path = write(tmp_path / "one.mp4", even(50), gop=500, options={"sc_threshold": "0"})
    source = open_source(path)
    frames = source.frames(Sampling(keys=True))
    assert len(list(frames)) == 1
    assert "one key frame between 0 and 5 s; longest gap 4.9 s" in frames.report.notes[-1]
    with pytest.raises(SourceError, match="no key frame between 2 and 4 s"):
        list(source.frames(Sampling(keys=True, start=2, stop=4)))


def test_a_rate_that_key_frames_do_not_reach_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "few.mp4", even(60), gop=20, options={"sc_threshold": "0"})
    shots = open_source(path).frames(Sampling(fps=2, keys=True))
    assert [frame.pts for frame in shots] == [0, 2, 4]
    assert shots.report.notes == ("fps=2 is not reached: up to 1.9 s pass without a key frame",)
    thin = open_source(path).frames(Sampling(max_frames=2, keys=True))
    assert [frame.pts for frame in thin] == [0, 4]
    assert thin.report.notes == ("max_frames=2 takes that many of 3 key frames",)


natural = pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside this checkout")


def times_of(name: str, sampling: Sampling | None = None) -> tuple[list[float], SamplingReport]:
    reader = open_source(VIDEOS / name).reader
    shots, report = chosen(reader, sampling)
    return [float(shot.pts) for shot in shots], report


def truth(name: str) -> object:
    return json.loads((VIDEOS / "truth.json").read_text())[name]


@natural
def test_each_shot_has_a_frame_at_its_start() -> None:
    facts = truth("shots_testvideo.mp4")
    starts = [n * 1001 / 30000 for n in facts["pyscenedetect_golden_cuts_frame"]["content default"]]
    starts += [n * 1001 / 30000 for kind, n in facts["pyscenedetect_threshold_fades_frame"] if kind == "in"]
    times, _ = times_of("shots_testvideo.mp4")
    assert all(any(abs(time - start) <= 0.2 for time in times) for start in starts)
    times, _ = times_of("bbb_480p_30s.mp4")
    assert all(any(-0.01 <= time - cut <= 0.11 for time in times) for cut in truth("bbb_480p_30s.mp4")["cuts_s"])


@natural
@pytest.mark.parametrize(
    "name",
    ["car_detection.mp4", "hand_count_vfr.mp4", pytest.param("one_by_one_person.mp4", marks=pytest.mark.slow)],
)
def test_frames_go_where_something_happens(name: str) -> None:
    """Inside the events twice as dense at least as well outside of them, where the floor rules."""
    events = [(a, b) for a, b, _ in truth(name)]
    times, report = times_of(name)
    assert report.stop is not None
    inside = sum(b - a for a, b in events)
    away = [t for t in np.arange(0, float(report.stop), 0.1) if all(not a - 2 <= t < b + 2 for a, b in events)]
    in_events = sum(any(a <= time < b for a, b in events) for time in times) / inside
    outside = sum(all(not a - 2 <= time < b + 2 for a, b in events) for time in times) / (len(away) / 10)
    assert outside <= 1.25 and in_events >= 2 * outside
