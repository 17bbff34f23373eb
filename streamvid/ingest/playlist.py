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
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import unquote, urljoin
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import av
from av.container import InputContainer

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest.files import check_file, label
from streamvid.ingest.http import BLOCK, HttpFile, Web

_LONGEST_PLAYLIST = 16 << 20
_MOST_SEGMENTS = 200_000
_LONGEST_SEGMENT = 1e6
_LARGEST_ENCRYPTED = 256 << 20
_SEGMENT_AHEAD = 64 << 20
"""Segments are read whole, so one request asks for all of one."""

_KEPT_FILES = 4
_KEY_BYTES = 16
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_ATTRIBUTE = re.compile(r'([A-Z0-9-]+)=("[^"]*"|[^",\s][^",]*)')
_IDENTIFIER = re.compile(r"\$(RepresentationID|Number|Time|Bandwidth|)(?:%0(\d{1,2})d)?\$")
_DURATION = re.compile(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?)?")
_DRM = "is encrypted (DRM); give a source without copy protection"
_TRICKS = "http://dashif.org/guidelines/trickmode"
_LIVE_START = 3
"""FFmpeg begins so many segments before the end of a live playlist."""

_DEPTH_SECONDS = 60.0
"""How far back a live DASH playlist is read if it does not say how long it keeps its segments."""

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


def is_playlist(head: bytes) -> Literal["hls", "dash"] | None:
    """Which kind of playlist begins with these bytes, whatever its name; None if it is none."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"#EXTM3U"):
        return "hls"
    return "dash" if text.startswith(b"<") and re.search(rb"<(\w+:)?MPD[\s>]", text) else None


class _Key(NamedTuple):
    address: str
    iv: bytes


class _Part(NamedTuple):
    """Some bytes of some address; without a length they go to its end."""

    address: str
    start: int = 0
    length: int | None = None
    key: _Key | None = None


class _Segment(NamedTuple):
    part: _Part
    seconds: float
    header: _Part | None = None
    """What a decoder must know before it."""


class _Media(NamedTuple):
    """One version of a film."""

    segments: list[_Segment]
    sequence: int | None
    """The number of the first segment; None if the playlist gives none that stays."""

    ended: bool
    whole: bool = False
    """The only segment is a file to be opened as such."""

    notes: tuple[str, ...] = ()


class _Offer(NamedTuple):
    """One of several versions of a film; the largest in this order is the best."""

    height: int
    width: int
    bandwidth: int
    what: Any


class _File(Protocol):
    def read(self, size: int, /) -> bytes | None: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def close(self) -> None: ...


class _Home(Protocol):
    """Where a playlist lies, and what it may name from there."""

    def join(self, base: str, reference: str) -> str:
        """The address of what a playlist at ``base`` names; a SourceError if it must not."""

    def text(self, address: str) -> tuple[bytes, str]:
        """A playlist, and the address it really came from."""

    def open(self, part: _Part, *, ahead: int) -> _File:
        """The address of a part as a file."""

    def key(self, address: str) -> bytes:
        """What lies at an address, if that is no longer than a key."""


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
        self._home: _Home = _Network(self.address, self._web) if remote else _Folder(self.address)
        self._chosen: str | None = None
        self._media: _Media | None = None
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

    def _load(self) -> _Media:
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

    def _read(self, address: str) -> _Media:
        data, base = self._home.text(address)
        try:
            if is_playlist(data) == "dash":
                return _checked(_Dash(data, base, self._home).read(self.max_height))
            found = _Hls(base, self._home).read(data.decode("utf-8-sig", "replace"))
            if isinstance(found, _Media):
                return _checked(found)
        except (ValueError, LookupError, ArithmeticError, ElementTree.ParseError):
            raise SourceError(f"{label(address)} is a playlist that makes no sense; load it again") from None
        if self._chosen is not None:
            raise SourceError(f"{label(address)} names playlists where segments should be; give one of those")
        offer, notes = _choose(found, self.max_height)
        for note in notes:
            self._note(note)
        self._chosen = offer.what
        return self._read(offer.what)


def _again(address: str, stall_seconds: float, max_height: int | None) -> Playlist:
    return Playlist(address, stall_seconds=stall_seconds, max_height=max_height)


def _live(media: _Media) -> dict[str, str]:
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
        home: _Home,
        media: _Media,
        reload: Callable[[], _Media],
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
        self._parts: dict[str, _Part] = {_WHOLE: media.segments[0].part} if media.whole else {}
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

    def done(self, file: _File) -> None:
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
        header: _Part | None = None
        for number, segment in enumerate(media.segments, media.sequence or 0):
            if segment.header is not None and segment.header != header:
                header = self._parts[f"header-{number}"] = segment.header
                lines.append(f'#EXT-X-MAP:URI="header-{number}"')
            self._parts[f"segment-{number}"] = segment.part
            lines += [f"#EXTINF:{segment.seconds:.6f},", f"segment-{number}"]
        lines += ["#EXT-X-ENDLIST"] if media.ended else []
        return "\n".join([*lines, ""]).encode()

    def _open(self, part: _Part) -> io.RawIOBase | io.BytesIO:
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

    def __init__(self, gate: PlaylistGate, file: _File, start: int, length: int | None) -> None:
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

    def open(self, part: _Part, *, ahead: int) -> HttpFile:
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

    def open(self, part: _Part, *, ahead: int) -> io.FileIO:
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


def _all(file: _File, most: int) -> bytes:
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


def _checked(media: _Media) -> _Media:
    """The same, if its numbers can be meant; a ValueError if not."""
    parts = [part for segment in media.segments for part in (segment.part, segment.header) if part is not None]
    fine = all(part.start >= 0 and (part.length is None or part.length >= 0) for part in parts)
    if not fine or not all(0 <= segment.seconds < _LONGEST_SEGMENT for segment in media.segments):
        raise ValueError
    if len(media.segments) > _MOST_SEGMENTS or not 0 <= (media.sequence or 0) < 1 << 62:
        raise ValueError
    return media


def _choose(offers: list[_Offer], max_height: int | None) -> tuple[_Offer, tuple[str, ...]]:
    """The best version within the limit, and what to say of it."""
    fits = [offer for offer in offers if max_height is None or offer.height <= max_height]
    best = max(fits, key=lambda offer: offer[:3]) if fits else min(offers, key=lambda offer: offer[:3])
    size = f"{best.width}x{best.height}" if best.height else "the one"
    notes = (
        (f"{len(offers)} versions are offered; {size} at {best.bandwidth} bit/s is read",) if len(offers) > 1 else ()
    )
    return best, notes if fits else (*notes, f"no version has at most max_height = {max_height} rows")


class _Hls:
    """RFC 8216, as far as it says where pictures lie: reads one playlist."""

    def __init__(self, base: str, home: _Home) -> None:
        self._base = base
        self._home = home
        self._segments: list[_Segment] = []
        self._offers: list[_Offer] = []
        self._sequence = 0
        self._ended = False
        self._breaks = 0
        self._offer: dict[str, str] | None = None
        self._seconds: float | None = None
        self._span: str | None = None
        self._key: dict[str, str] = {}
        self._locked = False
        self._header: _Part | None = None

    def read(self, text: str) -> _Media | list[_Offer]:
        """One version of a film, or a list of them."""
        for line in map(str.strip, text.splitlines()):
            if line.startswith("#"):
                self._tag(*line.partition(":")[::2])
            elif line and self._offer is not None:
                width, _, height = self._offer.get("RESOLUTION", "0x0").lower().partition("x")
                rate = int(self._offer.get("BANDWIDTH", "0"))
                self._offers.append(_Offer(int(height), int(width), rate, self._home.join(self._base, line)))
                self._offer = None
            elif line and self._seconds is not None:
                self._add(line, self._seconds)
                self._seconds = self._span = None
        times = "times are those stored in the segments"
        notes = (f"the playlist has {self._breaks} breaks (EXT-X-DISCONTINUITY); {times}",) if self._breaks else ()
        return self._offers or _Media(self._segments, self._sequence, self._ended, notes=notes)

    def _tag(self, tag: str, value: str) -> None:
        if tag == "#EXT-X-STREAM-INF":
            self._offer = _attributes(value)
        elif tag == "#EXTINF":
            self._seconds = float(value.partition(",")[0])
        elif tag == "#EXT-X-BYTERANGE":
            self._span = value
        elif tag == "#EXT-X-MEDIA-SEQUENCE":
            self._sequence = int(value)
        elif tag == "#EXT-X-ENDLIST" or (tag, value) == ("#EXT-X-PLAYLIST-TYPE", "VOD"):
            self._ended = True
        elif tag == "#EXT-X-DISCONTINUITY":
            self._breaks += bool(self._segments)
        elif tag == "#EXT-X-KEY":
            key = _attributes(value)
            mine = key.get("METHOD") == "AES-128" and key.get("KEYFORMAT", "identity") == "identity"
            free = key.get("METHOD") == "NONE"
            self._key = key if mine else {} if free else self._key
            self._locked = not mine and not free and not self._key
        elif tag == "#EXT-X-MAP":
            header = _attributes(value)
            self._header = self._part(header["URI"], header.get("BYTERANGE"))
        elif tag == "#EXT-X-DEFINE":
            raise SourceError(
                f"{label(self._base)} uses variables (EXT-X-DEFINE), which are not read; give a video file"
            )

    def _add(self, line: str, seconds: float) -> None:
        if self._locked:
            raise SourceError(f"{label(self._base)} {_DRM}")
        self._segments.append(_Segment(self._part(line, self._span), seconds, self._header))

    def _part(self, name: str, span: str | None) -> _Part:
        address = self._home.join(self._base, name)
        key = None
        if self._key:
            number = self._sequence + len(self._segments)
            iv = self._key["IV"][2:].zfill(32) if "IV" in self._key else f"{number:032x}"
            key = _Key(self._home.join(self._base, self._key["URI"]), bytes.fromhex(iv))
        if span is None:
            return _Part(address, key=key)
        length, _, start = span.partition("@")
        last = self._segments[-1].part if self._segments else None
        follows = last.start + (last.length or 0) if last is not None and last.address == address else 0
        return _Part(address, int(start) if start else follows, int(length), key)


def _attributes(text: str) -> dict[str, str]:
    return {name: value.strip('"') for name, value in _ATTRIBUTE.findall(text)}


class _Dash:
    """ISO/IEC 23009-1, as far as it says where pictures lie: reads one period of one playlist."""

    def __init__(self, data: bytes, base: str, home: _Home) -> None:
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
            raise SourceError(f"{label(base)} defines entities, which playlists do not need; this is refused")
        self._root = ElementTree.fromstring(data)
        for element in self._root.iter():
            element.tag = element.tag.rpartition("}")[2]
        self._where = label(base)
        self._base = base
        self._home = home
        self._live = self._root.get("type") == "dynamic"

    def read(self, max_height: int | None) -> _Media:
        """The best version within the limit."""
        period, notes = self._period()
        offers, locked = [], False
        for group in period.findall("AdaptationSet"):
            if any(entry.get("schemeIdUri") == _TRICKS for entry in group.findall("EssentialProperty")):
                continue
            for version in group.findall("Representation"):
                both = {**group.attrib, **version.attrib}
                if not (both.get("mimeType") or both.get("contentType", "")).startswith("video"):
                    continue
                if any(level.find("ContentProtection") is not None for level in (group, version)):
                    locked = True
                    continue
                height, width, rate = (int(both.get(name, "0")) for name in ("height", "width", "bandwidth"))
                offers.append(_Offer(height, width, rate, [self._root, period, group, version]))
        if not offers:
            raise SourceError(f"{self._where} {_DRM if locked else 'names no video; give one that has pictures'}")
        best, said = _choose(offers, max_height)
        return self._media(best.what, (*notes, *said))

    def _period(self) -> tuple[Element, tuple[str, ...]]:
        """The longest period, or the last one of a live playlist, and when it starts and how long it lasts."""
        periods = self._root.findall("Period")
        if not periods:
            raise SourceError(f"{self._where} names no period; check the address")
        starts: list[float] = []
        spans: list[float] = []
        for entry in periods:
            starts.append(_seconds(entry.get("start")) or (starts[-1] + spans[-1] if starts else 0.0))
            spans.append(_seconds(entry.get("duration")))
        total = _seconds(self._root.get("mediaPresentationDuration"))
        ends = [*starts[1:], total]
        spans = [span or max(0.0, end - start) for span, start, end in zip(spans, starts, ends, strict=True)]
        place = len(periods) - 1 if self._live else spans.index(max(spans))
        self._start, self._span = starts[place], spans[place]
        which = "last" if self._live else "longest"
        notes = (f"the playlist has {len(periods)} periods; the {which} one is read",) if len(periods) > 1 else ()
        return periods[place], notes

    def _media(self, levels: list[Element], notes: tuple[str, ...]) -> _Media:
        base = self._base
        for level in levels:
            base = self._home.join(base, level.findtext("BaseURL") or "") if level.findtext("BaseURL") else base
        for kind in ("SegmentTemplate", "SegmentList"):
            found = [entry for level in levels[1:] if (entry := level.find(kind)) is not None]
            if found:
                rules = {name: value for entry in found for name, value in entry.attrib.items()}
                lines = [line for entry in found if (line := entry.find("SegmentTimeline")) is not None]
                times = self._times(rules, lines[-1] if lines else None, len(found[-1].findall("SegmentURL")))
                fill = self._template if kind == "SegmentTemplate" else self._list
                segments = fill(base, levels[-1], rules, found[-1], times)
                steady = self._live and not lines and kind == "SegmentTemplate"
                return _Media(segments, times[0][0] if steady and times else None, not self._live, notes=notes)
        whole = [_Segment(_Part(base), self._span)] if base != self._base else []
        return _Media(whole, 0, ended=True, whole=True, notes=notes)

    def _template(
        self, base: str, version: Element, rules: dict[str, str], entry: Element, times: list[tuple[int, int, int]]
    ) -> list[_Segment]:
        def fill(template: str, number: int, time: int) -> _Part:
            values = {"RepresentationID": version.get("id", ""), "Bandwidth": version.get("bandwidth", "")}
            values |= {"Number": str(number), "Time": str(time), "": "$"}
            name = _IDENTIFIER.sub(lambda found: values[found[1]].zfill(int(found[2] or 0)), template)
            return _Part(self._home.join(base, name))

        header = fill(rules["initialization"], 0, 0) if "initialization" in rules else None
        scale = int(rules.get("timescale", "1"))
        return [_Segment(fill(rules["media"], number, time), ticks / scale, header) for number, time, ticks in times]

    def _list(
        self, base: str, version: Element, rules: dict[str, str], entry: Element, times: list[tuple[int, int, int]]
    ) -> list[_Segment]:
        def part(name: str | None, span: str | None) -> _Part:
            address = self._home.join(base, name) if name else base
            if span is None:
                return _Part(address)
            first, _, last = span.partition("-")
            return _Part(address, int(first), int(last) - int(first) + 1)

        first = entry.find("Initialization")
        header = None if first is None else part(first.get("sourceURL"), first.get("range"))
        scale = int(rules.get("timescale", "1"))
        named = entry.findall("SegmentURL")
        pairs = zip(named, times, strict=False)
        return [_Segment(part(url.get("media"), url.get("mediaRange")), t[2] / scale, header) for url, t in pairs]

    def _times(self, rules: dict[str, str], line: Element | None, named: int) -> list[tuple[int, int, int]]:
        """Number, time and length of all segments; times and lengths in ticks."""
        scale, first = int(rules.get("timescale", "1")), int(rules.get("startNumber", "1"))
        offset = int(rules.get("presentationTimeOffset", "0"))
        if line is None:
            ticks = int(rules.get("duration", "0")) or math.ceil(self._span * scale)
            start, stop = 0, named or math.ceil(round(self._span * scale / ticks, 6))
            if self._live and not named:
                delay = _seconds(self._root.get("suggestedPresentationDelay"))
                stop = max(0, math.floor((self._age() - delay) * scale / ticks))
                depth = _seconds(self._root.get("timeShiftBufferDepth")) or _DEPTH_SECONDS
                start = max(0, stop - math.ceil(depth * scale / ticks))
            if stop - start > _MOST_SEGMENTS:
                raise ValueError
            return [(first + k, offset + k * ticks, ticks) for k in range(start, stop)]
        times: list[tuple[int, int, int]] = []
        entries = line.findall("S")
        now = 0
        for k, entry in enumerate(entries):
            now, ticks, more = int(entry.get("t", now)), int(entry.attrib["d"]), int(entry.get("r", "0"))
            if more < 0:
                after = entries[k + 1].get("t") if k + 1 < len(entries) else None
                more = math.ceil(((int(after) if after else offset + self._span * scale) - now) / ticks) - 1
            if len(times) + more >= _MOST_SEGMENTS or ticks <= 0:
                raise ValueError
            times += [(first + len(times) + j, now + j * ticks, ticks) for j in range(more + 1)]
            now += (more + 1) * ticks
        return times

    def _age(self) -> float:
        """Seconds since the period began, by the clock."""
        born = datetime.fromisoformat(self._root.attrib["availabilityStartTime"])
        born = born.replace(tzinfo=born.tzinfo or UTC)
        return (datetime.now(UTC) - born).total_seconds() - self._start


def _seconds(text: str | None) -> float:
    """An ISO 8601 duration; 0 if there is none."""
    found = _DURATION.fullmatch(text or "")
    parts = [float(part or 0) for part in found.groups()] if found is not None else [0.0]
    return sum(part * size for part, size in zip(parts, (86400, 3600, 60, 1), strict=False))
