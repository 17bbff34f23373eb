"""How the bytes of a source reach FFmpeg: small objects that open the same source again and again.

They can be pickled, so that a source found by one process can be read by another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.video.stream import VideoStream

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

    slack: Fraction | None = None
    """How many seconds of pictures may come at once where they come in real time; None where they do not."""

    timeless: bool = False
    """Whether pictures have no times, so that they appear when they come."""

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
            return open_container(str(self.path), protocols="file", hwaccel=self.hwaccel)
        except (av.error.FFmpegError, ValueError, OSError):
            try:
                reason = why_unreadable(self.path)
            except OSError as gone:
                reason = f"cannot be read any more: {gone.strerror}"
            raise SourceError(f"{self.name} {reason}") from None


def open_container(source: Any, *, protocols: str, hwaccel: str | None, format: str | None = None) -> InputContainer:
    """A path or a file object, opened by FFmpeg; what it finds inside may use no other protocols."""

    def opened(device: HWAccel | None) -> InputContainer:
        container: InputContainer = av.open(
            source,
            "r",
            format,
            container_options={"protocol_whitelist": protocols},
            options={"max_pixels": str(MAX_PIXELS)},
            metadata_errors="replace",
            hwaccel=device,
        )
        return container

    if hwaccel is not None:
        # A device that is not there is met here; a codec it does not know is decoded in software.
        with suppress(av.error.FFmpegError, RuntimeError):
            return opened(HWAccel(device_type=hwaccel, allow_software_fallback=True))
        if not isinstance(source, str):
            source.seek(0)
    return opened(None)


def hardware_notes(opener: Opener, stream: VideoStream) -> tuple[str, ...]:
    """Whether the hardware that was asked for decodes."""
    if opener.hwaccel is None or stream.codec_context.is_hwaccel:
        return ()
    return (f"{opener.hwaccel} was asked for and cannot decode this here; it is decoded in software",)
