"""Pixels against the real processors' own outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from streamvid.errors import SettingsError, UnsupportedError
from streamvid.models.pixels import PixelSettings, tubelet_times

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "preprocess" / "qwen3_vl"
CASES = sorted((HERE / "preprocess").glob("*.npz")) + sorted(SHARED.glob("*.npz"))


def settings(**changes: object) -> PixelSettings:
    values = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "shortest_edge": 16384,
        "longest_edge": 393216,
        "max_video_tokens": 768,
        "cap_pixels_per_frame": False,
        "fps": 2.0,
        "min_frames": 4,
        "max_frames": 768,
    }
    return PixelSettings(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_equals_the_real_processor(path: Path) -> None:
    case = np.load(path)
    asked = json.loads(str(case["settings_json"]))
    ours = settings(
        patch_size=int(case["patch_size"]),
        temporal_patch_size=int(case["temporal_patch_size"]),
        merge_size=int(case["merge_size"]),
        mean=tuple(case["mean"].tolist()),
        std=tuple(case["std"].tolist()),
        **asked["size"],
    )
    frames = torch.from_numpy(case["frames_u8"])
    size = ours.frame_size(height=frames.shape[1], width=frames.shape[2], num_frames=len(frames))
    pixels = ours.normalise(frames, size)
    expected = torch.from_numpy(case["pixel_values_videos"])
    torch.testing.assert_close(ours.patchify(pixels), expected, rtol=0, atol=1e-6)
    grid = [len(pixels) // 2, size[0] // 16, size[1] // 16]
    assert [grid] == case["video_grid_thw"].tolist()


def test_more_frames_make_each_smaller_when_the_video_is_capped() -> None:
    capped = settings(cap_pixels_per_frame=True, longest_edge=768 * 32 * 32 * 16, shortest_edge=4096)
    few = capped.frame_size(height=720, width=1280, num_frames=8)
    many = capped.frame_size(height=720, width=1280, num_frames=512)
    assert few[0] * few[1] > many[0] * many[1]
    assert few[0] * few[1] <= 768 * 32 * 32


def test_sizes_are_whole_cells_and_keep_the_shape() -> None:
    for height, width in ((480, 854), (1080, 1920), (30, 40), (999, 333)):
        rows, columns = settings().frame_size(height=height, width=width, num_frames=4)
        assert rows % 32 == 0 and columns % 32 == 0
        assert abs(np.log((columns / rows) / (width / height))) < 0.5


def test_absurd_shapes_are_refused() -> None:
    with pytest.raises(SettingsError, match="200 times longer"):
        settings().frame_size(height=40, width=40 * 300, num_frames=4)


def test_an_odd_frame_is_repeated_not_invented() -> None:
    frames = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    pixels = settings().normalise(frames, (32, 32))
    assert len(pixels) == 4
    assert torch.equal(pixels[3], pixels[2])


def test_a_folder_without_processor_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no processor JSON"):
        PixelSettings.load(tmp_path)


def test_processor_config_of_newer_checkpoints_is_read(tmp_path: Path) -> None:
    inner = {"patch_size": 14, "size": {"shortest_edge": 1, "longest_edge": 2}, "fps": 4}
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": inner}))
    loaded = PixelSettings.load(tmp_path)
    assert (loaded.patch_size, loaded.fps, loaded.longest_edge) == (14, 4.0, 2)


def test_temporal_patches_last_until_the_next_one() -> None:
    assert tubelet_times([0, 1, 5, 6, 20], 1, 2) == [(0, 5), (5, 20), (20, 21)]
