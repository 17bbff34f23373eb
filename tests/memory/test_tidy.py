"""Limits where nobody writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import pytest

from streamvid.budget import Limits
from streamvid.errors import BankError
from streamvid.memory import bounds
from streamvid.memory.bank import Bank
from streamvid.memory.tidy import Tidied, tidy
from tests.memory.spans import KEY, source_key
from tests.memory.test_bounds import MB, check_whole, fill, on_disk, put

BEGAN = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def opened(folder: Path, **limits: float) -> Bank:
    bank = Bank.open(folder, limits=Limits(**limits))  # type: ignore[arg-type]
    bank._catalog.execute("PRAGMA synchronous = OFF")
    return bank


def say_origin(bank: Bank, source_id: int, origin: object) -> None:
    with bank._catalog.transaction():
        bank._catalog.execute("UPDATE sources SET summary = ? WHERE id = ?", json.dumps({"origin": origin}), source_id)


def statements(bank: Bank, work: Callable[[], object]) -> list[str]:
    seen: list[str] = []
    bank._catalog._db.set_trace_callback(seen.append)
    try:
        work()
    finally:
        bank._catalog._db.set_trace_callback(None)
    return seen


@pytest.mark.parametrize("done", [True, False], ids=["finished", "left"])
def test_a_source_that_nobody_writes_ages_by_the_wall_clock(tmp_path: Path, done: bool) -> None:
    with opened(tmp_path) as bank:
        source_id = fill(bank, KEY, range(100), done=done)
        say_origin(bank, source_id, "2030-01-01T02:00:00+02:00")
    with opened(tmp_path, keep_seconds=256) as bank:
        assert tidy(bank, now=BEGAN + timedelta(seconds=257)) == Tidied()
        told = tidy(bank, now=BEGAN + timedelta(seconds=300))
        assert (told.sources, told.expired_spans, told.merged_spans, told.more) == (1, 44, 0, False)
        spans = check_whole(bank, source_id, seconds=100)
        assert spans[0].start == 44 and told.freed_bytes > 0
        [gone] = bank.expired(source_id)
        assert gone.reason == "age" and gone.start == 0 and gone.stop == 44
        told = tidy(bank, now=BEGAN + timedelta(days=99))
        assert (told.expired_spans, len(bank.spans(source_id))) == (55, 1)
        assert tidy(bank, now=BEGAN + timedelta(days=100)) == Tidied()
        if not done:
            fill(bank, KEY, range(100, 120))
            check_whole(bank, source_id, seconds=120)


def test_without_an_origin_age_counts_from_the_end_of_what_is_stored(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source_id = fill(bank, KEY, range(100))
    with opened(tmp_path, keep_seconds=40) as bank:
        told = tidy(bank, now=BEGAN)
        assert told.expired_spans == 60 and bank.spans(source_id)[0].start == 60
        assert tidy(bank, now=BEGAN + timedelta(days=99)) == Tidied()


@pytest.mark.parametrize("origin", ["yesterday", "2030-01-01T00:00:00", 12])
def test_an_origin_that_cannot_be_read_is_said(tmp_path: Path, origin: object) -> None:
    with opened(tmp_path) as bank:
        source_id = fill(bank, KEY, range(30))
        say_origin(bank, source_id, origin)
    with opened(tmp_path, keep_seconds=20) as bank:
        told = tidy(bank, now=BEGAN + timedelta(days=99))
        assert told.expired_spans == 10
        [note] = told.notes
        assert repr(origin) in note and "ISO 8601 with a time zone" in note and "\n" not in note


def test_a_clock_before_the_origin_expires_no_more_than_the_video_itself(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        say_origin(bank, fill(bank, KEY, range(30)), BEGAN.isoformat())
    with opened(tmp_path, keep_seconds=20) as bank:
        assert tidy(bank, now=BEGAN - timedelta(days=99)).expired_spans == 10


def test_pinned_and_written_sources_are_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        kept, free = fill(bank, source_key("kept"), range(60)), fill(bank, source_key("free"), range(60))
        bank.pin(kept)
    limits = {"keep_seconds": 20, "source_tokens": 100, "source_bytes": 8000}
    with opened(tmp_path) as other, other.writer(KEY, path="w", name="w") as writer:
        for number in range(60):
            put(writer, number)
        with opened(tmp_path, **limits) as bank:
            told = tidy(bank)
            assert told.sources == 1 and not told.notes
            written = writer.source_id
            assert len(bank.spans(kept)) == len(bank.spans(written)) == 60
            assert 1 <= len(bank.spans(free)) <= 20
        put(writer, 60)
    with opened(tmp_path, **limits) as bank:
        assert tidy(bank).sources == 1
        assert len(bank.spans(kept)) == 60
        check_whole(bank, free, seconds=60)
        check_whole(bank, written, seconds=61)


@pytest.mark.parametrize("limits", [{"source_tokens": 400}, {"source_bytes": 40_000}])
def test_limits_of_a_source_are_reached_in_bounded_steps(tmp_path: Path, limits: dict[str, float]) -> None:
    with opened(tmp_path) as bank:
        source_id = fill(bank, KEY, range(200))
        first = bank.source(source_id)
    with opened(tmp_path, **limits) as bank:
        told = tidy(bank, steps=1)
        assert told.more and 0 < told.merged_spans + told.expired_spans <= 2 * bounds.BATCH
        merged, calls = told.merged_spans, 1
        while told.more:
            told = tidy(bank, steps=1)
            merged += told.merged_spans
            calls += 1
        now = bank.source(source_id)
        assert now.tokens <= limits.get("source_tokens", first.tokens)
        assert now.num_bytes <= limits.get("source_bytes", first.num_bytes)
        assert calls > 2 and merged > 50
        spans = check_whole(bank, source_id, seconds=200)
        gone = sum(row.spans for row in bank.expired(source_id))
        assert spans[0].start == (bank.expired(source_id)[-1].stop if gone else 0)
        assert tidy(bank) == Tidied()


def test_a_folder_above_its_limit_comes_below_it(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        ids = [fill(bank, source_key(str(n)), range(500)) for n in range(3)]
        bank.pin(ids[1])
        (tmp_path / "kv").mkdir()
        (tmp_path / "kv" / "x.safetensors").write_bytes(bytes(MB))
        before = bank.usage()
    limit = before - MB - MB // 3
    with opened(tmp_path, disk_bytes=limit) as bank:
        told = tidy(bank)
        freed = told.freed_bytes
        while told.more:
            told = tidy(bank)
            freed += told.freed_bytes
        assert on_disk(tmp_path) <= limit and told.notes == []
        assert freed > MB and not any((tmp_path / "kv").iterdir())
        assert len(bank.spans(ids[1])) == 500
        for source_id in ids:
            check_whole(bank, source_id, seconds=500)
        assert sum(len(bank.spans(i)) for i in ids) < 1500
        assert tidy(bank) == Tidied()


def test_what_cannot_be_brought_below_is_one_line(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        bank.pin(fill(bank, source_key("kept"), range(200)))
        fill(bank, KEY, range(1))
    limit = 100_000
    with opened(tmp_path, disk_bytes=limit, source_tokens=5) as bank:
        told = tidy(bank)
        assert (told.expired_spans, told.merged_spans, told.more) == (0, 0, False)
        assert any("may remember 5 tokens and its last span has 8" in note for note in told.notes)
        assert any(f"may hold {limit} bytes" in note for note in told.notes)
        assert not any("\n" in note for note in told.notes)


@pytest.mark.parametrize("sources", [1, 40])
def test_nothing_to_do_is_five_statements_and_no_lock_however_many_sources(
    tmp_path: Path, sources: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as bank:
        for number in range(sources):
            say_origin(bank, fill(bank, source_key(f"{number:06d}"), range(3)), BEGAN.isoformat())
    limits = {"keep_seconds": 100, "source_tokens": 1000, "source_bytes": MB, "disk_bytes": 100 * MB}
    with opened(tmp_path, **limits) as bank:
        monkeypatch.setattr(bank, "_locked", lambda *_: pytest.fail("a lock was taken"))
        seen = statements(bank, lambda: tidy(bank, now=BEGAN + timedelta(seconds=50)))
        assert len(seen) <= 5 and all(one.startswith("SELECT") for one in seen), seen
    with opened(tmp_path) as bank:
        assert statements(bank, lambda: tidy(bank)) == []


def test_the_oldest_span_is_found_without_a_walk(tmp_path: Path) -> None:
    """Steps of SQLite's machine do not rise with the number of spans."""

    def steps(folder: Path, spans: int) -> int:
        with opened(folder) as bank:
            fill(bank, KEY, range(spans))
        with opened(folder, keep_seconds=10**6) as bank:
            count = 0

            def step() -> int:
                nonlocal count
                count += 1
                return 0

            bank._catalog._db.set_progress_handler(step, 1)
            tidy(bank, now=BEGAN)
            bank._catalog._db.set_progress_handler(None, 0)
            return count

    assert steps(tmp_path / "many", 300) == steps(tmp_path / "few", 10)


def test_what_cannot_be_tidied_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        fill(bank, KEY, range(2))
        with pytest.raises(ValueError, match="must have a time zone"):
            tidy(bank, now=datetime(2030, 1, 1))
        with pytest.raises(ValueError, match="at least 1"):
            tidy(bank, steps=0)
    with (
        Bank.open(tmp_path, limits=Limits(keep_seconds=1), read_only=True) as bank,
        pytest.raises(BankError, match="open for reading only"),
    ):
        tidy(bank)


def test_a_full_disk_is_one_line_and_memory_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as bank:
        source_id = fill(bank, KEY, range(100))
    with opened(tmp_path, source_tokens=400) as bank:
        with monkeypatch.context() as patch:

            def full(*_: object) -> int:
                raise OSError(28, "No space left on device")

            patch.setattr(os, "pwrite", full)
            with pytest.raises(BankError, match="No space left on device; what was done") as caught:
                tidy(bank)
            assert "\n" not in str(caught.value)
        check_whole(bank, source_id, seconds=100)
        assert tidy(bank).merged_spans > 0
        check_whole(bank, source_id, seconds=100)


def test_ages_are_exact(tmp_path: Path) -> None:
    """A microsecond decides: spans stop at whole seconds."""
    with opened(tmp_path) as bank:
        source_id = fill(bank, KEY, range(10))
        say_origin(bank, source_id, BEGAN.isoformat())
    with opened(tmp_path, keep_seconds=256) as bank:
        assert tidy(bank, now=BEGAN + timedelta(seconds=258, microseconds=-1)) == Tidied()
        assert tidy(bank, now=BEGAN + timedelta(seconds=258)).expired_spans == 2
        assert bank.spans(source_id)[0].start == Fraction(2)
