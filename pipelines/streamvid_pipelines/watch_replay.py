"""Standing questions rehearsed on recordings: the same engine and rules as live, as fast as they decode."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from streamvid.ingest.files import label
from streamvid.watch.rules import Rule, read_rules
from streamvid.watch.truth import Known, Verdict, expected, match
from streamvid_pipelines.ask import Loaded
from streamvid_pipelines.live.engine import Live, Said
from streamvid_pipelines.live.feed import Overload
from streamvid_pipelines.live.guard import Guard
from streamvid_pipelines.live.sentry import Counts, Finding
from streamvid_pipelines.live.settings import CameraRequest, LiveRequest

STREAM = "recording"


@dataclass(frozen=True, slots=True)
class Judged:
    """One rule over one recording against what is known."""

    verdict: Verdict
    refused: tuple[Known, ...]
    """Missed events that the trigger named and the model refused."""


@dataclass(slots=True)
class Replayed:
    """What the rules found in one recording."""

    recording: str
    findings: list[Finding] = field(default_factory=list)
    """Every decided candidate in order of time; what the model refused is no hit."""

    counts: Counts = field(default_factory=Counts)
    stop: Fraction = Fraction(0)
    """Up to where it was watched, in seconds."""

    seconds: float = 0.0
    """That it took."""

    notes: list[str] = field(default_factory=list)
    judged: dict[str, Judged] = field(default_factory=dict)
    """By the name of the rule, where the truth is known."""

    @property
    def hits(self) -> list[Finding]:
        """What would have been an alert."""
        return [finding for finding in self.findings if finding.confirmed is not False]

    @property
    def refused(self) -> list[Finding]:
        """What the trigger named and the model did not confirm."""
        return [finding for finding in self.findings if finding.confirmed is False]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "recording": self.recording,
            "watched_seconds": float(self.stop),
            "took_seconds": round(self.seconds, 2),
            "hits": [_told(finding) for finding in self.hits],
            "refused": [_told(finding) for finding in self.refused],
            "not_looked_at": self.counts.given_up,
            "looks": self.counts.looks,
            "notes": self.notes,
            "truth": {name: _verdict(judged) for name, judged in self.judged.items()},
        }


def rules_of(text: str) -> tuple[Rule, ...]:
    """A TOML file with rules, else a sentence.

    Raises:
        SettingsError: if the file cannot be read or the sentence is none.
    """
    if text.endswith(".toml"):
        return read_rules(text)
    return (Rule.parse(text),)


def replay(
    rules: Sequence[Rule],
    recording: str,
    request: LiveRequest,
    loaded: Loaded,
    *,
    truth: Sequence[Known] | None = None,
    tolerance: Fraction = Fraction(1),
    on_found: Callable[[Finding], None] = lambda finding: None,
    on_clip: Callable[[Fraction], None] = lambda until: None,
) -> Replayed:
    """Watch a recording for rules; nothing is delivered, and nothing stays behind.

    Args:
        rules: with different names.
        recording: a file or an address that ends.
        request: how it is watched; frames are never dropped, and its memory is not used.
        loaded: the model.
        truth: what is known to happen in it; None: nothing is judged.
        tolerance: seconds a hit may lie beside its event, >= 0.
        on_found: told of each decided candidate as it comes.
        on_clip: told how far the watching is, in seconds.

    Raises:
        SettingsError: if a rule cannot be watched for, or the truth does not name it.
        SourceError: if the recording cannot be read.
    """
    known = {rule.name: expected(truth, rule) for rule in rules} if truth is not None else {}
    result = Replayed(label(recording))
    began = time.perf_counter()

    def found(stream: str, finding: Finding) -> None:
        result.findings.append(finding)
        on_found(finding)

    def said(what: Said) -> None:
        if what.kind not in ("connected", "alive"):
            result.notes.append(what.text)

    with tempfile.TemporaryDirectory(prefix="streamvid-replay-") as folder:
        own = replace(request, memory=Path(folder), overload=Overload.ALL.value, disk_bytes=None)
        camera = CameraRequest(STREAM, recording, rules=tuple(rules))
        guard = Guard([camera], own, loaded, say=said, found=found, deliver=False)
        hooks = guard.hooks
        watched = hooks["on_watched"]

        def clip_done(camera: Any, clip: Any, seen: Any) -> None:
            watched(camera, clip, seen)
            on_clip(seen.times[-1][1])

        with guard, Live([camera], own, loaded, say=said, **{**hooks, "on_watched": clip_done}) as live:
            with suppress(KeyboardInterrupt):
                live.wait()
            if live.cameras:
                result.stop = live.cameras[0].watched_until or Fraction(0)
        result.counts = guard.posts[STREAM].sentry.counts
    result.findings.sort(key=lambda finding: finding.at)
    result.seconds = time.perf_counter() - began
    for rule in rules:
        if rule.name in known:
            result.judged[rule.name] = _judge(rule, result, known[rule.name], tolerance)
    return result


def _judge(rule: Rule, result: Replayed, known: Sequence[Known], tolerance: Fraction) -> Judged:
    verdict = match([f.at for f in result.hits if f.rule.name == rule.name], known, tolerance=tolerance)
    refused = [f.at for f in result.refused if f.rule.name == rule.name]
    named = match(refused, verdict.missed, tolerance=tolerance)
    return Judged(verdict, tuple(event for _, event in named.matched))


def _told(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule.name,
        "start_seconds": round(float(finding.start), 3),
        "at_seconds": round(float(finding.at), 3),
        "stop_seconds": round(float(finding.stop), 3),
        "score": round(finding.score, 3),
        "reason": finding.reason,
        "confirmed": finding.confirmed,
        "answer": finding.answer,
    }


def _verdict(judged: Judged) -> dict[str, Any]:
    verdict = judged.verdict

    def spans(events: Sequence[Known]) -> list[list[float]]:
        return [[float(event.start), float(event.stop)] for event in events]

    return {
        "precision": None if math.isnan(verdict.precision) else round(verdict.precision, 4),
        "recall": None if math.isnan(verdict.recall) else round(verdict.recall, 4),
        "found": len(verdict.matched),
        "missed": spans(verdict.missed),
        "missed_because_the_model_refused": spans(judged.refused),
        "false": [float(at) for at in verdict.false],
    }
