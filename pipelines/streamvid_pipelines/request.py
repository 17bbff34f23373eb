"""What can be asked for about watching and answering, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streamvid import defaults
from streamvid.budget import Limits
from streamvid.errors import SettingsError, near
from streamvid.ingest.named import Decoding
from streamvid.ingest.sampling import Adaptive, Sampling

if TYPE_CHECKING:
    from streamvid.temporal.methods.base import MemoryMethod

SAMPLINGS = ("fps", "keys", "adaptive")
"""Ways to choose frames: at a rate, key frames only, by what changes."""


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that can be set about watching and answering; defaults suit one video and one question."""

    model: str = "auto"
    embedder: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    sample: str = "fps"
    fps: float | None = None
    max_frames: int | None = None
    start_seconds: float | None = None
    stop_seconds: float | None = None
    reduce: str = defaults.REDUCE
    recall: str = "hybrid"
    budget: int = Limits().answer_tokens
    max_new_tokens: int = 256
    memory: Path | None = None
    disk_bytes: int | None = None
    source_bytes: int | None = None
    ram_bytes: int | None = None
    vram_bytes: int | None = None
    keep: bool = False
    codec: str = defaults.CODEC
    fresh: bool = False
    keep_kv: bool = False
    toy_allowed: bool = True
    decoder: str = "auto"
    rate: float | None = None
    hwaccel: str | None = None
    decode_threads: int | None = None
    stall_seconds: float = 30.0
    threads: int | None = None

    def check(self) -> None:
        """Raise SettingsError for what can be seen to be wrong before anything is loaded."""
        # here, so that a process that asks another one does not load what it will not use
        from streamvid.memory.codec import CodecSetting
        from streamvid.temporal.methods.compose import Chain

        Chain.parse(self.reduce)
        CodecSetting.parse(self.codec)
        self.recall_method()
        self.limits()
        self.sampling(1.0, 1)
        self.decoding()
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise SettingsError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        if self.max_new_tokens < 1:
            raise SettingsError(f"an answer needs at least 1 new token, got --max-new-tokens {self.max_new_tokens}")

    def limits(self) -> Limits:
        """The hard limits."""
        return Limits(
            answer_tokens=self.budget,
            disk_bytes=self.disk_bytes,
            source_bytes=self.source_bytes,
            ram_bytes=self.ram_bytes,
            vram_bytes=self.vram_bytes,
        )

    def recall_method(self) -> MemoryMethod:
        """The recall method by name; raises SettingsError if it is not one."""
        from streamvid.temporal.methods.base import MemoryMethod
        from streamvid.temporal.methods.registry import build

        method = build(self.recall)
        if not isinstance(method, MemoryMethod):
            raise SettingsError(f"{self.recall} does not recall; it belongs into --reduce")
        return method

    def sampling(self, default_fps: float, max_frames: int) -> Sampling:
        """The sampling, the model's own rate and limit where nothing was asked."""
        if self.sample not in SAMPLINGS:
            raise SettingsError(f"unknown sampling {self.sample!r}; {near(self.sample, SAMPLINGS)}")
        return Sampling(
            fps=self.fps if self.fps is not None else default_fps if self.sample == "fps" else None,
            max_frames=self.max_frames if self.max_frames is not None else max_frames,
            start=self.start_seconds,
            stop=self.stop_seconds,
            keys=self.sample == "keys",
            adaptive=Adaptive() if self.sample == "adaptive" else None,
        )

    def decoding(self) -> Decoding:
        """How the source is decoded."""
        return Decoding(self.decoder, self.decode_threads, self.hwaccel, self.stall_seconds)
