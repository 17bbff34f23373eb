from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from streamvid.budget import Budget
from streamvid.errors import SettingsError
from streamvid.reduction import Reduction
from streamvid.signals import Signals
from streamvid.temporal.methods.embedding.fastvid import VARIANTS, FastVid
from streamvid.temporal.methods.functional import density_peaks, latest_per_cell
from streamvid.tokens import VideoTokens

HEIGHT, WIDTH, CHANNELS = 4, 5, 16
CELLS = HEIGHT * WIDTH


def scenes(*lengths: int, noise: float = 0.3, seed: int = 0) -> tuple[VideoTokens, Signals]:
    """Scenes of unlike pictures, with frame features that tell them apart and nothing else."""
    source = torch.Generator().manual_seed(seed)
    frames = sum(lengths)
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    picture = torch.randn(len(lengths), CELLS, CHANNELS, generator=source)
    features = picture[which] + noise * torch.randn(frames, CELLS, CHANNELS, generator=source)
    position = torch.cartesian_prod(torch.arange(frames), torch.arange(HEIGHT), torch.arange(WIDTH))
    count = frames * CELLS
    tokens = VideoTokens(
        features=features.flatten(0, 1),
        grid=(frames, HEIGHT, WIDTH),
        position=position,
        pts_seconds=position[:, 0].double(),
        duration_seconds=torch.ones(count, dtype=torch.float64),
        size=torch.ones(count),
        score=torch.zeros(count),
    )
    angle = which * 0.7 + torch.arange(frames) * 0.05
    pooled = torch.stack([angle.cos(), angle.sin()], dim=1)
    return tokens, Signals(received_attention=torch.rand(count, generator=source), frame_features=pooled)


def thin(tokens: VideoTokens, signals: Signals, keep: Tensor) -> tuple[VideoTokens, Signals]:
    """What is left after some cells were not encoded."""
    assert signals.received_attention is not None
    return tokens.select(keep), dataclasses.replace(signals, received_attention=signals.received_attention[keep])


def plan_of(method: FastVid, tokens: VideoTokens, signals: Signals) -> Reduction:
    plan = method.reduce(tokens, signals)
    assert plan is not None
    sums = plan.apply(torch.ones(len(tokens)))
    torch.testing.assert_close(sums, torch.ones(len(sums)))  # every output is a mean
    lead = plan.leader()
    assert (lead[1:] > lead[:-1]).all()
    return plan


def merged(plan: Reduction) -> Tensor:
    """(M,) whether an output is made of several tokens."""
    return torch.bincount(plan.entries()[0], minlength=plan.num_outputs) > 1


def test_scenes_end_where_frames_differ_most() -> None:
    _, signals = scenes(3, 4, 2)
    assert signals.frame_features is not None
    assert FastVid(dyseg_c=3, dyseg_tau=-1).segments(signals.frame_features).tolist() == [3, 4, 2]
    assert FastVid(dyseg_c=1, dyseg_tau=0.9).segments(signals.frame_features).tolist() == [3, 4, 2]
    assert FastVid(dyseg_c=1, dyseg_tau=-1).segments(signals.frame_features).tolist() == [9]
    assert FastVid(dyseg_c=50).segments(signals.frame_features).tolist() == [1] * 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_scene_survives_however_short(variant: str) -> None:
    tokens, signals = scenes(7, 1, 8)
    plan = plan_of(FastVid(Budget(keep_ratio=0.15), dyseg_c=3, variant=variant), tokens, signals)
    frames = tokens.reduce(plan).position[:, 0]
    assert 7 in frames
    assert (frames < 7).any()
    assert (frames > 7).any()


@pytest.mark.parametrize("variant", ["parallel", "sequential"])
def test_most_attended_tokens_of_every_frame_stay_as_they_are(variant: str) -> None:
    tokens, signals = scenes(4, 4)
    method = FastVid(Budget(keep_ratio=0.25), dyseg_c=2, variant=variant)
    plan = plan_of(method, tokens, signals)
    untouched = plan.leader()[~merged(plan)].tolist()
    attention = signals.received_attention
    assert attention is not None
    for frame in range(8):
        best = int(attention[frame * CELLS : (frame + 1) * CELLS].argmax()) + frame * CELLS
        assert best in untouched


def test_context_token_is_the_weighted_mean_of_itself_and_those_that_join() -> None:
    """One frame of two heaps, by hand: 1 salient token, 2 context tokens, 3 others join each of them."""
    heap = torch.tensor([[0.0, 0], [0, 0.2], [0.3, 0], [0, -0.25]])
    features = torch.cat([torch.tensor([[10.0, 10]]), heap + torch.tensor([4.0, 0]), heap + torch.tensor([0, 5.0])])
    tokens = VideoTokens(
        features=features,
        grid=(1, 3, 3),
        position=torch.cartesian_prod(torch.arange(1), torch.arange(3), torch.arange(3)),
        pts_seconds=torch.zeros(9, dtype=torch.float64),
        duration_seconds=torch.ones(9, dtype=torch.float64),
        size=torch.ones(9),
        score=torch.zeros(9),
    )
    signals = Signals(received_attention=torch.tensor([9.0] + [1] * 8), frame_features=torch.ones(1, 2))
    method = FastVid(Budget(tokens=3), stprune_d=0.7, dtm_beta=0.7, variant="sequential")
    plan = plan_of(method, tokens, signals)
    expected = torch.zeros(3, 9)
    expected[0, 0] = 1
    expected[1, 1:5] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    expected[2, 5:] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    torch.testing.assert_close(plan.apply(torch.eye(9)), expected)
    assert tokens.reduce(plan).size.tolist() == pytest.approx([1, 4, 4])


def test_context_token_keeps_its_place_even_where_all_weigh_the_same() -> None:
    """With beta 0 a context token weighs as much as each that joins; its own position must still win."""
    tokens, signals = scenes(5, 5)
    for variant in VARIANTS:
        low, high = (
            plan_of(FastVid(dyseg_c=2, dtm_beta=beta, variant=variant), tokens, signals).leader() for beta in (0, 0.9)
        )
        assert torch.equal(low, high)


def test_beta_one_leaves_context_tokens_alone() -> None:
    tokens, signals = scenes(5, 5)
    plan = plan_of(FastVid(dyseg_c=2, dtm_beta=1.0), tokens, signals)
    assert not merged(plan).any()


def test_context_sits_in_anchor_frames_counted_from_the_end_of_the_scene() -> None:
    tokens, signals = scenes(6, 3)
    plan = plan_of(FastVid(dyseg_c=2, dtm_p=4, variant="sequential"), tokens, signals)
    frames = set(tokens.reduce(plan).position[merged(plan), 0].tolist())
    assert frames == {1, 5, 8}


def test_merging_stays_within_the_scene() -> None:
    tokens, signals = scenes(6, 3)
    for variant in VARIANTS:
        plan = plan_of(FastVid(dyseg_c=2, variant=variant), tokens, signals)
        rows, columns, _ = plan.entries()
        frame = tokens.position[:, 0]
        assert torch.equal(frame[plan.leader()][rows] < 6, frame[columns] < 6)


def test_only_the_last_of_near_identical_frames_holds_tokens() -> None:
    tokens, signals = scenes(4, 4)
    plan = plan_of(FastVid(Budget(keep_ratio=0.2), dyseg_c=2, dyseg_ignore=0.9), tokens, signals)
    assert set(tokens.reduce(plan).position[:, 0].tolist()) == {3, 7}


def test_few_enough_tokens_are_left_alone() -> None:
    tokens, signals = scenes(4, 4)
    assert FastVid(Budget(keep_ratio=1.0)).reduce(tokens, signals) is None
    keep = torch.zeros(len(tokens), dtype=torch.bool)
    keep[:40] = True
    assert FastVid(Budget(keep_ratio=0.25)).reduce(*thin(tokens, signals, keep)) is None
    assert FastVid(Budget(keep_ratio=0.24)).reduce(*thin(tokens, signals, keep)) is not None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("variant", ["parallel", "sequential"])
def test_ragged_clip_keeps_exactly_the_budget_of_the_whole_grid(variant: str, seed: int) -> None:
    tokens, signals = scenes(5, 2, 6, seed=seed)
    source = torch.Generator().manual_seed(seed)
    density = torch.rand(13, 1, generator=source).expand(13, CELLS)
    keep = (torch.rand(13, CELLS, generator=source) < density).flatten()
    keep[:CELLS] = True
    shown, known = thin(tokens, signals, keep)
    for budget in (Budget(keep_ratio=0.1), Budget(keep_ratio=0.3), Budget(tokens=1), Budget(tokens=50)):
        method = FastVid(budget, dyseg_c=3, variant=variant)
        plan = method.reduce(shown, known)
        target = budget.count(len(tokens))
        assert (len(shown) if plan is None else plan.num_outputs) == min(target, len(shown))


@pytest.mark.parametrize("seed", range(4))
def test_ragged_near_identical_frames_hold_one_token_a_cell(seed: int) -> None:
    tokens, signals = scenes(5, 2, 6, seed=seed)
    keep = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed)) < 0.4
    shown, known = thin(tokens, signals, keep)
    here = keep.reshape(-1, CELLS)
    cells = sum(int(part.any(0).sum()) for part in (here[:5], here[5:7], here[7:]))  # one row of frames a scene
    for budget in (Budget(tokens=20), Budget(tokens=75)):
        plan = plan_of(FastVid(budget, dyseg_c=3, dyseg_ignore=0.9), shown, known)
        assert plan.num_outputs == min(budget.count(len(tokens)), cells)


def test_still_scene_of_which_only_the_first_frame_was_encoded_is_still_represented() -> None:
    """Anchor frames are the last ones; where nothing changed they hold no tokens of their own."""
    tokens, signals = scenes(8)
    keep = torch.zeros(len(tokens), dtype=torch.bool)
    keep[:CELLS] = True
    keep[5 * CELLS + 3] = True  # the one cell that changed
    shown, known = thin(tokens, signals, keep)
    for variant in VARIANTS:
        plan = plan_of(FastVid(Budget(tokens=10), dyseg_c=1, dyseg_tau=0.1, variant=variant), shown, known)
        assert plan.num_outputs == 10
        assert merged(plan).any()


def test_missing_cell_of_an_anchor_frame_is_filled_by_its_latest_token() -> None:
    cell = torch.tensor([0, 1, 2, 1, 0, 2])
    assert latest_per_cell(torch.arange(6), cell, 4).tolist() == [4, 3, 5]
    assert latest_per_cell(torch.arange(4), cell, 4).tolist() == [0, 3, 2]
    assert latest_per_cell(torch.arange(0), cell, 4).tolist() == []


def test_frame_without_tokens_is_no_cut_whatever_its_feature() -> None:
    tokens, signals = scenes(6)
    assert signals.frame_features is not None
    features = signals.frame_features.clone()
    features[2:4] = float("nan")
    keep = torch.ones(len(tokens), dtype=torch.bool)
    keep[2 * CELLS : 4 * CELLS] = False
    shown, known = thin(tokens, dataclasses.replace(signals, frame_features=features), keep)
    method = FastVid(Budget(keep_ratio=0.2), dyseg_c=1, dyseg_tau=0.2, variant="sequential")
    rows, columns, _ = plan_of(method, shown, known).entries()
    frame = shown.position[:, 0]
    assert bool((frame[columns][rows == rows.max()] < 2).any())  # the last context token takes in the first frames


def test_one_missing_token_changes_little() -> None:
    tokens, signals = scenes(5, 5, noise=0.5)
    method = FastVid(Budget(keep_ratio=0.2), dyseg_c=2, variant="sequential")
    keep = torch.ones(len(tokens), dtype=torch.bool)
    keep[0] = False
    full = tokens.reduce(plan_of(method, tokens, signals))
    shown, known = thin(tokens, signals, keep)
    ragged = shown.reduce(plan_of(method, shown, known))
    assert len(full) == len(ragged) == 40
    same = {tuple(p) for p in full.position.tolist()} & {tuple(p) for p in ragged.position.tolist()}
    assert len(same) >= 38


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [(1,), (2,), (1, 1, 1)])
def test_short_clips_work(variant: str, lengths: tuple[int, ...]) -> None:
    tokens, signals = scenes(*lengths)
    for budget in (Budget(tokens=1), Budget(keep_ratio=0.05), Budget(keep_ratio=0.5), Budget(keep_ratio=0.99)):
        plan = plan_of(FastVid(budget, variant=variant), tokens, signals)
        assert 1 <= plan.num_outputs <= budget.count(len(tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_tokens_give_identical_outputs(variant: str) -> None:
    tokens, signals = scenes(4, 4)
    same = dataclasses.replace(tokens, features=torch.ones_like(tokens.features))
    for clip in (same, dataclasses.replace(same, features=torch.zeros_like(same.features))):
        reduced = clip.reduce(plan_of(FastVid(variant=variant), clip, signals))
        torch.testing.assert_close(reduced.features, clip.features[: len(reduced)])


def test_density_peaks_are_one_a_heap() -> None:
    source = torch.Generator().manual_seed(0)
    heaps = torch.tensor([[0.0, 0], [5, 0], [0, 5]]).repeat_interleave(8, 0)
    x = heaps + 0.2 * torch.randn(24, 2, generator=source)
    assert sorted((density_peaks(x).argsort(descending=True)[:3] // 8).tolist()) == [0, 1, 2]
    assert density_peaks(torch.ones(1, 4)).isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [{"variant": "fast"}, {"dyseg_c": 0}, {"dtm_p": 0}, {"stprune_d": 1.2}, {"dtm_beta": -0.1}],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        FastVid(**settings)


def test_signals_that_do_not_match_are_refused() -> None:
    tokens, signals = scenes(4)
    with pytest.raises(ValueError, match="received_attention"):
        FastVid().reduce(tokens, Signals())
    with pytest.raises(ValueError, match="frame_features"):
        FastVid().reduce(tokens, dataclasses.replace(signals, frame_features=torch.ones(3, 2)))
