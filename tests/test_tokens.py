from __future__ import annotations

import dataclasses

import pytest
import torch

from streamvid.reduction import Reduction
from streamvid.tokens import VideoTokens


def tokens(frames: int = 2, height: int = 2, width: int = 3, *, start: float = 0.0, layers: int = 0) -> VideoTokens:
    position = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    count = len(position)
    features = torch.arange(count * 2.0).reshape(count, 2)
    return VideoTokens(
        features=features,
        grid=(frames, height, width),
        position=position,
        pts_seconds=start + position[:, 0] * 0.5,
        duration_seconds=torch.full((count,), 0.5, dtype=torch.float64),
        size=torch.ones(count),
        score=torch.linspace(0, 1, count),
        layers=tuple(features * (i + 2) for i in range(layers)),
    )


def test_selecting_moves_everything_alike() -> None:
    clip = tokens(layers=2)
    some = clip.select(torch.tensor([1, 7]))
    assert len(some) == 2
    for name in ("features", "position", "pts_seconds", "duration_seconds", "size", "score"):
        assert torch.equal(getattr(some, name), getattr(clip, name)[[1, 7]])
    assert torch.equal(some.layers[1], clip.layers[1][[1, 7]])
    assert some.grid == clip.grid


def test_leaving_everything_returns_the_same_object() -> None:
    clip = tokens()
    assert clip.reduce(None) is clip
    assert clip.reduce(Reduction.keep_all(len(clip))) is clip


def test_merging_averages_features_and_layers_and_adds_up_sizes() -> None:
    clip = tokens(layers=1)
    group = torch.tensor([0] * 6 + [1] * 6)
    merged = clip.reduce(Reduction.merge(group))
    torch.testing.assert_close(merged.features, torch.stack([clip.features[:6].mean(0), clip.features[6:].mean(0)]))
    torch.testing.assert_close(merged.layers[0], merged.features * 2)
    assert merged.size.tolist() == pytest.approx([6, 6])
    assert merged.position.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert merged.pts_seconds.tolist() == [0, 0.5]
    assert merged.score.tolist() == pytest.approx([clip.score[:6].mean().item(), clip.score[6:].mean().item()])


def test_tokens_of_one_frame_merged_last_no_longer_than_the_frame() -> None:
    merged = tokens().reduce(Reduction.merge(torch.tensor([0] * 6 + [1] * 6)))
    assert merged.duration_seconds.tolist() == [0.5, 0.5]


def test_fresh_features_do_not_overwrite_layers() -> None:
    """Layers have the width of the features, so nothing but intent tells them apart."""
    clip = tokens(layers=1)
    count = len(clip)
    plan = Reduction.mix(
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count),
        torch.full((count,), 1 / count),
        num_inputs=count,
        num_outputs=1,
        features=torch.tensor([[-1.0, -1.0]]),
    )
    merged = clip.reduce(plan)
    assert merged.features.tolist() == [[-1, -1]]
    torch.testing.assert_close(merged.layers[0], clip.layers[0].mean(0, keepdim=True))


def test_reducing_twice_is_reducing_by_the_chain() -> None:
    clip = tokens()
    first = Reduction.merge(torch.arange(len(clip)) // 2)
    second = Reduction.select(torch.tensor([0, 4]), 6)
    one, two = clip.reduce(first.then(second)), clip.reduce(first).reduce(second)
    torch.testing.assert_close(one.features, two.features)
    assert torch.equal(one.position, two.position)
    torch.testing.assert_close(one.size, two.size)


def test_clips_are_put_together_with_frames_counted_on() -> None:
    whole = VideoTokens.cat([tokens(2, layers=1), tokens(3, start=1.0, layers=1)])
    assert whole.grid == (5, 2, 3)
    assert whole.position[:, 0].tolist() == torch.arange(5).repeat_interleave(6).tolist()
    assert (whole.pts_seconds.diff() >= 0).all()
    assert whole.layers[0].shape == whole.features.shape
    with pytest.raises(ValueError, match="nothing"):
        VideoTokens.cat([])


def test_rows_that_do_not_match_are_refused() -> None:
    clip = tokens(layers=1)
    with pytest.raises(ValueError, match="size must have 12 rows"):
        dataclasses.replace(clip, size=torch.ones(3))
    with pytest.raises(ValueError, match="position"):
        dataclasses.replace(clip, position=torch.zeros(12, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="layers"):
        dataclasses.replace(clip, layers=(torch.ones(12, 3),))
    with pytest.raises(ValueError, match="12 inputs|this reduction takes"):
        clip.reduce(Reduction.select(torch.tensor([0]), 3))
