"""Checksums of the catalogue's rows, on catalogues small enough to break byte by byte."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.care import Kind
from streamvid.memory.repair import repair
from streamvid.memory.schema import FILE_NAME, MIGRATIONS
from streamvid.memory.seals import NUMBERED, SEALED, made_schema
from streamvid.memory.verify import verify
from tests.memory.spans import KEY, source_key, span_keys, span_times, span_tokens, store


def opened(folder: Path, **settings: Any) -> Bank:
    return Bank.open(folder, codec="fp16", **settings)


def texts(folder: Path) -> list[str]:
    with opened(folder, create=False, read_only=True) as bank:
        return [p.text for p in verify(bank).problems]


def sql(folder: Path, statement: str, *values: object) -> None:
    """As another program would: without our checksums."""
    db = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
    db.execute(statement, values)
    db.close()


def filled(folder: Path) -> int:
    """A row in every table; spans of three tokens."""
    with opened(folder) as bank:
        with bank.writer(KEY, path="/v/a.mp4", name="a.mp4") as writer:
            for number in range(3):
                start, stop = span_times(number)
                writer.append(span_tokens(number, count=3, width=4), start=start, stop=stop, keys=span_keys(number))
            writer.finish({"frames": 3})
            source_id = writer._source_id
        bank.save_answer(source_id, question="which colour?", answer="a red circle", receipt={"spans": [1]})
        with bank._catalog.transaction():
            for table, columns in (("gaps", ""), ("expired", ", spans, tokens")):
                bank._catalog.execute(
                    f"INSERT INTO {table} (source_id, start, stop, reason, created{columns}) "
                    f"VALUES (?, '1/3', '7/3', 'away', '2020-01-01T00:00:00+00:00'{', 2, 9' if columns else ''})",
                    source_id,
                )
        bank._catalog.remember_digest("/v/a.mp4", stamp="1 2 3", digest="ab" * 32)
        bank._catalog.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return source_id


def logical(path: Path) -> object:
    """All that a catalogue says: its tables, every row with types, and the marks of its format."""
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
    db.text_factory = bytes
    try:
        tables = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
        names = [name.decode() for kind, name, _, _ in tables if kind == b"table"]
        rows = {
            name: [[(type(value), value) for value in row] for row in db.execute(f"SELECT * FROM {name}")]
            for name in names
        }
        return tables, rows, [db.execute(f"PRAGMA {p}").fetchall() for p in ("user_version", "application_id")]
    finally:
        db.close()


def test_each_flipped_byte_of_a_catalogue_is_found_or_means_nothing(tmp_path: Path) -> None:
    """A dense sample; what is not found lies in bytes that SQLite does not use, as all content is the same."""
    filled(tmp_path / "m")
    path = tmp_path / "m" / FILE_NAME
    whole = path.read_bytes()
    good = logical(path)
    # Where there is anything at all, and a little of the empty space.
    used = [p for p in range(len(whole)) if whole[p] or any(whole[max(0, p - 3) : p + 4])]
    places = used[::17] + [p for p in range(0, len(whole), 4003)]
    places += list(range(16, 100, 3))
    found, unused = 0, []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        try:
            with opened(tmp_path / "m", create=False, read_only=True) as bank:
                told = bool(verify(bank).num_problems)
        except BankError as error:
            assert "\n" not in str(error)
            told = True
        found += told
        if not told:
            assert logical(path) == good, f"byte {place} was changed and nothing was said"
            unused.append(place)
    assert found > 0.9 * len(used[::17])


@pytest.mark.parametrize(
    ("table", "change", "meaning"),
    [
        ("sources", "name = 'b.mp4'", "its name, path"),
        ("sources", "path = '/v/x.mp4'", "its name, path"),
        ("sources", "summary = '{\"frames\": 4}'", "summary"),
        ("answers", "question = 'which shape?'", "a question"),
        ("answers", "receipt = '{\"spans\": [2]}'", "receipt"),
        ("gaps", "stop = '8/3'", "where nothing was seen"),
        ("expired", "tokens = 8", "what was expired"),
        ("spans", "level = 2", "level"),
        ("digests", "digest = 'cd'", "another"),
        ("migrations", "applied = '2020-01-01'", "brought up to date"),
    ],
)
def test_a_changed_row_is_named_and_stays_damaged_until_it_is_repaired(
    tmp_path: Path, table: str, change: str, meaning: str
) -> None:
    source_id = filled(tmp_path)
    sql(tmp_path, f"UPDATE {table} SET {change} WHERE rowid = 1")
    [text] = texts(tmp_path)
    assert f"row 1 of {table} in the catalogue is not as it was written" in text and meaning in text
    with opened(tmp_path) as bank:  # what we write ourselves does not cover it
        bank.pin(source_id)
        bank.pin(source_id, pinned=False)
    assert len(texts(tmp_path)) == 1
    planned = repair(tmp_path, dry_run=True)
    assert len(texts(tmp_path)) == 1
    done = repair(tmp_path)
    assert not done.lost and not done.left
    if table == "digests":
        assert done.done == planned.done and "removed" in done.done[0]
    else:
        assert len(done.doubtful) == 1 and "kept as it is" in done.doubtful[0]
    assert texts(tmp_path) == []
    again = repair(tmp_path)
    assert not again.done and not again.doubtful


@pytest.mark.parametrize("column", ["start", "tokens", "grid", "bytes", "stop_seconds", "ordinal", "codec"])
def test_what_segments_tell_of_a_row_is_mended_and_not_doubtful(tmp_path: Path, column: str) -> None:
    source_id = filled(tmp_path)
    with opened(tmp_path) as bank:
        good = bank.spans(source_id)
    change = {"start": "'1/9'", "grid": "'[1, 2, 3]'", "codec": "'fp32'", "ordinal": "9"}.get(column, f"{column} + 1")
    sql(tmp_path, f"UPDATE spans SET {column} = {change} WHERE id = 2")
    assert any("row 2 of spans" in text for text in texts(tmp_path))
    done = repair(tmp_path)
    assert not done.doubtful and not done.lost and not done.left
    assert texts(tmp_path) == []
    with opened(tmp_path) as bank:
        assert bank.spans(source_id) == good


def test_keys_are_mended_from_the_segment_and_their_seal_from_the_keys(tmp_path: Path) -> None:
    filled(tmp_path)
    with opened(tmp_path) as bank:
        good = bank._catalog.keys(1)
    for change in (
        "UPDATE keys SET vectors = zeroblob(length(vectors)) WHERE span_id = 2",
        "DELETE FROM keys WHERE span_id = 2",
        "UPDATE spans SET keys_seal = keys_seal + 1 WHERE id = 2",
    ):
        sql(tmp_path, change)
        assert any("row 2 of keys" in text for text in texts(tmp_path))
        done = repair(tmp_path)
        assert not done.doubtful and not done.lost and not done.left, change
        assert texts(tmp_path) == []
        with opened(tmp_path) as bank:
            assert all(torch.equal(a, b) for a, b in zip(bank._catalog.keys(1), good, strict=True))


def test_a_letter_that_is_no_letter_any_more_is_kept_as_a_mark(tmp_path: Path) -> None:
    source_id = filled(tmp_path)
    sql(tmp_path, "UPDATE answers SET answer = CAST(x'6120ff6564' AS TEXT)")
    assert len(texts(tmp_path)) == 1
    done = repair(tmp_path)
    assert len(done.doubtful) == 1 and not done.lost
    with opened(tmp_path) as bank:
        [answer] = bank.answers(source_id)
        assert (answer.question, answer.answer) == ("which colour?", "a \ufffded")
    assert texts(tmp_path) == []


def test_a_row_that_makes_no_sense_is_dropped_and_told(tmp_path: Path) -> None:
    source_id = filled(tmp_path)
    sql(tmp_path, "UPDATE answers SET receipt = '{' WHERE id = 1")
    done = repair(tmp_path)
    assert len(done.lost) == 1 and "row 1 of answers" in done.lost[0] and "makes no sense" in done.lost[0]
    assert texts(tmp_path) == []
    with opened(tmp_path) as bank:
        assert bank.answers(source_id) == []


@pytest.mark.parametrize("change", ["sqlite_sequence SET seq = seq + 5", "last_ids SET id = id + 5"])
def test_a_last_id_that_was_changed_is_mended(tmp_path: Path, change: str) -> None:
    filled(tmp_path)
    sql(tmp_path, f"UPDATE {change} WHERE name = 'spans'")
    assert any("last id of spans" in text for text in texts(tmp_path))
    done = repair(tmp_path)
    assert done.done and not done.lost and not done.left
    assert texts(tmp_path) == []
    db = sqlite3.connect(tmp_path / FILE_NAME)
    assert db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'spans'").fetchall() == [(3,)]
    db.close()


def test_tables_that_are_not_as_they_were_made_are_found(tmp_path: Path) -> None:
    filled(tmp_path)
    sql(tmp_path, "DROP INDEX spans_by_level")
    assert texts(tmp_path) == ["the catalogue is damaged: spans_by_level is not as it was made"]
    assert "spans_by_level" in repair(tmp_path).done[0]
    assert texts(tmp_path) == []


def test_a_flipped_letter_of_the_schema_costs_no_name_and_no_answer(tmp_path: Path) -> None:
    """In each place of the text that makes the tables, every 53rd of them; without the mending most lose all rows."""
    source_id = filled(tmp_path)
    path = tmp_path / FILE_NAME
    with opened(tmp_path) as bank:
        good = (bank.sources(), bank.answers(source_id), bank.gaps(source_id), bank.expired(source_id))
        bank._catalog.vacuum()
    whole = path.read_bytes()
    db = sqlite3.connect(path)
    entries = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    db.close()
    places = sorted({whole.index(sql.encode()) + at for _, sql in entries for at in range(0, len(sql), 53)})
    places += [whole.index(sql.encode()) - 2 for _, sql in entries]  # the last letter of the name of its table
    told = 0
    for place in places:
        for left in tmp_path.glob(f"{FILE_NAME}*"):
            left.unlink()
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        done = repair(tmp_path)
        told += bool(done.done)
        assert not done.lost and not done.left and not done.doubtful, (place, damaged[place - 20 : place + 20], done)
        with opened(tmp_path) as bank:
            assert verify(bank).problems == []
            now = (bank.sources(), bank.answers(source_id), bank.gaps(source_id), bank.expired(source_id))
            assert now == good, damaged[place - 20 : place + 20]
    assert told > 0.8 * len(places)


def test_damage_before_a_migration_is_still_damage_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next format adds a column to two tables and so seals every row of them anew."""
    filled(tmp_path)
    sql(tmp_path, "UPDATE answers SET answer = 'a blue circle'")
    sql(tmp_path, "UPDATE spans SET level = 3 WHERE id = 2")
    sql(tmp_path, "UPDATE keys SET vectors = zeroblob(length(vectors)) WHERE span_id = 3")
    before = texts(tmp_path)
    assert len(before) == 4, "the keys are told twice: they differ from the segment's too"
    more = (*MIGRATIONS, ("ALTER TABLE spans ADD COLUMN mood TEXT", "ALTER TABLE answers ADD COLUMN mood TEXT"))
    for name in ("database", "schema", "seals"):
        monkeypatch.setattr(f"streamvid.memory.{name}.MIGRATIONS", more)
    for table in ("spans", "answers"):
        monkeypatch.setitem(SEALED, table, (*SEALED[table], "mood"))
    made_schema.cache_clear()
    try:
        with opened(tmp_path) as bank:
            after = [p.text for p in verify(bank).problems]
            assert bank._catalog._pragma("user_version") == len(more)
        assert [t for t in after if "row" in t] == [t for t in before if "row" in t]
        assert len(after) == len(before)
        done = repair(tmp_path)
        assert len(done.doubtful) == 2 and not done.left and texts(tmp_path) == []
    finally:
        made_schema.cache_clear()


def test_every_column_of_every_table_is_sealed(tmp_path: Path) -> None:
    """A column that a later migration adds and forgets here would be changed unseen."""
    filled(tmp_path)
    db = sqlite3.connect(tmp_path / FILE_NAME)
    names = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert names - {"keys", "sqlite_sequence"} == SEALED.keys()
    for table, columns in SEALED.items():
        assert {row[1] for row in db.execute(f"PRAGMA table_info({table})")} - {"seal"} == {*columns}
    assert {row[0] for row in db.execute("SELECT name FROM sqlite_sequence")} <= {*NUMBERED}
    assert {row[1] for row in db.execute("PRAGMA table_info(keys)")} == {"span_id", "width", "vectors"}
    db.close()


def test_a_catalogue_of_the_format_before_gets_its_checksums_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are copied back into a catalogue of format 3, some of them no text that can be read."""
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(3))
        store(bank, source_key("b"), range(2), name="b.mp4")
        bank.save_answer(source_id, question="q", answer="a", receipt={"x": 1})
    path = tmp_path / FILE_NAME
    shutil.move(path, tmp_path / "new")
    old = sqlite3.connect(path, isolation_level=None)
    old.execute("CREATE TABLE migrations (version INTEGER PRIMARY KEY, applied TEXT NOT NULL)")
    for statement in [s for statements in MIGRATIONS[:3] for s in statements]:
        old.execute(statement)
    old.execute("ATTACH ? AS new", (str(tmp_path / "new"),))
    for table in ("sources", "spans", "keys", "answers"):
        columns = ", ".join(row[1] for row in old.execute(f"PRAGMA main.table_info({table})"))
        old.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}")
    old.execute("UPDATE answers SET answer = CAST(x'ff' AS TEXT)")
    old.execute("PRAGMA application_id = 0x53764D42")
    old.execute("PRAGMA user_version = 3")
    old.close()
    with opened(tmp_path, read_only=True) as bank:
        assert "older format" in bank.notes[0] and verify(bank).problems == []
    with opened(tmp_path) as bank:
        assert verify(bank).problems == []
        assert len(bank.spans(source_id)) == 3
    sql(tmp_path, "UPDATE sources SET name = 'c.mp4' WHERE id = 2")
    assert len(texts(tmp_path)) == 1


def test_rows_of_chosen_sources_only_are_looked_at_where_sources_are_chosen(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        first = store(bank, KEY, range(2))
        second = store(bank, source_key("b"), range(2), name="b.mp4")
    sql(tmp_path, f"UPDATE sources SET path = 'x' WHERE id = {second}")
    with opened(tmp_path, read_only=True) as bank:
        assert verify(bank, [bank.source(first)]).problems == []
        assert [p.kind for p in verify(bank, [bank.source(second)]).problems] == [Kind.TEXT]


def test_seals_are_looked_through_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamvid.memory.seals.BATCH", 2)
    filled(tmp_path)
    assert texts(tmp_path) == []
    sql(tmp_path, "UPDATE spans SET level = 1")
    assert sum("of spans" in text for text in texts(tmp_path)) == 3
