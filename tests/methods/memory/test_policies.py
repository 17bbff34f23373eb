"""What every recall policy promises, whatever its idea; one table, all policies of the folder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from streamvid.signals import Signal, Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView, Stage
from streamvid.temporal.methods.functional import (
    fill_by_weight,
    fill_in_order,
    gist,
    marginal_relevance,
    spaced,
    standing_out,
    with_neighbours,
)
from streamvid.temporal.methods.memory.adaptive import Adaptive
from streamvid.temporal.methods.memory.attention import Attention
from streamvid.temporal.methods.memory.coverage import Coverage
from streamvid.temporal.methods.memory.hybrid import Hybrid
from streamvid.temporal.methods.memory.mmr import Mmr
from streamvid.temporal.methods.memory.relevance import Relevance
from streamvid.temporal.methods.registry import build, methods

IDS = [name for name, cls in methods().items() if cls.stage is Stage.MEMORY]

SPENDS_ALL = ["uniform", "recent", "coverage", "relevance", "mmr", "attention"]
"""Policies that leave nothing of the budget; the others hold back where a question points somewhere."""

WIDE = ["relevance", "mmr", "adaptive", "hybrid", "attention"]
"""Policies that add neighbours."""


def policy(name: str) -> MemoryMethod:
    method = build(name)
    assert isinstance(method, MemoryMethod)
    return method


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def memory(tokens: list[int], similarity: list[float] | None = None, *, seed: int = 0) -> tuple[MemoryView, Signals]:
    """Spans of 4 s whose keys have the given similarity to the question; attention agrees with similarity."""
    count = len(tokens)
    generator = seeded(seed)
    like = torch.rand(count, generator=generator) * 2 - 1 if similarity is None else torch.tensor(similarity)
    noise = F.normalize(torch.randn(count, 7, generator=generator), dim=1)
    keys = torch.cat([like[:, None], noise * (1 - like[:, None] ** 2).clamp(min=0).sqrt()], dim=1)[:, None]
    start = torch.arange(count, dtype=torch.float64) * 4
    view = MemoryView(
        start, start + 4, torch.tensor(tokens), keys, attention=lambda rows, each, depth: like[rows].float()
    )
    return view, Signals(question=torch.eye(8)[0])


ROOM = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@pytest.mark.parametrize("name", IDS)
@given(tokens=ROOM, budget=st.integers(0, 600), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_budget_and_no_span_is_overdrawn(name: str, tokens: list[int], budget: int, seed: int) -> None:
    view, signals = memory(tokens, seed=seed)
    given_ = policy(name).recall(view, budget, signals)
    assert given_.dtype == torch.int64
    assert bool(((given_ >= 0) & (given_ <= view.tokens)).all())
    assert int(given_.sum()) <= budget
    if sum(tokens) <= budget:
        assert given_.tolist() == tokens, "all that fits is given"
    elif budget and name in SPENDS_ALL:
        assert int(given_.sum()) == budget
    elif budget:
        assert int(given_.sum()) > 0


@pytest.mark.parametrize("name", IDS)
@given(tokens=ROOM, budget=st.integers(0, 600), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_same_is_given_again_and_nothing_is_changed(name: str, tokens: list[int], budget: int, seed: int) -> None:
    view, signals = memory(tokens, seed=seed)
    before = view.tokens.clone(), view.keys.clone()
    first = policy(name).recall(view, budget, signals)
    assert torch.equal(first, policy(name).recall(view, budget, signals))
    assert torch.equal(view.tokens, before[0])
    assert torch.equal(view.keys, before[1])
    first += 1
    assert torch.equal(view.tokens, before[0]), "what is given is not the memory's own table"


@pytest.mark.parametrize("name", IDS)
def test_an_empty_memory_gives_nothing(name: str) -> None:
    none = torch.zeros(0, dtype=torch.float64)
    view = MemoryView(none, none, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0, 8))
    assert policy(name).recall(view, 10, Signals(question=torch.eye(8)[0])).shape == (0,)


@pytest.mark.parametrize("name", IDS)
def test_a_negative_budget_is_refused(name: str) -> None:
    view, signals = memory([3, 4])
    with pytest.raises(ValueError, match="budget must be at least 0 tokens, got -1"):
        policy(name).recall(view, -1, signals)


@pytest.mark.parametrize("name", [name for name in IDS if Signal.QUESTION in methods()[name].needs])
def test_a_policy_that_needs_the_question_says_what_to_use_without(name: str) -> None:
    view, _ = memory([30] * 9)
    with pytest.raises(ValueError, match="there is none; use coverage or uniform"):
        policy(name).recall(view, 10, Signals())


@pytest.mark.parametrize("name", WIDE)
def test_neighbours_come_along_as_far_as_set(name: str) -> None:
    view, signals = memory([16] * 60, [0.9 if i == 30 else 0.0 for i in range(60)])
    for neighbours in (0, 1, 2):
        given_ = policy(f"{name}:neighbours={neighbours}").recall(view, 100, signals)
        wanted = range(30 - neighbours, 31 + neighbours)
        assert bool((given_[wanted.start : wanted.stop] > 0).all())
        if neighbours < 2:
            assert int(given_[30]) == 16


@pytest.mark.parametrize(("name", "setting"), [(n, "neighbours=-1") for n in WIDE] + [("coverage", "tokens_each=0")])
def test_impossible_settings_are_refused_when_put_together(name: str, setting: str) -> None:
    with pytest.raises(Exception, match=r"must be (at least|>)|>= 0"):
        policy(f"{name}:{setting}")


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensor operations and the largest result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def large(spans: int, *, similarity: bool = True) -> tuple[MemoryView, Signals]:
    generator = seeded(1)
    keys = F.normalize(torch.randn(spans, 1, 4, generator=generator), dim=2)
    like = torch.rand(spans, generator=generator)
    start = torch.arange(spans, dtype=torch.float64)
    tokens = torch.randint(1, 65, (spans,), generator=generator)
    view = MemoryView(start, start + 1, tokens, keys, like, lambda rows, each, depth: like[rows])
    return view, Signals(question=torch.eye(4)[0])


@pytest.mark.parametrize("name", IDS)
def test_work_does_not_step_through_spans(name: str) -> None:
    """A hundred times the spans: hardly more operations, and no table that grows faster than the spans."""
    counts = []
    for spans in (4_000, 400_000):
        view, signals = large(spans)
        with Counting() as counting:
            policy(name).recall(view, 20_000, signals)
        counts.append(counting.operations)
        assert counting.largest <= 6 * spans + 70_000
    assert counts[1] <= counts[0] * 3 + 200
    assert counts[1] < 4_000


# --- what makes each policy itself ----------------------------------------------------------------------------------


def test_relevance_takes_the_best_first() -> None:
    view, signals = memory([10] * 6, [0.1, 0.9, 0.2, 0.3, 0.8, 0.0])
    assert Relevance(neighbours=0).recall(view, 25, signals).tolist() == [0, 10, 0, 5, 10, 0]


def test_mmr_passes_over_a_copy_that_relevance_takes() -> None:
    """Spans 2 and 3 are the same picture, the best; span 7 is another one, a little less like the question."""
    view, signals = memory([10] * 10, [0.0, 0.0, 0.9, 0.9, 0.0, 0.0, 0.0, 0.8, 0.0, 0.0])
    view.keys[3] = view.keys[2]
    near = Relevance(neighbours=0).recall(view, 20, signals).nonzero().flatten().tolist()
    apart = Mmr(neighbours=0, diversity=0.5).recall(view, 20, signals).nonzero().flatten().tolist()
    assert near == [2, 3]
    assert apart == [2, 7]


def test_mmr_without_diversity_is_relevance() -> None:
    view, signals = memory([7, 3, 9, 4, 8, 2, 6, 5], seed=3)
    assert torch.equal(Mmr(diversity=0.0).recall(view, 20, signals), Relevance().recall(view, 20, signals))


def test_coverage_is_even_in_time_where_spans_are_not() -> None:
    """One span covers the first half of the hour: two of four instants fall into it."""
    start = torch.tensor([0.0, 1800, 1900, 2000, 2100, 2200, 2300, 2400, 2500], dtype=torch.float64)
    stop = torch.cat([start[1:], torch.tensor([3600.0], dtype=torch.float64)])
    view = MemoryView(start, stop, torch.full((9,), 32), torch.zeros(9, 0, 0))
    given_ = Coverage(tokens_each=16).recall(view, 64, Signals())
    assert given_.nonzero().flatten().tolist() == [0, 5, 8]
    assert int(given_.sum()) == 64


def test_coverage_of_an_instant_in_a_gap_takes_the_nearest_span() -> None:
    start = torch.tensor([0.0, 90.0], dtype=torch.float64)
    view = MemoryView(start, start + 10, torch.tensor([20, 20]), torch.zeros(2, 0, 0))
    assert Coverage().recall(view, 16, Signals()).tolist() == [16, 0]
    later = MemoryView(torch.tensor([0.0, 60.0], dtype=torch.float64), start + 10, view.tokens, view.keys)
    assert Coverage().recall(later, 16, Signals()).tolist() == [0, 16]


def test_adaptive_gives_more_to_what_fits_better() -> None:
    like = [0.05 * (i % 5) for i in range(40)]
    like[10], like[25] = 0.6, 0.5
    view, signals = memory([400] * 40, like)
    given_ = Adaptive(neighbours=0, pointing=99, least=4).recall(view, 400, signals)
    assert given_[10] > given_[25] > given_[12] > 0
    assert int((given_ > 0).sum()) > 8


def test_adaptive_with_little_reads_the_best_span_and_not_its_neighbour() -> None:
    """Neighbours weigh as much as the span they are beside; ties must not go to the earlier of the two."""
    view, signals = memory([64] * 40, [0.9 if i == 20 else 0.0 for i in range(40)])
    assert Adaptive(gist_share=0).recall(view, 16, signals).nonzero().flatten().tolist() == [20]


def test_a_smaller_temperature_gives_the_best_more() -> None:
    view, signals = memory([64] * 40, [0.02 * i for i in range(40)])
    warm, cold = (Adaptive(temperature=t, neighbours=0, pointing=99).recall(view, 300, signals)[-1] for t in (2.0, 0.2))
    assert cold > warm


def test_attention_asks_the_model_about_candidates_only() -> None:
    view, signals = memory([16] * 50, [i / 50 for i in range(50)])
    asked: list[Tensor] = []

    def looks(rows: Tensor, each: int, depth: float) -> Tensor:
        asked.append(rows)
        assert (each, depth) == (4, 0.25)
        return -rows.float()

    view = MemoryView(view.start_seconds, view.stop_seconds, view.tokens, view.keys, attention=looks)
    method = Attention(candidates=10, tokens_each=4, depth=0.25, neighbours=0)
    given_ = method.recall(view, 20, signals)
    assert asked[0].tolist() == list(range(40, 50)), "the most similar ones"
    assert given_.nonzero().flatten().tolist() == [40, 41], "what the model looked at most"
    method.recall(view, 20, Signals())
    assert asked[1].tolist() == spaced(10, 50).tolist(), "evenly spaced where nothing is known"


def test_attention_without_a_model_is_refused() -> None:
    view, signals = large(9)
    bare = MemoryView(view.start_seconds, view.stop_seconds, view.tokens, view.keys)
    with pytest.raises(ValueError, match="asks the model"):
        Attention().recall(bare, 3, signals)


# --- hybrid against its plain version -------------------------------------------------------------------------------


def plain_hybrid(method: Hybrid, view: MemoryView, budget: int, question: Tensor) -> Tensor:
    """Hybrid span by span, as its docstring tells it."""
    stored = view.tokens.tolist()
    if sum(stored) <= budget:
        return view.tokens.clone()
    got = [0] * len(stored)

    def whole(order: list[int], share: int) -> int:
        for i in order:
            more = min(stored[i] - got[i], share)
            got[i] += more
            share -= more
        return share

    recent = int(budget * method.recent_share)
    left = budget - recent + whole(list(range(len(stored) - 1, -1, -1)), recent)
    similarity = (view.keys @ question).amax(1)
    meant = standing_out(similarity, pointing=method.pointing)
    waiting = [i for i in range(len(stored)) if stored[i] and (meant is None or bool(meant[i]))]
    share = min(left, max(1, int(budget * method.relevant_share)))
    left -= share
    mean = F.normalize(view.keys.sum(1), dim=1, eps=1e-6)
    low, high = similarity.min(), similarity.max()
    chosen: list[int] = []
    while waiting and share > 0:
        nearest = (
            torch.stack([mean @ mean[c] for c in chosen]).amax(0).clamp(min=0) if chosen else torch.zeros(len(got))
        )
        merit = (similarity - low) / (high - low).clamp(min=1e-12) * (1 - method.diversity) - nearest * method.diversity
        best = max(waiting, key=lambda i: (round(float(merit[i]), 5), -i))
        waiting.remove(best)
        chosen.append(best)
        steps = [s * sign for s in range(1, method.neighbours + 1) for sign in (-1, 1)]
        share = whole([best, *(best + s for s in steps if 0 <= best + s < len(got))], share)
    left += share
    if meant is not None:
        left = min(left, int(budget * method.gist_share))
    rest = gist(view.tokens - torch.tensor(got), left, tokens_each=method.gist_tokens)
    return torch.tensor(got) + rest


@given(tokens=ROOM, budget=st.integers(0, 400), seed=st.integers(0, 20), neighbours=st.integers(0, 2))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_hybrid_is_its_plain_version(tokens: list[int], budget: int, seed: int, neighbours: int) -> None:
    view, signals = memory(tokens, seed=seed)
    method = Hybrid(neighbours=neighbours)
    assert signals.question is not None
    assert torch.equal(method.recall(view, budget, signals), plain_hybrid(method, view, budget, signals.question))


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_weights_share_out_what_a_full_place_cannot_take() -> None:
    weight = torch.tensor([3.0, 2.0, 1.0])
    assert fill_by_weight(torch.tensor([9, 9, 9]), weight, 12).tolist() == [6, 4, 2]
    assert fill_by_weight(torch.tensor([4, 9, 9]), weight, 12).tolist() == [4, 5, 3]


@given(capacity=ROOM, total=st.integers(0, 900), seed=st.integers(0, 9))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_weighted_shares_add_up_and_follow_the_weights(capacity: list[int], total: int, seed: int) -> None:
    room = torch.tensor(capacity)
    weight = torch.rand(len(room), generator=seeded(seed)) + 1e-3
    share = fill_by_weight(room, weight, total)
    assert int(share.sum()) == min(total, sum(capacity))
    assert bool(((share >= 0) & (share <= room)).all())
    open_ = share < room
    if int(open_.sum()) > 1:
        level = share[open_].double() / weight[open_]
        assert float(level.max()) <= float(level.min()) + 1.01 * float((1 / weight[open_]).max())


@given(room=ROOM, total=st.integers(0, 900), each=st.integers(1, 20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_gist_spends_what_it_is_given(room: list[int], total: int, each: int) -> None:
    share = gist(torch.tensor(room), total, tokens_each=each)
    assert int(share.sum()) == min(total, sum(room))
    assert bool((share <= torch.tensor(room)).all())


@given(order=st.permutations(range(9)).map(lambda p: p[:4]), neighbours=st.integers(0, 3), total=st.integers(0, 60))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_neighbours_and_filling_are_what_loops_would_do(order: list[int], neighbours: int, total: int) -> None:
    wanted: list[int] = []
    for place in order:
        for offset in (0, *(sign * step for step in range(1, neighbours + 1) for sign in (-1, 1))):
            if 0 <= place + offset < 9 and place + offset not in wanted:
                wanted.append(place + offset)
    named = with_neighbours(torch.tensor(order), 9, neighbours=neighbours)
    assert named.tolist() == wanted
    left, filled = total, [0] * 9
    for place in wanted:
        filled[place] = min(5, left)
        left -= filled[place]
    assert fill_in_order(torch.full((9,), 5), named, total).tolist() == filled


def test_marginal_relevance_orders_all_and_starts_with_the_best() -> None:
    rows = F.normalize(torch.randn(20, 6, generator=seeded(2)), dim=1)
    merit = torch.rand(20, generator=seeded(3))
    order = marginal_relevance(merit, rows, diversity=0.4)
    assert int(order[0]) == int(merit.argmax())
    assert sorted(order.tolist()) == list(range(20))
    assert marginal_relevance(merit, rows, diversity=0.0).tolist() == merit.argsort(descending=True).tolist()
