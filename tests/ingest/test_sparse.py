"""Sparse reading: what comes out is what reading in order gives, and little is decoded for it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamvid.errors import SourceError
from streamvid.ingest import timeline
from streamvid.ingest.crew import Crew
from streamvid.ingest.disposable import Disposal, gives_picture
from streamvid.ingest.openers import FileOpener
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.pyav import PyavPictures, PyavReader
from streamvid.ingest.sampling import Plan, Sampler, Sampling, SamplingReport, Shot
from streamvid.ingest.sparse import sparse_plan, target_ticks
from streamvid.ingest.timeline import Distrust, Timeline
from tests.ingest.synthetic import even, write

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
SIZE = (16, 80)

PYRAMID = {"preset": "veryfast", "x264-params": "b-pyramid=normal:b-adapt=0:scenecut=0"}
VFR = [Fraction(t, 1000) for t in (0, 40, 200, 210, 1000, 1033, 1066, 4000, 4001, 4500, 4533, 4566, 7000, 8000, 9500)]
VP9 = {"g": "40", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}
QUIET = "log-level=error"

FILMS: dict[str, dict[str, object]] = {
    "h264.mp4": {"gop": 12},
    "h264-pyramid.mp4": {"gop": 30, "bframes": 3, "options": PYRAMID},
    "h264-open.mp4": {"gop": 10, "options": {"x264-params": "open-gop=1"}},
    "h264-refresh.mp4": {"gop": 30, "bframes": 0, "options": {"x264-params": "intra-refresh=1"}},
    "h264-intra.mp4": {"gop": 1, "bframes": 0},
    "h264-endless.mp4": {"gop": 1000},
    "h264-444.mp4": {"gop": 20, "kind": "mp4", "options": {"profile": "high444"}},
    "h264.mkv": {"gop": 12},
    "h264.mov": {"gop": 7, "bframes": 1},
    "h264-offset.mp4": {"gop": 9, "start": 3.7},
    "h264-fragments.mp4": {"gop": 10, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "h264-edit.mp4": {"gop": 12, "start": -0.7, "container": {"avoid_negative_ts": "disabled"}},
    "h264-vfr.mp4": {"gop": 5, "times": VFR},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": f"keyint=20:bframes=4:b-pyramid=1:{QUIET}"}},
    "hevc-open.mkv": {"codec": "libx265", "options": {"x265-params": f"keyint=15:open-gop=1:bframes=3:{QUIET}"}},
    "hevc-layers.mp4": {"codec": "libx265", "options": {"x265-params": f"keyint=20:temporal-layers=3:{QUIET}"}},
    "vp9-hidden.webm": {"codec": "libvpx-vp9", "options": VP9},
    "vp8-hidden.webm": {"codec": "libvpx", "options": {"g": "40", "auto-alt-ref": "1", "lag-in-frames": "16"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "30", "preset": "12"}},
    "mjpeg.mkv": {"codec": "mjpeg"},
    "h264.ts": {"gop": 12},
    "h264-open.ts": {"gop": 10, "bframes": 3, "options": {"x264-params": "open-gop=1"}},
    "h264-refresh.ts": {"gop": 30, "bframes": 0, "options": {"x264-params": "intra-refresh=1"}},
    "h264-gaps.ts": {"gop": 5, "times": [*VFR, 20, Fraction(201, 10), 40]},
    "hevc.ts": {"codec": "libx265", "options": {"x265-params": f"keyint=15:open-gop=1:bframes=3:{QUIET}"}},
    "h264.flv": {"gop": 12},
    "h264-no-index.mkv": {"gop": 12, "container": {"live": "1"}},
    "vp9-no-index.webm": {"codec": "libvpx-vp9", "options": VP9, "container": {"live": "1"}},
}
UNTIDY = {"h264-refresh.mp4", "h264-refresh.ts", "h264-gaps.ts"}
"""Films that are left to reading in order: pictures that are not whole at key frames, leaps in time."""


def reader(path: Path, threads: int | None = 2) -> PyavReader:
    made = PyavReader(FileOpener(path, path.name))
    made._film.threads = threads
    return made


def in_order(made: PyavReader, plan: Plan, size: tuple[int, int] | None = SIZE) -> Sampler:
    return Sampler(PyavPictures(made._film), plan, size=size, name=made.info.name)


def drained(shots: object) -> tuple[list[Shot], str | None]:
    """All shots, or why there are none."""
    try:
        return list(shots), None  # type: ignore[call-overload]
    except SourceError as reason:
        return [], str(reason)


def same(a: list[Shot], b: list[Shot]) -> bool:
    return len(a) == len(b) and all(
        (x.pts, x.duration) == (y.pts, y.duration) and np.array_equal(x.pixels, y.pixels)
        for x, y in zip(a, b, strict=True)
    )


def check(made: PyavReader, plan: Plan) -> tuple[DecodeStats, SamplingReport]:
    """Sparse reading gives what reading in order gives; what it counted."""
    assert sparse_plan(made._film, plan)
    plain, sparse = in_order(made, plan), made.sample(plan, size=SIZE)
    (expected, refusal), (got, other) = drained(plain), drained(sparse)
    assert same(got, expected) and refusal == other
    assert sparse.report == plain.report
    return sparse.stats, sparse.report


@pytest.fixture(scope="module", params=FILMS)
def film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PyavReader]:
    how = dict(FILMS[request.param])
    times = how.pop("times", None) or even(200, start=how.pop("start", 0))  # type: ignore[arg-type]
    path = write(tmp_path_factory.mktemp("films") / request.param, times, noise=20, **how)  # type: ignore[arg-type]
    with reader(path) as made:
        yield made


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_sparse_reading_gives_what_reading_in_order_gives(film: PyavReader, data: st.DataObject) -> None:
    duration = film.end - film.info.start
    span = st.fractions(0, 1, max_denominator=50)
    start = film.info.start + data.draw(span, "start") * duration * Fraction(9, 10)
    stop = data.draw(st.none() | span.map(lambda part: start + Fraction(1, 100) + part * duration), "stop")
    rate = data.draw(
        st.builds(lambda n: {"count": n}, st.integers(1, 40))
        | st.builds(lambda n: {"fps": n}, st.fractions(Fraction(1, 10), 25, max_denominator=10)),
        "rate",
    )
    most = data.draw(st.none() | st.integers(1, 30), "max_frames")
    film._film.threads = data.draw(st.sampled_from([1, 2, 5]), "threads")
    sampling = Sampling(start=start, stop=stop, max_frames=most, **rate)
    plan = film.plan(sampling)
    if film.info.duration is None:  # without an end in sight a film is read in order
        plan = replace(plan, stop=plan.stop or film.end)
    stats, _ = check(film, plan)
    if film.info.name not in UNTIDY:
        assert stats.restarts == 0 and stats.decoded <= 220


def test_edit_lists_hide_pictures_in_the_test_above(tmp_path: Path) -> None:
    how = {key: value for key, value in FILMS["h264-edit.mp4"].items() if key != "start"}
    path = write(tmp_path / "e.mp4", even(30, start=-0.7), **how)  # type: ignore[arg-type]
    with av.open(str(path)) as file:
        hidden = [packet.is_discard for packet in file.demux(video=0) if packet.size]
    assert 5 <= hidden.count(True) <= 9


@pytest.mark.parametrize(
    ("codec", "data", "picture"),
    [
        ("vp8", b"\x10\x02\x00", True),
        ("vp8", b"\x01\x02\x00", False),
        ("vp9", b"\x86\x00", True),  # shown
        ("vp9", b"\x84\x00", False),  # hidden
        ("vp9", b"\x88", True),  # an earlier one is shown
        ("vp9", b"\x84\x00\xc1\x00\xc1", True),  # a hidden and a shown one in one packet
        ("vp9", b"\xb1\x00", True),  # profile 3, shown
        ("vp9", b"\xb2\x00", False),  # profile 3, hidden
        ("h264", b"\x00", True),
    ],
)
def test_packets_without_a_picture_are_known(codec: str, data: bytes, picture: bool) -> None:
    one = av.Packet(data)
    assert gives_picture(codec, one) is picture  # type: ignore[arg-type]


def long_film(folder: Path, *, gop: int, bframes: int, count: int = 1500) -> PyavReader:
    options = {"x264-params": "scenecut=0:b-adapt=0"}
    return reader(write(folder / "long.mp4", even(count, fps=25), gop=gop, bframes=bframes, options=options))


def test_eight_frames_cost_no_more_than_eight_groups(tmp_path: Path) -> None:
    made = long_film(tmp_path, gop=30, bframes=0)
    plan = made.plan(Sampling(count=8, start=0.5))
    stats, _ = check(made, plan)
    assert plan.fps is not None
    pictures = [floor((plan.start + k / plan.fps) * 25) for k in range(8)]
    assert stats.decoded == sum(picture % 30 + 1 for picture in pictures) < 8 * 30
    assert stats.seeks == 7


def test_pictures_that_none_refers_to_are_not_decoded(tmp_path: Path) -> None:
    made = long_film(tmp_path, gop=250, bframes=3)
    plan = made.plan(Sampling(count=6, start=8))
    plain = in_order(made, plan)
    list(plain)
    stats, _ = check(made, plan)
    assert stats.decoded < 0.6 * plain.stats.decoded


def test_a_single_group_is_decoded_once(tmp_path: Path) -> None:
    made = long_film(tmp_path, gop=3000, bframes=0, count=600)
    stats, _ = check(made, made.plan(Sampling(fps=2)))
    assert 560 <= stats.decoded <= 600 and stats.seeks == 0


def test_neighbouring_groups_with_every_picture_wanted_are_read_on(tmp_path: Path) -> None:
    made = reader(write(tmp_path / "i.mp4", even(200), gop=1, bframes=0))
    stats, _ = check(made, made.plan(Sampling(fps=10)))
    assert stats.decoded == 200 and stats.seeks <= 200 // 16


def test_counts_do_not_depend_on_who_was_faster(tmp_path: Path) -> None:
    made = long_film(tmp_path, gop=12, bframes=2, count=400)
    made._film.threads = 4
    plan = made.plan(Sampling(count=30))
    assert len({tuple(check(made, plan)[0].as_dict().items()) for _ in range(5)}) == 1


def test_containers_are_opened_once_for_each_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "o.mp4", even(200))
    opened = []
    real = FileOpener.open
    monkeypatch.setattr(FileOpener, "open", lambda self: opened.append(1) or real(self))  # type: ignore[func-returns-value]
    for threads, most in ((1, 1), (2, 2)):
        opened.clear()
        with reader(path, threads) as made:
            assert len(opened) == 1
            assert len(list(made.sample(made.plan(Sampling(count=8))))) == 8  # type: ignore[call-overload]
        assert len(opened) <= most


@pytest.mark.parametrize("name", ["l.ts", "l.flv", "l.mkv"])
def test_without_an_index_all_packets_are_read_and_few_are_decoded(tmp_path: Path, name: str) -> None:
    container = {"live": "1"} if name == "l.mkv" else {}
    path = write(tmp_path / name, even(1500, fps=25), gop=30, bframes=0, container=container)
    made = reader(path)
    assert 60 <= made.end - made.info.start < 60 + Fraction(1, 10)
    plan = made.plan(Sampling(count=8, start=made.info.start + Fraction(1, 2)))
    stats, _ = check(made, plan)
    assert stats.restarts == 0 and stats.seeks <= 1
    assert stats.decoded < 8 * 30


def test_a_stream_recorded_from_the_middle_is_read_from_its_first_key_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "whole.ts", even(600, fps=25), gop=50, bframes=2)
    content = path.read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(content[188 * (len(content) // 188 // 17) :])
    made = reader(cut)
    with closing(av.open(str(cut))) as file:
        first = next(packet for packet in file.demux(video=0) if packet.pts is not None)
        assert not first.is_keyframe and first.pts * first.time_base < made.info.start
    stats, _ = check(made, made.plan(Sampling(count=6, start=made.info.start)))
    assert stats.restarts == 0 and stats.decoded < 300


@pytest.mark.parametrize("second", [Fraction(0), Fraction(5), Fraction(8), Fraction(100)])
def test_a_clock_that_starts_again_is_found_wherever_it_lies(tmp_path: Path, second: Fraction) -> None:
    parts = [
        write(tmp_path / f"{k}.ts", even(200, fps=25, start=start), gop=25, first=200 * k).read_bytes()
        for k, start in enumerate((Fraction(0), second))
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(parts))
    made = reader(path)
    for count in (3, 7, 40):
        plain = in_order(made, plan := made.plan(Sampling(count=count, stop=made.info.start + 16)))
        sparse = made.sample(plan, size=SIZE)
        assert same(list(sparse), list(plain)), count
        assert sparse.stats.jumps == plain.stats.jumps


def test_packets_that_wait_for_a_key_frame_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "w.ts", even(400, fps=25), gop=390, noise=20)
    made = reader(path)
    plan = made.plan(Sampling(count=2))
    most = []
    real = timeline.Timeline.add
    monkeypatch.setattr(timeline.Timeline, "add", lambda self, one: most.append(self._waiting_bytes) or real(self, one))  # type: ignore[func-returns-value]
    check(made, plan)
    assert max(most) > 50_000
    whole = max(most)
    most.clear()
    monkeypatch.setattr(timeline, "_MOST_WAITING_BYTES", 20_000)
    check(made, plan)
    assert 20_000 <= max(most) < whole / 2


def test_times_long_past_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_MOST_TIMES", 64)
    lengths = []
    real = timeline.Timeline.add
    monkeypatch.setattr(timeline.Timeline, "add", lambda self, one: lengths.append(len(self._times)) or real(self, one))  # type: ignore[func-returns-value]
    made = reader(write(tmp_path / "t.ts", even(1500, fps=25), gop=30, bframes=2))
    for sampling in (Sampling(count=5), Sampling(fps=2), Sampling(count=3, start=made.info.start + 20)):
        check(made, made.plan(sampling))
    assert len(lengths) > 3000 and max(lengths) < 64 + 2 * 30


@pytest.mark.parametrize("threads", [1, 2])
def test_a_group_that_does_not_decode_is_read_in_order(tmp_path: Path, threads: int) -> None:
    """Bytes in the middle are overwritten; pictures before and after are the same ones as in order."""
    path = write(tmp_path / "d.mp4", even(120), gop=20, size=(64, 320), noise=30)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes()
    path.write_bytes(content)
    made = reader(path, threads)
    for count in (6, 40):
        plan = made.plan(Sampling(count=count))
        plain, sparse = in_order(made, plan), made.sample(plan, size=SIZE)
        expected, got = list(plain), list(sparse)  # type: ignore[call-overload]
        assert sparse.stats.restarts >= 1 and sparse.stats.damaged + sparse.stats.skipped > 0
        assert [shot.pts for shot in got] == [shot.pts for shot in expected]
        wrong = [a.pts for a, b in zip(got, expected, strict=True) if not np.array_equal(a.pixels, b.pixels)]
        assert all(6 <= pts < 8 for pts in wrong)  # nobody agrees with himself on what a damaged group shows


def test_interlaced_and_unbounded_films_are_left_to_reading_in_order(tmp_path: Path) -> None:
    made = reader(write(tmp_path / "i.mp4", even(20), options={"x264-params": "tff=1"}, size=(64, 160)))
    assert not sparse_plan(made._film, made.plan(Sampling(count=3)))
    made = reader(write(tmp_path / "p.mp4", even(20)))
    plan = made.plan(Sampling(count=3))
    assert sparse_plan(made._film, plan)
    assert not sparse_plan(made._film, replace(plan, stop=None))
    assert not sparse_plan(made._film, replace(plan, fps=None))
    assert not sparse_plan(made._film, replace(plan, keys=True))


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_early_ends_threads_and_closes_files(tmp_path: Path, taken: int) -> None:
    path = write(tmp_path / "e.mp4", even(300))
    made = reader(path, 4)
    shots = made.sample(made.plan(Sampling(count=40)), size=SIZE)
    for _ in range(taken):
        next(shots)
    shots.close()
    shots.close()
    made.close()
    assert not any(thread.name.startswith("streamvid-decode") for thread in threading.enumerate())
    assert str(path) not in {file.path for file in psutil.Process().open_files()}


def test_forgotten_passes_let_go_of_their_threads(tmp_path: Path) -> None:
    made = reader(write(tmp_path / "f.mp4", even(300)), 4)
    shots = made.sample(made.plan(Sampling(count=40)), size=SIZE)
    next(shots)
    del shots
    gc.collect()
    assert not any(thread.name.startswith("streamvid-decode") for thread in threading.enumerate())


def test_a_program_ends_with_a_pass_half_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mp4", even(300))
    program = (
        "from pathlib import Path\n"
        "from streamvid.ingest.openers import FileOpener\n"
        "from streamvid.ingest.pyav import PyavReader\n"
        "from streamvid.ingest.sampling import Sampling\n"
        f"made = PyavReader(FileOpener(Path({str(path)!r}), 'x'))\n"
        "made._film.threads = 4\n"
        "shots = made.sample(made.plan(Sampling(count=60)))\n"
        "print(next(shots).pixels.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(32, 160, 3)\n", "")


def test_errors_of_a_thread_reach_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = reader(write(tmp_path / "g.mp4", even(300)), 4)
    shots = made.sample(made.plan(Sampling(count=40)), size=SIZE)

    def gone(_: FileOpener) -> None:
        raise SourceError("g.mp4 is gone")

    monkeypatch.setattr(FileOpener, "open", gone)
    with pytest.raises(SourceError, match=r"g\.mp4 is gone"):
        list(shots)  # type: ignore[call-overload]
    assert not any(thread.name.startswith("streamvid-decode") for thread in threading.enumerate())


class Counting:
    """Makes numbers and counts those that wait."""

    def __init__(self, each: int) -> None:
        self.each = each
        self.made = self.most = self.closed = 0
        self.lock = threading.Lock()

    def read(self, part: int) -> Iterator[int]:
        for place in range(self.each):
            with self.lock:
                self.made += 1
            yield part * self.each + place

    def close(self) -> None:
        with self.lock:
            self.closed += 1


@pytest.mark.parametrize("each", [1, 7])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_waits_is_bounded_and_comes_in_order(each: int, workers: int) -> None:
    hand = Counting(each)
    crew: Crew[int] = Crew(lambda _: hand, parts=20, limit=4, workers=workers)
    got = []
    while (taken := crew.take()) is not None:
        got.append(taken)
        if taken % 10 == 3:
            time.sleep(0.002)  # time enough to run ahead
        # Besides those that wait, and one more, every worker has one in hand.
        assert hand.made - len(got) <= 4 + 1 + workers
    crew.close()
    assert got == list(range(20 * each))
    assert hand.closed == max(workers, 1)


def test_a_failing_part_fails_where_it_would_have_come() -> None:
    class Failing(Counting):
        def read(self, part: int) -> Iterator[int]:
            if part == 5:
                raise ValueError("five")
            yield from super().read(part)

    hand = Failing(2)
    crew: Crew[int] = Crew(lambda _: hand, parts=20, limit=4, workers=3)
    assert [crew.take() for _ in range(10)] == list(range(10))
    with pytest.raises(ValueError, match="five"):
        crew.take()
    crew.close()
    assert crew.take() is None and hand.closed == 3


@given(st.fractions(0, 100, max_denominator=997), st.fractions(Fraction(1, 50), 60, max_denominator=100), st.data())
def test_targets_in_ticks_are_targets_rounded_down(start: Fraction, fps: Fraction, data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([Fraction(1, 1000), Fraction(1, 12800), Fraction(1001, 30000), Fraction(1, 25)]))
    stop = start + data.draw(st.fractions(Fraction(1, 1000), 20, max_denominator=1000))
    ticks = target_ticks(Plan(start, stop, fps), base)
    targets = [start + k / fps for k in range(len(ticks) + 1)]
    assert [t // base for t in targets[:-1]] == ticks
    assert targets[-2] < stop <= targets[-1]
    assert target_ticks(Plan(start, stop, fps, max_frames=3), base) == ticks[:3]


def packet(pts: int, *, key: bool = False, hidden: bool = False, size: int = 9) -> SimpleNamespace:
    return SimpleNamespace(pts=pts, dts=None, size=size, is_keyframe=key, is_discard=hidden, is_corrupt=False)


@given(st.data())
def test_packets_tell_what_is_on_screen_before_they_are_decoded(data: st.DataObject) -> None:
    """Pictures in any order that a decoder can mend, some hidden: found are those a full list would tell."""
    gaps = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=60))
    shown = [sum(gaps[:k]) for k in range(len(gaps))]
    order = list(shown[:1])
    waiting = list(shown[1:])
    overtaken = 0
    while waiting:
        place = data.draw(st.integers(0, min(3, len(waiting) - 1 if overtaken < 16 else 0)))
        overtaken = overtaken + 1 if place else 0
        order.append(waiting.pop(place))
    hidden = {pts for pts in order[1:] if data.draw(st.integers(0, 9)) == 0}
    targets = sorted(data.draw(st.sets(st.integers(0, shown[-1] + 20), min_size=1, max_size=9)))
    line = Timeline("h264", targets, 10**9)
    decided = []
    for number, pts in enumerate(order):
        line.add(packet(pts, key=not number, hidden=pts in hidden))  # type: ignore[arg-type]
        decided += list(line.decided())
    line.add(packet(0, size=0))  # type: ignore[arg-type]
    decided += list(line.decided())
    times = [pts for pts in shown if pts not in hidden]
    expected: dict[int, int] = {}
    for target in targets:
        own = times[bisect_right(times, target) - 1]
        expected[own] = expected.get(own, 0) + 1
    spots = [spot for _, spot in decided if spot is not None]
    assert {spot.pts: spot.targets for spot in spots} == expected and line.left == 0
    assert all(spot.gone == min((pts for pts in times if pts > spot.pts), default=None) for spot in spots)
    # Decoding ends with the last wanted picture in decoding order.
    assert [one.pts for one, _ in decided] == order[: max(order.index(pts) for pts in expected) + 1]


@pytest.mark.parametrize(
    "packets",
    [
        [packet(0)],  # no key frame
        [packet(9, key=True)],  # the key frame comes too late
        [packet(0, key=True), packet(4), packet(4)],  # one time twice
        [packet(0, key=True), packet(None)],  # type: ignore[arg-type]
        [packet(0, key=True), *(packet(k) for k in range(10, 30)), packet(4)],  # later than any decoder holds back
        [packet(0, key=True), *(packet(k * 1000) for k in range(1, 30))],  # a leap
    ],
)
def test_odd_packets_are_not_trusted(packets: list[SimpleNamespace]) -> None:
    line = Timeline("h264", [2, 25], 100)
    with pytest.raises(Distrust):
        for one in packets:
            line.add(one)  # type: ignore[arg-type]
            list(line.decided())


def packets_of(folder: Path, name: str) -> tuple[bytes, list[av.Packet]]:
    """The parameters and packets of a film of 60 pictures."""
    path = write(folder / name, even(60), noise=20, **FILMS[name])  # type: ignore[arg-type]
    with av.open(str(path)) as file:
        record = file.streams.video[0].codec_context.extradata
        return record or b"", [packet for packet in file.demux(video=0) if packet.size]


def test_hevc_pictures_are_passed_over_in_the_highest_layer_only(tmp_path: Path) -> None:
    record, packets = packets_of(tmp_path, "hevc.mp4")
    assert all(map(Disposal("hevc", record).passed_over, packets))
    for unclear in (record[:40], b"", None):
        assert not any(map(Disposal("hevc", unclear).passed_over, packets))
    record, packets = packets_of(tmp_path, "hevc-layers.mp4")
    highest = [Disposal("hevc", record).passed_over(one) for one in packets]
    layers = [(bytes(one)[5] & 7) - 1 for one in packets[1:]]  # the first one has parameters before its picture
    assert set(layers) == {0, 1, 2}
    assert highest[1:] == [layer == 2 for layer in layers]


def test_av1_frames_that_are_kept_nowhere_are_not_sent(tmp_path: Path) -> None:
    record, packets = packets_of(tmp_path, "av1.mp4")
    disposal = Disposal("av1", record)

    def shown(some: Iterator[av.Packet | None]) -> dict[int | None, bytes]:
        context = av.CodecContext.create("libdav1d", "r")
        context.extradata = record
        frames = [frame for one in (*some, None) for frame in context.decode(one)]  # type: ignore[attr-defined]
        return {frame.pts: frame.to_ndarray().tobytes() for frame in frames}

    everything = shown(iter(packets))
    needed = [disposal.needed(one) for one in packets]  # type: ignore[arg-type]
    rest = shown(one for one in needed if one is not None)
    assert len(everything) == 60 and 20 < len(rest) < 45
    assert all(everything[pts] == picture for pts, picture in rest.items())
    assert any(one is None for one in needed) and any(one not in packets for one in needed if one is not None)
    damaged = av.Packet(bytes(packets[1])[:9])
    assert disposal.needed(damaged) is damaged  # type: ignore[arg-type]


def test_packets_of_other_codecs_are_sent_whole(tmp_path: Path) -> None:
    record, packets = packets_of(tmp_path, "vp9-hidden.webm")
    disposal = Disposal("vp9", record)
    assert not any(map(disposal.passed_over, packets))
    assert all(disposal.needed(one) is one for one in packets)  # type: ignore[arg-type]
    assert Disposal("h264", None).passed_over(packets[0])  # type: ignore[arg-type]


ORDINARY = {"no_timescale.mp4", "sample_with_invalid_nalu.mp4"}
"""Damaged files whose pictures depend on where decoding begins and on what is passed over."""

SHARED = sorted(p for p in VIDEOS.glob("*/*") if p.suffix not in {".txt", ".json"} and p.name not in ORDINARY)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.name)
def test_shared_films_are_the_same_in_order_and_sparse(path: Path) -> None:
    try:
        made = reader(path)
    except SourceError:
        pytest.skip("holds no picture")
    start, duration = made.info.start, made.info.duration
    if duration is None or not made._film.sparse:
        pytest.skip("read in order")
    for sampling in (
        Sampling(count=1),
        Sampling(count=8),
        Sampling(count=5, start=start + duration / 3),
        Sampling(fps=3, max_frames=40, start=start + duration / 5, stop=start + duration * Fraction(7, 10)),
        Sampling(fps=40, stop=start + min(duration, Fraction(2))),
    ):
        check(made, made.plan(sampling))
