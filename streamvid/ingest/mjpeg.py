"""Motion JPEG over HTTP, as network cameras send it: one answer without an end, a picture in each of its parts."""

from __future__ import annotations

import io
from collections.abc import Generator
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer

from streamvid.errors import SourceError
from streamvid.ingest.devices import Hopeless
from streamvid.ingest.files import label
from streamvid.ingest.http import PICTURES_IN_PARTS, refusal
from streamvid.ingest.openers import Opener, open_container
from streamvid.ingest.web import BrokenConnection, Web

_HOPELESS = frozenset({401, 403, 404, 410})


class MjpegOpener(Opener):
    """A camera's ``multipart/x-mixed-replace`` answer, read as it comes and kept nowhere.

    Its pictures have no times: each appears when it is here.

    Args:
        address: may hold credentials; only the server is told.
        stall_seconds: no byte for so long is an error, > 0.
    """

    live = timeless = True
    slack = Fraction(0)

    def __init__(self, address: str, *, stall_seconds: float) -> None:
        self._address, self._stall_seconds = address, stall_seconds
        self.name = self.where = label(address)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where times come from."""
        return ("the pictures have no times of their own; each appears when it is here",)

    def open(self) -> InputContainer:
        """The running stream."""
        web = Web(stall_seconds=self._stall_seconds)
        web.trust(self._address)
        response, _ = web.get(self._address, {})
        status, kind = response.status_code, response.headers.get("content-type", "")
        if status != 200 or not kind.lower().startswith(PICTURES_IN_PARTS):
            response.close()
            wrong = "no longer sends a stream of pictures; open it again"
            if status != 200:
                wrong = refusal(status, response.reason_phrase, "authorization" in response.request.headers)
            raise (Hopeless if status in _HOPELESS else SourceError)(f"{self.name} {wrong}")
        answer = _Answer(web.chunks(response, self.name))
        try:
            return open_container(answer, protocols="none", hwaccel=None, format="mpjpeg")
        except (av.error.FFmpegError, ValueError, OSError):
            answer.close()
            raise SourceError(f"{self.name} sends parts that are no JPEG pictures; open it in a browser") from None


class _Answer(io.RawIOBase):
    """The body of an answer as FFmpeg reads it; it ends where the connection does."""

    def __init__(self, chunks: Generator[bytes]) -> None:
        super().__init__()
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        try:
            while not self._rest:
                self._rest = memoryview(next(self._chunks))
        except (StopIteration, BrokenConnection):
            return 0
        count = min(len(view), len(self._rest))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._chunks.close()
        super().close()
