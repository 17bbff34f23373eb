"""Memory for video language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamvid.budget import Budget, Limits
    from streamvid.errors import (
        BankError,
        MissingExtra,
        SettingsError,
        SourceError,
        StreamvidError,
        UnsupportedError,
    )
    from streamvid.frames import Clip, Frame
    from streamvid.receipt import Receipt
    from streamvid.reduction import Reduction
    from streamvid.signals import Signal, Signals
    from streamvid.tokens import VideoTokens

_HOMES = {
    "budget": ("Budget", "Limits"),
    "errors": ("BankError", "MissingExtra", "SettingsError", "SourceError", "StreamvidError", "UnsupportedError"),
    "frames": ("Clip", "Frame"),
    "receipt": ("Receipt",),
    "reduction": ("Reduction",),
    "signals": ("Signal", "Signals"),
    "tokens": ("VideoTokens",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BankError",
    "Budget",
    "Clip",
    "Frame",
    "Limits",
    "MissingExtra",
    "Receipt",
    "Reduction",
    "SettingsError",
    "Signal",
    "Signals",
    "SourceError",
    "StreamvidError",
    "UnsupportedError",
    "VideoTokens",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: a process that only decodes does without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
