"""Which time a question speaks of: English expressions of time as ranges of seconds.

Knows words and, through one function, where a named event is; knows no memory and no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Literal

from streamvid.query.evidence import Clock, merge

Range = tuple[float, float]
"""``[start, stop)`` in seconds."""

Find = Callable[[str], Range | None]
"""Where a named thing is first seen, as one stretch; None if it is not clearly anywhere."""

EDGE_SHARE, EDGE_SECONDS = 0.1, 5.0
"""The beginning and the end of a video: this share of it, at least so many seconds."""

AROUND_SHARE, AROUND_SECONDS, AROUND_MOST = 0.1, 5.0, 60.0
""""Around" a time: this share of it to either side, within these limits."""

NOW_SECONDS = 10.0
"""Of a live source, "now" is so many seconds back."""

AGO_SHARE, AGO_SECONDS, AGO_MOST = 0.1, 5.0, 300.0
"""Some time "ago": this share of it to either side, within these limits."""

AT_SECONDS = 1.0
""""At" a time: so many seconds to either side."""


@dataclass(frozen=True, slots=True)
class When:
    """What was understood of the time in a question."""

    ranges: tuple[Range, ...] = ()
    """Sorted, apart from each other, within the video unless the question leaves it; empty: no time was named."""

    words: tuple[str, ...] = ()
    """The expressions, as they stand in the question."""

    notes: tuple[str, ...] = ()
    """How an expression was read that could have been read otherwise, and where an event was found."""

    unused: tuple[str, ...] = ()
    """What was seen and could not be used, and why."""

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def without(self, question: str) -> str:
        """The question less its time expressions, for searching pictures: they cannot show a time."""
        for words in self.words if self.ranges else ():
            question = question.replace(words, " ", 1)
        rest = " ".join(question.split()).strip(" ,?.!")
        return f"{rest}?" if rest else ""

    def put(self, question: str) -> str:
        """The question as a model understands it that is shown the time in question and knows no clock.

        An event stays named: "after the dog leaves" speaks of what can be seen.
        """
        plain = tuple(words for words in self.words if not _EVENT.fullmatch(words))
        return replace(self, words=plain).without(question) or question

    def describe(self, tell: Clock | None = None) -> str:
        """``00:10-00:15, 01:00-02:00``."""
        tell = Clock() if tell is None else tell
        return ", ".join(tell.span(start, stop) for start, stop in self.ranges)


_UNIT = r"(?:seconds?|secs?|s|minutes?|mins?|min|m|hours?|hrs?|h)"
_CLOCK = r"(?:\d{1,3}:\d{2}(?::\d{2})?(?:\.\d+)?)(?:\s*[ap]\.?m\b\.?)?"
_SPOKEN = rf"(?:\d+(?:\.\d+)?\s*{_UNIT}\b(?:\s*(?:and\s*)?\d+(?:\.\d+)?\s*{_UNIT}\b)*)"
_TIME = rf"(?:(?:the\s+)?(?:{_CLOCK}|{_SPOKEN})(?:\s+mark\b)?)"
_NUMBER = r"(?P<number>\d+(?:\.\d+)?|one|two|three|four|five|ten|fifteen|twenty|thirty|few)"
_LENGTH = rf"(?:(?:{_NUMBER}\s+)?(?P<unit>{_UNIT}|half|third|quarter)\b)"
_NOUN = r"(?:video|clip|film|movie|recording|footage|stream|tape|scene|timeline)"
_WHOLE = rf"(?:\s+of\s+(?:the|this)\s+{_NOUN}\b)"
_ELSE = r"(?!\s+(?:of|to|for|from)\b)"
"""After "the end": of a street or of a game is not of the video."""

_BETWEEN = re.compile(rf"\bbetween\s+(?P<a>{_TIME}|\d+(?:\.\d+)?)\s+and\s+(?P<b>{_TIME})", re.I)
_FROM = re.compile(rf"\bfrom\s+(?P<a>{_TIME}|\d+(?:\.\d+)?)\s*(?:to|until|till|through|-|–)\s*(?P<b>{_TIME})", re.I)
_DASH = re.compile(rf"(?<![\w:.])(?P<a>{_CLOCK})\s*(?:-|–|to)\s*(?P<b>{_CLOCK})(?![\w:])", re.I)
_AROUND = re.compile(
    rf"\b(?:around|about|near|roughly)\s+(?P<a>{_TIME})(?!\s*(?:long|of|ago|apart|later|earlier)\b)", re.I
)
_AT = re.compile(rf"\bat\s+(?:exactly\s+|about\s+|around\s+)?(?P<a>{_TIME})(?!\s+(?:intervals?|of)\b)", re.I)
_EDGE = re.compile(
    rf"\b(?:in|during|within|over|of|for)\s+the\s+(?P<side>first|last|past|final|opening|closing)\s+{_LENGTH}(?:{_WHOLE}|{_ELSE})",
    re.I,
)
_AGO = re.compile(rf"\b(?:about\s+|around\s+)?(?:an?\s+(?P<one>{_UNIT})|{_NUMBER}\s+(?P<unit>{_UNIT}))\s+ago\b", re.I)
_NOW = re.compile(
    r"(?<!until )(?<!till )(?<!by )(?<!to )(?<!from )(?<!before )\b"
    r"(?:right\s+now|just\s+now|currently|at\s+the\s+moment|at\s+present|now(?=\s*[?.!]?\s*$))\b",
    re.I,
)
_DAY = re.compile(
    r"\b(?:(?P<day>today|yesterday)(?:\s+(?P<part>morning|afternoon|evening|night))?|"
    r"this\s+(?P<this>morning|afternoon|evening)|(?P<last>last\s+night)|tonight)\b",
    re.I,
)
_PARTS_OF_DAY = {"morning": (5, 12), "afternoon": (12, 18), "evening": (18, 24), "night": (20, 24)}
"""Hours of a day, from and until."""

_BEGIN = re.compile(rf"\b(?:in|at|near)\s+the\s+(?:very\s+)?(?:beginning|start)\b(?:{_WHOLE}|{_ELSE})", re.I)
_END = re.compile(rf"\b(?:at|near|towards?)\s+the\s+(?:very\s+)?end\b(?:{_WHOLE}|{_ELSE})", re.I)
_MIDDLE = re.compile(rf"\bin\s+the\s+middle\b(?:{_WHOLE}|(?=\s*[?.,!]?\s*$))", re.I)
_SIDE = re.compile(
    rf"\b(?P<side>after|since|past|before|until|till|up to)\s+(?P<a>{_TIME})"
    r"(?!\s+(?:of|long|later|earlier|passed|pass)\b)",
    re.I,
)
_STARTS = (
    r"appears?|appeared|arrives?|arrived|comes?(?:\s+(?:in|into\s+view|up|out))?|came(?:\s+in)?|enters?|entered|"
    r"shows?\s+up|showed\s+up|starts?|started|begins?|began|is\s+(?:first\s+)?(?:seen|visible|shown)"
)
_STOPS = (
    r"leaves?|left|disappears?|disappeared|vanish(?:es|ed)?|goes(?:\s+(?:away|out))?|went\s+(?:away|out)|exits?|exited|"
    r"ends?|ended|stops?|stopped|is\s+gone|finish(?:es|ed)?"
)
_EVENT = re.compile(
    rf"\b(?P<side>before|until|after|since)\s+(?P<name>(?:the|a|an|my|our|this|that)\s+[\w' -]{{2,60}}?)\s+"
    rf"(?:(?P<starts>{_STARTS})|(?P<stops>{_STOPS}))\b",
    re.I,
)
_NUMBERS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "few": 3,
    "four": 4,
    "five": 5,
    "ten": 10,
    "fifteen": 15,
    "twenty": 20,
    "thirty": 30,
}
_PARTS = {"half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4}


def understand(
    question: str, *, start: float, stop: float, origin: datetime | None = None, find: Find | None = None
) -> When:
    """Read the time expressions of a question.

    ::

        between 10:00 and 10:15 · from 1:30 to 2:00 · 1:30-2:00      that range
        at 12:34 · around 2 minutes                                  a second, or a tenth, to either side
        in the first minute · in the last 30 seconds · first half    from the edge inwards
        in the beginning · at the end                                a tenth of the video
        after 5:00 · before 1:00:00                                  one side of it
        before the red circle appears · after the dog leaves         one side of an event, with the event
        right now · ten minutes ago · today · yesterday morning      of a live source only: from now backwards

    Rules: ranges, times and edges are united; "after" and "before" then cut that down.  ``10:00`` is minutes
    and seconds; of a video of ten hours or more, where hours and minutes would fit too, a note says so; in
    ``1:00:00-1:30`` the second time is of the first one's kind.  Of a live source with an ``origin``,
    ``14:05`` is the time on the wall, the latest such moment that is not still to come, if it was watched, and
    minutes and seconds if not; ``2:05 pm`` is always the time on the wall; a day named beside it says which.
    An event is looked for only if the question says that it appears or leaves: "what comes after the
    circle?" asks about an order of things and must see the circle.

    Args:
        question: the user's words.
        start: seconds at which what was watched begins.
        stop: seconds at which it ends, > start; of a live source: the present.
        origin: the time on the wall at second 0; None where it is not known.
        find: looks an event up; None leaves events alone.

    Returns:
        What was understood; a question that names no time gives an empty one, which means no filter.
    """
    reader = _Reader(start, stop, origin)
    text = question
    united: list[Range] = []
    sides: list[Range] = []

    def take(pattern: re.Pattern[str], read: Callable[[re.Match[str]], Range | None], out: list[Range]) -> None:
        nonlocal text
        for match in pattern.finditer(text):
            found = read(match)
            if found is None:
                continue
            out.append(found)
            reader.words.append(match.group(0))
        text = pattern.sub(lambda match: " " * len(match.group(0)), text)

    days: list[Range] = []
    if origin is not None:
        take(_AGO, reader.ago, united)
        take(_NOW, lambda match: (max(start, stop - NOW_SECONDS), stop), united)
        take(_DAY, reader.named_day, days)
    for pattern in (_BETWEEN, _FROM, _DASH):
        take(pattern, reader.pair, united)
    take(_AROUND, reader.around, united)
    take(_AT, reader.at, united)
    take(_EDGE, reader.edge, united)
    edge = max(EDGE_SHARE * (stop - start), min(EDGE_SECONDS, stop - start))
    take(_BEGIN, lambda match: (start, start + edge), united)
    take(_END, lambda match: (stop - edge, stop), united)
    take(_MIDDLE, lambda match: (start + (stop - start) / 3, stop - (stop - start) / 3), united)
    take(_SIDE, reader.side, sides)
    if find is not None:
        looked_up = find
        take(_EVENT, lambda match: reader.event(match, looked_up), sides)
    if not united and not sides:
        united = days  # beside a time a day only says which one is meant
    ranges = merge(united) if united else [(float("-inf"), float("inf"))]
    for low, high in sides:
        ranges = [(max(a, low), min(b, high)) for a, b in ranges if max(a, low) < min(b, high)]
    words, notes, unused = tuple(reader.words), tuple(reader.notes), tuple(reader.unused)
    if not words:
        return When(notes=notes, unused=unused)
    if not ranges:
        named = " and ".join(repr(word) for word in words)
        return When(words=words, notes=notes, unused=(*unused, f"{named} exclude each other, so no time was used"))
    whole = tuple((max(a, start), min(b, stop)) for a, b in ranges if max(a, start) < min(b, stop))
    beyond = tuple((max(a, 0.0), b if b < float("inf") else max(stop, a + AT_SECONDS)) for a, b in ranges)
    return When(whole or beyond, words, notes, unused)


class _Reader:
    """Reads one expression after another against the same video, and keeps what it saw."""

    def __init__(self, start: float, stop: float, origin: datetime | None) -> None:
        self.start, self.stop, self.origin = start, stop, origin
        self.day: date | None = None
        """The day that the question names."""
        self.words: list[str] = []
        self.notes: list[str] = []
        self.unused: list[str] = []

    def pair(self, match: re.Match[str]) -> Range | None:
        first, second = match["a"], match["b"]
        if re.fullmatch(r"\d+(?:\.\d+)?", first):
            unit = re.search(rf"{_UNIT}\b", second, re.I)
            if unit is None:
                return None
            first = f"{first} {unit.group(0)}"
        a, b = self.seconds(first), self.seconds(second)
        if a is None or b is None:
            return None
        if first.count(":") == 2 and second.count(":") == 1 and b < a <= b * 60:
            self.notes = [note for note in self.notes if not note.startswith(f"{second} was read")]
            self.notes.append(f"{second} was read as hours and minutes, like {first}")
            b *= 60
        if a > b:
            self.notes.append(f"{match.group(0)!r} ends before it starts and was read the other way round")
            a, b = b, a
        return a, b if b > a else a + AT_SECONDS

    def around(self, match: re.Match[str]) -> Range | None:
        time = self.seconds(match["a"])
        if time is None:
            return None
        reach = min(max(AROUND_SHARE * time, AROUND_SECONDS), AROUND_MOST)
        return max(0.0, time - reach), time + reach

    def at(self, match: re.Match[str]) -> Range | None:
        time = self.seconds(match["a"])
        return None if time is None else (max(0.0, time - AT_SECONDS), time + AT_SECONDS)

    def edge(self, match: re.Match[str]) -> Range | None:
        unit = match["unit"].lower()
        number = match["number"]
        count = 1.0 if number is None else float(_NUMBERS.get(number.lower(), 0) or number)
        length = self.stop - self.start
        span = min(count * (_PARTS[unit] * length if unit in _PARTS else _seconds_of(unit)), length)
        if match["side"].lower() in ("first", "opening"):
            return self.start, self.start + span
        return self.stop - span, self.stop

    def ago(self, match: re.Match[str]) -> Range:
        number, unit = match["number"], match["unit"] or match["one"]
        count = 1.0 if number is None else float(_NUMBERS.get(number.lower(), 0) or number)
        back = count * _seconds_of(unit)
        reach = min(max(AGO_SHARE * back, AGO_SECONDS), AGO_MOST)
        return max(self.start, self.stop - back - reach), self.stop - back + reach

    def named_day(self, match: re.Match[str]) -> Range:
        """A day, or part of it, of the present's calendar; the present is where the video ends."""
        assert self.origin is not None
        now = self.origin + timedelta(seconds=self.stop)
        back = (match["day"] or "").lower() == "yesterday" or match["last"] is not None
        self.day = (now - timedelta(days=1) if back else now).date()
        part = match["part"] or match["this"] or ("night" if match["last"] else None)
        first, last = _PARTS_OF_DAY[part.lower()] if part else (0, 24)
        if match["last"] is not None:
            last = 30  # until six in the morning
        midnight = now.replace(year=self.day.year, month=self.day.month, day=self.day.day, hour=0, minute=0, second=0)
        begin = (midnight.replace(microsecond=0) - self.origin).total_seconds()
        return begin + first * 3600, begin + last * 3600

    def side(self, match: re.Match[str]) -> Range | None:
        time = self.seconds(match["a"])
        if time is None:
            return None
        return _side(match["side"], time, time)

    def event(self, match: re.Match[str], find: Find) -> Range | None:
        name = match["name"]
        found = find(name)
        if found is None:
            self.unused.append(f"{name!r} was not found clearly in memory: {match.group(0)!r} was not used as a time")
            return None
        self.notes.append(f"{name!r} was found at {Clock(self.origin, self.stop).span(*found)}")
        # With the event itself: its picture is what the answer is told from.
        first, last = found
        if match["starts"] and match["side"].lower() in ("before", "until"):
            return _side("before", first, last)
        return _side(match["side"], first, last)

    def seconds(self, text: str) -> float | None:
        """Seconds of one expression; None, with a note, for a time on the wall that cannot be placed."""
        text = re.sub(r"^the\s+|\s+mark$", "", text.strip(), flags=re.I)
        if ":" not in text:
            parts = re.findall(rf"(\d+(?:\.\d+)?)\s*({_UNIT})\b", text, re.I)
            return sum(float(number) * _seconds_of(unit) for number, unit in parts)
        half = re.search(r"([ap])\.?m", text, re.I)
        fields = [float(field) for field in re.findall(r"\d+(?:\.\d+)?", text)]
        wall = self.wall(fields, half.group(1).lower() if half else None)
        if half:
            if wall is None:
                self.unused.append(
                    f"{text!r} is a time on the wall, and it is not known when this was recorded: not used"
                )
            return wall
        if len(fields) == 3:
            plain = fields[0] * 3600 + fields[1] * 60 + fields[2]
        else:
            plain = fields[0] * 60 + fields[1]
            if plain * 60 <= self.stop and plain and not self.origin:
                self.notes.append(f"{text} was read as minutes and seconds; write {text}:00 for hours and minutes")
        if wall is not None and self.start <= wall <= self.stop:
            self.notes.append(f"{text} was read as the time on the wall")
            return wall
        return plain

    def wall(self, fields: Sequence[float], half: Literal["a", "p"] | str | None) -> float | None:
        """Seconds from the origin to the latest such time of day that has been; None without an origin."""
        hour, minute = int(fields[0]), int(fields[1])
        if half is not None and 1 <= hour <= 12:
            hour = hour % 12 + (12 if half == "p" else 0)
        if self.origin is None or hour > 23 or minute > 59:
            return None
        second = fields[2] if len(fields) == 3 else 0.0
        now = self.origin + timedelta(seconds=self.stop)
        moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0) + timedelta(seconds=second)
        if self.day is not None:
            moment = moment.replace(year=self.day.year, month=self.day.month, day=self.day.day)
        elif moment > now:
            moment -= timedelta(days=1)
        return (moment - self.origin).total_seconds()


def _side(word: str, first: float, last: float) -> Range:
    if word.lower() in ("after", "since", "past"):
        return first, float("inf")
    return float("-inf"), last


def _seconds_of(unit: str) -> float:
    return {"s": 1.0, "m": 60.0, "h": 3600.0}[unit[0].lower()]
