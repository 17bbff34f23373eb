from __future__ import annotations

import pytest
import torch

from streamvid.errors import BankError, SettingsError
from streamvid.memory.codec import CODECS, codec_by_name

WIDTH = 24


def vectors(count: int = 70) -> torch.Tensor:
    """Random, with one constant dimension and one outlier dimension as visual tokens have."""
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 300
    x[:, 5] = 2.0
    return x


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_as_announced(name: str) -> None:
    codec = codec_by_name(name)
    encoded = codec.encode(vectors())
    assert len(encoded.header) == codec.header_bytes(WIDTH)
    assert encoded.rows.shape == (70, codec.row_bytes(WIDTH))
    assert encoded.codec == name and not encoded.note


@pytest.mark.parametrize("count", [0, 1, 7, 64, 70])
@pytest.mark.parametrize("name", CODECS)
def test_first_rows_decode_alone(name: str, count: int) -> None:
    codec = codec_by_name(name)
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


def test_sq8_errs_by_half_a_step_of_each_dimensions_range() -> None:
    x = vectors()
    encoded = CODECS["sq8"].encode(x)
    error = (CODECS["sq8"].decode(encoded.header, encoded.rows, width=WIDTH) - x).abs().amax(0)
    step = (x.amax(0) - x.amin(0)) / 255
    assert bool((error <= 0.5 * step * 1.001 + 1e-6).all())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("count", [0, 1])
def test_few_vectors(name: str, count: int) -> None:
    codec = codec_by_name(name)
    x = vectors(count)
    encoded = codec.encode(x)
    torch.testing.assert_close(codec.decode(encoded.header, encoded.rows, width=WIDTH), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    x = vectors()
    x[0, 0] = value
    with pytest.raises(BankError, match="1 values that are not finite"):
        codec_by_name(name).encode(x)


def test_unknown_codec_suggests_near_ones() -> None:
    with pytest.raises(SettingsError, match="did you mean fp"):
        codec_by_name("fp161")
