"""Processes that write while others read, or are killed: ``python -m tests.memory.ingest_process FOLDER``.

First a whole source is ingested into ``FOLDER/live``, for the test to read meanwhile.  Then, for each way
to die, a child ingests into a memory of its own and is killed by SIGKILL there; one JSON line per child
says the folder and how many spans had been appended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from streamvid.memory import segments
from streamvid.memory.bank import Bank
from streamvid.memory.catalog import Catalog
from tests.memory.spans import KEY, append, store

SPANS = 5
LIVE_SPANS = 60

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
    with Bank.open(folder, segment_bytes=20_000) as bank, bank.writer(KEY, path="/v/a.mp4", name="a.mp4") as writer:
        for count in range(SPANS):
            append(writer, count)


def main() -> None:
    base = Path(sys.argv[1])
    with Bank.open(base / "live") as bank:
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
