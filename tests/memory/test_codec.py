from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.errors import BankError, SettingsError
from streamvid.memory import faiss_index
from streamvid.memory.codebooks import Codebook
from streamvid.memory.codec import CODECS, DEFAULT_CODEC, Codec, CodecSetting, Encoded, Sq4, Sq8, codec_by_name

WIDTH = 24


def vectors(count: int = 70, *, seed: int = 0) -> torch.Tensor:
    """Random, with one constant dimension and one outlier dimension as visual tokens have."""
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 300
    x[:, 5] = 2.0
    return x


def taught(name: str, *, count: int = 600, width: int = WIDTH) -> Codec:
    """A codec that learned from other vectors of the same kind."""
    codec = codec_by_name(name)
    x = vectors(count, seed=1)[:, :width]
    return codec.with_book(Codebook(codec.learns, "m", width, 0, count, codec.learn(x)))


ALL = {
    **{name: codec for name, codec in CODECS.items() if name != "pq"},
    **{f"{name} taught": taught(name) for name in ("sq8", "sq4", "pq")},
}


def decode(codec: Codec, encoded: Encoded, *, width: int = WIDTH) -> torch.Tensor:
    """By the codec the rows are said to need."""
    reader = codec if encoded.book else CODECS[encoded.codec]
    return reader.decode(encoded.header, encoded.rows, width=width)


def steps(name: str) -> int:
    return 16 if "sq4" in name else 256


@pytest.mark.parametrize("name", ALL)
def test_sizes_are_as_announced(name: str) -> None:
    codec = ALL[name]
    encoded = codec.encode(vectors())
    assert encoded.rows.shape == (70, codec.row_bytes(WIDTH))
    assert encoded.codec == codec.name and not encoded.note
    assert encoded.book == codec.digest
    exceptions = len(encoded.header) - codec.header_bytes(WIDTH)
    assert exceptions == 0 or (codec.book is not None and exceptions % 6 == 0 and exceptions < 4 * WIDTH)


@pytest.mark.parametrize("count", [0, 1, 7, 64, 70])
@pytest.mark.parametrize("name", ALL)
def test_first_rows_decode_alone(name: str, count: int) -> None:
    codec = ALL[name]
    encoded = codec.encode(vectors())
    whole = codec.decode(encoded.header, encoded.rows, width=WIDTH)
    assert torch.equal(codec.decode(encoded.header, encoded.rows[:count], width=WIDTH), whole[:count])


def test_fp32_loses_nothing() -> None:
    encoded = CODECS["fp32"].encode(vectors())
    assert torch.equal(CODECS["fp32"].decode(encoded.header, encoded.rows, width=WIDTH), vectors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp16_loses_nothing_of_half_precision_models(dtype: torch.dtype) -> None:
    x = vectors().to(dtype)
    x = torch.where(x.abs() < 6.2e-5, 0, x)  # smaller bfloat16 numbers are rounded: documented
    encoded = CODECS["fp16"].encode(x)
    assert torch.equal(CODECS["fp16"].decode(encoded.header, encoded.rows, width=WIDTH).to(dtype), x)


def test_beyond_fp16_falls_back_to_fp32_and_says_so() -> None:
    x = vectors()
    x[2, 2] = -1e6
    encoded = CODECS["fp16"].encode(x)
    assert encoded.codec == "fp32" and "beyond fp16" in encoded.note
    assert torch.equal(CODECS["fp32"].decode(encoded.header, encoded.rows, width=WIDTH), x)


@pytest.mark.parametrize("name", ["sq8", "sq4"])
def test_own_ranges_err_by_half_a_step_of_each_dimensions_range(name: str) -> None:
    x = vectors()
    error = (decode(CODECS[name], CODECS[name].encode(x)) - x).abs().amax(0)
    wide = x.amax(0) - x.amin(0) + 2e-3 * x.abs().amax(0)  # float16 rounds ranges outwards by up to 2^-10 twice
    assert bool((error <= 0.5 * wide / steps(name) * 1.001 + 1e-6).all())
    assert float(error[5]) == 0  # a constant that float16 holds comes back exactly


@pytest.mark.parametrize("name", ["sq8", "sq4"])
def test_learned_ranges_never_clip(name: str) -> None:
    """Vectors five times larger than what was learned from leave every range but the constant one."""
    codec, x = taught(name), vectors(40, seed=2)
    wild = x.clone()
    wild[7, :10] *= 5
    encoded = codec.encode(wild)
    assert encoded.book and 6 <= len(encoded.header) <= 4 * WIDTH
    error = (decode(codec, encoded) - wild).abs().amax(0)
    assert codec.book is not None
    shared = torch.from_numpy(codec.book.arrays["range"].astype(np.float32))
    reach = torch.maximum(shared, wild.amax(0) - wild.amin(0)) + 2e-3 * wild.abs().amax(0)
    assert bool((error <= 0.5 * reach / steps(name) * 1.001 + 1e-6).all())


def test_vectors_unlike_those_learned_from_get_ranges_of_their_own() -> None:
    codec, x = taught("sq8"), vectors(40) * 50 + 1000
    encoded = codec.encode(x)
    assert not encoded.book and len(encoded.header) == 4 * WIDTH
    assert float((decode(codec, encoded) - x).abs().max()) <= 0.5 * float((x.amax(0) - x.amin(0)).max() + 64) / 256


def test_values_beyond_float16_have_float32_ranges() -> None:
    x = vectors()
    x[:, 4] *= 1e7
    for codec in (CODECS["sq8"], taught("sq8")):
        encoded = codec.encode(x)
        assert encoded.codec == "sq8" and len(encoded.header) == 8 * WIDTH
        error = (decode(codec, encoded) - x).abs().amax(0)
        assert bool((error <= 0.51 * (x.amax(0) - x.amin(0)) / 255 + 1e-6).all())


def test_a_span_wider_than_float32_is_stored_as_fp32() -> None:
    x = vectors()
    x[0, 0], x[1, 0] = -3e38, 3e38
    encoded = CODECS["sq8"].encode(x)
    assert encoded.codec == "fp32" and "more than float32" in encoded.note
    assert torch.equal(decode(CODECS["sq8"], encoded), x)


@pytest.mark.parametrize("name, fp16_up_to", [("sq8", 4), ("sq4", 2)])
def test_few_vectors_are_fp16_where_that_is_not_larger(name: str, fp16_up_to: int) -> None:
    for count in range(7):
        encoded = CODECS[name].encode(vectors(count))
        assert encoded.codec == ("fp16" if count <= fp16_up_to else name), count
        assert len(encoded.header) + encoded.rows.size <= 2 * count * WIDTH


def test_headers_are_gone_once_ranges_are_learned() -> None:
    """The least a span of 16 tokens took: 8 bytes a dimension in format 1, 4 with ranges of its own, 0 now."""
    codec, x = taught("sq8", count=1024), vectors(16, seed=3)
    own, learned = CODECS["sq8"].encode(x), codec.encode(x)
    assert len(own.header) == 4 * WIDTH
    assert len(learned.header) <= 6 and learned.rows.shape == own.rows.shape


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.floats(1e-6, 1e4),
    st.floats(-1e4, 1e4),
    st.integers(0, 10_000),
    st.sampled_from(["sq8", "sq4"]),
)
def test_no_value_is_ever_off_by_more_than_half_a_step(
    width: int, count: int, scale: float, offset: float, seed: int, name: str
) -> None:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + offset
    learned = CODECS[name].with_book(Codebook("ranges", "m", width, 0, 30, CODECS[name].learn(x[: count // 2 + 1])))
    for codec in (CODECS[name], learned):
        error = (decode(codec, codec.encode(x), width=width) - x).abs().amax(0).double()
        reach = 1.25 * (x.amax(0) - x.amin(0)).double() + 4e-3 * x.abs().amax(0) + 1e-6
        assert bool((error <= 0.5 * reach / steps(name) + 1e-3 * x.abs().amax(0) * (count <= 4) + 6e-8).all())


@pytest.mark.parametrize("make", [Sq8, Sq4])
@pytest.mark.parametrize("width", [1, 2, 23, 24])
def test_without_faiss_the_same_is_stored_and_read(
    make: type[Sq8] | type[Sq4], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = vectors()[:, :width]
    codec = make()
    by_faiss = codec.encode(x)
    read = codec.decode(by_faiss.header, by_faiss.rows, width=width)

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(faiss_index.importlib, "import_module", missing)
    plain = codec.encode(x)
    assert "without faiss" in plain.note and plain.header == by_faiss.header
    assert np.array_equal(plain.rows, by_faiss.rows)
    torch.testing.assert_close(codec.decode(plain.header, plain.rows, width=width), read, rtol=1e-6, atol=1e-4)


def test_pq_before_it_learned_is_sq8_and_says_so() -> None:
    encoded = CODECS["pq"].encode(vectors())
    assert encoded.codec == "sq8" and "pq learns from 4096 tokens" in encoded.note


def test_pq_finds_what_it_learned() -> None:
    """256 different groups of four for 256 entries: most have one of their own, the rest a near one."""
    random = torch.Generator().manual_seed(0)
    groups = torch.randint(-8, 8, (256, 4), generator=random).float()
    groups[:, 0] = torch.arange(256)
    x = groups.repeat(4, 1)
    pq = CODECS["pq"].with_book(Codebook("pq", "m", 4, 0, len(x), CODECS["pq"].learn(x)))
    encoded = pq.encode(x)
    assert encoded.rows.shape == (1024, 1)
    assert torch.cosine_similarity(pq.decode(encoded.header, encoded.rows, width=4), x).mean() > 0.98
    assert len(np.unique(encoded.rows)) > 128


def test_pq_keeps_outlier_channels_and_the_rest_alike() -> None:
    codec, x = taught("pq", count=2000), vectors(500, seed=4)
    y = decode(codec, codec.encode(x))
    left = (y - x).var(0) / x.var(0).clamp_min(1e-9)
    varied = torch.arange(WIDTH) != 5
    assert float(left[varied].max()) < 0.35 and float(left[3]) < 0.3
    assert torch.equal(y[:, 5], x[:, 5])


@pytest.mark.parametrize("width, row", [(4, 1), (6, 1), (7, 1), (9, 1), (10, 2), (192, 48), (3584, 896)])
def test_pq_takes_any_width(width: int, row: int) -> None:
    assert CODECS["pq"].row_bytes(width) == row


def test_learning_twice_gives_the_same() -> None:
    for name in ("sq8", "pq"):
        one, two = taught(name), taught(name)
        assert one.digest == two.digest and len(one.digest) == 64


def test_a_codebook_of_another_kind_is_refused() -> None:
    book = taught("sq8").book
    assert book is not None
    with pytest.raises(ValueError, match="pq learns pq, got a codebook of ranges"):
        CODECS["pq"].with_book(book)
    with pytest.raises(TypeError, match="fp16 learns nothing"):
        CODECS["fp16"].learn(vectors())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [0, 1])
def test_few_vectors(name: str, count: int) -> None:
    x = vectors(count)
    got = decode(ALL[name], ALL[name].encode(x))
    assert got.shape == x.shape
    if "pq" not in name and "sq4 taught" not in name:
        torch.testing.assert_close(got, x, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    x = vectors()
    x[0, 0] = value
    with pytest.raises(BankError, match="1 values that are not finite"):
        codec_by_name(name).encode(x)


def test_headers_and_rows_of_other_sizes_are_refused() -> None:
    encoded = CODECS["sq8"].encode(vectors())
    with pytest.raises(ValueError, match="behind a header of 96"):
        CODECS["sq8"].decode(encoded.header[:-1], encoded.rows, width=WIDTH)
    with pytest.raises(ValueError, match="need the codebook"):
        CODECS["pq"].decode(b"", encoded.rows[:, :6], width=WIDTH)


def test_unknown_codec_suggests_near_ones() -> None:
    with pytest.raises(SettingsError, match="did you mean fp"):
        codec_by_name("fp161")


def test_a_setting_is_one_name_or_two() -> None:
    assert CodecSetting.parse("sq8") == CodecSetting("sq8", "sq8") and str(CodecSetting.parse("sq8")) == "sq8"
    assert CodecSetting.parse("sq8+sq4") == CodecSetting("sq8", "sq4")
    assert str(CodecSetting.parse(" sq8 + sq4 ")) == "sq8+sq4"
    assert [CodecSetting.parse("sq8+pq").of(layer).name for layer in range(3)] == ["sq8", "pq", "pq"]
    assert CodecSetting.parse(DEFAULT_CODEC).features in CODECS


@pytest.mark.parametrize("text, message", [("sq9", "did you mean sq8"), ("sq8+pqq", "did you mean pq"), ("", "known:")])
def test_wrong_settings_suggest_near_names(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CodecSetting.parse(text)


def test_three_names_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"'sq8\+sq4\+pq' with 3 names"):
        CodecSetting.parse("sq8+sq4+pq")
