"""How the bytes of a source reach FFmpeg: small objects that open the same source again and again.

They can be pickled, so that a source found by one process can be read by another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer

from streamvid.errors import SourceError
from streamvid.ingest.files import why_unreadable


class Opener(ABC):
    """A source that has been named and checked, not yet opened."""

    name: str
    """What to call it in messages; never holds credentials."""

    where: str
    """Absolute path or address; never holds credentials."""

    live: bool = False
    """Whether it can be read only once, as it comes."""

    @abstractmethod
    def open(self) -> InputContainer:
        """The container, from its start; raises SourceError in one line."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of how it was opened."""
        return ()


@dataclass(frozen=True)
class FileOpener(Opener):
    """A file of this machine."""

    path: Path
    name: str

    @property
    def where(self) -> str:  # type: ignore[override]
        """The path itself."""
        return str(self.path)

    def open(self) -> InputContainer:
        """Only this very file: no demuxer may follow a name that it finds inside."""
        try:
            return av.open(str(self.path), container_options={"protocol_whitelist": "file"}, metadata_errors="replace")
        except (av.error.FFmpegError, ValueError, OSError):
            raise SourceError(f"{self.name} {why_unreadable(self.path)}") from None
