"""How the bytes of a source reach FFmpeg: small objects that open the same source again and again.

They can be pickled, so that a source found by one process can be read by another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.codec.hwaccel import HWAccel
from av.container import InputContainer

from streamvid.errors import SourceError
from streamvid.ingest.files import why_unreadable

MAX_PIXELS = 1 << 28
"""Larger pictures are refused before memory is set aside for them; 16384 x 16384."""


class Opener(ABC):
    """A source that has been named and checked, not yet opened."""

    name: str
    """What to call it in messages; never holds credentials."""

    where: str
    """Absolute path or address; never holds credentials."""

    live: bool = False
    """Whether it can be read only once, as it comes."""

    hwaccel: str | None = None
    """Hardware to decode with, where it can."""

    rate: Fraction | None = None
    """Pictures a second if the source has no times of its own."""

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
    hwaccel: str | None = None
    rate: Fraction | None = None

    @property
    def where(self) -> str:  # type: ignore[override]
        """The path itself."""
        return str(self.path)

    def open(self) -> InputContainer:
        """Only this very file: no demuxer may follow a name that it finds inside."""
        try:
            if self.hwaccel is not None:
                # A device that is not there is met here; a codec it does not know is decoded in software.
                with suppress(av.error.FFmpegError, RuntimeError):
                    return self._open(HWAccel(device_type=self.hwaccel, allow_software_fallback=True))
            return self._open(None)
        except (av.error.FFmpegError, ValueError, OSError):
            raise SourceError(f"{self.name} {why_unreadable(self.path)}") from None

    def _open(self, hwaccel: HWAccel | None) -> InputContainer:
        return av.open(
            str(self.path),
            container_options={"protocol_whitelist": "file"},
            options={"max_pixels": str(MAX_PIXELS)},
            metadata_errors="replace",
            hwaccel=hwaccel,
        )
