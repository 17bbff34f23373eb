"""What was recorded of a live source: which files show a span, its pictures at full size, and clips of it.

Reads what ``recorder`` writes, while it is written too; the folder is described in ``ring``.
"""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fractions import Fraction
from functools import partial
from itertools import groupby
from math import floor
from pathlib import Path
from typing import Any, Self

import av

from streamvid.errors import SettingsError, SourceError, near
from streamvid.frames import Frame
from streamvid.ingest.joined import RecordedOpener
from streamvid.ingest.pyav import PyavReader
from streamvid.ingest.ring import (
    Segment,
    Times,
    all_segments,
    append_line,
    connections,
    give_up,
    least,
    read_json,
    segments_of,
)
from streamvid.ingest.sampling import Sampling, Seconds, exact

_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".ts": "mpegts"}
_PATIENCE_SECONDS = 30.0
_ENDS_KNOWN = 4096


@dataclass(frozen=True, slots=True)
class Stretch:
    """Part of a span that was recorded without a break, ``[start, stop)`` in stream seconds."""

    start: Fraction
    stop: Fraction
    files: tuple[Path, ...]
    """In order; the first begins with a key frame at or before ``start``.  The last may be one that only
    holds pictures which are decoded late."""

    shift: Fraction
    """Stream seconds minus seconds in the files."""

    run: tuple[int, int]
    """Connection and run: stretches that share it can be joined."""

    @property
    def file_start(self) -> Fraction:
        """``start`` in seconds of the files."""
        return self.start - self.shift

    @property
    def file_stop(self) -> Fraction:
        """``stop`` in seconds of the files."""
        return self.stop - self.shift


@dataclass(frozen=True, slots=True)
class Exported:
    """A clip that was written."""

    path: Path
    start: Fraction
    """When it really begins, in stream seconds: at a key frame."""

    stop: Fraction
    num_bytes: int


class Recording:
    """The recorded packets of one live source, which may still be written.

    Args:
        folder: as in ``RecordTo``.

    Raises:
        SourceError: if nothing was ever recorded there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        told = read_json(self.folder / "recording.json")
        if told is None:
            raise SourceError(f"{self.folder.name} holds no recording; watch with --record to make one")
        self.origin = datetime.fromisoformat(told["origin"])
        """Wall clock at second 0 of the stream, with its time zone."""

        self._ends: dict[tuple[Path, int], Fraction | None] = {}

    @property
    def num_bytes(self) -> int:
        """What all files take."""
        return sum(size for _, _, size, _ in all_segments(self.folder))

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written now; None if it can."""
        return (read_json(self.folder / "trouble.json") or {}).get("why")

    def spans(self) -> tuple[tuple[Fraction, Fraction], ...]:
        """All that is recorded, as ``[start, stop)`` in stream seconds; what touches is one."""
        joined: list[tuple[Fraction, Fraction]] = []
        for stretch in self._stretches(None, None):
            if joined and joined[-1][1] == stretch.start:
                joined[-1] = joined[-1][0], stretch.stop
            else:
                joined.append((stretch.start, stretch.stop))
        return tuple(joined)

    def find(self, start: Seconds, stop: Seconds) -> tuple[Stretch, ...]:
        """What is recorded of ``[start, stop)``, in order; between stretches there is nothing, and there may be none.

        Where connections overlap, as those of a file that begins at 0 again, the later one counts.
        """
        first, last = exact(start), exact(stop)
        if not first < last:
            raise SettingsError(f"a span needs its start before its stop, got {float(first):g} and {float(last):g}")
        return tuple(self._stretches(first, last))

    def open(self, start: Seconds, stop: Seconds, *, fps: Seconds | None = None, **how: Any) -> Recorded:
        """Frames of ``[start, stop)`` with stream seconds, decoded again; gaps are left out.

        Args:
            start: in stream seconds; what is on screen then comes first.
            stop: see ``start``; not included.
            fps: pictures a second; None takes all.
            **how: ``size`` (height, width) instead of the full one, and ``isolate=False`` to decode in this process.

        Raises:
            SourceError: if nothing of the span is recorded: why.
        """
        stretches = self.find(start, stop)
        if not stretches:
            raise SourceError(self._missing(exact(start), exact(stop)))
        return Recorded(stretches, fps=fps, **how)

    def export(self, start: Seconds, stop: Seconds, path: str | os.PathLike[str]) -> Exported:
        """Write a clip without encoding anew; whole or not at all.

        It begins at the last key frame at or before ``start``, so it may show a little more.

        Args:
            start: in stream seconds.
            stop: see ``start``; not included.
            path: where to; ``.mp4``, ``.mov``, ``.mkv`` or ``.ts``.

        Raises:
            SourceError: if the span is not recorded, or not without a break.
            SettingsError: if no clip can be called so.
        """
        goal = Path(path)
        if goal.suffix.lower() not in _FORMATS:
            raise SettingsError(f"{goal.name} is no clip that can be written; {near(goal.suffix, _FORMATS)}")
        stretches = self.find(start, stop)
        if not stretches:
            raise SourceError(self._missing(exact(start), exact(stop)))
        if len({stretch.run for stretch in stretches}) > 1:
            pieces = ", ".join(f"{self._clock(s.start)}-{self._clock(s.stop)}" for s in stretches)
            raise SourceError(
                f"{self._clock(exact(start))}-{self._clock(exact(stop))} is recorded in {len(stretches)} pieces, "
                f"{pieces}; write one of them"
            )
        beside = goal.with_name(f".{goal.name}.{os.getpid()}.part")
        try:
            begun, ended = _remux(stretches, beside, _FORMATS[goal.suffix.lower()])
            size = beside.stat().st_size
            os.replace(beside, goal)
        except (OSError, av.error.FFmpegError) as reason:
            raise SourceError(f"{goal.name} cannot be written: {getattr(reason, 'strerror', None) or reason}") from None
        finally:
            beside.unlink(missing_ok=True)
        return Exported(goal, begun + stretches[0].shift, ended + stretches[-1].shift, size)

    def pin(self, start: Seconds, stop: Seconds) -> None:
        """Never give up what shows ``[start, stop)``, be it recorded already or not."""
        if not exact(start) < exact(stop):
            raise SettingsError(f"a span needs its start before its stop, got {start} and {stop}")
        append_line(self.folder / "pins.jsonl", {"pin": [str(exact(start)), str(exact(stop))]})

    def unpin(self, start: Seconds, stop: Seconds) -> None:
        """Take back a ``pin`` of the same span."""
        append_line(self.folder / "pins.jsonl", {"unpin": [str(exact(start)), str(exact(stop))]})

    def tidy(self, *, keep_seconds: float | None, keep_bytes: int | None, now: Callable[[], float] = time.time) -> int:
        """Give up files that are too old or too many, the oldest first; returns how many.

        Args:
            keep_seconds: see ``RecordTo``.
            keep_bytes: see there.
            now: the wall clock in seconds, as files have it.
        """
        return give_up(self.folder, keep_seconds=keep_seconds, keep_bytes=keep_bytes, now=now)

    def moment(self, text: str) -> Fraction:
        """Stream seconds of a wall clock time: ``14:02``, ``14:02:10.5`` or ``2026-03-01 14:02:10``.

        A time without a date is the last one that is not after the recording's end.

        Raises:
            SettingsError: if it is none of these.
        """
        try:
            if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?", text):
                spans = self.spans()
                end = self.origin + timedelta(seconds=float(spans[-1][1] if spans else 0))
                hours, minutes, seconds = (*text.split(":"), "0")[:3]
                day = end.replace(hour=0, minute=0, second=0, microsecond=0)
                found = day + timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds))
                if int(hours) > 23 or int(minutes) > 59:
                    raise ValueError
                found = found if found <= end + timedelta(hours=1) else found - timedelta(days=1)
            else:
                found = datetime.fromisoformat(text)
                found = found.replace(tzinfo=self.origin.tzinfo) if found.tzinfo is None else found
        except ValueError:
            raise SettingsError(f"{text!r} is no time; write 14:02:10 or '2026-03-01 14:02:10'") from None
        return Fraction(round((found - self.origin) / timedelta(microseconds=1)), 1_000_000)

    def _stretches(self, start: Fraction | None, stop: Fraction | None) -> Iterator[Stretch]:
        parts = [(part, times) for part in connections(self.folder) if (times := Times.read(part)) is not None]
        hidden: list[Fraction | None] = [None]
        for _, times in reversed(parts):
            hidden.append(least(hidden[-1], times.start))
        for (part, times), limit in zip(parts, reversed(hidden[:-1]), strict=True):
            last = least(limit, stop)
            if last is not None and times.start >= last or (limit is not None and start is not None and limit <= start):
                continue
            reached: Fraction | None = None
            for run in _runs(segments_of(part)):
                for stretch in self._of_run(part, times, run, start, last):
                    if reached is not None and stretch.start < reached:  # nor are such pictures shown live
                        if stretch.stop <= reached:
                            continue
                        stretch = replace(stretch, start=reached)
                    reached = stretch.stop
                    yield stretch

    def _of_run(
        self, part: Path, times: Times, run: Sequence[Segment], start: Fraction | None, stop: Fraction | None
    ) -> Iterator[Stretch]:
        begins = [segment.begin * times.base for segment in run]
        if stop is not None and times.stream(begins[0]) >= stop and begins[0] >= times.pieces[0].start:
            return
        end = self._end(run[-1].path)
        if end is None:
            return
        for piece in times.pieces:
            first, last = max(begins[0], piece.start), end if piece.stop is None else min(end, piece.stop)
            first = first if start is None else max(first, start - piece.shift)
            last = last if stop is None else min(last, stop - piece.shift)
            if first >= last:
                continue
            # One more: the first pictures on screen after a key frame may come behind it.
            files = run[max(0, bisect_right(begins, first) - 1) : bisect_right(begins, last) + 1]
            yield Stretch(
                first + piece.shift, last + piece.shift, tuple(segment.path for segment in files), piece.shift,
                (int(part.name), run[0].number),
            )  # fmt: skip

    def _end(self, path: Path) -> Fraction | None:
        """When the last whole picture of a file is gone, in its own seconds; None if there is none."""
        try:
            known = path, path.stat().st_size
        except FileNotFoundError:
            return None
        if known not in self._ends:
            if len(self._ends) >= _ENDS_KNOWN:
                self._ends.clear()
            self._ends[known] = _end_of_file(path)
        return self._ends[known]

    def _clock(self, seconds: Fraction) -> str:
        return f"{self.origin + timedelta(seconds=float(seconds)):%H:%M:%S}"

    def _missing(self, start: Fraction, stop: Fraction) -> str:
        """Why nothing of a span is there, and what is."""
        asked = f"{self._clock(start)}-{self._clock(stop)}"
        spans = self.spans()
        for why, until in (read_json(self.folder / "given-up.json") or {}).items():
            if start < Fraction(until):
                of = {"age": "of its age (keep more: --record-keep)", "space": "space was needed (--record-disk)"}[why]
                return f"{asked} is not recorded any more: it was given up because {of}"
        if not spans:
            return f"{asked} is not recorded: {self.folder.name} holds no picture yet; ask again later"
        if stop <= spans[0][0]:
            return f"{asked} was not recorded: recording began at {self._clock(spans[0][0])}"
        if start >= spans[-1][1]:
            return f"{asked} is not recorded: the recording ends at {self._clock(spans[-1][1])}"
        before = max((span for span in spans if span[1] <= start), default=spans[0])
        after = min((span for span in spans if span[0] >= stop), default=spans[-1])
        why = next(
            (t.why for p in connections(self.folder) if (t := Times.read(p)) is not None and t.start == after[0]), ""
        )
        return f"no video {self._clock(before[1])}-{self._clock(after[0])}: {why or 'nothing was recorded'}"


class Recorded(Iterator[Frame]):
    """Frames of what was recorded, stretch by stretch; a context manager."""

    def __init__(
        self,
        stretches: Sequence[Stretch],
        *,
        fps: Seconds | None = None,
        size: tuple[int, int] | None = None,
        isolate: bool = True,
    ) -> None:
        self.stretches = tuple(stretches)
        """What of the span there is."""

        self._fps, self._size, self._isolate = fps, size, isolate
        self._steps = self._run()

    def __next__(self) -> Frame:
        return next(self._steps)

    def close(self) -> None:
        """Let go of the files."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> Generator[Frame, None, None]:
        from streamvid.ingest.isolation import RemoteReader
        from streamvid.ingest.source import Source  # it makes recorders

        for stretch in self.stretches:
            make = partial(PyavReader, RecordedOpener(stretch.files))
            name = stretch.files[0].name
            reader = RemoteReader(make, name=name, stall_seconds=_PATIENCE_SECONDS) if self._isolate else make()
            sampling = Sampling(fps=self._fps, start=stretch.file_start, stop=stretch.file_stop)
            with Source(reader) as source, source.frames(sampling, size=self._size) as frames:
                for frame in frames:
                    yield Frame(frame.pixels, frame.pts + stretch.shift, frame.duration)


def _remux(stretches: Sequence[Stretch], path: Path, form: str) -> tuple[Fraction, Fraction]:
    """Write what the stretches of one run show; returns from when to when, in seconds of the files."""
    start, stop = stretches[0].file_start, stretches[-1].file_stop
    files = tuple(dict.fromkeys(file for stretch in stretches for file in stretch.files))
    with closing(RecordedOpener(files).open()) as source:
        stream = source.streams.video[0]
        base = stream.time_base or Fraction(1)
        first = floor(start / base)
        origin: int | None = None
        for packet in source.demux(stream):
            if packet.size and packet.is_keyframe and packet.pts is not None and packet.pts <= first:
                origin = packet.pts
            elif packet.dts is not None and packet.dts > first:
                break
        if origin is None:
            raise SourceError(f"{files[0].name} has no key frame before the span; take a later start")
    end = 0
    with closing(RecordedOpener(files).open()) as source:
        stream = source.streams.video[0]
        options = {"movflags": "+faststart"} if form in ("mp4", "mov") else {}
        with av.open(str(path), "w", format=form, options=options) as clip:
            out = clip.add_stream_from_template(stream, opaque=True)
            writing = False
            for packet in source.demux(stream):
                if not packet.size or packet.pts is None or packet.dts is None:
                    continue
                writing = writing or packet.pts == origin
                late = packet.dts * base >= stop
                if late and packet.dts >= end:
                    break
                # Pictures before the key frame need those before it; of late ones those between others are wanted.
                if not writing or packet.pts < origin or (late and packet.pts >= end):
                    continue
                end = max(end, packet.pts + (packet.duration or 0))
                packet.pts -= origin
                packet.dts -= origin
                packet.stream = out
                clip.mux_one(packet)
    return origin * base, end * base


def _runs(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Files that go on without a break; what was given up between two is one."""
    for _, group in groupby(enumerate(segments), key=lambda entry: (entry[1].run, entry[1].number - entry[0])):
        yield [segment for _, segment in group]


def _end_of_file(path: Path) -> Fraction | None:
    end: Fraction | None = None
    try:
        with closing(RecordedOpener((path,)).open()) as container:
            for packet in container.demux(container.streams.video[0]):
                if packet.size and packet.pts is not None:
                    gone = (packet.pts + (packet.duration or 0)) * packet.time_base
                    end = gone if end is None else max(end, gone)
    except (SourceError, av.error.FFmpegError):
        return end
    return end
