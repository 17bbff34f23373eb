"""A file before any decoder sees it: is it there, and is it a film at all?

Knows the first bytes of files and nothing of decoders.  What FFmpeg would otherwise make of
text (it draws ``.txt`` as a film, and a playlist can name other files) never gets that far.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from streamvid.errors import SourceError

_HEAD_BYTES = 4096
_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


def redact(address: str) -> str:
    """The address without user name, password and query: what may be printed or stored."""
    if not _ADDRESS.match(address):
        return address
    try:
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return f"{address.partition('://')[0]}://..."
    return urlunsplit(
        (parts.scheme, host, parts.path, "...", "") if parts.query else (parts.scheme, host, parts.path, "", "")
    )


def label(path: str | os.PathLike[str]) -> str:
    """The path as it may be printed: on one line, an address without credentials."""
    text = redact(os.fspath(path))
    return text if text.isprintable() else repr(text)


def check_file(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a readable, non-empty file that is not text.

    Raises:
        SourceError: one line that says what the path is instead and what to do.
    """
    text = os.fspath(path)
    if _ADDRESS.match(text):
        raise SourceError(f"{redact(text)} is an address where a file is needed; download it and give the file")
    if "\0" in text or not text:
        raise SourceError(f"{text!r} is not a file name; give the path of a video")
    found = Path(os.path.abspath(os.path.expanduser(text)))
    text = label(text)
    try:
        mode = found.stat().st_mode
    except PermissionError:
        raise SourceError(f"{text} may not be read; check the permissions of its folder") from None
    except OSError:
        raise SourceError(_missing(text, found)) from None
    if stat.S_ISDIR(mode):
        raise SourceError(_folder(text, found))
    if not stat.S_ISREG(mode):
        raise SourceError(f"{text} is not a regular file; save the video to a file and give its name")
    try:
        with found.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except PermissionError:
        raise SourceError(f"{text} may not be read; check its permissions") from None
    except OSError as reason:
        raise SourceError(f"{text} cannot be read: {reason.strerror}") from None
    if not head:
        raise SourceError(f"{text} is empty (0 bytes); copy or download it again")
    if is_playlist(head) is None and (kind := _text_kind(head)) is not None:
        raise SourceError(f"{text} {kind}")
    return found


def is_playlist(head: bytes) -> Literal["hls", "dash"] | None:
    """Which kind of playlist begins with these bytes, whatever its name; None if it is none."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"#EXTM3U"):
        return "hls"
    return "dash" if text.startswith(b"<") and re.search(rb"<(\w+:)?MPD[\s>]", text) else None


def why_unreadable(path: Path) -> str:
    """What is wrong with a file that no demuxer accepts, as the end of a sentence."""
    size = path.stat().st_size
    boxes = list(_boxes(path))
    kinds = [kind for kind, _, _ in boxes]
    with path.open("rb") as file:
        head = file.read(1 << 20)
    if b"encv" in head or b"sinf" in head and b"schm" in head:
        return "is encrypted (DRM); give a file without copy protection"
    if kinds and kinds[0] in {"ftyp", "styp", "moof", "mdat", "moov", "free", "skip", "wide", "sidx"}:
        if "moov" not in kinds and ("moof" in kinds or kinds[0] in {"styp", "sidx"}):
            return "is one segment of a stream without its header; join it with the init segment first"
        if "moov" not in kinds:
            return "has no index (moov box): recording or copying stopped early; copy it again or repair it with a tool"
        kind, start, length = boxes[-1]
        if start + length > size:
            return f"is cut off: its {kind} box needs {start + length} bytes and the file has {size}; copy it again"
        return "has a damaged index; convert it with another program first"
    return "is no video format known to FFmpeg, or its header is damaged"


def _missing(text: str, found: Path) -> str:
    folder = found.parent
    try:
        names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else None
    except OSError:
        names = []
    if names is None:
        return f"{text} does not exist, nor does its folder; check the path"
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(found.name.lower(), lower, n=3, cutoff=0.6)
    close += [low for low in lower if Path(low).stem == found.stem.lower() and low not in close]
    if close:
        return f"{text} does not exist; did you mean {' or '.join(lower[name] for name in close[:3])}?"
    return f"{text} does not exist; check the path"


def _folder(text: str, found: Path) -> str:
    films = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts", ".m4v", ".gif", ".mpg", ".flv", ".wmv"}
    try:
        inside = sorted(entry.name for entry in os.scandir(found) if Path(entry.name).suffix.lower() in films)
    except OSError:
        inside = []
    example = f", for example {label(os.path.join(text, inside[0]))}" if inside else ""
    return f"{text} is a folder; name one video in it{example}"


def _text_kind(head: bytes) -> str | None:
    """What a text file is, as the end of a sentence; None if the bytes are not text."""
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if not wide and any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        return None
    try:
        text = head.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as reason:
        # The end of the head may cut a character in two; anything earlier is not text.
        if reason.start < _HEAD_BYTES - 4:
            return None
        text = head[: reason.start].decode("utf-16" if wide else "utf-8-sig")
    if wide and any(not (sign.isprintable() or sign.isspace()) for sign in text[:64]):
        return None
    start = text.lstrip().lower()
    if start.startswith("version https://git-lfs"):
        return "is a Git LFS pointer, not the video itself; fetch it with: git lfs pull"
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "is a web page saved under a video's name; download the video itself"
    return "is a text file, not a video; check the path or download it again"


def _boxes(path: Path) -> Iterator[tuple[str, int, int]]:
    """Kind, start and length of the top-level boxes of an MP4 family file, as far as they make sense."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while start + 8 <= size and start < (1 << 62):
            file.seek(start)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            kind = header[4:8]
            if length == 1 and len(header) == 16:
                length = int.from_bytes(header[8:16], "big")
            elif length == 0:
                length = size - start
            if length < 8 or not re.fullmatch(rb"[A-Za-z0-9 _-]{4}", kind):
                return
            yield kind.decode(), start, length
            start += length
