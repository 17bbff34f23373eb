"""What can happen on an alert: a command, a webhook, a line in a file.

Each knows one way out and how it fails; none knows the queue.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx2

from streamvid.errors import SettingsError, near

KINDS = ("command", "jsonl", "webhook")
PLACEHOLDERS = ("clip", "frame", "id", "reason", "rule", "start", "stop", "stream")

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_SHOWN = 400


class NotDelivered(Exception):
    """An action did not succeed.

    Args:
        note: why, on one line and without credentials.
        again: whether another attempt may succeed.
        down: whether other alerts would fail just so now, as where no server answers.
        after_seconds: how long the receiver wants to be left alone; None if it did not say.
    """

    def __init__(
        self, note: str, *, again: bool = True, down: bool = False, after_seconds: float | None = None
    ) -> None:
        super().__init__(note)
        self.again, self.down, self.after_seconds = again, down, after_seconds


class Action(ABC):
    """One way to hand an alert on; safe to do twice with the same alert, whose id tells."""

    label: str
    """What it is, as it may be printed."""

    key: str
    """Tells it apart in the queue, also after a restart; holds no credentials."""

    @abstractmethod
    def deliver(self, message: Mapping[str, Any]) -> None:
        """Hand over one alert; when it returns, the alert is out.

        Args:
            message: what `Alert.message` gives.

        Raises:
            NotDelivered: if it is not.
        """


class Jsonl(Action):
    """Append one line of JSON to a file, on the disk before it counts as delivered.

    Args:
        path: the file; made if missing, its folder must be there.

    Raises:
        SettingsError: if the folder is missing or the path is one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(os.path.expanduser(path)))
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise SettingsError(f"cannot write alerts to {self.path}: it must be a file in a folder that is there")
        self.label, self.key = f"jsonl {self.path.name}", _key("jsonl", self.path.name, str(self.path))

    def deliver(self, message: Mapping[str, Any]) -> None:
        """Append and fsync; a line that an earlier crash left unfinished is closed first."""
        line = json.dumps(message, ensure_ascii=False).encode() + b"\n"
        try:
            new = not self.path.exists()
            with open(self.path, "ab+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    line = b"\n" + line
                if file.write(line) != len(line):
                    file.truncate(end)
                    raise NotDelivered(f"{self.path.name} cannot grow: the disk is full", down=True)
                os.fsync(file.fileno())
            if new:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise NotDelivered(f"{self.path.name} cannot be written: {error.strerror}", down=True) from None


class Webhook(Action):
    """POST the alert as JSON; any 2xx answer is success.

    408, 429, server errors and a server that does not answer are tried again; other answers are
    refusals for good.  Redirects are not followed: they would carry the alert elsewhere.  Messages
    name the server only, because many services put the secret into the path.

    Args:
        address: http or https; a login as ``user:password@`` is sent as basic authentication.
        limit_seconds: no answer for so long is a failure, > 0.

    Raises:
        SettingsError: if it is no http address.
    """

    def __init__(self, address: str, *, limit_seconds: float = 10.0) -> None:
        try:
            parts = urlsplit(address)
            host, _ = parts.hostname, parts.port
            httpx2.URL(address)
        except (ValueError, httpx2.InvalidURL):
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host:
            raise SettingsError(
                "a webhook needs an address like https://host/path, and this is none; check its spelling"
            )
        if limit_seconds <= 0:
            raise ValueError(f"limit_seconds must be above 0, got {limit_seconds}")
        self.limit_seconds = limit_seconds
        self._address = address
        self.label = f"webhook {parts.scheme}://{parts.netloc.rpartition('@')[2]}/..."
        self.key = _key("webhook", host, address)

    def deliver(self, message: Mapping[str, Any]) -> None:
        """POST it; the body of the answer is not read."""
        headers = {"idempotency-key": str(message.get("id", ""))}
        try:
            with (
                httpx2.Client(timeout=self.limit_seconds, follow_redirects=False) as client,
                client.stream("POST", self._address, json=dict(message), headers=headers) as response,
            ):
                status, wish = response.status_code, response.headers.get("retry-after", "")
        except httpx2.TimeoutException:
            raise NotDelivered(f"{self.label} does not answer within {self.limit_seconds:g} s", down=True) from None
        except httpx2.HTTPError as error:
            raise NotDelivered(f"{self.label} cannot be reached ({type(error).__name__})", down=True) from None
        if 200 <= status < 300:
            return
        if status in (408, 429) or status >= 500:
            after = float(wish) if wish.isdecimal() else None
            raise NotDelivered(
                f"{self.label} answers {status}", down=status in (429, 502, 503, 504), after_seconds=after
            )
        hint = "give the address it redirects to" if 300 <= status < 400 else "check the address and its login"
        raise NotDelivered(f"{self.label} answers {status}; {hint}", again=False)


class Command(Action):
    """Run a program with the alert's words in its arguments; exit code 0 is success.

    The text is split like a shell splits it, then ``{clip} {frame} {rule} {stream} {start} {stop}
    {reason} {id}`` are put in; no shell sees it, and what is put in is never split again.  ``{{``
    and ``}}`` stand for braces.  The program's group is ended when the time is over.

    Args:
        text: as in ``notify-send 'Seen' {reason}``.
        limit_seconds: it may run so long, > 0.

    Raises:
        SettingsError: if it cannot be split, names no program that is there, or an unknown placeholder.
    """

    def __init__(self, text: str, *, limit_seconds: float = 60.0) -> None:
        try:
            self._words = shlex.split(text)
        except ValueError as error:
            raise SettingsError(f"cannot split the command {text!r}: {error}; close its quotes") from None
        if not self._words:
            raise SettingsError("the command of an alert is empty; write it like: command notify-send {rule}")
        if limit_seconds <= 0:
            raise ValueError(f"limit_seconds must be above 0, got {limit_seconds}")
        for name in (found for word in self._words for found in _FIELD.findall(word)):
            if name and name not in PLACEHOLDERS:
                raise SettingsError(
                    f"{{{name}}} in a command stands for nothing; {near(name, PLACEHOLDERS)} For braces write {{{{ }}}}"
                )
        if shutil.which(self._words[0]) is None:
            raise SettingsError(f"there is no program {self._words[0]!r}; install it, or give its whole path")
        self.limit_seconds = limit_seconds
        self.label = f"command {Path(self._words[0]).name}"
        self.key = _key("command", Path(self._words[0]).name, text)

    def deliver(self, message: Mapping[str, Any]) -> None:
        """Run it to its end; what it printed is part of the note when it fails."""
        values = dict(message) | {"start": f"{message['start_seconds']:g}", "stop": f"{message['stop_seconds']:g}"}
        words = [_FIELD.sub(lambda m: _put(m, values), word) for word in self._words]
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
                )
            except (OSError, ValueError) as error:
                raise NotDelivered(
                    f"{self.label} cannot be started: {error}", again=isinstance(error, OSError)
                ) from None
            try:
                code = process.wait(self.limit_seconds)
            except subprocess.TimeoutExpired:
                raise NotDelivered(f"{self.label} did not end within {self.limit_seconds:g} s") from None
            finally:
                _end_group(process)
            if code:
                how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
                raise NotDelivered(f"{self.label} {how}{_tail(said)}")


def parse_action(text: str) -> Action:
    """An action from ``command ...``, ``webhook ADDRESS`` or ``jsonl FILE``; a bare address is a webhook.

    Raises:
        SettingsError: for another first word, or what the action itself refuses.
    """
    kind, _, rest = text.strip().partition(" ")
    if kind.lower().startswith(("http://", "https://")):
        kind, rest = "webhook", text
    rest = rest.strip()
    if kind not in KINDS:
        shown = kind.partition("://")[0][:40]
        raise SettingsError(f"an action begins with command, jsonl or webhook, got {shown!r}; {near(shown, KINDS)}")
    if not rest:
        raise SettingsError(f"{kind} needs something after it, as in: command notify-send {{rule}}, jsonl alerts.jsonl")
    if kind == "command":
        return Command(rest)
    return Webhook(rest) if kind == "webhook" else Jsonl(rest)


def _put(found: re.Match[str], values: Mapping[str, Any]) -> str:
    return str(values[found[1]]) if found[1] else found[0][0]


def _key(kind: str, shown: str, whole: str) -> str:
    return f"{kind} {shown} {hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the program has left running, and take its exit code."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _tail(said: IO[bytes]) -> str:
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - _SHOWN))
    text = " ".join(said.read().decode("utf-8", "replace").split())
    return f": {text}" if text else ""


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
