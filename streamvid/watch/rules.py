"""What is watched for: a rule in one line of text, or in a TOML table.

Knows words and settings; sees no picture and delivers nothing.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from streamvid.errors import SettingsError, near


class When(StrEnum):
    """At which moment a rule holds."""

    APPEARS = "appears"
    """It was not there and now is."""

    LEAVES = "leaves"
    """It was there and now is not."""

    PRESENT = "present"
    """It is there; again after each cool-down while it stays."""

    ABSENT = "absent"
    """It is not there; again after each cool-down while it is missing."""

    CHANGE = "change"
    """The picture is not what it was, whatever it shows."""


_ENDINGS = (
    (When.APPEARS, r"(?:appears?|shows? up|comes?(?: in| into view)?|enters?|arrives?)"),
    (When.LEAVES, r"(?:leaves?|disappears?|goes away|exits?|is gone)"),
    (When.PRESENT, r"(?:(?:is|are) (?:there|present|visible)|stays?)"),
    (When.ABSENT, r"(?:(?:is|are) (?:absent|missing|not there|not visible))"),
)
_STARTS = (
    (When.ABSENT, r"(?:there (?:is|are) no|no)"),
    (When.PRESENT, r"(?:there (?:is|are))"),
)
_CHANGE = re.compile(r"(?:any|some|a)? ?(?:thing)? ?chang(?:e|es|ing)(?: happens)?", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:an?|the|any|some)\s+", re.IGNORECASE)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*", re.IGNORECASE)
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NAME_CHARACTERS = 80
_LONGEST = 1e9
"""Seconds; 30 years."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One standing question to a stream: what to look for, when it counts, and what happens then."""

    name: str
    """Tells rules apart in alerts and reports; one line of at most 80 characters."""

    what: str
    """What to look for, without its article, as in "red circle"; empty for ``change``."""

    when: When = When.APPEARS
    """The moment that counts."""

    cool_down_seconds: float = 10.0
    """After an alert the rule is silent for so long, in stream time; >= 0.  Larger gives fewer alerts."""

    hold_seconds: float = 0.0
    """How long a new state must last before it counts, in stream time; >= 0.  Larger forgets short
    flickers, alarms later, and misses what is over sooner."""

    confirm: str | None = None
    """The yes-or-no question a model is asked about each candidate; "" asks none, None asks whether it is there."""

    priority: int = 5
    """0 to 9; higher is delivered first and given up last."""

    stale_after_seconds: float = 3600.0
    """An alert that was not delivered so long after it happened is not delivered any more; > 0."""

    actions: tuple[str, ...] = ()
    """What happens, as in ``jsonl alerts.jsonl``, ``webhook https://...`` or ``command notify {clip}``."""

    unlike: tuple[str, ...] = ()
    """What resembles it and is not it, as in "red square": a picture that fits one of these better is none."""

    sensitivity: float = 0.5
    """0 to 1: higher raises more candidates, true and false."""

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable() or len(self.name) > _NAME_CHARACTERS:
            raise SettingsError(
                f"name of a rule must be one line of 1 to {_NAME_CHARACTERS} characters, got {self.name[:100]!r}; "
                "give it a short one with name = '...'"
            )
        if self.when is not When.CHANGE and not self.what.strip():
            raise SettingsError(f"rule {self.name!r} names nothing to look for; write it like 'a red circle appears'")
        for field, low, high in (
            ("cool_down_seconds", 0.0, _LONGEST),
            ("hold_seconds", 0.0, _LONGEST),
            ("stale_after_seconds", 0.001, _LONGEST),
            ("sensitivity", 0.0, 1.0),
            ("priority", 0, 9),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                bound = f"seconds from {low:g} up" if high == _LONGEST else f"from {low:g} to {high:g}"
                raise SettingsError(f"rule {self.name!r}: {field} must be {bound}, got {value}")

    @classmethod
    def parse(cls, given: str | Mapping[str, Any]) -> Self:
        """A rule from a sentence, or from a table with the keys of a TOML file.

        ``"a red circle appears"``, ``"the dog leaves"``, ``"there is a car"``, ``"no guard"`` and
        ``"anything changes"`` say what and when; any other sentence is taken whole as something
        that appears.  A table has ``what`` (such a sentence, or a name beside ``when``) and any of
        ``name when cool_down hold confirm priority stale_after actions unlike sensitivity``;
        lengths of time are seconds or texts like "90s", "5m", "1h".

        Raises:
            SettingsError: for an empty sentence, an unknown key or a value out of range.
        """
        if isinstance(given, str):
            what, when = _sentence(given)
            return cls(name=_short(given), what=what, when=when)
        return cls._from_table(given)

    @classmethod
    def _from_table(cls, table: Mapping[str, Any]) -> Self:
        known = {_KEYS.get(field.name, field.name): field.name for field in fields(cls)}
        for key in table:
            if key not in known:
                raise SettingsError(f"a rule has no key {key!r}; {near(key, known)}")
        values: dict[str, Any] = {known[key]: value for key, value in table.items()}
        if "when" not in values:
            values["what"], values["when"] = _sentence(_text(values, "what"))
        else:
            values["when"] = _when(values["when"])
            values["what"] = _ARTICLE.sub("", _text(values, "what").strip()) if "what" in values else ""
        spoken = str(table.get("what", "")).strip() or str(values["when"])
        values["name"] = _text(values, "name") if "name" in values else _short(spoken)
        for key, field in known.items():
            if field.endswith("_seconds") and field in values:
                values[field] = parse_duration(values[field], name=key)
            elif field in ("actions", "unlike") and field in values:
                values[field] = _texts(values[field], key)
        for field, kind, wish in (("priority", int, "a whole number"), ("sensitivity", (int, float), "a number")):
            if field in values and (isinstance(values[field], bool) or not isinstance(values[field], kind)):
                raise SettingsError(f"{field} of a rule must be {wish}, got {values[field]!r}")
        if "confirm" in values:
            _text(values, "confirm")
        return cls(**values)

    @property
    def question(self) -> str:
        """What a model is asked about a candidate; empty to ask nothing."""
        if self.confirm is not None:
            return self.confirm
        return "" if self.when is When.CHANGE else f"is there {with_article(self.what)}?"

    @property
    def expected(self) -> bool:
        """The answer to `question` that confirms: yes, except where something is missing.

        Own questions of the user are always meant to be answered with yes.
        """
        return self.confirm is not None or self.when not in (When.LEAVES, When.ABSENT)


_KEYS = {
    "cool_down_seconds": "cool_down",
    "hold_seconds": "hold",
    "stale_after_seconds": "stale_after",
}


def read_rules(path: str | os.PathLike[str]) -> tuple[Rule, ...]:
    """All rules of a TOML file, one ``[[rule]]`` table each, in order.

    Raises:
        SettingsError: if it cannot be read, has no rules, or two of one name.
    """
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise SettingsError(
            f"cannot read {Path(path)}: {error.strerror}; give a TOML file with [[rule]] tables"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{Path(path)} is not TOML: {error}; see the rules in the README") from None
    tables = found.pop("rule", None)
    if found or not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise SettingsError(f"{Path(path)} must hold [[rule]] tables and nothing else; begin each rule with [[rule]]")
    rules = tuple(Rule.parse(table) for table in tables)
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"{Path(path)} has {names.count(name)} rules called {name!r}; give each its own name")
    return rules


def parse_duration(value: object, *, name: str) -> float:
    """Seconds from a number of seconds or a text like "250ms", "90s", "5m", "1h", "1d".

    Raises:
        SettingsError: for anything else.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise SettingsError(f"{name} must be seconds or a text like 90s, 5m or 1h, got {value!r}")
    return float(found[1]) * _UNITS[(found[2] or "s").lower()]


def with_article(name: str) -> str:
    """``a`` or ``an`` before a name; one that begins with an article keeps it."""
    return name if _ARTICLE.match(name) else f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"


def _sentence(text: str) -> tuple[str, When]:
    plain = " ".join(text.split()).rstrip(".!?")
    if not plain:
        raise SettingsError("a rule needs a sentence, got an empty one; write it like 'a red circle appears'")
    if _CHANGE.fullmatch(plain):
        return "", When.CHANGE
    what, when = plain, When.APPEARS
    for kind, start in _STARTS:
        if found := re.match(rf"{start}\s+", plain, re.IGNORECASE):
            what, when = plain[found.end() :], kind
            break
    else:
        for kind, ending in _ENDINGS:
            if found := re.search(rf"\s+{ending}$", plain, re.IGNORECASE):
                what, when = plain[: found.start()], kind
                break
    return _ARTICLE.sub("", what), when


def _when(value: object) -> When:
    name = str(value).strip().lower()
    if name in ("any change", "changes"):
        name = When.CHANGE.value
    known = [when.value for when in When]
    if name not in known:
        raise SettingsError(f"when must be one of {', '.join(known)}, got {value!r}; {near(name, known)}")
    return When(name)


def _text(values: Mapping[str, Any], field: str) -> str:
    value = values.get(field, "")
    if not isinstance(value, str):
        raise SettingsError(f"{field} of a rule must be text, got {value!r}; put it in quotes")
    return value


def _texts(value: object, key: str) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(item, str) for item in found):
        raise SettingsError(f"{key} of a rule must be texts, got {value!r}; write {key} = ['...', '...']")
    return tuple(found)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _NAME_CHARACTERS else line[: _NAME_CHARACTERS - 3] + "..."
