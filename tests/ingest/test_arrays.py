"""Frames in memory: layouts and kinds, times that must be given, views instead of copies."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest.arrays import ArrayReader
from streamvid.ingest.sampling import Sampling, Shot
from tests.ingest.drawn import exif, smooth

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
PLANES = np.ascontiguousarray(FRAMES.transpose(0, 3, 1, 2))


def read(reader: ArrayReader, sampling: Sampling | None = None, size: tuple[int, int] | None = None) -> list[Shot]:
    return list(reader.sample(reader.plan(sampling or Sampling()), size=size))  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    "frames",
    [
        FRAMES,
        PLANES,
        torch.from_numpy(FRAMES),
        torch.from_numpy(PLANES),
        torch.from_numpy(FRAMES).float().div(255).requires_grad_(),
        FRAMES / 255,
        (FRAMES / 255).astype(np.float32),
        (PLANES / 255).astype(np.float16),
        list(FRAMES),
        tuple(PLANES),
        [torch.from_numpy(frame) for frame in PLANES],
        [Image.fromarray(frame) for frame in FRAMES],
        [FRAMES[0], PLANES[1], Image.fromarray(FRAMES[2]), torch.from_numpy(FRAMES[3]), FRAMES[4] / 255],
        np.asfortranarray(FRAMES),
        np.broadcast_to(FRAMES, FRAMES.shape),
    ],
)
def test_every_layout_gives_the_same_pictures(frames: Any) -> None:
    reader = ArrayReader(frames, fps=10)
    shots = read(reader)
    assert [shot.pts for shot in shots] == [Fraction(k, 10) for k in range(5)]
    assert all(np.array_equal(shot.pixels, frame) for shot, frame in zip(shots, FRAMES, strict=True))
    assert all(torch.from_numpy(shot.pixels).is_contiguous() for shot in shots)  # warns if it may not be written to
    info = reader.info
    assert (info.height, info.width, info.duration, info.average_rate) == (12, 16, Fraction(1, 2), 10)
    assert (info.container, info.decoder, info.notes) == ("arrays", "numpy", ())
    assert reader.identity() == ArrayReader(FRAMES, fps=10).identity()


def test_where_both_layouts_fit_rgb_is_last() -> None:
    frames = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)
    assert np.array_equal(read(ArrayReader(frames, fps=1))[1].pixels, frames[1])


@pytest.mark.parametrize("frames", [FRAMES, list(FRAMES), torch.from_numpy(FRAMES)])
def test_frames_are_views(frames: Any) -> None:
    reader = ArrayReader(frames, fps=10)
    assert all(
        np.shares_memory(shot.pixels, frame) for shot, frame in zip(read(reader), np.asarray(FRAMES), strict=True)
    )
    assert not any(np.shares_memory(shot.pixels, FRAMES) for shot in read(reader, size=(6, 8)))


def test_memory_that_may_not_be_written_to_is_copied_frame_by_frame(tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", FRAMES)
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    shots = read(ArrayReader(mapped, fps=10))
    assert all(shot.pixels.flags.writeable and not np.shares_memory(shot.pixels, mapped) for shot in shots)
    assert np.array_equal(shots[4].pixels, FRAMES[4])


def test_times_are_those_given() -> None:
    times = [0.1, Fraction(1, 3), 2, np.float64(2.5), 4]
    reader = ArrayReader(FRAMES, times=times)
    shots = read(reader)
    assert [shot.pts for shot in shots] == [Fraction(1, 10), Fraction(1, 3), 2, Fraction(5, 2), 4]
    assert shots[-1].duration == Fraction(3, 2)
    assert reader.info.start == Fraction(1, 10) and reader.end == Fraction(11, 2)
    assert reader.info.time_base == Fraction(1, 30)
    assert reader.info.notes == ("the last frame stays as long as the one before",)
    assert [shot.pts for shot in read(reader, Sampling(fps=1, start=1))] == [1, 2, Fraction(5, 2), 4, 5]
    assert reader.count_pictures(Fraction(1), Fraction(4)) == 2
    for same in (np.array([0.0, 1, 2, 3, 5]), torch.tensor([0.0, 1, 2, 3, 5])):
        assert [shot.pts for shot in read(ArrayReader(FRAMES, times=same))] == [0, 1, 2, 3, 5]  # type: ignore[arg-type]


def test_a_single_frame() -> None:
    assert read(ArrayReader(FRAMES[:1], times=[3]))[0].duration == 1
    assert ArrayReader(FRAMES[:1], times=[3]).info.notes == ("a single frame; shown for 1 s",)
    assert read(ArrayReader(FRAMES[:1], fps=5))[0].duration == Fraction(1, 5)


def test_a_size_is_honoured_and_mixed_sizes_are_counted() -> None:
    image = smooth((24, 32))
    reader = ArrayReader([np.asarray(image), np.asarray(image.resize((64, 48))), image], fps=2)
    pictures = reader.pictures()
    shown = [picture.pixels() for picture in pictures]
    assert {pixels.shape for pixels in shown} == {(24, 32, 3)} and pictures.stats.rescaled == 1
    assert np.abs(shown[1].astype(int) - np.asarray(image)).max() <= 8
    small = next(reader.pictures()).pixels((12, 16))
    assert np.array_equal(small, np.asarray(image.resize((16, 12), Image.Resampling.BICUBIC)))
    grey = next(reader.pictures()).grey((6, 8))
    assert np.abs(grey - np.asarray(image.convert("L")).reshape(6, 4, 8, 4).mean((1, 3))).max() <= 1


def test_pillow_images_are_turned_upright(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.tif"):
        smooth().save(tmp_path / name, exif=exif(orientation=6))
        with Image.open(tmp_path / name) as image:
            shown = read(ArrayReader([image], fps=1))[0].pixels
        assert shown.shape == (64, 48, 3), name
        assert np.abs(shown.astype(int) - np.rot90(np.asarray(smooth()), -1)).max() < 40, name


def test_a_pillow_image_that_does_not_decode(tmp_path: Path) -> None:
    smooth().save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-50])
    with Image.open(tmp_path / "a.jpg") as cut:
        with pytest.raises(SourceError, match="frame 0 of frames in memory is cut off"):
            ArrayReader([cut], fps=1)
    with Image.open(tmp_path / "a.jpg") as cut:
        reader = ArrayReader([smooth(), cut], fps=1)
        pictures = reader.pictures()
        first, second = (picture.pixels() for picture in pictures)
        assert np.array_equal(first, second) and pictures.stats.damaged == 1


@pytest.mark.parametrize("size", [None, (12, 16)])
def test_a_palette_with_transparency_is_left_as_it_is(size: tuple[int, int] | None) -> None:
    image = smooth().quantize(8)
    image.info["transparency"] = bytes(8)
    read(ArrayReader([image], fps=1), size=size)
    assert image.info["transparency"] == bytes(8) and image.mode == "P"


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([], "are none"),
        (FRAMES[:0], "are none"),
        (FRAMES[0], r"are one frame; give a list of frames, \[frame\]"),
        (smooth(), "one Pillow image"),
        (iter(FRAMES), "read only once; give list"),
        ((frame for frame in FRAMES), "read only once; give list"),
        (FRAMES[..., :1], r"\(12, 16, 1\).*repeat grey"),
        (FRAMES[..., 0], r"have the shape \(5, 12, 16\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"drop transparency with \[..., :3\]"),
        (np.zeros((2, 0, 8, 3), np.uint8), r"has the shape \(0, 8, 3\)"),
        (FRAMES.astype(np.int64), "is int64; it must be uint8"),
        (FRAMES.astype(np.float32), "floats from 0 to 25.; they must be in 0 to 1"),
        (FRAMES / 255 - 0.5, "floats from -0.5 to 0.5"),
        (np.full((1, 4, 4, 3), np.nan), "floats from nan to nan"),
        ([FRAMES[0], FRAMES[1][:, :, 0]], r"frame 1 of frames in memory has the shape \(12, 16\)"),
        ([[[1, 2], [3]]], "rows differ in length"),
        (torch.zeros((1, 4, 4, 3), dtype=torch.bfloat16), "make no numpy array"),
        (["a.jpg", "b.jpg"], "hold a file name"),
        ([Path("a.jpg")], "hold a file name"),
        ([Image.new("F", (4, 4))], "pixels of the kind F"),
        (None, r"have the shape \(\)"),
    ],
)
def test_what_are_no_frames_is_told_in_one_line(frames: Any, why: str) -> None:
    with pytest.raises(SourceError, match=why) as told:
        ArrayReader(frames, fps=1)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("clock", "why"),
    [
        ({}, r"have no times; give fps=25, or times="),
        ({"fps": 5, "times": [0, 1, 2, 3, 4]}, "not both"),
        ({"fps": 0}, "above 0"),
        ({"fps": -1}, "above 0"),
        ({"fps": float("nan")}, "finite"),
        ({"fps": "fast"}, "fps must be numbers"),
        ({"times": [0, 1, 2, 3]}, "4 times for 5 frames"),
        ({"times": [0, 1, 1, 3, 4]}, "frame 2 comes at 1 s after 1 s"),
        ({"times": [0, 1, 2, 1.5, 4]}, "frame 3 comes at 1.5 s after 2 s"),
        ({"times": [0, 1, None, 3, 4]}, "times must be numbers, got None"),
    ],
)
def test_a_clock_must_be_given_and_make_sense(clock: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        ArrayReader(FRAMES, **clock)


def test_the_identity_is_that_of_pixels_and_times() -> None:
    other = FRAMES.copy()
    other[3, 5, 6, 1] ^= 1
    readers = [
        ArrayReader(FRAMES, fps=10),
        ArrayReader(other, fps=10),
        ArrayReader(FRAMES, fps=11),
        ArrayReader(FRAMES[:4], fps=10),
        ArrayReader(FRAMES.reshape(5, 16, 12, 3), fps=10),
        ArrayReader(FRAMES, times=[0, 1, 2, 3, 5]),
    ]
    assert len({reader.identity() for reader in readers}) == 6
    assert ArrayReader(FRAMES, times=[k / 10 for k in range(5)]).identity() == readers[0].identity()


def test_only_what_is_sampled_is_decoded_and_nothing_leaves_the_process() -> None:
    reader = ArrayReader(np.broadcast_to(FRAMES[:1], (10_000, 12, 16, 3)), fps=25)
    sampler = reader.sample(reader.plan(Sampling(count=8)))
    assert len(list(sampler)) == 8 and sampler.stats.decoded == 8  # type: ignore[call-overload]
    assert reader.state() is None
