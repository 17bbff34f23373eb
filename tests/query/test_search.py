"""Search finds what an exhaustive comparison finds, reads only that, and says what it could not search."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from streamvid.errors import BankError, SettingsError, SourceError
from streamvid.memory.bank import Bank
from streamvid.memory.records import SourceRecord, SpanRecord
from streamvid.query import search as search_module
from streamvid.query.evidence import merge
from streamvid.query.search import Findings, _moments, search
from tests.memory.spans import KEY, KEY_WIDTH, source_key, span_keys, span_times, span_tokens, store

ROOT = Path(__file__).parents[2]


class Coloured:
    """A text is the direction of its letters, a picture that of its mean colour."""

    fingerprint = KEY.embedder

    def frames(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8 and pixels.shape[0] == 1 and pixels.shape[3] == 3
        out = torch.zeros(1, KEY_WIDTH)
        out[0, :3] = pixels.float().mean((0, 1, 2))
        return out

    def texts(self, texts: Sequence[str]) -> Tensor:
        random = torch.Generator().manual_seed(sum(texts[0].encode()))
        return torch.randn(1, KEY_WIDTH, generator=random)


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    """Two videos of one encoder, one of another, one without."""
    with Bank.open(tmp_path / "memory", codec="fp16") as bank:
        store(bank, KEY, range(6))
        store(bank, source_key("b"), range(4), name="b.mp4", seed=50)
        store(bank, replace(source_key("c"), embedder="another one"), range(2), name="c.mp4")
        store(bank, replace(source_key("d"), embedder="none"), range(2), name="d.mp4")
        yield bank


def look(bank: Bank, query: Any = "anything", **settings: Any) -> Findings[SourceRecord, SpanRecord]:
    return search(bank, query, **{"embedder": Coloured(), **settings})


def exhaustive(bank: Bank, query: Tensor, names: Sequence[str]) -> list[tuple[float, int]]:
    """(similarity, span id) of every span, best first."""
    rows = []
    for name in names:
        source = bank.source(name)
        for span, keys in zip(bank.spans(source.id), bank._catalog.keys(source.id), strict=True):
            rows.append((float(torch.cosine_similarity(keys, query[None]).max()), span.id))
    return sorted(rows, reverse=True)


@pytest.mark.parametrize("text", ["a cat", "a dog", "what?"])
@pytest.mark.parametrize("source, names", [(None, ["a.mp4", "b.mp4"]), ("b.mp4", ["b.mp4"]), (1, ["a.mp4"])])
def test_it_finds_what_comparing_with_every_key_finds(bank: Bank, text: str, source: Any, names: list[str]) -> None:
    wanted = exhaustive(bank, Coloured().texts([text])[0], names)[:4]
    result = look(bank, text, source=source, top=4)
    assert [found.span.id for found in result] == [span for _, span in wanted]
    assert [found.similarity for found in result] == pytest.approx([s for s, _ in wanted], abs=1e-5)
    for found in result:
        assert found.source.name in names and found.source.id == found.span.source_id
        assert (found.start_seconds, found.stop_seconds) == (float(found.span.start), float(found.span.stop))
        assert found.spans == (found.span,)
    assert f"{sum(2 * bank.source(name).spans for name in names)} keys" in result.searched_by


def test_only_the_records_of_what_was_found_are_read(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    records = bank.records

    def counted(span_ids: Sequence[int]) -> list[SpanRecord]:
        asked.extend(span_ids)
        return records(span_ids)

    def refused(*_: object) -> Any:
        raise AssertionError("every span of a source is read")

    look(bank)
    monkeypatch.setattr(bank, "records", counted)
    monkeypatch.setattr(bank, "spans", refused)
    monkeypatch.setattr(bank, "view", refused)
    assert len(look(bank, top=3)) == 3 == len(asked)


def test_it_says_which_videos_were_not_searched(bank: Bank) -> None:
    result = look(bank)
    assert [source.name for source in result.not_searched] == ["c.mp4", "d.mp4"]
    [note] = [note for note in result.notes if note.startswith("not searched")]
    assert "c.mp4 (encoder another one), d.mp4 (without an encoder)" in note
    assert not look(bank, source="a.mp4").not_searched
    assert not any("not searched" in note for note in look(bank, source="a.mp4").notes)


def test_what_cannot_be_compared_is_an_error(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"c.mp4 \(encoder another one\); load that encoder"):
        look(bank, source="c.mp4")
    with pytest.raises(BankError, match=r"d.mp4 \(without an encoder\)"):
        look(bank, source="d.mp4")
    with pytest.raises(BankError, match="is not remembered"):
        look(bank, source="nowhere.mp4")
    other = Coloured()
    other.fingerprint = "a third one"
    with pytest.raises(BankError, match=r"a.mp4 .*, b.mp4 .*, c.mp4 .* and 1 more; load"):
        look(bank, embedder=other)
    with Bank.open(tmp_path / "empty") as empty, pytest.raises(BankError, match="no spans to search yet"):
        look(empty)
    with pytest.raises(SettingsError, match="streamvid doctor"):
        look(bank, embedder=None)


def test_a_picture_is_the_same_picture_in_every_form(bank: Bank, tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 10:] = (200, 40, 90)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "picture.png")
    wanted = [(found.span.id, found.similarity) for found in look(bank, torch.from_numpy(pixels))]
    assert len(wanted) == 10
    for form in (pixels, image, image.convert("RGBA"), tmp_path / "picture.png"):
        assert [(found.span.id, found.similarity) for found in look(bank, form)] == wanted
    best = exhaustive(bank, Coloured().frames(torch.from_numpy(pixels)[None])[0], ["a.mp4", "b.mp4"])[0]
    assert wanted[0][0] == best[1] and wanted[0][1] == pytest.approx(best[0], abs=1e-5)


@pytest.mark.parametrize(
    "picture, said",
    [
        (torch.zeros(3, 8, 9, dtype=torch.uint8), r"\(3, 8, 9\) torch.uint8; permute it to put colours last"),
        (np.zeros((8, 9, 3), np.float32), "torch.float32; multiply values in"),
        (torch.zeros(8, 9, dtype=torch.uint8), r"got \(8, 9\) torch.uint8$"),
        (torch.zeros(0, 9, 3, dtype=torch.uint8), r"got \(0, 9, 3\)"),
    ],
)
def test_other_arrays_are_refused_with_the_likely_slip(bank: Bank, picture: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        look(bank, picture)


def test_slips_are_named(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the query is empty"):
        look(bank, "  ")
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(SettingsError, match=r"to search with a picture give Path\("):
        look(bank, str(tmp_path / "note.txt"))
    with pytest.raises(SourceError, match="neither a still image"):
        look(bank, tmp_path / "note.txt")
    with pytest.raises(SourceError, match="cannot be read"):
        look(bank, tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        look(bank, top=0)
    with pytest.raises(ValueError, match="join_seconds must be at least 0, got nan"):
        look(bank, join_seconds=float("nan"))


def test_spans_that_go_meanwhile_are_left_out(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    before = look(bank, top=5)
    records = bank.records
    monkeypatch.setattr(bank, "records", lambda ids: records(ids[1:]))
    assert [found.span.id for found in look(bank, top=5)] == [found.span.id for found in before[1:]]


def test_a_long_stretch_becomes_one_moment_and_the_rest_is_still_found(tmp_path: Path) -> None:
    """Twelve spans alike fill the first places; only looking further down finds the other video."""
    with Bank.open(tmp_path) as bank:
        target = Coloured().texts(["a cat"])
        for name, near, count in (("a.mp4", 0.01, 12), ("b.mp4", 0.5, 3)):
            with bank.writer(source_key(name), path=name, name=name) as writer:
                for number in range(count):
                    start, stop = span_times(number)
                    keys = target / target.norm() + near * span_keys(number, 1) / span_keys(number, 1).norm()
                    writer.append(span_tokens(number), start=start, stop=stop, keys=keys)
        first, second = look(bank, "a cat", top=2, join_seconds=0)
        assert first.source.name == "a.mp4" and second.source.name == "b.mp4"
        assert [span.ordinal for span in first.spans] == sorted(span.ordinal for span in first.spans)
        assert (first.start_seconds, first.stop_seconds) == (0, float(span_times(11)[1])) and len(first.spans) == 12
        assert first.similarity > 0.99 and first.span.id == look(bank, "a cat", top=1)[0].span.id


@pytest.mark.parametrize("text", ["a cat", "a dog", "what?", "anything", "a red circle"])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_looking_further_down_would_not_change_what_is_found(bank: Bank, text: str, top: int) -> None:
    every = look(bank, text, top=10)
    likeness = {found.span.id: found.similarity for found in every}
    wanted = _moments([found.span for found in every], likeness, 2.5)[:top]
    got = look(bank, text, top=top, join_seconds=2.5)
    assert [(f.start_seconds, f.stop_seconds, f.span) for f in got] == [
        (float(m.start), float(m.stop), m.spans[0]) for m in wanted
    ]


def test_joining_looks_at_so_many_spans_and_no_more(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    records = bank.records

    def counted(span_ids: Sequence[int]) -> list[SpanRecord]:
        asked.append(len(span_ids))
        return records(span_ids)

    monkeypatch.setattr(bank, "records", counted)
    look(bank, top=3, join_seconds=1e6)
    assert asked[:2] == [3, 6]
    asked.clear()
    monkeypatch.setattr(search_module, "SPANS_A_MOMENT", 1)
    look(bank, top=3, join_seconds=1e6)
    assert asked == [3]


def moments_of(
    rows: Sequence[tuple[int, int, int, float]], join_seconds: float
) -> list[tuple[float, float, list[int]]]:
    """Start, stop and ids, best span first, of the moments of (source, start, stop, similarity); ids count from 0."""
    spans: list[Any] = [
        SimpleNamespace(id=number, source_id=source, start=Fraction(start), stop=Fraction(stop))
        for number, (source, start, stop, _) in enumerate(rows)
    ]
    likeness = {number: row[3] for number, row in enumerate(rows)}
    return [(float(m.start), float(m.stop), [s.id for s in m.spans]) for m in _moments(spans, likeness, join_seconds)]


def test_joining_is_what_the_docstring_draws() -> None:
    rows = [(1, 12, 16, 0.31), (1, 40, 44, 0.30), (1, 16, 20, 0.28), (1, 20, 24, 0.22), (1, 90, 94, 0.21)]
    assert moments_of(rows, 0) == [(12, 20, [0, 2]), (40, 44, [1]), (20, 24, [3]), (90, 94, [4])]
    assert moments_of(rows, 20) == [(12, 44, [0, 1, 2, 3]), (90, 94, [4])]


def test_a_span_between_two_moments_makes_them_one_of_its_own_video_only() -> None:
    rows = [(1, 0, 4, 0.5), (1, 8, 12, 0.49), (2, 4, 8, 0.48), (1, 4, 8, 0.47)]
    assert moments_of(rows, 0) == [(0, 12, [0, 1, 3]), (4, 8, [2])]


def test_a_span_that_is_much_less_alike_stands_between_moments() -> None:
    """The far one is near enough by itself; what lies between is another moment, and moments do not overlap."""
    rows = [(1, 8, 12, 0.9), (1, 0, 4, 0.3), (1, 14, 18, 0.29)]
    assert moments_of(rows, 20) == [(8, 12, [0]), (0, 4, [1]), (14, 18, [2])]


slots = st.lists(
    st.tuples(st.integers(1, 2), st.integers(0, 40), st.integers(0, 20)), max_size=30, unique_by=lambda row: row[:2]
)


@given(slots, st.integers(0, 5))
def test_every_span_is_in_one_moment_with_those_like_it_and_near_it(
    drawn: list[tuple[int, int, int]], apart: int
) -> None:
    rows = sorted(((source, 4 * slot, 4 * slot + 4, like / 50) for source, slot, like in drawn), key=lambda r: -r[3])
    moments = moments_of(rows, 4 * apart)
    assert sorted(number for _, _, ids in moments for number in ids) == list(range(len(rows)))
    best = [rows[ids[0]][3] for _, _, ids in moments]
    assert best == sorted(best, reverse=True)
    for start, stop, ids in moments:
        inside = sorted(rows[number][:3] for number in ids)
        assert len({source for source, _, _ in inside}) == 1
        assert (start, stop) == (float(inside[0][1]), float(inside[-1][2]))
        for number in ids:
            alike = rows[number][3] >= rows[ids[0]][3] - 0.05 - 1e-9
            assert alike or start < rows[number][1] < rows[number][2] < stop
        assert all(after[1] - before[2] <= 4 * apart for before, after in pairwise(inside))
    for source in (1, 2):
        times = sorted((start, stop) for start, stop, ids in moments if rows[ids[0]][0] == source)
        assert all(before[1] <= after[0] for before, after in pairwise(times)), "moments overlap"


@given(slots, st.integers(0, 5))
def test_spans_all_alike_are_joined_by_time_alone(drawn: list[tuple[int, int, int]], apart: int) -> None:
    rows = [(1, 4 * slot, 4 * slot + 4, 0.5) for source, slot, _ in drawn if source == 1]
    plain = merge([(float(start), float(stop)) for _, start, stop, _ in rows], 4 * apart)
    assert sorted((start, stop) for start, stop, _ in moments_of(rows, 4 * apart)) == plain


def test_the_page_on_python_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks run one after another, and print what stands below them."""
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", page, re.DOTALL)
    assert len(blocks) >= 7 and all(shown for _, shown in blocks)
    shutil.copy(ROOT / "samples" / "three_shapes.mp4", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMVID_MEMORY", str(tmp_path / "memory"))
    names: dict[str, Any] = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/python.md", "exec"), names)
        assert printed.getvalue() == shown
