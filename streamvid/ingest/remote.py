"""Films and playlists at http addresses, and playlists in folders, as openers."""

from __future__ import annotations

from typing import Any

import av
from av.container import InputContainer

from streamvid.errors import SourceError
from streamvid.ingest.files import label
from streamvid.ingest.http import HttpFile
from streamvid.ingest.openers import MAX_PIXELS, Opener
from streamvid.ingest.playlist import Playlist, is_playlist
from streamvid.ingest.pulse import PULSE

_HEAD_BYTES = 4096


class HttpOpener(Opener):
    """A film at an http or https address; passes share what has been fetched.

    Args:
        address: may hold credentials; only the server is told.
        stall_seconds: no byte for so long is an error.
        file: the address, open already.
    """

    def __init__(self, address: str, *, stall_seconds: float, file: HttpFile | None = None) -> None:
        self._address, self._stall_seconds, self._file = address, stall_seconds, file
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
            return av.open(
                _Beating(file),
                "r",
                container_options={"protocol_whitelist": ""},
                options={"max_pixels": str(MAX_PIXELS)},
                metadata_errors="replace",
            )
        except (av.error.FFmpegError, ValueError, OSError):
            reason = "is no video that can be read: of no known format, cut off or damaged; open it in a browser"
            raise file.failure or SourceError(f"{self.name} {reason}") from None


class PlaylistOpener(Opener):
    """An HLS or DASH playlist."""

    def __init__(self, playlist: Playlist) -> None:
        self._playlist = playlist
        self.name = self.where = label(playlist.address)
        self.live = playlist.live

    @property
    def notes(self) -> tuple[str, ...]:
        """Which version is read and what was not as it should be."""
        return self._playlist.notes

    def open(self) -> InputContainer:
        """A container with the chosen version alone."""
        return self._playlist.open()


def playlist(address: str, *, stall_seconds: float) -> Opener:
    """A playlist in a folder or at an address."""
    return PlaylistOpener(Playlist(address, stall_seconds=stall_seconds))


def http(address: str, *, stall_seconds: float) -> Opener:
    """What lies at an address: a playlist, or anything else."""
    file = HttpFile(address, stall_seconds=stall_seconds)
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if is_playlist(head or b"") is not None:
        file.close()
        return playlist(address, stall_seconds=stall_seconds)
    return HttpOpener(address, stall_seconds=stall_seconds, file=file)


class _Beating:
    """A file whose every read is a sign of life."""

    def __init__(self, file: HttpFile) -> None:
        self._file = file
        self.name = file.name

    def read(self, count: int) -> bytes:
        PULSE.beat()
        return self._file.read(count) or b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
