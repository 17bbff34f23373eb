"""How many bytes an hour of remembered video takes: from the codecs' own sizes and the layout of segments, exactly.

Knows what is in segment files; what the catalogue adds for a span is not in it: docs/codecs.md says how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from streamvid.memory.bank import Bank
from streamvid.memory.codec import CODECS, Codec, CodecSetting
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import SourceRecord
from streamvid.memory.segment_format import ROW_BYTES, file_header, span_bytes, span_meta
from streamvid.memory.segments import SegmentReader

HOUR = 3600

SHOWN = ("fp32", "fp16", "sq8", "sq8+sq4", "sq4", "sq8+pq", "pq")
"""Codec settings worth comparing, from exact to small."""

COUNTED_SPANS = 3600
"""Spans that are laid out one by one for an hour of a source; of more a part is, and the rest is like it."""

FAMILIES: Mapping[str, tuple[int, int]] = {
    "toy": (192, 1),
    "1024": (1024, 0),
    "2048 and 3 deepstack layers": (2048, 3),
    "2048": (2048, 0),
    "3584": (3584, 0),
    "4096": (4096, 0),
}
"""Width D and number of further layers of model families."""

_BOOK = "0" * 64

_KEY = MemoryKey(content="0" * 64, sampling={}, model="", processor="", methods=[], embedder="")


def megabytes_per_hour(codec: str, tokens_per_hour: int, width: int, layers: int, spans_per_hour: int) -> float:
    """Megabytes (10^6 bytes) of segments that an hour of video adds, codecs having learned: see `hour_bytes`.

    Args:
        codec: a name, or FEATURES+LAYERS.
        tokens_per_hour: what is left after reduction.
        width: D.
        layers: how many further layers each token has.
        spans_per_hour: how many spans that is; fewer means fewer headers.
    """
    size = hour_bytes(codec, tokens_per_hour=tokens_per_hour, width=width, layers=layers, spans_per_hour=spans_per_hour)
    return size / 1e6


def hour_bytes(
    codec: str,
    *,
    tokens_per_hour: int,
    width: int,
    layers: int,
    spans_per_hour: int,
    keys_per_span: int = 4,
    key_width: int = 512,
    exceptions: int = 0,
    learned: bool = True,
    key: MemoryKey = _KEY,
    dtype: str = "bfloat16",
    grid: tuple[int, int, int] = (4, 16, 16),
) -> int:
    """Bytes of a segment file that holds an hour of video, file header included.

    Tokens and seconds are spread evenly over the spans; the first ones take what cannot be spread.

    Args:
        codec: a name, or FEATURES+LAYERS.
        tokens_per_hour: what is left after reduction.
        width: D.
        layers: how many further layers each token has.
        spans_per_hour: how many spans that is, >= 1; fewer means fewer headers.
        keys_per_span: retrieval keys, one a temporal patch.
        key_width: Dk; 512 to 1152 for SigLIP and CLIP.
        exceptions: in how many dimensions the features of each span leave the learned ranges, 6 bytes each.
        learned: whether there are codebooks; without, spans have ranges of their own.
        key: of the source.
        dtype: of the features.
        grid: (T, H, W) of a span before reduction.

    Raises:
        SettingsError: if there is no such codec.
        ValueError: if numbers are out of range, or pq is to store without having learned.
    """
    if min(tokens_per_hour, layers, keys_per_span, exceptions) < 0 or width < 1 or spans_per_hour < 1:
        raise ValueError(f"an hour has at least one span and no negative counts, got {spans_per_hour=}")
    setting = CodecSetting.parse(codec)
    asked = [setting.of(layer) for layer in range(layers + 1)]
    if not learned and "pq" in (setting.features, setting.layers):
        raise ValueError("pq stores nothing before it has learned: say learned=True, or sq8 for the spans before")
    total = len(file_header(key))
    each, more = divmod(tokens_per_hour, spans_per_hour)
    for number in range(spans_per_hour):
        tokens = each + (number < more)
        used = [_stored_as(c, tokens, width, learned=learned) for c in asked]
        sizes = [0 if learned else c.header_bytes(width) for c in used]
        sizes[0] += 6 * exceptions
        meta = span_meta(
            key=key,
            start=Fraction(HOUR * number, spans_per_hour),
            stop=Fraction(HOUR * (number + 1), spans_per_hour),
            grid=grid,
            tokens=tokens,
            width=width,
            dtype=dtype,
            blocks=[(c.name, n, _BOOK if c.learns and learned else "") for c, n in zip(used, sizes, strict=True)],
            keys=(keys_per_span, key_width),
        )
        total += span_bytes(
            meta_bytes=len(meta),
            header_bytes=sum(sizes),
            tokens=tokens,
            row_bytes=ROW_BYTES + sum(c.row_bytes(width) for c in used),
            key_bytes=4 * keys_per_span * key_width,
        )
    return total


@dataclass(frozen=True, slots=True)
class SourceHour:
    """What an hour of one remembered source takes."""

    megabytes: float
    """Of segment files (10^6 bytes), as they lie on the disk; space not given back yet is in it."""

    tokens: float
    spans: float
    width: int
    """D"""

    layers: int
    """Further layers of each token."""

    codec: str
    """What most spans store features as, with the layers' codec of the last of them."""

    stored_as: Mapping[str, int]
    """Spans by what they store features as, most first."""

    by_codec: Mapping[str, float]
    """Megabytes of the same tokens in each codec setting, ranges learned and never left; `codec` is among them."""


def source_hour(bank: Bank, source: SourceRecord) -> SourceHour | None:
    """What an hour of a source takes, measured over the length of its video; None if nothing is stored of it.

    Raises:
        BankError: if its last span cannot be read.
    """
    seconds = source.duration if source.duration is not None else source.stop
    with bank._catalog.snapshot():
        kinds = bank._catalog.execute(
            "SELECT codec, COUNT(*) AS spans, MAX(id) AS last FROM spans WHERE source_id = ? GROUP BY codec "
            "ORDER BY spans DESC, codec",
            source.id,
        ).fetchall()
        last = bank._catalog.span(kinds[0]["last"]) if kinds else None
    if last is None or not seconds:
        return None
    with SegmentReader(bank.folder / source.folder / last.file, key=source.key) as reader:
        head = reader.head(last.offset)
    used = str(CodecSetting(head.codecs[0], head.codecs[-1]))
    hours = float(seconds) / HOUR
    tokens, spans = source.tokens / hours, source.spans / hours
    parts = -(-int(spans) // COUNTED_SPANS) or 1
    by_codec = {
        setting: parts
        * hour_bytes(
            setting,
            tokens_per_hour=round(tokens / parts),
            width=head.width,
            layers=len(head.codecs) - 1,
            spans_per_hour=max(1, round(spans / parts)),
            keys_per_span=head.key_shape[0],
            key_width=head.key_shape[1],
            key=source.key,
            dtype=str(head.dtype).removeprefix("torch."),
            grid=head.grid,
        )
        / 1e6
        for setting in dict.fromkeys((*SHOWN, used))
    }
    return SourceHour(
        megabytes=source.num_bytes / 1e6 / hours,
        tokens=tokens,
        spans=spans,
        width=head.width,
        layers=len(head.codecs) - 1,
        codec=used,
        stored_as={kind["codec"]: kind["spans"] for kind in kinds},
        by_codec=by_codec,
    )


def table(
    codecs: Sequence[str] = SHOWN,
    *,
    tokens_per_hour: int = 6000,
    spans_per_hour: int = 450,
) -> str:
    """Megabytes an hour in Markdown, codecs down, families across."""
    lines = ["| MB an hour | " + " | ".join(FAMILIES) + " |", "|---|" + "---:|" * len(FAMILIES)]
    for codec in codecs:
        cells = by_family(codec, tokens_per_hour=tokens_per_hour, spans_per_hour=spans_per_hour).values()
        lines.append(f"| {codec} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def by_family(codec: str, *, tokens_per_hour: int, spans_per_hour: int) -> dict[str, float]:
    """Megabytes an hour for each of `FAMILIES`; see `megabytes_per_hour`."""
    return {
        name: megabytes_per_hour(codec, tokens_per_hour, width, layers, spans_per_hour)
        for name, (width, layers) in FAMILIES.items()
    }


def _stored_as(codec: Codec, tokens: int, width: int, *, learned: bool) -> Codec:
    """What a codec stores so many tokens as: fp16 where it would save nothing."""
    header = 0 if learned else codec.header_bytes(width)
    if codec.learns and header + tokens * codec.row_bytes(width) >= 2 * tokens * width:
        return CODECS["fp16"]
    return codec
