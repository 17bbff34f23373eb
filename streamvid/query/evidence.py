"""Which of the moments given to the model an answer rests on: the times it may cite."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_TIME = re.compile(r"\b(?:(\d+):)?(\d{1,2}):(\d{2})(?:\.\d+)?\b|\b(\d+(?:\.\d+)?)\s*(?:seconds?|secs?|s)\b")
_NAMES = re.compile(r"^(?:the|an?)\s+", re.IGNORECASE)
"""How an answer begins that names a thing, and so can be looked for by itself."""

_CLAUSE = re.compile(r", then |; |\. |\n+")


@dataclass(frozen=True, slots=True)
class Moment:
    """One remembered frame of which tokens were given to the model."""

    start_seconds: float
    stop_seconds: float
    key: Tensor | None
    """(Dk,) unit vector of the picture; None where there is no embedder."""


def cite(
    answer: str,
    question: str,
    moments: Sequence[Moment],
    embed: Callable[[Sequence[str]], Tensor] | None,
    *,
    join_seconds: float = 0.05,
) -> list[tuple[float, float]]:
    """Spans of the given moments that an answer rests on, in time order and without overlap.

    Times the answer names itself count first, if they fall inside a moment that was given.
    Otherwise each clause of the answer is compared with the pictures of the moments, and those
    that stand out (in the upper quarter between the least and the most similar) are its evidence.
    Nothing is cited that was not given; an answer that names nothing to be found cites nothing.

    Args:
        answer: the model's words.
        question: the user's words.
        moments: in time order.
        embed: texts to unit vectors in the space of the moments' keys; None cites named times only.
        join_seconds: moments closer than this become one span; a span is never wider than what was given.
    """
    found: set[int] = set()
    for seconds in named_times(answer):
        found.update(i for i, m in enumerate(moments) if m.start_seconds <= seconds < m.stop_seconds)
    if not found and embed is not None and not _denies(answer):
        keyed = [(i, m.key) for i, m in enumerate(moments) if m.key is not None]
        if keyed:
            import torch  # here, so that commands without a model do not wait for it

            keys = torch.stack([key for _, key in keyed])
            clauses = [c.strip(" .") for c in _CLAUSE.split(answer) if c.strip(" .")]
            if len(clauses) == 1 and len(clauses[0].split()) <= 4:
                named = _NAMES.sub("", clauses[0])  # "the red circle" says it all, "left" says nothing alone
                clauses = [named if named != clauses[0] else f"{question} {clauses[0]}"]
            rows = list((keys @ embed(clauses).T).T) if clauses else []
            for row in rows:
                found.update(keyed[i][0] for i in _outstanding(row))
    return merge([(moments[i].start_seconds, moments[i].stop_seconds) for i in sorted(found)], join_seconds)


def named_times(text: str) -> list[float]:
    """Times in seconds that a text names: ``12 seconds``, ``3.5 s``, ``1:05``, ``[00:12]``, ``1:02:03``."""
    out = []
    for match in _TIME.finditer(text):
        hours, minutes, seconds, plain = match.groups()
        out.append(float(plain) if plain is not None else int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds))
    return out


def merge(spans: Sequence[tuple[float, float]], join_seconds: float = 0.0) -> list[tuple[float, float]]:
    """Sorted spans with those that overlap or nearly touch made one."""
    out: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1] + join_seconds:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def clock(seconds: float) -> str:
    """``mm:ss``, or ``h:mm:ss`` from one hour on; whole seconds, rounded down."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes:02}:{second:02}"


@dataclass(frozen=True, slots=True)
class Clock:
    """How times are told: of a film as ``mm:ss``, of a live source by the clock on the wall.

    ::

        Clock()(754)                             12:34
        Clock(origin=noon)(754)                  12:12:34
        Clock(origin=noon, now=100_000)(754)     2026-03-04 12:12:34    where now is on another day
    """

    origin: datetime | None = None
    """The time on the wall at second 0; None where it is not known."""

    now: float | None = None
    """Seconds: the present."""

    def __call__(self, seconds: float) -> str:
        """One moment; whole seconds, rounded down."""
        if self.origin is None:
            return clock(seconds)
        moment = self.origin + timedelta(seconds=math.floor(seconds))
        today = self.now is None or (self.origin + timedelta(seconds=self.now)).date() == moment.date()
        return moment.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")

    def span(self, start: float, stop: float) -> str:
        """``12:34-12:40``; the day is said once if it is one."""
        first, last = self(start), self(stop)
        if " " in first and first.split()[0] == last.split()[0]:
            last = last.split()[1]
        return f"{first}-{last}"


def citation(spans: Sequence[tuple[float, float]], tell: Clock | None = None) -> str:
    """``[00:03-00:07] [00:09-00:13]``."""
    tell = Clock() if tell is None else tell
    return " ".join(f"[{tell.span(start, stop)}]" for start, stop in spans)


def _denies(answer: str) -> bool:
    words = answer.lower().split()
    return not words or words[0] in ("no", "no,", "none", "nothing") or "there is no " in answer.lower()


def _outstanding(similarity: Tensor) -> list[int]:
    """Indices in the upper quarter between least and most similar; none if all are much alike."""
    best, low = float(similarity.max()), float(similarity.min())
    if len(similarity) == 1:
        return [0]
    if best - low < 0.05:
        return []
    chosen: list[int] = (similarity >= best - 0.25 * (best - low)).nonzero().squeeze(1).tolist()
    return chosen
