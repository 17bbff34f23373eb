"""A week of ten streams in a folder that holds a tenth of it: is it flat, within its limit, and fast enough?

Ten sources are written in turn, a span of equal length at a time, as ten cameras would.  A span has 8 tokens
64 wide (fp32 as they come, sq8 on the disk) in two frames of 2 x 2 and one key 64 wide: small, so that what is
measured is the memory and not the encoding.  The limit is a tenth of what the first spans say all would take.

Printed per checkpoint: bytes of all files in the folder as ``du`` counts them (blocks, folders too), resident
memory of this process, spans there are.  At the end: spans by age, doubling, over all streams; appends per
second; one line of JSON.  ``above`` is how many checks found more than the limit; the limit itself is on bytes
of files, blocks of 4 KiB and folders come on top, so both are checked and both are given.

Not measured: models, real tokens (a hundred times the bytes), reading while it is written.  ``--unsynced``
leaves out the fsyncs, to tell our own time from the disk's; a real week is written with them.

    python benchmarks/week.py --spans 10000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import torch

from streamvid.budget import Limits
from streamvid.memory.bank import Bank
from streamvid.memory.keys import MemoryKey
from streamvid.memory.writer import Writer
from streamvid.tokens import VideoTokens

STREAMS = 10
WEEK = 7 * 24 * 3600
WIDTH = 64
TOKENS = 8
FIRST = 200
"""Spans that say what one takes."""


def span(number: int, start: float, seconds: float, random: torch.Generator) -> VideoTokens:
    """A span of two frames."""
    cell = torch.arange(TOKENS)
    return VideoTokens(
        features=torch.randn(TOKENS, WIDTH, generator=random),
        grid=(2, 2, 2),
        position=torch.stack([cell // 4, cell % 4 // 2, cell % 2], dim=1),
        pts_seconds=start + (cell // 4).double() * (seconds / 2),
        duration_seconds=torch.full((TOKENS,), seconds / 2, dtype=torch.float64),
        size=torch.ones(TOKENS),
        score=torch.rand(TOKENS, generator=random),
    )


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of all files, and of the blocks they and the folders take."""
    files, blocks = 0, 0
    for root, _, names in os.walk(folder):
        blocks += os.stat(root).st_blocks * 512
        for name in names:
            try:
                stat = os.stat(os.path.join(root, name))
            except FileNotFoundError:
                continue
            files, blocks = files + stat.st_size, blocks + stat.st_blocks * 512
    return files, blocks


def rss() -> int:
    """Resident bytes of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def key(stream: int) -> MemoryKey:
    """Of one stream."""
    return MemoryKey(content=f"live:{stream}", sampling={}, model="week", processor="week", methods=[], embedder="week")


def append(writers: Sequence[Writer], number: int, each: Fraction, random: torch.Generator) -> None:
    """The next span of the stream whose turn it is."""
    stream, turn = number % STREAMS, number // STREAMS
    start = each * turn
    keys = torch.randn(1, WIDTH, generator=random)
    writers[stream].append(span(number, float(start), float(each), random), start=start, stop=start + each, keys=keys)


def needed(folder: Path, spans: int, each: Fraction) -> int:
    """What all spans would take without a limit."""
    random = torch.Generator().manual_seed(0)
    with Bank.open(folder) as bank, ExitStack() as stack:
        writers = [stack.enter_context(bank.writer(key(n), path=f"cam{n}", name=f"cam{n}")) for n in range(STREAMS)]
        for number in range(FIRST):
            append(writers, number, each, random)
        segments = bank._catalog.segment_bytes() / FIRST
        bank._catalog.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        own = bank._catalog.own_bytes() / FIRST
    return int(spans * (segments + own))


def main() -> None:
    """Write the week and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", type=int, default=10_000, help="of all streams together")
    parser.add_argument("--share", type=float, default=0.1, help="of the whole that the limit holds")
    parser.add_argument("--folder", type=Path, default=None, help="where; default: the system's temporary folder")
    parser.add_argument("--unsynced", action="store_true", help="do not wait for the disk")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    each = Fraction(WEEK * STREAMS, asked.spans)
    base = Path(tempfile.mkdtemp(prefix="week-", dir=asked.folder))
    if asked.unsynced:
        os.fsync = lambda fd: None
    try:
        whole = needed(base / "first", asked.spans, each)
        limit = max(int(whole * asked.share), 3 << 20)
        random = torch.Generator().manual_seed(1)
        folder = base / "memory"
        checks, above, above_blocks, most, most_blocks = 0, 0, 0, 0, 0
        memory: list[int] = []
        every = max(1, asked.spans // 200)
        print(f"{asked.spans} spans of {float(each):.1f} s, about {whole / 1e6:.1f} MB; limit {limit / 1e6:.1f} MB")
        print(f"{'spans':>9} {'files MB':>9} {'blocks MB':>9} {'RSS MB':>8} {'held':>8} {'a second':>9}")
        with Bank.open(folder, limits=Limits(disk_bytes=limit)) as bank, ExitStack() as stack:
            if asked.unsynced:
                bank._catalog.execute("PRAGMA synchronous = OFF")
            writers = [stack.enter_context(bank.writer(key(n), path=f"cam{n}", name=f"cam{n}")) for n in range(STREAMS)]
            began = time.perf_counter()
            for number in range(asked.spans):
                append(writers, number, each, random)
                if number % every == every - 1:
                    files, blocks = sizes(folder)
                    checks += 1
                    above += files > limit
                    above_blocks += blocks > limit
                    most, most_blocks = max(most, files), max(most_blocks, blocks)
                    memory.append(rss())
                    if number % (every * 20) == every * 20 - 1:
                        held = sum(load.spans for load in bank._catalog.loads())
                        rate = (number + 1) / (time.perf_counter() - began)
                        print(
                            f"{number + 1:9d} {files / 1e6:9.1f} {blocks / 1e6:9.1f} {memory[-1] / 1e6:8.1f} "
                            f"{held:8d} {rate:9.0f}",
                            flush=True,
                        )
            seconds = time.perf_counter() - began
            octaves: Counter[int] = Counter()
            expired = 0
            for source in bank.sources():
                expired += sum(gone.spans for gone in bank.expired(source.id))
                for row in bank._catalog.execute("SELECT start_seconds FROM spans WHERE source_id = ?", source.id):
                    octaves[math.floor(math.log2(max(1.0, (WEEK - row[0]) / float(each))))] += 1
        print("\nspans by age (in spans of the stream, doubling):")
        for octave in sorted(octaves):
            print(f"  {2**octave:8d} to {2 ** (octave + 1):8d}: {octaves[octave]:7d}")
        quarter = memory[len(memory) // 4]
        print(f"RSS: first {memory[0] / 1e6:.1f}, a quarter in {quarter / 1e6:.1f}, last {memory[-1] / 1e6:.1f} MB")
        told = {
            "spans": asked.spans,
            "limit_bytes": limit,
            "most_bytes": most,
            "most_block_bytes": most_blocks,
            "checks": checks,
            "above": above,
            "above_blocks": above_blocks,
            "rss_first": memory[0],
            "rss_quarter": quarter,
            "rss_last": memory[-1],
            "rss_peak": max(memory),
            "held": sum(octaves.values()),
            "expired_spans": expired,
            "by_age": {2**octave: octaves[octave] for octave in sorted(octaves)},
            "seconds": round(seconds, 1),
            "appends_per_second": round(asked.spans / seconds, 1),
            "synced": not asked.unsynced,
        }
        print(json.dumps(told))
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
