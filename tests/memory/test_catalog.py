from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.catalog import Catalog
from streamvid.memory.schema import FILE_NAME, MIGRATIONS
from tests.memory.spans import KEY, append, span_keys, span_times, store


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        store(bank, KEY, range(2))
    db = sqlite3.connect(tmp_path / FILE_NAME)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = snapshot(tmp_path)
    with pytest.raises(BankError, match=r"newer streamvid \(format 99") as caught:
        Bank.open(tmp_path)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_newer_version_still_in_the_log_is_refused(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        store(bank, KEY, range(1))
        db = sqlite3.connect(tmp_path / FILE_NAME)
        db.execute("PRAGMA user_version = 99")
        assert (tmp_path / FILE_NAME).read_bytes()[60:64] != (99).to_bytes(4, "big")
        with pytest.raises(BankError, match="newer streamvid"):
            Bank.open(tmp_path)
        db.close()


@pytest.mark.parametrize("mark", ["PRAGMA user_version = 1", "PRAGMA application_id = 7", "SELECT 1"])
def test_foreign_database_is_refused_with_all_its_rows(tmp_path: Path, mark: str) -> None:
    db = sqlite3.connect(tmp_path / FILE_NAME)
    db.execute("CREATE TABLE sources (x)")
    db.execute(mark)
    db.close()
    before = snapshot(tmp_path)[str(tmp_path / FILE_NAME)]
    with pytest.raises(BankError, match="another program's"):
        Bank.open(tmp_path)
    assert snapshot(tmp_path)[str(tmp_path / FILE_NAME)] == before


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("my diary " * 100)
    with pytest.raises(BankError, match="not a streamvid catalogue"):
        Bank.open(tmp_path)


def test_catalogue_left_empty_by_a_killed_process_is_made(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    with Bank.open(tmp_path) as bank:
        assert bank.sources() == []


def test_migrations_are_recorded(tmp_path: Path) -> None:
    Catalog(tmp_path / FILE_NAME).close()
    Catalog(tmp_path / FILE_NAME).close()
    db = sqlite3.connect(tmp_path / FILE_NAME)
    assert db.execute("SELECT version FROM migrations").fetchall() == [(n + 1,) for n in range(len(MIGRATIONS))]
    db.close()


def test_readers_see_each_span_as_soon_as_it_is_stored_and_block_nobody(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank, Bank.open(tmp_path) as other, bank.writer(KEY, path="a", name="a") as writer:
        for number in range(3):
            with other._catalog.snapshot():
                before = other.spans(writer.source_id)
                append(writer, number)
                assert other.spans(writer.source_id) == before
            spans = other.spans(writer.source_id)
            assert len(spans) == number + 1
            assert (spans[-1].start, spans[-1].stop) == span_times(number)
            assert len(other.read([(spans[-1], 10)])[0]) == 10


def test_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    start, stop = span_times(0)
    with Catalog(tmp_path / FILE_NAME) as catalog:
        with pytest.raises(BankError, match="no longer in"):
            catalog.add_span(
                5,
                start=start,
                stop=stop,
                tokens=1,
                file="000000.seg",
                offset=0,
                num_bytes=1,
                disk_bytes=1,
                grid=(1, 1, 1),
                codec="fp16",
                keys=span_keys(0),
            )
        source = catalog.add_source(KEY, path="a", name="a")
        assert catalog.spans(5) == [] and source.spans == 0


def test_ids_are_never_used_again(tmp_path: Path) -> None:
    with Catalog(tmp_path / FILE_NAME) as catalog:
        first = catalog.add_source(KEY, path="a", name="a")
        catalog.remove_source(first.id)
        assert catalog.add_source(KEY, path="a", name="a").id > first.id
