"""A web server on this machine that behaves well or badly, as a test wants it."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass
class Page:
    """What an address answers."""

    body: bytes = b""
    content_type: str | None = "video/mp4"
    etag: str | None = '"one"'
    modified: float | None = None
    """Seconds since 1970."""

    ranges: bool = True
    chunked: bool = False
    """Whole answers come without a length."""

    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    first: list[int] = field(default_factory=list)
    """Statuses of the first answers; ``status`` follows."""

    redirect: str | None = None
    login: tuple[str, str] | None = None
    said_length: int | None = None
    """A Content-Length that need not be true."""

    stop_after: int | None = None
    """Close the connection after so many bytes of a body."""

    reset_after: int | None = None
    """Reset the connection after so many bytes of a body."""

    stall_after: int | None = None
    """Send nothing more after so many bytes of a body, and keep the connection."""

    gap_at: int | None = None
    """Bytes from here on are never sent, whatever is asked for."""

    trickle: int | None = None
    """Send so many bytes at a time."""


@dataclass
class Asked:
    """A request that came."""

    path: str
    headers: dict[str, str]


class WebServer:
    """Serves pages by path, remembers requests and bytes; ``with`` starts and stops it."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[Asked] = []
        self.sent = 0
        self.connections = 0
        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.web = self  # type: ignore[attr-defined]
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients may hang up
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, path: str, body: bytes = b"", **how: Any) -> str:
        """Serve a page; gives its address."""
        self.pages[path] = Page(body, **how)
        return self.url(path)

    def url(self, path: str, login: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.port}{path}"

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]


@contextlib.contextmanager
def serving() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def setup(self) -> None:
        self.server.web.connections += 1  # type: ignore[attr-defined]
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test looks at ``asked``."""

    def do_GET(self) -> None:
        web: WebServer = self.server.web  # type: ignore[attr-defined]
        web.asked.append(Asked(self.path, {key.lower(): value for key, value in self.headers.items()}))
        page = web.pages.get(self.path) or web.pages.get(self.path.partition("?")[0])
        if page is None:
            page = Page(b"nothing here", status=404, ranges=False)
        status = page.first.pop(0) if page.first else page.status
        if page.login is not None:
            pair = base64.b64encode(":".join(page.login).encode()).decode()
            status = status if self.headers.get("Authorization") == f"Basic {pair}" else 401
        if page.redirect is not None:
            self._head(302, {"Location": page.redirect, "Content-Length": "0"})
        elif status != 200:
            self._head(status, {"Content-Length": "3", **page.headers})
            self.wfile.write(b"no\n")
        else:
            self._send(web, page)

    def _send(self, web: WebServer, page: Page) -> None:
        headers = dict(page.headers)
        if page.content_type is not None:
            headers["Content-Type"] = page.content_type
        if page.etag is not None:
            headers["ETag"] = page.etag
        if page.modified is not None:
            headers["Last-Modified"] = email.utils.formatdate(page.modified, usegmt=True)
        body, status = page.body, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if page.ranges and wanted and self.headers.get("If-Range") in (None, page.etag):
            start, total = int(wanted[1]), len(page.body)
            stop = min(int(wanted[2] or total) + 1, total)
            status = 206 if start < total else 416
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}" if start < total else f"bytes */{total}"
            body = page.body[start:stop]
            length = len(body)
            body = body if page.gap_at is None else body[: max(0, page.gap_at - start)]
        else:
            length = len(body)
        if page.chunked and status == 200:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(length if page.said_length is None else page.said_length)
        self._head(status, headers)
        self._body(web, page, body, complete=len(body) == length)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _body(self, web: WebServer, page: Page, body: bytes, *, complete: bool) -> None:
        ends = [end for end in (page.stop_after, page.reset_after, page.stall_after) if end is not None]
        body, complete = (body[: min(ends)], False) if ends and min(ends) < len(body) else (body, complete)
        step = page.trickle or 1 << 16
        for start in range(0, len(body), step):
            part = body[start : start + step]
            chunked = b"%x\r\n%s\r\n" % (len(part), part)
            self.wfile.write(chunked if page.chunked and not self.headers.get("Content-Range") else part)
            self.wfile.flush()
            web.sent += len(part)
        if page.stall_after is not None and not complete:
            web.over.wait()
        if page.reset_after is not None and not complete:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if page.chunked and complete:
            self.wfile.write(b"0\r\n\r\n")
        if not complete or page.said_length is not None:
            self.close_connection = True
