"""Sources: frames with exact times."""

from streamvid.ingest.clips import clips
from streamvid.ingest.files import redact
from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
from streamvid.ingest.sampling import Plan, SampledFrames, Sampling, SamplingReport
from streamvid.ingest.source import DECODERS, Source, SourceInfo, open_source

__all__ = [
    "DECODERS",
    "DecodeStats",
    "Picture",
    "Pictures",
    "Plan",
    "SampledFrames",
    "Sampling",
    "SamplingReport",
    "Source",
    "SourceInfo",
    "clips",
    "open_source",
    "redact",
]
