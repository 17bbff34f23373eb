"""Watching live sources: one thread owns the model and the memory, each source is read by a thread of its own.

::

    camera -- Feed --+
    camera -- Feed --+--> the engine's thread: watch a clip of each in turn, answer, note gaps, keep limits
    camera -- Feed --+           ^
                                 | questions, from any thread

A question goes before the next clip.  What was read until then is watched first, so that "now" means now.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from typing import Any

import torch

from streamvid.errors import BankError, SettingsError, SourceError, StreamvidError, near
from streamvid.frames import Clip, Frame
from streamvid.ingest.ring import RecordTo, recording_folder
from streamvid.ingest.sampling import exact
from streamvid.ingest.supervised import Gap, Notice, Supervised
from streamvid.memory.bank import Bank
from streamvid.memory.keys import MemoryKey
from streamvid.memory.records import SourceRecord, State
from streamvid.memory.tidy import tidy
from streamvid.memory.writer import Writer
from streamvid.receipt import Receipt
from streamvid.session import Answer, Session, Watched
from streamvid.temporal.methods.compose import Chain
from streamvid_pipelines.ask import Loaded
from streamvid_pipelines.live.feed import Feed
from streamvid_pipelines.live.settings import CameraRequest, LiveRequest

IDLE_SECONDS = 0.2
"""The engine looks around so often when nobody wakes it."""

TIDY_SECONDS = 60.0
"""Time between two looks at the memory's limits."""

NOTE_SECONDS = 5.0
"""A gap that lasts is noted so often: a process that is killed has it on record."""

STAYED_AWAY = "nobody watched: streamvid was not running"


@dataclass(slots=True)
class Asked:
    """A question and where its answer goes."""

    stream: str
    question: str
    max_new_tokens: int
    on_text: Callable[[str], None] | None
    answer: Future[Answer] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Said:
    """Something that happened to a stream, for people: one line."""

    stream: str
    kind: str
    text: str
    at: datetime


class Camera:
    """One stream: its feed, its session, its place in the memory.  Used by the engine's thread alone."""

    def __init__(
        self, request: CameraRequest, live: LiveRequest, loaded: Loaded, bank: Bank, wake: Callable[[], None]
    ) -> None:
        self.request, self.bank = request, bank
        adapter = loaded.adapter.stream()
        self.session = Session(
            adapter,
            bank,
            chain=Chain.parse(live.reduce),
            embedder=loaded.embedder,
            recall=live.recall_method(),
            limits=live.limits(),
        )
        self.fps = exact(live.fps if live.fps is not None else adapter.info.default_fps)
        self.key = MemoryKey(
            content=f"live:{request.name}",
            sampling={"fps": str(self.fps), "frames": live.clip_frames, "span_frames": self.session.span_frames},
            model=f"{adapter.info.fingerprint}/{adapter.info.dtype}",
            processor=adapter.info.processor_fingerprint,
            methods=self.session.chain.describe(ingest_only=True),
            embedder=loaded.embedder.fingerprint if loaded.embedder is not None else "none",
        )
        found = bank.find(self.key)
        if found is not None and found.state is State.COMPLETE:
            raise BankError(f"{request.name} is remembered as finished; choose another name for what is watched now")
        before = found.summary if found is not None else {}
        told = before.get("origin")
        self.events = Supervised(
            request.source,
            sampling=self.fps,
            patience=request.patience,
            origin=datetime.fromisoformat(told) if told is not None else None,
            decoder=live.decoder,
            threads=live.decode_threads,
            hwaccel=live.hwaccel,
            loop=request.loop,
            record=RecordTo(
                recording_folder(live.folder, request.name),
                keep_seconds=live.record_keep_seconds,
                keep_bytes=live.record_bytes,
            )
            if request.record
            else None,
        )
        self.feed = Feed(
            self.events, fps=self.fps, overload=live.overload, frames=live.buffer_frames,
            megabytes=live.buffer_megabytes, wake=wake,
        )  # fmt: skip
        self.receipt = Receipt(source=request.name)
        self.receipt.frames_sampled = before.get("frames_remembered", 0)
        self.receipt.tokens_seen = self._seen_before = before.get("tokens_seen", 0)
        self.watched_until: Fraction | None = None
        """Stream seconds up to which everything that came was watched."""

        self.served = 0
        """When it last had its turn."""

        self.gaps = 0
        self.away: str | None = None
        """Why there is no picture now; None while there is one."""

        self.watch_seconds = 0.0
        """Spent on watching."""

        self._live = live
        self._writer: Writer | None = None
        self._shift = Fraction(0)
        self._started = False
        self._noted = 0.0
        self._open: Gap | None = None

    def open(self, stack: ExitStack) -> None:
        """Take the memory for writing and begin to read."""
        writer = stack.enter_context(
            self.bank.writer(self.key, path=self.events.name, name=self.request.name)
        )  # fmt: skip
        self._writer = writer
        info = self.session.adapter.info
        writer.describe({"origin": self.events.origin.isoformat(), "live": True, "model": info.name})
        self.watched_until = writer.stop
        stack.callback(self.events.join, 10.0)
        stack.callback(self.feed.join, 10.0)
        stack.callback(self.feed.close)
        self.feed.start()

    @property
    def source(self) -> SourceRecord:
        """What is remembered of it."""
        found = self.bank.find(self.key)
        assert found is not None
        return found

    @property
    def now(self) -> Fraction:
        """The present, in stream seconds."""
        gap, seen = self.events.open_gap, self.feed.latest
        known = [Fraction(0)]
        if gap is not None:
            known.append(gap.stop)
        if seen is not None:
            known.append(seen + self._shift)
        if self.watched_until is not None:
            known.append(self.watched_until)
        return max(known)

    def wall(self, at: Fraction) -> datetime:
        """The clock at some stream seconds."""
        return self.events.wall(at - self._shift)

    @property
    def lag_seconds(self) -> float:
        """How far what was watched lies behind what came."""
        if self.feed.latest is None or not self.feed.waiting:
            return 0.0
        return max(0.0, float(self.feed.latest + self._shift - (self.watched_until or self.feed.latest)))

    def ready(self) -> bool:
        """Whether there is something worth doing: a whole clip, something said, or frames that waited long."""
        if self.feed.waiting >= self._live.clip_frames or self.feed.spoken:
            return True
        oldest, latest = self.feed.oldest, self.feed.latest
        if oldest is None or latest is None:
            return False
        return self.feed.ended or latest - oldest >= self._live.clip_frames / self.fps

    def work(self, say: Callable[[Said], None], on_watched: Callable[[Camera, Clip, Watched], None]) -> bool:
        """Watch the next clip, or take note of what was said before it; False if there is nothing."""
        frames, said, following = self.feed.take(self._live.clip_frames)
        for item in said:
            if isinstance(item, Gap):
                self._gap(item)
            else:
                self.away = item.text if item.kind in ("lost", "retry") else None
                say(Said(self.request.name, item.kind, item.text, self.events.wall(item.at)))
        if not frames:
            return bool(said)
        clip = self._clip(frames)
        if following is not None:
            following += self._shift
        if not self._started:
            self._begin(clip)
        nominal = self.feed.stride / self.fps
        interval = nominal if following is None else min(nominal, following - clip.pts[-1])
        began = time.perf_counter()
        assert self._writer is not None
        watched = self.session.watch(clip, self._writer, self.receipt, interval=max(interval, Fraction(1, 1000)))
        self.watch_seconds += time.perf_counter() - began
        self.watched_until = watched.times[-1][1]
        self.away = None
        on_watched(self, clip, watched)
        return True

    def flush(self, say: Callable[[Said], None], on_watched: Callable[[Camera, Clip, Watched], None]) -> None:
        """Watch everything that came so far."""
        for _ in range(2 * self._live.buffer_frames):  # what comes meanwhile is for later
            if not self.work(say, on_watched):
                return

    def note_gap(self, *, sure: bool = False) -> None:
        """Put a gap that lasts on record, now and then."""
        gap = self.events.open_gap
        if gap is None or gap.start >= gap.stop or self._writer is None:
            return
        if sure or time.monotonic() - self._noted >= NOTE_SECONDS:
            self._noted = time.monotonic()
            self._writer.gap(gap.start, gap.stop, gap.reason)

    def describe(self) -> None:
        """Put what is known about the watching into the memory."""
        if self._writer is not None:
            self._writer.describe(
                {
                    "origin": self.events.origin.isoformat(),
                    "live": True,
                    "watched_until": float(self.watched_until or 0),
                    "frames_remembered": self.receipt.frames_sampled,
                    "tokens_seen": self.receipt.tokens_seen,
                    "accuracy_seconds": self.events.accuracy_seconds,
                }
            )

    def status(self) -> dict[str, Any]:
        """Numbers of the moment."""
        counts, feed = self.feed.counts, self.feed
        remembered = self.receipt.tokens_remembered
        return {
            "stream": self.request.name,
            "now": self.events.wall(self.now).isoformat(timespec="seconds"),
            "lag_seconds": round(self.lag_seconds, 3),
            "away": self.away,
            "frames_read": counts.frames,
            "frames_watched": counts.taken,
            "frames_thinned": counts.thinned,
            "frames_dropped": counts.dropped + getattr(self.events, "dropped", 0),
            "frames_waiting": feed.waiting,
            "fps_wanted": float(self.fps),
            "fps_now": float(self.fps / feed.stride),
            "tokens_seen": self.receipt.tokens_seen,
            "tokens_remembered": remembered,
            "tokens_per_second": round(self.receipt.tokens_seen / self.watch_seconds, 1) if self.watch_seconds else 0.0,
            "connects": self.events.connects,
            "losses": self.events.losses,
            "gaps": self.gaps,
            "frozen": self.events.frozen,
            "black": self.events.black,
            "accuracy_seconds": round(self.events.accuracy_seconds, 3),
            "ended": feed.ended,
            "failure": str(feed.failure) if feed.failure is not None else None,
        }

    def _clip(self, frames: Sequence[Frame]) -> Clip:
        """The frames on the clock of the memory: a file that stands in for a camera begins where it ended before."""
        if not self._started:
            first, until = frames[0].pts, self.watched_until
            if until is not None and first < until:
                self._shift = until - first
        if not self._shift:
            return Clip.of(frames)
        return Clip.of([Frame(f.pixels, f.pts + self._shift, f.duration) for f in frames])

    def _begin(self, clip: Clip) -> None:
        height, width = clip.pixels.shape[1:3]
        self.session.start(height=int(height), width=int(width), num_frames=self._live.detail_frames)
        if self.watched_until is not None and clip.pts[0] - self.watched_until > 2 / self.fps:
            self._gap(Gap(self.watched_until, clip.pts[0], STAYED_AWAY))
        self._started = True

    def _gap(self, gap: Gap) -> None:
        self.gaps += 1
        if self._writer is not None and gap.start < gap.stop:
            self._writer.gap(gap.start + self._shift, gap.stop + self._shift, gap.reason)


class Live:
    """Watches cameras until it is told to stop; a context manager, whose thread owns model and memory.

    Args:
        cameras: what is watched; names are unique.
        request: what holds for all of them.
        loaded: the model they share.
        say: told, on the engine's thread, what happens to streams.
        on_watched: called on the engine's thread after each clip.
        on_idle: called there for each stream between clips, again while it returns True and nobody asks.
        on_leave: called there for each stream once everything that came is watched and nothing more comes.

    Raises:
        SettingsError: if names are not unique or settings make no sense.
    """

    def __init__(
        self,
        cameras: Sequence[CameraRequest],
        request: LiveRequest,
        loaded: Loaded,
        *,
        say: Callable[[Said], None] = lambda said: None,
        on_watched: Callable[[Camera, Clip, Watched], None] = lambda camera, clip, watched: None,
        on_idle: Callable[[Camera], bool] = lambda camera: False,
        on_leave: Callable[[Camera], None] = lambda camera: None,
    ) -> None:
        names = [camera.name for camera in cameras]
        if not names:
            raise SettingsError("there is nothing to watch; name a camera, as in: streamvid live rtsp://...")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingsError(f"two streams are called {twice[0]!r}; name them apart, as in front=rtsp://...")
        self.requests, self.request, self.loaded = list(cameras), request, loaded
        self.cameras: list[Camera] = []
        self.failure: BaseException | None = None
        self.began = time.monotonic()
        self._say, self._on_watched, self._on_idle, self._on_leave = say, on_watched, on_idle, on_leave
        self._questions: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._waked = threading.Event()
        self._stopping = threading.Event()
        self._opened = threading.Event()
        self._status: list[dict[str, Any]] = []
        self._disk_bytes = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Live:
        """Open the memory and begin to watch.

        Raises:
            StreamvidError: if the memory cannot be written or a setting makes no sense.
        """
        self._thread.start()
        self._opened.wait()
        if self.failure is not None:
            self._thread.join()
            raise self.failure
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()
        if self.failure is not None and not _[0]:
            raise self.failure

    def stop(self) -> None:
        """Stop watching; what came is remembered first.  From any thread or a signal handler."""
        self._stopping.set()
        self._waked.set()

    @property
    def running(self) -> bool:
        """Whether anything is still watched."""
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until watching has ended; False if it has not."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def ask(
        self,
        question: str,
        *,
        stream: str | None = None,
        max_new_tokens: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Future[Answer]:
        """Put a question to a stream; answered on the engine's thread as soon as the clip at hand is watched.

        Args:
            question: anything but blank.
            stream: its name; None where there is one stream only.
            max_new_tokens: longest answer; None: as set.
            on_text: called on the engine's thread with each piece of the answer.

        Raises:
            SettingsError: if there is no such stream.
        """
        names = [camera.name for camera in self.requests]
        if stream is None and len(names) > 1:
            raise SettingsError(f"which stream? {', '.join(names)}; as in: {names[0]}: {question}")
        name = names[0] if stream is None else stream
        if name not in names:
            raise SettingsError(f"no stream is called {name!r}; {near(name, names)}")
        asked = Asked(name, question, max_new_tokens or self.request.max_new_tokens, on_text)
        self._questions.put(asked)
        self._waked.set()
        if not self._thread.is_alive():
            self._refuse_questions()
        return asked.answer

    def status(self) -> dict[str, Any]:
        """Numbers of the moment, as JSON values."""
        from streamvid.session import used_bytes

        return {
            "running": self.running,
            "uptime_seconds": round(time.monotonic() - self.began, 1),
            "rss_bytes": used_bytes("cpu"),
            "disk_bytes": self._disk_bytes,
            "disk_limit_bytes": self.request.disk_bytes,
            "streams": self._status,
        }

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self.request.threads is not None:
                torch.set_num_threads(self.request.threads)
            with ExitStack() as stack:
                bank = stack.enter_context(
                    Bank.open(self.request.folder, codec=self.request.codec, limits=self.request.limits())
                )
                if bank.read_only:
                    raise BankError(f"{bank.folder} cannot be written, so nothing can be watched into it")
                self.cameras = [Camera(r, self.request, self.loaded, bank, self._waked.set) for r in self.requests]
                for camera in self.cameras:
                    camera.open(stack)
                self._status = [camera.status() for camera in self.cameras]
                self._opened.set()
                try:
                    self._watch(bank)
                finally:
                    self._leave()
        except BaseException as reason:
            self.failure = reason
        finally:
            self._opened.set()
            self._refuse_questions()

    def _watch(self, bank: Bank) -> None:
        tidied = time.monotonic()
        looked, turn = 0.0, 0
        while not self._stopping.is_set():
            self._answer_all()
            ready = [camera for camera in self.cameras if camera.ready()]
            if ready:
                # In turn, one clip each, so that no stream starves another.
                camera = min(ready, key=lambda camera: camera.served)
                camera.served = turn = turn + 1
                camera.work(self._say, self._on_watched)
            for camera in self.cameras:
                camera.note_gap()
            for camera in self.cameras:
                while self._questions.empty() and self._on_idle(camera):
                    pass
            now = time.monotonic()
            if now - looked >= 0.5:
                looked = now
                self._disk_bytes = bank.usage()
                self._status = [camera.status() for camera in self.cameras]
            if now - tidied >= TIDY_SECONDS:
                tidied = now
                tidy(bank)
                for camera in self.cameras:
                    camera.describe()
            if not ready and all(camera.feed.ended and not camera.feed.waiting for camera in self.cameras):
                self._fail_if_all_failed()
                return
            if not ready:
                self._waked.wait(IDLE_SECONDS)
                self._waked.clear()

    def _leave(self) -> None:
        """Watch what came, put everything on record, stop reading."""
        for camera in self.cameras:
            camera.feed.close()
        for camera in self.cameras:
            if self.failure is None:
                camera.flush(self._say, self._on_watched)
                self._on_leave(camera)
            camera.note_gap(sure=True)
            camera.describe()
        self._answer_all()
        self._status = [camera.status() for camera in self.cameras]

    def _fail_if_all_failed(self) -> None:
        failures = [camera.feed.failure for camera in self.cameras]
        if all(failures):
            raise SourceError("; ".join(str(failure) for failure in failures))

    def _answer_all(self) -> None:
        while True:
            try:
                asked = self._questions.get_nowait()
            except queue.Empty:
                return
            if not asked.answer.set_running_or_notify_cancel():
                continue
            try:
                asked.answer.set_result(self._answer(asked))
            except StreamvidError as reason:
                asked.answer.set_exception(reason)

    def _answer(self, asked: Asked) -> Answer:
        camera = next(c for c in self.cameras if c.request.name == asked.stream)
        camera.flush(self._say, self._on_watched)
        camera.note_gap(sure=True)
        if not camera.source.spans:
            why = camera.away or (
                str(camera.feed.failure) if camera.feed.failure is not None else "no picture came yet"
            )
            raise SettingsError(f"nothing was seen of {asked.stream} yet: {why}; ask again later")
        receipt = Receipt(source=asked.stream, model=self.loaded.adapter.info.name, cache="live")
        receipt.key, receipt.methods = camera.key.short, camera.session.chain.describe()
        source = camera.source
        receipt.tokens_remembered, receipt.memory_bytes = source.tokens, source.num_bytes
        receipt.tokens_seen, receipt.frames_remembered = camera.receipt.tokens_seen, camera.receipt.frames_sampled
        receipt.stop_seconds = float(camera.now)
        receipt.effective_fps = float(camera.fps / camera.feed.stride)
        if camera.away is not None:
            receipt.warn(f"there is no picture now: {camera.away}", passing=True)
        if camera.feed.stride > 1 or camera.feed.counts.dropped:
            receipt.warn(
                f"the model is slower than the camera: {float(camera.fps / camera.feed.stride):g} of "
                f"{float(camera.fps):g} frames a second are watched, {camera.feed.counts.dropped} were dropped",
                passing=True,
            )
        answer = camera.session.ask(
            asked.question,
            source,
            receipt,
            max_new_tokens=asked.max_new_tokens,
            on_text=asked.on_text,
            origin=camera.events.origin,
            now=float(camera.now),
        )
        camera.bank.save_answer(
            source.id, question=asked.question, answer=answer.text, receipt=answer.receipt.to_dict()
        )
        return answer

    def _refuse_questions(self) -> None:
        while True:
            try:
                asked = self._questions.get_nowait()
            except queue.Empty:
                return
            asked.answer.set_exception(
                StreamvidError("watching has ended; ask the memory: streamvid ask --stream NAME")
            )


__all__ = ["Camera", "Live", "Notice", "Said"]
