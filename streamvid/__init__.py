"""Memory for video language models."""

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
