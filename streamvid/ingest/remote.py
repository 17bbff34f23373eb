"""Films and playlists at http addresses, and playlists in folders, as openers."""

from __future__ import annotations

from typing import Any

import av
from av.container import InputContainer

from streamvid.errors import SourceError
from streamvid.ingest.files import is_playlist, label
from streamvid.ingest.http import HttpFile, NoFile
from streamvid.ingest.mjpeg import MjpegOpener
from streamvid.ingest.openers import Opener, open_container
from streamvid.ingest.playlist import Playlist

_HEAD_BYTES = 4096


class HttpOpener(Opener):
    """A film at an http or https address; passes share what has been fetched.

    Args:
        address: may hold credentials; only the server is told.
        stall_seconds: no byte for so long is an error.
        file: the address, open already.
    """

    def __init__(
        self, address: str, *, stall_seconds: float, file: HttpFile | None = None, hwaccel: str | None = None
    ) -> None:
        self._address, self._stall_seconds, self._file, self.hwaccel = address, stall_seconds, file, hwaccel
        self.name = self.where = label(address)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the server did not do as it should."""
        return self._file.notes if self._file is not None else ()

    def open(self) -> InputContainer:
        """The container; what is read of it is fetched then."""
        if self._file is None:
            self._file = HttpFile(self._address, stall_seconds=self._stall_seconds)
        file = self._file.reopen()
        try:
            # No format may open further addresses, and none is given by the name.
            return open_container(file, protocols="none", hwaccel=self.hwaccel)
        except (av.error.FFmpegError, ValueError, OSError):
            reason = "is no video that can be read: of no known format, cut off or damaged; open it in a browser"
            raise file.failure or SourceError(f"{self.name} {reason}") from None


class PlaylistOpener(Opener):
    """An HLS or DASH playlist."""

    def __init__(self, playlist: Playlist, hwaccel: str | None = None) -> None:
        self._playlist, self.hwaccel = playlist, hwaccel
        self.name = self.where = label(playlist.address)
        self.live = playlist.live
        self.slack = playlist.burst if self.live else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Which version is read and what was not as it should be."""
        return self._playlist.notes

    def open(self) -> InputContainer:
        """A container with the chosen version alone."""
        return self._playlist.open()


def playlist(address: str, *, stall_seconds: float, hwaccel: str | None = None) -> Opener:
    """A playlist in a folder or at an address; always decoded in software."""
    return PlaylistOpener(Playlist(address, stall_seconds=stall_seconds), hwaccel)


def http(address: str, *, stall_seconds: float, hwaccel: str | None = None) -> Opener:
    """What lies at an address: a playlist, pictures without an end, or anything else."""
    try:
        file = HttpFile(address, stall_seconds=stall_seconds)
    except NoFile:
        return MjpegOpener(address, stall_seconds=stall_seconds)
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if is_playlist(head or b"") is not None:
        file.close()
        return playlist(address, stall_seconds=stall_seconds, hwaccel=hwaccel)
    return HttpOpener(address, stall_seconds=stall_seconds, file=file, hwaccel=hwaccel)
