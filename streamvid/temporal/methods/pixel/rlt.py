"""RLT: cells of the picture that did not change are not encoded again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from streamvid.errors import SettingsError
from streamvid.reduction import Reduction
from streamvid.signals import Signals
from streamvid.temporal.methods.base import PixelMethod, PixelView

REFERENCE_STD = 0.226
"""Mean of the ImageNet standard deviations: the units in which the paper states its threshold."""

FIRST_CHANGE = 255.0
"""What counts as the change of a cell with nothing before it, as in the released code."""


@dataclass
class Rlt(PixelMethod):
    """Leave out every cell that looks as it did one temporal patch earlier.

    A temporal patch is compared with the one right before it: its last raw frame with the first raw
    frame of that one, mean absolute difference over the cell and the colours.  A cell whose change is
    not above the threshold is dropped; the token kept before it stands for it, and the number of
    temporal patches a kept token stands for is its run length::

        one cell      t  0    1    2    3    4
        change           -  .02  .40  .03  .01
        kept             x         x
        run length       2         3

    The comparison is with the patch before, not with the last one kept, so a drift that stays below
    the threshold is never refreshed unless ``refresh`` is set.

    Paper: "Don't Look Twice: Faster Video Transformers with Run-Length Tokenization", arXiv 2411.05222.
    Run lengths are given in the order of the tokens; the released code lists them cell by cell, which
    attaches them to other tokens.
    Differs from the paper in the unit of the threshold: pixels here may be normalised in any way, so
    the threshold is multiplied by ``0.226 / mean(std of the view)``.  Under ImageNet normalisation the
    factor is one; under another, the same grey levels count as a change.
    The first cells of a *stream* are kept; the first temporal patch of a later clip is compared with
    the frame carried over, so clip by clip gives what all at once gives.

    Args:
        threshold: change in ImageNet-normalised units that is still "the same", >= 0; larger drops more.
            0.1 is about 6 of 255 grey levels.
        refresh: temporal patches after which a cell is kept again even if nothing changed, >= 0; smaller
            keeps more.  0 never does, as in the paper.

    Raises:
        SettingsError: if a setting is out of range.
    """

    paper: ClassVar[str] = "Don't Look Twice: Faster Video Transformers with Run-Length Tokenization, arXiv 2411.05222"

    threshold: float = 0.1
    refresh: int = 0

    _before: Tensor | None = field(init=False, repr=False, compare=False, default=None)
    """(C, H, W) first raw frame of the last temporal patch seen."""
    _age: Tensor | None = field(init=False, repr=False, compare=False, default=None)
    """(rows * columns,) int64 temporal patches since each cell was last kept."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < FIRST_CHANGE:
            raise SettingsError(
                f"threshold must be in [0, {FIRST_CHANGE:g}), got {self.threshold}; "
                "0.1 drops what looks the same, 0 only exact copies"
            )
        if self.refresh < 0:
            raise SettingsError(f"refresh must be at least 0 temporal patches, got {self.refresh}; 0 never refreshes")

    def reset(self) -> None:
        """Start a new video: the next clip has nothing before it."""
        self._before = None
        self._age = None

    def change(self, view: PixelView) -> Tensor:
        """How much each cell differs from the temporal patch before, without moving on.

        Ask before ``select``, which moves the stream on to the end of the clip.

        Returns:
            (T * rows * columns,) float32 mean absolute difference in the units of the view's pixels, in
            (t, row, column) order; 255 where there is nothing before.
        """
        pixels, tubelet = view.pixels, view.tubelet
        _check(view)
        first, last = pixels[::tubelet], pixels[tubelet - 1 :: tubelet]
        carried = self._carried(view)
        if carried is None:
            change = self._difference(last[1:], first[:-1], view.cell)
            return torch.cat([change.new_full((1, *change.shape[1:]), FIRST_CHANGE), change]).flatten()
        return self._difference(last, torch.cat([carried[None], first[:-1]]), view.cell).flatten()

    def select(self, view: PixelView, signals: Signals) -> Reduction:
        """Keep the cells that changed, in (t, row, column) order; a still clip may keep none."""
        times, rows, columns = view.grid
        fresh = self._carried(view) is None
        limit = self.threshold * REFERENCE_STD / float(view.std.float().mean())
        keep = (self.change(view) > limit).reshape(times, rows * columns)
        if fresh:
            keep[0] = True
        if self.refresh:
            age = self._age
            if fresh or age is None:
                age = torch.zeros(rows * columns, dtype=torch.int64, device=keep.device)
            for t in range(times):
                age = age + 1
                keep[t] |= age >= self.refresh
                age = age.masked_fill(keep[t], 0)
            self._age = age
        self._before = view.pixels[-view.tubelet].clone()
        return Reduction.select(keep.flatten(), keep.numel())

    def run_lengths(self, plan: Reduction, grid: tuple[int, int, int]) -> Tensor:
        """For how many temporal patches each kept cell stands, within one clip.

        Args:
            plan: what ``select`` returned.
            grid: (T, rows, columns) of that clip.

        Returns:
            (M,) int64 in the order of the kept cells: until the next kept token of the same cell or the
            end of the clip, itself included.  They add up to T * rows * columns where the first temporal
            patch is kept whole; dropped cells before a cell's first kept token belong to an earlier clip.
        """
        times, rows, columns = grid
        assert plan.keep is not None
        keep = torch.zeros(plan.num_inputs, dtype=torch.bool, device=plan.keep.device)
        keep[plan.keep] = True
        keep = keep.reshape(times, rows * columns)
        start = torch.arange(times, device=keep.device)[:, None].expand_as(keep)
        stops = torch.where(keep, start, times)
        following = stops.flip(0).cummin(0).values.flip(0)  # the next kept one, itself included
        following = torch.cat([following[1:], following.new_full((1, rows * columns), times)])
        return (following - start).flatten()[plan.keep]

    def _carried(self, view: PixelView) -> Tensor | None:
        """The frame before this clip; None at the start of a stream or after a change of size."""
        before = self._before
        if before is None or before.shape != view.pixels.shape[1:]:
            return None
        return before.to(view.pixels.device)

    @staticmethod
    def _difference(now: Tensor, before: Tensor, cell: int) -> Tensor:
        """(T, rows, columns) mean absolute difference of two stacks of frames (T, C, H, W)."""
        return F.avg_pool2d((now.float() - before.float()).abs(), cell).mean(1)


def _check(view: PixelView) -> None:
    frames, _, height, width = view.pixels.shape
    if frames == 0 or frames % view.tubelet or height % view.cell or width % view.cell:
        raise ValueError(
            f"pixels must be whole temporal patches of {view.tubelet} frames and whole cells of {view.cell} pixels, "
            f"got {view.pixels.shape = }"
        )
