"""Pictures with their exact times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded picture and when it is on screen."""

    pixels: Tensor
    """(H, W, 3) uint8 RGB."""

    pts: Fraction
    """Presentation time in seconds, exactly as the container says."""

    duration: Fraction
    """How long the picture stays, in seconds; always positive."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[-1] != 3 or str(self.pixels.dtype) != "torch.uint8":
            raise ValueError(f"pixels must be (H, W, 3) uint8, got {self.pixels.shape = } {self.pixels.dtype = }")
        if self.duration <= 0:
            raise ValueError(f"duration must be positive, got {self.duration}")

    @property
    def pts_seconds(self) -> float:
        """Presentation time as a float."""
        return float(self.pts)


@dataclass(frozen=True, slots=True)
class Clip:
    """Consecutive sampled frames of one size, processed together."""

    pixels: Tensor
    """(F, H, W, 3) uint8 RGB."""

    pts: tuple[Fraction, ...]
    """Presentation time of each frame in seconds, strictly rising."""

    durations: tuple[Fraction, ...]
    """How long each picture stays, in seconds."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[-1] != 3 or str(self.pixels.dtype) != "torch.uint8":
            raise ValueError(f"pixels must be (F, H, W, 3) uint8, got {self.pixels.shape = } {self.pixels.dtype = }")
        if not len(self.pts) == len(self.durations) == len(self.pixels):
            raise ValueError(
                f"{len(self.pixels)} frames need as many times, got {len(self.pts)} and {len(self.durations)}"
            )
        if any(b <= a for a, b in zip(self.pts, self.pts[1:], strict=False)):
            raise ValueError(f"frame times must rise, got {[float(p) for p in self.pts]}")

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> Self:
        """Stack frames of one size; raises ValueError if sizes differ or there are none."""
        if not frames:
            raise ValueError("a clip needs at least one frame")
        sizes = {tuple(frame.pixels.shape) for frame in frames}
        if len(sizes) > 1:
            raise ValueError(f"all frames of a clip must have one size, got {sorted(sizes)}")
        import torch  # here, so that looking at files does not wait for it

        return cls(
            torch.stack([frame.pixels for frame in frames]),
            tuple(frame.pts for frame in frames),
            tuple(frame.duration for frame in frames),
        )

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def start(self) -> Fraction:
        """When the first frame appears, in seconds."""
        return self.pts[0]

    @property
    def stop(self) -> Fraction:
        """When the last frame is gone, in seconds; the clip covers ``[start, stop)``."""
        return self.pts[-1] + self.durations[-1]
