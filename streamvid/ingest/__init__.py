"""Sources: frames with exact times."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamvid.ingest.files import redact
    from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
    from streamvid.ingest.reader import Reader, SourceInfo
    from streamvid.ingest.sampling import Plan, Sampler, Sampling, SamplingReport, Shot
    from streamvid.ingest.source import DECODERS, SampledFrames, Source, open_source

_HOMES = {
    "files": ("redact",),
    "pictures": ("DecodeStats", "Picture", "Pictures"),
    "reader": ("Reader", "SourceInfo"),
    "sampling": ("Plan", "Sampler", "Sampling", "SamplingReport", "Shot"),
    "source": ("DECODERS", "SampledFrames", "Source", "open_source"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DECODERS",
    "DecodeStats",
    "Picture",
    "Pictures",
    "Plan",
    "Reader",
    "SampledFrames",
    "Sampler",
    "Sampling",
    "SamplingReport",
    "Shot",
    "Source",
    "SourceInfo",
    "open_source",
    "redact",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: the process that decodes does without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
