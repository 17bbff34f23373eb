"""What survives kills, power cuts, full disks, other processes, older formats and clocks that run backwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from streamvid.errors import BankError
from streamvid.memory import catalog as catalog_module
from streamvid.memory import segments
from streamvid.memory.bank import Bank
from streamvid.memory.catalog import Catalog
from streamvid.memory.compact import compact
from streamvid.memory.schema import APPLICATION_ID, FILE_NAME, MIGRATIONS
from streamvid.memory.transfer import merge
from streamvid.memory.verify import verify
from tests.memory.spans import KEY, append, assert_same, source_key, span_keys, span_times, span_tokens, store

ROOT = Path(__file__).parents[2]


def opened(folder: Path, **settings: Any) -> Bank:
    return Bank.open(folder, codec="fp16", **settings)


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *(str(a) for a in arguments)]


def whole(folder: Path, *, least: int, most: int) -> int:
    """Opens, verifies without repair, and every span is the one that was written; returns how many."""
    with opened(folder) as bank:
        assert verify(bank).problems == []
        source = bank.find(KEY)
        spans = bank.spans(source.id) if source is not None else []
        assert least <= len(spans) <= most
        for number, span in enumerate(spans):
            assert (span.start, span.stop) == span_times(number)
            assert_same(bank.read([(span, span.tokens)])[0], span_tokens(number, count=span.tokens))
        return len(spans)


@pytest.mark.slow
def test_a_writer_killed_200_times_at_random_loses_nothing_it_promised(tmp_path: Path) -> None:
    """After each kill: opens, verifies, goes on; what is finished is byte for byte the file of an unbroken run."""
    command = [sys.executable, "-m", "tests.memory.ingest_process", str(tmp_path), "200", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=170)
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["kills"] >= 200 and found["finished"] >= 5


@dataclass(frozen=True)
class Moment:
    """What a power cut at this moment could leave on the disk."""

    promised: int
    synced: dict[str, bytes]
    """Of segment files, what is certain."""

    seen: dict[str, bytes]
    """Of segment files, what programs see."""

    named: frozenset[str]
    """Files whose names are certain."""

    catalogue: dict[str, bytes]

    def disks(self) -> Iterator[dict[str, bytes]]:
        """Writes that were not synced lost, arrived, torn, or with their size only."""
        for way in ("lost", "arrived", "torn", "zeros"):
            files = dict(self.catalogue)
            for name, data in self.seen.items():
                old = self.synced.get(name, b"")
                new = {
                    "lost": old,
                    "arrived": data,
                    "torn": data[: len(old) + max(0, len(data) - len(old)) // 2],
                    "zeros": data[: len(old)] + bytes(max(0, len(data) - len(old))),
                }[way]
                if name in self.named or way != "lost":
                    files[name] = new
            yield files


class Recorder:
    """Stands between the segments and the system, and notes every moment at which the power may go."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.promised = 0
        self.moments: list[Moment] = []
        self._synced: dict[str, bytes] = {}
        self._named: set[str] = set()
        for name in ("pwrite", "fsync", "ftruncate"):
            patch.setattr(os, name, self._between(name, getattr(os, name)))
        real_add = Catalog.add_span

        def add(catalog: Catalog, *args: Any, **kwargs: Any) -> None:
            self.note()
            before = self._catalogue()
            real_add(catalog, *args, **kwargs)
            after = self._catalogue()
            log = f"{FILE_NAME}-wal"
            if before[FILE_NAME] == after[FILE_NAME] and len(after[log]) > len(before.get(log, b"")):
                for size in range(len(before.get(log, b"")), len(after[log]), 997):
                    self.note(after | {log: after[log][:size]})
            self.note()

        patch.setattr(Catalog, "add_span", add)

    def note(self, catalogue: dict[str, bytes] | None = None) -> None:
        seen = {str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*.seg")}
        self.moments.append(
            Moment(
                self.promised,
                dict(self._synced),
                seen,
                frozenset(self._named),
                self._catalogue() if catalogue is None else catalogue,
            )
        )

    def _between(self, name: str, real: Any) -> Any:
        def call(fd: int, *args: Any) -> Any:
            self.note()
            result = real(fd, *args)
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if name == "fsync" and path.is_relative_to(self.folder):
                if path.is_dir():
                    self._named |= {str(p.relative_to(self.folder)) for p in path.rglob("*.seg")}
                else:
                    self._synced[str(path.relative_to(self.folder))] = path.read_bytes()
            self.note()
            return result

        return call

    def _catalogue(self) -> dict[str, bytes]:
        names = (FILE_NAME, f"{FILE_NAME}-wal")
        return {name: (self.folder / name).read_bytes() for name in names if (self.folder / name).exists()}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know what is synced")
def test_a_power_cut_at_any_moment_loses_nothing_that_was_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own writes are seen as they stand on the disk, with the log cut anywhere within a commit.

    Each disk that could be found afterwards opens, verifies without repair, and holds what ``append`` had
    returned for, and at most one span more.
    """
    folder = tmp_path / "m"
    with monkeypatch.context() as patch:
        recorder = Recorder(folder, patch)
        with opened(folder, segment_bytes=2500) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
            for number in range(5):
                start, stop = span_times(number)
                writer.append(span_tokens(number, count=4), start=start, stop=stop, keys=span_keys(number))
                recorder.promised = number + 1
                recorder.note()
    assert len(list(folder.rglob("*.seg"))) > 1
    moments = [m for m in recorder.moments if m.catalogue]
    assert len(moments) > 40
    tried: set[tuple[tuple[str, bytes], ...]] = set()
    counts = set()
    for moment in moments:
        for files in moment.disks():
            state = (*sorted(files.items()), ("promised", bytes([moment.promised])))
            if state in tried:
                continue
            tried.add(state)
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            for name, data in files.items():
                (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "c" / name).write_bytes(data)
            counts.add(whole(tmp_path / "c", least=moment.promised, most=moment.promised + 1))
    assert counts == set(range(6)) and len(tried) > 60


def test_what_is_not_synced_before_the_catalogue_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: without the sync of the segment a power cut leaves a row without its span."""
    folder = tmp_path / "m"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        recorder = Recorder(folder, patch)
        recorder._synced.clear()
        patch.setattr(os, "fsync", lambda fd: None)
        with opened(folder) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
            append(writer, 0)
            recorder.note()
    [lost, *_] = recorder.moments[-1].disks()
    for name, data in lost.items():
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_bytes(data)
    with opened(tmp_path / "c") as bank:
        assert verify(bank).num_problems == 1


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_keeps_all_that_was_stored(mounted: Path) -> None:
    folder = mounted / "m"
    stored = 0
    with opened(folder) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
        with pytest.raises(BankError, match="the disk is full; free some space") as caught:
            for stored in range(1000):
                append(writer, stored)
        assert "\n" not in str(caught.value) and stored > 10
    with opened(folder, read_only=True) as bank:
        assert verify(bank).problems == []
        source = bank.find(KEY)
        assert source is not None and source.spans == stored
    subprocess.run(["mount", "-o", "remount,size=4m", str(mounted)], check=True)
    with opened(folder) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
        assert writer.stop == span_times(stored - 1)[1]
        append(writer, stored)
        writer.finish({})
    whole(folder, least=stored + 1, most=stored + 1)


def test_a_disk_that_takes_less_and_less_never_tears_a_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write and sync in turn is the first that the disk refuses; a write before takes a part only."""
    real_write, real_sync = os.pwrite, os.fsync
    left = 0

    def write(fd: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(fd, bytes(data)[: max(1, len(data) * 2 // 3)], offset)

    def sync(fd: int) -> None:
        if left <= 0:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real_sync(fd)

    for refused in range(12):
        folder = tmp_path / str(refused)
        left = refused
        stored = 0
        with opened(folder) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", write)
                patch.setattr(os, "fsync", sync)
                with pytest.raises(BankError, match="the disk is full"):
                    for stored in range(9):
                        append(writer, stored)
            append(writer, stored)
        whole(folder, least=stored + 1, most=stored + 1)


def test_a_full_disk_under_the_catalogue_is_one_clear_line(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        store(bank, KEY, range(2))
        bank._catalog._db.execute("PRAGMA max_page_count = 1")
        with pytest.raises(BankError, match="cannot grow: the disk is full"):
            for _ in range(99):
                bank.save_answer(1, question="q" * 4096, answer="a", receipt={})
        assert verify(bank).problems == []


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom streamvid.memory.bank import Bank\n"
        "from tests.memory.spans import KEY\n"
        "try:\n    Bank.open(Path(sys.argv[1])).writer(KEY, path='a', name='a.mp4').__enter__()\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    with opened(tmp_path) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
        append(writer, 0)
        done = subprocess.run(python(code, tmp_path), cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"BankError a.mp4 is being written by process {os.getpid()}; wait" in done.stdout
        append(writer, 1)
    whole(tmp_path, least=2, most=2)


def test_1000_reads_while_another_process_writes_are_never_torn(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom streamvid.memory.bank import Bank\n"
        "from tests.memory.spans import KEY, store\n"
        "with Bank.open(Path(sys.argv[1]), codec='fp16', segment_bytes=100_000) as bank:\n"
        "    store(bank, KEY, range(150))\n"
    )
    with opened(tmp_path) as bank, subprocess.Popen(python(code, tmp_path), cwd=ROOT) as process:
        reads, seen, source = 0, set(), None
        while reads < 1000:
            source = source or bank.find(KEY)
            spans = bank.spans(source.id) if source is not None else []
            assert spans or process.poll() is None
            time.sleep(0.0005)  # a reader that never rests may keep the writer from its processor
            seen.add(len(spans))
            for number in {len(spans) - 1, reads % max(1, len(spans))} if spans else ():
                assert_same(bank.read([(spans[number], 100)])[0], span_tokens(number))
                reads += 1
        assert process.wait(timeout=60) == 0
    assert len(seen) > 5
    whole(tmp_path, least=150, most=150)


def as_version_1(folder: Path) -> None:
    """The same rows in a catalogue of the first format, as the first release wrote it."""
    path = folder / FILE_NAME
    old = sqlite3.connect(folder / "old", isolation_level=None)
    for statement in MIGRATIONS[0]:
        old.execute(statement)
    old.execute("ATTACH ? AS new", (str(path),))
    for table in ("sources", "spans", "keys", "answers", "digests"):
        columns = ", ".join(row[1] for row in old.execute(f"PRAGMA main.table_info({table})"))
        old.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}")
    old.execute("DETACH new")
    old.execute("CREATE TABLE migrations (version INTEGER PRIMARY KEY, applied TEXT NOT NULL)")
    old.execute("INSERT INTO migrations VALUES (1, '2020-01-01T00:00:00+00:00')")
    old.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    old.execute("PRAGMA user_version = 1")
    old.execute("PRAGMA journal_mode = WAL")
    old.close()
    for name in (f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"):
        (folder / name).unlink(missing_ok=True)
    os.replace(folder / "old", path)


def test_a_memory_of_the_first_format_is_taken_over_with_all_its_data(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(3))
        bank.save_answer(source_id, question="q", answer="a", receipt={"x": 1})
    as_version_1(tmp_path)
    old = (tmp_path / FILE_NAME).read_bytes()
    with opened(tmp_path, read_only=True) as bank:
        assert "older format" in bank.notes[0]
        assert [a.question for a in bank.answers(source_id)] == ["q"]
        assert len(bank.spans(source_id)) == 3
    assert (tmp_path / FILE_NAME).read_bytes() == old
    whole(tmp_path, least=3, most=3)
    with opened(tmp_path) as bank:
        source = bank.source(source_id)
        assert (source.pinned, bank.gaps(source_id), [s.level for s in bank.spans(source_id)]) == (False, [], [0] * 3)
        assert [(a.question, a.receipt) for a in bank.answers(source_id)] == [("q", {"x": 1})]
        applied = bank._catalog._rows("SELECT version, applied FROM migrations ORDER BY version")
        assert [row["version"] for row in applied] == list(range(1, len(MIGRATIONS) + 1))
        assert applied[0]["applied"].startswith("2020")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_memory_is_refused_with_not_a_byte_changed(tmp_path: Path, read_only: bool) -> None:
    with opened(tmp_path) as bank:
        store(bank, KEY, range(2))
    db = sqlite3.connect(tmp_path / FILE_NAME)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(BankError, match="newer streamvid"):
        opened(tmp_path, read_only=read_only)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def leave_log(folder: Path, *, numbers: str = "range(3)") -> None:
    """A writer that dies with its last commits in the log."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom streamvid.memory.bank import Bank\n"
        "from tests.memory.spans import KEY, append\n"
        "bank = Bank.open(Path(sys.argv[1]), codec='fp16')\n"
        "writer = bank.writer(KEY, path='a', name='a.mp4').__enter__()\n"
        f"for number in {numbers}:\n    append(writer, number)\nos._exit(0)\n"
    )
    subprocess.run(python(code, folder), cwd=ROOT, check=True)
    assert (folder / f"{FILE_NAME}-wal").stat().st_size


@pytest.mark.parametrize("log", ["log", "log without its index", "no log"])
def test_a_read_only_mount_is_read_with_all_that_is_in_the_log(mounted: Path, log: str) -> None:
    folder = mounted / "m"
    leave_log(folder)
    if log == "no log":
        opened(folder).close()
        assert not (folder / f"{FILE_NAME}-wal").exists()
    elif log == "log without its index":
        (folder / f"{FILE_NAME}-shm").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with opened(folder) as bank:
        assert bank.read_only and "cannot be written" in bank.notes[0]
        source = bank.find(KEY)
        assert source is not None and source.spans == 3
        assert_same(bank.read([(bank.spans(source.id)[2], 100)])[0], span_tokens(2))
        assert verify(bank).problems == []
        for change in (
            lambda: bank.save_answer(source.id, question="q", answer="a", receipt={}),
            lambda: bank.remove(source.id),
            lambda: bank.pin(source.id),
            lambda: bank.writer(KEY, path="a", name="a").__enter__(),
            lambda: compact(bank),
        ):
            with pytest.raises(BankError, match="open for reading only") as caught:
                change()
            assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_reading_only_sees_what_a_writer_stores_meanwhile(tmp_path: Path) -> None:
    with opened(tmp_path) as bank, bank.writer(KEY, path="a", name="a") as writer:
        append(writer, 0)
        with opened(tmp_path, read_only=True) as reader:
            append(writer, 1)
            assert len(reader.spans(writer.source_id)) == 2


def test_nothing_depends_on_the_order_of_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stamp lies an hour before the one before it."""
    now = datetime(2030, 1, 1, tzinfo=UTC)

    def back() -> str:
        nonlocal now
        now -= timedelta(hours=1)
        return now.isoformat()

    monkeypatch.setattr(catalog_module, "now", back)
    with opened(tmp_path / "m") as bank:
        first = store(bank, KEY, range(2))
        with bank.writer(source_key("b"), path="b", name="b.mp4") as writer:
            append(writer, 0)
        with bank.writer(source_key("b"), path="b", name="b.mp4") as writer:
            assert writer.stop == span_times(0)[1]
            append(writer, 1)
        for number in range(3):
            bank.save_answer(first, question=str(number), answer="a", receipt={})
        sources = bank.sources()
        assert sources[0].created > sources[1].created
        assert [s.name for s in sources] == ["a.mp4", "b.mp4"]
        assert [a.question for a in bank.answers(first)] == ["0", "1", "2"]
        assert [s.start for s in bank.spans(sources[1].id)] == [span_times(n)[0] for n in range(2)]
        compact(bank)
        with opened(tmp_path / "to") as other:
            merge(other, bank)
            assert [(s.name, s.created) for s in other.sources()] == [(s.name, s.created) for s in sources]
            assert verify(other).problems == []


def test_segment_names_are_synced_before_a_span_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = segments.sync_folder
    monkeypatch.setattr(segments, "sync_folder", lambda folder: (synced.append(folder), real(folder)))
    with opened(tmp_path, segment_bytes=1) as bank, bank.writer(KEY, path="a", name="a") as writer:
        for number in range(3):
            before = len(synced)
            append(writer, number)
            assert number == 0 or len(synced) == before + 1
