"""What HLS and DASH playlists say: versions of a film, their segments and keys.

Reads text; opens nothing by itself.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from streamvid.errors import SourceError
from streamvid.ingest.files import label

_DRM = "is encrypted (DRM); give a source without copy protection"
MOST_SEGMENTS = 200_000
_ATTRIBUTE = re.compile(r'([A-Z0-9-]+)=("[^"]*"|[^",\s][^",]*)')
_IDENTIFIER = re.compile(r"\$(RepresentationID|Number|Time|Bandwidth|)(?:%0(\d{1,2})d)?\$")
_DURATION = re.compile(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?)?")
_TRICKS = "http://dashif.org/guidelines/trickmode"
_DEPTH_SECONDS = 60.0
"""How far back a live DASH playlist is read if it does not say how long it keeps its segments."""


class _Key(NamedTuple):
    address: str
    iv: bytes


class Part(NamedTuple):
    """Some bytes of some address; without a length they go to its end."""

    address: str
    start: int = 0
    length: int | None = None
    key: _Key | None = None


class _Segment(NamedTuple):
    part: Part
    seconds: float
    header: Part | None = None
    """What a decoder must know before it."""


class Version(NamedTuple):
    """One version of a film."""

    segments: list[_Segment]
    sequence: int | None
    """The number of the first segment; None if the playlist gives none that stays."""

    ended: bool
    whole: bool = False
    """The only segment is a file to be opened as such."""

    notes: tuple[str, ...] = ()


class _Offer(NamedTuple):
    """One of several versions of a film; the largest in this order is the best."""

    height: int
    width: int
    bandwidth: int
    what: Any


class Handle(Protocol):
    """An open segment."""

    def read(self, size: int, /) -> bytes | None:
        """At most so many bytes."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to a position."""

    def close(self) -> None:
        """Let go."""


class Home(Protocol):
    """Where a playlist lies, and what it may name from there."""

    def join(self, base: str, reference: str) -> str:
        """The address of what a playlist at ``base`` names; a SourceError if it must not."""

    def text(self, address: str) -> tuple[bytes, str]:
        """A playlist, and the address it really came from."""

    def open(self, part: Part, *, ahead: int) -> Handle:
        """The address of a part as a file."""

    def key(self, address: str) -> bytes:
        """What lies at an address, if that is no longer than a key."""


def choose(offers: list[_Offer], max_height: int | None) -> tuple[_Offer, tuple[str, ...]]:
    """The best version within the limit, and what to say of it."""
    fits = [offer for offer in offers if max_height is None or offer.height <= max_height]
    best = max(fits, key=lambda offer: offer[:3]) if fits else min(offers, key=lambda offer: offer[:3])
    size = f"{best.width}x{best.height}" if best.height else "the one"
    notes = (
        (f"{len(offers)} versions are offered; {size} at {best.bandwidth} bit/s is read",) if len(offers) > 1 else ()
    )
    return best, notes if fits else (*notes, f"no version has at most max_height = {max_height} rows")


class HlsText:
    """RFC 8216, as far as it says where pictures lie: reads one playlist."""

    def __init__(self, base: str, home: Home) -> None:
        self._base = base
        self._home = home
        self._segments: list[_Segment] = []
        self._offers: list[_Offer] = []
        self._sequence = 0
        self._ended = False
        self._breaks = 0
        self._offer: dict[str, str] | None = None
        self._seconds: float | None = None
        self._span: str | None = None
        self._key: dict[str, str] = {}
        self._locked = False
        self._header: Part | None = None

    def read(self, text: str) -> Version | list[_Offer]:
        """One version of a film, or a list of them."""
        for line in map(str.strip, text.splitlines()):
            if line.startswith("#"):
                self._tag(*line.partition(":")[::2])
            elif line and self._offer is not None:
                width, _, height = self._offer.get("RESOLUTION", "0x0").lower().partition("x")
                rate = int(self._offer.get("BANDWIDTH", "0"))
                self._offers.append(_Offer(int(height), int(width), rate, self._home.join(self._base, line)))
                self._offer = None
            elif line and self._seconds is not None:
                self._add(line, self._seconds)
                self._seconds = self._span = None
        times = "times are those stored in the segments"
        notes = (f"the playlist has {self._breaks} breaks (EXT-X-DISCONTINUITY); {times}",) if self._breaks else ()
        return self._offers or Version(self._segments, self._sequence, self._ended, notes=notes)

    def _tag(self, tag: str, value: str) -> None:
        if tag == "#EXT-X-STREAM-INF":
            self._offer = _attributes(value)
        elif tag == "#EXTINF":
            self._seconds = float(value.partition(",")[0])
        elif tag == "#EXT-X-BYTERANGE":
            self._span = value
        elif tag == "#EXT-X-MEDIA-SEQUENCE":
            self._sequence = int(value)
        elif tag == "#EXT-X-ENDLIST" or (tag, value) == ("#EXT-X-PLAYLIST-TYPE", "VOD"):
            self._ended = True
        elif tag == "#EXT-X-DISCONTINUITY":
            self._breaks += bool(self._segments)
        elif tag == "#EXT-X-KEY":
            key = _attributes(value)
            mine = key.get("METHOD") == "AES-128" and key.get("KEYFORMAT", "identity") == "identity"
            free = key.get("METHOD") == "NONE"
            self._key = key if mine else {} if free else self._key
            self._locked = not mine and not free and not self._key
        elif tag == "#EXT-X-MAP":
            header = _attributes(value)
            self._header = self._part(header["URI"], header.get("BYTERANGE"))
        elif tag == "#EXT-X-DEFINE":
            raise SourceError(
                f"{label(self._base)} uses variables (EXT-X-DEFINE), which are not read; give a video file"
            )

    def _add(self, line: str, seconds: float) -> None:
        if self._locked:
            raise SourceError(f"{label(self._base)} {_DRM}")
        self._segments.append(_Segment(self._part(line, self._span), seconds, self._header))

    def _part(self, name: str, span: str | None) -> Part:
        address = self._home.join(self._base, name)
        key = None
        if self._key:
            number = self._sequence + len(self._segments)
            iv = self._key["IV"][2:].zfill(32) if "IV" in self._key else f"{number:032x}"
            key = _Key(self._home.join(self._base, self._key["URI"]), bytes.fromhex(iv))
        if span is None:
            return Part(address, key=key)
        length, _, start = span.partition("@")
        last = self._segments[-1].part if self._segments else None
        follows = last.start + (last.length or 0) if last is not None and last.address == address else 0
        return Part(address, int(start) if start else follows, int(length), key)


def _attributes(text: str) -> dict[str, str]:
    return {name: value.strip('"') for name, value in _ATTRIBUTE.findall(text)}


class DashText:
    """ISO/IEC 23009-1, as far as it says where pictures lie: reads one period of one playlist."""

    def __init__(self, data: bytes, base: str, home: Home) -> None:
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
            raise SourceError(f"{label(base)} defines entities, which playlists do not need; this is refused")
        self._root = ElementTree.fromstring(data)
        for element in self._root.iter():
            element.tag = element.tag.rpartition("}")[2]
        self._where = label(base)
        self._base = base
        self._home = home
        self._live = self._root.get("type") == "dynamic"

    def read(self, max_height: int | None) -> Version:
        """The best version within the limit."""
        period, notes = self._period()
        offers, locked = [], False
        for group in period.findall("AdaptationSet"):
            if any(entry.get("schemeIdUri") == _TRICKS for entry in group.findall("EssentialProperty")):
                continue
            for version in group.findall("Representation"):
                both = {**group.attrib, **version.attrib}
                if not (both.get("mimeType") or both.get("contentType", "")).startswith("video"):
                    continue
                if any(level.find("ContentProtection") is not None for level in (group, version)):
                    locked = True
                    continue
                height, width, rate = (int(both.get(name, "0")) for name in ("height", "width", "bandwidth"))
                offers.append(_Offer(height, width, rate, [self._root, period, group, version]))
        if not offers:
            raise SourceError(f"{self._where} {_DRM if locked else 'names no video; give one that has pictures'}")
        best, said = choose(offers, max_height)
        return self._media(best.what, (*notes, *said))

    def _period(self) -> tuple[Element, tuple[str, ...]]:
        """The longest period, or the last one of a live playlist, and when it starts and how long it lasts."""
        periods = self._root.findall("Period")
        if not periods:
            raise SourceError(f"{self._where} names no period; check the address")
        starts: list[float] = []
        spans: list[float] = []
        for entry in periods:
            starts.append(_seconds(entry.get("start")) or (starts[-1] + spans[-1] if starts else 0.0))
            spans.append(_seconds(entry.get("duration")))
        total = _seconds(self._root.get("mediaPresentationDuration"))
        ends = [*starts[1:], total]
        spans = [span or max(0.0, end - start) for span, start, end in zip(spans, starts, ends, strict=True)]
        place = len(periods) - 1 if self._live else spans.index(max(spans))
        self._start, self._span = starts[place], spans[place]
        which = "last" if self._live else "longest"
        notes = (f"the playlist has {len(periods)} periods; the {which} one is read",) if len(periods) > 1 else ()
        return periods[place], notes

    def _media(self, levels: list[Element], notes: tuple[str, ...]) -> Version:
        base = self._base
        for level in levels:
            base = self._home.join(base, level.findtext("BaseURL") or "") if level.findtext("BaseURL") else base
        for kind in ("SegmentTemplate", "SegmentList"):
            found = [entry for level in levels[1:] if (entry := level.find(kind)) is not None]
            if found:
                rules = {name: value for entry in found for name, value in entry.attrib.items()}
                lines = [line for entry in found if (line := entry.find("SegmentTimeline")) is not None]
                times = self._times(rules, lines[-1] if lines else None, len(found[-1].findall("SegmentURL")))
                fill = self._template if kind == "SegmentTemplate" else self._list
                segments = fill(base, levels[-1], rules, found[-1], times)
                steady = self._live and not lines and kind == "SegmentTemplate"
                return Version(segments, times[0][0] if steady and times else None, not self._live, notes=notes)
        whole = [_Segment(Part(base), self._span)] if base != self._base else []
        return Version(whole, 0, ended=True, whole=True, notes=notes)

    def _template(
        self, base: str, version: Element, rules: dict[str, str], entry: Element, times: list[tuple[int, int, int]]
    ) -> list[_Segment]:
        def fill(template: str, number: int, time: int) -> Part:
            values = {"RepresentationID": version.get("id", ""), "Bandwidth": version.get("bandwidth", "")}
            values |= {"Number": str(number), "Time": str(time), "": "$"}
            name = _IDENTIFIER.sub(lambda found: values[found[1]].zfill(int(found[2] or 0)), template)
            return Part(self._home.join(base, name))

        header = fill(rules["initialization"], 0, 0) if "initialization" in rules else None
        scale = int(rules.get("timescale", "1"))
        return [_Segment(fill(rules["media"], number, time), ticks / scale, header) for number, time, ticks in times]

    def _list(
        self, base: str, version: Element, rules: dict[str, str], entry: Element, times: list[tuple[int, int, int]]
    ) -> list[_Segment]:
        def part(name: str | None, span: str | None) -> Part:
            address = self._home.join(base, name) if name else base
            if span is None:
                return Part(address)
            first, _, last = span.partition("-")
            return Part(address, int(first), int(last) - int(first) + 1)

        first = entry.find("Initialization")
        header = None if first is None else part(first.get("sourceURL"), first.get("range"))
        scale = int(rules.get("timescale", "1"))
        named = entry.findall("SegmentURL")
        pairs = zip(named, times, strict=False)
        return [_Segment(part(url.get("media"), url.get("mediaRange")), t[2] / scale, header) for url, t in pairs]

    def _times(self, rules: dict[str, str], line: Element | None, named: int) -> list[tuple[int, int, int]]:
        """Number, time and length of all segments; times and lengths in ticks."""
        scale, first = int(rules.get("timescale", "1")), int(rules.get("startNumber", "1"))
        offset = int(rules.get("presentationTimeOffset", "0"))
        if line is None:
            ticks = int(rules.get("duration", "0")) or math.ceil(self._span * scale)
            start, stop = 0, named or math.ceil(round(self._span * scale / ticks, 6))
            if self._live and not named:
                delay = _seconds(self._root.get("suggestedPresentationDelay"))
                stop = max(0, math.floor((self._age() - delay) * scale / ticks))
                depth = _seconds(self._root.get("timeShiftBufferDepth")) or _DEPTH_SECONDS
                start = max(0, stop - math.ceil(depth * scale / ticks))
            if stop - start > MOST_SEGMENTS:
                raise ValueError
            return [(first + k, offset + k * ticks, ticks) for k in range(start, stop)]
        times: list[tuple[int, int, int]] = []
        entries = line.findall("S")
        now = 0
        for k, entry in enumerate(entries):
            now, ticks, more = int(entry.get("t", now)), int(entry.attrib["d"]), int(entry.get("r", "0"))
            if more < 0:
                after = entries[k + 1].get("t") if k + 1 < len(entries) else None
                more = math.ceil(((int(after) if after else offset + self._span * scale) - now) / ticks) - 1
            if len(times) + more >= MOST_SEGMENTS or ticks <= 0:
                raise ValueError
            times += [(first + len(times) + j, now + j * ticks, ticks) for j in range(more + 1)]
            now += (more + 1) * ticks
        return times

    def _age(self) -> float:
        """Seconds since the period began, by the clock."""
        born = datetime.fromisoformat(self._root.attrib["availabilityStartTime"])
        born = born.replace(tzinfo=born.tzinfo or UTC)
        return (datetime.now(UTC) - born).total_seconds() - self._start


def _seconds(text: str | None) -> float:
    """An ISO 8601 duration; 0 if there is none."""
    found = _DURATION.fullmatch(text or "")
    parts = [float(part or 0) for part in found.groups()] if found is not None else [0.0]
    return sum(part * size for part, size in zip(parts, (86400, 3600, 60, 1), strict=False))
