"""Which packets of a film hold the pictures on screen at given moments, told before anything is decoded."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from av.packet import Packet
from av.video.stream import VideoStream

from streamvid.ingest.disposable import gives_picture

_MOST_HELD_BACK = {"h264": 16, "hevc": 16}
"""Most pictures that a codec allows to be decoded before and shown after another one; none where it is not named."""


_MOST_WAITING_BYTES = 64 << 20
"""Packets that wait for the key frame that would make them useless."""

_MOST_TIMES = 4096
"""Times that are kept; of more, those long past are let go."""

_FEWEST_DROPPED = 4
"""Fewer packets are decoded even if nobody needs them: beginning anew costs threads their lead."""


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

    They wait until it is certain that no later key frame is shown by the next target: what lies
    before the last one need not be decoded.

    Packets come in the order they are decoded, and decoders hold back no more than 16 pictures to
    put them in order.  So once more than that are known to be shown later than a moment, none will
    come that is shown before it.  Nothing is made of dts: some files have wrong ones.

    Args:
        codec: as FFmpeg names it.
        targets: ticks, rising.
        leap: a distance of pictures, in ticks, that only reading in order can judge.
    """

    def __init__(self, codec: str, targets: list[int], leap: int) -> None:
        self.key: int | None = None
        """When the first packet's picture is shown; None before it came and if it is hidden."""

        self.expected: dict[int, Spot] = {}
        """Pictures that have been decided to be wanted, by pts; whoever meets one takes it out."""

        self._codec = codec
        self._held_back = _MOST_HELD_BACK.get(codec, 0)
        self._targets = list(targets)
        self._leap = leap
        self._times: list[int] = []
        self._pending: deque[tuple[Packet[VideoStream], int, bool]] = deque()
        self._keys: deque[tuple[Packet[VideoStream], int]] = deque()
        self._waiting_bytes = 0
        self._anew = False
        self._settled: int | None = None
        self._last = targets[-1]
        self._began = self._ended = self._found = False

    @property
    def left(self) -> int:
        """Targets whose picture is not known yet."""
        return len(self._targets)

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
        elif packet.is_keyframe and shown:
            self._keys.append((packet, pts))
        if shown and (self.key is None or pts >= self.key):
            place = bisect_left(self._times, pts)
            late = self._settled is not None and pts <= self._settled
            if late or self._times[place : place + 1] == [pts]:
                raise Distrust
            if len(self._times) - place > self._held_back or (place and pts - self._times[place - 1] > self._leap):
                raise Distrust
            self._times.insert(place, pts)
        else:
            shown = False
        self._pending.append((packet, pts, shown))
        self._waiting_bytes += packet.size

    def decided(self) -> Iterator[tuple[Packet[VideoStream] | None, Spot | None]]:
        """Packets in the order they are decoded, as soon as it is known what they are for; none after the last.

        None stands where decoding begins anew with a key frame, as nothing before it is wanted any more.
        """
        while self._pending and self._targets:
            self._anew = self._skipped_to_key() or self._anew
            if self._key_may_come():
                return
            if self._anew:
                yield None, None
                self.key, self._found, self._anew = self._pending[0][1], False, False
            packet, pts, shown = self._pending[0]
            spot = None
            if shown and pts <= self._last:
                place = bisect_right(self._times, pts)
                if len(self._times) - place <= self._held_back and not self._ended:
                    return
                spot = self._spot(pts, place)
            self._drop(1)
            if self._keys and self._keys[0][0] is packet:
                self._keys.popleft()
            yield packet, spot

    def found(self, pts: int) -> bool:
        """Whether a frame may come: the key frame has to be the first."""
        self._found = self._found or self.key is None or pts == self.key
        return self._found

    def _skipped_to_key(self) -> bool:
        """Drop what lies before the last key frame that is shown by the next target, if that saves enough."""
        while len(self._keys) > 1 and self._keys[1][1] <= self._targets[0]:
            self._keys.popleft()
        if not self._keys or self._keys[0][1] > self._targets[0]:
            return False
        before = next(n for n, (packet, _, _) in enumerate(self._pending) if packet is self._keys[0][0])
        if before < _FEWEST_DROPPED:
            return False
        self._drop(before)
        return True

    def _drop(self, count: int) -> None:
        """Packets that need not be remembered any more, and times long before those that stay."""
        for _ in range(count):
            packet, pts, _ = self._pending.popleft()
            self._waiting_bytes -= packet.size
        if count and len(self._times) > _MOST_TIMES:
            del self._times[: max(0, bisect_left(self._times, pts) - _MOST_TIMES // 2)]

    def _key_may_come(self) -> bool:
        """Whether a key frame that is shown by the next target may still come."""
        if self._ended or self._waiting_bytes > _MOST_WAITING_BYTES:
            return False
        return len(self._times) - bisect_right(self._times, self._targets[0]) <= self._held_back

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
        del self._targets[first:after]
        self.expected[pts] = spot = Spot(pts, gone, after - first)
        return spot
