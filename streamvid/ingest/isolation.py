"""Reading in another process: a crash or a hang of a decoder costs one file, not the program."""

from __future__ import annotations

import atexit
import itertools
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

import streamvid
from streamvid.errors import SourceError
from streamvid.ingest.buffer import Ahead, Buffer, Closed
from streamvid.ingest.pictures import DecodeStats
from streamvid.ingest.reader import Readable, Shots, SourceInfo
from streamvid.ingest.sampling import Plan, Sampling, SamplingReport, Shot
from streamvid.ingest.worker import (
    Alive,
    Call,
    Cancel,
    Ended,
    Failed,
    Forget,
    Freed,
    Open,
    Picked,
    Sample,
    Unmap,
    receive,
    send,
)

_IDLE_KEPT = 2
_RESTING_BYTES = 64 << 20
"""Shared memory that a worker at rest keeps for its next request: touching it anew takes as long as decoding."""

_CANCEL_SECONDS = 1.0
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""glibc gives the memory of each picture back and takes it anew; keeping some saves a tenth of the time."""

_tokens = itertools.count(1)
_leash: ContextVar[Leash | None] = ContextVar("leash", default=None)


class Gone(Exception):
    """The worker ended in the middle of a request."""


class Ring:
    """Memory that another process can map by its path; really there, not only promised.

    Args:
        size: bytes.

    Raises:
        SourceError: if there is no room for it.
    """

    def __init__(self, size: int) -> None:
        places = [place for place in ("/dev/shm",) if os.access(place, os.W_OK)] + [tempfile.gettempdir()]
        for place in places:
            handle, path = tempfile.mkstemp(prefix="streamvid-", dir=place)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, size)
                else:
                    os.truncate(handle, size)
                self.memory = mmap.mmap(handle, size)
                self.path: str | None = path
                """Where the other process finds it; None once it has."""

                return
            except OSError:
                os.unlink(path)
            finally:
                os.close(handle)
        raise SourceError(
            f"there is no room for {size >> 20} MiB of pictures in {' or '.join(places)}; free some space there"
        )

    def mapped(self) -> None:
        """The other side has it: its name goes, the memory stays until both let go."""
        if self.path is not None:
            with suppress(OSError):
                os.unlink(self.path)
            self.path = None

    def close(self) -> None:
        """Let go of it."""
        self.mapped()
        self.memory.close()


class Process:
    """A worker from the outside; a thread of its own takes its replies as they come."""

    def __init__(self) -> None:
        home = str(Path(streamvid.__file__).parents[1])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.knows: set[int] = set()
        """Tokens of readers it has."""

        self.answered = time.monotonic()
        """When it was last heard of."""

        self._process = subprocess.Popen(
            [sys.executable, "-m", "streamvid.ingest.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("STREAMVID_DEBUG") else subprocess.DEVNULL,
            env={**_MALLOC, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._ring: Ring | None = None
        self._sending = threading.Lock()
        self._handing = threading.Lock()
        self._replies: Buffer[Any] | None = None
        self._gone = False
        self._idle = threading.Event()
        self._idle.set()
        self._listener = threading.Thread(target=self._listen, name="streamvid-listen", daemon=True)
        self._listener.start()

    @property
    def alive(self) -> bool:
        """Whether it runs and answers.

        A process that ends lets go of its pipes first and may be there for a while after that.
        """
        return not self._gone and self._process.poll() is None

    @property
    def idle(self) -> bool:
        """Whether it waits for a request."""
        return self._idle.is_set() and self.alive

    def ring(self, size: int) -> Ring:
        """Memory that it shares, at least so large; that of the request before if it will do."""
        if self._ring is None or len(self._ring.memory) < size:
            self._drop_ring()
            self._ring = Ring(size)
        return self._ring

    def rest(self) -> None:
        """Nothing is asked of it for a while: it keeps little."""
        if self._ring is not None and (self._ring.path is not None or len(self._ring.memory) > _RESTING_BYTES):
            self._drop_ring()

    def _drop_ring(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
            self.tell(Unmap())

    def request(self, message: Open | Call | Sample, replies: Buffer[Any]) -> None:
        """Ask; replies go to the buffer, which is finished with the last one, or at once if nobody is there to ask."""
        with self._handing:
            if self._gone:
                replies.finish(failure=Gone())
                return
            self._replies = replies
            self._idle.clear()
        self.answered = time.monotonic()
        self.tell(message)

    def tell(self, message: object) -> None:
        """Send without expecting an answer; nothing happens if it is gone."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError, ValueError), self._sending:
            send(pipe, message)

    def wait_idle(self, seconds: float) -> bool:
        """Whether it came to rest in this time."""
        return self._idle.wait(seconds) and self.alive

    def kill(self) -> None:
        """Stop it at once; who waits for it learns that it is gone."""
        with suppress(OSError):
            self._process.kill()

    def end(self) -> str:
        """Stop it at once; returns what became of it."""
        self.kill()
        code = self._process.wait()
        self._drop_ring()
        if threading.current_thread() is not self._listener:
            # A thread that is left when the program ends may take it down.
            self._listener.join(1.0)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        if code < 0:
            with suppress(ValueError):
                return signal.Signals(-code).name
        return f"exit code {code}"

    def _listen(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        while True:
            try:
                message = receive(pipe)
            except Exception:  # a broken message means the same as none: it is no use any more
                message = None
            self.answered = time.monotonic()
            replies = self._replies
            if message is None or isinstance(message, (Ended, Failed)):
                with self._handing:
                    replies, self._replies = self._replies, None
                    self._gone = message is None
                self._idle.set()
                if replies is not None:
                    replies.finish(message, Gone() if message is None else None)
                if message is None:
                    return
            elif replies is not None and not isinstance(message, Alive):
                with suppress(Closed):
                    replies.put(message)


class Leash:
    """Holds the workers that its thread asks, so that another thread can end whatever they do; a context manager."""

    def __init__(self) -> None:
        self._held: weakref.WeakSet[Process] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._cut = False

    def __enter__(self) -> Self:
        self._before = _leash.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _leash.reset(self._before)

    def hold(self, process: Process) -> None:
        """A worker was leased under it."""
        with self._lock:
            self._held.add(process)
            if self._cut:
                process.kill()

    def release(self, process: Process) -> None:
        """The worker serves others now."""
        with self._lock:
            self._held.discard(process)

    def cut(self) -> None:
        """End the workers that are held, and all that will be."""
        with self._lock:
            self._cut = True
            for process in self._held:
                process.kill()


class Pool:
    """Workers at rest, ready for the next request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._resting: list[Process] = []
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def lease(self, token: int | None = None) -> Process:
        """A worker for one request; the one that knows the reader if it is at rest."""
        process = self._leased(token)
        if (leash := _leash.get()) is not None:
            leash.hold(process)
        return process

    def _leased(self, token: int | None) -> Process:
        with self._lock:
            for process in [process for process in self._resting if not process.alive]:
                self._resting.remove(process)
                process.end()
            best = [process for process in self._resting if token in process.knows] or self._resting[-1:]
            if best:
                self._resting.remove(best[0])
                return best[0]
        try:
            return Process()
        except OSError as reason:
            raise SourceError(f"no process for decoding can be started: {reason.strerror or reason}") from None

    def give_back(self, process: Process) -> None:
        """Let a worker rest, or end it if it does not or if there are enough."""
        if (leash := _leash.get()) is not None:
            leash.release(process)
        if process.idle:
            with self._lock:
                if len(self._resting) < _IDLE_KEPT:
                    process.rest()
                    self._resting.append(process)
                    return
        process.end()

    def forget(self, token: int) -> None:
        """No worker needs this reader any more."""
        with self._lock:
            for process in self._resting:
                if token in process.knows:
                    process.knows.discard(token)
                    process.tell(Forget(token))

    def close(self) -> None:
        """End all that rest."""
        with self._lock:
            resting, self._resting = self._resting, []
        for process in resting:
            process.end()

    def _forget(self) -> None:
        self._lock, self._resting = threading.Lock(), []


POOL = Pool()


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a source may make no progress, and what it is called when it does not."""

    name: str
    seconds: float

    def next(self, process: Process, replies: Buffer[Any], at: Fraction | None = None) -> Any:
        """The next reply; StopIteration at the end.

        Raises:
            SourceError: if the worker reports one, stands still or ends.
        """
        waited, answered = 0.0, process.answered
        while True:
            # In slices, so that a program that was stopped and goes on has not waited.
            slice_seconds = min(0.5, self.seconds)
            try:
                reply = replies.get(timeout=slice_seconds)
            except TimeoutError:
                waited = waited + slice_seconds if process.answered == answered else 0.0
                answered = process.answered
                if waited < self.seconds:
                    continue
                process.end()
                raise SourceError(
                    f"{self.name} made no progress for {self.seconds:g} s{_place(at)} and was given up; the file is "
                    "damaged or the connection stands still (a longer wait: --stall-seconds)"
                ) from None
            except Gone:
                how = process.end()
                raise SourceError(
                    f"{self.name} made the decoder crash ({how}){_place(at)}; the file is damaged: "
                    "convert it with another program first"
                ) from None
            if isinstance(reply, Failed):
                if reply.error is not None:
                    raise reply.error(reply.message)
                last = reply.message.strip().splitlines()[-1]
                failure = SourceError(f"{self.name} made the decoder fail{_place(at)}: {last}")
                failure.add_note(reply.message)
                raise failure
            return reply


def _place(at: Fraction | None) -> str:
    return f" after {float(at):.3f} s" if at is not None else ""


class RemoteReader:
    """A reader in another process, asked like one here.

    Args:
        make: makes the reader there; must be picklable.
        name: what to call the source in messages.
        stall_seconds: longest time without any progress, > 0; longer suits slow disks and lines.
        ahead: how far decoding may run ahead.
    """

    def __init__(
        self, make: Callable[[], Readable], *, name: str, stall_seconds: float = 30.0, ahead: Ahead | None = None
    ) -> None:
        self._token = next(_tokens)
        self._ahead = ahead if ahead is not None else Ahead()
        self._patience = Patience(name, stall_seconds)
        self._state: bytes | None = None
        self._own: Process | None = None
        self._passes: weakref.WeakSet[RemoteShots] = weakref.WeakSet()
        process = POOL.lease()
        done = False
        try:
            self.info: SourceInfo
            self.info, self._state = self._ask(process, Open(self._token, make))
            process.knows.add(self._token)
            done = True
        finally:
            # What cannot be taken along, a camera say, stays with the process that opened it.
            if done and self._state is None:
                self._own = process
            else:
                POOL.give_back(process)

    def close(self) -> None:
        """End the passes that still run and let go of what the other process holds."""
        for shots in list(self._passes):
            shots.close()
        if self._own is not None:
            self._own.end()
            self._own = None
        POOL.forget(self._token)

    @property
    def end(self) -> Fraction:
        """When the last picture is gone, in container seconds."""
        if self.info.duration is not None:
            return self.info.start + self.info.duration
        end: Fraction = self.call(_end)
        return end

    def plan(self, sampling: Sampling) -> Plan:
        """The sampling made exact for this source."""
        plan: Plan = self.call(_plan, sampling)
        return plan

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """How many pictures appear in ``[start, stop)``."""
        count: int = self.call(_count, start, stop)
        return count

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(reader, *arguments)`` over there; all of it must be picklable."""
        process = self._lease()
        try:
            return self._ask(process, Call(self._token, self._shipped(process), function, arguments))
        finally:
            self._release(process)

    def sample(self, plan: Plan, *, size: tuple[int, int] | None = None) -> Shots:
        """The pictures of a plan, decoded ahead of whoever takes them."""
        height, width = size if size is not None else (self.info.height, self.info.width)
        process = self._lease()
        try:
            shots = RemoteShots(
                process, self._token, self._shipped(process), plan, size, height * width * 3, self._ahead,
                self._patience, self._release,
            )  # fmt: skip
        except BaseException:
            self._release(process)
            raise
        self._passes.add(shots)
        return shots

    def state(self) -> bytes | None:
        """The reader, to be made again elsewhere; None if it cannot be."""
        return self._state

    def _lease(self) -> Process:
        return self._own if self._own is not None else POOL.lease(self._token)

    def _release(self, process: Process) -> None:
        if process is not self._own:
            POOL.give_back(process)

    def _shipped(self, process: Process) -> bytes | None:
        if self._token in process.knows:
            return None
        process.knows.add(self._token)
        return self._state

    def _ask(self, process: Process, message: Open | Call) -> Any:
        replies: Buffer[Any] = Buffer(4)
        process.request(message, replies)
        return self._patience.next(process, replies).value


def _end(reader: Readable) -> Fraction:
    return reader.end


def _plan(reader: Readable, sampling: Sampling) -> Plan:
    return reader.plan(sampling)


def _count(reader: Readable, start: Fraction, stop: Fraction) -> int:
    return reader.count_pictures(start, stop)


def _drop(process: Process, reply: Any) -> None:
    """Free the slot of a picture nobody takes."""
    if isinstance(reply, Picked):
        process.tell(Freed(reply.slot))


class RemoteShots:
    """Sampled pictures that come from another process through a ring of slots in shared memory."""

    def __init__(
        self,
        process: Process,
        token: int,
        state: bytes | None,
        plan: Plan,
        size: tuple[int, int] | None,
        frame_bytes: int,
        ahead: Ahead,
        patience: Patience,
        release: Callable[[Process], None],
    ) -> None:
        self._process, self._patience, self._release = process, patience, release
        self._stats, self._report = (
            DecodeStats(),
            SamplingReport(0, None, None, plan.fps, Fraction(0), plan.notes, plan.mode),
        )
        self._at: Fraction | None = None
        capacity = ahead.capacity(frame_bytes)
        # One more slot than the buffer holds: the picture that is being written.
        slots = capacity + 1
        self._slot_bytes = max(1, frame_bytes)
        self._ring = process.ring(slots * self._slot_bytes)
        self._replies: Buffer[Any] = Buffer(capacity, ahead.policy, partial(_drop, process))
        self._open = True
        process.request(Sample(token, state, plan, size, self._ring.path, slots, self._slot_bytes), self._replies)

    @property
    def stats(self) -> DecodeStats:
        """What happened while decoding the pictures taken so far."""
        self._stats.dropped = self._replies.dropped
        return self._stats

    @property
    def report(self) -> SamplingReport:
        """What was looked at for the pictures taken so far."""
        return self._report

    def __iter__(self) -> RemoteShots:
        return self

    def __next__(self) -> Shot:
        if not self._open:
            raise StopIteration
        try:
            reply = self._patience.next(self._process, self._replies, self._at)
        except BaseException:
            self.close()
            raise
        self._ring.mapped()
        if isinstance(reply, Ended):
            self._stats, self._report = reply.value
            self.close()
            raise StopIteration
        assert isinstance(reply, Picked)
        count = int(np.prod(reply.shape))
        if reply.pixels is None:
            room = np.frombuffer(self._ring.memory, dtype=np.uint8, count=count, offset=reply.slot * self._slot_bytes)
            pixels = room.copy().reshape(reply.shape)
            del room
        else:
            pixels = np.frombuffer(bytearray(reply.pixels), dtype=np.uint8).reshape(reply.shape)
        self._process.tell(Freed(reply.slot))
        self._stats, self._report, self._at = reply.stats, reply.report, reply.pts
        return Shot(pixels, reply.pts, reply.duration)

    def close(self) -> None:
        """Want no more: the worker stops at its next picture, or is stopped."""
        if not self._open:
            return
        self._open = False
        self._replies.close()
        if not self._process.idle:
            self._process.tell(Cancel())
            if not self._process.wait_idle(_CANCEL_SECONDS):
                self._process.end()
        self._release(self._process)

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()
