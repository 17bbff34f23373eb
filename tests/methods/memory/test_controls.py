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


def test_uniform_reads_evenly_spaced_spans_whole() -> None:
    assert Uniform().recall(memory(*[10] * 9), 30, Signals()).nonzero().flatten().tolist() == [1, 4, 7]
    assert int(Uniform().recall(memory(*[10] * 9), 30, Signals()).max()) == 10


def test_uniform_spends_the_rest_where_it_looked_least() -> None:
    given_tokens = Uniform().recall(memory(*[10] * 9), 13, Signals())
    assert given_tokens.tolist() == [3, 0, 0, 0, 10, 0, 0, 0, 0]


def test_uniform_with_less_than_a_span_reads_the_middle() -> None:
    assert Uniform().recall(memory(*[5] * 9), 3, Signals()).tolist() == [0, 0, 0, 0, 3, 0, 0, 0, 0]


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


@pytest.mark.parametrize("extra", ["first", "last"])
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
