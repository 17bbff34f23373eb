from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from streamvid.errors import SettingsError
from streamvid.memory.codebooks import Codebooks
from streamvid.memory.codec import CodecSetting, FolderCodecs
from streamvid.memory.segments import SegmentWriter, encode_span
from streamvid.memory.sizes import FAMILIES, hour_bytes, megabytes_per_hour, table
from streamvid.tokens import VideoTokens
from tests.memory.spans import KEY

WIDTH = 12
GRID = (4, 5, 6)


def one_span(count: int, layers: int, seed: int) -> VideoTokens:
    """Tokens within what was learned: no dimension leaves its range."""
    random = torch.Generator().manual_seed(seed)
    return VideoTokens(
        features=torch.rand(count, WIDTH, generator=random),
        layers=tuple(torch.rand(count, WIDTH, generator=random) for _ in range(layers)),
        grid=GRID,
        position=torch.zeros(count, 3, dtype=torch.int64),
        pts_seconds=torch.zeros(count, dtype=torch.float64),
        duration_seconds=torch.ones(count, dtype=torch.float64),
        size=torch.ones(count),
        score=torch.arange(count).float(),
    )


def written(folder: Path, codec: str, *, tokens: int, layers: int, spans: int, learned: bool, keys: int = 3) -> int:
    """Size of a real segment file with an hour of video in it."""
    codecs = FolderCodecs(CodecSetting.parse(codec), Codebooks(folder / "codebooks"))
    if learned:
        first = one_span(4096, layers, 99)
        codecs.keep(codecs.learn("m", [first.features, *first.layers]))
    first_codec, *layer_codecs = codecs.of("m", width=WIDTH, num_layers=layers)
    writer = SegmentWriter(folder / "a", key=KEY, segment_bytes=1 << 30, last=None)
    for number in range(spans):
        count = tokens // spans + (number < tokens % spans)
        span = encode_span(
            one_span(count, layers, number),
            start=Fraction(3600 * number, spans),
            stop=Fraction(3600 * (number + 1), spans),
            key=KEY,
            keys=torch.rand(keys, 7),
            codec=first_codec,
            layer_codecs=layer_codecs,
        )
        writer.append(span.data)
    writer.close()
    [path] = (folder / "a").glob("*.seg")
    return path.stat().st_size


@pytest.mark.parametrize("codec", ["fp32", "fp16", "sq8", "sq4", "pq", "sq8+sq4", "fp16+pq"])
@pytest.mark.parametrize("tokens, layers, spans", [(150, 2, 1), (130, 0, 7), (23, 1, 7), (3, 1, 5)])
def test_an_hour_is_as_large_as_its_segment_file(
    tmp_path: Path, codec: str, tokens: int, layers: int, spans: int
) -> None:
    said = hour_bytes(
        codec,
        tokens_per_hour=tokens,
        width=WIDTH,
        layers=layers,
        spans_per_hour=spans,
        keys_per_span=3,
        key_width=7,
        key=KEY,
        dtype="float32",
        grid=GRID,
    )
    assert said == written(tmp_path, codec, tokens=tokens, layers=layers, spans=spans, learned=True)


@pytest.mark.parametrize("codec", ["fp16", "sq8", "sq4", "sq4+sq8"])
@pytest.mark.parametrize("tokens, layers, spans", [(150, 2, 1), (130, 0, 7), (23, 1, 7), (15, 1, 5)])
def test_so_is_one_before_anything_was_learned(
    tmp_path: Path, codec: str, tokens: int, layers: int, spans: int
) -> None:
    said = hour_bytes(
        codec,
        tokens_per_hour=tokens,
        width=WIDTH,
        layers=layers,
        spans_per_hour=spans,
        keys_per_span=3,
        key_width=7,
        key=KEY,
        dtype="float32",
        grid=GRID,
        learned=False,
    )
    assert said == written(tmp_path, codec, tokens=tokens, layers=layers, spans=spans, learned=False)


def test_more_of_anything_is_larger() -> None:
    base = megabytes_per_hour("sq8", 6000, 2048, 3, 450)
    assert megabytes_per_hour("sq8", 6001, 2048, 3, 450) - base == pytest.approx((40 + 4 * 2048) / 1e6, abs=1e-5)
    assert megabytes_per_hour("sq8", 6000, 2048, 3, 451) > base > megabytes_per_hour("sq8", 6000, 2048, 3, 449)
    sizes = [megabytes_per_hour(codec, 6000, 2048, 3, 450) for codec in ("pq", "sq8+pq", "sq8+sq4", "sq8", "fp16")]
    assert sizes == sorted(sizes)


def test_the_table_has_a_cell_for_every_codec_and_family() -> None:
    lines = table(("fp16", "sq8"), tokens_per_hour=500, spans_per_hour=10).splitlines()
    assert len(lines) == 4 and all(line.count("|") == len(FAMILIES) + 2 for line in lines)
    assert lines[3].startswith("| sq8 |") and f"| {megabytes_per_hour('sq8', 500, 4096, 0, 10):.1f} |" in lines[3]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match="did you mean sq8"):
        megabytes_per_hour("sq9", 1, 1, 0, 1)
    with pytest.raises(ValueError, match="at least one span"):
        megabytes_per_hour("sq8", 1, 8, 0, 0)
    with pytest.raises(ValueError, match="pq stores nothing before"):
        hour_bytes("sq8+pq", tokens_per_hour=9, width=8, layers=1, spans_per_hour=1, learned=False)
