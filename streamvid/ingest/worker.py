"""The process that decodes: asked through a pipe, it may crash or hang without hurting anybody.

Started as ``python -m streamvid.ingest.worker``.  Requests come in on standard input, replies
leave on standard output, each a pickle behind its length; pictures travel through a file both
sides have mapped.  It ends when standard input ends, so it never outlives who started it.
"""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import numpy as np

from streamvid.errors import StreamvidError
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.pulse import PULSE
from streamvid.ingest.reader import Readable
from streamvid.ingest.sampling import Plan, SamplingReport

BEAT_SECONDS = 0.25
"""How often a busy worker says that it is getting on, if it is."""

_KEPT_READERS = 4
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Open:
    """Make a reader and keep it as ``token``; answered by its info and its pickled state, None if it has none."""

    token: int
    make: Callable[[], Readable]


@dataclass(frozen=True, slots=True)
class Call:
    """Answered by ``function(reader, *arguments)``."""

    token: int
    state: bytes | None
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """Answered by one ``Picked`` for each picture of the plan and an ``Ended``."""

    token: int
    state: bytes | None
    plan: Plan
    size: tuple[int, int] | None
    ring: str | None
    """File to map for pictures; None for the one that is mapped."""

    slots: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Freed:
    """A slot of the ring may be written again."""

    slot: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants the rest of the running sample."""


@dataclass(frozen=True, slots=True)
class Forget:
    """A reader is not needed any more."""

    token: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """The memory for pictures is not needed any more; never sent while a request runs."""


@dataclass(frozen=True, slots=True)
class Alive:
    """It is getting on."""


@dataclass(frozen=True, slots=True)
class Picked:
    """A sampled picture: in a slot of the ring, or here if it does not fit into one."""

    slot: int
    shape: tuple[int, ...]
    pixels: bytes | None
    pts: Fraction
    duration: Fraction
    stats: DecodeStats
    report: SamplingReport


@dataclass(frozen=True, slots=True)
class Ended:
    """The request is done; ``value`` is what was asked for."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed: a message for the user, or the traceback of a mistake of ours."""

    error: type[StreamvidError] | None
    message: str


def send(pipe: IO[bytes], message: object) -> None:
    """Write one message."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Read one message; raises EOFError when the other side is gone."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


class Worker:
    """One request at a time; freed slots and cancellations come in while it runs."""

    def __init__(self, requests: IO[bytes], replies: IO[bytes]) -> None:
        self._requests, self._replies = requests, replies
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[Open | Call | Sample] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._readers: OrderedDict[int, Readable] = OrderedDict()
        self._busy = threading.Event()
        self._ring: mmap.mmap | None = None

    def run(self) -> None:
        """Serve until standard input ends."""
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        while True:
            job = self._jobs.get()
            self._busy.set()
            try:
                reply: object = Ended(self._do(job))
            except StreamvidError as reason:
                reply = Failed(type(reason), str(reason))
            except BaseException:  # whatever it was, the other side must hear of it
                reply = Failed(None, traceback.format_exc())
            self._busy.clear()
            self._send(reply)

    def _send(self, message: object) -> None:
        try:
            with self._sending:
                send(self._replies, message)
        except OSError:
            os._exit(0)

    def _listen(self) -> None:
        while True:
            try:
                message = receive(self._requests)
            except (EOFError, OSError):
                os._exit(0)
            if isinstance(message, Freed):
                self._free.put(message.slot)
            elif isinstance(message, Cancel):
                self._cancelled.set()
                self._free.put(None)
            elif isinstance(message, Forget):
                reader = self._readers.pop(message.token, None)
                if reader is not None:
                    reader.close()
            elif isinstance(message, Unmap):
                self._map(None)
            else:
                self._cancelled.clear()
                self._free = queue.SimpleQueue()
                self._jobs.put(message)

    def _beat(self) -> None:
        before = PULSE.beats
        while True:
            threading.Event().wait(BEAT_SECONDS)
            now = PULSE.beats
            if now != before and self._busy.is_set():
                self._send(Alive())
            before = now

    def _do(self, job: Open | Call | Sample) -> Any:
        if isinstance(job, Open):
            reader = job.make()
            self._keep(job.token, reader)
            return reader.info, reader.state()
        reader = self._reader(job.token, job.state)
        if isinstance(job, Call):
            return job.function(reader, *job.arguments)
        return self._sample(reader, job)

    def _reader(self, token: int, state: bytes | None) -> Readable:
        if token not in self._readers:
            if state is None:
                raise RuntimeError("asked for a reader that this process does not have")
            self._keep(token, pickle.loads(state))
        return self._readers[token]

    def _keep(self, token: int, reader: Readable) -> None:
        self._readers[token] = reader
        while len(self._readers) > _KEPT_READERS:
            self._readers.popitem(last=False)[1].close()

    def _sample(self, reader: Readable, job: Sample) -> tuple[DecodeStats, SamplingReport]:
        if job.ring is not None:
            self._map(job.ring)
        assert self._ring is not None
        free = self._free
        for number in range(job.slots):
            free.put(number)
        shots = reader.sample(job.plan, size=job.size)
        try:
            while not self._cancelled.is_set():
                shot = next(shots, None)
                if shot is None:
                    break
                pixels = np.ascontiguousarray(shot.pixels)
                slot = free.get()
                if slot is None:  # cancelled
                    break
                inline = None
                if pixels.nbytes <= job.slot_bytes:
                    begin = slot * job.slot_bytes
                    room = np.frombuffer(self._ring, dtype=np.uint8, count=pixels.nbytes, offset=begin)
                    room[:] = pixels.reshape(-1)
                    del room
                else:
                    inline = pixels.tobytes()
                self._send(Picked(slot, pixels.shape, inline, shot.pts, shot.duration, shots.stats, shots.report))
        finally:
            shots.close()
        return shots.stats, shots.report

    def _map(self, path: str | None) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if path is not None:
            with open(path, "r+b") as file:
                self._ring = mmap.mmap(file.fileno(), 0)


def main() -> None:
    """Talk on what standard output was; whatever prints from now on goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    Worker(sys.stdin.buffer, replies).run()


if __name__ == "__main__":
    # Under the name others import it by: what is pickled here must be known there.
    from streamvid.ingest.worker import main as run

    run()
