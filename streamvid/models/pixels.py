"""Pixels as a Qwen-VL checkpoint wants them, from its own processor JSON, without torchvision.

Knows resizing, normalising and the order of patches; knows no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from streamvid.errors import SettingsError, UnsupportedError


@dataclass(frozen=True, slots=True)
class PixelSettings:
    """What the processor JSON of a checkpoint says about video."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest_edge: int
    """Fewest pixels of a whole video (frames * height * width)."""

    longest_edge: int
    """Most pixels of a whole video."""

    max_video_tokens: int
    """Most tokens of one frame, when frames are capped."""

    cap_pixels_per_frame: bool
    """Cap each frame by itself, so that cost grows with time (the way of the model's own authors)."""

    fps: float
    min_frames: int
    max_frames: int
    rescale_factor: float = 1 / 255

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``video_preprocessor_config.json``, ``processor_config.json`` or ``preprocessor_config.json``.

        Raises:
            UnsupportedError: if the folder has none of them.
        """
        found: dict[str, Any] | None = None
        for name in ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json"):
            path = folder / name
            if path.is_file():
                content = json.loads(path.read_text())
                found = content.get("video_processor", content if name != "processor_config.json" else None)
                if found is not None:
                    break
        if found is None:
            raise UnsupportedError(
                f"{folder.name} has no processor JSON (video_preprocessor_config.json or preprocessor_config.json); "
                "download the whole checkpoint, not only its weights"
            )
        size = found.get("size") or {}
        capped = found.get("cap_pixels_per_frame")
        return cls(
            patch_size=int(found.get("patch_size", 16)),
            temporal_patch_size=int(found.get("temporal_patch_size", 2)),
            merge_size=int(found.get("merge_size", 2)),
            mean=tuple(found.get("image_mean", (0.5, 0.5, 0.5))),
            std=tuple(found.get("image_std", (0.5, 0.5, 0.5))),
            shortest_edge=int(size.get("shortest_edge", 128 * 32 * 32)),
            longest_edge=int(size.get("longest_edge", 768 * 32 * 32)),
            max_video_tokens=int(found.get("max_video_tokens", 768)),
            cap_pixels_per_frame=True if capped is None else bool(capped),
            fps=float(found.get("fps", 2)),
            min_frames=int(found.get("min_frames", 4)),
            max_frames=int(found.get("max_frames", 768)),
            rescale_factor=float(found.get("rescale_factor", 1 / 255)),
        )

    @property
    def cell(self) -> int:
        """Side of a merged token in pixels."""
        return self.patch_size * self.merge_size

    def frame_size(self, *, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """The size frames are scaled to, whole cells, aspect ratio kept as well as cells allow.

        Args:
            height: of the source, in pixels.
            width: of the source, in pixels.
            num_frames: frames that will be sampled from the whole video: the more there are, the
                smaller each may be.

        Raises:
            SettingsError: for pictures more than 200 times longer than wide.
        """
        num_frames = max(num_frames, self.temporal_patch_size)
        most = self.longest_edge
        if self.cap_pixels_per_frame:
            cap = min(self.max_video_tokens * self.cell**2, self.longest_edge // num_frames)
            most = max(cap, int(self.shortest_edge * 1.05)) * num_frames
        cell = self.cell
        if height < cell or width < cell:
            scale = max(cell / height, cell / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) / min(height, width) > 200:
            raise SettingsError(f"frames of {width}x{height} are more than 200 times longer than wide; crop the video")
        rows, columns = round(height / cell) * cell, round(width / cell) * cell
        whole = round(num_frames / self.temporal_patch_size) * self.temporal_patch_size
        if whole * rows * columns > most:
            beta = math.sqrt(num_frames * height * width / most)
            rows = max(cell, math.floor(height / beta / cell) * cell)
            columns = max(cell, math.floor(width / beta / cell) * cell)
        elif whole * rows * columns < self.shortest_edge:
            beta = math.sqrt(self.shortest_edge / (num_frames * height * width))
            rows = math.ceil(height * beta / cell) * cell
            columns = math.ceil(width * beta / cell) * cell
        return rows, columns

    def normalise(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize and normalise frames.

        Args:
            frames: (F, H, W, 3) uint8.
            size: (height, width) wanted.

        Returns:
            (F', 3, height, width) float32; an odd number of frames is padded by repeating the last.
        """
        pixels = frames.permute(0, 3, 1, 2)
        if tuple(pixels.shape[-2:]) != size:
            # On uint8: interpolating in float and rounding afterwards is off by one level in a fifth of the values.
            pixels = F.interpolate(pixels.contiguous(), size=size, mode="bicubic", antialias=True, align_corners=False)
        if short := -len(pixels) % self.temporal_patch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(short, -1, -1, -1)])
        mean = torch.tensor(self.mean, device=pixels.device) / self.rescale_factor
        std = torch.tensor(self.std, device=pixels.device) / self.rescale_factor
        return (pixels.float() - mean[:, None, None]) / std[:, None, None]

    def patchify(self, pixels: Tensor) -> Tensor:
        """Cut normalised frames into patches, merge unit after merge unit.

        Args:
            pixels: (F, 3, H, W) with F a multiple of the temporal patch.

        Returns:
            (T * rows * columns * merge**2, 3 * temporal * patch * patch): the patches of one cell
            are consecutive, cells in (t, row, column) order.
        """
        frames, channels, height, width = pixels.shape
        time, patch, merge = self.temporal_patch_size, self.patch_size, self.merge_size
        grid = pixels.reshape(
            frames // time, time, channels,
            height // self.cell, merge, patch,
            width // self.cell, merge, patch,
        )  # fmt: skip
        grid = grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return grid.reshape(-1, channels * time * patch * patch)


def tubelet_times(pts: Sequence[Any], interval: Any, tubelet: int) -> list[tuple[Any, Any]]:
    """When each temporal patch starts and stops: until the next one starts, the last for its own frames.

    Args:
        pts: presentation time of each sampled frame.
        interval: time from one sampled frame to the next, used after the last.
        tubelet: frames in a temporal patch.
    """
    starts = list(pts[::tubelet])
    stops = [*starts[1:], pts[-1] + interval]
    return list(zip(starts, stops, strict=True))
