from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from streamvid.budget import Limits
from streamvid.errors import BankError
from streamvid.memory.bank import Bank
from streamvid.memory.codebooks import Codebook, Codebooks
from streamvid.memory.codec import CODECS, CodecSetting, FolderCodecs
from tests.memory.spans import KEY, WIDTH, append, source_key, span_keys, span_times, span_tokens, store


def book(width: int = 8, *, model: str = "m", layer: int = 0, kind: str = "ranges") -> Codebook:
    low = np.arange(width, dtype=np.float32)
    return Codebook(kind, model, width, layer, 9, {"low": low, "range": low.astype(np.float16).reshape(2, -1)})


def bank_books(folder: Path) -> list[Codebook]:
    books = Codebooks(folder / "codebooks")
    return [books.load(path.stem) for path in sorted(books.folder.glob("*.book"))]


def test_a_codebook_comes_back_in_another_process_under_its_digest(tmp_path: Path) -> None:
    digest = Codebooks(tmp_path / "codebooks").save(book())
    back = Codebooks(tmp_path / "codebooks").load(digest)
    assert (back.kind, back.model, back.width, back.layer, back.tokens) == ("ranges", "m", 8, 0, 9)
    assert back.digest == digest and back.to_bytes() == book().to_bytes()
    for name, array in book().arrays.items():
        assert back.arrays[name].dtype == array.dtype and np.array_equal(back.arrays[name], array)


def test_nothing_but_the_whole_file_is_left(tmp_path: Path) -> None:
    books = Codebooks(tmp_path / "codebooks")
    assert books.num_bytes() == 0
    digest = books.save(book())
    assert books.save(book()) == digest
    assert [path.name for path in books.folder.iterdir()] == [f"{digest}.book"]
    assert books.num_bytes() == len(book().to_bytes())


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("streamvid.memory.codebooks.os.fsync", full)
    books = Codebooks(tmp_path / "codebooks")
    with pytest.raises(OSError, match="No space"):
        books.save(book())
    assert not list(books.folder.iterdir())


def test_find_tells_model_width_layer_and_kind_apart(tmp_path: Path) -> None:
    books = Codebooks(tmp_path / "codebooks")
    assert books.find("ranges", model="m", width=8, layer=0) is None
    saved = {books.save(b): b for b in (book(), book(4), book(model="n"), book(layer=2), book(kind="pq"))}
    assert len(saved) == 5
    for digest, b in saved.items():
        assert Codebooks(books.folder).find(b.kind, model=b.model, width=b.width, layer=b.layer) == digest
    assert books.find("ranges", model="m", width=8, layer=1) is None


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    books = Codebooks(tmp_path)
    path = tmp_path / f"{books.save(book(2))}.book"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(BankError, match="is damaged: its bytes do not give its name"):
            Codebooks(tmp_path).load(path.stem)
    for size in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(BankError, match="is damaged"):
            Codebooks(tmp_path).load(path.stem)


def test_codecs_of_a_folder_use_what_was_learned(tmp_path: Path) -> None:
    x = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    codecs = FolderCodecs(CodecSetting.parse("sq8+pq"), Codebooks(tmp_path))
    assert codecs.wanted("m", width=8, num_layers=0) == 1024
    assert codecs.wanted("m", width=8, num_layers=2) == 4096
    assert codecs.of("m", width=8, num_layers=1) == (CODECS["sq8"], CODECS["pq"])
    books = codecs.learn("m", [x, x, x * 2])
    assert [(b.kind, b.layer, b.tokens) for b in books] == [("ranges", 0, 1024), ("pq", 1, 4096), ("pq", 2, 4096)]
    codecs.keep(books)
    again = FolderCodecs(CodecSetting.parse("sq8+pq"), Codebooks(tmp_path))
    assert again.wanted("m", width=8, num_layers=2) == 0 and again.wanted("n", width=8, num_layers=0) == 1024
    assert [c.digest for c in again.of("m", width=8, num_layers=2)] == [b.digest for b in books]
    assert not again.learn("m", [x, x, x])
    quarter = FolderCodecs(CodecSetting.parse("sq4"), Codebooks(tmp_path))
    assert quarter.of("m", width=8, num_layers=0)[0].digest == books[0].digest  # sq8 and sq4 share ranges


@pytest.mark.parametrize("setting, after", [("sq8", 11), ("sq4", 11), ("sq8+sq4", 11), ("pq", 41), ("sq8+pq", 41)])
def test_a_bank_learns_once_it_holds_enough_tokens(tmp_path: Path, setting: str, after: int) -> None:
    """Spans of 100 tokens: ranges are learned before the 12th, pq before the 42nd, across sources and processes."""
    with Bank.open(tmp_path, codec=setting) as bank:
        store(bank, KEY, range(7))
        assert not bank_books(tmp_path)
    with Bank.open(tmp_path, codec=setting) as bank, bank.writer(source_key("b"), path="b", name="b") as writer:
        for number in range(7, after):
            append(writer, number)
        assert not bank_books(tmp_path)
        append(writer, after)
        append(writer, after + 1)
        parts = CodecSetting.parse(setting)
        assert ("pq" in setting) == any("pq learns" in note for note in writer.notes)
        books = bank_books(tmp_path)
        assert sorted(b.layer for b in books) == [0, 1]
        assert {b.kind for b in books} == {CODECS[name].learns for name in (parts.features, parts.layers)}
        assert {b.model for b in books} == {KEY.model}
        assert bank.usage() > bank._catalog.segment_bytes() + bank._catalog.own_bytes()
    with Bank.open(tmp_path, create=False) as bank:
        spans = bank.spans(bank.sources()[1].id)
        assert spans[-1].codec == parts.features
        error = []
        for number, span in zip(range(7, after + 2), spans, strict=True):
            [tokens] = bank.read([(span, 100)])
            true = span_tokens(number)
            assert torch.equal(tokens.position, true.position)
            error.append(float((1 - torch.cosine_similarity(tokens.features, true.features)).mean()))
        assert max(error) < {"sq8": 1e-3, "sq4": 0.05, "pq": 0.3}[parts.features]
        smaller = bank.read([(spans[-1], 10)])[0]
        whole = bank.read([(spans[-1], 100)])[0]
        kept = torch.isin(whole.pts_seconds, smaller.pts_seconds) & (whole.score >= smaller.score.min())
        assert bool((whole.features[kept][:, None] == smaller.features).all(2).any(0).all())


def test_learned_spans_are_smaller(tmp_path: Path) -> None:
    with Bank.open(tmp_path, codec="sq8") as bank:
        source_id = store(bank, KEY, range(12))
        sizes = [span.num_bytes for span in bank.spans(source_id)]
    header, digest = 2 * 4 * WIDTH, 2 * 64
    assert sizes[-1] <= sizes[0] - header + digest + 2 * 6 * 4


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_lost_codebook_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    with Bank.open(tmp_path, codec="sq8") as bank:
        store(bank, KEY, range(13))
    for path in (tmp_path / "codebooks").glob("*.book"):
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    with Bank.open(tmp_path) as bank:
        first, *_, last = bank.spans(bank.sources()[0].id)
        assert len(bank.read([(first, 100)])[0]) == 100  # written before there was a codebook
        with pytest.raises(BankError, match="codebook .*[0-9a-f]{64}.book.*(restore|copy)") as caught:
            bank.read([(last, 100)])
        assert "\n" not in str(caught.value) and ("No such file" in str(caught.value)) == (damage == "missing")


def test_codebooks_count_against_the_limit(tmp_path: Path) -> None:
    with Bank.open(tmp_path, codec="pq") as bank:
        bank.pin(store(bank, KEY, range(41)))  # nothing gives way
        with bank.writer(source_key("b"), path="b", name="b") as writer:
            bank.limits = Limits(disk_bytes=bank.usage() + 10_000)
            start, stop = span_times(50)
            with pytest.raises(BankError, match=r"may hold .* needs 1\d\d\d\d more"):
                writer.append(span_tokens(50), start=start, stop=stop, keys=span_keys(50))
            assert not bank_books(tmp_path)
            bank.limits = Limits()
            writer.append(span_tokens(50), start=start, stop=stop, keys=span_keys(50))
        assert sum(len(b.to_bytes()) for b in bank_books(tmp_path)) == bank.codecs.books.num_bytes() > 10_000


def test_another_models_tokens_are_not_learned_from(tmp_path: Path) -> None:
    with Bank.open(tmp_path, codec="sq8") as bank:
        store(bank, replace(KEY, model="other"), range(11))
        source_id = store(bank, KEY, range(5))
        assert not bank_books(tmp_path) and len(bank.spans(source_id)) == 5
