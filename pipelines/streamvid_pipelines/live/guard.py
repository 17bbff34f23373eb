"""Standing questions to all streams: sentries, pictures, the queue and its couriers, beside the engine.

::

    engine's thread:  clip -> triggers -> candidates -> model -> alert into the queue, held back
    clips' thread:    its picture and clip are written, then the alert is let go
    couriers' threads, one a stream:  queue -> command, webhook, file, or a line for whoever watches
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from streamvid.errors import StreamvidError
from streamvid.frames import Clip
from streamvid.ingest.sampling import exact
from streamvid.receipt import Receipt
from streamvid.session import Watched
from streamvid.watch.actions import Action, parse_action
from streamvid.watch.alerts import Alert, Alerts
from streamvid.watch.courier import Courier
from streamvid_pipelines.ask import Loaded
from streamvid_pipelines.live.engine import Camera, Said
from streamvid_pipelines.live.pictures import Picture, Ring, Shelf, write_clip, write_picture
from streamvid_pipelines.live.sentry import Finding, Sentry
from streamvid_pipelines.live.settings import CameraRequest, LiveRequest

FOLDER = "alerts"
"""In the memory folder: pictures, clips and the state of the rules, a folder a stream."""

STATE_NAME = "rules.json"

SAVE_SECONDS = 20.0
"""The state of the rules is saved so often, and whenever a candidate comes or goes."""

HELD_SECONDS = 60.0
"""An alert whose clip was not finished, as where the process was killed, is delivered without it after so long."""

JOBS = 32
"""Clips that wait to be written; an alert beyond goes without one."""

PARTING_SECONDS = 10.0
"""How long couriers go on after the watching has ended; what is left is for the next run."""

ANSWER_TOKENS = 16
"""Longest answer about a candidate: only whether it says yes matters."""


class Told(Action):
    """Tells whoever watches; what happens where a rule has no action.

    Args:
        tell: gets the alert's message, on a courier's thread.
    """

    label = key = "told"

    def __init__(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._tell = tell

    def deliver(self, message: Mapping[str, Any]) -> None:
        """Tell it."""
        self._tell(message)


@dataclass(slots=True)
class _Pending:
    """An alert whose clip still lacks its end."""

    alert: Alert
    start: Fraction
    stop: Fraction
    picture: Picture | None


@dataclass(frozen=True, slots=True)
class _Job:
    alert: Alert
    picture: Picture | None
    pictures: tuple[Picture, ...]
    began: datetime


class Post:
    """One stream: its sentry, its latest pictures and the alerts that wait for their clips.  The engine's thread."""

    def __init__(self, guard: Guard, camera: CameraRequest, loaded: Loaded) -> None:
        self.name, self.guard = camera.name, guard
        self.sentry = Sentry(
            camera.rules,
            loaded.embedder,
            ask=self._ask,
            found=self._found,
            say=self._say,
            looks_a_minute=guard.request.looks_a_minute,
        )
        self.ring = Ring()
        self.camera: Camera | None = None
        self._pending: list[_Pending] = []
        self._owed: deque[Alert] = deque(maxlen=JOBS)
        self._saved, self._shape = 0.0, (0, 0)

    def watched(self, camera: Camera, clip: Clip, watched: Watched) -> None:
        """See a clip."""
        if self.camera is None:
            self.camera = camera
            self._restore()
        self.ring.add(clip)
        self.sentry.watch(watched)
        self._serve()

    def idle(self, camera: Camera) -> bool:
        """Ask the model about one candidate, if one is due; whether it was asked."""
        if self.camera is None:
            return False
        until = camera.watched_until or Fraction(0)
        # What waits to be watched may show more; if nothing does, time goes on without pictures.
        looked = self.sentry.look(until, until if camera.ready() else camera.now)
        self._serve()
        return looked

    def leave(self) -> None:
        """Nothing more comes: decide and finish what waits."""
        if self.camera is None:
            return
        until = self.camera.watched_until or Fraction(0)
        while self.sentry.look(until, self.camera.now, last=True):
            pass
        self._serve(last=True)
        self._save()

    def _serve(self, *, last: bool = False) -> None:
        """Hand clips over that are complete, let go of old pictures, save the state."""
        assert self.camera is not None
        now, before = self.camera.now, exact(self.guard.request.before_seconds)
        for pending in list(self._pending):
            if last or self.ring.stop >= pending.stop or now >= pending.stop + exact(HELD_SECONDS / 4):
                self._pending.remove(pending)
                pictures = tuple(self.ring.between(pending.start, pending.stop))
                began = self.camera.wall(pictures[0].pts) if pictures else self.camera.wall(pending.start)
                self.guard.write(_Job(pending.alert, pending.picture, pictures, began))
        kept = [self.ring.stop - before, *(pending.start for pending in self._pending)]
        if self.sentry.since is not None:
            kept.append(self.sentry.since - before)
        self.ring.forget(min(kept))
        shape = (self.sentry.waiting, self.sentry.counts.candidates)
        if shape != self._shape or time.monotonic() - self._saved > SAVE_SECONDS:
            self._shape = shape
            self._save()
            for _ in range(len(self._owed)):
                self._raise(self._owed.popleft())

    def _ask(self, question: str, within: tuple[float, float]) -> str:
        camera = self.camera
        assert camera is not None
        answer = camera.session.ask(
            question,
            camera.source,
            Receipt(source=self.name),
            within=within,
            max_new_tokens=ANSWER_TOKENS,
            origin=camera.events.origin,
            now=float(camera.now),
        )
        return answer.text

    def _found(self, finding: Finding) -> None:
        camera, request = self.camera, self.guard.request
        assert camera is not None
        self.guard.found(self.name, finding)
        if finding.confirmed is False:
            return
        wall = camera.wall(finding.start).timestamp()
        alert = Alert(
            rule=finding.rule.name,
            stream=self.name,
            start=finding.start,
            stop=finding.stop,
            wall=wall,
            score=finding.score,
            reason=finding.reason,
            confirmed=finding.confirmed,
            answer=finding.answer,
            priority=finding.rule.priority,
            expires=wall + finding.rule.stale_after_seconds,
        )
        picture = self.ring.at(finding.at)
        start = finding.start - exact(request.before_seconds)
        self._pending.append(_Pending(alert, start, finding.at + exact(request.after_seconds), picture))
        self._raise(alert)

    def _raise(self, alert: Alert) -> None:
        try:
            self.guard.raise_(alert)
        except StreamvidError as reason:
            # The watching goes on; the alert is tried again with every save of the state.
            self._owed.append(alert)
            self._say(f"the alert of {alert.rule!r} at {float(alert.start):.1f} s cannot be kept yet: {reason}")

    def _say(self, text: str) -> None:
        self.guard.say(Said(self.name, "rules", text, datetime.now().astimezone()))

    @property
    def _state(self) -> Path:
        return self.guard.shelf.folder / self.name / STATE_NAME

    def _save(self) -> None:
        self._saved = time.monotonic()
        part = self._state.with_name(f"{STATE_NAME}.part")
        try:
            part.write_text(json.dumps(self.sentry.state()), encoding="utf-8")
            part.replace(self._state)
        except OSError as reason:
            self._say(f"the state of the rules cannot be saved: {reason.strerror}")

    def _restore(self) -> None:
        try:
            self.sentry.restore(json.loads(self._state.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, StreamvidError) as reason:
            self._say(f"the saved state of the rules cannot be used ({reason}); they begin anew")


class Guard:
    """Watches the rules of all streams; a context manager around `Live`, whose hooks it serves.

    ::

        guard = Guard(cameras, request, loaded, then=("jsonl alerts.jsonl",))
        with guard, Live(cameras, request, loaded, **guard.hooks):
            ...

    Args:
        cameras: those without rules are left alone.
        request: where the memory is, how much clips show and may take.
        loaded: the model and the embedder.
        then: actions of rules that name none, as in ``jsonl alerts.jsonl``.
        tell: gets the alerts of rules without any action.
        say: told what is given up, refused or cannot be written.
        found: told of every decided candidate, also of refused ones; on the engine's thread.
        deliver: False raises nothing and writes nothing: candidates go to ``found`` only.

    Raises:
        SettingsError: if a rule cannot be watched for, or an action cannot work.
    """

    def __init__(
        self,
        cameras: Sequence[CameraRequest],
        request: LiveRequest,
        loaded: Loaded,
        *,
        then: Sequence[str] = (),
        tell: Callable[[Mapping[str, Any]], None] = lambda message: None,
        say: Callable[[Said], None] = lambda said: None,
        found: Callable[[str, Finding], None] = lambda stream, finding: None,
        deliver: bool = True,
    ) -> None:
        self.request, self.say, self.found, self.deliver = request, say, found, deliver
        self._posts = {camera.name: Post(self, camera, loaded) for camera in cameras if camera.rules}
        told = Told(tell)
        self._actions: dict[str, dict[str, list[Action]]] = {
            camera.name: {
                rule.name: [parse_action(text) for text in rule.actions or then] or [told] for rule in camera.rules
            }
            for camera in cameras
            if camera.rules
        }
        self.shelf = Shelf(
            request.folder / FOLDER, most_bytes=request.alert_bytes, undelivered=lambda: self._undelivered
        )
        self._undelivered: frozenset[str] = frozenset()
        self._alerts: Alerts | None = None
        self._cameras, self._left = len(cameras), 0
        self._jobs: queue.Queue[_Job | None] = queue.Queue(JOBS)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._scribe = threading.Thread(target=self._write_all, name="clips", daemon=True)

    @property
    def hooks(self) -> dict[str, Any]:
        """What `Live` is given."""
        return {"on_watched": self._watched, "on_idle": self._idle, "on_leave": self._leave}

    @property
    def posts(self) -> Mapping[str, Post]:
        """By stream, those that have rules."""
        return self._posts

    def __enter__(self) -> Self:
        """Open the queue and begin to deliver what waits.

        Raises:
            BankError: if the queue cannot be opened.
            SourceError: if there is no place for pictures.
        """
        if not self._posts:
            return self
        for name in self._posts:
            self.shelf.open(name)
        if self.deliver:
            Alerts(self.request.folder).close()
            self._scribe.start()
            for name, actions in self._actions.items():
                thread = threading.Thread(target=self._carry, args=(name, actions), name=f"courier {name}", daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        if self._scribe.is_alive():
            self._jobs.put(None)
            self._scribe.join(2 * PARTING_SECONDS)
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PARTING_SECONDS)

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def raise_(self, alert: Alert) -> None:
        """Put an alert into the queue, held back until its clip is written."""
        if not self.deliver:
            return
        if self._alerts is None:
            self._alerts = Alerts(self.request.folder)
        path = self.shelf.path
        with_files = replace(
            alert,
            frame_path=str(path(alert.stream, alert.id, ".jpg")),
            clip_path=str(path(alert.stream, alert.id, ".mp4")),
        )
        self._alerts.raise_(with_files, ready=time.time() + HELD_SECONDS)

    def write(self, job: _Job) -> None:
        """Have a clip written, and its alert let go."""
        if not self.deliver:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            # It is delivered when it has been held back long enough.
            self._complain(job.alert, f"{JOBS} clips wait to be written; the disk is too slow")

    def _watched(self, camera: Camera, clip: Clip, watched: Watched) -> None:
        post = self._posts.get(camera.request.name)
        if post is not None:
            post.watched(camera, clip, watched)

    def _idle(self, camera: Camera) -> bool:
        post = self._posts.get(camera.request.name)
        return post is not None and post.idle(camera)

    def _leave(self, camera: Camera) -> None:
        post = self._posts.get(camera.request.name)
        if post is not None:
            post.leave()
        self._left += 1
        if self._alerts is not None and self._left == self._cameras:
            self._alerts.close()
            self._alerts = None

    # --- other threads ---------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        with Alerts(self.request.folder) as alerts:
            while (job := self._jobs.get()) is not None:
                try:
                    if job.picture is not None:
                        write_picture(job.picture, self.shelf.path(job.alert.stream, job.alert.id, ".jpg"))
                    write_clip(
                        job.pictures, self.shelf.path(job.alert.stream, job.alert.id, ".mp4"), began=job.began
                    )  # fmt: skip
                except StreamvidError as reason:
                    self._complain(job.alert, str(reason))
                try:
                    alerts.release(job.alert.id)
                    self._undelivered = frozenset(found.alert.id for found in alerts.waiting(limit=alerts.limit))
                except StreamvidError as reason:
                    self._complain(job.alert, str(reason))
                with suppress(OSError):
                    self.shelf.tidy()

    def _carry(self, stream: str, actions: Mapping[str, Sequence[Action]]) -> None:
        def note(text: str) -> None:
            self.say(Said(stream, "delivery", text, datetime.now().astimezone()))

        try:
            with (
                Alerts(self.request.folder) as alerts,
                Courier(alerts, actions, stream=stream, note=note) as courier,
            ):
                courier.run(self._stop)
                until = time.monotonic() + PARTING_SECONDS
                while courier.step(time.time()) and time.monotonic() < until:
                    pass
        except StreamvidError as reason:
            note(f"alerts are not delivered any more, they wait for the next run: {reason}")

    def _complain(self, alert: Alert, reason: str) -> None:
        text = f"the alert of {alert.rule!r} at {float(alert.start):.1f} s goes without its clip: {reason}"
        self.say(Said(alert.stream, "delivery", text, datetime.now().astimezone()))
