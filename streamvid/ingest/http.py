"""A file at an http address: parts of it are fetched when somebody reads them.

Knows HTTP and nothing of video.  PyAV reads an :class:`HttpFile` like a file on disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Generator
from threading import RLock
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import httpx2

from streamvid.errors import SourceError
from streamvid.ingest.files import label
from streamvid.ingest.web import BrokenConnection, Web

BLOCK: Final = 1 << 18
"""What is fetched and kept at least, 256 KiB: a key frame with its neighbours, and about what a
50 Mbit/s line delivers in one round trip of 40 ms.  Smaller asks more often, larger fetches more
that nobody reads."""
_KEPT_BLOCKS = 64
"""16 MiB: holds the index of a film of several hours, which every new pass over it reads again."""
_LARGEST_WINDOW = 256 * BLOCK
_SKIP = 2 * BLOCK
"""A short way forward is read and kept; a new request would take longer."""
_BODIES = 3
"""Bodies read in order at a time: pictures, sound and index may lie far apart."""
_EXPIRED = frozenset({401, 403, 404, 410})
_ROOM_STEP = 1 << 26
_SAMPLES, _SAMPLE_BYTES = 8, 1 << 16
_PART = re.compile(r"bytes (\d+)-\d+/(\d+)")
_LENGTH = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")
PICTURES_IN_PARTS: Final = "multipart/x-mixed-replace"
"""The type of what cameras send over HTTP: one JPEG after another, without an end."""

_EMPTY = "is empty (0 bytes); check the address"
_CHANGED = "changed while it was read; open it again"


class NoFile(SourceError):
    """What lies there has no end."""


class HttpFile(io.RawIOBase):
    """An http or https address as a file that can be read anywhere.

    If the server answers ranges, blocks of 256 KiB are fetched where something is read; while
    reading goes on in order, requests grow (512 KiB, 1 MiB, ... 64 MiB) and their bodies are read
    as they come.  Otherwise the file is downloaded once, in order and as far as needed, into a
    temporary file that is gone after ``close``.  One object has one position and serves one
    reader; :meth:`reopen` makes more, for any thread.

    A broken connection is resumed.  A file that ends early ends there, with a note.  Any other
    trouble is a SourceError, raised once: from then on the object is at its end and ``failure``
    holds what happened, because FFmpeg reads on after an error and must come to an end.

    Args:
        address: http or https; a login as ``user:password@`` goes to that server only.
        stall_seconds: no byte for so long is an error; > 0.
        attempts: how often in a row something may fail that may work the next time; >= 1.
        max_download_bytes: how much is downloaded from a server without ranges.
        ahead_bytes: what is asked for first and after a jump, rounded up to blocks.  Larger makes
            fewer requests and may fetch what nobody reads.
        text: whether the body may be text that is no playlist.
        web: connections to use instead of ``stall_seconds`` and ``attempts``; the caller closes them.

    Raises:
        SourceError: one line that says what is there instead of a file.
        SettingsError: for settings out of range.
    """

    def __init__(
        self,
        address: str,
        *,
        stall_seconds: float = 30.0,
        attempts: int = 4,
        max_download_bytes: int = 8 << 30,
        ahead_bytes: int = BLOCK,
        text: bool = False,
        web: Web | None = None,
    ) -> None:
        super().__init__()
        self.failure: SourceError | None = None
        self._position = 0
        self._shared: _Remote | None = None
        own = web is None
        if web is None:
            web = Web(stall_seconds=stall_seconds, attempts=attempts)
            web.trust(address)
        self._shared = _Remote(address, web, own=own, limit=max_download_bytes, ahead=ahead_bytes, text=text)

    def reopen(self) -> HttpFile:
        """Another reader at position 0 that shares connections, blocks and what was downloaded."""
        other = HttpFile.__new__(HttpFile)
        other.failure, other._position, other._shared = None, 0, self._remote
        with self._remote.lock:
            self._remote.readers += 1
        return other

    @property
    def name(self) -> str:
        """The last part of the address; PyAV takes it for a file name."""
        return os.path.basename(urlsplit(self._remote.url).path) or "index"

    @property
    def url(self) -> str:
        """The address after redirects with whatever secret it holds: not for messages."""
        return self._remote.url

    @property
    def size(self) -> int | None:
        """Length in bytes; None while the server has not said and not all was downloaded."""
        return self._remote.end

    @property
    def requests(self) -> int:
        """Requests sent so far by all readers on the same connections."""
        return self._remote.web.requests

    @property
    def bytes_received(self) -> int:
        """Bytes of bodies received so far by all readers on the same connections."""
        return self._remote.web.bytes_received

    @property
    def cut_off(self) -> bool:
        """Whether the server sends less than it says."""
        return self._remote.short is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not as it should be, in words."""
        return self._remote.notes()

    def identity(self) -> str | None:
        """Text that names these bytes, for the key of a cache; None if nothing can be trusted.

        A strong ETag and the length; without one, the server's date (or weak tag), the length and
        a hash of eight samples.  A file that has to be downloaded is downloaded to its end and
        hashed.  Address (without login and query) and tag are in it as hashes only.
        """
        with self._remote.lock:
            return self._remote.identity()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True; without ranges a way forward is downloaded."""
        return True

    def tell(self) -> int:
        """The position of the next byte read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a position; nothing is fetched, except to learn a length that the server did not say."""
        if whence == io.SEEK_END:
            with self._remote.lock:
                offset += self._remote.measure()
        elif whence == io.SEEK_CUR:
            offset += self._position
        if offset < 0:
            raise ValueError(f"negative position {offset}")
        self._position = offset
        return offset

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as one block goes; 0 at the end and after an error."""
        view = memoryview(buffer).cast("B")
        remote = self._remote
        if self.failure is not None:
            return 0
        try:
            with remote.lock:
                data = remote.read(self._position, len(view))
        except SourceError as reason:
            self.failure = reason
            raise
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Let go; the last reader closes the connections and deletes what was downloaded."""
        remote, self._shared = getattr(self, "_shared", None), None
        if remote is not None:
            with remote.lock:
                remote.readers -= 1
                if not remote.readers:
                    remote.close()
        super().close()

    @property
    def _remote(self) -> _Remote:
        if self._shared is None:
            raise ValueError("I/O operation on closed file")
        return self._shared


class _Version(NamedTuple):
    """What a server says of one state of a file."""

    etag: str | None
    modified: str | None
    length: int | None

    @property
    def strong(self) -> bool:
        """Whether the tag promises equal bytes."""
        return self.etag is not None and self.etag.startswith('"')

    def differs(self, other: _Version) -> bool:
        """Whether the two cannot be the same file; a missing word says nothing, a tag outweighs a date."""
        pairs = [(self.length, other.length), (self.etag, other.etag)]
        if None in pairs[1]:
            pairs.append((self.modified, other.modified))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)


class _Body:
    """Bytes from ``position`` on, up to ``stop`` if that is known, in order and across broken connections."""

    def __init__(
        self, remote: _Remote, position: int, stop: int | None, window: int = 0, chunks: Generator[bytes] | None = None
    ) -> None:
        self.position = position
        self.stop = stop
        self.window = window
        self.rest = b""
        self._remote = remote
        self._chunks = chunks

    def take(self, count: int) -> bytes:
        """Exactly so many bytes; fewer only at the end."""
        data = bytearray(self.rest)
        while len(data) < count and (chunk := self.next()):
            data += chunk
        self.rest = bytes(data[count:])
        return bytes(data[:count])

    def next(self) -> bytes:
        """The next bytes that come; none at the end.

        Raises:
            SourceError: if there is no getting on.
        """
        failed = 0
        while self.stop is None or self.position < self.stop:
            chunk, cut = None, True
            try:
                if self._chunks is None:
                    self._chunks = self._remote.ask(self.position, self.stop)
                chunk = next(self._chunks, None)
                if chunk is None and self.stop is None:
                    self.stop = self.position
            except BrokenConnection as reason:
                cut = reason.cut
            if chunk:
                self.position += len(chunk)
                return chunk
            self.close()
            failed += 1
            if failed < self._remote.web.attempts:
                self._remote.web.pause(failed - 1)
            elif cut:
                self.stop = self.position
                self._remote.cut(self.position)
            else:
                where = f"{self._remote.where}: the connection broke {failed} times in a row"
                raise SourceError(f"{where} at byte {self.position}; try again later")
        return b""

    def close(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None


class _Remote:
    """What all readers of one address share."""

    def __init__(self, address: str, web: Web, *, own: bool, limit: int, ahead: int, text: bool) -> None:
        self.web = web
        self.lock = RLock()
        self.readers = 1
        self.where = label(address)
        self.url = self._address = address
        self.version: _Version | None = None
        self.end: int | None = None
        """Where reading ends; None while nobody knows."""

        self._own = own
        self._ahead = -(-max(ahead, 1) // BLOCK) * BLOCK
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._bodies: list[_Body] = []
        self._download: _Download | None = None
        self.short: str | None = None
        try:
            self._begin(limit, text)
        except BaseException:
            self.close()
            raise

    def read(self, position: int, count: int) -> bytes:
        """Up to ``count`` bytes from one block; none at the end."""
        if self._download is not None:
            return self._download.read(position, min(count, BLOCK))
        data = self._block(position // BLOCK) if position < self._stop else b""
        return data[position % BLOCK : position % BLOCK + count]

    def measure(self) -> int:
        """The length; downloads everything if there is no other way."""
        if self.end is None and self._download is not None:
            self._download.reach(None)
        return self._stop

    def cut(self, at: int) -> None:
        """Accept that the file ends here."""
        said = f" of {self.version.length}" if self.version is not None and self.version.length else ""
        self.short = f"the file is cut off: the server sends {at}{said} bytes and no more"
        self.end = at

    def notes(self) -> tuple[str, ...]:
        notes = () if self._download is None else (self._download.note(),)
        return notes if self.short is None else (*notes, self.short)

    def identity(self) -> str | None:
        parts = urlsplit(self._address)
        place = "http:" + _hash(f"{parts.scheme.lower()}://{parts.hostname}:{parts.port}{parts.path}")
        etag, modified, length = self.version or (None, None, None)
        if self.short is None and etag is not None and self.version is not None and self.version.strong and length:
            return f"{place}:tag:{_hash(etag)}:{length}"
        if self._download is not None:
            self._download.reach(None)
            return f"{place}:content:{self._download.hash.hexdigest()}"
        if modified is None and etag is None:
            return None
        sample = hashlib.sha256(f"{etag} {modified}".encode())
        for k in range(_SAMPLES):
            start = max(0, self._stop - _SAMPLE_BYTES) * k // (_SAMPLES - 1)
            body = _Body(self, start, min(self._stop, start + _SAMPLE_BYTES))
            sample.update(body.take(_SAMPLE_BYTES))
            body.close()
        return None if self.short is not None else f"{place}:samples:{sample.hexdigest()}:{length}"

    def ask(self, start: int, stop: int | None) -> Generator[bytes]:
        """A new connection for a part of the file."""
        if self._download is not None or stop is None:
            return self._past(start)
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if self.version is not None and self.version.strong:
            headers["If-Range"] = self.version.etag or ""
        response, url = self.web.get(self.url, headers)
        if response.status_code in _EXPIRED and self.url != self._address:
            # Where a redirect led may be a link that has expired; the address itself has not.
            response.close()
            response, url = self.web.get(self._address, headers)
        self.url = url
        self._check(response, (200, 206, 416))
        if response.status_code == 416:
            response.close()
            raise BrokenConnection(cut=True)
        part = _PART.fullmatch(response.headers.get("content-range", ""))
        if response.status_code != 206 or part is None or int(part[1]) != start:
            response.close()
            raise SourceError(f"{self.where}: the server no longer answers ranges; download it and give the file")
        return self.web.chunks(response, self.where)

    def close(self) -> None:
        for body in self._bodies:
            body.close()
        self._bodies.clear()
        self._blocks.clear()
        if self._download is not None:
            self._download.close()
        if self._own:
            self.web.close()

    @property
    def _stop(self) -> int:
        return self.end or 0

    def _begin(self, limit: int, text: bool) -> None:
        response, self.url = self.web.get(self._address, {"Range": f"bytes=0-{self._ahead - 1}"})
        said = response.headers.get("content-range", "")
        part = _PART.fullmatch(said)
        if (
            response.status_code == 416
            and said != "bytes */0"
            or response.status_code == 206
            and (not part or part[1] != "0")
        ):
            # No use of ranges is possible; perhaps the whole can be had.
            response.close()
            response, self.url = self.web.get(self._address, {})
        try:
            self._first(response, limit, text)
        except BaseException:
            response.close()
            raise

    def _first(self, response: httpx2.Response, limit: int, text: bool) -> None:
        """Learn from the first answer, and look at its first bytes."""
        if response.status_code == 416:
            raise SourceError(f"{self.where} {_EMPTY}")
        if response.headers.get("content-type", "").lower().startswith(PICTURES_IN_PARTS):
            raise NoFile(f"{self.where} is a live stream of pictures, not a file; watch it live")
        self.version = self._check(response, (200, 206))
        self.end = self.version.length
        chunks = self.web.chunks(response, self.where)
        if response.status_code == 206:
            self._bodies.append(_Body(self, 0, min(self._ahead, self._stop), self._ahead, chunks))
        else:
            self._download = _Download(self, _Body(self, 0, self.end, 0, chunks), limit)
        head = self.read(0, BLOCK)
        wrong = _no_video(head[:4096], response.headers.get("content-type", "")) if head and not text else None
        if not head or wrong is not None:
            raise SourceError(f"{self.where} {wrong or _EMPTY}")

    def _block(self, number: int) -> bytes:
        start = number * BLOCK
        if number not in self._blocks:
            body = self._body_to(start)
            while body.position - len(body.rest) <= start < self._stop:
                at = body.position - len(body.rest)
                self._blocks[at // BLOCK] = body.take(min(BLOCK, self._stop - at))
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        if number in self._blocks:
            self._blocks.move_to_end(number)
        return self._blocks.get(number, b"")

    def _body_to(self, start: int) -> _Body:
        """A body that soon comes by ``start``; if there is none, a new one, larger if it goes on where one ended."""
        window = self._ahead
        found = None
        for body in self._bodies:
            at = body.position - len(body.rest)
            if start - _SKIP <= at <= start < (body.stop or 0):
                found = body
            elif at == start == body.stop:
                window = min(2 * body.window, _LARGEST_WINDOW)
                self._bodies.remove(body)
                break
        found = found or _Body(self, start, min(start + window, self._stop), window)
        self._bodies = [found, *(body for body in self._bodies if body is not found)]
        for body in self._bodies[_BODIES:]:
            body.close()
        del self._bodies[_BODIES:]
        return found

    def _past(self, known: int) -> Generator[bytes]:
        """The whole body once more, without its first bytes, which must be those already here."""
        response, self.url = self.web.get(self._address, {})
        self._check(response, (200,))
        chunks = self.web.chunks(response, self.where)
        try:
            passed = 0
            for chunk in chunks:
                old = self._download.peek(passed, len(chunk)) if self._download is not None and passed < known else b""
                if not chunk.startswith(old):
                    raise SourceError(f"{self.where} {_CHANGED}")
                passed += len(chunk)
                if len(chunk) > len(old):
                    yield chunk[len(old) :]
        finally:
            chunks.close()

    def _check(self, response: httpx2.Response, fine: tuple[int, ...]) -> _Version:
        """The version that an answer is of, which must be the one that was opened."""
        status, headers = response.status_code, response.headers
        total = _LENGTH.fullmatch(headers.get("content-range", ""))
        length = headers.get("content-length", "") if status == 200 else total[1] if total else ""
        new = _Version(headers.get("etag"), headers.get("last-modified"), int(length) if length.isdecimal() else None)
        wrong = None
        if status not in fine:
            wrong = refusal(status, response.reason_phrase, "authorization" in response.request.headers)
        elif headers.get("content-encoding", "identity") != "identity":
            wrong = "is sent compressed although that was not asked for; download it and give the file"
        elif self.version is not None and self.version.differs(new):
            wrong = _CHANGED
        if wrong is not None:
            response.close()
            raise SourceError(f"{self.where} {wrong}")
        return new


class _Download:
    """A body from a server without ranges, kept as far as it came."""

    def __init__(self, remote: _Remote, body: _Body, limit: int) -> None:
        self.hash = hashlib.sha256()
        self._remote = remote
        self._body = body
        self._limit = limit
        self._have = self._checked = 0
        self._file = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # on disk only if larger
        self._allow(remote.end or 0)

    def read(self, position: int, count: int) -> bytes:
        self.reach(position + count)
        return self.peek(position, count)

    def peek(self, position: int, count: int) -> bytes:
        """What is here of it."""
        self._file.seek(position)
        return self._file.read(count)

    def reach(self, position: int | None) -> None:
        """Download up to a position, or everything."""
        while position is None or self._have < position:
            chunk = self._body.next()
            if not chunk:
                self._remote.end = self._have
                return
            self._allow(self._have + len(chunk))
            self._file.seek(self._have)
            self._file.write(chunk)
            self.hash.update(chunk)
            self._have += len(chunk)

    def note(self) -> str:
        return f"the server ignores ranges; {self._have} bytes were downloaded"

    def close(self) -> None:
        self._body.close()
        self._file.close()

    def _allow(self, size: int) -> None:
        """Stop before the limit is passed or the temporary folder is full."""
        where = self._remote.where
        if size > self._limit:
            self.close()
            raise SourceError(
                f"{where} can only be had whole, as its server ignores ranges, and is larger than max_download_bytes "
                f"({self._limit}); download it and give the file, or raise that"
            )
        if size >= self._checked:
            free = shutil.disk_usage(tempfile.gettempdir()).free
            need = max(size, self._remote.end or 0) - self._have
            self._checked = self._have + _ROOM_STEP
            if free < need:
                self.close()
                raise SourceError(
                    f"{where} needs {need} bytes and the temporary folder has {free}; set TMPDIR to one with more"
                )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def refusal(status: int, phrase: str, login: bool) -> str:
    """What an answer other than success means, as the end of a sentence."""
    if status in (404, 410):
        return f"does not exist ({status}); check the address"
    if status in (401, 403):
        known = "refuses the login in the address" if login else "is an expired link or needs a login"
        return f"{known} ({status}); signed links expire: get a new one"
    return f"answers {status} ({phrase or 'no reason given'}) instead of a file; check the address"


def _no_video(head: bytes, kind: str) -> str | None:
    """What a body is if it is text that is no playlist, as the end of a sentence."""
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        return None
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"#extm3u") or b"<mpd" in text:
        return None
    if "html" in kind or text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        return "is a web page, not a video file; give the address of the file itself"
    if "json" in kind or text.startswith((b"{", b"[")):
        return "is a JSON answer, not a video file; give the address of the file itself"
    try:
        head.decode()
    except UnicodeDecodeError as reason:
        return None if reason.start < len(head) - 4 else "is text, not a video file; check the address"
    return "is text, not a video file; check the address"
