"""What an answer was made of: what was seen, dropped, remembered, retrieved and spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class StageCost:
    """One stage's share."""

    name: str
    seconds: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True, slots=True)
class GivenSpan:
    """A stretch of video of which tokens were given to the model."""

    start_seconds: float
    stop_seconds: float
    similarity: float | None
    """To the question, higher is better; None when recall did not look at it."""

    tokens: int
    stored: int
    """Tokens the memory holds of it."""

    attention: float | None = None
    """What the model itself paid it when it read the question, higher is more; None when recall did not ask."""


@dataclass(frozen=True, slots=True)
class TimeFilter:
    """What the question said about time, and what it did to recall."""

    ranges: list[tuple[float, float]]
    """[start, stop) in seconds that recall was held to."""

    words: list[str]
    """The expressions, as they stand in the question."""

    notes: list[str]
    """How they were read."""

    spans: int
    """Remembered spans inside; 0: nothing is remembered of that time, and nothing was given."""


@dataclass(slots=True)
class Receipt:
    """One answer's account.  Seconds are wall clock; tokens are visual tokens unless named otherwise."""

    source: str = ""
    model: str = ""
    cache: str = "miss"
    """"hit": the memory was complete, nothing was decoded or encoded.  "partial": an unfinished memory
    was continued.  "miss": the video was watched for this question."""

    key: str = ""
    """First characters of the memory key."""

    start_seconds: float = 0.0
    stop_seconds: float = 0.0
    duration_seconds: float | None = None
    frames_decoded: int = 0
    frames_sampled: int = 0
    frames_encoded: int = 0
    """Sampled frames of which at least one patch entered the vision tower in this run."""

    frames_remembered: int = 0
    """Sampled frames the memory is made of, whenever they were encoded."""

    effective_fps: float = 0.0
    longest_gap_seconds: float = 0.0
    """Longest stretch of the watched video between two sampled frames."""

    sampling: str = "rate"
    """How frames were chosen: "rate", "keys" (key frames) or "adaptive" (by what changes)."""

    frames_looked_at: int = 0
    """Pictures compared with the latest frame; 0 unless sampling is adaptive."""

    decoder: str = ""
    decoder_reason: str = ""
    decoding: dict[str, int] = field(default_factory=dict)
    """Counts of what decoding met when the video was watched; see ``ingest.DecodeStats``."""

    tokens_seen: int = 0
    """Tokens of the watched video before any reduction."""

    tokens_encoded: int = 0
    """Tokens that left the vision tower."""

    tokens_remembered: int = 0
    tokens_given: int = 0
    """Tokens given to the language model for this answer."""

    tokens_last_layer: int = 0
    budget: int = 0
    recall: str = ""
    index: str = ""
    """What searched the memory, and why that."""

    recall_settings: dict[str, object] = field(default_factory=dict)
    time: TimeFilter | None = None
    """None where the question names no time."""

    spans: list[GivenSpan] = field(default_factory=list)
    stages: list[StageCost] = field(default_factory=list)
    methods: list[dict[str, object]] = field(default_factory=list)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Tokens of the prompt whose keys and values an earlier question had left."""

    new_tokens: int = 0
    stopped: str = ""
    memory_bytes: int = 0
    peak_rss_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    passing: list[str] = field(default_factory=list)
    """Those of the warnings that concern this one question and not the next."""

    def stage(self, name: str) -> StageCost:
        """The account of a stage, opened when first named."""
        for cost in self.stages:
            if cost.name == name:
                return cost
        self.stages.append(StageCost(name))
        return self.stages[-1]

    def warn(self, text: str, *, passing: bool = False) -> None:
        """Note a request that could not be honoured, once; ``passing`` if it concerns this question alone."""
        if text not in self.warnings:
            self.warnings.append(text)
            if passing:
                self.passing.append(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; seconds rounded to the millisecond."""
        out: dict[str, Any] = _rounded(asdict(self))
        return out

    def short(self) -> str:
        """The few lines shown beside every answer."""
        seconds = sum(cost.seconds for cost in self.stages)
        given = f"{self.tokens_given:,} of {self.tokens_seen:,} tokens given"
        lines = [
            f"seen: {self.start_seconds:.1f}-{self.stop_seconds:.1f} s, {self.frames_remembered} frames "
            f"({self.effective_fps:.2f} fps, longest gap {self.longest_gap_seconds:.2f} s), {given} "
            f"({self.tokens_remembered:,} remembered)",
            f"cache: {self.cache}, key {self.key}; {self.model}; {seconds:.2f} s"
            + (
                f" ({', '.join(f'{c.name} {c.seconds:.2f}' for c in self.stages if c.seconds >= 0.005)})"
                if seconds
                else ""
            )
            + (
                f"; {self.reused_tokens:,} of {self.prompt_tokens:,} prompt tokens reused" if self.reused_tokens else ""
            ),
        ]
        if self.time is not None:
            held = ", ".join(f"{start:.1f}-{stop:.1f} s" for start, stop in self.time.ranges)
            said = " and ".join(f'"{words}"' for words in self.time.words)
            lines.append(
                f"time: {held} ({'; '.join([said, *self.time.notes])}), {self.time.spans} spans remembered of it"
            )
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value
