from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from streamvid.errors import BankError
from streamvid.memory import segment_format
from streamvid.memory.codebooks import Codebooks
from streamvid.memory.codec import CODECS, CodecSetting, FolderCodecs
from streamvid.memory.segment_format import CHUNK_ROWS, encode_span
from streamvid.memory.segments import SegmentReader, SegmentWriter
from tests.memory.spans import KEY, assert_same, best, source_key, span_keys, span_times, span_tokens


def encoded(number: int = 0, *, codec: str = "fp16", key=KEY, tokens=None) -> bytes:
    start, stop = span_times(number)
    tokens = span_tokens(number) if tokens is None else tokens
    return encode_span(tokens, start=start, stop=stop, key=key, keys=span_keys(number), codec=CODECS[codec]).data


def write(folder: Path, *spans: bytes, key=KEY, segment_bytes: int = 1 << 20) -> list[tuple[Path, int]]:
    writer = SegmentWriter(folder, key=key, segment_bytes=segment_bytes, last=None)
    places = [writer.append(span) for span in spans]
    writer.close()
    return [(folder / name, offset) for name, offset in places]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 100, None])
def test_a_smaller_budget_is_the_best_tokens_in_order(tmp_path: Path, count: int | None, dtype: torch.dtype) -> None:
    tokens = span_tokens(0, num_layers=2, dtype=dtype)
    codec = "fp32" if dtype == torch.float32 else "fp16"
    [(path, offset)] = write(tmp_path, encoded(tokens=tokens, codec=codec))
    with SegmentReader(path, key=KEY) as reader:
        assert_same(reader.read(offset, tokens=count), best(tokens, 100 if count is None else count))


@pytest.mark.parametrize("codec", CODECS)
def test_a_smaller_budget_reads_a_prefix_and_no_more(tmp_path: Path, codec: str) -> None:
    [(path, offset)] = write(tmp_path, encoded(codec=codec))
    read = []
    for count in (0, 1, CHUNK_ROWS, CHUNK_ROWS + 1, 100):
        with SegmentReader(path, key=KEY) as reader:
            head = reader.head(offset)
            before = reader.bytes_read
            reader.read(offset, tokens=count)
            read.append(reader.bytes_read - before - (head.rows_offset - offset))
    chunk = CHUNK_ROWS * head.row_bytes + 4
    assert read == [0, chunk, chunk, 100 * head.row_bytes + 8, 100 * head.row_bytes + 8]


def test_reading_never_goes_beyond_the_prefix(tmp_path: Path) -> None:
    """Everything after the first chunk is gone, and one chunk's worth of tokens is still read."""
    tokens = span_tokens(0)
    [(path, offset)] = write(tmp_path, encoded())
    with SegmentReader(path, key=KEY) as reader:
        head = reader.head(offset)
    with open(path, "r+b") as file:
        file.truncate(head.rows_offset + CHUNK_ROWS * head.row_bytes + 4)
    with SegmentReader(path, key=KEY) as reader:
        assert_same(reader.read(offset, tokens=50), best(tokens, 50))
        with pytest.raises(BankError, match="before the"):
            reader.read(offset, tokens=CHUNK_ROWS + 1)


def test_head_tells_exact_times_and_keys_come_back(tmp_path: Path) -> None:
    [_, (path, offset)] = write(tmp_path, encoded(0), encoded(7, codec="sq8"))
    with SegmentReader(path, key=KEY) as reader:
        head = reader.verify(offset)
        assert (head.start, head.stop) == span_times(7)
        assert (
            head.codecs == ("sq8", "sq8") and head.grid == (2, 8, 8) and head.num_bytes == len(encoded(7, codec="sq8"))
        )
        assert torch.equal(reader.keys(offset), span_keys(7))


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Small tokens, so that each byte of the file, headers included, can have its turn."""
    tokens = span_tokens(0, count=3, width=2)
    [(path, offset)] = write(tmp_path, encoded(tokens=tokens))
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for place in range(len(whole)):
            os.pwrite(file.fileno(), bytes([whole[place] ^ 0x10]), place)
            with pytest.raises(BankError, match="000000.seg"), SegmentReader(path, key=KEY) as reader:
                reader.verify(offset)
                pytest.fail(f"byte {place} of {len(whole)} flipped and not found")
            os.pwrite(file.fileno(), whole[place : place + 1], place)
    with SegmentReader(path, key=KEY) as reader:
        reader.verify(offset)


def test_damage_is_named_by_file_and_offset(tmp_path: Path) -> None:
    [_, (path, offset)] = write(tmp_path, encoded(0), encoded(1))
    data = bytearray(path.read_bytes())
    data[offset + 2000] ^= 1
    path.write_bytes(data)
    with SegmentReader(path, key=KEY) as reader:
        with pytest.raises(BankError, match=rf"000000\.seg is damaged at offset {offset}: tokens 0 to 63"):
            reader.read(offset, tokens=5)


def test_an_intact_span_of_another_source_is_refused(tmp_path: Path) -> None:
    blue = source_key("blue")
    [(path, offset)] = write(tmp_path / "red", encoded())
    [(other, _)] = write(tmp_path / "blue", encoded(key=blue), key=blue)
    with pytest.raises(BankError, match="belongs to another source"):
        SegmentReader(other, key=KEY)
    head = path.read_bytes()[:offset]
    path.write_bytes(head + encoded(key=blue))
    with SegmentReader(path, key=KEY) as reader, pytest.raises(BankError, match="does not match its checksum"):
        reader.read(offset)


def test_chunks_cannot_trade_places(tmp_path: Path) -> None:
    tokens = span_tokens(0, count=128)
    [(path, offset)] = write(tmp_path, encoded(tokens=tokens))
    with SegmentReader(path, key=KEY) as reader:
        head = reader.head(offset)
    chunk = CHUNK_ROWS * head.row_bytes + 4
    data = bytearray(path.read_bytes())
    a, b, c = head.rows_offset, head.rows_offset + chunk, head.rows_offset + 2 * chunk
    data[a:c] = data[b:c] + data[a:b]
    path.write_bytes(data)
    with SegmentReader(path, key=KEY) as reader, pytest.raises(BankError, match="tokens 0 to 63"):
        reader.read(offset)


def test_files_roll_over_at_their_size(tmp_path: Path) -> None:
    spans = [encoded(n) for n in range(4)]
    places = write(tmp_path, *spans, segment_bytes=2 * len(spans[0]) + 1000)
    assert [path.name for path, _ in places] == ["000000.seg", "000000.seg", "000001.seg", "000001.seg"]
    for number, (path, offset) in enumerate(places):
        with SegmentReader(path, key=KEY) as reader:
            assert_same(reader.read(offset), span_tokens(number))


def test_a_torn_tail_is_cut_off_and_written_over(tmp_path: Path) -> None:
    [(path, offset)] = write(tmp_path, encoded(0))
    end = path.stat().st_size
    path.write_bytes(path.read_bytes() + encoded(1)[:500])
    (tmp_path / "000001.seg").write_bytes(b"torn")
    writer = SegmentWriter(tmp_path, key=KEY, segment_bytes=1 << 20, last=("000000.seg", end))
    assert writer.append(encoded(2)) == ("000000.seg", end)
    writer.close()
    assert not (tmp_path / "000001.seg").exists()
    with SegmentReader(path, key=KEY) as reader:
        assert_same(reader.read(offset), span_tokens(0))
        assert_same(reader.read(end), span_tokens(2))


def test_wide_values_are_kept_and_noted() -> None:
    tokens = span_tokens(0)
    tokens.features[0, 0] = 1e6
    start, stop = span_times(0)
    span = encode_span(tokens, start=start, stop=stop, key=KEY, keys=span_keys(0), codec=CODECS["fp16"])
    assert span.codec == "fp32" and len(span.notes) == 1


def test_format_1_is_read_as_it_was_written() -> None:
    """``format_1.seg`` was written by the last version of format 1: spans 0, 1 and 2 as fp32, fp16 and sq8."""
    with SegmentReader(Path(__file__).with_name("format_1.seg"), key=KEY) as reader:
        for number, (offset, codec) in enumerate([(325, "fp32"), (981, "fp16"), (1564, "sq8")]):
            true = span_tokens(number, count=5, width=4)
            head = reader.verify(offset)
            assert head.codecs == (codec, codec) and head.books == ("", "") and head.start == span_times(number)[0]
            assert [len(h) for h in head.headers] == [32 if codec == "sq8" else 0] * 2
            assert torch.equal(reader.keys(offset), span_keys(number))
            for count in (0, 3, 5):
                got = reader.read(offset, tokens=count)
                want = best(true, count)
                if codec != "sq8":
                    assert_same(got, want)
                    continue
                assert torch.equal(got.position, want.position) and torch.equal(got.score, want.score)
                for x, y in zip((got.features, *got.layers), (want.features, *want.layers), strict=True):
                    whole = (true.features, *true.layers)
                    step = max(float(w.max() - w.min()) for w in whole) / 255
                    torch.testing.assert_close(x, y, rtol=0, atol=0.51 * step)


def test_spans_of_both_formats_stand_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "000000.seg"
    path.write_bytes(Path(__file__).with_name("format_1.seg").read_bytes())
    end = path.stat().st_size
    writer = SegmentWriter(tmp_path, key=KEY, segment_bytes=1 << 20, last=("000000.seg", end))
    assert writer.append(encoded(3)) == ("000000.seg", end)
    writer.close()
    with SegmentReader(path, key=KEY) as reader:
        assert_same(reader.read(981), span_tokens(1, count=5, width=4))
        assert_same(reader.read(end), span_tokens(3))


def test_a_newer_format_and_an_unknown_codec_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_format, "VERSION", 3)
    [(path, offset)] = write(tmp_path / "a", encoded())
    monkeypatch.undo()
    with pytest.raises(BankError, match="has format 3 and this streamvid reads up to 2"):
        SegmentReader(path, key=KEY)
    monkeypatch.setitem(CODECS, "fp24", CODECS["fp32"])
    monkeypatch.setattr(CODECS["fp32"], "name", "fp24", raising=False)
    [(path, offset)] = write(tmp_path / "b", encoded(codec="fp24"))
    monkeypatch.undo()
    with SegmentReader(path, key=KEY) as reader, pytest.raises(BankError, match="stored as fp24"):
        reader.read(offset)


def test_features_and_layers_have_codecs_of_their_own(tmp_path: Path) -> None:
    tokens = span_tokens(0, num_layers=2)
    start, stop = span_times(0)
    data = encode_span(
        tokens,
        start=start,
        stop=stop,
        key=KEY,
        keys=span_keys(0),
        codec=CODECS["fp16"],
        layer_codecs=[CODECS["sq8"], CODECS["sq4"]],
    ).data
    [(path, offset)] = write(tmp_path, data)
    with SegmentReader(path, key=KEY) as reader:
        head, got = reader.head(offset), reader.read(offset, tokens=70)
    assert head.codecs == ("fp16", "sq8", "sq4") and [len(h) for h in head.headers] == [0, 64, 64]
    assert head.row_bytes == 40 + 32 + 16 + 8
    want = best(tokens, 70)
    assert torch.equal(got.features, want.features)
    fine, coarse = ((a - b).abs().max() for a, b in zip(got.layers, want.layers, strict=True))
    assert 0 < fine < 0.02 < coarse < 0.3


def test_spans_name_their_codebooks(tmp_path: Path) -> None:
    """What a span needs to be decoded is in its head, so a reader without the folder says so and guesses nothing."""
    codecs = FolderCodecs(CodecSetting.parse("sq8+pq"), Codebooks(tmp_path / "codebooks"))
    many = span_tokens(5, count=128)
    blocks = [x.repeat(33, 1) for x in (many.features, *many.layers)]
    codecs.keep(codecs.learn("m", blocks))
    codec, *layers = codecs.of("m", width=16, num_layers=1)
    tokens = span_tokens(5, count=128)
    start, stop = span_times(0)
    data = encode_span(
        tokens, start=start, stop=stop, key=KEY, keys=span_keys(0), codec=codec, layer_codecs=layers
    ).data
    [(path, offset)] = write(tmp_path / "segments", data)
    fresh = FolderCodecs(CodecSetting.parse("fp16"), Codebooks(tmp_path / "codebooks"))
    with SegmentReader(path, key=KEY, codecs=fresh) as reader:
        head = reader.verify(offset)
        assert head.books == (codec.digest, layers[0].digest) and head.headers == (b"", b"")
        whole, part = reader.read(offset), reader.read(offset, tokens=20)
    order = torch.argsort(tokens.score, descending=True, stable=True)[:20].sort().values
    assert torch.equal(part.features, whole.features[order]) and torch.equal(part.layers[0], whole.layers[0][order])
    assert float((whole.features - tokens.features).abs().max()) < 0.02
    assert torch.cosine_similarity(whole.layers[0], tokens.layers[0]).mean() > 0.95
    with (
        SegmentReader(path, key=KEY) as reader,
        pytest.raises(ValueError, match="with the codecs of its memory"),
    ):
        reader.read(offset)


def test_scores_must_be_numbers() -> None:
    tokens = span_tokens(0)
    tokens.score[3] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        encoded(tokens=tokens)
