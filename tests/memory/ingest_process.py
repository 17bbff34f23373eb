"""Processes that write while others read, or are killed: ``python -m tests.memory.ingest_process FOLDER``.

First a whole source is ingested into ``FOLDER/live``, for the test to read meanwhile.  Then, for each way
to die, a child ingests into a memory of its own and is killed by SIGKILL there; one JSON line per child
says the folder and how many spans had been appended.

``python -m tests.memory.ingest_process FOLDER KILLS SEED``: a writer is killed at so many random moments, each
time looked after, and the next goes on; one JSON line says what was found.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from streamvid.memory import segments
from streamvid.memory.bank import Bank
from streamvid.memory.catalog import Catalog
from streamvid.memory.records import State
from streamvid.memory.verify import verify
from tests.memory.spans import KEY, append, span_times, store

SPANS = 5
LIVE_SPANS = 60
RANDOM_SPANS = 24

WAYS = ("mid_write", "written", "synced", "in_transaction", "committed")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ingest(folder: Path, way: str, at: int) -> None:
    """Append spans and die around span ``at`` (0-based)."""
    real_write, real_add = segments.write_at, Catalog.add_span
    count = 0

    def write(fd: int, data: bytes, offset: int) -> None:
        if count == at and way == "mid_write":
            real_write(fd, data[: len(data) // 2], offset)
            die()
        real_write(fd, data, offset)
        if count == at and way == "written":
            die()

    def add(self: Catalog, *args: object, **kwargs: object) -> None:
        if count == at and way == "synced":
            die()
        if count == at and way == "in_transaction":
            self._db.set_trace_callback(lambda sql: die() if sql == "COMMIT" else None)
        real_add(self, *args, **kwargs)
        if count == at and way == "committed":
            die()

    segments.write_at, Catalog.add_span = write, add  # type: ignore[assignment, method-assign]
    with (
        Bank.open(folder, codec="fp16", segment_bytes=20_000) as bank,
        bank.writer(KEY, path="v", name="a.mp4") as writer,
    ):
        for count in range(SPANS):
            append(writer, count)


def write_on(folder: Path, acknowledge: int) -> None:
    """Append what is missing of `RANDOM_SPANS`; a byte to ``acknowledge`` when an append has returned."""
    with Bank.open(folder, codec="fp16", segment_bytes=20_000) as bank:
        with bank.writer(KEY, path="/v/a.mp4", name="a.mp4") as writer:
            done = 0 if writer.stop is None else [span_times(n)[1] for n in range(RANDOM_SPANS)].index(writer.stop) + 1
            for number in range(done, RANDOM_SPANS):
                append(writer, number)
                os.write(acknowledge, b"x")
            writer.finish({})


def looked_after(folder: Path, promised: int) -> tuple[int, list[str]]:
    """How many spans there are, and everything that is not as it should be."""
    with Bank.open(folder, codec="fp16") as bank:
        source = bank.find(KEY)
        seen = verify(bank)
        wrong = [p.text for p in seen.problems]
        spans = bank.spans(source.id) if source is not None else []
        if not promised <= len(spans) <= promised + 1:
            wrong.append(f"{promised} spans were promised and {len(spans)} are there")
        if [(s.start, s.stop) for s in spans] != [span_times(n) for n in range(len(spans))]:
            wrong.append("times are not as written")
        if spans:
            bank.read([(spans[-1], spans[-1].tokens)])
        return len(spans), wrong


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "segments").rglob("*.seg"))}


def kill_at_random(base: Path, kills: int, seed: int) -> dict[str, object]:
    torch.set_num_threads(1)
    choose = random.Random(seed)
    null = os.open(os.devnull, os.O_WRONLY)
    began = time.monotonic()
    write_on(base / "whole", null)
    took = time.monotonic() - began
    whole = files(base / "whole")
    wrong: list[str] = []
    killed = finished = unpromised = run = 0
    stored = 0
    while killed < kills:
        folder = base / str(run)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            write_on(folder, write)
            os._exit(0)
        os.close(write)
        time.sleep(choose.uniform(0, took / 2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            promised = stored + len(pipe.read())
        killed += os.WIFSIGNALED(status)
        stored, found = looked_after(folder, promised)
        unpromised += stored - promised
        wrong += found
        if not os.WIFSIGNALED(status) or stored == RANDOM_SPANS:
            if os.WIFSIGNALED(status):
                with Bank.open(folder) as bank:
                    source = bank.find(KEY)
                    done = source is not None and source.state is State.COMPLETE
                if not done:
                    write_on(folder, null)
            if files(folder) != whole:
                wrong.append(f"{folder}: not the same as written without a break")
            finished, run, stored = finished + 1, run + 1, 0
    return {"kills": killed, "finished": finished, "unpromised": unpromised, "wrong": wrong}


def main() -> None:
    base = Path(sys.argv[1])
    if len(sys.argv) > 2:
        print(json.dumps(kill_at_random(base, int(sys.argv[2]), int(sys.argv[3]))))
        return
    with Bank.open(base / "live", codec="fp16") as bank:
        store(bank, KEY, range(LIVE_SPANS))
    for way in WAYS:
        for at in (0, 3):
            folder = base / f"{way}-{at}"
            child = os.fork()
            if not child:
                ingest(folder, way, at)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)
            print(json.dumps({"folder": str(folder), "stored": at + (way == "committed"), "killed": killed}))


if __name__ == "__main__":
    main()
