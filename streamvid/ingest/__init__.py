"""Sources: frames with exact times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamvid.lazy import lazily

if TYPE_CHECKING:
    from streamvid.ingest.files import redact
    from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
    from streamvid.ingest.reader import Reader, SourceInfo
    from streamvid.ingest.sampling import Adaptive, Plan, Sampler, Sampling, SamplingReport, Shot
    from streamvid.ingest.source import DECODERS, SampledFrames, Source, open_source
    from streamvid.ingest.supervised import Gap, Notice, Patience, Supervised

# The process that decodes does without torch, so nothing is imported before it is asked for.
_HOMES = {
    "files": ("redact",),
    "pictures": ("DecodeStats", "Picture", "Pictures"),
    "reader": ("Reader", "SourceInfo"),
    "sampling": ("Adaptive", "Plan", "Sampler", "Sampling", "SamplingReport", "Shot"),
    "source": ("DECODERS", "SampledFrames", "Source", "open_source"),
    "supervised": ("Gap", "Notice", "Patience", "Supervised"),
}
__getattr__ = lazily(__name__, _HOMES)

__all__ = [
    "Adaptive",
    "DECODERS",
    "DecodeStats",
    "Gap",
    "Notice",
    "Patience",
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
    "Supervised",
    "open_source",
    "redact",
]
