"""The clock of a live source that leaps, against when its pictures come; pictures without a clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from streamvid.ingest.live import LiveReader
from streamvid.ingest.openers import FileOpener
from streamvid.ingest.sampling import Sampling, Shot
from tests.ingest.synthetic import even, write


@dataclass(frozen=True)
class Camera(FileOpener):
    """A file that is taken for something that comes as it is read."""

    live: bool = True
    slack: Fraction | None = Fraction(0)
    timeless: bool = False


def watched(
    path: Path, came: Sequence[float], monkeypatch: pytest.MonkeyPatch, fps: float | None = None, **how: object
) -> tuple[list[Shot], int]:
    """What is given of a film whose pictures come at these moments, and how often its clock jumped."""
    clock: Iterator[float] = iter([1000 + at for at in came])
    monkeypatch.setattr("streamvid.ingest.pyav.steady", lambda: next(clock))
    reader = LiveReader(Camera(path, "a camera", **how))  # type: ignore[arg-type]
    shots = reader.sample(reader.plan(Sampling(fps=fps)))
    given = list(shots)  # type: ignore[call-overload]
    reader.close()
    return given, shots.stats.jumps


def test_an_hour_that_only_the_clock_saw_is_not_filled_with_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled at 1 a second, the picture before the leap would be given 3,600 times."""
    path = write(tmp_path / "a.mkv", [*even(50), *even(50, start=3605)], bframes=0)
    came = [k / 10 for k in range(100)]
    shots, jumps = watched(path, came, monkeypatch, 1)
    assert [round(float(shot.pts), 2) for shot in shots] == [float(k) for k in range(10)] and jumps == 1
    assert all(shot.duration < 2 for shot in shots)


@pytest.mark.parametrize("leap", [5, 9, 20])
def test_short_leaps_are_seen_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leap: int) -> None:
    path = write(tmp_path / "a.mkv", [*even(30), *even(30, start=3 + leap)], bframes=0)
    shots, jumps = watched(path, [k / 10 for k in range(60)], monkeypatch, 2)
    assert len(shots) == 12 and jumps == 1


def test_time_in_which_nothing_came_is_no_leap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mkv", [*even(30), *even(30, start=23)], bframes=0)
    shots, jumps = watched(path, [*(k / 10 for k in range(30)), *(23 + k / 10 for k in range(30))], monkeypatch, 1)
    assert jumps == 0 and float(shots[-1].pts) == pytest.approx(25)


def test_pictures_that_the_network_kept_are_no_leap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture in four seconds; the network stands still for twelve and then brings three at once."""
    path = write(tmp_path / "a.mkv", [Fraction(4 * k) for k in range(8)], bframes=0)
    shots, jumps = watched(path, [0, 4, 8, 20, 20.1, 20.2, 24, 28], monkeypatch)
    assert [float(shot.pts) for shot in shots] == [4.0 * k for k in range(8)] and jumps == 0


@pytest.mark.parametrize("slack, leaps", [(0, True), (20, False)])
def test_what_may_come_at_once_is_no_leap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slack: int, leaps: bool
) -> None:
    path = write(tmp_path / "a.mkv", [0, 6, 12, 18], bframes=0)
    assert (watched(path, [0, 0, 0, 6], monkeypatch, slack=Fraction(slack))[1] > 0) == leaps


def test_pictures_without_times_appear_when_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mkv", even(6), bframes=0)
    came = [0, 0.2, 0.5, 0.5, 2, 2.25]
    shots, _ = watched(path, came, monkeypatch, timeless=True)
    assert [float(shot.pts) for shot in shots] == [0, 0.2, 0.5, 0.501, 2, 2.25]
