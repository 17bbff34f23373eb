"""Two network namespaces and a wire between them that loses and delays packets; says why where it cannot be laid.

The wire is this program: the ends are tun devices, so no module of the kernel is needed for the loss.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import pytest

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


@dataclass
class Wire:
    """What goes from one end to the other.

    Args:
        loss: share of packets that is lost each way, in [0, 1]; may be changed at any time.
        delay: seconds each packet takes.
    """

    loss: float
    delay: float
    ends: tuple[int, int] = (0, 0)
    near: str = ""
    """Namespace of 10.99.0.1."""

    far: str = ""
    """Namespace of 10.99.0.2."""

    carried: int = 0
    lost: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Carry packets until told to stop."""
        chance, waiting = random.Random(1), list[tuple[float, int, int, bytes]]()
        while not self.over.is_set():
            patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            for end in select.select(self.ends, (), (), min(patience, 0.1))[0]:
                packet = os.read(end, 1 << 16)
                self.carried += 1
                if chance.random() < self.loss:
                    self.lost += 1
                    continue
                other = self.ends[1] if end == self.ends[0] else self.ends[0]
                heapq.heappush(waiting, (time.monotonic() + self.delay, self.carried, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(waiting)
                with suppress(OSError):
                    os.write(end, packet)


@contextmanager
def wire(loss: float, delay: float) -> Iterator[Wire]:
    """A wire for as long as the block runs; skips the test where it may not be laid."""
    with ExitStack() as stack:
        laid = Wire(loss, delay, near=f"svnear{os.getpid()}", far=f"svfar{os.getpid()}")
        try:
            laid.ends = (
                _end(stack, laid.near, "10.99.0.1", "10.99.0.2"),
                _end(stack, laid.far, "10.99.0.2", "10.99.0.1"),
            )
        except (OSError, subprocess.CalledProcessError) as reason:
            pytest.skip(f"network namespaces and tun devices are not permitted here: {reason}")
        thread = threading.Thread(target=laid.run, daemon=True)
        thread.start()
        try:
            yield laid
        finally:
            laid.over.set()
            thread.join()


def _end(stack: ExitStack, space: str, own: str, other: str) -> int:
    _ip("netns", "add", space)
    stack.callback(subprocess.run, ["ip", "netns", "del", space], capture_output=True)
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, handle)
    name = f"sv{own[-1]}x{os.getpid()}"[:15]
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", name, "netns", space)
    _ip("-n", space, "addr", "add", own, "peer", other, "dev", name)
    for device in (name, "lo"):
        _ip("-n", space, "link", "set", device, "up")
    return handle


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
