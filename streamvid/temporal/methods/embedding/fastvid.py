"""FastVID: scenes by frame similarity, then salient tokens kept and the rest merged at density peaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from streamvid.budget import Budget
from streamvid.errors import SettingsError
from streamvid.reduction import Reduction
from streamvid.signals import Signal, Signals
from streamvid.temporal.methods.base import EmbeddingMethod
from streamvid.temporal.methods.functional import (
    consecutive_cosine,
    density_peaks,
    fill_evenly,
    latest_per_cell,
    top_in_order,
)
from streamvid.tokens import VideoTokens

VARIANTS = ("parallel", "sequential", "qwen")


@dataclass
class FastVid(EmbeddingMethod):
    """Cut the clip into scenes; in each keep what the tower looked at and merge the rest into a few.

    Scenes end where neighbouring frames differ most.  A scene's budget has two parts.  *Salient*
    tokens, the most attended of each frame, are kept untouched.  *Context* tokens come from every
    ``dtm_p``-th frame counted back from the scene's end (anchor frames): the density peaks among the
    tokens that are not salient.  Every remaining token of the scene joins the context token it
    resembles most, in each anchor frame anew, and a context token becomes
    ``w * itself + (1 - w) * mean of those that joined`` with ``w = max(1 / (n + 1), dtm_beta)``::

        frames          0 1 2 3 | 4 5 6 7 8 9        scenes of 4 and 6 frames
        anchors, p=4          a |   a       a

    Paper: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", arXiv 2503.11187.
    The authors released three programs that count differently, and all three are here as ``variant``:
    ``parallel`` (LLaVA-OneVision) gives each frame the same share, loses remainders and lets a context
    token count itself among those that join; ``sequential`` (LLaVA-Video) shares out per scene with
    remainders, and context tokens of other anchor frames may join; ``qwen`` (Qwen2.5-VL) does the same
    but lets only the last of a row of near-identical frames hold tokens, so it may keep less than asked.

    Differs from the released code:
        - No random noise breaks ties between densities; the earlier token wins.
        - ``dyseg_c`` is limited to the number of frames.
        - A *ragged* clip, where some cells have no token because an earlier stage left them out, is
          understood as "nothing new here".  A frame without tokens has the feature of the frame
          before.  An anchor frame is completed, cell by cell, with the latest token since the anchor
          before it, and a row of near-identical frames likewise with its latest tokens; with nothing
          missing these are the anchor frame and the last frame themselves.
        - The budget of a ragged clip is measured against its whole grid, T * H * W; with no more
          tokens than that left, nothing is done.  Otherwise each scene gets the same share per frame as
          in a full clip; a scene with fewer tokens passes its rest on to the others, and within a scene
          a frame to the other frames.  The split into salient and context tokens is that of
          ``sequential``; what the anchor frames cannot hold is kept as further salient tokens of the
          scene.  So exactly the budget is kept, or all that ``qwen`` lets hold tokens if that is less.
        - A full clip whose shares the released code cannot serve (less than one token a frame, or more
          context tokens than an anchor frame has left) is shared out as if it were ragged.

    Args:
        budget: what survives, of the clip's whole grid.
        dyseg_c: scenes at least, >= 1; more gives shorter scenes and less merging over time.
        dyseg_tau: similarity of neighbouring frames below which a scene always ends, in [-1, 1]; higher
            gives more scenes.  The paper uses 0.9, and 0.84 for Qwen.
        dyseg_ignore: similarity from which a frame is a near copy of the one before; only ``qwen``.  Lower
            leaves out more frames, above 1 none.  The released scripts use 0.95; a mean over a frame hardly
            notices a small subject, and at 0.95 frames it moved through were left out (toy world, a quarter
            of the tokens, 24 clips: 2 points of exact answers after rlt, 7 without it), so ours is 0.99.
        stprune_d: share of the budget for context tokens, in [0, 1].
        dtm_p: distance of anchor frames, >= 1; larger merges over longer stretches.
        dtm_beta: least weight of a context token against those that join it, in [0, 1]; higher blends
            less.
        variant: ``parallel``, ``sequential`` or ``qwen``, see above.

    Raises:
        SettingsError: if a setting is out of range.
    """

    paper: ClassVar[str] = "FastVID: Dynamic Density Pruning for Fast Video Large Language Models, arXiv 2503.11187"
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.FRAME_FEATURES, Signal.RECEIVED_ATTENTION})
    causal: ClassVar[bool] = False

    budget: Budget = Budget(keep_ratio=0.25)
    dyseg_c: int = 8
    dyseg_tau: float = 0.84
    dyseg_ignore: float = 0.99
    stprune_d: float = 0.4
    dtm_p: int = 4
    dtm_beta: float = 0.6
    variant: str = "qwen"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SettingsError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        for name, least in (("dyseg_c", 1), ("dtm_p", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("stprune_d", "dtm_beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} is a share and must be in [0, 1], got {getattr(self, name)}")

    def segments(self, frame_features: Tensor) -> Tensor:
        """Frames of each scene, in order.

        Args:
            frame_features: (T, Dg).

        Returns:
            (S,) int64, adding up to T; at least ``min(dyseg_c, T)`` scenes.
        """
        frames = len(frame_features)
        similarity = consecutive_cosine(frame_features)
        cut = similarity < self.dyseg_tau
        cut[torch.argsort(similarity, stable=True)[: self.dyseg_c - 1]] = True
        return _sizes(cut, frames)

    def reduce(self, tokens: VideoTokens, signals: Signals) -> Reduction | None:
        """Keep salient tokens and merged context tokens of each scene, in raster and time order."""
        frames, height, width = tokens.grid
        saliency, features = signals.received_attention, signals.frame_features
        if saliency is None or features is None:
            raise ValueError("fastvid needs received_attention and frame_features")
        if saliency.shape != (len(tokens),) or len(features) != frames:
            raise ValueError(
                f"received_attention needs a row per token ({len(tokens)}) and frame_features one per frame "
                f"({frames}), got {saliency.shape = } {features.shape = }"
            )
        if len(tokens) <= self.budget.count(frames * height * width):
            return None
        scenes = self._scenes(tokens, features)
        shares = self._released_shares(tokens, scenes) or self._ragged_shares(tokens, scenes)
        saliency = saliency.to(tokens.features.device, torch.float32)
        picks = [_pick(scene, share, saliency, tokens.features) for scene, share in zip(scenes, shares, strict=True)]
        kept = torch.cat([chosen for pick in picks for chosen in (pick.salient, *pick.context)]).sort().values
        unit = F.normalize(tokens.features.float(), dim=-1)
        entries = [
            entry
            for scene, share, pick in zip(scenes, shares, picks, strict=True)
            for entry in self._entries(scene, share, pick, unit)
        ]
        owner, source, weight = (torch.cat(column) for column in zip(*entries, strict=True))
        return Reduction.mix(
            torch.searchsorted(kept, owner), source, weight, num_inputs=len(tokens), num_outputs=len(kept)
        )

    def _scenes(self, tokens: VideoTokens, features: Tensor) -> list[_Scene]:
        """The clip's scenes, with the tokens that each of their frames holds."""
        frames, height, width = tokens.grid
        device = tokens.features.device
        frame = tokens.position[:, 0].to(device)
        cell = (tokens.position[:, 1] * width + tokens.position[:, 2]).to(device)
        present = torch.bincount(frame, minlength=frames)
        shown = torch.where(present > 0, torch.arange(frames, device=device), 0).cummax(0).values
        features = features.to(device)[shown]  # a frame without tokens looks like the one before
        new = torch.ones(max(frames - 1, 0), dtype=torch.bool, device=device)
        if self.variant == "qwen":
            new = consecutive_cosine(features) < self.dyseg_ignore
        bounds = [0, *present.cumsum(0).tolist()]

        def latest(start: int, stop: int) -> Tensor:
            """Tokens that stand at the end of frames [start, stop)."""
            rows = torch.arange(bounds[start], bounds[stop], device=device)
            return latest_per_cell(rows, cell, height * width)

        scenes, start = [], 0
        for length in self.segments(features).tolist():
            stop = start + length
            edges = [start + e for e in _edges(_sizes(new[start : stop - 1], length))]
            stretches = [0, *range((len(edges) - 2) % self.dtm_p + 1, len(edges), self.dtm_p)]
            scenes.append(
                _Scene(
                    frames=length,
                    rows=torch.arange(bounds[start], bounds[stop], device=device),
                    holders=[latest(a, b) for a, b in zip(edges, edges[1:], strict=False)],
                    anchors=[latest(edges[a], edges[b]) for a, b in zip(stretches, stretches[1:], strict=False)],
                )
            )
            start = stop
        return scenes

    def _released_shares(self, tokens: VideoTokens, scenes: list[_Scene]) -> list[_Share]:
        """The authors' shares of a full grid; none where the grid is not full or they cannot be served."""
        frames, height, width = tokens.grid
        cells = height * width
        index = (tokens.position * tokens.position.new_tensor([cells, width, 1])).sum(1)
        if len(tokens) != frames * cells or not torch.equal(index, torch.arange(len(tokens), device=index.device)):
            return []
        if self.budget.keep_ratio is not None:
            each = int(cells * self.budget.keep_ratio)
        else:
            each = self.budget.count(len(tokens)) // frames
        if each == 0:
            return []
        shares = []
        for scene in scenes:
            share = self._released_share(scene, each, cells)
            if share is None:
                return []
            shares.append(share)
        return shares

    def _released_share(self, scene: _Scene, each: int, cells: int) -> _Share | None:
        """Counts for a scene of full frames at ``each`` tokens a frame; None where they do not fit."""
        holders = len(scene.holders)
        anchors = -(-holders // self.dtm_p)
        at = list(range((holders - 1) % self.dtm_p, holders, self.dtm_p))
        if self.variant == "parallel":
            base = int(each * self.stprune_d)
            count = base * holders // anchors
            salient, context, alone = [each - base] * holders, [count] * anchors, count == base
        else:
            quota = each * scene.frames
            total = int(quota * self.stprune_d)
            if self.variant == "qwen":
                total = max(1, total)
            salient = _even(quota - total, holders)
            context, alone = _even(total, anchors)[::-1], False
            if self.variant == "qwen" and scene.frames > 1:
                context = [min(count, cells // 2) for count in context]
                salient = [min(count, cells) for count in salient]
                for frame, count in zip(at, context, strict=True):
                    salient[frame] = min(salient[frame], cells - count)
        if any(salient[frame] + count > cells for frame, count in zip(at, context, strict=True)):
            return None
        return _Share(salient=salient, context=context, total=sum(salient) + sum(context), alone=alone)

    def _ragged_shares(self, tokens: VideoTokens, scenes: list[_Scene]) -> list[_Share]:
        """Equal shares limited by what each frame has, the rest handed on; context is dealt out later."""
        frames, height, width = tokens.grid
        rooms = [torch.tensor([len(held) for held in scene.holders]) for scene in scenes]
        room = [
            part for scene, held in zip(scenes, rooms, strict=True) for part in _even(int(held.sum()), scene.frames)
        ]
        quotas = fill_evenly(torch.tensor(room), self.budget.count(frames * height * width))
        scene_of = torch.tensor([i for i, scene in enumerate(scenes) for _ in range(scene.frames)])
        totals = torch.zeros(len(scenes), dtype=torch.int64).index_add_(0, scene_of, quotas).tolist()
        shares = []
        for held, total in zip(rooms, totals, strict=True):
            salient = fill_evenly(held, total - int(total * self.stprune_d)).tolist()
            alone = self.variant == "parallel" and (len(held) == 1 or self.dtm_p == 1)
            shares.append(_Share(salient=salient, context=None, total=total, alone=alone))
        return shares

    def _entries(self, scene: _Scene, share: _Share, pick: _Pick, unit: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The scene's part of the matrix as (kept token, source, weight)."""
        entries = [(pick.salient, pick.salient, torch.ones(len(pick.salient), device=unit.device))]
        for spots, context in zip(pick.spots, pick.context, strict=True):
            if not len(context):
                continue
            if self.variant == "parallel":
                joining = spots if share.alone else _without(scene.rows, pick.salient)
            else:
                joining = _without(scene.rows, pick.salient, context)
            nearest = (unit[joining] @ unit[context].T).argmax(1)
            joined = torch.bincount(nearest, minlength=len(context)).float()
            own = (1 / (joined + 1)).clamp(min=self.dtm_beta)
            # A hair below the context token's own weight, so that its position is inherited even at equal weights.
            other = ((1 - own) / joined.clamp(min=1)).minimum(own * (1 - 1e-6))
            owners = torch.cat([context, context[nearest]])
            sources = torch.cat([context, joining])
            weights = torch.cat([torch.where(joined > 0, own, 1), other[nearest]])
            used = weights > 0
            entries.append((owners[used], sources[used], weights[used]))
        return entries


@dataclass(frozen=True, slots=True)
class _Scene:
    """Tokens of consecutive frames that belong together, as indices into the clip's tokens."""

    frames: int

    rows: Tensor
    """All of them."""

    holders: list[Tensor]
    """Those of each frame, or of each row of near-identical frames, that may be kept."""

    anchors: list[Tensor]
    """Those of each anchor frame, completed over the stretch it stands for."""


@dataclass(frozen=True, slots=True)
class _Share:
    """A scene's part of the budget."""

    salient: list[int]
    """Salient tokens of each holder."""

    context: list[int] | None
    """Context tokens of each anchor frame; None to deal out what is left of ``total``."""

    total: int

    alone: bool
    """Whether only an anchor frame's own tokens join its context tokens."""


@dataclass(frozen=True, slots=True)
class _Pick:
    """The tokens chosen in a scene."""

    salient: Tensor

    spots: list[Tensor]
    """Tokens of each anchor frame among which context tokens were sought."""

    context: list[Tensor]
    """Context tokens of each anchor frame."""


def _pick(scene: _Scene, share: _Share, saliency: Tensor, features: Tensor) -> _Pick:
    """Choose salient tokens first, then density peaks among the others of the anchor frames."""
    salient = torch.cat(
        [held[top_in_order(saliency[held], count)] for held, count in zip(scene.holders, share.salient, strict=True)]
    )
    spots = [_without(anchor, salient) for anchor in scene.anchors]
    counts = share.context
    if counts is None:
        room = torch.tensor([len(spot) for spot in spots])
        counts = fill_evenly(room, share.total - len(salient), extra="last").tolist()
    context = [
        spot[top_in_order(density_peaks(features[spot]), count)] if count else spot[:0]
        for spot, count in zip(spots, counts, strict=True)
    ]
    missing = share.total - len(salient) - sum(counts)
    if missing:
        rest = _without(torch.cat(scene.holders), salient, *context)
        salient = torch.cat([salient, rest[top_in_order(saliency[rest], missing)]])
    return _Pick(salient, spots, context)


def _without(rows: Tensor, *taken: Tensor) -> Tensor:
    return rows[~torch.isin(rows, torch.cat(taken))]


def _sizes(cut: Tensor, count: int) -> Tensor:
    """Lengths of the stretches that ``count`` things fall into when cut after the marked ones."""
    ends = torch.cat([cut.nonzero().squeeze(1), cut.new_tensor([count - 1], dtype=torch.int64)])
    return torch.diff(ends, prepend=ends.new_tensor([-1]))


def _edges(sizes: Tensor) -> list[int]:
    return [0, *sizes.cumsum(0).tolist()]


def _even(total: int, places: int) -> list[int]:
    """Equal whole shares, one more for the first where it does not come out even."""
    return [total // places + (i < total % places) for i in range(places)]
