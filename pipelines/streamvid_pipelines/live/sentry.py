"""The rules of one stream at work: what the triggers name, the model is asked about.

Knows rules, triggers and turns; the model is a function here, and neither pictures nor the queue are known.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from streamvid.errors import SettingsError, StreamvidError
from streamvid.session import Watched
from streamvid.watch.rules import Rule, When
from streamvid.watch.trigger import Candidate, Trigger

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

Ask = Callable[[str, tuple[float, float]], str]
"""Question and [start, stop) in seconds to what the model says about that time."""

BEFORE_SECONDS = Fraction(1)
"""The model is shown so much before a candidate, and up to `LOOKS` after it."""

LOOKS = (Fraction(1), Fraction(3))
"""Seconds after a candidate at which the model is asked; each later one only if the one before was refused."""

LEFT_SECONDS = 10
"""So much before it left is shown of what was there from the first picture on."""

PATIENCE_SECONDS = 60
"""A candidate whose turn does not come within so long is given up."""

OVERDUE_SECONDS = 10
"""After so long the model is asked even if the stream did not go on: a camera may be cut off by what it saw."""

WAITING = 64
"""Candidates that wait at most; of more, the oldest of the lowest priority are given up."""

_MINUTE = 60
_SAID = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_STATE = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a candidate."""

    rule: Rule
    start: Fraction
    """When it began, in seconds of the stream."""

    at: Fraction
    """The picture that decided."""

    stop: Fraction
    """Up to when it was seen to last, > at."""

    score: float
    reason: str
    confirmed: bool | None
    """What the model found; None if it was not asked."""

    answer: str = ""
    """What the model said."""


@dataclass(slots=True)
class Counts:
    """Since the rules began to be watched."""

    candidates: int = 0
    looks: int = 0
    """Questions put to the model."""

    confirmed: int = 0
    refused: int = 0
    given_up: int = 0
    """Candidates the model was never asked about because too many came."""


@dataclass(slots=True)
class _Look:
    candidate: Candidate
    seen: Fraction
    tries: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def due(self) -> Fraction:
        wait = 0 if self.was_there else LOOKS[self.tries]
        return self.candidate.at + wait

    @property
    def was_there(self) -> bool:
        """Whether the question is about the time before the candidate."""
        rule = self.candidate.rule
        return rule.when is When.LEAVES and rule.confirm is None

    def within(self, until: Fraction) -> tuple[float, float]:
        """[start, stop) that the model is shown in this look."""
        one = self.candidate
        if self.was_there:
            since = one.since if one.since is not None else max(Fraction(0), one.at - LEFT_SECONDS)
            # First its coming, which shows it best, then all of its stay.
            start, stop = since - BEFORE_SECONDS, one.at if self.tries else min(one.at, since + LOOKS[-1])
        else:
            gone = one.rule.when in (When.LEAVES, When.ABSENT)
            start, stop = one.at if gone else one.start - BEFORE_SECONDS, min(until, self.due)
        start = max(Fraction(0), start)
        return float(start), float(max(start + Fraction(1, 2), stop))


class Sentry:
    """Watches one stream for its rules: every picture by the triggers, every candidate by the model.

    ::

        candidate at 10.0   |--1 s--> asked about [9, 11)   yes: found
                                       no:  |--2 s--> asked about [9, 13)   yes: found, no: refused

    Of what leaves, the model is asked whether it had been there, because the memory of the moment it left still
    shows it; what is absent is looked for after the candidate only.  The model is asked at most
    ``looks_a_minute`` times a minute of the stream, what matters most first; a candidate that waits too long
    is given up, counted and said.  A rule that asks nothing is found by its trigger alone.

    Args:
        rules: with different names.
        embedder: whose keys come with what is watched; None where there is none.
        ask: the model.
        found: told of every candidate once it is decided, also of refused ones.
        say: told, in one line, what is given up.
        looks_a_minute: >= 1.  Larger asks about more and takes more of the model's time.
        prepared: triggers made before, one a rule.

    Raises:
        SettingsError: if a rule needs an embedder and there is none, two rules have one name, or the number of looks
            is below 1.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        embedder: Embedder | None,
        *,
        ask: Ask,
        found: Callable[[Finding], None],
        say: Callable[[str], None] = lambda text: None,
        looks_a_minute: int = 20,
    ) -> None:
        if looks_a_minute < 1:
            raise SettingsError(f"looks_a_minute must be at least 1, got {looks_a_minute}; confirm = '' asks nothing")
        names = [rule.name for rule in rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingsError(f"two rules are called {twice[0]!r}; give each its own name")
        self.counts = Counts()
        self.looks_a_minute = looks_a_minute
        self._embedder, self._ask, self._found, self._say = embedder, ask, found, say
        self._triggers = {rule.name: Trigger(rule, embedder) for rule in rules}
        self._waiting: list[_Look] = []
        self._asked: deque[Fraction] = deque()

    @property
    def waiting(self) -> int:
        """Candidates that are not decided."""
        return len(self._waiting)

    @property
    def since(self) -> Fraction | None:
        """When the oldest candidate that is not decided began; None if there is none."""
        return min((look.candidate.start for look in self._waiting), default=None)

    def watch(self, watched: Watched) -> None:
        """Show the triggers a clip; the model is not asked here, see `look`."""
        embedded = watched.keys.shape[1] > 0
        shares = watched.changed.tolist()
        for (start, stop), key, share in zip(watched.times, watched.keys, shares, strict=True):
            for name, trigger in list(self._triggers.items()):
                if trigger.last is not None and start <= trigger.last:
                    # What was stored is older than the saved state, as after a power cut.
                    trigger = self._triggers[name] = Trigger(trigger.rule, self._embedder)
                candidate = trigger.update(at=start, key=key if embedded and share > 0 else None, kept=min(share, 1.0))
                self._lasts(trigger, stop)
                if candidate is not None:
                    self._take(candidate, stop)

    def look(self, until: Fraction, now: Fraction, *, last: bool = False) -> bool:
        """Ask the model about the candidate that is next in its turn; False if none is.

        Args:
            until: what the memory holds ends here.
            now: the present of the stream, >= until.
            last: nothing more will come: ask about what there is.
        """
        self._give_up(now)
        ready = [x for x in self._waiting if last or until >= x.due or now >= x.due + OVERDUE_SECONDS]
        if not ready:
            return False
        while self._asked and self._asked[0] <= now - _MINUTE:
            self._asked.popleft()
        if len(self._asked) >= self.looks_a_minute:
            if last:
                for one in ready:
                    self._drop(one)
            return False
        look = min(ready, key=lambda x: (-x.candidate.rule.priority, x.due))
        self._asked.append(now)
        self._look(look, until, last)
        return True

    def state(self) -> dict[str, Any]:
        """What it must know after a restart, for JSON; bounded."""
        return {
            "version": _STATE,
            "triggers": {name: trigger.state() for name, trigger in self._triggers.items()},
            "waiting": [
                {
                    "rule": x.candidate.rule.name,
                    "times": [str(x.candidate.start), str(x.candidate.at), str(x.seen)],
                    "score": x.candidate.score,
                    "reason": x.candidate.reason,
                    "since": None if x.candidate.since is None else str(x.candidate.since),
                    "tries": x.tries,
                    "said": x.said,
                }
                for x in self._waiting
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped; rules that were changed since begin anew, which is said.

        Raises:
            SettingsError: if the state is of another version.
        """
        if state.get("version") != _STATE:
            raise SettingsError(f"the saved state of the rules has version {state.get('version')}; they begin anew")
        for name, trigger in self._triggers.items():
            if name in state["triggers"]:
                try:
                    trigger.restore(state["triggers"][name])
                except SettingsError:
                    self._say(f"rule {name!r} was changed since it was last watched; it begins anew")
        for row in state["waiting"]:
            if row["rule"] in self._triggers:
                start, at, seen = (Fraction(time) for time in row["times"])
                rule = self._triggers[row["rule"]].rule
                since = None if row["since"] is None else Fraction(row["since"])
                candidate = Candidate(rule, start, at, row["score"], row["reason"], since)
                self._waiting.append(_Look(candidate, seen, row["tries"], list(row["said"])))

    def _take(self, candidate: Candidate, stop: Fraction) -> None:
        self.counts.candidates += 1
        look = _Look(candidate, stop)
        if not candidate.rule.question:
            self._decide(look, None)
            return
        self._waiting.append(look)
        if len(self._waiting) > WAITING:
            self._drop(min(self._waiting, key=lambda x: (x.candidate.rule.priority, x.candidate.at)))

    def _lasts(self, trigger: Trigger, stop: Fraction) -> None:
        for look in self._waiting:
            if look.candidate.rule.name == trigger.rule.name and trigger.present is _wanted(trigger.rule):
                look.seen = max(look.seen, stop)

    def _look(self, look: _Look, until: Fraction, last: bool) -> None:
        rule = look.candidate.rule
        self.counts.looks += 1
        try:
            text = self._ask(rule.question, look.within(until)).strip()
        except StreamvidError as reason:
            # Nobody knows: better an alert too many.
            reason_line = " ".join(str(reason).split())
            look.candidate = replace(
                look.candidate, reason=f"{look.candidate.reason}; the model could not be asked: {reason_line}"
            )
            self._waiting.remove(look)
            self._decide(look, None)
            return
        look.said.append(text)
        said = _SAID.match(text)
        if said is not None and (said[1].lower() == "yes") is (rule.expected or look.was_there):
            self._waiting.remove(look)
            self._decide(look, True)
            return
        look.tries += 1
        if look.tries == len(LOOKS) or (last and until < look.due):
            self._waiting.remove(look)
            self._decide(look, False)

    def _decide(self, look: _Look, confirmed: bool | None) -> None:
        candidate = look.candidate
        if confirmed is not None:
            self._triggers[candidate.rule.name].judge(candidate, confirmed=confirmed)
            self.counts.confirmed += confirmed
            self.counts.refused += not confirmed
        self._found(
            Finding(
                candidate.rule, candidate.start, candidate.at, look.seen, candidate.score, candidate.reason,
                confirmed, look.said[-1] if look.said else "",
            )
        )  # fmt: skip

    def _give_up(self, now: Fraction) -> None:
        if len(self._asked) >= self.looks_a_minute:
            for look in [x for x in self._waiting if now - x.due > PATIENCE_SECONDS]:
                self._drop(look)

    def _drop(self, look: _Look) -> None:
        self._waiting.remove(look)
        self.counts.given_up += 1
        self._say(
            f"{look.candidate.rule.name!r} at {float(look.candidate.at):.1f} s was not looked at: more candidates than "
            f"{self.looks_a_minute} looks a minute serve ({self.counts.given_up} so far); lower its sensitivity or "
            "raise looks_a_minute"
        )


def _wanted(rule: Rule) -> bool:
    """What the trigger shows while the event lasts."""
    return rule.when not in (When.LEAVES, When.ABSENT)
