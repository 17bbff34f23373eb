"""Memory for video language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamvid.lazy import lazily

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

# The process that decodes does without torch, so nothing is imported before it is asked for.
_HOMES = {
    "budget": ("Budget", "Limits"),
    "errors": ("BankError", "MissingExtra", "SettingsError", "SourceError", "StreamvidError", "UnsupportedError"),
    "frames": ("Clip", "Frame"),
    "receipt": ("Receipt",),
    "reduction": ("Reduction",),
    "signals": ("Signal", "Signals"),
    "tokens": ("VideoTokens",),
}
__getattr__ = lazily(__name__, _HOMES)

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
