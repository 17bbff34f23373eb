"""The cheap first look: does this picture make a rule worth asking about?

Knows vectors, a rule and its own past; knows no model that answers and no queue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from streamvid.errors import SettingsError
from streamvid.watch.rules import Rule, When
from streamvid.watch.texts import PROMPTS, Texts

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

_PRIOR = 12
"""Pictures that the texts' own spread weighs as much as, before the stream has shown its own."""
_STATE = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A moment at which a rule may hold; a model should look before anybody is woken."""

    rule: Rule
    start: Fraction
    """When it began, in seconds of the stream."""

    at: Fraction
    """The picture that decided, >= start."""

    score: float
    """How far above the bar, in spreads; higher is surer, 0 is the bar itself."""

    reason: str
    """Why, in one line."""

    since: Fraction | None = None
    """Of what leaves: when it had come, if that was seen."""


class Running:
    """Mean and spread of what a stream shows lately, in constant space.

    Every value weighs as much as the others until ``memory_seconds`` have passed; after
    that old ones fade.

    Args:
        memory_seconds: how far back it looks, > 0.  Larger is steadier and adapts later.
    """

    def __init__(self, memory_seconds: float) -> None:
        self.memory_seconds = memory_seconds
        self.weight = 0.0
        self.mean = 0.0
        self.variance = 0.0

    def start(self, mean: float, spread: float, weight: float) -> None:
        """Begin from an assumption that weighs like so many values."""
        self.mean, self.variance, self.weight = mean, spread * spread, weight

    def add(self, value: float, seconds: float) -> None:
        """Take in one value, so many seconds after the one before."""
        self.weight += 1
        share = max(1 / self.weight, 1 - math.exp(-seconds / self.memory_seconds))
        gap = value - self.mean
        self.mean += share * gap
        self.variance = (1 - share) * (self.variance + share * gap * gap)

    @property
    def spread(self) -> float:
        """Standard deviation."""
        return math.sqrt(max(self.variance, 0.0))


class Trigger:
    """Watches one stream for one rule, picture by picture, and names the moments worth asking about.

    The similarity of a picture to the rule's text is judged against two things.  First the stream
    itself: its running mean and spread, so that a stream which always resembles the text sets a
    higher bar.  The spread is never taken for less than that among other texts on the same
    picture, so that a still stream does not alarm on nothing.  Second the texts the picture may
    fit better: the same with other colours, and the rule's ``unlike``.  A picture must pass both.
    Between two bars, one to come in and a lower one to go out, the state stays what it is.

    The first picture decides the state without an alarm.  Nothing later is looked at, and the
    state is a few numbers, however long the stream is.

    ``change`` needs no text: it compares a picture's vector with their running mean, and the share
    of changed cells with its own, and takes the clearer of the two.

    Args:
        rule: what to look for.
        embedder: whose vectors ``update`` gets; makes the vectors of the texts.  None only for ``change``.
        prompts: texts around the thing; see `streamvid.watch.texts.PROMPTS`.
        memory_seconds: how far back "usual" looks, > 0.  Something that stays becomes usual after about so long.

    Raises:
        SettingsError: if ``embedder`` is None and the rule needs texts.
    """

    HIGHEST, LOWEST = 2.0, 0.8
    """The bar above usual in spreads, at sensitivity 0 and 1; still lower, and the way out is never found."""
    GAP = 0.4
    """The way out lies so many spreads below the way in."""
    SLACK = 0.4
    """A picture may fit another text better by so many spreads: neighbours differ less than noise."""
    BETTER = 0.5
    """A candidate that was refused comes again once it fits better by so many spreads."""
    REFUSED_SECONDS = 2.0
    CHANGE_HIGHEST, CHANGE_LOWEST = 8.0, 2.0

    def __init__(
        self,
        rule: Rule,
        embedder: Embedder | None,
        *,
        prompts: Sequence[str] = PROMPTS,
        memory_seconds: float = 600.0,
    ) -> None:
        if memory_seconds <= 0:
            raise ValueError(f"memory_seconds must be above 0, got {memory_seconds}")
        if embedder is None and rule.when is not When.CHANGE:
            raise SettingsError(
                f"rule {rule.name!r} needs an image-text encoder to look for {rule.what!r} and there is none; "
                "see `streamvid doctor`, or watch for any change"
            )
        self.rule = rule
        self._usual = Running(memory_seconds)
        self._width = Running(memory_seconds)
        self._cells = Running(memory_seconds)
        self._texts: Texts | None = None
        if embedder is not None and rule.when is not When.CHANGE:
            self._texts = Texts.of(rule.what, embedder, unlike=rule.unlike, prompts=prompts)
        self._mean: Tensor | None = None
        self._inside: bool | None = None
        self._turned: Fraction | None = None
        self._entered: Fraction | None = None
        self._pending = False
        self._last: Fraction | None = None
        self._quiet: Fraction | None = None
        self._refused: float | None = None
        self.suppressed = 0
        """Moments that held and were not named because of the cool-down."""

    @property
    def present(self) -> bool | None:
        """Whether what is looked for is there now; None before the first picture."""
        return self._inside

    @property
    def last(self) -> Fraction | None:
        """Time of the latest picture; None before the first."""
        return self._last

    def update(self, *, at: Fraction, key: Tensor | None, kept: float = 1.0) -> Candidate | None:
        """Look at one more picture.

        Args:
            at: its time in seconds, later than the one before.
            key: (Dk,) float, unit length; None if the picture was not embedded because it did not
                change: everything stays as it was and only time goes on.
            kept: share of its cells that changed since the picture before, 0..1.

        Raises:
            ValueError: for a time that does not rise, a share outside 0..1 or a key of another shape.
        """
        if self._last is not None and at <= self._last:
            raise ValueError(
                f"times must rise, got {float(at)} after {float(self._last)}; start a new Trigger per stream"
            )
        if not 0 <= kept <= 1:
            raise ValueError(f"kept must be in 0..1, got {kept}")
        seconds = float(at - self._last) if self._last is not None else 0.0
        self._last = at
        if self.rule.when is When.CHANGE:
            score, reason = self._change(key, kept, seconds)
        elif key is not None:
            score, reason = self._similar(key, kept, seconds)
        else:
            score, reason = 0.0, "the picture stayed the same"
        if key is not None or self.rule.when is When.CHANGE:
            self._turn(at, score)
        return self._decide(at, score, reason)

    def judge(self, candidate: Candidate, *, confirmed: bool) -> None:
        """Hear what the model said of a candidate; without it every candidate counts as confirmed.

        After a refusal the cool-down ends after at most two seconds, so that a false candidate
        does not hide a true one; and while the same thing stays, it is named once more if it
        comes to fit clearly better.
        """
        if confirmed:
            self._refused = None
            return
        quiet = candidate.at + Fraction(min(self.rule.cool_down_seconds, self.REFUSED_SECONDS))
        self._quiet = quiet if self._quiet is None else min(self._quiet, quiet)
        self._refused = candidate.score

    def state(self) -> dict[str, Any]:
        """Everything it remembers, for JSON; its size does not grow with the stream."""
        return {
            "version": _STATE,
            "rule": [self.rule.what, self.rule.when.value],
            "running": [[r.mean, r.variance, r.weight] for r in (self._usual, self._width, self._cells)],
            "mean": self._mean.tolist() if self._mean is not None else None,
            "inside": self._inside,
            "pending": self._pending,
            "refused": self._refused,
            "suppressed": self.suppressed,
            "times": [None if t is None else str(t) for t in self._times()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another one with the same rule stopped.

        Raises:
            SettingsError: if the state is of another rule or version.
        """
        if state.get("version") != _STATE or state.get("rule") != [self.rule.what, self.rule.when.value]:
            raise SettingsError(
                f"the saved state is not of rule {self.rule.name!r}: {state.get('rule')}; start it anew"
            )
        for running, (mean, variance, weight) in zip(
            (self._usual, self._width, self._cells), state["running"], strict=True
        ):
            running.mean, running.variance, running.weight = mean, variance, weight
        self._mean = torch.tensor(state["mean"]) if state["mean"] is not None else None
        self._inside, self._pending, self.suppressed = state["inside"], state["pending"], state["suppressed"]
        self._refused = state["refused"]
        times = [None if t is None else Fraction(t) for t in state["times"]]
        self._turned, self._last, self._quiet, self._entered = times

    def _times(self) -> tuple[Fraction | None, ...]:
        return self._turned, self._last, self._quiet, self._entered

    def _similar(self, key: Tensor, kept: float, seconds: float) -> tuple[float, str]:
        assert self._texts is not None
        fit = self._texts.fit(key)
        if not self._usual.weight:
            self._usual.start(fit.middle, fit.width, _PRIOR)
            self._width.start(fit.width, 0.0, _PRIOR)
        usual, spread = self._usual.mean, max(self._usual.spread, self._width.mean)
        bar = self.HIGHEST + (self.LOWEST - self.HIGHEST) * self.rule.sensitivity
        score = min((fit.own - usual) / spread - bar, (fit.own - fit.rival) / spread + self.SLACK)
        # What is there for long becomes usual, but not from one loud picture.
        self._usual.add(min(fit.own, usual + (bar + self.GAP) * spread), seconds)
        self._width.add(fit.width, seconds)
        against = f"; {fit.name!r} {fit.rival:+.2f}" if fit.name else ""
        return score, (
            f"{self.rule.what!r} fits by {fit.own:+.2f}, usual here {usual:+.2f} (spread {spread:.2f}){against}; "
            f"{kept:.0%} of the cells changed"
        )

    def _change(self, key: Tensor | None, kept: float, seconds: float) -> tuple[float, str]:
        bar = self.CHANGE_HIGHEST + (self.CHANGE_LOWEST - self.CHANGE_HIGHEST) * self.rule.sensitivity
        far = 0.0
        if key is not None:
            vector = key.detach().float().cpu()
            if self._mean is None:
                self._mean = vector.clone()
            far = 1 - float(F.cosine_similarity(vector, self._mean, dim=0))
            self._mean += (vector - self._mean) * (1 - math.exp(-max(seconds, 0.01) / 30))
        found = [(-bar, "nothing moved")]
        for running, value, least, words in (
            (self._usual, far, 0.02, f"the picture differs by {far:.2f} from the last half minute"),
            (self._cells, kept, 0.02, f"{kept:.0%} of the cells changed"),
        ):
            if not running.weight:
                running.start(0.0, least, _PRIOR)
            spread = max(running.spread, least)
            found.append(((value - running.mean) / spread - bar, f"{words}, usual {running.mean:.2f}"))
            running.add(min(value, running.mean + bar * spread), seconds)
        return max(found)

    def _turn(self, at: Fraction, score: float) -> None:
        """Come in at the bar, go out below the gap."""
        inside = score >= (-self.GAP if self._inside else 0.0)
        if inside != self._inside:
            self._pending = self._inside is not None
            if inside:
                self._entered = at if self._inside is not None else None
            self._turned, self._inside, self._refused = at, inside, None
        elif inside and self._refused is not None and score > self._refused + self.BETTER:
            self._pending = True

    def _decide(self, at: Fraction, score: float, reason: str) -> Candidate | None:
        rule, turned = self.rule, self._turned
        if turned is None or at - turned < rule.hold_seconds:
            return None
        if rule.when in (When.PRESENT, When.ABSENT):
            holds = self._inside is (rule.when is When.PRESENT)
        else:
            holds = self._pending and self._inside is (rule.when is not When.LEAVES)
        once, self._pending = self._pending, False
        if not holds:
            return None
        if self._quiet is not None and at < self._quiet:
            self.suppressed += once
            return None
        self._quiet = at + Fraction(rule.cool_down_seconds)
        gone = rule.when in (When.LEAVES, When.ABSENT)
        since = self._entered if rule.when is When.LEAVES else None
        return Candidate(rule, turned, at, -score if gone else score, reason, since)
