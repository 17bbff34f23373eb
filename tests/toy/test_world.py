"""Scenes: events where they say, the same for the same seed, questions with one answer."""

from __future__ import annotations

import numpy as np
import pytest

from streamvid.toy.questions import KINDS, ask_all
from streamvid.toy.world import ACTIONS, BACKGROUNDS, HELD_OUT_PAIRS, needle_scene, sample_scene

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_events_follow_one_another_inside_the_scene(seed: int) -> None:
    scene = sample_scene(seed)
    assert 1 <= len(scene.events) <= 3 and scene.background in BACKGROUNDS
    assert all(0 <= e.start_seconds < e.end_seconds <= scene.seconds for e in scene.events)
    assert all(a.end_seconds + 1 <= b.start_seconds for a, b in zip(scene.events, scene.events[1:], strict=False))
    assert all(e.action in ACTIONS for e in scene.events)


def test_same_seed_same_scene_and_same_pixels() -> None:
    a, b = sample_scene(7), sample_scene(7)
    assert a == b and a != sample_scene(8)
    assert np.array_equal(a.draw([1.0, 2.5], height=48, width=64), b.draw([1.0, 2.5], height=48, width=64))


def test_a_moment_does_not_depend_on_the_others_drawn_with_it() -> None:
    scene = sample_scene(3)
    together = scene.draw([1.0, 4.2, 9.9], height=48, width=48)
    assert np.array_equal(together[1], scene.draw([4.2], height=48, width=48)[0])


@pytest.mark.parametrize("seed", range(8))
def test_event_is_drawn_exactly_during_its_seconds(seed: int) -> None:
    scene = sample_scene(seed, clean=True, events=1)
    event = scene.events[0]
    times = np.arange(0, scene.seconds, 0.25)
    empty = np.clip(scene.backdrop(48, 48) + 0.5, 0, 255).astype(np.uint8)
    drawn = (scene.draw(list(times), height=48, width=48) != empty).any(axis=(1, 2, 3))
    assert np.array_equal(drawn, event.visible(times))
    assert drawn.sum() == 4 * (event.end_seconds - event.start_seconds)


def test_held_out_pairs_stay_held_out() -> None:
    for seed in range(100):
        assert not {(e.color, e.shape) for e in sample_scene(seed, held_out=False).events} & HELD_OUT_PAIRS
        assert {(e.color, e.shape) for e in sample_scene(seed, held_out=True).events} <= HELD_OUT_PAIRS


@pytest.mark.parametrize("bad", [{"seconds": 3}, {"events": 5}, {"events": -1}, {"background": "plaid"}], ids=str)
def test_impossible_scenes_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        sample_scene(0, **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_question_has_one_answer(seed: int) -> None:
    scene = sample_scene(seed)
    asked = ask_all(scene)
    answers: dict[str, str] = {}
    for question in asked:
        assert question.kind in KINDS and question.answer
        assert answers.setdefault(question.question, question.answer) == question.answer
        assert all(0 <= a < b <= scene.seconds for a, b in question.spans)
    assert asked == ask_all(scene)


def test_answers_about_one_event_are_its_own() -> None:
    for seed in SEEDS:
        scene = sample_scene(seed, events=1)
        event = scene.events[0]
        said = {q.kind: q.answer for q in ask_all(scene) if q.kind not in ("is_there", "none")}
        assert said["color"] == event.color and said["shape"] == event.shape
        assert said["count"] == "one" and said["first"] == said["last"] == f"the {event.name}"
        assert said["when"] == f"{event.start_seconds} seconds" and said["after"] == "nothing"
        assert event.action.removeprefix("moves ") in said["direction"] or event.action == "stays still"


@pytest.mark.parametrize("kind", ["static", "busy"])
@pytest.mark.parametrize("seed", range(10))
def test_needle_shares_neither_shape_nor_colour(seed: int, kind: str) -> None:
    scene, needle = needle_scene(seed, distractors=kind)
    others = [event for event in scene.events if event is not needle]
    assert len(others) == len(scene.events) - 1
    assert all(e.shape != needle.shape and e.color != needle.color for e in others)
    assert all(a.end_seconds < b.start_seconds for a, b in zip(scene.events, scene.events[1:], strict=False))
    assert (scene.noise, scene.shake, scene.seconds) == (0.0, 0.0, 600)
    assert scene.events[-1].end_seconds <= 600
    if kind == "static":
        assert not others
    else:
        starts = [event.start_seconds for event in scene.events]
        assert len(others) >= 25 and max(b - a for a, b in zip(starts, starts[1:], strict=False)) <= 40
        answers = {q.answer for q in ask_all(scene) if q.kind == "is_there"}
        assert answers == {"yes", "no"}


def test_needles_fall_anywhere() -> None:
    starts = [needle_scene(seed)[1].start_seconds for seed in range(60)]
    assert min(starts) < 100 and max(starts) > 500 and len(set(starts)) > 50


@pytest.mark.parametrize("bad", [{"seconds": 10}, {"distractors": "loud"}], ids=str)
def test_impossible_needles_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        needle_scene(0, **bad)  # type: ignore[arg-type]
