from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamvid.budget import Limits
from streamvid.errors import BankError
from streamvid.memory import catalog as catalog_module
from streamvid.memory import faiss_index, snapshots
from streamvid.memory.bank import Bank
from streamvid.memory.faiss_index import ApproximateIndex
from streamvid.memory.index import FlatIndex, Index
from tests.memory.spans import KEY, KEY_WIDTH, source_key, store


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small banks take the way of large ones."""
    defaults = {**(faiss_index.ApproximateIndex.__init__.__kwdefaults__ or {}), "train_at": 200, "tail_keys": 40}
    monkeypatch.setattr(faiss_index.ApproximateIndex.__init__, "__kwdefaults__", defaults)
    monkeypatch.setattr(faiss_index, "FLAT_KEYS", 200)


def keys(count: int, *, seed: int = 0) -> Tensor:
    vectors = torch.randn(count, KEY_WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def enter(bank: Bank, source_id: int, vectors: Tensor, *, each: int = 2) -> None:
    """Spans of ``each`` keys, in the catalogue alone: search reads no segment."""
    catalog = bank._catalog
    with catalog.transaction():
        first = catalog.scope_size([source_id])[1] * 10
        for number, span in enumerate(vectors.split(each), first):
            added = catalog.execute(
                "INSERT INTO spans (source_id, ordinal, start, stop, start_seconds, stop_seconds, tokens, file, "
                "offset, bytes, grid, codec) VALUES (?, ?, '0', '1', 0, 1, 1, 'x', 0, 1, '[1, 1, 1]', 'fp16')",
                source_id,
                number,
            )
            catalog.execute(
                "INSERT INTO keys (span_id, width, vectors) VALUES (?, ?, ?)",
                added.lastrowid,
                KEY_WIDTH,
                span.numpy().tobytes(),
            )


def remove(bank: Bank, ids: list[int]) -> None:
    with bank._catalog.transaction():
        bank._catalog.execute(f"DELETE FROM spans WHERE id IN ({','.join(map(str, ids))})")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A memory of one source with 400 spans of 2 keys."""
    with Bank.open(tmp_path) as bank:
        source = bank._catalog.add_source(KEY, path="a", name="a")
        enter(bank, source.id, keys(800))
    return tmp_path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Gets an entry for each time an index is made from the catalogue."""
    times: list[int] = []
    real = ApproximateIndex.rebuild

    def counted(self: ApproximateIndex) -> None:
        times.append(1)
        real(self)

    monkeypatch.setattr(ApproximateIndex, "rebuild", counted)
    yield times


def same_as_exact(bank: Bank, index: Index, sources: list[int], *, seed: int = 99) -> None:
    exact = FlatIndex(KEY_WIDTH)
    for ids, vectors in bank._catalog.keys_after(sources, width=KEY_WIDTH, block_spans=64):
        exact.add(ids, vectors)
    assert len(index) == len(exact)
    hits = 0
    for query in keys(20, seed=seed):
        found, similarity = index.search(query, 10)
        every, truth = exact.search(query, len(exact))
        known = dict(zip(every.tolist(), truth.tolist(), strict=True))
        assert similarity.tolist() == pytest.approx([known[i] for i in found.tolist()], abs=1e-6)
        hits += len(set(found.tolist()) & set(every[:10].tolist()))
    assert hits >= 198


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "index")) if (folder / "index").is_dir() else []


def test_second_bank_opens_what_the_first_saved(folder: Path, made: list[int]) -> None:
    with Bank.open(folder) as bank:
        index = bank.index(1)
        assert index.said.startswith("ivf (") and "800 keys of 8 numbers; chosen for 200 to" in index.said
        same_as_exact(bank, index, [1])
        assert bank.index(1) is index and len(made) == 1
    with Bank.open(folder) as bank:
        index = bank.index(1)
        assert "mapped" in index.said and index.note == "" and len(made) == 1
        same_as_exact(bank, index, [1])
    [name] = files(folder)
    assert name.startswith("source1-400-") and name.endswith(".index")
    with Bank.open(folder) as bank:
        [record] = bank._catalog.snapshots()
        assert (record.vectors, record.last_span_id, record.file) == (800, 400, name)
        assert bank._catalog.snapshot_bytes() == (folder / "index" / name).stat().st_size


def test_spans_stored_since_are_found_in_the_same_bank_and_the_next(folder: Path, made: list[int]) -> None:
    with Bank.open(folder) as bank, Bank.open(folder) as other:
        bank.index(1)
        enter(other, 1, keys(20, seed=1))
        index = bank.index(1)
        found, similarity = index.search(keys(20, seed=1)[19], 1)
        assert found.tolist() == [410] and similarity[0] == pytest.approx(1, abs=1e-6)
        same_as_exact(bank, index, [1])
    with Bank.open(folder) as bank:
        index = bank.index(1)
        assert isinstance(index, ApproximateIndex) and index.tail == 20 and index.saved
        same_as_exact(bank, index, [1])
        assert len(made) == 1


def test_a_grown_index_is_saved_again_and_the_old_one_deleted(folder: Path, made: list[int]) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
        before = files(folder)
        for number in range(4):
            enter(bank, 1, keys(20, seed=number))
            bank.index(1)
        [name] = files(folder)
        assert [name] != before and len(bank._catalog.snapshots()) == 1
    with Bank.open(folder) as bank:
        same_as_exact(bank, bank.index(1), [1])
        assert len(made) == 1


def test_removed_spans_are_not_found(folder: Path, made: list[int]) -> None:
    gone = list(range(1, 40, 2))
    with Bank.open(folder) as bank, Bank.open(folder) as third:
        bank.index(1)
        third.index(1)
        remove(bank, gone)
        enter(bank, 1, keys(10, seed=4))
        same_as_exact(third, third.index(1), [1])
    with Bank.open(folder) as bank:
        index = bank.index(1)
        same_as_exact(bank, index, [1])
        assert not set(gone) & set(index.ids().tolist()) and len(made) == 1


def test_saved_index_of_spans_mostly_gone_is_made_anew_and_said(folder: Path, made: list[int]) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
        remove(bank, list(range(1, 120)))
    with Bank.open(folder) as bank:
        index = bank.index(1)
        assert "of its 400 spans 281 are left" in index.note and "\n" not in index.note
        assert len(made) == 2 and bank.index(1).note == ""
        same_as_exact(bank, index, [1])


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "said"), [(Path.unlink, "it is missing"), (cut, "it is damaged"), (flip, "it is damaged")]
)
def test_a_spoiled_file_is_made_anew_and_said(folder: Path, made: list[int], spoil: object, said: str) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
    assert callable(spoil)
    spoil(folder / "index" / files(folder)[0])
    with Bank.open(folder) as bank:
        index = bank.index(1)
        assert said in index.note and len(made) == 2
        same_as_exact(bank, index, [1])
        assert len(files(folder)) == 1
    with Bank.open(folder) as bank:
        assert bank.index(1).note == "" and len(made) == 2


def test_another_version_is_made_anew(folder: Path, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
    monkeypatch.setattr(snapshots, "FORMAT", 2)
    with Bank.open(folder) as bank:
        assert "another version" in bank.index(1).note and len(made) == 2
    with Bank.open(folder) as bank:
        assert bank.index(1).note == "" and len(made) == 2


def test_what_faiss_cannot_read_is_made_anew(folder: Path, made: list[int]) -> None:
    """Whole by its digest, and no index inside: as a foreign file that was entered by mistake."""
    with Bank.open(folder) as bank:
        bank.index(1)
        path = folder / "index" / files(folder)[0]
        data = bytearray(path.read_bytes())
        data[:4] = b"none"
        path.write_bytes(data)
        bank._catalog.execute("UPDATE snapshots SET digest = ?", snapshots._sha256(path))
    with Bank.open(folder) as bank:
        assert "FAISS cannot read" in bank.index(1).note and len(made) == 2


def test_digest_is_checked_once_for_an_unchanged_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
    read: list[Path] = []
    real = snapshots._sha256
    monkeypatch.setattr(snapshots, "_sha256", lambda path: read.append(path) or real(path))
    for _ in range(3):
        with Bank.open(folder) as bank:
            bank.index(1)
    assert len(read) == 1


def test_who_cannot_save_does_without(folder: Path, made: list[int]) -> None:
    (folder / "index").write_text("not a folder")
    with Bank.open(folder) as bank:
        index = bank.index(1)
        assert "could not be saved" in index.note and "\n" not in index.note
        same_as_exact(bank, index, [1])
        enter(bank, 1, keys(4, seed=3))
        assert bank.index(1).note == "" and len(made) == 1
    with Bank.open(folder, read_only=True) as bank:
        assert bank.index(1).note == ""
        same_as_exact(bank, bank.index(1), [1])


def test_read_only_banks_use_what_others_saved_and_change_nothing(folder: Path, made: list[int]) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
        enter(bank, 1, keys(100, seed=3))
    before = {p: p.read_bytes() for p in (folder / "index").iterdir()}
    with Bank.open(folder, read_only=True) as bank:
        same_as_exact(bank, bank.index(1), [1])
        assert len(made) == 1
    assert {p: p.read_bytes() for p in (folder / "index").iterdir()} == before


def test_nothing_is_saved_beyond_the_limit(folder: Path) -> None:
    with Bank.open(folder) as bank:
        used = bank.usage()
    with Bank.open(folder, limits=Limits(disk_bytes=used + 1000)) as bank:
        index = bank.index(1)
        assert "beyond the limit" in index.note and files(folder) == []
        same_as_exact(bank, index, [1])


def test_while_another_process_saves_this_one_does_not(folder: Path) -> None:
    with open(folder / "locks" / "index.lock", "ab") as lock, Bank.open(folder) as bank:
        fcntl.flock(lock, fcntl.LOCK_EX)
        same_as_exact(bank, bank.index(1), [1])
        assert files(folder) == []


def test_a_save_that_fails_leaves_the_last_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
        before = files(folder)

        def full(path: Path) -> str:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(snapshots, "_sha256", full)
        enter(bank, 1, keys(100, seed=1))
        index = bank.index(1)
        assert "No space left" in index.note and files(folder) == before
        same_as_exact(bank, index, [1])
    monkeypatch.undo()


def test_small_banks_save_nothing(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        index = bank.index(store(bank, KEY, range(5)))
        assert index.said == "faiss flat (exact), 10 keys of 8 numbers; chosen for up to 200 keys"
        bank.index(1, kind="ivf")
        assert files(tmp_path) == []


def test_a_growing_bank_changes_its_kind(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        source = bank._catalog.add_source(KEY, path="a", name="a")
        enter(bank, source.id, keys(100))
        assert bank.index(1).kind == "faiss"
        enter(bank, source.id, keys(300, seed=1))
        assert bank.index(1).kind == "ivf"
        same_as_exact(bank, bank.index(1), [1])


def test_all_sources_of_one_embedder_and_no_other(tmp_path: Path, made: list[int]) -> None:
    foreign = replace(source_key("c"), embedder="other")
    with Bank.open(tmp_path) as bank:
        for number, key in enumerate((source_key("a"), source_key("b"), foreign)):
            source = bank._catalog.add_source(key, path=f"{number}", name=f"{number}")
            enter(bank, source.id, keys(300, seed=number))
        index = bank.index(None, embedder=KEY.embedder)
        same_as_exact(bank, index, [1, 2])
        found, similarity = index.search(keys(300, seed=1)[10], 1)
        assert found.tolist() == [156] and similarity[0] == pytest.approx(1, abs=1e-6)
        assert bank.index(None, embedder=KEY.embedder) is index
        bank._catalog.remove_source(1)
        same_as_exact(bank, bank.index(None, embedder=KEY.embedder), [2])
        assert len(files(tmp_path)) == 1 and files(tmp_path)[0].startswith("all")
        with pytest.raises(ValueError, match="needs their embedder"):
            bank.index(None)
        with pytest.raises(ValueError, match="keys of 'other'"):
            bank.index(3, embedder=KEY.embedder)
        with pytest.raises(BankError, match="no spans to search"):
            bank.index(None, embedder="none")
    with Bank.open(tmp_path) as bank:
        count = len(made)
        same_as_exact(bank, bank.index(None, embedder=KEY.embedder), [2])
        assert len(made) == count


def test_files_of_removed_sources_are_swept(folder: Path) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
        (folder / "index" / "left.index.tmp").write_bytes(b"half")
        bank._catalog.remove_source(1)
        bank._snapshots.sweep()
        assert files(folder) == [] and bank._catalog.snapshots() == []
        assert bank._catalog._rows("SELECT * FROM digests") == []


def test_spans_without_keys_are_no_reason_to_start_over(folder: Path, made: list[int]) -> None:
    with Bank.open(folder) as bank:
        bank.index(1)
        enter(bank, 1, keys(2, seed=8))
        bank._catalog.execute("UPDATE keys SET vectors = x'' WHERE span_id = 401")
        same_as_exact(bank, bank.index(1), [1])
    with Bank.open(folder) as bank:
        same_as_exact(bank, bank.index(1), [1])
        assert len(made) == 1


def test_one_block_of_keys_is_read_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []
    real = catalog_module.Catalog.keys_of

    def counted(self: catalog_module.Catalog, span_ids: Tensor, *, width: int) -> tuple[Tensor, Tensor]:
        blocks.append(len(span_ids))
        return real(self, span_ids, width=width)

    with Bank.open(folder) as bank:
        monkeypatch.setattr(catalog_module.Catalog, "keys_of", counted)
        ids = [block[0] for block in bank._catalog.keys_after([1], 100, width=KEY_WIDTH, block_spans=128)]
        assert blocks == [128, 128, 44]
        assert torch.equal(torch.cat(ids), torch.arange(101, 401).repeat_interleave(2))
        assert len(bank._catalog.keys_of(torch.tensor([1]), width=KEY_WIDTH + 1)[0]) == 0


def test_about_of_a_file_is_readable_from_its_end(folder: Path) -> None:
    """The layout other versions must recognise: FAISS, ids, JSON, its length, the mark."""
    with Bank.open(folder) as bank:
        bank.index(1)
    data = (folder / "index" / files(folder)[0]).read_bytes()
    assert data.endswith(snapshots.MAGIC)
    length = int.from_bytes(data[-16:-8], "little")
    about = json.loads(data[-16 - length : -16])
    assert about["vectors"] == 800 and about["spans"] == 400 and about["format"] == 1
