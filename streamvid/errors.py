"""Everything streamvid raises on purpose.

::

    StreamvidError
    ├── SourceError        a video cannot be opened, read or decoded
    ├── UnsupportedError   a model, method or format cannot do what was asked
    ├── SettingsError      a setting has a value or a name that makes no sense
    │   └── MissingExtra   an optional package is needed and not installed
    └── BankError          the memory on disk cannot be read or written

Wrong arguments in library calls stay ``ValueError`` and ``TypeError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StreamvidError(Exception):
    """Base of all errors a user can act on; the message says value, rule and next step in one line."""


class SourceError(StreamvidError):
    """A video cannot be opened, read or decoded."""


class UnsupportedError(StreamvidError):
    """What was asked is well formed, but this model, method or format cannot do it."""


class SettingsError(StreamvidError):
    """A setting has an unknown name or an impossible value."""


class MissingExtra(SettingsError):
    """An optional package is needed; the message is the exact install line."""

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install -c constraints.txt -e '.[{extra}]'")


class BankError(StreamvidError):
    """The memory on disk cannot be read or written; nothing that was stored has been changed."""


class Vanished(BankError):
    """Spans were merged, expired or removed since they were looked up; looking again finds what there is now."""


def near(name: str, known: Iterable[str]) -> str:
    """A clause that suggests the nearest known names, for the end of a message.

    Example: ``near("frame_fuson", ["frame_fusion", "rlt"])`` gives ``did you mean frame_fusion?``
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(options)}"
