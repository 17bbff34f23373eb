from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from streamvid.errors import SettingsError
from streamvid.memory import sizes
from streamvid.memory.bank import Bank
from streamvid.memory.codebooks import Codebooks
from streamvid.memory.codec import CodecSetting, FolderCodecs
from streamvid.memory.segment_format import encode_span
from streamvid.memory.segments import SegmentWriter
from streamvid.memory.sizes import FAMILIES, SHOWN, SourceHour, hour_bytes, megabytes_per_hour, source_hour, table
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


@pytest.mark.parametrize(
    "learned, codec",
    [
        *((True, codec) for codec in ("fp32", "fp16", "sq8", "sq4", "pq", "sq8+sq4", "fp16+pq")),
        *((False, codec) for codec in ("fp16", "sq8", "sq4", "sq4+sq8")),
    ],
)
@pytest.mark.parametrize("tokens, layers, spans", [(150, 2, 1), (130, 0, 7), (23, 1, 7), (15, 1, 5), (3, 1, 5)])
def test_an_hour_is_as_large_as_its_segment_file(
    tmp_path: Path, learned: bool, codec: str, tokens: int, layers: int, spans: int
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
        learned=learned,
    )
    assert said == written(tmp_path, codec, tokens=tokens, layers=layers, spans=spans, learned=learned)


def an_hour(folder: Path, codec: str, *, spans: int, seconds: int = 3600, layers: int = 2) -> SourceHour | None:
    """What an hour takes of a source with 20 tokens in each of its spans."""
    with Bank.open(folder, codec=codec) as bank:
        with bank.writer(KEY, path="a.mp4", name="a.mp4") as writer:
            for number in range(spans):
                writer.append(
                    one_span(20, layers, number),
                    start=Fraction(seconds * number, max(spans, 1)),
                    stop=Fraction(seconds * (number + 1), max(spans, 1)),
                    keys=torch.rand(3, 7),
                )
            if spans:
                writer.finish({})
        return source_hour(bank, bank.source("a.mp4"))


def test_an_hour_of_a_source_is_that_of_its_file_and_of_every_other_codec(tmp_path: Path) -> None:
    hour = an_hour(tmp_path / "a", "fp16", spans=7)
    assert hour is not None
    assert (hour.tokens, hour.spans, hour.width, hour.layers) == (140, 7, WIDTH, 2)
    assert hour.codec == "fp16" and hour.stored_as == {"fp16": 7} and set(hour.by_codec) == set(SHOWN)
    # A source that lasts an hour: what is computed for the codec in use is its file, to the byte.
    assert hour.by_codec["fp16"] == hour.megabytes
    other = an_hour(tmp_path / "b", "fp32", spans=7)
    assert other is not None and other.megabytes == hour.by_codec["fp32"]
    assert other.by_codec == pytest.approx(hour.by_codec)


def test_a_codec_that_is_in_use_is_shown_though_it_is_not_usual(tmp_path: Path) -> None:
    hour = an_hour(tmp_path, "fp16+fp32", spans=2)
    assert hour is not None and hour.codec == "fp16+fp32" and hour.by_codec["fp16+fp32"] == hour.megabytes


def test_many_short_spans_are_counted_in_part_and_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = an_hour(tmp_path, "fp16", spans=60, seconds=3000)
    monkeypatch.setattr(sizes, "COUNTED_SPANS", 20)
    with Bank.open(tmp_path) as bank:
        part = source_hour(bank, bank.source("a.mp4"))
    assert whole is not None and part is not None
    assert part.by_codec == pytest.approx(whole.by_codec, rel=0.05) and part.by_codec != whole.by_codec


def test_nothing_stored_has_no_hour(tmp_path: Path) -> None:
    assert an_hour(tmp_path, "fp16", spans=0) is None


def test_more_of_anything_is_larger() -> None:
    base = megabytes_per_hour("sq8", 6000, 2048, 3, 450)
    assert megabytes_per_hour("sq8", 6001, 2048, 3, 450) - base == pytest.approx((40 + 4 * 2048) / 1e6, abs=1e-5)
    assert megabytes_per_hour("sq8", 6000, 2048, 3, 451) > base > megabytes_per_hour("sq8", 6000, 2048, 3, 449)
    sizes = [megabytes_per_hour(codec, 6000, 2048, 3, 450) for codec in ("pq", "sq8+pq", "sq8+sq4", "sq8", "fp16")]
    assert sizes == sorted(sizes)


def test_the_table_has_a_cell_for_every_codec_and_family() -> None:
    assert {line.split(" ")[1] for line in table(spans_per_hour=1).splitlines()[2:]} == set(SHOWN)
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
