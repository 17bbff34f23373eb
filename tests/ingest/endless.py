"""A web server whose answers do not end: motion JPEG as cameras send it, and a playlist that moves on with time."""

from __future__ import annotations

import contextlib
import io
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from tests.ingest.synthetic import even, picture, write

SHOWN = 4
"""Segments in the playlist at a time."""


class Endless:
    """``/mjpeg`` shows a number that rises with each picture, ``/live.m3u8`` a folder of segments of a second.

    Args:
        folder: holds ``film.m3u8`` and its segments; None for no playlist.
        fps: pictures a second of the motion JPEG.
    """

    def __init__(self, folder: Path | None = None, fps: int = 10) -> None:
        self.folder, self.fps = folder, fps
        self.begun = time.monotonic()
        self.silent = threading.Event()
        """Set: connections stay and nothing comes."""

        self.closed = threading.Event()
        """Set: nobody is let in."""

        self.status = 200
        self._open: list[socket.socket] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.endless = self  # type: ignore[attr-defined]
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.over = threading.Event()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def cut(self) -> None:
        """Break every connection there is."""
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self.over.set()
        self.cut()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        server: Endless = self.server.endless  # type: ignore[attr-defined]
        server._open.append(self.connection)
        if server.closed.is_set():
            self.connection.shutdown(socket.SHUT_RDWR)
        elif server.status != 200:
            self._answer(b"", "text/plain", server.status)
        elif self.path == "/mjpeg":
            self._pictures(server)
        elif server.folder is not None and self.path == "/live.m3u8":
            self._answer(_playlist(server), "application/vnd.apple.mpegurl")
        elif server.folder is not None:
            self._answer((server.folder / self.path.strip("/")).read_bytes(), "video/mp2t")

    def _answer(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _pictures(self, server: Endless) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.send_header("Connection", "close")
        self.end_headers()
        begun, k = time.monotonic(), 0
        while not server.over.is_set():
            if server.silent.is_set():
                server.over.wait()
            jpeg = io.BytesIO()
            Image.fromarray(picture(k % 1024, (64, 320))).save(jpeg, "jpeg", quality=90)
            data = jpeg.getvalue()
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data))
            self.wfile.write(data + b"\r\n")
            self.wfile.flush()
            k += 1
            server.over.wait(max(0.0, begun + k / server.fps - time.monotonic()))


def _playlist(server: Endless) -> bytes:
    """What is there by now, and no end."""
    assert server.folder is not None
    text = (server.folder / "film.m3u8").read_text()
    parts = re.findall(r"#EXTINF:[\d.]+,\s+\S+", text)
    first = int(time.monotonic() - server.begun)
    head = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:{first}\n"
    return (head + "\n".join(parts[first : first + SHOWN]) + "\n").encode()


def segments(folder: Path, seconds: int) -> Path:
    """A film of ten pictures a second in segments of one second."""
    settings = {"hls_time": "1", "hls_list_size": "0"}
    write(folder / "film.m3u8", even(10 * seconds), gop=10, bframes=0, size=(64, 320), kind="hls", container=settings)
    return folder


@contextmanager
def endless(folder: Path | None = None, **how: Any) -> Iterator[Endless]:
    """A server for as long as the block runs."""
    server = Endless(folder, **how)
    try:
        yield server
    finally:
        server.close()
