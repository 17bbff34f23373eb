"""Which packets of a film may be left out of decoding: those that give no picture, and those that none refers to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from av.packet import Packet
from av.video.stream import VideoStream

_HEVC_SEQUENCE = 33
_HEVC_FIRST_OTHER = 32
"""Kinds of HEVC units: parameters of a sequence, and the lowest that holds no part of a picture."""

_AV1_SEQUENCE = 1
_AV1_FRAME = 6
_AV1_REST = (2, 5, 15)
"""Kinds of AV1 units: parameters of a sequence, a frame, and those that mean nothing alone (delimiters, metadata,
padding)."""

_AV1_KEY, _AV1_SWITCH = 0, 3
_AV1_INTRA = (0, 2)


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


class Disposal:
    """Tells which of the packets that nobody wants to see are needed by others.

    - **H.264** marks pictures that nothing refers to, and FFmpeg passes over them (``NONREF``).
    - **HEVC** marks those that nothing of the same temporal layer refers to, which is what FFmpeg passes
      over: right for pictures of the highest layer only.
    - **AV1** frames say which slots they are kept in; what is kept in none is not sent to the decoder at all,
      be it a whole packet or a part of one.
    - **VP8** and **VP9** frames leave probabilities behind for those after them: all are needed.

    Args:
        codec: as FFmpeg names it.
        extradata: the codec's parameters in the container; where they are not understood, all is needed.
    """

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        record = extradata or b""
        self._codec = codec
        self._layers = 0
        self._length_bytes = 0
        self._sequence: _Av1Sequence | None = None
        if codec == "hevc" and len(record) > 22 and record[0] == 1:
            self._layers = _hevc_layers(record)
            self._length_bytes = (record[21] & 3) + 1
        elif codec == "av1" and len(record) > 4:
            self._sequence = _av1_sequence(memoryview(record)[4:])

    def passed_over(self, packet: Packet[VideoStream]) -> bool:
        """Whether FFmpeg may pass over the packet's picture if that is marked so."""
        if self._codec == "hevc" and self._layers > 1:
            return self._layer(memoryview(packet)) == self._layers - 1
        return self._codec == "h264" or self._layers == 1

    def needed(self, packet: Packet[VideoStream]) -> Packet[VideoStream] | None:
        """What of the packet has to be sent to the decoder, None for nothing; to be asked of all in order."""
        if self._codec != "av1":
            return packet
        data = memoryview(packet)
        if packet.is_keyframe:
            self._sequence = _av1_sequence(data) or self._sequence
        kept = _av1_kept(data, self._sequence) if self._sequence is not None else None
        if kept is None:
            return packet
        if not kept:
            return None
        rest = cast("Packet[VideoStream]", Packet(kept))
        rest.pts, rest.dts, rest.time_base = packet.pts, packet.dts, packet.time_base
        return rest

    def _layer(self, data: memoryview) -> int | None:
        """The temporal layer of the packet's picture; None if there is none."""
        place = self._length_bytes
        while place + 1 < len(data):
            if (data[place] >> 1) & 63 < _HEVC_FIRST_OTHER:
                return (data[place + 1] & 7) - 1
            place += int.from_bytes(data[place - self._length_bytes : place]) + self._length_bytes
        return None


def _hevc_layers(record: bytes) -> int:
    """Temporal layers that a configuration record (ISO/IEC 14496-15) names; 0 if it is not clear."""
    place, layers = 23, set()
    try:
        for _ in range(record[22]):
            kind, count = record[place] & 63, int.from_bytes(record[place + 1 : place + 3])
            place += 3
            for _ in range(count):
                if kind == _HEVC_SEQUENCE:
                    layers.add(((record[place + 4] >> 1) & 7) + 1)
                place += 2 + int.from_bytes(record[place : place + 2])
    except IndexError:
        return 0
    return layers.pop() if len(layers) == 1 else 0


class _Bits:
    """Bits of a unit, the highest of each byte first; past the end there are zeros."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._place = 0

    def take(self, count: int) -> int:
        """The next bits as a number."""
        first, self._place = self._place, self._place + count
        part = self._data[first >> 3 : (self._place + 7) >> 3]
        number = int.from_bytes(part) << 8 * (((self._place + 7) >> 3) - (first >> 3) - len(part))
        return (number >> (-self._place & 7)) & ((1 << count) - 1)


@dataclass(frozen=True, slots=True)
class _Av1Sequence:
    """What has to be known of a sequence to find, in a frame's header, where the frame is kept."""

    screen_tools: int
    whole_motion: int
    """Whether screen tools, and whole motion with them, are 0 off, 1 on, 2 said by each frame."""

    id_bits: int
    order_bits: int


def _units(data: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Kind, payload and whole of the units of an AV1 packet (AV1 specification, 5.3)."""
    place = 0
    while place < len(data):
        begin, head = place, data[place]
        place += 2 if head & 4 else 1
        size = 0
        if head & 2:
            for shift in range(0, 56, 7):
                byte = data[place]
                place += 1
                size |= (byte & 127) << shift
                if byte < 128:
                    break
        else:
            size = len(data) - place
        yield (head >> 3) & 15, data[place : place + size], data[begin : place + size]
        place += size


def _av1_sequence(data: memoryview) -> _Av1Sequence | None:
    """The parameters of a sequence (5.5), if the data hold them and they are of the usual kind."""
    try:
        header = next((payload for kind, payload, _ in _units(data) if kind == _AV1_SEQUENCE), None)
    except IndexError:
        return None
    if header is None:
        return None
    bits = _Bits(header)
    bits.take(3)  # profile
    still, reduced, timed, delayed, points = bits.take(1), bits.take(1), bits.take(1), bits.take(1), bits.take(5)
    layered = bits.take(12)
    if still or reduced or timed or points or layered:
        return None
    if bits.take(5) > 7:  # level
        bits.take(1)
    if delayed and bits.take(1):
        bits.take(4)
    width, height = bits.take(4) + 1, bits.take(4) + 1
    bits.take(width + height)
    id_bits = bits.take(4) + 2 + bits.take(3) + 1 if bits.take(1) else 0
    bits.take(7)  # tools for blocks
    ordered = bits.take(1)
    if ordered:
        bits.take(2)
    screen_tools = 2 if bits.take(1) else bits.take(1)
    whole_motion = 2
    if screen_tools and not bits.take(1):
        whole_motion = bits.take(1)
    return _Av1Sequence(screen_tools, whole_motion, id_bits, bits.take(3) + 1 if ordered else 0)


def _av1_kept(data: memoryview, sequence: _Av1Sequence) -> bytes | None:
    """The packet without frames that are kept in no slot, to which none can refer; None if there are no such frames."""
    try:
        units = list(_units(data))
    except IndexError:
        return None
    rest = [unit for unit in units if unit[0] != _AV1_FRAME or _av1_slots(unit[1], sequence)]
    if len(rest) == len(units):
        return None
    return b"".join(whole for _, _, whole in rest) if any(kind not in _AV1_REST for kind, _, _ in rest) else b""


def _av1_slots(frame: memoryview, sequence: _Av1Sequence) -> int:
    """The slots a frame is kept in, one bit each (``refresh_frame_flags``, 5.9.2); all where it is not said."""
    bits = _Bits(frame)
    if bits.take(1):  # shows one that is there
        return 255
    kind, shown = bits.take(2), bits.take(1)
    if kind == _AV1_SWITCH or (kind == _AV1_KEY and shown):
        return 255
    if not shown:
        bits.take(1)  # whether it can be shown later
    resilient = bits.take(1)
    bits.take(1)  # whether probabilities stay as they are
    screen = bits.take(1) if sequence.screen_tools == 2 else sequence.screen_tools
    if screen and sequence.whole_motion == 2:
        bits.take(1)
    bits.take(sequence.id_bits)
    bits.take(1)  # whether its size is its own
    bits.take(sequence.order_bits)
    if kind not in _AV1_INTRA and not resilient:
        bits.take(3)  # whose probabilities it begins with
    return bits.take(8)
