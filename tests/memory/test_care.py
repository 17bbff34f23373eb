"""Verifying, repairing and compacting, on banks small enough to break byte by byte."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.care import Kind
from streamvid.memory.compact import compact
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import State
from streamvid.memory.repair import repair
from streamvid.memory.schema import FILE_NAME
from streamvid.memory.verify import Verified, verify
from tests.memory.spans import KEY, append, assert_same, best, source_key, span_keys, span_times, span_tokens, store


def opened(folder: Path, **settings: Any) -> Bank:
    """Lossless for the tokens of these tests, so that what is read can be compared."""
    return Bank.open(folder, codec="fp16", **settings)


def verified(folder: Path) -> Verified:
    with opened(folder, create=False, read_only=True) as bank:
        return verify(bank)


def contents(folder: Path) -> dict[str, bytes]:
    """Without what SQLite keeps beside an open file."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.endswith(("-shm", "-wal")) and p.suffix != ".lock"
    }


def spans_of(folder: Path, key: MemoryKey = KEY) -> list[tuple[float, int]]:
    with opened(folder, create=False, read_only=True) as bank:
        source = bank.find(key)
        assert source is not None
        spans = bank.spans(source.id)
        for span in spans:
            bank.read([(span, span.tokens)])
        return [(float(s.start), s.tokens) for s in spans]


def small(folder: Path, numbers: range = range(2)) -> Path:
    """Two spans of three tokens, as small as a file gets."""
    with opened(folder) as bank, bank.writer(KEY, path="/v/a.mp4", name="a.mp4") as writer:
        for number in numbers:
            start, stop = span_times(number)
            tokens = span_tokens(number, count=3, width=4)
            writer.append(tokens, start=start, stop=stop, keys=span_keys(number))
        writer.finish({"frames": 2})
    return next(folder.rglob("*.seg"))


def flip(path: Path, place: int, bits: int = 0x01) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


def sql(folder: Path, *statements: str) -> None:
    db = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()


def test_what_is_as_written_verifies_and_is_not_touched(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=20_000) as bank:
        store(bank, KEY, range(5))
        store(bank, source_key("b"), range(3), name="b.mp4")
    before = contents(tmp_path)
    seen = verified(tmp_path)
    assert seen.problems == [] and seen.notes == []
    assert (seen.sources, seen.spans, seen.loose_bytes) == (2, 8, 0)
    assert seen.num_bytes >= sum(p.stat().st_size for p in tmp_path.rglob("*.seg"))
    assert contents(tmp_path) == before


def test_each_flipped_byte_of_a_segment_is_found(tmp_path: Path) -> None:
    path = small(tmp_path)
    data = path.read_bytes()
    assert len(data) < 3000
    with opened(tmp_path, read_only=True) as bank:
        for place in range(len(data)):
            damaged = bytearray(data)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            seen = verify(bank)
            assert seen.num_problems, f"byte {place} was changed and nothing was said"
            assert all(p.file for p in seen.problems)
        path.write_bytes(data)
        assert verify(bank).problems == []


def test_flipped_bytes_of_a_larger_bank_are_found_where_they_are(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=30_000) as bank:
        store(bank, KEY, range(6))
        choose = random.Random(3)
        files = sorted(tmp_path.rglob("*.seg"))
        assert len(files) > 2
        for _ in range(60):
            path = choose.choice(files)
            place = choose.randrange(path.stat().st_size)
            flip(path, place)
            seen = verify(bank)
            assert [Path(p.file).name for p in seen.problems] and {p.file for p in seen.problems} == {
                str(path.relative_to(tmp_path))
            }
            flip(path, place)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ("UPDATE spans SET start = '1/7' WHERE ordinal = 1", Kind.ROW, "two times of span"),
        ("UPDATE spans SET tokens = tokens + 1 WHERE ordinal = 1", Kind.ROW, "tokens 101 and the span 100"),
        ("UPDATE spans SET grid = '[2, 8, 9]' WHERE ordinal = 1", Kind.ROW, "grid"),
        ("UPDATE spans SET codec = 'fp32' WHERE ordinal = 1", Kind.ROW, "codec fp32"),
        ("UPDATE spans SET offset = offset + 1 WHERE ordinal = 1", Kind.SPAN, "no span begins there"),
        ("UPDATE spans SET stop_seconds = 7 WHERE ordinal = 1", Kind.ROW, "two times of span"),
        ("UPDATE keys SET vectors = zeroblob(length(vectors)) WHERE span_id = 2", Kind.ROW, "keys differ"),
        ("DELETE FROM keys WHERE span_id = 2", Kind.ROW, "keys differ"),
        ("UPDATE sources SET tokens = 7", Kind.TALLY, "says 7 tokens and has 300"),
        ("UPDATE spans SET ordinal = ordinal + 5 WHERE ordinal = 1", Kind.ROW, "out of its order"),
    ],
)
def test_what_the_catalogue_says_wrongly_is_found_and_mended(
    tmp_path: Path, change: str, kind: Kind, text: str
) -> None:
    with opened(tmp_path) as bank:
        store(bank, KEY, range(3))
    good = spans_of(tmp_path)
    sql(tmp_path, change)
    seen = verified(tmp_path)
    assert any(p.kind is kind and text in p.text for p in seen.problems), seen.problems
    done = repair(tmp_path)
    assert done.done and not done.lost and not done.left
    assert verified(tmp_path).problems == []
    assert spans_of(tmp_path) == good
    assert not list(tmp_path.glob("*.broken-*"))


def test_pages_of_the_catalogue_that_sqlite_finds_wrong_are_found(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        store(bank, KEY, range(3))
    page = 4096
    data = (tmp_path / FILE_NAME).read_bytes()
    found = 0
    for number in range(1, len(data) // page):
        damaged = bytearray(data)
        damaged[number * page : number * page + 8] = b"\xff" * 8
        (tmp_path / FILE_NAME).write_bytes(damaged)
        try:
            found += verified(tmp_path).num_problems > 0
        except BankError as error:
            assert "\n" not in str(error)
            found += 1
    assert found == len(data) // page - 1


def test_a_lost_catalogue_is_built_from_the_segments(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=20_000) as bank:
        first = store(bank, KEY, range(5))
        second = store(bank, source_key("b"), range(3), name="b.mp4", seed=50)
        keys = bank._catalog.keys(first)
    for path in tmp_path.glob(f"{FILE_NAME}*"):
        path.unlink()
    with pytest.raises(BankError, match="no catalogue; rebuild it with"):
        opened(tmp_path)
    before = contents(tmp_path)
    planned = repair(tmp_path, dry_run=True)
    assert contents(tmp_path) == before and planned.done[0].startswith("catalogue built anew")
    done = repair(tmp_path)
    assert done.done == planned.done and len(done.lost) == 2 and done.lost_spans == 0
    with opened(tmp_path, create=False) as bank:
        assert [s.id for s in bank.sources()] == [first, second]
        source = bank.find(KEY)
        assert source is not None and source.state is State.OPEN
        assert source.stop == span_times(4)[1]
        assert source.num_bytes == sum(p.stat().st_size for p in (tmp_path / source.folder).glob("*.seg"))
        for number, span in enumerate(bank.spans(first)):
            assert (span.start, span.stop) == span_times(number)
            assert_same(bank.read([(span, 100)])[0], span_tokens(number))
        assert all(torch.equal(a, b) for a, b in zip(bank._catalog.keys(first), keys, strict=True))
        assert verify(bank).problems == []
        with bank.writer(KEY, path="/v/a.mp4", name="a.mp4") as writer:
            append(writer, 5)
        assert verify(bank).problems == []


def test_a_damaged_catalogue_gives_its_names_and_answers_to_the_new_one(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(4))
        bank.save_answer(source_id, question="what?", answer="a red circle", receipt={"cache": "hit"})
        bank.pin(source_id)
    old = (tmp_path / FILE_NAME).read_bytes()
    db = sqlite3.connect(tmp_path / FILE_NAME)
    [(root,)] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'spans_by_time'").fetchall()
    db.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{tmp_path / FILE_NAME}{suffix}").unlink(missing_ok=True)
    damaged = bytearray(old)
    damaged[(root - 1) * 4096 : root * 4096] = bytes(4096)
    (tmp_path / FILE_NAME).write_bytes(damaged)
    assert any(p.kind is Kind.CATALOGUE for p in verified(tmp_path).problems)
    done = repair(tmp_path)
    assert (tmp_path / f"{FILE_NAME}.broken-1").read_bytes() == bytes(damaged)
    assert not done.lost and not done.left
    with opened(tmp_path, create=False) as bank:
        source = bank.source("a.mp4")
        assert (source.state, source.pinned, source.summary) == (State.COMPLETE, True, {"frames": 4})
        assert [(a.question, a.answer) for a in bank.answers(source_id)] == [("what?", "a red circle")]
        assert len(bank.spans(source_id)) == 4 and verify(bank).problems == []


def test_a_text_file_in_place_of_the_catalogue_is_replaced_only_where_there_are_segments(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as bank:
        store(bank, KEY, range(2))
    for path in (tmp_path / "m").glob(f"{FILE_NAME}*"):
        path.unlink()
    (tmp_path / "m" / FILE_NAME).write_text("my diary " * 100)
    repair(tmp_path / "m")
    assert (tmp_path / "m" / f"{FILE_NAME}.broken-1").read_text().startswith("my diary")
    assert verified(tmp_path / "m").problems == []
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / FILE_NAME).write_text("my diary " * 100)
    with pytest.raises(BankError, match="not a streamvid catalogue"):
        repair(tmp_path / "d")
    assert [p.name for p in (tmp_path / "d").iterdir()] == [FILE_NAME]


def test_a_newer_catalogue_is_not_repaired(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        store(bank, KEY, range(2))
    sql(tmp_path, "PRAGMA user_version = 99")
    before = contents(tmp_path)
    with pytest.raises(BankError, match="newer streamvid"):
        repair(tmp_path)
    assert contents(tmp_path) == before


def test_a_damaged_span_is_forgotten_and_the_rest_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(4))
        span = bank.spans(source_id)[1]
        path = next(tmp_path.rglob("*.seg"))
    flip(path, span.offset + span.num_bytes // 2)
    damaged = path.read_bytes()
    planned = repair(tmp_path, dry_run=True)
    assert path.read_bytes() == damaged and planned.lost_spans == 1
    done = repair(tmp_path)
    assert done.lost == planned.lost and "tokens" in done.lost[0] and "do not match" in done.lost[0]
    assert verified(tmp_path).problems == []
    with opened(tmp_path) as bank:
        assert [s.start for s in bank.spans(source_id)] == [span_times(n)[0] for n in (0, 2, 3)]
        [gone] = bank.expired(source_id)
        assert (gone.start, gone.stop, gone.spans, gone.tokens, gone.reason) == (*span_times(1), 1, 100, "damaged")
        source = bank.source(source_id)
        assert (source.spans, source.tokens) == (3, 300)
        for span, number in zip(bank.spans(source_id), (0, 2, 3), strict=True):
            assert_same(bank.read([(span, 100)])[0], span_tokens(number))
    [kept] = (tmp_path / "broken").iterdir()
    assert kept.read_bytes() == damaged
    again = repair(tmp_path)
    assert not again.done and not again.lost and not again.left


def test_a_damaged_file_header_or_key_copy_costs_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(3))
        span = bank.spans(source_id)[1]
    path = next(tmp_path.rglob("*.seg"))
    good = path.read_bytes()
    for place in (3, 9, 40, span.offset + span.num_bytes - 2, span.offset + span.num_bytes - 20):
        flip(path, place, 0x40)
        assert verified(tmp_path).num_problems == 1
        done = repair(tmp_path)
        assert len(done.done) == 1 and not done.lost and not done.left
        assert path.read_bytes() == good


def test_a_missing_file_loses_its_spans_and_a_cut_one_the_end_of_one(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=20_000) as bank:
        source_id = store(bank, KEY, range(6))
        files = [s.file for s in bank.spans(source_id)]
    paths = sorted(tmp_path.rglob("*.seg"))
    assert len(paths) >= 3
    paths[0].unlink()
    os.truncate(paths[-1], paths[-1].stat().st_size - 500)
    lost = files.count(paths[0].name)
    seen = verified(tmp_path)
    assert seen.num_problems == lost + 1 and "is missing" in seen.problems[0].text
    assert repair(tmp_path).lost_spans == lost
    assert verified(tmp_path).problems == []
    left = spans_of(tmp_path)
    assert len(left) == 6 - lost and [tokens for _, tokens in left] == [100] * (5 - lost) + [64]


def test_a_torn_tail_is_no_damage_and_is_cut(tmp_path: Path) -> None:
    path = small(tmp_path)
    good = path.read_bytes()
    path.write_bytes(good + b"SPAN" + b"\0" * 99)
    seen = verified(tmp_path)
    assert not seen.problems and seen.loose_bytes == 103
    assert "103 bytes after its end cut" in repair(tmp_path).done[0]
    assert path.read_bytes() == good


def test_what_is_of_no_source_is_set_aside(tmp_path: Path) -> None:
    small(tmp_path)
    orphan = tmp_path / "segments" / "0123456789ab-77"
    orphan.mkdir()
    (orphan / "000000.seg").write_bytes(b"left behind")
    assert repair(tmp_path, dry_run=True).done and orphan.exists()
    repair(tmp_path)
    assert not orphan.exists()
    assert (tmp_path / "broken" / "0123456789ab-77.1" / "000000.seg").read_bytes() == b"left behind"


def test_another_sources_file_in_place_of_ones_own_is_found(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        store(bank, source_key("red"), range(2))
        store(bank, source_key("blue"), range(2), name="b.mp4")
        red, blue = (tmp_path / s.folder / "000000.seg" for s in bank.sources())
    shutil.copyfile(blue, red)
    seen = verified(tmp_path)
    assert seen.num_problems == 2 and "belongs to another source" in seen.problems[0].text
    assert repair(tmp_path).lost_spans == 2
    assert verified(tmp_path).problems == []
    assert len(spans_of(tmp_path, source_key("blue"))) == 2


def test_a_damaged_codebook_that_no_span_needs_is_set_aside(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "codebooks").mkdir()
    (tmp_path / "codebooks" / f"{'0' * 64}.book").write_bytes(b"not that")
    seen = verified(tmp_path)
    assert [p.kind for p in seen.problems] == [Kind.SPARE] and "no span needs it" in seen.problems[0].text
    done = repair(tmp_path)
    assert not done.left and "moved to broken/" in done.done[0]
    assert verified(tmp_path).problems == []


def test_a_source_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
        append(writer, 0)
        flip(next(tmp_path.rglob("*.seg")), 300)
        assert "being written" in repair(tmp_path).left[0]
        assert verified(tmp_path).num_problems == 1
        assert "being written" in compact(bank).notes[0]


def drop(bank: Bank, source_id: int, ordinals: set[int]) -> None:
    """As expiry does: rows go, bytes stay."""
    with bank._catalog.transaction():
        for span in bank.spans(source_id):
            if span.ordinal in ordinals:
                bank._catalog.execute("DELETE FROM spans WHERE id = ?", span.id)
                bank._catalog.execute(
                    "UPDATE sources SET spans = spans - 1, tokens = tokens - ? WHERE id = ?", span.tokens, source_id
                )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gone=st.sets(st.integers(0, 7)), segment_bytes=st.sampled_from([1, 20_000, 1 << 20]))
def test_compacting_keeps_what_is_remembered_and_nothing_else(
    tmp_path: Path, gone: set[int], segment_bytes: int
) -> None:
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    with opened(tmp_path / "m", segment_bytes=segment_bytes) as bank:
        source_id = store(bank, KEY, range(8))
        drop(bank, source_id, gone)
        seen = verify(bank)
        assert seen.problems == [] and (seen.loose_bytes > 0) == bool(gone)
        compact(bank)
        seen = verify(bank)
        assert seen.problems == [] and seen.loose_bytes == 0
        source = bank.source(source_id)
        assert source.num_bytes == sum(p.stat().st_size for p in (tmp_path / "m" / source.folder).glob("*"))
        rest = [n for n in range(8) if n not in gone]
        for span, number in zip(bank.spans(source_id), rest, strict=True):
            assert (span.start, span.stop) == span_times(number)
            assert_same(bank.read([(span, 100)])[0], span_tokens(number))
        before = contents(tmp_path / "m" / "segments")
        compact(bank)
        assert contents(tmp_path / "m" / "segments") == before


def test_an_open_source_goes_on_after_compacting(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=20_000) as bank:
        with bank.writer(KEY, path="a", name="a") as writer:
            for number in range(6):
                append(writer, number)
        drop(bank, writer_id(bank), {1, 3})
        compact(bank)
        with bank.writer(KEY, path="a", name="a") as writer:
            assert writer.stop == span_times(5)[1]
            append(writer, 6)
            append(writer, 7)
        assert verify(bank).problems == []
        for span, number in zip(bank.spans(writer_id(bank)), (0, 2, 4, 5, 6, 7), strict=True):
            assert_same(bank.read([(span, 100)])[0], span_tokens(number))


def writer_id(bank: Bank) -> int:
    source = bank.find(KEY)
    assert source is not None
    return source.id


def test_a_reader_with_old_places_finds_what_was_compacted(tmp_path: Path) -> None:
    with opened(tmp_path) as bank, opened(tmp_path) as reader:
        source_id = store(bank, KEY, range(4))
        spans = reader.spans(source_id)
        drop(bank, source_id, {0, 2})
        compact(bank)
        assert_same(reader.read([(spans[3], 100)])[0], span_tokens(3))
        with pytest.raises(BankError, match="ask again"):
            reader.read([(spans[0], 100)])


def test_compacting_that_is_killed_at_any_point_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write, sync and rename in turn is the last thing that happens."""

    class Killed(BaseException):
        pass

    with opened(tmp_path / "m", segment_bytes=30_000) as bank:
        source_id = store(bank, KEY, range(6))
        drop(bank, source_id, {1, 4})
    done, step = False, 0
    while not done:
        step += 1
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(tmp_path / "m", tmp_path / "c")
        left = step

        def counted(real):  # type: ignore[no-untyped-def]
            def call(*args, **kwargs):  # type: ignore[no-untyped-def]
                nonlocal left
                left -= 1
                if not left:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("pwrite", "fsync", "unlink"):
                patch.setattr(os, name, counted(getattr(os, name)))
            bank = opened(tmp_path / "c", segment_bytes=30_000)
            try:
                compact(bank)
                done = True
            except Killed:
                pass
            bank.close()
        seen = verified(tmp_path / "c")
        assert seen.problems == [], (step, seen.problems)
        assert len(spans_of(tmp_path / "c")) == 4
    assert step > 8


def test_full_disk_while_compacting_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(4))
        drop(bank, source_id, {1})
        before = contents(tmp_path / "segments")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(BankError, match="disk is full; free some space and run again"):
                compact(bank)
        assert contents(tmp_path / "segments") == before
        assert verify(bank).problems == []


def test_random_damage_is_always_mended(tmp_path: Path) -> None:
    """Whatever is flipped in segments and however often: afterwards it verifies, and what is left is true."""
    with opened(tmp_path / "m", segment_bytes=30_000) as bank:
        store(bank, KEY, range(6))
    choose = random.Random(5)
    for trial in range(12):
        folder = tmp_path / str(trial)
        shutil.copytree(tmp_path / "m", folder)
        files = sorted(folder.rglob("*.seg"))
        for _ in range(choose.choice((1, 3, 10))):
            path = choose.choice(files)
            flip(path, choose.randrange(path.stat().st_size), 1 << choose.randrange(8))
        if trial % 3 == 2:
            (folder / FILE_NAME).unlink()
        repair(folder)
        seen = verified(folder)
        assert seen.problems == [], (trial, seen.problems)
        with opened(folder, create=False) as bank:
            for source in bank.sources():
                for span in bank.spans(source.id):
                    number = [span_times(n)[0] for n in range(6)].index(span.start)
                    whole = span_tokens(number)
                    assert_same(bank.read([(span, span.tokens)])[0], best(whole, span.tokens))


def test_a_merged_span_stands_for_what_it_was_made_of_in_a_built_catalogue(tmp_path: Path) -> None:
    with opened(tmp_path) as bank, bank.writer(KEY, path="a", name="a") as writer:
        for number in range(4):
            append(writer, number)
        writer._start = None  # as a merging does: it writes a span that lies before the last one
        writer.append(span_tokens(9), start=span_times(0)[0], stop=span_times(1)[1], keys=span_keys(9))
    (tmp_path / FILE_NAME).unlink()
    repair(tmp_path)
    with opened(tmp_path) as bank:
        spans = bank.spans(writer_id(bank))
        assert [(s.start, s.ordinal) for s in spans] == [
            (span_times(0)[0], 0),
            (span_times(2)[0], 1),
            (span_times(3)[0], 2),
        ]
        assert_same(bank.read([(spans[0], 100)])[0], span_tokens(9))


def test_other_keys_do_not_make_an_orphan(tmp_path: Path) -> None:
    """Two folders of one key, as a removal that was killed leaves: the younger is the one."""
    with opened(tmp_path) as bank:
        first = store(bank, KEY, range(2))
        shutil.copytree(tmp_path / bank.source(first).folder, tmp_path / "old")
        bank.remove(first)
        second = store(bank, replace(KEY), range(3))
    shutil.copytree(tmp_path / "old", tmp_path / "segments" / f"{KEY.short}-{first}")
    (tmp_path / FILE_NAME).unlink()
    repair(tmp_path)
    with opened(tmp_path) as bank:
        assert [(s.id, s.spans) for s in bank.sources()] == [(second, 3)]
    assert (tmp_path / "broken" / f"{KEY.short}-{first}.1").exists()
