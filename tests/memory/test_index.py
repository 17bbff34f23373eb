from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.errors import MissingExtra
from streamvid.memory import faiss_index
from streamvid.memory.faiss_index import FaissIndex
from streamvid.memory.index import FlatIndex, Index

INDEXES = [FlatIndex, FaissIndex]


def keys(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) * 3


def filled(kind: type[Index], ids: torch.Tensor, vectors: torch.Tensor) -> Index:
    index = kind(12)
    index.add(ids[:40], vectors[:40])
    index.add(ids[40:], vectors[40:])
    return index


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("k", [1, 5, 50, 1000])
def test_same_numbers_as_the_exact_search(kind: type[Index], k: int) -> None:
    ids = torch.randint(0, 90, (200,), generator=torch.Generator().manual_seed(1)) * 7 + 10**12
    vectors, index, exact = keys(200), FlatIndex(12), FlatIndex(12)
    index, exact = filled(kind, ids, vectors), filled(FlatIndex, ids, vectors)
    for query in keys(20, seed=2):
        found, similarity = index.search(query, k)
        want, want_similarity = exact.search(query, k)
        assert torch.equal(found, want)
        torch.testing.assert_close(similarity, want_similarity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", INDEXES)
def test_an_id_counts_with_its_best_key_and_is_found_once(kind: type[Index]) -> None:
    ids = torch.arange(100) // 4
    vectors = keys(100)
    query = keys(1, seed=3)[0]
    cosine = torch.nn.functional.cosine_similarity(vectors, query[None])
    want = cosine.reshape(25, 4).amax(1).sort(descending=True)
    found, similarity = filled(kind, ids, vectors).search(query, 10)
    assert torch.equal(found, want.indices[:10])
    torch.testing.assert_close(similarity, want.values[:10], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", INDEXES)
def test_many_keys_of_one_id_do_not_hide_the_others(kind: type[Index]) -> None:
    vectors = torch.cat([torch.ones(64, 12), keys(3)])
    ids = torch.tensor([0] * 64 + [1, 2, 3])
    found, _ = filled(kind, ids, vectors).search(torch.ones(12), 3)
    assert len(found.unique()) == 3 and found[0] == 0


@pytest.mark.parametrize("kind", INDEXES)
def test_empty_index_finds_nothing(kind: type[Index]) -> None:
    found, similarity = kind(12).search(torch.ones(12), 3)
    assert len(found) == len(similarity) == 0


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("bad", [torch.zeros(1, 12), torch.full((1, 12), float("nan"))])
def test_keys_without_a_direction_are_refused(kind: type[Index], bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="finite and not all zero"):
        kind(12).add(torch.tensor([1]), bad)


@pytest.mark.parametrize("kind", INDEXES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_adding_and_removing_in_any_order_leaves_what_is_left(kind: type[Index], data: st.DataObject) -> None:
    index, left = kind(12), {}
    number = 0
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            ids = torch.tensor(data.draw(st.lists(st.integers(0, 9), max_size=6)), dtype=torch.int64)
            vectors = keys(len(ids), seed=number)
            index.add(ids, vectors)
            left |= {(number, row): (int(i), vectors[row]) for row, i in enumerate(ids)}
        else:
            gone = data.draw(st.lists(st.integers(0, 12), max_size=4))
            before = len(left)
            left = {place: pair for place, pair in left.items() if pair[0] not in gone}
            assert index.remove(torch.tensor(gone, dtype=torch.int64)) == before - len(left)
        number += 1
        assert len(index) == len(left)
        assert index.ids().tolist() == sorted({i for i, _ in left.values()})
    query = keys(1, seed=77)[0]
    best: dict[int, float] = {}
    for i, vector in left.values():
        best[i] = max(best.get(i, -2.0), float(torch.nn.functional.cosine_similarity(vector, query, dim=0)))
    found, similarity = index.search(query, 20)
    assert {int(i): float(s) for i, s in zip(found, similarity, strict=True)} == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("kind", INDEXES)
def test_added_one_by_one_is_added_at_once(kind: type[Index]) -> None:
    vectors, one, all_at_once = keys(300), kind(12), kind(12)
    for number in range(300):
        one.add(torch.tensor([number]), vectors[number : number + 1])
    all_at_once.add(torch.arange(300), vectors)
    for query in keys(5, seed=9):
        for a, b in zip(one.search(query, 10), all_at_once.search(query, 10), strict=True):
            assert torch.equal(a, b)


def test_equal_keys_stand_in_the_order_they_were_added() -> None:
    index = FlatIndex(12)
    index.add(torch.arange(100).flip(0), torch.ones(100, 12))
    index.add(torch.tensor([200]), -torch.ones(1, 12))
    assert index.search(torch.ones(12), 5)[0].tolist() == [99, 98, 97, 96, 95]


def test_missing_faiss_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(faiss_index.importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"\.\[cpu\]"):
        FaissIndex(12)
