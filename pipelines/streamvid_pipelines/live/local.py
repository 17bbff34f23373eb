"""Questions from another process of this machine: a socket beside every stream that is watched.

One request a connection, one JSON value a line.  Asked ``{"question": "...", "max_new_tokens": 64}``, it answers
``{"text": "piece"}`` any number of times, then ``{"answer": {...}}`` or ``{"error": "one line"}``.  The socket
lies in a folder only its owner can enter.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamvid.errors import BankError, SettingsError, StreamvidError

LONGEST_REQUEST = 1 << 20
"""Bytes; a longer line is no question."""

AT_ONCE = 8
"""Connections served at the same time; more wait."""


def socket_path(folder: Path, stream: str) -> Path:
    """Where the socket of a stream of a memory folder lies: the same for whoever asks, and short enough."""
    name = hashlib.sha256(f"{folder.resolve()}\0{stream}".encode()).hexdigest()[:24]
    return _folder() / f"{name}.sock"


class Door:
    """Listens for questions to streams, and passes them on.

    Args:
        folder: of the memory.
        streams: names of the streams; each gets a socket.
        answer: called on a thread of the connection with stream, question, the longest answer (None as set) and
            what takes pieces of it; gives what is sent as the answer.

    Raises:
        BankError: if a stream is watched by another process already.
    """

    def __init__(
        self,
        folder: Path,
        streams: list[str],
        answer: Callable[[str, str, int | None, Callable[[str], None]], dict[str, Any]],
    ) -> None:
        self._answer = answer
        self._served = threading.BoundedSemaphore(AT_ONCE)
        self._listeners: list[tuple[Path, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        try:
            for stream in streams:
                path = socket_path(folder, stream)
                if _alive(path):
                    raise BankError(f"{stream} is watched into {folder} by another process; stop that one, or ask it")
                path.unlink(missing_ok=True)
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                listener.bind(str(path))
                self._listeners.append((path, listener))
                listener.listen(16)
                thread = threading.Thread(target=self._listen, args=(listener, stream), name="door", daemon=True)
                self._threads.append(thread)
                thread.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Listen no more."""
        for path, listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            path.unlink(missing_ok=True)
        self._listeners = []
        for thread in self._threads:
            thread.join(5.0)

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, listener: socket.socket, stream: str) -> None:
        while True:
            self._served.acquire()
            try:
                connection, _ = listener.accept()
            except OSError:
                self._served.release()
                return
            threading.Thread(target=self._serve, args=(connection, stream), name="asked", daemon=True).start()

    def _serve(self, connection: socket.socket, stream: str) -> None:
        try:
            with suppress(OSError, ValueError), connection, connection.makefile("rb") as file:
                connection.settimeout(10.0)
                line = file.readline(LONGEST_REQUEST)
                connection.settimeout(None)

                def send(value: dict[str, Any]) -> None:
                    connection.sendall(json.dumps(value, ensure_ascii=False).encode() + b"\n")

                def piece(text: str) -> None:
                    with suppress(OSError, ValueError):  # who asked may have left; the answer is made all the same
                        send({"text": text})

                try:
                    asked = json.loads(line)
                    most = asked.get("max_new_tokens")
                    given = self._answer(stream, str(asked["question"]), None if most is None else int(most), piece)
                except StreamvidError as reason:
                    send({"error": str(reason)})
                except (KeyError, TypeError, AttributeError, ValueError):
                    send({"error": 'a request is one line of JSON with a "question"'})
                else:
                    send({"answer": given})
        finally:
            self._served.release()


def ask(
    folder: Path,
    stream: str,
    question: str,
    *,
    max_new_tokens: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Ask the process that watches a stream; None if none does.

    Raises:
        SettingsError: if the question cannot be answered.
        BankError: if that process ended before it had answered.
    """
    path = socket_path(folder, stream)
    try:
        connection = _connected(path)
    except OSError:
        return None
    with connection, connection.makefile("rwb") as file:
        file.write(json.dumps({"question": question, "max_new_tokens": max_new_tokens}).encode() + b"\n")
        file.flush()
        for reply in _replies(file):
            if "text" in reply and on_text is not None:
                on_text(reply["text"])
            if "error" in reply:
                raise SettingsError(reply["error"])
            if "answer" in reply:
                answer: dict[str, Any] = reply["answer"]
                return answer
    raise BankError(f"the process that watches {stream} ended before it had answered; ask again")


def _replies(file: Any) -> Iterator[dict[str, Any]]:
    try:
        for line in file:
            yield json.loads(line)
    except (OSError, ValueError):
        return


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _alive(path: Path) -> bool:
    try:
        _connected(path).close()
    except OSError:
        return False
    return True


def _folder() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "streamvid" if base else Path(tempfile.gettempdir()) / f"streamvid-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise BankError(f"{folder} can be entered by others, so no questions are taken there; remove it")
    return folder
