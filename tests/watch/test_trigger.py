"""The trigger: what it names, when, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch

from streamvid.errors import SettingsError
from streamvid.watch.rules import Rule, When
from streamvid.watch.texts import COLORS
from streamvid.watch.trigger import Candidate, Trigger
from tests.watch.words import Words, picture


def rule(what: str = "red circle", when: When = When.APPEARS, **settings: Any) -> Rule:
    return Rule(name=what or "change", what=what, when=when, **settings)


def show(trigger: Trigger, shown: Sequence[str], *, first: int = 0, **settings: Any) -> list[Candidate]:
    """One picture a second."""
    found = [
        trigger.update(at=Fraction(first + i), key=picture(words, seed=first + i, **settings), kept=0.1)
        for i, words in enumerate(shown)
    ]
    return [candidate for candidate in found if candidate]


QUIET = [""] * 20


def test_the_first_picture_of_an_event_is_named_and_no_other() -> None:
    found = show(Trigger(rule(), Words()), [*QUIET, *["red circle"] * 5, *QUIET])
    assert [(c.start, c.at) for c in found] == [(20, 20)]
    assert found[0].score > 0
    assert "'red circle' fits by" in found[0].reason
    assert "10% of the cells changed" in found[0].reason


def test_a_leaving_is_named_when_it_is_gone() -> None:
    found = show(Trigger(rule(when=When.LEAVES), Words()), [*QUIET, *["red circle"] * 5, *QUIET])
    assert [c.at for c in found] == [25]
    assert found[0].score > 0


def test_what_is_there_from_the_start_does_not_appear() -> None:
    shown = ["red circle"] * 10
    assert show(Trigger(rule(), Words()), shown) == []
    assert [c.at for c in show(Trigger(rule(when=When.PRESENT, cool_down_seconds=4), Words()), shown)] == [0, 4, 8]


def test_absence_is_named_again_after_each_cool_down() -> None:
    trigger = Trigger(rule(when=When.ABSENT, cool_down_seconds=5), Words())
    found = show(trigger, [*["red circle"] * 3, *[""] * 8, *["red circle"] * 4])
    assert [c.at for c in found] == [3, 8]
    assert found[0].score > 0


def test_other_colours_and_other_things_do_not_alarm() -> None:
    distractors = ["blue circle", "", "green circle", "", "yellow circle", "", "car", "", "person tree", ""] * 30
    assert show(Trigger(rule(), Words()), [*QUIET, *distractors]) == []


def test_what_the_user_calls_unlike_does_not_alarm() -> None:
    """The same stream alarms without it, so the setting is what keeps it quiet."""
    stream = [*QUIET, "red square", "red square", *QUIET]
    eager = rule(sensitivity=1.0)
    assert show(Trigger(eager, Words()), stream)
    assert not show(Trigger(rule(sensitivity=1.0, unlike=("red square",)), Words()), stream)
    assert show(Trigger(rule(sensitivity=1.0, unlike=("red square",)), Words()), [*QUIET, "red circle"])


def test_a_stream_that_always_resembles_the_text_is_quiet() -> None:
    """A fixed threshold that finds the circle alone would fire at every picture here."""
    always = [f"red circle {other}" for other in ("car", "person", "tree", "sky")] * 100
    trigger = Trigger(rule(), Words())
    assert len(show(trigger, [*QUIET, *always])) == 1


def test_a_still_stream_does_not_alarm_on_nothing() -> None:
    trigger = Trigger(rule(), Words())
    quiet = picture("car", noise=0.0)
    nudge = torch.nn.functional.normalize(quiet + 0.01 * Words().texts(["red circle"])[0], dim=-1)
    assert all(trigger.update(at=Fraction(i), key=quiet, kept=0.0) is None for i in range(300))
    assert trigger.update(at=Fraction(300), key=nudge, kept=0.0) is None


def test_between_the_two_bars_the_state_stays() -> None:
    trigger = Trigger(rule(cool_down_seconds=0), Words())
    show(trigger, QUIET)
    scores = [0.1, -0.1, 0.1, -0.3, 0.1, -0.5, -0.1, 0.2]
    inside = []
    for i, score in enumerate(scores):
        trigger._turn(Fraction(100 + i), score)
        inside.append(trigger.present)
    assert inside == [True, True, True, True, True, False, False, True]


def test_the_cool_down_holds_alerts_back_and_counts_them() -> None:
    stream = [*QUIET, "red circle", "", "", "red circle", "", "", *[""] * 20, "red circle"]
    trigger = Trigger(rule(cool_down_seconds=10), Words())
    assert [c.at for c in show(trigger, stream)] == [20, 46]
    assert trigger.suppressed == 1


def test_a_refused_candidate_does_not_hide_the_event_after_it() -> None:
    trigger = Trigger(rule(cool_down_seconds=60), Words())
    found = show(trigger, [*QUIET, "red circle", ""])
    trigger.judge(found[0], confirmed=False)
    assert [c.at for c in show(trigger, ["", "", "red circle"], first=22)] == [24]
    trigger.judge(found[0], confirmed=True)
    assert show(trigger, ["", "red circle"], first=25) == []


def test_what_was_refused_half_in_view_is_named_again_once_it_fits_better() -> None:
    trigger = Trigger(rule(), Words())
    show(trigger, QUIET)
    half = torch.nn.functional.normalize(picture("", noise=0) + 0.7 * Words().texts(["red circle"])[0], dim=-1)
    first = trigger.update(at=Fraction(30), key=half)
    assert first is not None
    trigger.judge(first, confirmed=False)
    found = show(trigger, ["red circle"] * 10, first=33)
    assert len(found) == 1
    assert found[0].score > first.score + Trigger.BETTER


def test_hold_forgets_a_flicker() -> None:
    trigger = Trigger(rule(hold_seconds=2), Words())
    found = show(trigger, [*QUIET, "red circle", "", "", *["red circle"] * 5])
    assert [(c.start, c.at) for c in found] == [(23, 25)]


def test_a_picture_that_was_not_embedded_changes_nothing() -> None:
    held, plain = Trigger(rule(hold_seconds=3), Words()), Trigger(rule(hold_seconds=3), Words())
    shown = [*QUIET, "red circle"]
    assert show(held, shown) == show(plain, shown) == []
    still = [held.update(at=Fraction(21 + i), key=None, kept=0.0) for i in range(4)]
    assert [c is not None for c in still] == [False, False, True, False]
    assert held.state()["running"] == plain.state()["running"]


def test_any_change_needs_no_texts_and_is_quiet_on_a_busy_stream() -> None:
    trigger = Trigger(rule("", When.CHANGE), None)
    usual = [trigger.update(at=Fraction(i), key=None, kept=0.3 + 0.02 * (i % 3)) for i in range(200)]
    assert not any(usual[30:])
    jump = trigger.update(at=Fraction(200), key=None, kept=0.9)
    assert jump is not None
    assert "90% of the cells changed" in jump.reason


def test_any_change_sees_another_picture_by_its_vector() -> None:
    trigger = Trigger(rule("", When.CHANGE), Words())
    assert show(trigger, ["car"] * 60) == []
    assert [c.at for c in show(trigger, ["tree"] * 3, first=60)] == [60]


def test_a_restart_goes_on_where_it_stopped() -> None:
    stream = [*QUIET, *["red circle"] * 3, *[""] * 8, "red circle", *[""] * 12, *["red circle"] * 3] * 3
    for when in (When.APPEARS, When.LEAVES, When.PRESENT, When.CHANGE):
        whole = show(Trigger(rule(when=when), Words()), stream)
        for cut in (1, 21, 24, 60):
            before, after = Trigger(rule(when=when), Words()), Trigger(rule(when=when), Words())
            found = show(before, stream[:cut])
            after.restore(json.loads(json.dumps(before.state())))
            found += show(after, stream[cut:], first=cut)
            assert [(c.start, c.at) for c in found] == [(c.start, c.at) for c in whole]
            assert [c.score for c in found] == pytest.approx([c.score for c in whole], abs=1e-4)


def test_the_state_of_another_rule_is_refused() -> None:
    with pytest.raises(SettingsError, match="not of rule 'red circle'"):
        Trigger(rule(), Words()).restore(Trigger(rule("car"), Words()).state())


def test_state_is_as_small_after_ten_thousand_pictures() -> None:
    trigger = Trigger(rule(), Words())
    keys = [picture(words) for words in ("", "car", "red circle")]
    sizes = []
    for i in range(10_000):
        trigger.update(at=Fraction(i), key=keys[(i // 50) % 3], kept=0.1)
        if i in (1000, 9999):
            sizes.append(len(json.dumps(trigger.state())))
    assert max(sizes) < 400 and abs(sizes[1] - sizes[0]) < 40


def test_two_streams_do_not_meet() -> None:
    stream = [*QUIET, *["red circle"] * 3, *QUIET]
    one, two = Trigger(rule(), Words()), Trigger(rule(), Words())
    found = []
    for i, words in enumerate(stream):
        found.append(one.update(at=Fraction(i), key=picture(words, seed=i), kept=0.1))
        two.update(at=Fraction(i), key=picture("car", seed=i), kept=0.1)
    assert [c for c in found if c] == show(Trigger(rule(), Words()), stream)


def test_colours_the_embedder_does_not_know_are_not_rivals() -> None:
    """Without their colour they are "circle", which fits a red circle as well as the rule's own text."""
    texts = Trigger(rule(), Words())._texts
    assert texts is not None
    assert texts.names == ("green circle", "blue circle", "yellow circle")
    assert set(texts.names) < {f"{color} circle" for color in COLORS}


def test_wrong_calls_are_refused() -> None:
    trigger = Trigger(rule(), Words())
    trigger.update(at=Fraction(1), key=picture(""))
    with pytest.raises(ValueError, match="times must rise"):
        trigger.update(at=Fraction(1), key=picture(""))
    with pytest.raises(ValueError, match="kept must be in"):
        trigger.update(at=Fraction(2), key=picture(""), kept=1.5)
    with pytest.raises(ValueError, match="key must be one vector"):
        trigger.update(at=Fraction(3), key=torch.zeros(3))
    with pytest.raises(SettingsError, match="image-text encoder"):
        Trigger(rule(), None)
