"""What a few frames of a long video cost: our decoding beside PyAV, OpenCV, decord and torchcodec, in one run.

Every cell is one film (codec, size, GOP, length; see ``films.py``) and one ask: so many frames spread
evenly over all of it, or one a second.  Each reader works in a process of its own that has imported
what it needs and has read a tiny film before; each measurement opens the film anew, as opening is
paid by whoever asks.  Readers take turns, so that a noisy machine is noisy for all.  The film is in the
page cache.

Seconds run from the path to the last RGB picture.  Every picture wears its number; a reader's
pictures are compared with the one on screen at each target time, and those that differ are counted as
wrong: a reader with wrong frames is flagged and is never called the fastest.  CPU seconds are those of
all threads, and say more than seconds where others use the machine too.  Peak RSS is the process with
its imports.  Processes that a reader starts count for both.

Readers (``--competitors``, by name or by the start of their names):

``ours``            ``open_source(path).frames(...)`` at full size, as it is; ``ours-small`` scales while
                    converting, ``ours-t1`` has one thread, ``ours-inside`` no process of its own
``pyav-all``        every picture decoded, the wanted ones converted: what one writes by hand first
``pyav-seek``       seek to the key frame before each target and decode up to it, without any check
``opencv-grab``     ``grab`` through the film, ``retrieve`` what is wanted; ``opencv-frames`` and
                    ``opencv-msec`` set the position by number and by time
``decord-tN``       ``get_batch`` with N threads, 0 is decord's own choice
``torchcodec-*-tN`` ``get_frames_played_at`` in seek mode exact or approximate with N threads, 1 is its
                    default, 0 is FFmpeg's choice; ``index`` is approximate with ``get_frames_at``
``*-small``         scaled to ``--small``: decord and torchcodec by bilinear filters, ours and PyAV bicubic

Batches of more than 256 pictures are asked for 64 at a time, as they would not fit into memory.
Films are half a minute longer than 10 minutes and an hour: in a film of exactly an hour each of 8 targets
falls on a key frame, at other lengths they fall anywhere in a GOP.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from importlib.metadata import distributions
from itertools import product
from pathlib import Path
from typing import Any

from films import CODINGS, FPS, HEIGHTS, LOOP, Ask, Film, corner_shape, read_number

SPARSE = 256
"""Asks of up to this many frames are sparse."""

CHUNK = 64
START_SECONDS = 300
SHORT = 630
"""Seconds of film that stand for a longer one with ``--calculate``."""

COMPARED = {"streamvid", "av", "opencv-python-headless", "opencv-python", "decord", "torchcodec", "torch", "numpy"}
Size = tuple[int, int]
QUICK = "ours,ours-,pyav,opencv,decord-t0,torchcodec-exact-t1,torchcodec-approx-t0,torchcodec-approx-t1"
READ_ALL = ("pyav-all", "opencv-grab")
"""Readers whose time grows with the film, whatever is asked."""


def chunks(wanted: list[Any]) -> Iterator[list[Any]]:
    """All at once where memory allows it."""
    step = len(wanted) if len(wanted) <= SPARSE else CHUNK
    return (wanted[i : i + step] for i in range(0, len(wanted), step))


def ours(path: str, ask: Ask, moments: list[Fraction], small: Size | None = None, **settings: Any) -> Iterator[Any]:
    """The library's own way."""
    from streamvid.ingest import Sampling, open_source

    with open_source(path, **settings) as source:
        for frame in source.frames(Sampling(count=ask.count, fps=ask.fps), size=small):
            yield frame.pixels


def pyav_all(path: str, ask: Ask, moments: list[Fraction]) -> Iterator[Any]:
    """Decode everything; a picture is shown until the next one's time."""
    import av

    container: Any
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        shown: Any = None
        k = 0
        for frame in container.decode(video=0):
            while k < len(moments) and shown is not None and moments[k] < frame.pts * frame.time_base:
                yield shown.to_ndarray(format="rgb24")
                k += 1
            shown = frame
        for _ in moments[k:]:
            yield shown.to_ndarray(format="rgb24")


def pyav_seek(path: str, ask: Ask, moments: list[Fraction], small: Size | None = None) -> Iterator[Any]:
    """Jump to the key frame before each target if one lies ahead, decode until the target is passed."""
    import av

    container: Any
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        container.seek(0, stream=stream)
        keys = [entry.timestamp * stream.time_base for entry in stream.index_entries if entry.is_keyframe]
        frames = container.decode(stream)
        shown: Any = None
        following = next(frames)
        for moment in moments:
            key = bisect_right(keys, moment) - 1
            if following is not None and key >= 0 and keys[key] > following.pts * following.time_base:
                container.seek(int(moment / stream.time_base), stream=stream)
                frames = container.decode(stream)
                shown, following = None, next(frames)
            while following is not None and following.pts * following.time_base <= moment:
                shown, following = following, next(frames, None)
            height, width = small or (shown.height, shown.width)
            yield shown.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()


def opencv(path: str, ask: Ask, moments: list[Fraction], how: str) -> Iterator[Any]:
    """Through the film by ``grab``, or to each target by number or by time."""
    import cv2

    film = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    rate = film.get(cv2.CAP_PROP_FPS)
    at = -1
    for moment in moments:
        number = int(moment * Fraction(rate).limit_denominator(1001))
        if how == "grab":
            while at < number and film.grab():
                at += 1
        else:
            by_number = (cv2.CAP_PROP_POS_FRAMES, number)
            film.set(*(by_number if how == "frames" else (cv2.CAP_PROP_POS_MSEC, float(moment * 1000))))
            film.grab()
        good, picture = film.retrieve()
        if not good:
            raise RuntimeError(f"no picture at {float(moment):g} s")
        yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    film.release()


def decord(path: str, ask: Ask, moments: list[Fraction], threads: int, small: Size | None = None) -> Iterator[Any]:
    """Indices from the average rate, then ``get_batch``."""
    from decord import VideoReader

    height, width = small or (-1, -1)
    film = VideoReader(path, num_threads=threads, height=height, width=width)
    rate = Fraction(film.get_avg_fps()).limit_denominator(1001)
    for batch in chunks([int(moment * rate) for moment in moments]):
        yield from film.get_batch(batch).asnumpy()


def torchcodec(
    path: str, ask: Ask, moments: list[Fraction], mode: str, threads: int, small: Size | None = None
) -> Iterator[Any]:
    """``get_frames_played_at``, or ``get_frames_at`` with indices from the average rate."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    film = VideoDecoder(
        path,
        seek_mode="exact" if mode == "exact" else "approximate",
        num_ffmpeg_threads=threads,
        dimension_order="NHWC",
        transforms=[Resize(small)] if small else None,
    )
    rate = Fraction(film.metadata.average_fps).limit_denominator(1001)
    for batch in chunks(moments):
        if mode == "index":
            yield from film.get_frames_at([int(moment * rate) for moment in batch]).data
        else:
            yield from film.get_frames_played_at([float(moment) for moment in batch]).data


READERS: dict[str, Callable[..., Iterator[Any]]] = {
    "ours": ours,
    "ours-t1": partial(ours, threads=1),
    "ours-inside": partial(ours, isolate=False),
    "ours-small": ours,
    "pyav-all": pyav_all,
    "pyav-seek": pyav_seek,
    "pyav-seek-small": pyav_seek,
    **{f"opencv-{how}": partial(opencv, how=how) for how in ("grab", "frames", "msec")},
    **{f"decord-t{n}": partial(decord, threads=n) for n in (0, 1, 2)},
    "decord-t0-small": partial(decord, threads=0),
    **{
        f"torchcodec-{mode}-t{n}": partial(torchcodec, mode=mode, threads=n)
        for mode, n in (*product(("exact", "approx"), (0, 1, 2)), ("index", 1))
    },
    "torchcodec-approx-t0-small": partial(torchcodec, mode="approx", threads=0),
}


def measure(reader: str, path: str, ask: Ask, length: int, small: Size) -> dict[str, Any]:
    """One reading of a film: seconds, and the numbers on the pictures."""
    read = partial(READERS[reader], small=small) if reader.endswith("-small") else READERS[reader]
    corners, moments = [], ask.moments(length)
    used, began = _cpu_seconds(), time.perf_counter()
    for picture in read(path, ask, moments):
        height, width = corner_shape(picture.shape[0])
        corner = picture[:height, :width]
        corners.append(corner.copy() if hasattr(corner, "copy") else corner.numpy().copy())
    seconds = time.perf_counter() - began
    used = _cpu_seconds() - used
    numbers = [read_number(corner) for corner in corners]
    return {"seconds": seconds, "cpu_seconds": used, "numbers": numbers, "peak_rss_bytes": _peak_bytes()}


def _family() -> list[Path]:
    """This process and those it has started, as folders of ``/proc``; empty where there is none."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()] if parents else []
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return [Path("/proc") / str(pid) for pid in found]


def _cpu_seconds() -> float:
    """Of this process, of its children that run and of those that have ended."""
    family = [folder / "stat" for folder in _family()]
    ticks = [sum(map(int, stat.read_text().rpartition(")")[2].split()[11:15])) for stat in family]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else time.process_time()


def _peak_bytes() -> int:
    """Of this process and its children; without ``/proc``, of this one."""
    texts = [(folder / "status").read_text() for folder in _family()]
    peaks = [int(line.split()[1]) * 1024 for text in texts for line in text.splitlines() if line[:6] == "VmHWM:"]
    return sum(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work(reader: str, film: str, tiny: str, text: str, seconds: int, small: Size) -> None:
    """Measure once for every line that comes in; a line of JSON goes out for each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer
    try:
        for _ in range(2):
            measure(reader, tiny, Ask("4"), LOOP // FPS, small)
        print(json.dumps({"ready": _peak_bytes()}), file=answers)
        for _ in sys.stdin:
            print(json.dumps(measure(reader, film, Ask(text), seconds, small)), file=answers)
    except Exception as reason:  # whatever a reader raises is its result
        said = " ".join(str(reason).split()) or "no message"
        print(json.dumps({"error": f"{type(reason).__name__}: {said[:200]}"}), file=answers)


@dataclass
class Row:
    """One reader in one cell: its process and what it has measured."""

    reader: str
    process: subprocess.Popen[bytes]
    wanted: list[int]
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    wrong: int = 0
    base: int = 0
    peak: int = 0
    over: bool = False
    """Whether it ran past the limit; it is not asked again."""

    error: str = ""
    film: str = ""
    factor: float = 1.0
    """What a shorter film's time is multiplied by."""

    reused: bool = False
    """Whether its times are those of another ask of the same film."""

    def take(self, answer: dict[str, Any] | None) -> None:
        """Note one answer; None if there was none in time."""
        if answer is None:
            self.over = True
        elif "error" in answer:
            self.error = answer["error"]
        elif "ready" in answer:
            self.base = answer["ready"]
        else:
            self.seconds.append(answer["seconds"] * self.factor)
            self.cpu.append(answer["cpu_seconds"] * self.factor)
            self.peak = max(self.peak, answer["peak_rss_bytes"])
            got = answer["numbers"]
            differ = sum(a != b for a, b in zip(got, self.wanted, strict=False))
            self.wrong = max(self.wrong, differ + abs(len(got) - len(self.wanted)))

    def answer(self, limit: float) -> dict[str, Any] | None:
        """The next line of the process; None if it does not come in time."""
        assert self.process.stdout is not None
        fd, line, until = self.process.stdout.fileno(), b"", time.monotonic() + limit
        while not line.endswith(b"\n"):
            if not select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
                self.process.kill()
                return None
            part = os.read(fd, 1 << 16)
            if not part:
                return {"error": f"the process ended with code {self.process.wait()}"}
            line += part
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    @property
    def median(self) -> float | None:
        """Seconds; None if there is no time or not all frames came."""
        return statistics.median(self.seconds) if self.seconds and not self.error and not self.over else None

    def as_dict(self) -> dict[str, Any]:
        """For the JSON line."""
        told = {name: value for name, value in vars(self).items() if name not in ("process", "wanted")}
        return told | {"median": self.median, "frames": len(self.wanted)}


def start(reader: str, film: Film, ask: Ask, args: argparse.Namespace) -> Row:
    """A reader's process for one cell, not yet asked anything; it is still importing."""
    factor = 1.0
    if args.calculate and reader in READ_ALL and film.seconds > SHORT:
        factor = film.seconds / SHORT
        film = Film(film.codec, film.size, film.gop, SHORT)
    path = film.make(args.films)
    tiny = Film(film.codec, film.size, 30, LOOP // FPS).make(args.films)
    told = {"reader": reader, "film": str(path), "tiny": str(tiny), "text": ask.text, "seconds": film.seconds}
    command = [sys.executable, __file__, "--worker", json.dumps(told | {"small": args.small})]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, bufsize=0)
    wanted = [film.number_at(moment) for moment in ask.moments(film.seconds)]
    return Row(reader, process, wanted, film=film.name, factor=factor)


def run_cell(film: Film, ask: Ask, known: dict[str, Row], args: argparse.Namespace) -> list[Row]:
    """All readers in turn, ``--repeat`` times; what reads everything is not asked again."""
    path = film.make(args.films)
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    rows = []
    try:
        for reader in args.readers:
            rows.append(start(reader, film, ask, args))
        for row in rows:
            row.take(row.answer(START_SECONDS))
            _reuse(row, known)
        for _ in range(args.repeat):
            for row in rows:
                tired = row.cpu and row.cpu[-1] / row.factor > args.patience
                if row.error or row.over or row.reused or tired:
                    continue
                assert row.process.stdin is not None
                row.process.stdin.write(b"\n")
                row.take(row.answer(args.limit))
    finally:
        for row in rows:
            row.close()
    if args.calculate:
        known |= {row.reader + row.film: row for row in rows if row.reader in READ_ALL}
    return rows


def _reuse(row: Row, known: dict[str, Row]) -> None:
    before = known.get(row.reader + row.film)
    if before is not None and not row.error:
        row.reused, row.error, row.over = True, before.error, before.over
        row.peak, row.wrong = before.peak, before.wrong
        row.seconds = [seconds / before.factor * row.factor for seconds in before.seconds]
        row.cpu = [seconds / before.factor * row.factor for seconds in before.cpu]


def show(film: Film, ask: Ask, rows: list[Row], args: argparse.Namespace) -> None:
    """The table of one cell, the fastest of full size first."""
    mbit = film.make(args.films).stat().st_size * 8 / film.seconds / 1e6
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg()[:2])
    print(f"\n{film}, {ask}  ({mbit:.2f} Mbit/s; load average {load})")
    print(f"{'reader':28}{'seconds (min-max)':>24}{'n':>3}{'/ours':>8}{'cpu s':>8}{'wrong':>10}{'RSS MB':>8}")
    for row in sorted(rows, key=lambda row: (row.reader.endswith("-small"), row.median or 1e9)):
        if row.median is None:
            said = row.error or f"> {args.limit:g} s"
            print(f"{row.reader:28}{'-':>24}  {said}")
            continue
        times = f"{row.median:.3f} ({min(row.seconds):.3f}-{max(row.seconds):.3f})"
        base = median_of(rows, "ours-small" if row.reader.endswith("-small") else "ours")
        ratio = f"{row.median / base:.2f}" if base else "-"
        wrong = f"{row.wrong}/{len(row.wanted)} !" if row.wrong else "0"
        counts = f"{len(row.seconds):>3}{ratio:>8}{statistics.median(row.cpu):8.2f}{wrong:>10}{row.peak / 1e6:8.0f}"
        how = "  of another ask" if row.reused else ""
        how += f"  x{row.factor:.2f} (calculated)" if row.factor > 1 else ""
        print(f"{row.reader:28}{times:>24}{counts}{how}", flush=True)


def median_of(rows: list[Row], reader: str) -> float | None:
    """A reader's seconds; None if it has none."""
    return next((row.median for row in rows if row.reader == reader), None)


def compare(cell: str, ask: Ask, rows: list[Row], limit: float) -> tuple[list[str], list[str]]:
    """Where others with the right frames are faster, and where reading everything is nearly as good."""
    faster, near = [], []
    for own, tail in (("ours", False), ("ours-small", True)):
        mine = median_of(rows, own)
        honest = [row for row in rows if not row.wrong and row.median and row.reader.endswith("-small") == tail]
        others = [row for row in honest if not row.reader.startswith("ours")]
        best = min(others, key=lambda row: row.median or 0.0, default=None)
        if mine is None and any(row.reader == own for row in rows):
            faster.append(f"{cell}: {own} has no time")
        elif mine and best and best.median and best.median < mine:
            spent = {row.reader: statistics.median(row.cpu) for row in rows if row.cpu}
            shares = f"{best.median / mine:.2f} of the time of {own}, {spent[best.reader] / spent[own]:.2f} of its CPU"
            faster.append(f"{cell}: {best.reader} takes {shares}")
    mine, slow = median_of(rows, "ours"), next((row for row in rows if row.reader == "pyav-all"), None)
    if mine and slow and ask.count and ask.count <= SPARSE:
        times = (limit if slow.over else slow.median or 0.0) / mine
        if 0 < times < 3:
            near.append(f"{cell}: {'at least ' if slow.over else ''}{times:.2f}x faster than pyav-all")
    return faster, near


def parse() -> argparse.Namespace:
    """Arguments, with lists split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path, default=Path(tempfile.gettempdir()) / "streamvid-films")
    parser.add_argument("--codecs", default=",".join(CODINGS))
    parser.add_argument("--sizes", default=",".join(HEIGHTS))
    parser.add_argument("--gops", default="30,250")
    parser.add_argument("--lengths", default="630,3630", help="seconds; multiples of 30")
    parser.add_argument("--frames", default="8,32,54,256,1fps")
    parser.add_argument("--competitors", dest="readers", default="", help="names, or how names start")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--small", default="252x448", help="HEIGHTxWIDTH of the -small rows")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one measurement")
    parser.add_argument("--patience", type=float, default=30.0, help="what took more CPU seconds is not repeated")
    parser.add_argument("--calculate", action="store_true", help="what reads everything does it for 10 min, once")
    parser.add_argument("--quick", action="store_true", help="H.264 at 720p, 630 s; about 5 min on two free cores")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.codecs, args.sizes, args.gops, args.lengths, args.frames = "h264", "720p", "30,250", "630", "8,32"
        args.repeat, args.patience, args.calculate = 3, 2.0, True
        args.readers = args.readers or QUICK
    starts = args.readers.split(",")
    args.readers = [
        reader for reader in READERS if any(reader == s or (s not in READERS and reader.startswith(s)) for s in starts)
    ]
    if not args.readers:
        parser.error(f"no reader starts with any of {starts}; there are {', '.join(READERS)}")
    args.small = tuple(int(side) for side in args.small.split("x"))
    args.asks = [Ask(text) for text in args.frames.split(",")]
    return args


def main() -> None:
    """Make the films, measure every cell, print tables, a summary and one JSON line."""
    args = parse()
    if args.worker:
        return work(**args.worker)
    args.films.mkdir(parents=True, exist_ok=True)
    parts = [text.split(",") for text in (args.codecs, args.sizes, args.gops, args.lengths)]
    for part, names in zip(parts, (set(CODINGS), set(HEIGHTS)), strict=False):
        if unknown := set(part) - names:
            raise SystemExit(f"no {', '.join(sorted(unknown))} here, only {', '.join(sorted(names))}")
    films = [Film(c, s, int(g), int(n)) for c, s, g, n in product(*parts)]
    used = sum(film.make(args.films).stat().st_size for film in films)
    print(f"{os.cpu_count()} cores, {platform.machine()}; {len(films)} films, {used / 1e9:.2f} GB in {args.films}")
    versions = {found.name: found.version for found in distributions() if found.name in COMPARED}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    known: dict[str, Row] = {}
    faster, near, cells = list[str](), list[str](), []
    for film, ask in product(films, args.asks):
        rows = run_cell(film, ask, known, args)
        show(film, ask, rows, args)
        found = compare(f"{film}, {ask}", ask, rows, args.limit)
        faster, near = faster + found[0], near + found[1]
        cells.append({"cell": f"{film}, {ask}", "load": os.getloadavg(), "rows": [row.as_dict() for row in rows]})
    print("\n  ".join(["\nNot the fastest of those with the right frames:", *(faster or ["nowhere"])]))
    if {"ours", "pyav-all"} <= set(args.readers):
        print("\n  ".join([f"Up to {SPARSE} frames less than 3x faster than reading all:", *(near or ["nowhere"])]))
    report: dict[str, Any] = {"versions": versions, "python": platform.python_version(), "cores": os.cpu_count()}
    report |= {"machine": platform.machine(), "not_fastest": faster, "under_3x": near, "cells": cells}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
