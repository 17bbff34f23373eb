"""Whether everything is watched as it should be: for supervisors, over HTTP on this machine or as a file."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from streamvid.errors import SettingsError

FILE_SECONDS = 5.0
"""Time between two writings of the file."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def troubles(status: dict[str, Any], *, lag_seconds: float = 60.0) -> list[str]:
    """What is not as it should be, a line each; empty if all is well.

    Args:
        status: of ``Live.status``.
        lag_seconds: how far a stream may lie behind.
    """
    found = [] if status["running"] else ["not running"]
    for stream in status["streams"]:
        name = stream["stream"]
        if stream["failure"]:
            found.append(f"{name} ended: {stream['failure']}")
        elif stream["away"]:
            found.append(f"{name} is away: {stream['away']}")
        elif stream["lag_seconds"] > lag_seconds:
            found.append(f"{name} lies {stream['lag_seconds']:.0f} s behind")
    return found


class Health:
    """Tells the health of what ``status`` describes; a context manager.

    Over HTTP every GET is answered with the status and ``troubles`` as JSON, with 200 if there are none and 503
    otherwise.  A file holds the same, and ``healthy``; it is replaced as a whole, so that a reader never sees half.

    Args:
        where: ``HOST:PORT`` of this machine's loopback, or ``:PORT``; anything else is a file's path.
        status: called from threads of its own.

    Raises:
        SettingsError: if the address is not of the loopback, is taken, or the file cannot be written.
    """

    def __init__(self, where: str, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status
        self._stopping = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        host, mark, port = where.rpartition(":")
        if mark and port.isdigit():
            self._listen(host.strip("[]") or "127.0.0.1", int(port))
        else:
            self._path = Path(where)
            self._write()
            threading.Thread(target=self._keep_writing, name="health", daemon=True).start()

    @property
    def port(self) -> int:
        """Of the HTTP server."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def told(self) -> dict[str, Any]:
        """What is told now."""
        status = self._status()
        found = troubles(status)
        return {"healthy": not found, "troubles": found, **status}

    def close(self) -> None:
        """Tell no more; a file says that it is over."""
        self._stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        else:
            with suppress(SettingsError):
                self._write()

    def __enter__(self) -> Health:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, host: str, port: int) -> None:
        if host not in LOOPBACK:
            raise SettingsError(
                f"health is told on this machine only, as on 127.0.0.1:{port}, got {host}; put a proxy before it"
            )
        health = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0

            def do_GET(self) -> None:
                told = health.told()
                body = json.dumps(told).encode()
                self.send_response(200 if told["healthy"] else 503)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Every few seconds the same is no news."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SettingsError(
                f"cannot tell health on {host}:{port}: {error.strerror}; choose another port"
            ) from error
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def _keep_writing(self) -> None:
        while not self._stopping.wait(FILE_SECONDS):
            with suppress(SettingsError):  # a disk that is full for a while; the file's age tells
                self._write()

    def _write(self) -> None:
        unfinished = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            unfinished.write_text(json.dumps(self.told()) + "\n", encoding="utf-8")
            os.replace(unfinished, self._path)
        except OSError as error:
            raise SettingsError(
                f"cannot write health to {self._path}: {error.strerror}; choose another file"
            ) from error
