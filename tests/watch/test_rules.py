"""Rules: what sentences and tables mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamvid.errors import SettingsError
from streamvid.watch.rules import Rule, When, parse_duration, read_rules


@pytest.mark.parametrize(
    ("sentence", "what", "when"),
    [
        ("a red circle appears", "red circle", When.APPEARS),
        ("An orange star shows up.", "orange star", When.APPEARS),
        ("the dog leaves", "dog", When.LEAVES),
        ("someone disappears", "someone", When.LEAVES),
        ("there is a car", "car", When.PRESENT),
        ("the gate is visible", "gate", When.PRESENT),
        ("no guard", "guard", When.ABSENT),
        ("there is no guard at the door", "guard at the door", When.ABSENT),
        ("the boat is missing", "boat", When.ABSENT),
        ("anything changes", "", When.CHANGE),
        ("any change", "", When.CHANGE),
        ("a person falls", "person falls", When.APPEARS),
        ("a notebook", "notebook", When.APPEARS),
    ],
)
def test_a_sentence_says_what_and_when(sentence: str, what: str, when: When) -> None:
    rule = Rule.parse(sentence)
    assert (rule.what, rule.when) == (what, when)


def test_a_table_sets_everything() -> None:
    rule = Rule.parse(
        {
            "name": "door", "what": "a person enters", "cool_down": "2m", "hold": 1.5, "confirm": "is somebody there?",
            "priority": 9, "stale_after": "1h", "actions": "jsonl a.jsonl", "unlike": ["dog"], "sensitivity": 0.7,
        }
    )  # fmt: skip
    assert rule == Rule(
        name="door", what="person", when=When.APPEARS, cool_down_seconds=120, hold_seconds=1.5,
        confirm="is somebody there?", priority=9, stale_after_seconds=3600, actions=("jsonl a.jsonl",),
        unlike=("dog",), sensitivity=0.7,
    )  # fmt: skip


def test_the_model_is_asked_whether_it_is_there_and_no_confirms_a_leaving() -> None:
    assert Rule.parse("an orange star appears").question == "is there an orange star?"
    assert Rule.parse("an orange star appears").expected
    assert not Rule.parse("the dog leaves").expected
    assert Rule.parse({"what": "the dog leaves", "confirm": "is the yard empty?"}).expected
    assert Rule.parse({"what": "a cat appears", "confirm": ""}).question == ""
    assert Rule.parse("anything changes").question == ""


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"what": "a cat", "cooldown": 3}, "did you mean cool_down or"),
        ({"what": "a cat", "when": "apears"}, "did you mean appears or"),
        ({"what": "a cat", "cool_down": "soon"}, "90s, 5m or 1h, got 'soon'"),
        ({"what": "a cat", "cool_down": -1}, "cool_down_seconds must be seconds from 0 up, got -1"),
        ({"what": "a cat", "stale_after": 0}, "got 0"),
        ({"what": "a cat", "priority": 10}, "priority must be from 0 to 9, got 10"),
        ({"what": "a cat", "priority": True}, "whole number"),
        ({"what": "a cat", "sensitivity": float("nan")}, "got nan"),
        ({"what": 3}, "put it in quotes"),
        ({"what": "a cat", "unlike": [1]}, "must be texts"),
        ({"what": "a cat", "name": "two\nlines"}, "one line"),
        ({"when": "leaves"}, "names nothing to look for"),
        ({"what": "  "}, "got an empty one"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(table: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Rule.parse(table)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rules_come_from_a_file_each_under_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\nwhat = "a cat appears"\n[[rule]]\nwhat = "dog"\nwhen = "leaves"\n')
    assert [(r.what, r.when) for r in read_rules(file)] == [("cat", When.APPEARS), ("dog", When.LEAVES)]
    for text, words in (
        ('[[rule]]\nwhat = "a cat"\n[[rule]]\nwhat = "a cat"\n', "2 rules called 'a cat'"),
        ('[rule]\nwhat = "a cat"\n', "begin each rule with"),
        ("what = \n", "not TOML"),
        ("", "begin each rule with"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=words):
            read_rules(file)
    with pytest.raises(SettingsError, match="cannot read"):
        read_rules(tmp_path / "none.toml")


@given(st.integers(0, 10_000), st.sampled_from([("ms", 0.001), ("s", 1), ("m", 60), ("h", 3600), ("d", 86400)]))
def test_lengths_of_time_have_units(number: int, unit: tuple[str, float]) -> None:
    assert parse_duration(f"{number}{unit[0]}", name="x") == pytest.approx(number * unit[1])
    assert parse_duration(number, name="x") == number


@given(st.text(max_size=200))
def test_any_sentence_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = Rule.parse(text)
    except SettingsError:
        return
    assert rule.name.isprintable()
    assert rule.what or rule.when is When.CHANGE
