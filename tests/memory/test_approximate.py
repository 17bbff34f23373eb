from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamvid.errors import MissingExtra, SettingsError, UnsupportedError
from streamvid.memory.faiss_index import (
    APPROXIMATE,
    FLAT_KEYS,
    SQ8_KEYS,
    ApproximateIndex,
    GpuIndex,
    choose_kind,
    load_faiss,
)
from streamvid.memory.index import FlatIndex

WIDTH = 32
HAS_GPU = hasattr(load_faiss(), "StandardGpuResources") and load_faiss().get_num_gpus() > 0
KINDS = [
    pytest.param(kind, marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU, or faiss without it")])
    if kind == "gpu"
    else kind
    for kind in sorted(APPROXIMATE)
]


def video_keys(count: int, *, seed: int = 0, drift: float = 0.0) -> Tensor:
    """Scenes of 20 frames around 40 topics; ``drift`` moves all of them along the way."""
    random = torch.Generator().manual_seed(seed)
    topics = torch.randn(40, WIDTH, generator=random)
    scene = torch.randint(0, 40, (count // 20 + 1,), generator=random).repeat_interleave(20)[:count]
    away = torch.linspace(0, drift, count)[:, None] * torch.randn(WIDTH, generator=random)
    return topics[scene] + 0.3 * torch.randn(count, WIDTH, generator=random) + away


def made(kind: str, *, train_at: int = 1000, tail_keys: int = 200) -> ApproximateIndex:
    return APPROXIMATE[kind](WIDTH, train_at=train_at, tail_keys=tail_keys)


def recall(index: ApproximateIndex, exact: FlatIndex, queries: Tensor, k: int = 10) -> float:
    """Share of the k best ids that are found; every similarity must be the exact one of its id."""
    hits = 0
    for query in queries:
        want, _ = exact.search(query, k)
        everything, truth = exact.search(query, len(exact))
        known = dict(zip(everything.tolist(), truth.tolist(), strict=True))
        found, similarity = index.search(query, k)
        assert len(found) == len(found.unique()) == len(want)
        assert similarity.tolist() == sorted(similarity.tolist(), reverse=True)
        assert similarity.tolist() == pytest.approx([known[i] for i in found.tolist()], abs=1e-6)
        hits += len(set(found.tolist()) & set(want.tolist()))
    return hits / (k * len(queries))


def both(kind: str, ids: Tensor, keys: Tensor) -> tuple[ApproximateIndex, FlatIndex]:
    index, exact = made(kind), FlatIndex(WIDTH)
    for first in range(0, len(ids), 500):
        index.add(ids[first : first + 500], keys[first : first + 500])
    exact.add(ids, keys)
    return index, exact


@pytest.mark.parametrize("kind", KINDS)
def test_finds_what_the_exact_search_finds_with_its_numbers(kind: str) -> None:
    ids = torch.arange(4000) // 2 * 7 + 10**12
    index, exact = both(kind, ids, video_keys(4000))
    assert index.trained_keys >= 1000 and len(index) == 4000
    assert torch.equal(index.ids(), exact.ids())
    assert recall(index, exact, video_keys(4000)[::200] + 0.1) >= 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_below_training_size_it_is_exact(kind: str) -> None:
    ids, keys = torch.arange(900) // 3, video_keys(900)
    index, exact = both(kind, ids, keys)
    assert index.trained_keys == 0 and "all compared exactly" in index.said
    for query in torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3)):
        assert torch.equal(index.search(query, 7)[0], exact.search(query, 7)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_each_key_is_found_as_soon_as_it_is_added(kind: str) -> None:
    """Adding and searching in turns, over training and sorting in: the newest key is the best match of itself."""
    keys = video_keys(3000, seed=5)
    index = made(kind)
    for number in range(0, 3000, 50):
        index.add(torch.arange(number, number + 50), keys[number : number + 50])
        found, similarity = index.search(keys[number + 49], 3)
        assert found[0] == number + 49 and similarity[0] == pytest.approx(1, abs=1e-6)
    assert index.trained_keys >= 1000 and index.tail <= index.tail_limit


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_drift_away_after_training_are_found(kind: str) -> None:
    """Trained on the first part only: the rest lies where no centre was learned and no code reaches."""
    limit = int(1000 * APPROXIMATE[kind].retrain_growth)
    keys = video_keys(limit, drift=limit / 1000)
    index, exact = both(kind, torch.arange(limit), keys)
    assert index.trained_keys == 1000
    assert recall(index, exact, keys[1000::25] + 0.05) >= 0.98
    index.add(torch.arange(limit, limit + 600), keys[:600] + 0.01)
    assert index.trained_keys > limit, "grown beyond its training"


@pytest.mark.parametrize("kind", KINDS)
def test_removed_ids_are_never_found_again(kind: str) -> None:
    keys = video_keys(3000, seed=7)
    ids = torch.arange(3000) // 2
    index, exact = both(kind, ids, keys)
    gone = torch.arange(0, 1500, 10)
    assert index.remove(gone) == exact.remove(gone) == 300
    assert index.remove(gone) == 0 and len(index) == len(exact) == 2700
    assert 0 < index.dead_share < 0.2
    assert recall(index, exact, keys[::150]) >= 0.98
    index.add(torch.tensor([0]), keys[1:2])
    found, similarity = index.search(keys[1], 1)
    assert found.tolist() == [0] and similarity[0] == pytest.approx(1, abs=1e-6)
    exact.add(torch.tensor([0]), keys[1:2])
    most = torch.arange(100, 1500)
    assert index.remove(most) == exact.remove(most)
    assert index.dead_share == 0, "too many gone: made anew"
    assert recall(index, exact, keys[::300], k=20) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_many_keys_of_one_id_do_not_hide_the_others(kind: str) -> None:
    """2000 copies of one key under one id: all candidates are that id at first."""
    keys = torch.cat([torch.ones(2000, WIDTH), torch.ones(3, WIDTH) + torch.eye(3, WIDTH), video_keys(6000)])
    ids = torch.cat([torch.zeros(2000, dtype=torch.int64), torch.arange(1, 6004)])
    index, _ = both(kind, ids, keys)
    found, _ = index.search(torch.ones(WIDTH), 4)
    assert found[0] == 0 and sorted(found.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_asked_for_all_it_gives_all_in_exact_order(kind: str) -> None:
    keys = video_keys(2500, seed=11)
    index, exact = both(kind, torch.arange(2500), keys)
    found, similarity = index.search(keys[3] + 0.2, 5000)
    want, want_similarity = exact.search(keys[3] + 0.2, 5000)
    torch.testing.assert_close(similarity, want_similarity, rtol=0, atol=1e-6)
    assert torch.equal(found.sort().values, want.sort().values)


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_file_it_finds_the_same_and_goes_on(kind: str, tmp_path: Path) -> None:
    keys = video_keys(3000, seed=13)
    index, exact = both(kind, torch.arange(3000), keys)
    ids = index.write(tmp_path / "x")
    other = made(kind)
    other._held, other._exact = index._held, index._exact
    other.restore(tmp_path / "x", ids=ids, trained_keys=index.trained_keys)
    for query in keys[::250] + 0.1:
        for one, two in zip(index.search(query, 10), other.search(query, 10), strict=True):
            assert torch.equal(one, two)
    more = video_keys(600, seed=14)
    for first in range(0, 600, 100):
        other.add(torch.arange(3000 + first, 3100 + first), more[first : first + 100])
    exact.add(torch.arange(3000, 3600), more)
    assert not other.saved and len(other) == 3600
    assert recall(other, exact, more[::60]) >= 0.98


def test_whole_keys_in_lists_order_as_exactly_as_flat() -> None:
    index, _ = both("ivf-flat", torch.arange(3000), video_keys(3000))
    assert "whole keys" in index.said and "3000 keys of 32 numbers" in index.said


def test_kind_is_chosen_by_size_and_said() -> None:
    chosen = [choose_kind("auto", n) for n in (1, FLAT_KEYS, FLAT_KEYS + 1, SQ8_KEYS, SQ8_KEYS + 1)]
    assert [kind for kind, _ in chosen] == ["faiss", "faiss", "ivf", "ivf", "ivfpq"]
    assert all("chosen for" in why for _, why in chosen)
    assert choose_kind("hnsw", 1) == ("hnsw", "")
    with pytest.raises(SettingsError, match="did you mean hnsw"):
        choose_kind("hsnw", 1)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_gpu_without_a_gpu_is_one_line() -> None:
    with pytest.raises((MissingExtra, UnsupportedError), match=r"\.\[gpu\]|needs a GPU") as caught:
        GpuIndex(WIDTH)
    assert "\n" not in str(caught.value)
