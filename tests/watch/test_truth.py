"""Hits against known times."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamvid.errors import SettingsError
from streamvid.toy.video import write_truth
from streamvid.toy.world import sample_scene
from streamvid.watch.rules import Rule
from streamvid.watch.truth import Known, expected, match, read_truth


def known(*spans: tuple[float, float]) -> list[Known]:
    return [Known(Fraction(a), Fraction(b), "cat") for a, b in spans]


def test_each_event_counts_once_and_the_rest_are_false() -> None:
    verdict = match([Fraction(t) for t in (11, 12, 40, 61)], known((10, 15), (30, 32), (60, 70)))
    assert [(float(hit), float(event.start)) for hit, event in verdict.matched] == [(11, 10), (61, 60)]
    assert verdict.false == (12, 40)
    assert [float(event.start) for event in verdict.missed] == [30]
    assert (verdict.precision, verdict.recall) == (0.5, pytest.approx(2 / 3))
    assert verdict.delays_seconds == (1, 1)


def test_nothing_to_divide_by_is_not_a_perfect_score() -> None:
    assert math.isnan(match([], []).precision) and math.isnan(match([], []).recall)
    assert match([], known((1, 2))).recall == 0


def test_tolerance_reaches_over_both_ends_and_no_further() -> None:
    event = known((10, 12))
    fits = [bool(match([Fraction(t, 10)], event, tolerance=Fraction(1, 2)).matched) for t in (94, 95, 125, 126)]
    assert fits == [False, True, True, False]


@given(
    st.lists(st.integers(0, 12), max_size=4),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=4),
    st.integers(0, 2),
)
def test_no_pairing_has_more_pairs(hits: list[int], spans: list[tuple[int, int]], tolerance: int) -> None:
    events = known(*[(a, a + length) for a, length in spans])

    def fits(hit: int, event: Known) -> bool:
        return event.start - tolerance <= hit <= event.stop + tolerance

    slots = [*hits, *[None] * len(events)]
    best = max(
        sum(hit is not None and fits(hit, event) for hit, event in zip(order, events, strict=True))
        for order in itertools.permutations(slots, len(events))
    )
    verdict = match([Fraction(hit) for hit in hits], events, tolerance=Fraction(tolerance))
    assert len(verdict.matched) == best
    assert len(verdict.matched) + len(verdict.false) == len(hits)
    assert len(verdict.matched) + len(verdict.missed) == len(events)
    assert all(fits(int(hit), event) for hit, event in verdict.matched)


def test_truth_is_read_from_lines_tables_and_toy_files(tmp_path: Path) -> None:
    lines, table = tmp_path / "t.jsonl", tmp_path / "t.csv"
    lines.write_text('{"start": "1:02.5", "stop": 70, "what": "cat"}\n\n{"start": 0.1}\n')
    table.write_text("start, stop, what\n62.5, 70, cat\n0.1,,\n")
    assert read_truth(lines) == read_truth(table)
    assert read_truth(lines) == [
        Known(Fraction(1, 10), Fraction(1, 10), ""),
        Known(Fraction(125, 2), Fraction(70), "cat"),
    ]
    scene = sample_scene(3, seconds=16)
    found = read_truth(write_truth(scene, tmp_path / "t.json"))
    assert [(e.start, e.stop, e.what) for e in found] == [
        (e.start_seconds, e.end_seconds, e.name) for e in scene.events
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.jsonl", '{"start": 1}\n{"start": "soon"}\n', "line 2: start must be seconds or mm:ss, got 'soon'"),
        ("t.jsonl", "{}\n", "line 1: start must be seconds"),
        ("t.jsonl", '{"start": 1}\nnothing\n', "line 2 is not JSON"),
        ("t.jsonl", '{"start": 5, "stop": 3}\n', "stop must not be before start"),
        ("t.jsonl", "[1]\n", "an object was expected"),
        ("t.csv", "when,what\n1,cat\n", "start,stop,what"),
        ("t.csv", "start,stop,what\n1/0,2,cat\n", "line 2"),
    ],
)
def test_wrong_truth_names_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_truth(file)
    assert words in str(caught.value)


def test_a_rule_is_judged_by_its_own_events_at_its_own_moment() -> None:
    events = [Known(Fraction(1), Fraction(3), "Cat"), Known(Fraction(5), Fraction(9), "dog")]
    assert expected(events, Rule.parse("a cat appears")) == [events[0]]
    assert expected(events, Rule.parse("a dog leaves")) == [Known(Fraction(9), Fraction(9), "dog")]
    assert [e.start for e in expected(events, Rule.parse("anything changes"))] == [1, 3, 5, 9]
    with pytest.raises(SettingsError, match="only Cat, dog"):
        expected(events, Rule.parse("a cow appears"))
    with pytest.raises(SettingsError, match="absence"):
        expected(events, Rule.parse("no cat"))
