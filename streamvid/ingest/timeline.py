"""Which packets of a film hold the pictures on screen at given moments, told before anything is decoded."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from av.packet import Packet
from av.video.stream import VideoStream

_HEVC_SEQUENCE = 33
"""Kind of the units that hold sequence parameter sets."""


_MOST_HELD_BACK = {"h264": 16, "hevc": 16}
"""Most pictures that a codec allows to be decoded before and shown after another one; none where it is not named."""


class Distrust(Exception):  # noqa: N818 - not an error: what was promised is looked at more closely
    """Packets or pictures are not as the container promised."""


@dataclass(frozen=True, slots=True)
class Spot:
    """When a wanted picture appears and is gone, in ticks, and at how many targets it is on screen."""

    pts: int
    gone: int | None
    targets: int


class Timeline:
    """Tells of packets, before they are decoded, whether their pictures are on screen at a target.

    Packets come in the order they are decoded, and decoders hold back no more than 16 pictures to
    put them in order.  So once more than that are known to be shown later than a moment, none will
    come that is shown before it.  Nothing is made of dts: some files have wrong ones.

    Args:
        codec: as FFmpeg names it.
        targets: ticks, rising.
        leap: a distance of pictures, in ticks, that only reading in order can judge.
    """

    def __init__(self, codec: str, targets: list[int], leap: int) -> None:
        self.left = len(targets)
        """Targets whose picture is not known yet."""

        self.key: int | None = None
        """When the first packet's picture is shown; None before it came and if it is hidden."""

        self.expected: dict[int, Spot] = {}
        """Pictures that have been decided to be wanted, by pts; whoever meets one takes it out."""

        self._codec = codec
        self._held_back = _MOST_HELD_BACK.get(codec, 0)
        self._targets = targets
        self._leap = leap
        self._times: list[int] = []
        self._pending: deque[tuple[Packet[VideoStream], int, bool]] = deque()
        self._settled: int | None = None
        self._began = self._ended = self._found = False

    def add(self, packet: Packet[VideoStream]) -> None:
        """The next packet; the empty one at the end of the file ends the line."""
        if not packet.size:
            self._ended = True
            return
        pts = packet.pts
        if pts is None or packet.is_corrupt:
            raise Distrust
        shown = gives_picture(self._codec, packet)
        if not self._began:
            self._began = True
            if not packet.is_keyframe or pts > self._targets[0]:
                raise Distrust
            self.key = pts if shown else None
        if shown and (self.key is None or pts >= self.key):
            place = bisect_left(self._times, pts)
            late = self._settled is not None and pts <= self._settled
            if late or self._times[place : place + 1] == [pts]:
                raise Distrust
            self._times.insert(place, pts)
        else:
            shown = False
        self._pending.append((packet, pts, shown))

    def decided(self) -> Iterator[tuple[Packet[VideoStream], Spot | None]]:
        """Packets in the order they are decoded, as soon as it is known what they are for; none after the last."""
        while self._pending and self.left:
            packet, pts, shown = self._pending[0]
            spot = None
            if shown and pts <= self._targets[-1]:
                place = bisect_right(self._times, pts)
                if len(self._times) - place <= self._held_back and not self._ended:
                    return
                spot = self._spot(pts, place)
            self._pending.popleft()
            yield packet, spot

    def found(self, pts: int) -> bool:
        """Whether a frame may come: the key frame has to be the first."""
        self._found = self._found or self.key is None or pts == self.key
        return self._found

    def _spot(self, pts: int, place: int) -> Spot | None:
        gone = self._times[place] if place < len(self._times) else None
        first = bisect_left(self._targets, pts)
        after = bisect_left(self._targets, gone) if gone is not None else len(self._targets)
        if place == 1 and first:
            raise Distrust  # nothing is shown yet at the first target
        if gone is not None:
            self._settled = gone if self._settled is None else max(gone, self._settled)
        if first == after:
            return None
        before = self._times[place - 2] if place > 1 else pts
        if pts - before > self._leap or (gone is not None and gone - pts > self._leap):
            raise Distrust
        self.left -= after - first
        self.expected[pts] = spot = Spot(pts, gone, after - first)
        return spot


def gives_picture(codec: str, packet: Packet[VideoStream]) -> bool:
    """Whether a picture is shown for a packet: edit lists hide some, and some are only there to be referred to."""
    if packet.is_discard:
        return False
    if codec not in ("vp8", "vp9") or not packet.size:
        return True
    data = memoryview(packet)
    if codec == "vp8":
        return bool(data[0] & 0x10)
    if data[-1] & 0xE0 == 0xC0:  # several frames, of which the last is shown
        return True
    head = data[0] << 1 if data[0] & 0x30 == 0x30 else data[0]  # profile 3 has a bit more before these
    return bool(head & 0x08 or head & 0x02)


def skip_mode(codec: str, extradata: bytes | None) -> Literal["NONREF"] | None:
    """How FFmpeg is told to pass over pictures that nothing refers to; None where that is not exact.

    H.264 marks them.  HEVC marks those that nothing of the same temporal layer refers to, which
    is the same if there is one layer.  VP9 has none: every frame leaves probabilities behind.
    For AV1 it cannot be told from packet to packet.
    """
    return "NONREF" if codec == "h264" or (codec == "hevc" and _has_one_layer(extradata or b"")) else None


def _has_one_layer(record: bytes) -> bool:
    """Whether all sequence parameter sets of an HEVC configuration record (ISO/IEC 14496-15) name one layer."""
    if record[:1] != b"\x01" or len(record) < 23:
        return False
    place, layers = 23, set()
    for _ in range(record[22]):
        kind, count = record[place] & 0x3F, int.from_bytes(record[place + 1 : place + 3])
        place += 3
        for _ in range(count):
            if place + 5 > len(record):
                return False
            if kind == _HEVC_SEQUENCE:
                layers.add((record[place + 4] >> 1) & 7)
            place += 2 + int.from_bytes(record[place : place + 2])
    return layers == {0}
