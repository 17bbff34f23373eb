"""What a source is, and what reading all of it finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from streamvid.errors import SourceError
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.reader import Readable, Reader, SourceInfo

GAP_FACTOR = 3
"""A picture that stays so many times as long as the usual one leaves a gap."""

GAP_SECONDS = Fraction(1, 2)
"""Shorter than this is no gap, however fast pictures usually follow."""

_LISTED = 100


@dataclass(frozen=True, slots=True)
class Survey:
    """What decoding every picture found."""

    frames: int
    """Pictures that are shown."""

    first: Fraction | None
    """When the first appears, in seconds."""

    last: Fraction | None
    """When the last appears, in seconds."""

    end: Fraction | None
    """When the last is gone, in seconds."""

    longest: Fraction
    """Longest time one picture stays, in seconds."""

    gaps: tuple[tuple[Fraction, Fraction], ...]
    """[start, stop) of stretches without a new picture, in seconds: the first hundred."""

    gap_count: int
    stats: DecodeStats


def survey(reader: Readable) -> Survey:
    """Decode everything and look at the times; nothing is converted or kept.

    Raises:
        SourceError: if no picture is shown, although the first one could be decoded by itself.
    """
    assert isinstance(reader, Reader)
    frames = gap_count = 0
    first = before = end = None
    longest = usual = Fraction(0)
    gaps: list[tuple[Fraction, Fraction]] = []
    with reader.pictures() as pictures:
        for picture in pictures:
            if before is None:
                first = picture.pts
            else:
                stay = picture.pts - before
                longest = max(longest, stay)
                if usual and stay > max(GAP_FACTOR * usual, GAP_SECONDS):
                    gap_count += 1
                    if len(gaps) < _LISTED:
                        gaps.append((before, picture.pts))
                else:
                    usual = stay if not usual else usual + (stay - usual) / 8
                    usual = usual.limit_denominator(1_000_000)
            before, end = picture.pts, picture.pts + picture.duration
            frames += 1
        stats = replace(pictures.stats)
    if not frames:
        raise SourceError(f"{reader.info.name} shows no picture when all of it is read; it is damaged: copy it again")
    return Survey(frames, first, before, end, longest, tuple(gaps), gap_count, stats)


def facts(info: SourceInfo) -> dict[str, Any]:
    """The source in plain values: times as seconds and, where they must be exact, as fractions."""
    return {
        "path": info.path,
        "name": info.name,
        "container": info.container,
        "codec": info.codec,
        "width": info.width,
        "height": info.height,
        "duration_seconds": _seconds(info.duration),
        "duration": _text(info.duration),
        "start_seconds": _seconds(info.start),
        "start": _text(info.start),
        "time_base": _text(info.time_base),
        "average_fps": None if info.average_rate is None else round(float(info.average_rate), 6),
        "rotation": info.rotation,
        "color": info.colour,
        "streams": list(info.streams),
        "live": info.live,
        "decoder": info.decoder,
        "decoder_reason": info.chosen,
        "notes": list(info.notes),
    }


def found(result: Survey) -> dict[str, Any]:
    """A survey in plain values."""
    return {
        "frames": result.frames,
        "first_pts_seconds": _seconds(result.first),
        "first_pts": _text(result.first),
        "last_pts_seconds": _seconds(result.last),
        "last_pts": _text(result.last),
        "end_seconds": _seconds(result.end),
        "longest_stay_seconds": _seconds(result.longest),
        "gaps": [[_seconds(a), _seconds(b)] for a, b in result.gaps],
        "gap_count": result.gap_count,
        "damage": asdict(result.stats),
    }


def _seconds(value: Fraction | None) -> float | None:
    return None if value is None else round(float(value), 6)


def _text(value: Fraction | None) -> str | None:
    return None if value is None else str(value)
