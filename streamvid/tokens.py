"""Visual tokens of one stream, with everything that must travel with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from streamvid.reduction import Reduction


@dataclass(frozen=True, slots=True)
class VideoTokens:
    """Tokens of consecutive frames of one stream, N rows in raster and time order.

    There is no batch axis: a stream is the unit of work.
    """

    features: Tensor
    """(N, D) what the language model reads."""

    grid: tuple[int, int, int]
    """(T, H, W) of the clip before any reduction."""

    position: Tensor
    """(N, 3) int64: frame, row, column of each token within the grid."""

    pts_seconds: Tensor
    """(N,) float64: when the content of each token appears."""

    duration_seconds: Tensor
    """(N,) float64: for how long."""

    size: Tensor
    """(N,) float32: how many original tokens each stands for."""

    score: Tensor
    """(N,) float32 importance; a smaller budget keeps the highest.  Ties keep the earlier."""

    layers: tuple[Tensor, ...] = ()
    """Further per-layer features of the same rows (deepstack), each (N, D)."""

    def __post_init__(self) -> None:
        count = len(self.features)
        for name in ("position", "pts_seconds", "duration_seconds", "size", "score"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} must have {count} rows like features, got {len(getattr(self, name))}")
        if self.features.ndim != 2 or self.position.shape != (count, 3):
            raise ValueError(
                f"features must be (N, D) and position (N, 3), got {self.features.shape}, {self.position.shape}"
            )
        if any(layer.shape != self.features.shape for layer in self.layers):
            raise ValueError(f"layers must have the shape of features {tuple(self.features.shape)}")

    def __len__(self) -> int:
        return len(self.features)

    def reduce(self, plan: Reduction | None) -> Self:
        """Carry out a decision on features, layers, positions, times, sizes and scores alike.

        An output made of several tokens has the place and time of the heaviest of them.
        """
        if plan is None or plan.is_identity:
            return self
        lead = plan.leader()
        mixed = replace(plan, features=None)  # fresh features are those of ``features``, not of the layers
        return replace(
            self,
            features=plan.apply(self.features),
            layers=tuple(mixed.apply(layer) for layer in self.layers),
            position=self.position[lead.to(self.position.device)],
            pts_seconds=self.pts_seconds[lead.to(self.pts_seconds.device)],
            duration_seconds=self.duration_seconds[lead.to(self.duration_seconds.device)],
            size=plan.total(self.size),
            score=plan.locate(self.score),
        )

    def select(self, keep: Tensor) -> Self:
        """Some rows, by index or mask."""
        return self.reduce(Reduction.select(keep, len(self)))

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """Tokens of several clips after one another; frame numbers continue from clip to clip."""
        if not parts:
            raise ValueError("nothing to put together")
        frames = 0
        positions = []
        for part in parts:
            positions.append(part.position + torch.tensor([frames, 0, 0], device=part.position.device))
            frames += part.grid[0]
        return cls(
            features=torch.cat([p.features for p in parts]),
            grid=(frames, max(p.grid[1] for p in parts), max(p.grid[2] for p in parts)),
            position=torch.cat(positions),
            pts_seconds=torch.cat([p.pts_seconds for p in parts]),
            duration_seconds=torch.cat([p.duration_seconds for p in parts]),
            size=torch.cat([p.size for p in parts]),
            score=torch.cat([p.score for p in parts]),
            layers=tuple(torch.cat(rows) for rows in zip(*(p.layers for p in parts), strict=True)),
        )
