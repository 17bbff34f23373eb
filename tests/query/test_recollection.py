"""Looking things up touches what is looked at, not what there is; the tests count keys and records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamvid.recollection as module
from streamvid.errors import Vanished
from streamvid.memory import faiss_index
from streamvid.memory.bank import Bank
from streamvid.memory.faiss_index import IvfIndex
from streamvid.query.when import When
from streamvid.receipt import Receipt
from streamvid.recollection import Recollection
from streamvid.signals import Signals
from streamvid.temporal.methods.memory.hybrid import Hybrid
from tests.memory.spans import KEY, span_tokens
from tests.watch.words import Words, picture

SPANS, WIDTH = 600, 16


def keys_like_video(seed: int = 0) -> Tensor:
    """(SPANS, 2, WIDTH) unit keys: scenes of 20 spans around a common picture, two keys a span."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(WIDTH, generator=random)
    scene = torch.randn(SPANS // 20, WIDTH, generator=random).repeat_interleave(20, dim=0)
    keys = shared + scene[:, None] + 0.3 * torch.randn(SPANS, 2, WIDTH, generator=random)
    return keys / keys.norm(dim=2, keepdim=True)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("memory")
    keys = keys_like_video()
    with Bank.open(folder) as bank, bank.writer(KEY, path="a", name="a") as writer:
        bank._catalog.execute("PRAGMA synchronous = OFF")
        for number in range(SPANS):
            tokens = span_tokens(number, count=4)
            writer.append(tokens, start=Fraction(2 * number), stop=Fraction(2 * number + 2), keys=keys[number])
        writer.finish({})
    return folder, keys


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds at which six hundred spans are many."""
    monkeypatch.setattr(module, "FOUND", 16)
    monkeypatch.setattr(module, "SAMPLED", 50)
    monkeypatch.setattr(faiss_index, "FLAT_KEYS", 100)
    monkeypatch.setattr(IvfIndex.__init__, "__kwdefaults__", {"exact": None, "train_at": 500, "tail_keys": 200})


@pytest.fixture
def bank(filled: tuple[Path, Tensor]) -> Iterator[Bank]:
    with Bank.open(filled[0]) as opened:
        yield opened


def look(bank: Bank) -> tuple[Recollection, Receipt]:
    receipt = Receipt(source="a", model="none")
    return Recollection(bank, bank.sources()[0], receipt), receipt


@pytest.mark.usefixtures("small")
def test_the_best_are_exact_and_the_others_are_told_by_samples(
    filled: tuple[Path, Tensor], bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, receipt = look(bank)
    keys = filled[1]
    vector = keys[123, 0]
    memory.similarity(vector)  # trains the index, which looks at every key
    touched = []
    keys_of = bank._catalog.keys_of

    def counted(ids: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        touched.append(len(ids))
        return keys_of(ids, **rest)

    monkeypatch.setattr(bank._catalog, "keys_of", counted)
    found = memory.similarity(vector)
    exact = (keys @ vector).amax(1)
    assert sum(touched) < SPANS / 2, "of many spans only those that matter are read"
    best = exact.argsort(descending=True)[:10]
    torch.testing.assert_close(found[best], exact[best], atol=1e-5, rtol=0)
    assert set(found.argsort(descending=True)[:10].tolist()) == set(best.tolist())
    assert abs(float(found.mean() - exact.mean())) < 0.05
    assert abs(float(found.std() / exact.std()) - 1) < 0.2
    assert receipt.index is not None and "the others by 50 samples" in receipt.index


@pytest.mark.usefixtures("small")
def test_recall_spends_the_budget_where_an_exact_index_would(filled: tuple[Path, Tensor], bank: Bank) -> None:
    memory, _ = look(bank)
    vector = filled[1][333, 1]
    memory.ask_for(vector)
    view = memory.view
    exact = replace(view, similarity=(filled[1] @ vector).amax(1))
    chosen = Hybrid().recall(view, 120, Signals(question=vector))
    wanted = Hybrid().recall(exact, 120, Signals(question=vector))
    both = int(torch.minimum(chosen, wanted).sum())
    assert both >= 0.8 * int(wanted.sum())
    assert int(chosen[333]) == 4


def test_an_exact_index_compares_every_span(filled: tuple[Path, Tensor], bank: Bank) -> None:
    memory, receipt = look(bank)
    vector = filled[1][5, 0]
    torch.testing.assert_close(memory.similarity(vector), (filled[1] @ vector).amax(1), atol=1e-5, rtol=0)
    assert receipt.index is not None and "samples" not in receipt.index


def test_records_are_read_for_the_rows_that_are_asked_for(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, _ = look(bank)
    monkeypatch.setattr(bank._catalog, "spans", lambda *_: pytest.fail("all records were read"))
    rows = torch.tensor([500, 3, 77])
    spans = memory.records(rows)
    assert [span.start for span in spans] == [1000, 6, 154]
    assert memory.view.tokens.sum() == 4 * SPANS and memory.seen == (0.0, 2.0 * SPANS)


def test_spans_that_went_meanwhile_are_said_to_be_gone(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        with bank.writer(KEY, path="a", name="a") as writer:
            for number in range(3):
                tokens = span_tokens(number, count=4)
                writer.append(tokens, start=Fraction(number), stop=Fraction(number + 1), keys=torch.eye(3)[[number]])
        memory, _ = look(bank)
        bank._catalog.expire_spans(bank.sources()[0].id, bank.spans(bank.sources()[0].id)[:1], reason="test")
        assert [span.start for span in memory.records(torch.tensor([2]))] == [2]
        with pytest.raises(Vanished, match="ask again"):
            memory.records(torch.tensor([0, 2]))
        assert memory.keys(torch.tensor([0, 1])).squeeze(1).tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    "ranges, gaps, until, rows",
    [
        ([(4.0, 6.0)], [], 40.0, [2]),
        ([(8.0, 9.0)], [], 40.0, [3]),
        ([(20.0, 30.0)], [], 40.0, [3]),
        ([(20.0, 30.0)], [(15, 50)], 60.0, []),
        ([(20.0, 30.0)], [(15, 25)], 40.0, [3]),
        ([(20.0, 30.0)], [(0, 2), (25, 50)], 60.0, [3]),
        ([(50.0, 60.0)], [], 40.0, []),
        ([(0.0, 2.0), (30.0, 31.0)], [], 40.0, [0, 3]),
        ([(-10.0, -5.0)], [], 40.0, []),
    ],
)
def test_a_still_picture_is_shown_by_the_span_before_it(
    tmp_path: Path, ranges: list[tuple[float, float]], gaps: list[tuple[int, int]], until: float, rows: list[int]
) -> None:
    """Four spans of two seconds, then nothing changes; what nobody saw is shown by nothing."""
    with Bank.open(tmp_path) as bank:
        with bank.writer(KEY, path="a", name="a") as writer:
            for number in range(4):
                tokens = span_tokens(number, count=4)
                start = Fraction(2 * number)
                writer.append(tokens, start=start, stop=start + 2, keys=torch.eye(4)[[number]])
            for start_seconds, stop_seconds in gaps:
                writer.gap(Fraction(start_seconds), Fraction(stop_seconds), "away")
        memory = Recollection(bank, bank.sources()[0], Receipt(), until=until)
        assert memory.inside(When(tuple(ranges))).tolist() == rows


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes of two-second spans: a car now and then, a red circle from 40 to 46 s."""
    folder = tmp_path_factory.mktemp("street")
    with Bank.open(folder) as bank, bank.writer(KEY, path="a", name="a") as writer:
        bank._catalog.execute("PRAGMA synchronous = OFF")
        for number in range(60):
            shown = "red circle" if 20 <= number < 23 else "car" if number % 9 == 0 else ""
            keys = torch.stack([picture(shown, seed=2 * number), picture(shown, seed=2 * number + 1)])
            tokens = span_tokens(number, count=4)
            writer.append(tokens, start=Fraction(2 * number), stop=Fraction(2 * number + 2), keys=keys)
        writer.finish({})
    return folder


@pytest.mark.parametrize("detailed", [module.DETAILED, 10])
def test_a_thing_is_found_when_it_is_seen_and_not_in_another_colour(
    street: Path, detailed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the comparison the blue circle is found where the red one is, so that is what leaves it out."""
    monkeypatch.setattr(module, "DETAILED", detailed)
    monkeypatch.setattr(module, "COMPARED", 2)
    with Bank.open(street) as bank:
        memory, _ = look(bank)
        assert memory.find("the red circle", Words()) == (40, 46)
        assert memory.find("a circle", Words()) == (40, 46)
        assert memory.find("the blue circle", Words()) is None
        assert memory.find("my person", Words()) is None
        monkeypatch.setattr(module, "SLACK", float("inf"))
        assert memory.find("the blue circle", Words()) == (40, 46)


def test_what_is_there_most_of_the_time_is_no_event(street: Path) -> None:
    with Bank.open(street) as bank:
        assert look(bank)[0].find("the wall", Words()) is None
