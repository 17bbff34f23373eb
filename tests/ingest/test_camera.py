"""Cameras of this machine: what is said where there is none, test pictures in their place, real ones where they are."""

from __future__ import annotations

import glob
import sys
import time

import pytest

from streamvid.errors import SourceError
from streamvid.frames import Frame
from streamvid.ingest import Notice, Patience, Sampling, Supervised, open_source

DEVICES = sorted(glob.glob("/dev/video*"))


@pytest.mark.skipif(sys.platform != "linux", reason="the hint names devices of Linux")
def test_a_camera_that_is_not_there_is_told_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SourceError, match="camera:77 is not there; this machine (has /dev/video|shows no camera; plug)"
    ):
        open_source("camera:77")
    first = next(iter(Supervised("camera:77", tick=20, patience=Patience(stall_seconds=5, insist=True))))
    assert isinstance(first, Notice) and first.kind == "retry" and "is not there; trying again" in first.text


def test_test_pictures_in_real_time_are_watched_as_a_camera_is() -> None:
    with Supervised("lavfi:testsrc=rate=10:size=64x48,realtime", live=True, sampling=5) as watched:
        assert watched.live
        begun, frames = time.monotonic(), list[Frame]()
        while len(frames) < 12:
            item = next(watched)
            frames += [item] if isinstance(item, Frame) else []
        steps = {round(float(b.pts - a.pts), 3) for a, b in zip(frames, frames[1:], strict=False)}
        assert steps == {0.2} and 1.5 < time.monotonic() - begun < 12


@pytest.mark.skipif(not DEVICES, reason="no /dev/video* here: no camera, and no v4l2loopback to stand in for one")
def test_a_real_camera_gives_pictures_with_rising_times() -> None:
    with open_source(f"camera:{DEVICES[0]}", stall_seconds=10) as source:
        frames = list(source.frames(Sampling(fps=5, stop=2)))
        assert source.info.live and 5 < len(frames) <= 10
        assert all(a.pts < b.pts for a, b in zip(frames, frames[1:], strict=False))
