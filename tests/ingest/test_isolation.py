"""Decoding in another process: what it does to the frames, and what a crash there does to the program."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from streamvid.errors import SourceError
from streamvid.ingest.buffer import Ahead, Buffer, Policy
from streamvid.ingest.isolation import POOL, Gone, Process, RemoteReader
from streamvid.ingest.openers import FileOpener
from streamvid.ingest.pyav import PyavReader
from streamvid.ingest.sampling import Sampling
from streamvid.ingest.source import Source
from streamvid.ingest.worker import Open
from tests.ingest.hostile import HostileReader, loaded, pid
from tests.ingest.synthetic import even, write

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc are used")


def hostile(what: str, at: int = 3, *, stall_seconds: float = 30, ahead: Ahead | None = None, **more: object) -> Source:
    make = partial(HostileReader, what, at, **more)  # type: ignore[arg-type]
    return Source(RemoteReader(make, name="x", stall_seconds=stall_seconds, ahead=ahead))


def numbers(source: Source, **sampling: object) -> list[int]:
    return [int(frame.pixels[0, 0, 0]) for frame in source.frames(Sampling(**sampling))]  # type: ignore[arg-type]


def test_another_process_gives_the_very_same_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", even(40))
    here = Source(PyavReader(FileOpener(path, "a.mp4")))
    with Source(RemoteReader(partial(PyavReader, FileOpener(path, "a.mp4")), name="a.mp4")) as there:
        assert there.info == here.info
        for sampling in (Sampling(), Sampling(fps=3), Sampling(count=5, start=1), Sampling(max_frames=7)):
            expected, got = list(here.frames(sampling)), list(there.frames(sampling))
            assert [(f.pts, f.duration) for f in got] == [(f.pts, f.duration) for f in expected]
            assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(got, expected, strict=True))
            assert there.stats == here.stats and there.report == here.report
        assert there.end == here.end
        assert there.count_pictures(here.info.start, here.end) == 40
        small = next(iter(there.frames(Sampling(), size=(12, 20))))
        assert small.pixels.shape == (12, 20, 3)


@pytest.mark.parametrize("what, reason", [("crash", "crash (SIGSEGV)"), ("exit", "crash (exit code 3)")])
def test_a_crash_is_an_error_that_says_where(what: str, reason: str) -> None:
    with hostile(what) as source:
        taken = source.frames()
        assert [int(next(taken).pixels[0, 0, 0]) for _ in range(2)] == [0, 1]
        with pytest.raises(SourceError) as caught:
            next(taken)
        assert reason in str(caught.value) and "after 1.000 s" in str(caught.value)
        with pytest.raises(StopIteration):
            next(taken)
        # The next pass starts a process of its own and fails at the same place, not earlier.
        assert len(list(zip(range(2), source.frames(), strict=False))) == 2


def test_a_process_that_is_about_to_end_is_asked_nothing_more() -> None:
    """The pipes of a process close before it has ended, on a busy machine long before: it was taken for one at rest,
    and whoever asked it next waited for the stall limit.  Here that time does not pass at all.
    """
    POOL.close()
    with hostile("fade") as source:
        taken = source.frames()
        next(taken)
        shots = taken._shots
        assert shots._process._idle.wait(10)  # type: ignore[attr-defined]
        dying = shots._process  # type: ignore[attr-defined]
        taken.close()
        assert dying._process.poll() is not None and not dying.alive
    with hostile("none", stall_seconds=20) as other:
        assert numbers(other) == [0, 1, 2, 3, 4, 5]


def test_asking_a_process_that_ended_fails_at_once() -> None:
    process = Process()
    process.kill()
    while not process._gone:
        time.sleep(0.01)
    replies: Buffer[object] = Buffer(1)
    process.request(Open(1, partial(HostileReader, "none", 0)), replies)
    with pytest.raises(Gone):
        replies.get(timeout=0)
    assert process.end() == "SIGKILL"


@pytest.mark.parametrize("what", ["crash", "hang", "refuse", "blunder"])
def test_opening_may_fail_in_every_way(what: str) -> None:
    with pytest.raises(SourceError) as caught:
        hostile(what, opening=True, stall_seconds=2)
    assert "\n" not in str(caught.value)


def test_a_hang_is_given_up_and_its_process_ended() -> None:
    with hostile("hang", stall_seconds=2) as source:
        running = source.reader.call(pid)  # type: ignore[union-attr]
        taken = source.frames()
        for _ in range(2):  # the third waits for the fourth, to know when it goes
            next(taken)
        with pytest.raises(SourceError, match=r"no progress for 2 s after 1.000 s"):
            next(taken)
        assert not psutil.pid_exists(running) or psutil.Process(running).status() == psutil.STATUS_ZOMBIE


def test_slow_is_not_stalled() -> None:
    with hostile("dawdle", stall_seconds=2.5) as source:
        assert numbers(source) == [0, 1, 2, 3, 4, 5]


def test_a_slow_taker_is_not_a_stall() -> None:
    with hostile("none", stall_seconds=2, ahead=Ahead(frames=1)) as source:
        taken = source.frames()
        next(taken)
        time.sleep(3)
        assert len(list(taken)) == 5


def test_refusals_come_over_as_they_are() -> None:
    with hostile("refuse") as source, pytest.raises(SourceError, match=r"^the tape is torn; mend it$"):
        numbers(source)


def test_mistakes_of_ours_are_one_line_with_the_traceback_noted() -> None:
    with hostile("blunder") as source, pytest.raises(SourceError) as caught:
        numbers(source)
    assert "ZeroDivisionError: a mistake of ours" in str(caught.value) and "\n" not in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]


def test_an_early_end_keeps_the_process_for_the_next_pass() -> None:
    with hostile("none", count=10**6) as source:
        first = source.reader.call(pid)  # type: ignore[union-attr]
        for _ in range(3):
            taken = source.frames()
            next(taken)
            taken.close()
            taken.close()
        assert source.reader.call(pid) == first  # type: ignore[union-attr]


def test_a_pass_nobody_holds_any_more_lets_go() -> None:
    with hostile("none", count=10**6) as source:
        first = source.reader.call(pid)  # type: ignore[union-attr]
        shots = source.reader.sample(source.plan(Sampling()))
        next(shots)
        del shots
        gc.collect()
        assert source.reader.call(pid) == first  # type: ignore[union-attr]


def test_passes_side_by_side_have_processes_of_their_own() -> None:
    with hostile("none") as source:
        one, two = source.frames(), source.frames()
        pairs = [(int(a.pixels[0, 0, 0]), int(b.pixels[0, 0, 0])) for a, b in zip(one, two, strict=True)]
        assert pairs == [(k, k) for k in range(6)]


def test_what_cannot_be_taken_along_stays_where_it_was_opened() -> None:
    with hostile("none", live=True) as source:
        first = source.reader.call(pid)  # type: ignore[union-attr]
        other = hostile("none")
        other.close()
        assert source.reader.call(pid) == first  # type: ignore[union-attr]
        assert numbers(source, stop=4) == [0, 1, 2, 3]
    assert not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE


def test_waiting_loses_nothing_and_dropping_is_counted() -> None:
    with hostile("none", count=60, ahead=Ahead(frames=4)) as source:
        assert numbers(source) == list(range(60)) and source.stats.dropped == 0
    for policy, kept in ((Policy.DROP_OLDEST, [56, 57, 58, 59]), (Policy.DROP_NEWEST, [0, 1, 2, 3])):
        with hostile("none", count=60, ahead=Ahead(frames=4, policy=policy)) as source:
            taken = source.frames()
            shots = taken._shots
            while not shots._process.idle:  # type: ignore[attr-defined]
                time.sleep(0.01)
            assert [int(frame.pixels[0, 0, 0]) for frame in taken] == kept
            assert taken.stats.dropped == 56


def test_the_ring_is_as_large_as_asked_and_leaves_no_file() -> None:
    places = [place for place in ("/dev/shm", os.environ.get("TMPDIR", "/tmp")) if os.path.isdir(place)]

    def rings() -> set[str]:
        return {name for place in places for name in os.listdir(place) if name.startswith("streamvid-")}

    before = rings()
    POOL.close()  # a worker at rest has a ring
    with hostile("none", count=20, ahead=Ahead(frames=3)) as source:
        taken = source.frames(size=(100, 200))
        ring = taken._shots._ring  # type: ignore[attr-defined]
        assert len(ring.memory) == (3 + 1) * 100 * 200 * 3
        next(taken)
        assert rings() == before
        taken.close()
        for side, same in ((50, True), (100, True), (120, False)):
            taken = source.frames(size=(side, 200))
            numbers = [int(frame.pixels[0, 0, 0]) for frame in taken]
            assert numbers == list(range(20))
            assert (taken._shots._ring is ring) == same  # type: ignore[attr-defined]
            assert rings() == before
    assert rings() == before


def test_a_worker_at_rest_keeps_no_large_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamvid.ingest.isolation._RESTING_BYTES", 3 * 100 * 200 * 3)
    POOL.close()
    with hostile("none", count=4, ahead=Ahead(frames=3)) as source:
        rings = []
        for side in (50, 50, 100, 100):
            taken = source.frames(size=(side, 200))
            assert len(list(taken)) == 4
            rings.append(taken._shots._ring)  # type: ignore[attr-defined]
    assert rings[0] is rings[1] and len({id(ring) for ring in rings}) == 3
    assert [ring.memory.closed for ring in rings] == [True, True, True, True]


def test_nothing_outlives_a_program_that_is_killed() -> None:
    program = (
        "import sys, time\n"
        "from functools import partial\n"
        "from streamvid.ingest.isolation import RemoteReader\n"
        "from tests.ingest.hostile import HostileReader, pid\n"
        "reader = RemoteReader(partial(HostileReader, 'none', 3), name='x')\n"
        "print(reader.call(pid), flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        worker = psutil.Process(int(running.stdout.readline()))
        running.kill()
        running.wait()
    assert worker.wait(timeout=10) is not None or not worker.is_running()


def test_the_decoding_process_does_without_torch() -> None:
    with hostile("none") as source:
        assert source.reader.call(loaded, "torch") is False  # type: ignore[union-attr]


@pytest.fixture(autouse=True, scope="module")
def rest() -> object:
    yield None
    POOL.close()
