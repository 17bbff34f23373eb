"""Look at a source without a model."""

from __future__ import annotations

from typing import Any

from streamvid.errors import SourceError
from streamvid.ingest.named import Decoding
from streamvid.ingest.probe import facts, found, survey
from streamvid.ingest.source import open_source


def probe_one(path: str, decoding: Decoding, *, rate: float | None, decode: bool) -> dict[str, Any]:
    """What is known of a source; with ``decode`` also what reading all of it finds.

    Raises:
        SourceError: if it cannot be read, or is to be read to an end that it does not have.
    """
    with open_source(
        path,
        rate=rate,
        decoder=decoding.decoder,
        threads=decoding.threads,
        hwaccel=decoding.hwaccel,
        stall_seconds=decoding.stall_seconds,
    ) as source:
        info = source.info
        out = facts(info)
        if info.live:
            if decode:
                raise SourceError(f"{info.name} has no end to read to; probe it without --decode")
            return {**out, "frames": None}
        out["frames"] = source.count_pictures(info.start, info.start + 10**12)
        if decode:
            out["decoded"] = found(source.call(survey))
        return out
