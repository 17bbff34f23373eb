"""Questions about a toy scene with exactly one right answer each.

Wordings of one kind mean the same; the first is the canonical one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamvid.toy.world import ACTIONS, COLORS, SHAPES, Event, Scene

KINDS = (
    "what_happens",
    "color",
    "shape",
    "direction",
    "count",
    "first",
    "last",
    "after",
    "when",
    "is_there",
    "none",
)

WORDINGS = {
    "what_happens": ("what happens?", "what is happening in the video?", "describe the video.", "what do you see?"),
    "color": ("what color is the {shape}?", "which color does the {shape} have?", "what is the color of the {shape}?"),
    "shape": ("which shape is {color}?", "what shape is {color}?", "what is the {color} thing?"),
    "direction": (
        "which way does the {name} move?",
        "where does the {name} go?",
        "in which direction does the {name} move?",
    ),
    "count": ("how many shapes are there?", "how many shapes appear?", "how many objects do you see?"),
    "first": ("which shape comes first?", "what appears first?", "what is the first shape?"),
    "last": ("which shape comes last?", "what appears last?", "what is the last shape?"),
    "after": (
        "what comes after the {name}?",
        "which shape appears after the {name}?",
        "what is next after the {name}?",
    ),
    "when": ("when does the {name} appear?", "at what time does the {name} come?", "when is the {name} first seen?"),
    "is_there": ("is there a {name}?", "do you see a {name}?", "does a {name} appear?"),
}
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its one right answer, what kind it is and when its evidence is on screen."""

    question: str
    answer: str
    kind: str
    spans: tuple[tuple[int, int], ...] = ()


def with_article(name: str) -> str:
    """``a`` or ``an`` before a name."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def narrate(events: Sequence[Event]) -> str:
    """All events in order, in one sentence."""
    if not events:
        return "nothing happens"
    return ", then ".join(f"{with_article(event.name)} {event.action}" for event in events)


def ask_all(scene: Scene, *, seed: int | None = None) -> list[Question]:
    """Every kind of question that has exactly one right answer for this scene.

    Args:
        scene: the scene.
        seed: None words every question canonically; a number draws wordings and subjects.
    """
    rng = np.random.default_rng(scene.seed if seed is None else seed)
    events = scene.events
    names = [event.name for event in events]

    def word(kind: str, **parts: str) -> str:
        options = WORDINGS[kind]
        text = options[0] if seed is None or rng.random() < 0.4 else options[int(rng.integers(len(options)))]
        text = text.format(**parts)
        return text.replace(" a orange", " an orange")

    def span(*subjects: Event) -> tuple[tuple[int, int], ...]:
        return tuple((event.start_seconds, event.end_seconds) for event in subjects)

    def pick(options: Sequence[Event]) -> Event:
        return options[int(rng.integers(len(options)))]

    out: list[Question] = []
    if len(events) < len(NUMBERS):
        out.append(Question(word("what_happens"), narrate(events), "what_happens", span(*events)))
        out.append(Question(word("count"), NUMBERS[len(events)], "count", span(*events)))
    lone_shapes = [e for e in events if [x.shape for x in events].count(e.shape) == 1]
    lone_colors = [e for e in events if [x.color for x in events].count(e.color) == 1]
    lone = [e for e in events if names.count(e.name) == 1]
    if lone_shapes:
        event = pick(lone_shapes)
        out.append(Question(word("color", shape=event.shape), event.color, "color", span(event)))
    if lone_colors:
        event = pick(lone_colors)
        out.append(Question(word("shape", color=event.color), event.shape, "shape", span(event)))
    if lone:
        event = pick(lone)
        way = event.action.removeprefix("moves ") if event.action != ACTIONS[-1] else "it stays still"
        out.append(Question(word("direction", name=event.name), way, "direction", span(event)))
        event = pick(lone)
        out.append(Question(word("when", name=event.name), f"{event.start_seconds} seconds", "when", span(event)))
        event = pick(lone)
        out.append(Question(word("is_there", name=event.name), "yes", "is_there", span(event)))
        event = pick(lone)
        place = events.index(event)
        later = events[place + 1] if place + 1 < len(events) else None
        answer = f"the {later.name}" if later else "nothing"
        out.append(Question(word("after", name=event.name), answer, "after", span(event, *([later] if later else []))))
    if events:
        out.append(Question(word("first"), f"the {events[0].name}", "first", span(events[0])))
        out.append(Question(word("last"), f"the {events[-1].name}", "last", span(events[-1])))
    out.extend(_about_nothing(events, rng, word))
    return out


def _about_nothing(events: Sequence[Event], rng: np.random.Generator, word) -> list[Question]:  # type: ignore[no-untyped-def]
    """Questions about what is not there; half of the absent names differ in one word only."""
    names = {event.name for event in events}
    every = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in names]
    near = [n for n in every if any((n.split()[0] == e.color) != (n.split()[1] == e.shape) for e in events)]
    pool = near if near and rng.random() < 0.5 else every
    out = []
    if pool:
        out.append(Question(word("is_there", name=pool[int(rng.integers(len(pool)))]), "no", "is_there"))
        pool = near if near and rng.random() < 0.5 else every
        missing = pool[int(rng.integers(len(pool)))]
        kind = ("direction", "when", "after")[int(rng.integers(3))]
        out.append(Question(word(kind, name=missing), f"there is no {missing}", "none"))
    absent = [shape for shape in SHAPES if all(event.shape != shape for event in events)]
    if absent:
        shape = absent[int(rng.integers(len(absent)))]
        out.append(Question(word("color", shape=shape), f"there is no {shape}", "none"))
    return out
