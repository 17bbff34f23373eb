"""The folder of a recording: its files, where they lie in time, and which are given up when.

::

    FOLDER/
        recording.json                  wall clock at second 0
        pins.jsonl                      spans that are kept
        given-up.json                   until when it was given up, and why
        00000003/                       one connection
            clock.jsonl                 where its seconds lie in those of the stream
            ticks.jsonl                 where ticks of the files lie in its seconds
            00000007-4500000-2.mp4      number, first tick, run: files of one run go on without a break
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction
from math import isfinite
from pathlib import Path
from typing import Any

from streamvid.errors import SettingsError, near

KEEP_SECONDS = 24 * 3600.0
KEEP_BYTES = 10 * 10**9
"""What a recording keeps if nothing is said."""

_SEGMENT = re.compile(r"(\d{8,})-(\d+)-(\d+)\.mp4")
_CONNECTION = re.compile(r"\d{8,}")
_LOOK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RecordTo:
    """Where the packets of a live source are kept, and for how long.

    Raises:
        SettingsError: if a value is out of range.
    """

    folder: Path
    """One for each stream; made when it is missing."""

    segment_seconds: float = 30.0
    """Length of a file, > 0; it ends at the next key frame.  Longer files are fewer; shorter ones are
    given up in smaller steps and opened sooner."""

    keep_seconds: float | None = KEEP_SECONDS
    """Age at which a file is given up, > 0; None: no age."""

    keep_bytes: int | None = KEEP_BYTES
    """Most that all files take together, pinned ones included, > 0; the oldest go first.  None: no limit."""

    connection: int | None = None
    """Number of the connection; None: the next one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not (isfinite(self.segment_seconds) and self.segment_seconds > 0):
            raise SettingsError(f"segment_seconds must be above 0, got {self.segment_seconds}; 30 is usual")
        for name, value in (("keep_seconds", self.keep_seconds), ("keep_bytes", self.keep_bytes)):
            if value is not None and not value > 0:
                raise SettingsError(f"{name} must be above 0, got {value}; for no limit give None")

    def part(self) -> Path:
        """The folder of the connection."""
        number = self.connection if self.connection is not None else _next_number(self.folder)
        return self.folder / f"{number:08d}"


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of a connection."""

    path: Path
    number: int
    begin: int
    """When its key frame is shown, in ticks."""

    run: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Seconds in files that lie in the stream by one shift; a stop of None is open."""

    start: Fraction
    stop: Fraction | None
    shift: Fraction


@dataclass(frozen=True, slots=True)
class Times:
    """Where the files of one connection lie in the stream."""

    base: Fraction
    """The tick in seconds."""

    pieces: tuple[Piece, ...]
    why: str
    """Why there was nothing before the connection."""

    @classmethod
    def read(cls, folder: Path) -> Times | None:
        """None if no picture was shown of the connection."""
        ticks = [(r["tick"], Fraction(r["base"]), Fraction(r["connection"])) for r in _lines(folder / "ticks.jsonl")]
        clock = list(_lines(folder / "clock.jsonl"))
        if not ticks or not clock:
            return None
        placed = [(Fraction(r["connection"]), Fraction(r["stream"])) for r in clock]
        base = ticks[0][1]
        pieces: list[Piece] = []
        for i, (tick, _, at) in enumerate(ticks):
            stop = None
            if i + 1 < len(ticks):
                stop = min(ticks[i + 1][2], at + (ticks[i + 1][0] - tick) * base)
            for j, (since, stream) in enumerate(placed):
                first = max(at, since) if j else at
                last = least(stop, placed[j + 1][0] if j + 1 < len(placed) else None)
                if last is None or first < last:
                    inside = tick * base - at
                    pieces.append(
                        Piece(first + inside, None if last is None else last + inside, stream - since - inside)
                    )
        for k, (piece, after) in enumerate(zip(pieces, pieces[1:], strict=False)):
            stop = least(piece.stop, after.start + after.shift - piece.shift)
            pieces[k] = replace(piece, stop=stop)
        return cls(base, tuple(pieces), clock[0].get("why", ""))

    @property
    def start(self) -> Fraction:
        """First moment, in stream seconds."""
        return self.pieces[0].start + self.pieces[0].shift

    def stream(self, seconds: Fraction) -> Fraction:
        """Stream seconds of a moment in the files."""
        place = bisect_right([piece.start for piece in self.pieces], seconds)
        return seconds + self.pieces[max(0, place - 1)].shift


class Logbook:
    """What the process that watches adds to a recording: where connections lie in time.

    Args:
        record: where and how long.
        origin: wall clock at second 0; None: as the recording has it.
        today: the wall clock now.

    Raises:
        SettingsError: if the recording has another second 0, or another process writes it.
    """

    def __init__(self, record: RecordTo, *, origin: datetime | None, today: datetime) -> None:
        self._record = record
        folder = record.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._close = weakref.finalize(self, os.close, _lock(folder))
            told = read_json(folder / "recording.json")
            known = datetime.fromisoformat(told["origin"]) if told is not None else None
            if known is not None and origin is not None and known != origin:
                self._close()
                raise SettingsError(
                    f"the recording in {folder.name} counts from {known:%Y-%m-%d %H:%M:%S} and the stream from "
                    f"{origin:%Y-%m-%d %H:%M:%S}; give another folder"
                )
            self.origin = known or origin or today
            """Wall clock at second 0."""

            if told is None:
                write_json(folder / "recording.json", {"format": 1, "origin": self.origin.isoformat()})
            self._number = _next_number(folder) - 1
        except OSError as reason:
            raise SettingsError(
                f"nothing can be recorded into {folder.name}: {reason.strerror or reason}; give another folder"
            ) from None
        self._shift: Fraction | None = None
        self._trouble: str | None = None
        self._looked = 0.0

    def connection(self) -> RecordTo:
        """Settings for the next connection."""
        self.tidy()
        self._number += 1
        self._shift = None
        return replace(self._record, connection=self._number)

    def placed(self, seconds: Fraction, stream: Fraction, why: str) -> None:
        """A picture of the connection lies there; ``why`` there was none before."""
        if stream - seconds == self._shift:
            return
        line = {"connection": str(seconds), "stream": str(stream), **({"why": why} if self._shift is None else {})}
        part = self._record.folder / f"{self._number:08d}"
        with suppress(OSError):  # said by ``look``, and tried again
            part.mkdir(exist_ok=True)
            append_line(part / "clock.jsonl", line)
            self._shift = stream - seconds

    def tidy(self) -> None:
        """Give up what is too old or too much."""
        with suppress(OSError):
            give_up(self._record.folder, keep_seconds=self._record.keep_seconds, keep_bytes=self._record.keep_bytes)

    def look(self, now: float) -> str | None:
        """What changed, in half a sentence; looked up every 5 s at most."""
        if now - self._looked < _LOOK_SECONDS:
            return None
        self._looked = now
        before, self._trouble = self._trouble, (read_json(self._record.folder / "trouble.json") or {}).get("why")
        if self._trouble == before:
            return None
        return f"it is not recorded: {self._trouble}" if self._trouble else "it is recorded again"

    def close(self) -> None:
        """Let others write."""
        self._close()


def recording_folder(memory: Path, stream: str) -> Path:
    """Where the recording of a stream lies beside its memory."""
    return memory / "recordings" / stream


def recording_of(memory: Path, stream: str | None) -> Path:
    """The recording of a stream that is there; None: the only one.

    Raises:
        SettingsError: if there is none of this name, or several to choose from.
    """
    names = sorted(path.parent.name for path in (memory / "recordings").glob("*/recording.json"))
    if not names:
        raise SettingsError("no stream was recorded; watch with --record, or name the folder with --memory")
    if stream is None and len(names) > 1:
        raise SettingsError(f"which stream? --stream {' or '.join(names)}")
    if stream is not None and stream not in names:
        raise SettingsError(f"{stream!r} was not recorded; {near(stream, names)}")
    return recording_folder(memory, stream or names[0])


def give_up(
    folder: Path, *, keep_seconds: float | None, keep_bytes: int | None, now: Callable[[], float] = time.time
) -> int:
    """Remove files that are too old or too many, the oldest first; see ``Recording.tidy``.

    Room is left for the newest file to be written once more, so that the limit holds while it grows.
    """
    entries = list(all_segments(folder))
    if not entries:
        return 0
    too_old = now() - keep_seconds if keep_seconds is not None else None
    total = sum(size for _, _, size, _ in entries) + entries[-1][2]
    pins = _pins(folder)
    times: dict[Path, Times | None] = {}
    after = {a[1].path: b[1] for a, b in zip(entries, entries[1:], strict=False) if a[0] == b[0]}
    told: dict[str, str] = dict(read_json(folder / "given-up.json") or {})
    gone = 0
    for part, segment, size, changed in entries:
        why = "age" if too_old is not None and changed < too_old else ""
        if not why and keep_bytes is not None and total > keep_bytes and segment is not entries[-1][1]:
            why = "space"
        if not why:
            if keep_bytes is None or total <= keep_bytes:
                break  # all after it are younger
            continue
        if part not in times:
            times[part] = Times.read(part)
        known, following = times[part], after.get(segment.path)
        if known is not None:
            begin = known.stream(segment.begin * known.base)
            end = known.stream(following.begin * known.base) if following is not None else None
            if any(begin < stop and (end is None or start < end) for start, stop in pins):
                continue
            until = end if end is not None else begin
            told[why] = str(max(until, Fraction(told.get(why, "0"))))
            write_json(folder / "given-up.json", told)
        segment.path.unlink(missing_ok=True)
        total -= size
        gone += 1
    for part in connections(folder)[:-1]:
        if not segments_of(part):
            for rest in part.glob("*.jsonl"):
                rest.unlink(missing_ok=True)
            with suppress(OSError):
                part.rmdir()
    return gone


def segments_of(part: Path) -> list[Segment]:
    """The files of a connection, in order."""
    found = []
    with suppress(FileNotFoundError):
        for name in os.listdir(part):
            if match := _SEGMENT.fullmatch(name):
                number, begin, run = map(int, match.groups())
                found.append(Segment(part / name, number, begin, run))
    return sorted(found, key=lambda segment: segment.number)


def all_segments(folder: Path) -> Iterator[tuple[Path, Segment, int, float]]:
    """Connection, file, bytes and last change of all files, the oldest first."""
    for part in connections(folder):
        for segment in segments_of(part):
            with suppress(FileNotFoundError):
                entry = segment.path.stat()
                yield part, segment, entry.st_size, entry.st_mtime


def connections(folder: Path) -> list[Path]:
    """The folders of all connections, the oldest first."""
    with suppress(FileNotFoundError):
        return sorted((folder / name for name in os.listdir(folder) if _CONNECTION.fullmatch(name)), key=_number)
    return []


def _number(part: Path) -> int:
    return int(part.name)


def _next_number(folder: Path) -> int:
    return max(map(_number, connections(folder)), default=0) + 1


def _pins(folder: Path) -> set[tuple[Fraction, Fraction]]:
    pins: set[tuple[Fraction, Fraction]] = set()
    for line in _lines(folder / "pins.jsonl"):
        for verb, (start, stop) in line.items():
            (pins.add if verb == "pin" else pins.discard)((Fraction(start), Fraction(stop)))
    return pins


def least(*values: Fraction | None) -> Fraction | None:
    """The least of those that are known."""
    return min((value for value in values if value is not None), default=None)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a journal; an end that was torn off when the power failed is left out."""
    with suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            with suppress(ValueError):
                yield json.loads(line)


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add to a journal in one write; what was torn off before it is closed by its line end."""
    with path.open("ab", buffering=0) as file:
        file.write(b"%b%b\n" % (b"\n" if file.tell() else b"", json.dumps(entry).encode()))


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file says; None if it is not there or says nothing."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a file, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value))
    os.replace(beside, path)


def _lock(folder: Path) -> int:
    """A handle that holds the folder until it is closed, even by the end of the process."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise SettingsError(f"{folder.name} is being recorded into by another process; give another folder") from None
    return handle
