"""A chain of methods, checked when it is put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from streamvid import defaults, errors
from streamvid.temporal.methods.base import (
    EmbeddingMethod,
    LlmMethod,
    MemoryMethod,
    Method,
    PixelMethod,
    Stage,
)
from streamvid.temporal.methods.registry import build, method_id

DEFAULT = defaults.REDUCE
"""What is reduced when nothing is said."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Methods in the order data passes them."""

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        order = list(Stage)
        places = [order.index(m.stage) for m in self.methods]
        if places != sorted(places):
            names = ", ".join(f"{method_id(m)} ({m.stage.value})" for m in self.methods)
            raise errors.SettingsError(
                f"methods must stand in the order data passes them ({' > '.join(order)}), got {names}"
            )
        for method in self.methods:
            if isinstance(method, MemoryMethod):
                raise errors.SettingsError(
                    f"{method_id(method)} chooses what an answer reads from memory; "
                    f"give it as --recall {method_id(method)}"
                )

    @classmethod
    def parse(cls, text: str) -> Self:
        """A chain from ``rlt,fastvid:keep_ratio=0.25``; ``none`` is the empty chain.

        A comma starts a new method unless what follows is a further ``key=value`` of the one before.
        """
        if text.strip() in ("none", ""):
            return cls()
        parts: list[str] = []
        for piece in text.split(","):
            if parts and "=" in piece and ":" not in piece:
                parts[-1] += "," + piece.strip()
            else:
                parts.append(piece.strip())
        return cls(tuple(build(part) for part in parts))

    def spawn(self) -> Chain:
        """The same chain with fresh state, for another stream."""
        return Chain(tuple(method.spawn() for method in self.methods))

    @property
    def pixel(self) -> tuple[PixelMethod, ...]:
        """Methods before the vision tower."""
        return tuple(m for m in self.methods if isinstance(m, PixelMethod))

    @property
    def embedding(self) -> tuple[EmbeddingMethod, ...]:
        """Methods on projected tokens."""
        return tuple(m for m in self.methods if isinstance(m, EmbeddingMethod))

    @property
    def llm(self) -> tuple[LlmMethod, ...]:
        """Methods between decoder layers."""
        return tuple(m for m in self.methods if isinstance(m, LlmMethod))

    def describe(self, *, ingest_only: bool = False) -> list[dict[str, object]]:
        """Ids and settings as plain values, for keys and receipts."""
        chosen = (*self.pixel, *self.embedding) if ingest_only else self.methods
        return [{"method": method_id(m), **{k: _plain(v) for k, v in m.settings().items()}} for m in chosen]


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | type(None)) else repr(value)
