from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryView
from streamvid.temporal.methods.functional import fill_evenly
from streamvid.temporal.methods.memory.recent import Recent
from streamvid.temporal.methods.memory.uniform import Uniform

ROOM = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def memory(*tokens: int) -> MemoryView:
    start = torch.arange(len(tokens), dtype=torch.float64)
    return MemoryView(start, start + 1, torch.tensor(tokens), torch.zeros(len(tokens), 1, 4))


def test_uniform_gives_every_span_the_same() -> None:
    assert Uniform().recall(memory(10, 10, 10, 10), 12, Signals()).tolist() == [3, 3, 3, 3]


def test_uniform_hands_on_what_a_short_span_cannot_take() -> None:
    assert Uniform().recall(memory(1, 10, 0, 10), 9, Signals()).tolist() == [1, 4, 0, 4]


def test_uniform_with_fewer_tokens_than_spans_reads_evenly_spaced_ones() -> None:
    assert Uniform().recall(memory(*[5] * 9), 3, Signals()).nonzero().flatten().tolist() == [1, 4, 7]


def test_recent_reads_whole_spans_backwards() -> None:
    assert Recent().recall(memory(10, 10, 10, 10), 25, Signals()).tolist() == [0, 5, 10, 10]
    assert Recent().recall(memory(4, 3), 100, Signals()).tolist() == [4, 3]


@pytest.mark.parametrize("method", [Uniform(), Recent()])
@given(tokens=ROOM, budget=st.integers(0, 200))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_controls_spend_all_of_the_budget_that_can_be_spent(
    method: Uniform | Recent, tokens: list[int], budget: int
) -> None:
    view = memory(*tokens)
    given_tokens = method.recall(view, budget, Signals())
    assert ((given_tokens >= 0) & (given_tokens <= view.tokens)).all()
    assert int(given_tokens.sum()) == min(budget, sum(tokens))


@pytest.mark.parametrize("method", [Uniform(), Recent()])
def test_negative_budget_is_refused(method: Uniform | Recent) -> None:
    with pytest.raises(ValueError, match="budget"):
        method.recall(memory(1), -1, Signals())


@pytest.mark.parametrize("extra", ["first", "last", "spaced"])
@given(capacity=ROOM, total=st.integers(0, 400))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_fill_evenly_is_level(extra: str, capacity: list[int], total: int) -> None:
    """Nobody with room left has two fewer than anybody else."""
    room = torch.tensor(capacity)
    share = fill_evenly(room, total, extra=extra)  # type: ignore[arg-type]
    assert int(share.sum()) == min(total, int(room.sum()))
    assert (share <= room).all()
    open_places = share[share < room]
    if len(open_places):
        assert int(share.max()) - int(open_places.min()) <= 1


def test_fill_evenly_gives_extras_where_asked() -> None:
    room = torch.tensor([9, 9, 1, 9, 9])
    assert fill_evenly(room, 11, extra="first").tolist() == [3, 3, 1, 2, 2]
    assert fill_evenly(room, 11, extra="last").tolist() == [2, 2, 1, 3, 3]
    assert fill_evenly(room, 11, extra="spaced").tolist() == [2, 3, 1, 2, 3]
