"""What the user named: recognised before anything is decoded, and turned into a reader where decoding happens."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import av

from streamvid.errors import SettingsError, SourceError, UnsupportedError, near
from streamvid.ingest import choice, devices
from streamvid.ingest.files import check_file, is_playlist, label, redact
from streamvid.ingest.live import LiveReader
from streamvid.ingest.openers import FileOpener, Opener
from streamvid.ingest.reader import Readable
from streamvid.ingest.ring import RecordTo
from streamvid.ingest.sampling import Seconds, exact

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_WILD = re.compile(r"[*?\[]")
_HEAD_BYTES = 4096


class Kind(StrEnum):
    """What sort of thing was named."""

    FILE = "file"
    IMAGES = "images"
    PLAYLIST = "playlist"
    HTTP = "http"
    TEST = "test pictures"
    CAMERA = "camera"
    STREAM = "stream"


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a source is decoded; the defaults suit everything.

    Args:
        decoder: "auto", "pyav", "torchcodec" or "decord".
        threads: processor threads for decoding, >= 1; None takes what the machine has.
        hwaccel: decode by this hardware where FFmpeg can ("cuda", "qsv", ...); what cannot be
            honoured is decoded in software, with a note.
        stall_seconds: a source that makes no progress for so long is given up, > 0.
        record: where its packets are written down; what is recorded is read once, as a live source is.
    """

    decoder: str = "auto"
    threads: int | None = None
    hwaccel: str | None = None
    stall_seconds: float = 30.0
    record: RecordTo | None = None

    def __post_init__(self) -> None:
        if self.decoder not in choice.DECODERS:
            raise SettingsError(f"unknown decoder {self.decoder!r}; {near(self.decoder, choice.DECODERS)}")
        if self.threads is not None and self.threads < 1:
            raise SettingsError(f"decoding needs at least 1 thread, got {self.threads}; leave it out for all cores")
        if not self.stall_seconds > 0:
            raise SettingsError(f"stall_seconds must be above 0, got {self.stall_seconds}")
        devices_known = av.codec.hwaccel.hwdevices_available()
        if self.hwaccel is not None and self.hwaccel not in devices_known:
            raise SettingsError(f"unknown hardware {self.hwaccel!r}; {near(self.hwaccel, devices_known)}")


@dataclass(frozen=True, slots=True)
class Named:
    """A source that has been named and recognised, not yet opened."""

    address: str = field(repr=False)
    """As FFmpeg needs it; may hold credentials, so it is never printed or stored."""

    kind: Kind
    name: str
    """For messages; never holds credentials."""

    path: Path | None = None
    """The file, folder or playlist on this machine."""

    rate: Fraction | None = None

    @property
    def file(self) -> Path | None:
        """The one file whose bytes are the source."""
        return self.path if self.kind is Kind.FILE else None

    @property
    def endless(self) -> bool:
        """Whether it surely has no end; a playlist may turn out to have none."""
        if self.kind is Kind.TEST:
            return devices.lavfi(self.address, stall_seconds=1).live
        return self.kind in (Kind.CAMERA, Kind.STREAM)

    def identity(self) -> str | None:
        """What names the content, for keys of memories; None if nothing does and memories must not be found again.

        Files are not looked at here: their digest is the memory's own business.
        """
        rate = "" if self.rate is None else f" at {self.rate}"
        if self.kind is Kind.IMAGES:
            from streamvid.ingest.images import ImageFiles, ImagesReader

            return ImagesReader(ImageFiles.find(self.address), rate=self.rate).identity()
        if self.kind is Kind.TEST and not self.endless:
            return _digest(f"{self.address} by FFmpeg {av.library_versions}{rate}")
        if self.kind is Kind.HTTP:
            from streamvid.ingest.http import HttpFile, NoFile  # only who reads from the network needs a client

            try:
                with HttpFile(self.address) as file:
                    return file.identity()
            except NoFile:
                return None
        return None


def find(address: str | os.PathLike[str], *, rate: Seconds | None = None) -> Named:
    """Recognise what an address means; nothing is decoded and no network is used.

    Args:
        address: a file, a folder or glob of images, an http(s) address of a film or of a
            playlist, ``lavfi:GRAPH``, ``camera:N``, or a stream (rtsp, rtmp, srt, udp ...).
        rate: pictures a second, for images and raw streams, which have no times of their own.

    Raises:
        SourceError: one line on why nothing of the kind is there.
    """
    # The process that decodes a film must not wait for what reads images.
    from streamvid.ingest.images import image_kind, is_image_folder

    text = os.fspath(address)
    every = None if rate is None else exact(rate)
    if every is not None and every <= 0:
        raise SettingsError(f"the rate must be above 0 pictures a second, got {rate}")
    if text.startswith("file://"):
        text = _file_address(text)
    scheme = _SCHEME.match(text)
    if scheme:
        kind = scheme.group(1).lower()
        if kind in ("http", "https"):
            return Named(text, Kind.HTTP, label(text), rate=every)
        if kind in devices.STREAMS:
            return Named(text, Kind.STREAM, label(text), rate=every)
        known = ("http", "https", "file", *devices.STREAMS)
        raise SourceError(f"{redact(text)}: {kind}:// is no kind of address that is read; {near(kind, known)}")
    prefix = text.partition(":")[0]
    if prefix in ("lavfi", "camera") and ":" in text and not os.path.exists(text):
        return Named(text, Kind.TEST if prefix == "lavfi" else Kind.CAMERA, label(text), rate=every)
    if os.path.isdir(text) and is_image_folder(text):
        return Named(text, Kind.IMAGES, label(text), Path(os.path.abspath(text)), every)
    if _WILD.search(text) and not os.path.exists(text):
        return Named(text, Kind.IMAGES, label(text), None, every)
    path = check_file(text)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if image_kind(head) is not None:
        return Named(text, Kind.IMAGES, label(text), path, every)
    if is_playlist(head) is not None:
        return Named(text, Kind.PLAYLIST, label(text), path, every)
    return Named(text, Kind.FILE, label(text), path, every)


def make(named: Named, decoding: Decoding) -> Readable:
    """The reader of a named source, opened, with its first picture decoded.

    Raises:
        SourceError: one line on why it cannot be read.
        SettingsError: if the decoder that was asked for does not fit.
    """
    if named.kind is Kind.IMAGES:
        from streamvid.ingest.images import ImageFiles, ImagesReader

        choice.only_auto(decoding.decoder, named.name, "images are decoded by Pillow")
        if decoding.record is not None:
            raise UnsupportedError(f"{named.name} is no stream of packets, so it is not recorded; leave --record out")
        return ImagesReader(ImageFiles.find(named.address), rate=named.rate)
    opener = _opener(named, decoding)
    if opener.live or decoding.record is not None:
        choice.only_auto(decoding.decoder, named.name, "live sources are decoded by pyav", also="pyav")
        return LiveReader(opener, decoding.record)
    return choice.reader(opener, decoding.decoder, threads=decoding.threads)


def maker(named: Named, decoding: Decoding) -> partial[Readable]:
    """``make`` with its arguments, to be called in another process."""
    return partial(make, named, decoding)


def _opener(named: Named, decoding: Decoding) -> Opener:
    address, stall = named.address, decoding.stall_seconds
    if named.kind is Kind.TEST:
        return replace(devices.lavfi(address, stall_seconds=stall), hwaccel=decoding.hwaccel)
    if named.kind is Kind.CAMERA:
        return replace(devices.camera(address, stall_seconds=stall), hwaccel=decoding.hwaccel)
    if named.kind is Kind.STREAM:
        return replace(devices.stream(address, stall_seconds=stall), hwaccel=decoding.hwaccel)
    if named.path is not None and named.kind is Kind.FILE:
        return FileOpener(named.path, named.name, decoding.hwaccel, named.rate)
    # Only who reads from the network or a playlist needs a client for it.
    from streamvid.ingest import remote

    if named.kind is Kind.PLAYLIST:
        return remote.playlist(str(named.path), stall_seconds=stall, hwaccel=decoding.hwaccel)
    return remote.http(address, stall_seconds=stall, hwaccel=decoding.hwaccel)


def _file_address(text: str) -> str:
    """The path in a file:// address."""
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise SourceError(f"{label(text)} names another machine; copy the file here or give its http address")
    from urllib.request import url2pathname  # it brings a client for the whole web along

    return url2pathname(parts.path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
