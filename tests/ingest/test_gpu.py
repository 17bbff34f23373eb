"""Decoding by a GPU gives the pictures that decoding by the processor gives, within rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamvid.ingest import Sampling, open_source
from tests.ingest.synthetic import even, write


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(count=5), Sampling(fps=3, start=2)])
def test_pictures_decoded_by_cuda_are_those_of_the_processor(tmp_path: Path, sampling: Sampling) -> None:
    path = write(tmp_path / "a.mp4", even(60), size=(144, 320), noise=20)
    with open_source(path, hwaccel="cuda") as fast, open_source(path) as usual:
        assert not any("in software" in note for note in fast.info.notes)
        ours, theirs = list(fast.frames(sampling)), list(usual.frames(sampling))
    assert [(a.pts, a.duration) for a in ours] == [(b.pts, b.duration) for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.pixels.int() - b.pixels.int()).abs().max() <= 3
