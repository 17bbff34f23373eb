from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamvid.reduction import Reduction

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def selections(draw: Any, count: int | None = None) -> Reduction:
    count = draw(st.integers(1, 8)) if count is None else count
    order = draw(st.permutations(range(count)))
    return Reduction.select(torch.tensor(order[: draw(st.integers(1, count))]), count)


@st.composite
def merges(draw: Any, count: int | None = None) -> Reduction:
    count = draw(st.integers(1, 8)) if count is None else count
    raw = draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count).filter(lambda g: max(g) >= 0))
    names = {old: new for new, old in enumerate(dict.fromkeys(g for g in raw if g >= 0))}
    size = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return Reduction.merge(torch.tensor([names.get(g, -1) for g in raw]), torch.tensor(size))


@st.composite
def mixes(draw: Any, count: int | None = None) -> Reduction:
    count = draw(st.integers(1, 8)) if count is None else count
    outputs = draw(st.integers(1, 6))
    cells = [(row, draw(st.integers(0, count - 1))) for row in range(outputs)]
    cells += draw(st.lists(st.tuples(st.integers(0, outputs - 1), st.integers(0, count - 1)), max_size=10))
    cells = draw(st.permutations(list(dict.fromkeys(cells))))
    weights = draw(st.lists(st.integers(1, 16), min_size=len(cells), max_size=len(cells)))
    rows, columns = torch.tensor(cells).T
    return Reduction.mix(rows, columns, torch.tensor(weights) / 8, num_inputs=count, num_outputs=outputs)


@st.composite
def any_of(draw: Any, count: int | None = None) -> Reduction:
    made: Reduction = draw(st.one_of(selections(count), merges(count), mixes(count)))
    return made


@st.composite
def chains(draw: Any) -> tuple[Reduction, Reduction]:
    first = draw(any_of())
    return first, draw(any_of(first.num_outputs))


def features(count: int, width: int = 3) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def used(plan: Reduction) -> Tensor:
    """(N,) whether an input goes anywhere."""
    return torch.bincount(plan.entries()[1], minlength=plan.num_inputs) > 0


@quick
@given(chains())
def test_a_chain_is_one_after_the_other(pair: tuple[Reduction, Reduction]) -> None:
    first, second = pair
    x = features(first.num_inputs)
    chained = first.then(second)
    assert (chained.num_inputs, chained.num_outputs) == (first.num_inputs, second.num_outputs)
    torch.testing.assert_close(chained.apply(x), second.apply(first.apply(x)), rtol=1e-5, atol=1e-5)
    assert chained.is_selection == (first.is_selection and second.is_selection)


@quick
@given(any_of())
def test_applying_is_the_matrix_product(plan: Reduction) -> None:
    rows, columns, weights = plan.entries()
    dense = torch.zeros(plan.num_outputs, plan.num_inputs, dtype=torch.float64)
    dense[rows, columns] = weights.double()
    x = features(plan.num_inputs)
    torch.testing.assert_close(plan.apply(x), dense @ x)
    torch.testing.assert_close(plan.apply(x[:, 0]), dense @ x[:, 0])
    deep = x.reshape(plan.num_inputs, 1, 3)
    torch.testing.assert_close(plan.apply(deep)[:, 0], dense @ x)
    assert (rows[1:] >= rows[:-1]).all()


@quick
@given(any_of())
def test_keep_all_before_or_after_changes_nothing(plan: Reduction) -> None:
    x = features(plan.num_inputs)
    before = Reduction.keep_all(plan.num_inputs).then(plan)
    after = plan.then(Reduction.keep_all(plan.num_outputs))
    torch.testing.assert_close(before.apply(x), plan.apply(x))
    torch.testing.assert_close(after.apply(x), plan.apply(x))
    assert torch.equal(before.leader(), plan.leader())


@quick
@given(any_of())
def test_sizes_of_all_that_is_used_are_conserved(plan: Reduction) -> None:
    size = torch.arange(1, plan.num_inputs + 1).float()
    total = plan.total(size)
    assert (total > 0).all()
    assert total.sum().item() == pytest.approx(size[used(plan)].sum().item(), rel=1e-5)


@quick
@given(any_of())
def test_places_stay_among_those_of_the_sources(plan: Reduction) -> None:
    x = features(plan.num_inputs)
    place = plan.locate(x)
    rows, columns, _ = plan.entries()
    for output in range(plan.num_outputs):
        sources = x[columns[rows == output]]
        assert (place[output] >= sources.min(0).values - 1e-9).all()
        assert (place[output] <= sources.max(0).values + 1e-9).all()


@quick
@given(any_of())
def test_leader_is_the_heaviest_source_and_the_earliest_of_equals(plan: Reduction) -> None:
    rows, columns, weights = plan.entries()
    for output, lead in enumerate(plan.leader().tolist()):
        here = rows == output
        heaviest = columns[here][weights[here] == weights[here].max()]
        assert lead == int(heaviest.min())


@quick
@given(any_of())
def test_sorting_orders_leaders_and_nothing_else(plan: Reduction) -> None:
    tidy = plan.sorted()
    lead = tidy.leader()
    assert (lead[1:] >= lead[:-1]).all()
    x = features(plan.num_inputs)
    order = torch.argsort(plan.leader(), stable=True)
    torch.testing.assert_close(tidy.apply(x), plan.apply(x)[order])


@quick
@given(any_of())
def test_spreading_sends_a_constant_back_to_every_source(plan: Reduction) -> None:
    back = plan.spread(torch.full((plan.num_outputs, 2), 3.0))
    assert back.shape == (plan.num_inputs, 2)
    torch.testing.assert_close(back, torch.where(used(plan)[:, None], 3.0, 0.0).expand(-1, 2))


@quick
@given(selections())
def test_spreading_undoes_a_selection(plan: Reduction) -> None:
    x = features(plan.num_inputs)
    assert torch.equal(plan.apply(plan.spread(plan.apply(x))), plan.apply(x))


def test_a_selection_never_builds_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Reduction) -> Any:
        raise AssertionError("the matrix was built")

    monkeypatch.setattr(Reduction, "entries", never)
    plan = Reduction.select(torch.tensor([3, 1]), 5)
    x = features(5)
    assert plan.rows is plan.columns is plan.weights is None
    for moved in (plan.apply(x), plan.locate(x), plan.total(x)):
        assert torch.equal(moved, x[[3, 1]])
    assert plan.leader().tolist() == [3, 1]
    assert plan.spread(torch.ones(2)).tolist() == [0, 1, 0, 1, 0]
    assert plan.then(plan.select(torch.tensor([1]), 2)).leader().tolist() == [1]
    assert plan.sorted().leader().tolist() == [1, 3]


def test_merging_exact_copies_changes_nothing_else() -> None:
    x = torch.tensor([[1.0, 2], [5, 6], [1, 2], [1, 2]])
    plan = Reduction.merge(torch.tensor([0, 1, 0, 0]), torch.tensor([1, 1, 7, 2]))
    torch.testing.assert_close(plan.apply(x), x[:2])
    assert plan.leader().tolist() == [2, 1]
    assert plan.total(torch.tensor([1.0, 1, 7, 2])).tolist() == pytest.approx([10, 1])


def test_merge_weighs_by_size_and_drops_the_unassigned() -> None:
    plan = Reduction.merge(torch.tensor([0, -1, 0]), torch.tensor([1, 1, 3]))
    assert plan.apply(torch.tensor([0.0, 100, 4])).tolist() == [3]


def test_weights_are_used_as_given_for_features_and_normalised_for_places() -> None:
    rows, columns = torch.tensor([0, 0]), torch.tensor([0, 1])
    plan = Reduction.mix(rows, columns, torch.tensor([1.0, 3.0]), num_inputs=2, num_outputs=1)
    x = torch.tensor([0.0, 4.0])
    assert plan.apply(x).tolist() == [12]
    assert plan.locate(x).tolist() == [3]
    assert plan.locate(torch.tensor([0, 4])).tolist() == [3]


def test_fresh_features_replace_the_product_and_travel_along() -> None:
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    fresh = torch.tensor([[7.0], [8.0]])
    plan = Reduction.mix(rows, columns, torch.ones(3), num_inputs=3, num_outputs=2, features=fresh)
    assert torch.equal(plan.apply(torch.zeros(3, 1)), fresh)
    assert plan.apply(torch.ones(3, 2)).tolist() == [[2, 2], [1, 1]]  # of another width: not theirs
    assert plan.then(Reduction.select(torch.tensor([1]), 2)).apply(torch.zeros(3, 1)).tolist() == [[8]]
    late = Reduction.select(torch.tensor([2, 1, 0]), 3).then(plan)
    assert torch.equal(late.apply(torch.zeros(3, 1)), fresh)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_caller_comes_back(dtype: torch.dtype) -> None:
    x = torch.ones(300, 2, dtype=dtype)
    mean = Reduction.merge(torch.zeros(300, dtype=torch.int64))
    assert mean.apply(x).dtype == dtype
    torch.testing.assert_close(mean.apply(x), x[:1])  # 300 terms added up in half precision would be far off
    assert Reduction.keep_all(300).apply(x).dtype == dtype


def test_nothing_at_all_can_be_kept() -> None:
    plan = Reduction.select(torch.zeros(4, dtype=torch.bool), 4)
    assert plan.apply(torch.ones(4, 2)).shape == (0, 2)
    assert plan.leader().shape == (0,)
    assert not plan.is_identity
    assert Reduction.merge(torch.tensor([-1, -1])).apply(torch.ones(2, 3)).shape == (0, 3)


def test_identity_is_recognised() -> None:
    assert Reduction.keep_all(3).is_identity
    assert Reduction.select(torch.ones(3, dtype=torch.bool), 3).is_identity
    assert not Reduction.select(torch.tensor([1, 0, 2]), 3).is_identity
    assert not Reduction.merge(torch.arange(3)).is_identity  # a matrix, even if it is the unit matrix


def test_bad_selections_are_refused() -> None:
    with pytest.raises(ValueError, match="only once"):
        Reduction.select(torch.tensor([1, 1]), 3)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        Reduction.select(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        Reduction.select(torch.tensor([-1]), 3)
    with pytest.raises(ValueError, match="mask"):
        Reduction.select(torch.ones(2, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="one-dimensional"):
        Reduction.select(torch.zeros(1, 1, dtype=torch.int64), 3)


def test_bad_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="gaps"):
        Reduction.merge(torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("rows", "columns", "weights", "message"),
    [
        ([0, 1], [0], [1.0, 1.0], "one length"),
        ([0, 0], [0, 1], [1.0, 1.0], "needs an entry"),
        ([0, 2], [0, 1], [1.0, 1.0], "needs an entry"),
        ([0, 1], [0, 5], [1.0, 1.0], "columns"),
        ([0, 1], [0, 1], [1.0, 0.0], "positive"),
    ],
)
def test_bad_matrices_are_refused(rows: list[int], columns: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reduction.mix(torch.tensor(rows), torch.tensor(columns), torch.tensor(weights), num_inputs=3, num_outputs=2)


def test_features_that_do_not_fit_are_refused() -> None:
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="fresh features"):
        Reduction.mix(one, one, torch.ones(1), num_inputs=1, num_outputs=1, features=torch.ones(2, 4))


def test_inputs_of_another_length_are_refused() -> None:
    plan = Reduction.select(torch.tensor([0]), 3)
    for call in (plan.apply, plan.locate, plan.total):
        with pytest.raises(ValueError, match="3 inputs"):
            call(torch.ones(2))
    with pytest.raises(ValueError, match="1 outputs"):
        plan.spread(torch.ones(2))
    with pytest.raises(ValueError, match="cannot chain"):
        plan.then(Reduction.keep_all(2))
