"""Look at a source without a model."""

from __future__ import annotations

from typing import Any

from streamvid.errors import SourceError
from streamvid.ingest.probe import facts, found, survey
from streamvid.ingest.source import open_source
from streamvid_pipelines.ask import Request


def probe_one(path: str, request: Request, *, decode: bool) -> dict[str, Any]:
    """What is known of a source; with ``decode`` also what reading all of it finds.

    Raises:
        SourceError: if it cannot be read, or is to be read to an end that it does not have.
    """
    settings = request.decoding()
    with open_source(
        path,
        rate=request.rate,
        decoder=settings.decoder,
        threads=settings.threads,
        hwaccel=settings.hwaccel,
        stall_seconds=settings.stall_seconds,
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
