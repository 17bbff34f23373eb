"""The power goes while memory is made smaller: at every write, sync, deletion and commit, and what was kept is whole.

A writer of one source lives with limits that make it merge, expire, rewrite half-dead files and give back pages
all the time, in its own source and in a finished one.  At each moment every disk that could be found afterwards
is opened, verified without repair, read, and written on.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from streamvid.budget import Limits
from streamvid.memory import bounds, database
from streamvid.memory.bank import Bank
from streamvid.memory.catalog import Catalog
from streamvid.memory.keys import MemoryKey
from streamvid.memory.schema import FILE_NAME
from streamvid.memory.verify import verify
from tests.memory.spans import KEY, source_key
from tests.memory.test_bounds import fill, put

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know what is synced")

ROOT = Path(__file__).parents[2]
OTHER = source_key("other")
SPANS = 30
"""Of the finished source."""

PAGE = 4096
COMMITS = ("add_span", "merge_spans", "expire_spans", "move_spans", "set_bytes")
LIMITS = Limits(source_bytes=15_000, keep_seconds=14, disk_bytes=26_000)


def opened(folder: Path, limits: Limits | None = None) -> Bank:
    return Bank.open(folder, codec="fp16", limits=limits, segment_bytes=3000)


def covered(bank: Bank, key: MemoryKey) -> int:
    """Where a source ends, in seconds; what is expired and what is held lie one after the other from 0 on."""
    source = bank.find(key)
    if source is None:
        return 0
    spans, gone = bank.spans(source.id), bank.expired(source.id)
    ends = [(row.start, row.stop) for row in gone] + [(span.start, span.stop) for span in spans]
    assert [start for start, _ in ends] == [Fraction(0), *(stop for _, stop in ends[:-1])][: len(ends)]
    for span, tokens in zip(spans, bank.read([(span, span.tokens) for span in spans]), strict=True):
        assert float(tokens.size.sum()) == 8 * float(span.stop - span.start)
        assert float(tokens.pts_seconds.min()) == span.start
    assert (source.spans, source.tokens) == (len(spans), sum(span.tokens for span in spans))
    return int(ends[-1][1]) if ends else 0


def check(folder: Path, promised: int) -> int:
    """Opens, verifies, is read and goes on; returns how many seconds of the writer's source are there."""
    with opened(folder) as bank:
        assert verify(bank).problems == []
        stored = covered(bank, KEY)
        assert promised <= stored <= promised + 1
        assert covered(bank, OTHER) == SPANS
    with opened(folder, LIMITS) as bank:
        source_id = fill(bank, KEY, range(stored, stored + 2), done=False)
        assert covered(bank, KEY) == stored + 2 and covered(bank, OTHER) == SPANS
        source = bank.source(source_id)
        left = {path.name: path.stat().st_size for path in (folder / source.folder).glob("*.seg")}
        assert set(left) == {span.file for span in bank.spans(source_id)} and sum(left.values()) == source.num_bytes
    return stored


class Disk:
    """Stands between memory and the system and tries every disk that a power cut could leave.

    Args:
        folder: of the memory.
        scratch: where disks are made up.
        every: of how many different disks one is tried.
    """

    def __init__(self, folder: Path, scratch: Path, patch: pytest.MonkeyPatch, *, every: int) -> None:
        self.folder, self.scratch, self.every = folder, scratch, every
        self.promised = 0
        self.tried, self.kinds = 0, dict.fromkeys(("fsync", "pwrite", "ftruncate", "unlink", "open", *COMMITS), 0)
        self.stored: set[int] = set()
        self._states: set[bytes] = set()
        self._busy = False
        self._synced: dict[str, bytes] = {}
        self._named: set[str] = set()
        self._ghosts: dict[str, bytes] = {}
        """Deleted files whose deletion is not certain."""
        for path in folder.rglob("*.seg"):
            self._synced[self._name(path)] = path.read_bytes()
            self._named.add(self._name(path))
        patch.setattr(os, "fsync", lambda fd: None)  # the power is cut here only
        for name in ("pwrite", "fsync", "ftruncate", "open", "unlink"):
            patch.setattr(os, name, self._between(name, getattr(os, name)))
        for name in COMMITS:
            patch.setattr(Catalog, name, self._commit(name, getattr(Catalog, name)))
        real = Catalog.give_back

        def give_back(catalog: Catalog, **named: Any) -> None:
            real(catalog, **named)
            catalog.execute("PRAGMA incremental_vacuum(2)").fetchall()
            self.cut()

        patch.setattr(Catalog, "give_back", give_back)

    def cut(self, catalogue: dict[str, bytes] | None = None) -> None:
        """The power goes now."""
        if self._busy:
            return
        seen = {self._name(path): path.read_bytes() for path in self.folder.rglob("*.seg")}
        for files in self._disks(seen):
            files |= self._catalogue() if catalogue is None else catalogue
            told = hashlib.blake2b(str((self.promised, [(n, len(files[n])) for n in sorted(files)])).encode())
            for name in sorted(files):
                told.update(files[name])
            state = told.digest()
            if state in self._states:
                continue
            self._states.add(state)
            if len(self._states) % self.every:
                continue
            self._try(files)

    def _try(self, files: dict[str, bytes]) -> None:
        self._busy = True
        try:
            shutil.rmtree(self.scratch, ignore_errors=True)
            for name, data in files.items():
                (self.scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (self.scratch / name).write_bytes(data)
            self.stored.add(check(self.scratch, self.promised) - self.promised)
            self.tried += 1
        finally:
            self._busy = False

    def _disks(self, seen: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
        """What was not synced is lost, arrived, torn, or has its size only; deletions did not or did happen."""
        for way in ("lost", "arrived", "torn", "zeros"):
            files = dict(self._ghosts) if way in ("lost", "torn") else {}
            for name, data in seen.items():
                old = self._synced.get(name, b"")
                new = {
                    "lost": old,
                    "arrived": data,
                    "torn": data[: len(old) + max(0, len(data) - len(old)) // 2],
                    "zeros": data[: len(old)] + bytes(max(0, len(data) - len(old))),
                }[way]
                if name in self._named or way != "lost":
                    files[name] = new
            yield files

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def _catalogue(self) -> dict[str, bytes]:
        names = (FILE_NAME, f"{FILE_NAME}-wal")
        return {name: (self.folder / name).read_bytes() for name in names if (self.folder / name).exists()}

    def _between(self, name: str, real: Any) -> Any:
        def call(what: Any, *args: Any, **named: Any) -> Any:
            if self._busy:
                return real(what, *args, **named)
            path = Path(os.readlink(f"/proc/self/fd/{what}")) if isinstance(what, int) else Path(what)
            ours = path.is_relative_to(self.folder) and (path.suffix == ".seg" or path.is_dir())
            if not ours or (name == "open" and not args[0] & os.O_CREAT):
                return real(what, *args, **named)
            self.cut()
            result = real(what, *args, **named)
            self.kinds[name] += 1
            if name == "fsync" and path.is_dir():
                below = {self._name(p) for p in path.rglob("*.seg")}
                self._named |= below
                self._ghosts = {n: data for n, data in self._ghosts.items() if not (self.folder / n).parent == path}
            elif name == "fsync":
                self._synced[self._name(path)] = path.read_bytes()
            elif name == "unlink" and self._name(path) in self._synced:
                data = self._synced.pop(self._name(path))
                if self._name(path) in self._named:
                    self._ghosts[self._name(path)] = data
                    self._named.discard(self._name(path))
            self.cut()
            return result

        return call

    def _commit(self, name: str, real: Any) -> Any:
        """A commit: its log torn anywhere, then the file half folded, while the log is whole."""

        def call(*args: Any, **named: Any) -> None:
            if self._busy:
                real(*args, **named)
                return
            self.cut()
            before = self._catalogue()
            real(*args, **named)
            self.kinds[name] += 1
            after = self._catalogue()
            log = f"{FILE_NAME}-wal"
            old, new = before.get(log, b""), after.get(log, b"")
            first = len(os.path.commonprefix([old, new]))
            for size in range(first, len(new), 2999):
                self.cut(before | {log: new[:size] + old[size:]})
            if before[FILE_NAME] != after[FILE_NAME]:
                old, new = before[FILE_NAME], after[FILE_NAME]
                for size in range(PAGE, len(new), 7 * PAGE):
                    self.cut(after | {FILE_NAME: new[:size] + old[size:]})
                    self.cut(after | {FILE_NAME: old[:size] + new[size:]})
            self.cut()

        return call


def make_narrow(patch: pytest.MonkeyPatch) -> None:
    """Small files and a short log, so that a few spans are enough to make room all the time."""
    real = Catalog.__init__

    def unsynced(self: Catalog, path: Path, *, read_only: bool = False) -> None:
        real(self, path, read_only=read_only)
        self._db.execute("PRAGMA synchronous = OFF")

    patch.setattr(Catalog, "__init__", unsynced)
    patch.setattr(bounds, "SMALLEST_FILE", 3000)
    patch.setattr(bounds, "LOG_BYTES", 0)
    patch.setattr(database, "LOG_PAGES", 4)
    patch.setattr(Catalog, "growth_bytes", lambda *_: 0)
    patch.setattr(Catalog, "own_bytes", lambda _: 0)


def cut_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, every: int, appends: int) -> Disk:
    folder = tmp_path / "m"
    with monkeypatch.context() as patch:
        make_narrow(patch)
        with opened(folder) as bank:
            fill(bank, OTHER, range(SPANS))
        disk = Disk(folder, tmp_path / "c", patch, every=every)
        with opened(folder, LIMITS) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
            for number in range(appends):
                put(writer, number)
                disk.promised = number + 1
                disk.cut()
    with opened(folder) as bank:
        reasons = {row.reason for key in (KEY, OTHER) for row in bank.expired(bank.source(key.digest).id)}
    assert reasons == {"space", "age"}, (reasons, disk.kinds, disk.tried)
    assert all(disk.kinds.values()), disk.kinds
    assert disk.stored == {0, 1}
    return disk


def test_a_power_cut_while_memory_is_made_smaller_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = cut_everywhere(tmp_path, monkeypatch, every=120, appends=50)
    assert disk.tried > 20


@pytest.mark.slow
def test_a_power_cut_at_any_moment_while_memory_is_made_smaller_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = cut_everywhere(tmp_path, monkeypatch, every=4, appends=60)
    assert disk.tried > 1000


def kill_at_random(base: Path, kills: int, seed: int) -> None:
    """A writer that makes room is killed so often, each time looked after, and the next goes on; prints how often."""
    torch.set_num_threads(1)  # threads do not survive a fork
    make_narrow(pytest.MonkeyPatch())
    os.fsync = lambda fd: None  # the system lives on, and with it what it was told
    choose = random.Random(seed)
    folder, stored, killed = base / "m", 0, 0
    with opened(folder) as bank:
        fill(bank, OTHER, range(SPANS))
    while killed < kills:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            with opened(folder, LIMITS) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
                for number in range(stored, stored + 10**6):
                    put(writer, number)
                    os.write(write, b"x")
        os.close(write)
        time.sleep(choose.uniform(0.005, 0.4))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with os.fdopen(read, "rb") as pipe:
            stored = 2 + check(folder, stored + len(pipe.read()))
    with opened(folder) as bank:
        print(killed, stored, sorted({row.reason for row in bank.expired(bank.source(KEY.digest).id)}))


@pytest.mark.slow
def test_a_writer_that_makes_room_killed_60_times_at_random_loses_nothing(tmp_path: Path) -> None:
    code = f"from tests.memory.test_power_cuts import *; kill_at_random(Path({str(tmp_path)!r}), 60, 7)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    killed, stored, _ = done.stdout.split(maxsplit=2)
    assert int(killed) == 60 and int(stored) > 150 and "age" in done.stdout
