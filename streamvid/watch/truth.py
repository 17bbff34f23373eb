"""Hits against known times: how many of the events were found, how many of the hits are true.

Knows times and names; runs no rule.
"""

from __future__ import annotations

import bisect
import csv
import heapq
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from streamvid.errors import SettingsError
from streamvid.watch.rules import Rule, When

_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Known:
    """Something that is known to happen during ``[start, stop]``, in seconds."""

    start: Fraction
    stop: Fraction
    what: str = ""

    def __post_init__(self) -> None:
        if self.stop < self.start:
            raise ValueError(f"stop must not be before start, got {float(self.start)} to {float(self.stop)}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out: pairs, what was missed, and what was false."""

    matched: tuple[tuple[Fraction, Known], ...]
    missed: tuple[Known, ...]
    false: tuple[Fraction, ...]
    """Hits that fit no event, and hits beyond the first of one event."""

    @property
    def precision(self) -> float:
        """Share of hits that are true, 0..1; nan without hits."""
        hits = len(self.matched) + len(self.false)
        return len(self.matched) / hits if hits else math.nan

    @property
    def recall(self) -> float:
        """Share of events that were hit, 0..1; nan without events."""
        events = len(self.matched) + len(self.missed)
        return len(self.matched) / events if events else math.nan

    @property
    def delays_seconds(self) -> tuple[float, ...]:
        """From the beginning of each matched event to its hit; negative where the hit came early."""
        return tuple(float(hit - known.start) for hit, known in self.matched)


def match(hits: Sequence[Fraction], known: Sequence[Known], *, tolerance: Fraction = Fraction(1)) -> Verdict:
    """Pair hits with events, each once, so that as many as can be are paired.

    A hit fits an event if it lies in ``[start - tolerance, stop + tolerance]``.

    Args:
        hits: times in seconds, in any order.
        known: events, in any order; they may overlap.
        tolerance: seconds, >= 0.  Larger forgives later hits.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0 seconds, got {float(tolerance)}")
    waiting = sorted(known, key=lambda event: event.start)
    # Of the open events the one that closes first takes the hit: no pairing has more pairs.
    place, opened = 0, list[tuple[Fraction, int]]()
    pairs, false, taken = [], [], set[int]()
    for hit in sorted(hits):
        while place < len(waiting) and waiting[place].start - tolerance <= hit:
            heapq.heappush(opened, (waiting[place].stop + tolerance, place))
            place += 1
        while opened and opened[0][0] < hit:
            heapq.heappop(opened)
        if opened:
            index = heapq.heappop(opened)[1]
            taken.add(index)
            pairs.append((hit, waiting[index]))
        else:
            false.append(hit)
    missed = tuple(event for index, event in enumerate(waiting) if index not in taken)
    return Verdict(tuple(pairs), missed, tuple(false))


def expected(known: Sequence[Known], rule: Rule) -> list[Known]:
    """The events a rule must find: those named like it, at the moment it waits for.

    Events without a name count for every rule.  ``leaves`` waits for the end of each.
    ``absent`` cannot be judged by a list of what is there.

    Raises:
        SettingsError: if the rule is ``absent``, or names are given and none is the rule's.
    """
    if rule.when is When.ABSENT:
        raise SettingsError(f"rule {rule.name!r} waits for absence, which no list of events shows; judge it by hand")
    names = {rule.name.casefold(), rule.what.casefold()}
    if rule.when is When.CHANGE:
        found = [edge for event in known for edge in (event.start, event.stop)]
        return [Known(edge, edge) for edge in sorted(set(found))]
    own = [event for event in known if not event.what or event.what.casefold() in names]
    if known and not own:
        others = sorted({event.what for event in known})[:5]
        raise SettingsError(
            f"the truth names no {rule.what!r}, only {', '.join(others)}; name events like the rule, or leave names out"
        )
    return [Known(event.stop, event.stop, event.what) if rule.when is When.LEAVES else event for event in own]


def read_truth(path: str | os.PathLike[str]) -> list[Known]:
    """Known events from a file, in order of time.

    ``.csv`` with a header of ``start,stop,what``; anything else is JSON, one object per line or one
    whole object with ``events``, as toy truth files have.  Times are seconds or ``[h:]mm:ss``; ``stop``
    may be missing (a moment), so may ``what``.

    Raises:
        SettingsError: one line with the line number, if it cannot be read.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingsError(f"cannot read the truth {file}: {error.strerror}; give a .jsonl or .csv file") from None
    except UnicodeDecodeError:
        raise SettingsError(f"the truth {file} is not text; give a .jsonl or .csv file") from None
    rows = _csv_rows(text, file) if file.suffix.lower() == ".csv" else _json_rows(text, file)
    events: list[Known] = []
    for number, row in rows:
        try:
            bisect.insort(events, _known(row), key=lambda event: event.start)
        except (ValueError, ZeroDivisionError) as error:
            raise SettingsError(f"{file} line {number}: {error}; a line has start, stop and what") from None
    return events


def _csv_rows(text: str, file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    if "start" not in (reader.fieldnames or ()):
        raise SettingsError(
            f"{file} must begin with the line start,stop,what; got {', '.join(reader.fieldnames or ())}"
        )
    return [(reader.line_num, row) for row in reader]


def _json_rows(text: str, file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    try:
        whole = json.loads(text)
        if isinstance(whole, dict) and isinstance(whole.get("events"), list):
            return list(enumerate(whole["events"], 1))
    except json.JSONDecodeError:
        pass  # several lines, one object each
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise SettingsError(f"{file} line {number} is not JSON: {error.msg}; one object per line") from None
    return rows


def _known(row: object) -> Known:
    if not isinstance(row, Mapping):
        raise ValueError(f"an object was expected, got {row!r}")
    start = row.get("start", row.get("start_seconds"))
    stop = row.get("stop", row.get("end_seconds"))
    what = row.get("what")
    if what is None and "color" in row and "shape" in row:
        what = f"{row['color']} {row['shape']}"
    first = _seconds(start, "start")
    return Known(first, first if stop in (None, "") else _seconds(stop, "stop"), str(what or "").strip())


def _seconds(value: object, name: str) -> Fraction:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return Fraction(str(value))
    if isinstance(value, str):
        if found := _CLOCK.fullmatch(value.strip()):
            return Fraction(found[1] or 0) * 3600 + Fraction(found[2]) * 60 + Fraction(found[3])
        try:
            return Fraction(value.strip())
        except ValueError:
            pass
    raise ValueError(f"{name} must be seconds or mm:ss, got {value!r}")
