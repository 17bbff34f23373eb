"""What a repair keeps of a damaged span, what it removes because it can be made anew, and how little it holds."""

from __future__ import annotations

import hashlib
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamvid.memory.bank import Bank
from streamvid.memory.care import Kind, Repaired
from streamvid.memory.kv import KeptKv
from streamvid.memory.prefix import intact_tokens, shortened
from streamvid.memory.rebuild import _Salvage
from streamvid.memory.records import SnapshotRecord
from streamvid.memory.repair import repair
from streamvid.memory.schema import FILE_NAME
from streamvid.memory.segments import SegmentReader
from streamvid.memory.verify import Verified, verify
from tests.memory.spans import KEY, assert_same, best, span_keys, span_times, span_tokens, store


def opened(folder: Path, **settings: Any) -> Bank:
    return Bank.open(folder, codec="fp16", **settings)


def verified(folder: Path) -> Verified:
    with opened(folder, create=False, read_only=True) as bank:
        return verify(bank)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def places(folder: Path) -> tuple[Path, list[tuple[int, int, int]]]:
    """The first segment, and of each span where it and its chunks begin and what a row takes."""
    path = next(folder.rglob("*.seg"))
    with opened(folder, read_only=True) as bank, SegmentReader(path, key=KEY) as reader:
        heads = [reader.head(span.offset) for span in bank.spans(1)]
    return path, [(head.offset, head.rows_offset, head.row_bytes) for head in heads]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.sampled_from([64, 100]), keys=st.integers(0, 3))
def test_a_shortened_span_is_what_a_smaller_budget_reads(tmp_path_factory: Any, tokens: int, keys: int) -> None:
    folder = tmp_path_factory.mktemp("m")
    with opened(folder) as bank:
        store(bank, KEY, range(2))
        path, [_, (offset, _, _)] = places(folder)
        with SegmentReader(path, key=KEY) as reader:
            head = reader.head(offset)
            assert intact_tokens(reader, head) == 100
            data = shortened(reader, head, key=KEY, keys=span_keys(7, keys), tokens=tokens)
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + data)
    with SegmentReader(path, key=KEY) as reader:
        head = reader.verify(offset)
        assert (head.tokens, head.start, head.num_bytes) == (tokens, span_times(1)[0], len(data))
        assert_same(reader.read(offset), best(span_tokens(1), tokens))
        assert torch.equal(reader.keys(offset), span_keys(7, keys))
        assert tokens < 100 or keys != 2 or len(data) == len(whole) - offset


def test_the_best_tokens_before_the_first_damaged_chunk_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(4))
    path, spans = places(tmp_path)
    _, rows, size = spans[1]
    flip(path, rows + 70 * size)
    damaged = path.read_bytes()
    planned = repair(tmp_path, dry_run=True)
    assert path.read_bytes() == damaged and planned.lost_spans == 0
    done = repair(tmp_path)
    assert done.lost == planned.lost and "its best 64 of 100 tokens are kept" in done.lost[0]
    assert (done.lost_spans, done.doubtful, done.left) == (0, [], [])
    seen = verified(tmp_path)
    assert (seen.problems, seen.spans, seen.loose_bytes) == ([], 4, 0)
    with opened(tmp_path) as bank:
        found = bank.spans(source_id)
        assert [s.tokens for s in found] == [100, 64, 100, 100]
        assert [(s.start, s.stop) for s in found] == [span_times(n) for n in range(4)]
        for number, span in enumerate(found):
            assert_same(bank.read([(span, span.tokens)])[0], best(span_tokens(number), span.tokens))
        [gone] = bank.expired(source_id)
        assert (gone.start, gone.stop, gone.spans, gone.tokens) == (*span_times(1), 0, 36)
        assert "best 64 of 100" in gone.reason
        assert bank.source(source_id).tokens == 364
        ids, _ = bank.index(source_id, kind="flat").search(span_keys(1)[0], 1)
        assert ids.tolist() == [found[1].id]
    assert repair(tmp_path) == Repaired()


def test_keys_that_are_damaged_on_both_sides_are_lost_and_the_tokens_are_not(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(2))
        end = bank.spans(source_id)[0]
        with bank._catalog.transaction():
            bank._catalog.execute("DROP TRIGGER temp.seal_keys")
            bank._catalog.execute("UPDATE keys SET vectors = zeroblob(length(vectors)) WHERE span_id = ?", end.id)
    path, _ = places(tmp_path)
    flip(path, end.offset + end.num_bytes - 9)
    done = repair(tmp_path)
    assert len(done.lost) == 1 and "its keys are lost" in done.lost[0] and done.lost_spans == 0
    assert verified(tmp_path).problems == []
    with opened(tmp_path) as bank:
        assert [len(k) for k in bank._catalog.keys(source_id)] == [0, 2]
        assert_same(bank.read([(bank.spans(source_id)[0], 100)])[0], span_tokens(0))


def test_kept_keys_and_values_are_checked_and_removed(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source = bank.source(store(bank, KEY, range(2)))
        bank.keep_kv(source, KeptKv([(2, "a")], [(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4))]))
    path = next((tmp_path / "kv").iterdir())
    whole = path.read_bytes()
    assert verified(tmp_path).problems == []
    for place in range(0, len(whole), 13):
        flip(path, place)
        [problem] = verified(tmp_path).problems
        assert problem.kind is Kind.SPARE and problem.file == f"kv/{path.name}"
        path.write_bytes(whole)
    flip(path, len(whole) - 1)
    done = repair(tmp_path)
    assert len(done.done) == 1 and "computed anew" in done.done[0] and not done.lost and not done.left
    assert not path.exists() and verified(tmp_path).problems == []


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_saved_indexes_are_checked_and_removed(tmp_path: Path, damage: str) -> None:
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(2))
        (tmp_path / "index").mkdir()
        path = tmp_path / "index" / "source1-2-x.index"
        path.write_bytes(b"an index" * 9)
        bank._catalog.add_snapshot(
            SnapshotRecord(
                source_id=source_id,
                embedder=KEY.embedder,
                kind="hnsw",
                width=8,
                vectors=4,
                last_span_id=2,
                file=path.name,
                num_bytes=72,
                digest=hashlib.sha256(b"an index" * 9).hexdigest(),
            )
        )
    assert verified(tmp_path).problems == []
    if damage == "flip":
        flip(path, 50)
    else:
        path.unlink()
    [problem] = verified(tmp_path).problems
    assert problem.kind is Kind.SPARE and "index/source1-2-x.index is" in problem.text
    done = repair(tmp_path)
    assert "made anew" in done.done[0] and not path.exists()
    assert verified(tmp_path).problems == []


def test_a_damaged_codebook_is_said_to_lose_which_spans(tmp_path: Path) -> None:
    with Bank.open(tmp_path, codec="pq") as bank:
        store(bank, KEY, range(60))
        needing = [s for s in bank.spans(1) if s.codec == "pq"]
    books = sorted((tmp_path / "codebooks").glob("*.book"))
    assert books and needing
    flip(books[0], 100)
    [problem] = verified(tmp_path).problems
    first, last = float(needing[0].start), float(needing[-1].stop)
    assert problem.kind is Kind.CODEBOOK
    assert f"a.mp4 {first:.3f}-{last:.3f} s ({len(needing)} spans)" in problem.text
    assert repair(tmp_path).left == [problem.text] and books[0].exists()


def test_salvaging_a_catalogue_takes_no_memory_by_its_rows(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        source_id = store(bank, KEY, range(1))
        with bank._catalog.transaction():
            for number in range(1, 20_000):
                bank._catalog.execute(
                    "INSERT INTO spans (source_id, ordinal, start, stop, start_seconds, stop_seconds, tokens, file, "
                    "offset, bytes, grid, codec) "
                    "VALUES (?, ?, ?, ?, ?, ?, 100, '000000.seg', ?, 9, '[2, 8, 8]', 'fp16')",
                    source_id,
                    number,
                    str(Fraction(number)),
                    str(Fraction(number + 1)),
                    float(number),
                    float(number + 1),
                    number * 9,
                )
            bank._catalog.execute("UPDATE sources SET spans = 20000")
    tracemalloc.start()
    with _Salvage(tmp_path / FILE_NAME) as old:
        assert old.all_live(source_id) and old.level(source_id, "000000.seg", 19_999 * 9) == 0
        assert old.level(source_id, "000000.seg", 19_999 * 9 + 1) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000  # 20,000 rows as Python objects take over 10 MB
