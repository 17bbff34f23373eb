"""Clips: grouping, and what is held in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from streamvid.frames import Frame
from streamvid.ingest.clips import clips


def stream(count: int, alive: list[weakref.ref[torch.Tensor]]) -> Iterator[Frame]:
    for k in range(count):
        pixels = torch.full((2, 2, 3), k % 256, dtype=torch.uint8)
        alive.append(weakref.ref(pixels))
        yield Frame(pixels, Fraction(k), Fraction(1))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 32])
def test_clips_hold_all_frames_in_order(count: int) -> None:
    got = list(clips(stream(count, []), 8))
    assert [p for clip in got for p in clip.pts] == list(range(count))
    assert all(len(clip) == 8 for clip in got[:-1]) and 1 <= len(got[-1]) <= 8


def test_no_frames_no_clips() -> None:
    assert list(clips([], 4)) == []


def test_one_clip_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    batches: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for clip in clips(stream(64, alive), 8):
        batches.append(weakref.ref(clip.pixels))
        most = max(most, sum(ref() is not None for ref in batches))
        # The frames are in the clip now; only the one the source is at may still live.
        assert sum(ref() is not None for ref in alive) <= 1
        del clip
    assert most == 1


@pytest.mark.parametrize("size", [0, 1, 3, -2])
def test_clip_size_must_be_even(size: int) -> None:
    with pytest.raises(ValueError, match="even"):
        clips([], size)
