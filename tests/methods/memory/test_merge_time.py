from __future__ import annotations

import pytest
import torch

from streamvid.errors import SettingsError, UnsupportedError
from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryView
from streamvid.temporal.methods.memory.merge_time import MergeTime, diverse
from streamvid.temporal.methods.memory.recent import Recent
from streamvid.tokens import VideoTokens


def column(values: list[float], *, cells: list[int] | None = None, sizes: list[float] | None = None) -> VideoTokens:
    """One token a frame, with one number each, in one cell of a 4 x 4 grid unless said otherwise."""
    count = len(values)
    cell = torch.tensor(cells if cells is not None else [0] * count)
    frame = torch.arange(count)
    return VideoTokens(
        features=torch.tensor(values)[:, None],
        grid=(count, 4, 4),
        position=torch.stack([frame, cell // 4, cell % 4], dim=1),
        pts_seconds=frame.double(),
        duration_seconds=torch.ones(count, dtype=torch.float64),
        size=torch.tensor(sizes) if sizes is not None else torch.ones(count),
        score=torch.ones(count),
    )


def folded(tokens: VideoTokens, count: int) -> list[float]:
    return [round(x, 4) for x in tokens.reduce(MergeTime().consolidate(tokens, count)).features[:, 0].tolist()]


def test_what_differs_least_is_merged_first() -> None:
    assert folded(column([0.0, 0.1, 5.0, 9.0, 9.2, 20.0]), 4) == [0.05, 5.0, 9.1, 20.0]


def test_larger_tokens_weigh_more_and_sizes_add_up() -> None:
    tokens = column([0.0, 1.0, 50.0], sizes=[3.0, 1.0, 1.0])
    out = tokens.reduce(MergeTime().consolidate(tokens, 2))
    assert out.features[:, 0].tolist() == [0.25, 50.0] and out.size.tolist() == [4.0, 1.0]


def test_cells_are_kept_apart_while_merging_along_time_is_enough() -> None:
    """Equal features in different cells stay apart though different ones in one cell are merged."""
    tokens = column([1.0, 1.0, 3.0, 3.0], cells=[0, 5, 0, 5])
    assert folded(tokens, 2) == [2.0, 2.0]


def test_neighbouring_cells_are_merged_when_time_is_not_enough() -> None:
    tokens = column([1.0, 2.0, 7.0, 9.0], cells=[0, 1, 10, 15])
    assert folded(tokens, 2) == [1.5, 8.0]
    assert folded(tokens, 1) == [4.75]


def test_tokens_at_one_position_become_one_whatever_they_are() -> None:
    tokens = column([1.0, 5.0, 9.0])
    tokens.position[:, 0] = torch.tensor([0, 0, 1])
    assert folded(tokens, 3) == [3.0, 9.0]


def test_exact_copies_cost_nothing() -> None:
    tokens = column([4.0] * 8)
    assert folded(tokens, 4) == [4.0] * 4


def test_nothing_is_folded_into_nothing() -> None:
    tokens = column([1.0]).select(torch.zeros(0, dtype=torch.int64))
    assert len(tokens.reduce(MergeTime().consolidate(tokens, 1))) == 0
    with pytest.raises(ValueError, match="at least 1"):
        MergeTime().consolidate(column([1.0]), 0)


def test_diverse_keys_leave_out_what_is_like_one_that_stays() -> None:
    keys = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.99, 0.1], [0, 1], [0.1, 0.99], [-1, 0]]), dim=1)
    assert diverse(keys, 3).tolist() in ([0, 2, 4], [0, 3, 4], [1, 3, 4], [1, 2, 4])
    assert diverse(keys, 9).tolist() == [0, 1, 2, 3, 4]
    assert diverse(keys[:1].expand(4, 2), 2).tolist() == [0, 1]


def test_recall_reads_every_span_alike() -> None:
    start = torch.arange(4, dtype=torch.float64)
    memory = MemoryView(start, start + 1, torch.tensor([8, 8, 3, 8]), torch.zeros(4, 1, 4))
    assert MergeTime().recall(memory, 20, Signals()).tolist() == [5, 6, 3, 6]


def test_settings_and_methods_that_only_recall() -> None:
    for settings in ({"keys": 0}, {"least": 1}):
        with pytest.raises(SettingsError, match="at least 1 key"):
            MergeTime(**settings)
    with pytest.raises(UnsupportedError, match="merge_time does"):
        Recent().consolidate(column([1.0]), 1)
