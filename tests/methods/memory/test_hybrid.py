"""Recall: relevance, neighbours, coverage, recent past, and never more than the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.signals import Signals
from streamvid.temporal.methods.base import MemoryView
from streamvid.temporal.methods.memory.hybrid import Hybrid


def memory(tokens: list[int], relevant: dict[int, float] | None = None) -> tuple[MemoryView, Signals]:
    """Spans of 4 s; similarity to the question 0 but where given."""
    count = len(tokens)
    keys = torch.zeros(count, 1, 8)
    noise = torch.nn.functional.normalize(torch.randn(count, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    for i in range(count):
        similarity = (relevant or {}).get(i, 0.0)
        keys[i, 0, 0] = similarity
        keys[i, 0, 1:] = noise[i] * (1 - similarity**2) ** 0.5
    start = torch.arange(count, dtype=torch.float64) * 4
    view = MemoryView(start, start + 4, torch.tensor(tokens), keys)
    return view, Signals(question=torch.eye(8)[0])


def test_everything_is_given_when_it_fits() -> None:
    view, signals = memory([5, 7, 3])
    assert Hybrid().recall(view, 15, signals).tolist() == [5, 7, 3]


def test_the_span_that_fits_the_question_comes_whole_with_its_neighbours() -> None:
    view, signals = memory([16] * 50, {20: 0.9})
    given_ = Hybrid().recall(view, 200, signals)
    assert given_[19:22].tolist() == [16, 16, 16]


def test_the_newest_span_is_always_there() -> None:
    view, signals = memory([16] * 50, {3: 0.9, 4: 0.8, 5: 0.85})
    assert Hybrid().recall(view, 160, signals)[-1] == 16


def test_a_gist_of_the_whole_timeline_comes_along() -> None:
    view, signals = memory([16] * 40, {3: 0.9})
    places = (Hybrid(gist_share=0.3).recall(view, 300, signals) > 0).nonzero().squeeze(1)
    assert int(places.diff().max()) <= 9


def test_a_question_that_points_somewhere_leaves_the_rest_of_the_budget_alone() -> None:
    view, signals = memory([16] * 100, {30: 0.9})
    given_ = Hybrid().recall(view, 800, signals)
    assert given_[29:32].tolist() == [16, 16, 16]
    assert int(given_.sum()) <= 80 + 48 + 120


def test_a_question_about_everything_uses_the_whole_budget() -> None:
    view, signals = memory([16] * 100, {i: 0.5 for i in range(0, 100, 3)})
    assert int(Hybrid().recall(view, 800, signals).sum()) == 800


def test_two_places_that_fit_are_both_read() -> None:
    """Diversity must not lose the second of two equally relevant, different moments."""
    view, signals = memory([16] * 60, {10: 0.9, 45: 0.88})
    given_ = Hybrid().recall(view, 160, signals)
    assert given_[10] == 16
    assert given_[45] == 16


def test_without_a_question_the_budget_is_dealt_out() -> None:
    view, _ = memory([16] * 40)
    given_ = Hybrid().recall(view, 80, Signals())
    assert int(given_.sum()) == 80
    assert int(given_.nonzero().squeeze(1).diff().max()) <= 12


@given(
    tokens=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    budget=st.integers(1, 500),
    best=st.integers(0, 59),
)
@settings(max_examples=60, deadline=None)
def test_something_is_given_and_never_more_than_the_budget(tokens: list[int], budget: int, best: int) -> None:
    view, signals = memory(tokens, {best % len(tokens): 0.8})
    given_ = Hybrid().recall(view, budget, signals)
    assert 0 < int(given_.sum()) <= min(budget, sum(tokens))
    assert (given_ <= view.tokens).all()
    assert (given_ >= 0).all()


def test_a_larger_gist_share_spreads_wider() -> None:
    view, signals = memory([16] * 60, {20: 0.9})
    narrow = Hybrid(gist_share=0.05).recall(view, 400, signals)
    wide = Hybrid(gist_share=0.5).recall(view, 400, signals)
    assert int((wide > 0).sum()) > int((narrow > 0).sum())


def test_settings_reach_the_method() -> None:
    from streamvid.temporal.methods.registry import build

    assert build("hybrid:relevant_share=0.5").settings()["relevant_share"] == pytest.approx(0.5)
