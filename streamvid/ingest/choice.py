"""Which decoder reads which source, and why.

PyAV reads every kind of source.  torchcodec and decord are used only if asked for by name.  What they
are known to show wrongly was measured; a source of such a kind is refused to them, with the finding
(``KNOWN_WRONG``), before either of them sees it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import av
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from streamvid.errors import SettingsError, SourceError, near
from streamvid.ingest.film import RESETTING, Decoder
from streamvid.ingest.openers import FileOpener, Opener
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.pyav import PyavReader
from streamvid.ingest.reader import Reader

DECODERS = ("auto", "pyav", "torchcodec", "decord")
"""What may be asked for as ``decoder``."""

_WHY = {
    "auto": "it reads every kind of source, and nothing as exact was found to cost less",
    "pyav": "asked for",
    "torchcodec": "asked for; nothing known speaks against it for this file",
    "decord": "asked for; nothing known speaks against it for this file",
}

_HDR = frozenset({16, 18})
_BT2020 = 9
_ORDINARY_MATRICES = frozenset({0, 1, 2, 4, 5, 6, 7, 9})
"""Transfer characteristics, primaries and matrices as in ISO/IEC 23091-2."""

_MOST_REORDERED = 32
"""Places between a packet's order in the file and its order in time; H.264, HEVC and VVC need no more."""

_NARROWEST = 32
"""Pixels; decord gives arrays of the wrong shape for anything narrower."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The pictures a container shows, in the order they are shown, by its packets alone."""

    base: Fraction
    """The tick in seconds."""

    stamps: tuple[int, ...]
    """When each appears, in ticks, rising."""

    stays: tuple[int, ...]
    """How long each stays by its packet, in ticks; 0 where the packet does not say."""

    keys: tuple[bool, ...]
    """Whether each is marked as a key frame."""

    step: Fraction
    """A guess of the seconds between pictures."""

    end: Fraction | None
    """When the last one is gone, in seconds; None if the container does not tell."""

    def __len__(self) -> int:
        return len(self.stamps)

    def pts(self, number: int) -> Fraction:
        """When a picture appears, in seconds."""
        return self.stamps[number] * self.base

    def stay(self, number: int) -> Fraction:
        """How long a picture stays if it is the last: as it says, else as the file does, else as the one before."""
        pts = self.pts(number)
        if self.stays[number] > 0:
            return self.stays[number] * self.base
        if self.end is not None and self.end > pts:
            return self.end - pts
        return pts - self.pts(number - 1) if number else self.step

    def at(self, seconds: Fraction) -> int:
        """The number of the picture on screen at a moment; -1 before the first."""
        return bisect_right(self.stamps, floor(seconds / self.base)) - 1

    def between(self, start: Fraction, stop: Fraction) -> int:
        """How many pictures appear in ``[start, stop)``."""
        first, last = (bisect_right(self.stamps, ceil(edge / self.base) - 1) for edge in (start, stop))
        return max(0, last - first)


@dataclass(frozen=True, slots=True)
class Facts:
    """What of a source decides who may read it, by its packets and its first picture."""

    name: str
    path: Path | None
    """The file of this machine; None for anything else."""

    stream: int
    """Stream index in the container."""

    container: str
    codec: str
    size: tuple[int, int]
    """(H, W) upright."""

    stored_height: int
    bits: int
    """Most bits of a channel."""

    shown: Shown
    untimed: int
    """Packets without a time."""

    displaced: bool
    """Whether times repeat or leap, or say something else than the pictures of PyAV."""

    hidden: int
    """Packets whose picture is only there for others to be built on, by the codec."""

    cut: int
    """Packets whose picture an edit list hides."""

    broken: bool
    """Whether packets are missing or not whole, or the first picture is damaged."""

    false_keys: int
    """Packets that the container calls key frames and at which decoding cannot start afresh, by the codec."""

    leading: bool
    """Whether pictures are shown before a key frame that they follow in the file (open groups)."""

    mirrored: bool
    square: bool
    """Whether pixels are as wide as high."""

    wide: bool
    """Whether brightness or colours go beyond an ordinary screen's: PQ, HLG, BT.2020, unknown matrices."""

    interlaced: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of source that a decoder is known to get wrong."""

    decoders: tuple[str, ...]
    what: str
    """What it does there, as the end of a sentence."""

    of: Callable[[Facts], bool]


_BOTH = ("torchcodec", "decord")
_DECORD = ("decord",)

KNOWN_WRONG: tuple[Finding, ...] = (
    Finding(_BOTH, "reads nothing but files of this machine", lambda f: f.path is None),
    Finding(_BOTH, "does not read streams that store no times", lambda f: f.untimed > 0 or not len(f.shown)),
    Finding(
        _BOTH,
        "loses pictures of MPEG and Ogg streams or shows grey ones, as it cannot go back in them safely",
        lambda f: f.container in ("mpegts", "mpeg", "ogg"),
    ),
    Finding(
        _BOTH,
        "shows pictures of AVI files at wrong times, as AVI stores none",
        lambda f: f.container == "avi" and f.codec != "mjpeg",
    ),
    Finding(_BOTH, "shows damaged pictures as if they were whole, and this file is damaged", lambda f: f.broken),
    Finding(_DECORD, "cannot decode AV1", lambda f: f.codec == "av1"),
    Finding(
        _BOTH,
        "gets broken pictures where key frames may be none, and those of this codec may",
        lambda f: f.codec not in RESETTING | {"gif"},
    ),
    Finding(
        _BOTH,
        "takes pictures marked as key frames for a fresh start that are none (a file without a table of key "
        "frames, open groups or intra refresh), and shows ruins",
        lambda f: f.false_keys > 0,
    ),
    Finding(
        _DECORD,
        "shows other pictures than asked for where some are shown before the key frame they follow (open groups)",
        lambda f: f.leading,
    ),
    Finding(_BOTH, "counts pictures that are meant to stay hidden", lambda f: f.hidden > 0),
    Finding(_DECORD, "counts pictures that an edit list hides", lambda f: f.cut > 0),
    Finding(_BOTH, "needs times that rise, and here they repeat, fall or leap", lambda f: f.displaced),
    Finding(_BOTH, "gives other colours at edges if pictures have more than 8 bits", lambda f: f.bits > 8),
    Finding(_BOTH, "does not bring HDR and wide colours to an ordinary screen", lambda f: f.wide),
    Finding(_BOTH, "turns pictures that are to be mirrored too, and does not mirror them", lambda f: f.mirrored),
    Finding(_BOTH, "takes all pixels for square, and these are not", lambda f: not f.square),
    Finding(_BOTH, "does not deinterlace", lambda f: f.interlaced),
    Finding(_DECORD, "gives wrong colours if the height is odd", lambda f: f.stored_height % 2 == 1),
    Finding(_DECORD, "gives garbage for narrow pictures", lambda f: f.size[1] < _NARROWEST),
)
"""Measured with torchcodec 0.13.0 (FFmpeg 5.1) and decord 0.6.0 against PyAV 18.1 (FFmpeg 8)."""


def choose(wanted: str, facts: Facts | None = None) -> tuple[str, str]:
    """The decoder for a source, and why, as half a sentence.

    Args:
        wanted: one of ``DECODERS``.
        facts: see ``facts_of``; "auto" and "pyav" need none.

    Raises:
        SettingsError: if there is no such decoder, or it is known to get sources of this kind wrong.
    """
    if wanted not in DECODERS:
        raise SettingsError(f"unknown decoder {wanted!r}; {near(wanted, DECODERS)}")
    if facts is not None:
        for finding in KNOWN_WRONG:
            if wanted in finding.decoders and finding.of(facts):
                raise SettingsError(f"{facts.name}: {wanted} {finding.what}; read it with --decoder pyav")
    return "pyav" if wanted == "auto" else wanted, _WHY[wanted]


def only_auto(wanted: str, name: str, why: str, *, also: str | None = None) -> None:
    """Refuse to let the user choose where there is no choice.

    Args:
        wanted: what was asked for.
        name: the source.
        why: who decodes it, as a sentence.
        also: a decoder that may be named, as it is the one that is used.

    Raises:
        SettingsError: if anything but "auto" or ``also`` was asked for.
    """
    if wanted not in ("auto", also):
        raise SettingsError(f"{name}: {why}, so {wanted} cannot be asked for; leave the decoder out")


def reader(opener: Opener, wanted: str = "auto", *, threads: int | None = None) -> Reader:
    """A reader of the source by the decoder that was asked for, opened and checked.

    Args:
        opener: what to read; not live.
        wanted: one of ``DECODERS``.
        threads: threads to decode with, >= 1; None takes what the machine has.

    Raises:
        SourceError: if it cannot be read, or the decoder sees other pictures in it than PyAV.
        SettingsError: if the decoder is unknown or known to get it wrong.
        MissingExtra: if the decoder's package is not installed.
    """
    if wanted not in _BOTH:
        decoder, why = choose(wanted)
        plain = PyavReader(opener)
        plain._film.threads = threads
        plain.info = replace(plain.info, decoder=decoder, chosen=why)
        return plain
    # Optional decoders are imported where they are asked for, and say first if they are not installed.
    from streamvid.ingest import decord, torchcodec

    library: type[torchcodec.Library] = torchcodec.Torchcodec if wanted == "torchcodec" else decord.Decord
    library.load()
    if isinstance(opener, FileOpener) and opener.hwaccel is not None:
        raise SettingsError(f"{wanted} does not decode by {opener.hwaccel} here; leave the hardware or the decoder out")
    with PyavReader(opener) as plain:
        facts = facts_of(plain, opener)
    _, why = choose(wanted, facts)
    return torchcodec.NumberedReader(plain.info, facts, library, why=why, threads=threads or 0)


def facts_of(plain: PyavReader, opener: Opener) -> Facts:
    """Read all packets of an opened source and decode its first picture.

    Raises:
        SourceError: if it is encrypted or its first picture does not decode any more.
    """
    film, info, stats = plain._film, plain.info, DecodeStats()
    tally = _Tally(info.codec)
    with closing(Decoder(film, stats)) as decoder:
        stream = decoder.stream
        tally.prefix = _length_bytes(stream.codec_context.extradata, info.codec)
        for packet in decoder.packets():
            tally.add(packet)
        promised = indexed = 0
        if info.container.startswith("mov"):
            promised = stream.frames
            # A parser may have put right what the container says of key frames; others believe the container.
            indexed = sum(entry.is_keyframe for entry in stream.index_entries)
    frame, look = tally.first, film.look
    if frame is None or look is None:
        raise SourceError(f"{info.name}: its first picture does not decode twice; read it with --decoder pyav")
    shown, displaced = tally.shown(film.time_base, film.step, film.end)
    if len(shown) and (shown.pts(0) != info.start or (film.end is not None and shown.pts(len(shown) - 1) >= film.end)):
        displaced = True
    return Facts(
        name=info.name,
        path=opener.path if isinstance(opener, FileOpener) else None,
        stream=film.index,
        container=info.container,
        codec=info.codec,
        size=(info.height, info.width),
        stored_height=look.size[0],
        bits=max(component.bits for component in frame.format.components),
        shown=shown,
        untimed=tally.untimed,
        displaced=displaced,
        hidden=tally.hidden,
        cut=tally.cut,
        broken=bool(tally.corrupt or stats.skipped or promised > tally.total or film.show_damaged),
        false_keys=max(tally.false_keys, indexed - tally.keys),
        leading=tally.leading,
        mirrored=look.upright.mirrored,
        square=look.shown == look.upright.size(look.size),
        wide=(
            frame.color_trc in _HDR or frame.color_primaries == _BT2020 or frame.colorspace not in _ORDINARY_MATRICES
        ),
        interlaced=frame.interlaced_frame,
    )


class _Tally:
    """What the packets of a film say, one after another in the order of the file."""

    def __init__(self, codec: str) -> None:
        self._codec = codec
        self.prefix = 0
        self.first: VideoFrame | None = None
        self.total = self.untimed = self.cut = self.corrupt = self.hidden = self.keys = self.false_keys = 0
        self.leading = False
        self._rows: list[tuple[int, int, bool]] = []
        self._key: int | None = None

    def add(self, packet: Packet[VideoStream]) -> None:
        """Take down one packet; packets are decoded until the first picture comes out."""
        if self.first is None:
            with suppress(av.error.FFmpegError, ValueError):
                self.first = next(iter(packet.decode()), None)
        if not packet.size:
            return
        self.total += 1
        self.corrupt += packet.is_corrupt
        self.hidden += _is_hidden(self._codec, memoryview(packet))
        if packet.is_keyframe:
            self.keys += 1
            # With nothing before it, the first packet is a fresh start whatever it holds.
            self.false_keys += self.total > 1 and not _starts_afresh(self._codec, memoryview(packet), self.prefix)
        if packet.is_discard:
            self.cut += 1
        elif packet.pts is None:
            self.untimed += 1
        else:
            self._rows.append((packet.pts, packet.duration or 0, packet.is_keyframe))
        if packet.pts is not None:
            if packet.is_keyframe:
                self._key = packet.pts
            self.leading |= self._key is not None and packet.pts < self._key

    def shown(self, base: Fraction, step: Fraction, end: Fraction | None) -> tuple[Shown, bool]:
        """The pictures in order of time, and whether that order is doubtful."""
        order = sorted(range(len(self._rows)), key=lambda row: self._rows[row][0])
        rows = [self._rows[row] for row in order]
        repeats = any(a[0] == b[0] for a, b in zip(rows, rows[1:], strict=False))
        far = any(abs(place - row) > _MOST_REORDERED for place, row in enumerate(order))
        stamps, stays, keys = ([row[column] for row in rows] for column in range(3))
        return Shown(base, tuple(stamps), tuple(stays), tuple(map(bool, keys)), step, end), repeats or far


def _is_hidden(codec: str, data: memoryview) -> bool:
    """Whether a packet of VP8 or VP9 says that its only picture is not shown."""
    if codec == "vp8":  # RFC 6386, 9.1
        return not data[0] >> 4 & 1
    if codec != "vp9" or data[-1] >> 5 == 0b110:  # several pictures in one, the last of which is shown
        return False
    profile = (data[0] >> 5 & 1) | (data[0] >> 4 & 1) << 1
    at = 11 - (profile == 3)
    bits = int.from_bytes(bytes(data[:2]).ljust(2, b"\0"), "big")
    again, shown = bits >> at & 1, bits >> (at - 2) & 1  # show_existing_frame, (frame_type), show_frame
    return not again and not shown


def _starts_afresh(codec: str, data: memoryview, prefix: int) -> bool:
    """Whether a packet holds a picture that forgets all before it, as the codec itself marks it."""
    if codec == "h264":
        return any(unit & 31 == 5 for unit in _unit_heads(data, prefix))
    if codec == "hevc":
        return any(16 <= unit >> 1 & 63 <= 21 for unit in _unit_heads(data, prefix))
    if codec == "vp8":
        return not data[0] & 1
    if codec == "vp9":
        at = 10 - (data[0] >> 4 & 3 == 3)
        return not int.from_bytes(bytes(data[:2]).ljust(2, b"\0"), "big") >> at & 1
    if codec == "av1":  # a sequence header comes first, but for a delimiter of two bytes
        kinds = [data[at] >> 3 & 15 for at in (0, 2) if at < len(data)]
        return kinds[0] == 1 or kinds == [2, 1]
    return True


def _unit_heads(data: memoryview, prefix: int) -> Iterator[int]:
    """First bytes of the units of an H.264 or HEVC packet; ``prefix`` is the bytes of their lengths, 0 for Annex B."""
    if not prefix:
        raw, at = bytes(data), -1
        while 0 <= (at := raw.find(b"\0\0\1", at + 1)) < len(raw) - 3:
            yield raw[at + 3]
        return
    at = 0
    while at + prefix < len(data):
        yield data[at + prefix]
        at += prefix + int.from_bytes(data[at : at + prefix], "big")


def _length_bytes(extradata: bytes | None, codec: str) -> int:
    """How many bytes give the length of a unit (ISO/IEC 14496-15); 0 if start codes part them."""
    place = {"h264": 4, "hevc": 21}.get(codec)
    if place is None or extradata is None or len(extradata) <= place or extradata[0] != 1:
        return 0
    return (extradata[place] & 3) + 1
