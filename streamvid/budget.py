"""What is kept, and what may be spent."""

from __future__ import annotations

from dataclasses import dataclass

from streamvid.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of something is *kept*: a number of tokens or a share, never both.

    Args:
        tokens: keep at most this many, >= 1.
        keep_ratio: keep this share, in (0, 1]; larger keeps more.

    Raises:
        SettingsError: if both or neither are given, or a value is out of range.
    """

    tokens: int | None = None
    keep_ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.keep_ratio is None):
            raise SettingsError(
                f"a budget is either tokens or keep_ratio, got tokens={self.tokens} and keep_ratio={self.keep_ratio}"
            )
        if self.tokens is not None and self.tokens < 1:
            raise SettingsError(
                f"a budget must be at least 1 token, got {self.tokens}; to keep everything leave it out"
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise SettingsError(
                f"keep_ratio must be in (0, 1], got {self.keep_ratio}; to keep everything leave the method out"
            )

    def count(self, total: int) -> int:
        """How many of ``total`` are kept: rounded down, at least one of a non-empty lot, never more than there are."""
        if total <= 0:
            return 0
        if self.tokens is not None:
            return min(self.tokens, total)
        assert self.keep_ratio is not None
        return min(total, max(1, int(total * self.keep_ratio + 1e-9)))


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits that are checked before anything is allocated or written.

    What happens at each of them is told in ``docs/limits.md``.  None means no limit.

    Args:
        answer_tokens: visual tokens that one answer may read, >= 1.
        disk_bytes: what one memory folder may hold, catalogue included; old spans are made smaller, then
            expired, to stay below.  Smaller forgets sooner.
        source_bytes: what the segment files of one source may hold, in the same way.
        source_tokens: tokens that may be remembered of one source, in the same way.
        ram_bytes: main memory that an answer on the CPU may take, what is in use already included;
            answers are given fewer tokens.
        vram_bytes: the same for the memory of an accelerator.
        keep_seconds: what stopped longer than this before the end of its source is expired; > 0.
    """

    answer_tokens: int = 8192
    disk_bytes: int | None = None
    source_bytes: int | None = None
    source_tokens: int | None = None
    ram_bytes: int | None = None
    vram_bytes: int | None = None
    keep_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.answer_tokens < 1:
            raise SettingsError(
                f"the token budget of an answer must be at least 1, got {self.answer_tokens}; "
                "a typical budget is 500 to 8000"
            )
        for what, unit, value in (
            ("disk limit", "byte", self.disk_bytes),
            ("disk limit of a source", "byte", self.source_bytes),
            ("token limit of a source", "token", self.source_tokens),
            ("memory limit", "byte", self.ram_bytes),
            ("accelerator memory limit", "byte", self.vram_bytes),
        ):
            if value is not None and value < 1:
                raise SettingsError(f"the {what} must be at least 1 {unit}, got {value}; leave it out for no limit")
        if self.keep_seconds is not None and not 0 < self.keep_seconds < float("inf"):
            raise SettingsError(
                f"the age limit must be more than 0 seconds, got {self.keep_seconds}; leave it out to keep all"
            )

    @property
    def bounds_memory(self) -> bool:
        """Whether anything limits what is remembered."""
        return any(
            limit is not None for limit in (self.disk_bytes, self.source_bytes, self.source_tokens, self.keep_seconds)
        )
