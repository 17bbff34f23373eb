"""Playlists (HLS and DASH) from the network or a folder, read without letting FFmpeg open anything itself.

A playlist is a list of addresses that somebody else wrote.  It is parsed here, one version of the
film is chosen, every address is checked, and FFmpeg's HLS reader gets a playlist in which segments
are numbers; :class:`PlaylistGate` knows what the numbers stand for.  DASH takes the same way: the
wheels of PyAV have no reader for it, and FFmpeg's own opens addresses past ``io_open``.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote, urljoin
from xml.etree import ElementTree

import av
from av.container import InputContainer

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest.files import check_file, is_playlist, label
from streamvid.ingest.http import BLOCK, HttpFile
from streamvid.ingest.manifest import MOST_SEGMENTS, DashText, Handle, HlsText, Home, Part, Version, choose
from streamvid.ingest.web import Web

_LONGEST_PLAYLIST = 16 << 20
_LONGEST_SEGMENT = 1e6
_LARGEST_ENCRYPTED = 256 << 20
_SEGMENT_AHEAD = 64 << 20
"""Segments are read whole, so one request asks for all of one."""
_KEPT_FILES = 4
_KEY_BYTES = 16
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_LIVE_START = 3
"""FFmpeg begins so many segments before the end of a live playlist."""
_LIST, _WHOLE = "playlist.m3u8", "film"
_OPTIONS = {
    # Whatever FFmpeg might open by itself fails: there is no protocol of this name.
    "protocol_whitelist": "none",
    "format_whitelist": "hls,mpegts,mov,matroska,aac,ac3,eac3,mp3,webvtt",
    # The names are our own.  Kept connections would be looked for in FFmpeg's HTTP reader.
    "allowed_extensions": "ALL",
    "extension_picky": "0",
    "http_persistent": "0",
    "http_multiple": "0",
}


class Playlist:
    """A playlist that can be opened any number of times, and pickled.

    From the network it may name http and https addresses, those inside a private network only if
    it lies in one itself.  From a folder it may name films in and below that folder.  Anything
    else is refused unseen.  Of several versions of the film one is read, the others are not
    touched; sound in playlists of its own is left out.

    Args:
        address: an http or https address, or a path.
        stall_seconds: no byte for so long is an error; a live playlist without news for so long
            has ended.
        max_height: the best version of at most so many rows is read, or the smallest if all have
            more; None reads the best.

    Raises:
        SettingsError: for settings out of range.
    """

    def __init__(
        self, address: str | os.PathLike[str], *, stall_seconds: float = 30.0, max_height: int | None = None
    ) -> None:
        if max_height is not None and max_height < 1:
            raise SettingsError(f"max_height must be 1 or more, got {max_height}; leave it out for the best version")
        self.address = os.fspath(address)
        remote = self.address.lower().startswith(("http://", "https://"))
        if not remote:
            self.address = os.path.abspath(os.path.expanduser(self.address))
        self.stall_seconds = stall_seconds
        self.max_height = max_height
        self._web = Web(stall_seconds=stall_seconds)
        self._home: Home = _Network(self.address, self._web) if remote else _Folder(self.address)
        self._chosen: str | None = None
        self._media: Version | None = None
        self._notes: list[str] = []

    def __reduce__(self) -> tuple[Callable[..., Playlist], tuple[Any, ...]]:
        """Address and settings; the rest is read again."""
        return _again, (self.address, self.stall_seconds, self.max_height)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which version is read and what was not as it should be, as far as it has been met."""
        return tuple(self._notes)

    @property
    def live(self) -> bool:
        """Whether the playlist had no end when it was last read.

        Raises:
            SourceError: if it is read for this and cannot be.
        """
        return not (self._media or self._load()).ended

    @property
    def burst(self) -> Fraction:
        """Seconds of pictures that may come at once from a live playlist: what it starts with, and a segment more."""
        media = self._media or self._load()
        longest = max(segment.seconds for segment in media.segments)
        return Fraction(round(1000 * (sum(s.seconds for s in media.segments[-_LIVE_START:]) + longest)), 1000)

    @property
    def requests(self) -> int:
        """Requests sent so far."""
        return self._web.requests

    @property
    def bytes_received(self) -> int:
        """Bytes of bodies received so far."""
        return self._web.bytes_received

    def open(self) -> InputContainer:
        """A new container that holds the chosen version alone; what fails later is raised by its packets.

        Raises:
            SourceError: one line that says what cannot be opened or must not be.
        """
        media = self._media if self._media is not None and self._media.ended else self._load()
        where = label(self.address)
        gate = PlaylistGate(where, self._home, media, self._load, self._note, stall_seconds=self.stall_seconds)
        options = {**_OPTIONS, **({} if media.ended else _live(media))}
        name, kind = (_WHOLE, None) if media.whole else (_LIST, "hls")
        try:
            container = av.open(name, "r", kind, container_options=options, metadata_errors="replace", io_open=gate)
            gate.container = container
            return container
        except (av.error.FFmpegError, ValueError, OSError):
            why = "do not decrypt with the key it names" if media.segments[0].part.key else "are of an unknown kind"
            reason = f"holds no video that can be read: its segments are damaged or {why}"
            raise gate.refused or SourceError(f"{label(self.address)} {reason}") from None

    def close(self) -> None:
        """Close idle connections; containers that are open go on, and it can be opened again."""
        self._web.close()

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _load(self) -> Version:
        """The chosen version as the playlist has it now."""
        media = self._read(self._chosen or self.address)
        if not media.segments:
            raise SourceError(f"{label(self.address)} names no segments; try again later, or give a video file")
        if media.sequence is None:
            old = self._media
            places = {segment.part: place for place, segment in enumerate(old.segments)} if old is not None else {}
            first = (old.sequence or 0) + places.get(media.segments[0].part, len(places)) if old is not None else 0
            media = media._replace(sequence=first)
        for note in media.notes:
            self._note(note)
        self._media = media
        return media

    def _read(self, address: str) -> Version:
        data, base = self._home.text(address)
        try:
            if is_playlist(data) == "dash":
                return _checked(DashText(data, base, self._home).read(self.max_height))
            found = HlsText(base, self._home).read(data.decode("utf-8-sig", "replace"))
            if isinstance(found, Version):
                return _checked(found)
        except (ValueError, LookupError, ArithmeticError, ElementTree.ParseError):
            raise SourceError(f"{label(address)} is a playlist that makes no sense; load it again") from None
        if self._chosen is not None:
            raise SourceError(f"{label(address)} names playlists where segments should be; give one of those")
        offer, notes = choose(found, self.max_height)
        for note in notes:
            self._note(note)
        self._chosen = offer.what
        return self._read(offer.what)


def _again(address: str, stall_seconds: float, max_height: int | None) -> Playlist:
    return Playlist(address, stall_seconds=stall_seconds, max_height=max_height)


def _live(media: Version) -> dict[str, str]:
    """What FFmpeg is told of a playlist without end: to open it with what is there, and to look for news until told."""
    there = sum(segment.seconds for segment in media.segments[-_LIVE_START:])
    enough = str(int(min(5.0, there / 2) * 1_000_000))
    return {"max_reload": "1000000", "m3u8_hold_counters": "1000000", "analyzeduration": enough, "fpsprobesize": "3"}


class PlaylistGate:
    """The ``io_open`` of one container: gives FFmpeg what the playlist names, and nothing else.

    FFmpeg swallows errors and reads on, and PyAV prints a traceback of every error that another
    one follows.  So the first one is raised and kept in ``refused``, and then everything is empty.
    """

    def __init__(
        self,
        where: str,
        home: Home,
        media: Version,
        reload: Callable[[], Version],
        note: Callable[[str], None],
        *,
        stall_seconds: float = 30.0,
    ) -> None:
        self.opened = 0
        self.refused: SourceError | None = None
        self.container: InputContainer | None = None
        self._where = where
        self._home = home
        self._media = media
        self._reload = reload
        self._stall_seconds = stall_seconds
        self._news: float | None = None
        """When the playlist last brought something; None before FFmpeg has seen it."""

        self._note = note
        self._parts: dict[str, Part] = {_WHOLE: media.segments[0].part} if media.whole else {}
        self._keys: dict[str, bytes] = {}

    def __del__(self) -> None:
        """Close the container before it is collected: PyAV 18.1 ends the process if a cycle takes an open one."""
        if self.container is not None:
            self.container.close()

    def __call__(self, url: str, flags: int, options: Mapping[str, str]) -> io.RawIOBase | io.BytesIO:
        """A file for one of the names in the playlist that FFmpeg was given."""
        if self.refused is not None:
            return io.BytesIO(b"#EXTM3U\n#EXT-X-ENDLIST\n" if url == _LIST else b"")
        try:
            if url == _LIST:
                return io.BytesIO(self._list())
            if url not in self._parts or flags & 2:
                raise SourceError(
                    f"{self._where} makes FFmpeg open {label(url)}, which it does not name; this is refused"
                )
            self.opened += 1
            return self._open(self._parts[url])
        except (SourceError, OSError) as reason:
            raise self.met(reason) from None

    def met(self, reason: SourceError | OSError) -> SourceError:
        """Remember an error of one of the files."""
        if not isinstance(reason, SourceError):
            reason = SourceError(f"{self._where}: a segment cannot be read ({reason.strerror}); check the disk")
        self.refused = reason
        return reason

    def done(self, file: Handle) -> None:
        """Note what a file turned out to be, and close it."""
        if isinstance(file, HttpFile) and not file.closed and file.cut_off:
            self._note("segments are cut off: their server sends less than it says")
        file.close()

    def _list(self) -> bytes:
        """The playlist with numbers for names."""
        now = time.monotonic()
        media = self._media if self._news is None else self._reload()
        if self._news is None or media.segments[-1] != self._media.segments[-1]:
            self._news = now
        elif not media.ended and now - self._news > self._stall_seconds:
            self._note(f"the live playlist brought nothing new for {self._stall_seconds:g} s and is taken as ended")
            media = media._replace(ended=True)
        self._media = media
        self._parts = {}
        longest = math.ceil(max(segment.seconds for segment in media.segments))
        lines = ["#EXTM3U", f"#EXT-X-TARGETDURATION:{longest}", f"#EXT-X-MEDIA-SEQUENCE:{media.sequence}"]
        header: Part | None = None
        for number, segment in enumerate(media.segments, media.sequence or 0):
            if segment.header is not None and segment.header != header:
                header = self._parts[f"header-{number}"] = segment.header
                lines.append(f'#EXT-X-MAP:URI="header-{number}"')
            self._parts[f"segment-{number}"] = segment.part
            lines += [f"#EXTINF:{segment.seconds:.6f},", f"segment-{number}"]
        lines += ["#EXT-X-ENDLIST"] if media.ended else []
        return "\n".join([*lines, ""]).encode()

    def _open(self, part: Part) -> io.RawIOBase | io.BytesIO:
        whole = _WHOLE in self._parts
        given = _Given(self, self._home.open(part, ahead=BLOCK if whole else _SEGMENT_AHEAD), part.start, part.length)
        if part.key is None:
            return given
        with given:
            data = _all(given, _LARGEST_ENCRYPTED)
        key = self._keys.get(part.key.address)
        if key is None:
            key = self._keys[part.key.address] = self._home.key(part.key.address)
        return io.BytesIO(_decrypt(data, key, part.key.iv, self._where))


class _Given(io.RawIOBase):
    """A stretch of a file as FFmpeg sees it."""

    def __init__(self, gate: PlaylistGate, file: Handle, start: int, length: int | None) -> None:
        super().__init__()
        self._gate = gate
        self._file = file
        self._start = start
        self._length = length
        self._at = 0
        if start:
            file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        count = len(view) if self._length is None else max(0, min(len(view), self._length - self._at))
        if self._gate.refused is not None or not count:
            return 0
        try:
            data = self._file.read(count) or b""
        except (SourceError, OSError) as reason:
            raise self._gate.met(reason) from None
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            end = self._length if self._length is not None else self._file.seek(0, io.SEEK_END) - self._start
            offset += end
        elif whence == io.SEEK_CUR:
            offset += self._at
        self._at = self._file.seek(self._start + offset) - self._start
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._gate.done(self._file)
        super().close()


class _Network:
    """The home of a playlist at an http address."""

    def __init__(self, address: str, web: Web) -> None:
        web.trust(address)
        self._web = web
        self._where = label(address)
        self._kept: OrderedDict[str, HttpFile] = OrderedDict()
        self._lock = Lock()
        # Not the files: they end with whoever holds them.
        weakref.finalize(self, web.close)

    def join(self, base: str, reference: str) -> str:
        address = urljoin(base, reference.strip())
        scheme = _SCHEME.match(address)
        if scheme is None or scheme[1].lower() not in ("http", "https"):
            kind = f"a {scheme[1].lower()}: address" if scheme is not None else "something that is no address"
            raise SourceError(f"{self._where} names {kind}, and only http and https are opened; give another playlist")
        return address

    def text(self, address: str) -> tuple[bytes, str]:
        with HttpFile(address, web=self._web) as file:
            return _only_playlist(_all(file, _LONGEST_PLAYLIST), address), file.url

    def open(self, part: Part, *, ahead: int) -> HttpFile:
        if part.length is None:
            return HttpFile(part.address, web=self._web, ahead_bytes=ahead)
        with self._lock:  # many segments of one file
            if part.address not in self._kept:
                self._kept[part.address] = HttpFile(part.address, web=self._web, ahead_bytes=ahead)
            self._kept.move_to_end(part.address)
            if len(self._kept) > _KEPT_FILES:
                self._kept.popitem(last=False)[1].close()
            return self._kept[part.address].reopen()

    def key(self, address: str) -> bytes:
        with HttpFile(address, web=self._web, text=True) as file:
            return file.read(_KEY_BYTES + 1)


class _Folder:
    """The home of a playlist on disk: its folder and what lies below."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._given = os.path.dirname(self._address)
        self._folder = Path(os.path.realpath(self._given))

    def join(self, base: str, reference: str) -> str:
        scheme = _SCHEME.match(reference.strip())
        if scheme is not None and scheme[1].lower() in ("http", "https"):
            raise SourceError(
                f"{label(self._address)} names network addresses, and only those that you name are opened; "
                "give the http address of the playlist itself"
            )
        if scheme is not None or "\0" in reference:
            kind = f"a {scheme[1].lower()}: address" if scheme is not None else "something that is no file name"
            raise SourceError(
                f"{label(self._address)} names {kind}, and only files beside it are opened; give a video file"
            )
        path = os.path.normpath(os.path.join(os.path.dirname(base), reference.strip()))
        if os.path.commonpath([path, self._given]) != self._given:
            raise SourceError(self._outside())
        return path + "/" * reference.endswith("/")

    def text(self, address: str) -> tuple[bytes, str]:
        path = Path(address) if address == self._address else self._inside(address)
        try:
            if not path.is_file():
                raise SourceError(f"{label(address)} is no file; check the path")
            with path.open("rb") as file:
                data = file.read(1 << 12)
                if is_playlist(data) is not None:
                    data += file.read(_LONGEST_PLAYLIST)
        except OSError as reason:
            raise SourceError(f"{label(address)} cannot be read: {reason.strerror}") from None
        return _only_playlist(data, address), address

    def open(self, part: Part, *, ahead: int) -> io.FileIO:
        return io.FileIO(check_file(self._inside(part.address)))

    def key(self, address: str) -> bytes:
        path = self._inside(address)
        if not path.is_file() or path.stat().st_size != _KEY_BYTES:
            raise SourceError(f"{label(address)} is no key: those have {_KEY_BYTES} bytes; check the playlist")
        return path.read_bytes()

    def _inside(self, path: str) -> Path:
        """Where a path really leads; links must not lead out."""
        if not os.path.lexists(path):
            path = os.path.normpath(unquote(path))
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(self._folder):
            raise SourceError(self._outside())
        return real

    def _outside(self) -> str:
        way = "put playlist and segments into one folder"
        return f"{label(self._address)} names a file outside its own folder, which is not opened; {way}"


def _all(file: Handle, most: int) -> bytes:
    """What a file holds, up to a little more than ``most``."""
    data = bytearray()
    while len(data) <= most and (piece := file.read(1 << 20)):
        data += piece
    return bytes(data)


def _only_playlist(data: bytes, address: str) -> bytes:
    if is_playlist(data) is None:
        raise SourceError(f"{label(address)} is no HLS or DASH playlist; check the address")
    if len(data) > _LONGEST_PLAYLIST:
        raise SourceError(
            f"{label(address)} is longer than a playlist can be ({_LONGEST_PLAYLIST} bytes); give the video"
        )
    return data


def _decrypt(data: bytes, key: bytes, iv: bytes, where: str) -> bytes:
    """AES-128-CBC by FFmpeg, from memory to memory: ``data:`` is the only thing that can be opened."""
    wrong = SourceError(f"{where}: a segment does not decrypt; the key is wrong or the segment damaged")
    if len(key) != _KEY_BYTES or not data or len(data) % _KEY_BYTES or len(data) > _LARGEST_ENCRYPTED:
        raise wrong
    name = "crypto+data:application/octet-stream;base64," + base64.b64encode(data).decode("ascii")
    options = {"protocol_whitelist": "crypto,data", "key": key.hex(), "iv": iv.hex()}
    try:
        with av.open(name, "r", "data", container_options=options) as container:
            return b"".join(bytes(packet) for packet in container.demux())
    except (av.error.FFmpegError, ValueError):
        raise wrong from None


def _checked(media: Version) -> Version:
    """The same, if its numbers can be meant; a ValueError if not."""
    parts = [part for segment in media.segments for part in (segment.part, segment.header) if part is not None]
    fine = all(part.start >= 0 and (part.length is None or part.length >= 0) for part in parts)
    if not fine or not all(0 <= segment.seconds < _LONGEST_SEGMENT for segment in media.segments):
        raise ValueError
    if len(media.segments) > MOST_SEGMENTS or not 0 <= (media.sequence or 0) < 1 << 62:
        raise ValueError
    return media
