"""Citations: only what was given, and only where it can be seen."""

from __future__ import annotations

import pytest
import torch

from streamvid.query.evidence import Moment, citation, cite, clock, merge, named_times

WORDS = {"red": 0, "blue": 1}


def embed(texts: object) -> torch.Tensor:
    """A stand-in space: one axis a colour word, one for everything else."""
    rows = []
    for text in texts:  # type: ignore[attr-defined]
        row = torch.zeros(3)
        for word, axis in WORDS.items():
            row[axis] += word in text
        rows.append(row / row.norm() if bool(row.any()) else torch.tensor([0.0, 0.0, 1.0]))
    return torch.stack(rows)


RED, BLUE, EMPTY = torch.eye(3)
VIDEO = [
    Moment(float(t), t + 1.0, key) for t, key in enumerate([EMPTY, RED, RED, EMPTY, EMPTY, BLUE, BLUE, BLUE, EMPTY])
]


def test_each_clause_cites_its_own_moments() -> None:
    spans = cite("a red circle moves left, then a blue square stays still", "what happens?", VIDEO, embed)
    assert spans == [(1.0, 3.0), (5.0, 8.0)]


def test_a_short_answer_is_read_together_with_its_question() -> None:
    assert cite("left", "which way does the blue square move?", VIDEO, embed) == [(5.0, 8.0)]


def test_a_time_the_answer_names_is_cited_if_it_was_given() -> None:
    assert cite("at 6 seconds", "when does the red circle appear?", VIDEO, embed) == [(6.0, 7.0)]


def test_a_time_that_was_not_given_is_never_cited() -> None:
    given = [m for m in VIDEO if m.start_seconds < 4]
    spans = cite("at 6 seconds", "when does the red circle appear?", given, embed)
    assert all(any(m.start_seconds <= a and b <= 4 for m in given) for a, b in spans)


@pytest.mark.parametrize("answer", ["there is no star", "no", "nothing", "nothing happens", ""])
def test_what_is_not_there_cites_nothing(answer: str) -> None:
    assert cite(answer, "is there a red star?", VIDEO, embed) == []


def test_without_an_embedder_only_named_times_are_cited() -> None:
    bare = [Moment(m.start_seconds, m.stop_seconds, None) for m in VIDEO]
    assert cite("a red circle", "what happens?", bare, None) == []
    assert cite("at [00:02]", "what happens?", bare, None) == [(2.0, 3.0)]


def test_when_nothing_stands_out_nothing_is_cited() -> None:
    same = [Moment(float(t), t + 1.0, RED) for t in range(4)]
    assert cite("a blue square", "what happens?", same, embed) == []


def test_times_are_read_in_all_usual_forms() -> None:
    text = "from 0:05 to 1:02:03, 12 seconds in, 3.5 s later, frame 7"
    assert named_times(text) == [5, 3723, 12, 3.5]


def test_spans_merge_and_print() -> None:
    assert merge([(5, 6), (1, 2), (2.5, 3)], 1.0) == [(1, 3), (5, 6)]
    assert citation([(61.9, 65.0), (3600, 3725)]) == "[01:01-01:05] [1:00:00-1:02:05]"
    assert clock(59.99) == "00:59"
