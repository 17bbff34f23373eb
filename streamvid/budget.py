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
    """Hard limits that are checked before anything is allocated.

    Args:
        answer_tokens: visual tokens that one answer may read, >= 1.
        disk_bytes: what one memory folder may hold; None for no limit.
    """

    answer_tokens: int = 8192
    disk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.answer_tokens < 1:
            raise SettingsError(
                f"the token budget of an answer must be at least 1, got {self.answer_tokens}; "
                "a typical budget is 500 to 8000"
            )
        if self.disk_bytes is not None and self.disk_bytes < 1:
            raise SettingsError(
                f"the disk limit must be at least 1 byte, got {self.disk_bytes}; leave it out for no limit"
            )
