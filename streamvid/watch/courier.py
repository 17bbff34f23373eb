"""Carries alerts from the queue to their actions, at least once each.

Knows turns, attempts and pauses; what an action does is its own affair.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any, Self

from streamvid.errors import BankError, SettingsError
from streamvid.watch.actions import Action, NotDelivered
from streamvid.watch.alerts import Alert, Alerts, Queued, State

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 300.0
IDLE_SECONDS = 0.5


class Courier:
    """Delivers what waits: higher priority first, then older; again after failures, until it is stale.

    An alert is marked done only after its action returned, so a crash at any point repeats an
    action rather than lose it; the id in the message tells the receiver.  Each action goes on at
    its own pace: one that fails waits 1 s, 2 s, 4 s, up to 5 minutes, or as long as the receiver
    wishes, and one whose receiver is down is not tried with every alert in turn.  What is stale is
    marked so and said through ``note``.

    One courier at a time delivers from a folder or for a stream in it; another one waits until
    that one is closed or its process gone.

    Args:
        alerts: the queue.
        actions: for all rules, or by the name of the rule; at least one each.
        stream: deliver alerts of this stream only; None of all.
        note: told in one line of every alert that expired or failed for good, and of first failures.

    Raises:
        SettingsError: if there are no actions, or a rule has none.
    """

    def __init__(
        self,
        alerts: Alerts,
        actions: Sequence[Action] | Mapping[str, Sequence[Action]],
        *,
        stream: str | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.alerts, self.stream = alerts, stream
        self._note = note or (lambda _: None)
        self._by_rule = dict(actions) if isinstance(actions, Mapping) else None
        self._for_all = [] if isinstance(actions, Mapping) else _once(actions)
        for rule, own in (self._by_rule or {"": self._for_all}).items():
            if not own:
                whose = f"rule {rule!r} has" if rule else "there are"
                raise SettingsError(
                    f"{whose} no actions to deliver alerts to; give at least one, as jsonl alerts.jsonl"
                )
        every = self._for_all if self._by_rule is None else [a for own in self._by_rule.values() for a in own]
        self._actions = _once(every)
        self._paused = {action.key: 0.0 for action in self._actions}
        self._failures = {action.key: 0 for action in self._actions}
        self._locks: list[int] = []
        self._told_waiting = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another courier deliver."""
        for handle in self._locks:
            os.close(handle)
        self._locks = []

    def run(self, stop: Event) -> None:
        """Deliver until told to stop; the attempt in progress is finished first."""
        while not stop.is_set():
            if not self.step(time.time()):
                stop.wait(IDLE_SECONDS)

    def step(self, now: float) -> int:
        """Give up what is stale, then let every action try the alert that is next in its turn.

        Args:
            now: seconds since 1970.

        Returns:
            Attempts made; 0 if nothing is due, or another courier delivers here.
        """
        if not self._locks and not self._take_turn():
            return 0
        for lost in self.alerts.expire(now, stream=self.stream):
            self._note(
                f"alert of {lost.alert.rule!r} at {float(lost.alert.start):.1f} s was not delivered: {lost.note}"
            )
        tried = 0
        for action in self._actions:
            if self._paused[action.key] > now:
                continue
            found = self.alerts.due(action.key, rules=self._rules(action), stream=self.stream, now=now)
            if found is not None:
                tried += 1
                self._try(action, *found, now)
        return tried

    def _try(self, action: Action, queued: Queued, attempts: int, now: float) -> None:
        attempts += 1
        state, note, next_try = "done", "", now
        try:
            action.deliver(_as_it_is(queued.alert))
        except NotDelivered as failure:
            note = str(failure)
            state = "trying" if failure.again else "failed"
            if failure.down:
                self._failures[action.key] += 1
            pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(attempts - 1, 20))
            next_try = now + min(LONGEST_PAUSE_SECONDS, max(pause, failure.after_seconds or 0.0))
            if failure.down:
                held = FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures[action.key] - 1, 20)
                held = max(held, failure.after_seconds or 0.0)
                self._paused[action.key] = now + min(LONGEST_PAUSE_SECONDS, held)
                next_try = min(next_try, self._paused[action.key])
            if attempts == 1 and failure.again:
                self._note(f"{note}; trying again")
        else:
            self._failures[action.key] = 0
        keys = [other.key for other in self._of(queued.alert.rule)]
        closed = self.alerts.mark(
            queued.number, action.key, state=state, attempts=attempts, next_try=next_try, note=note, actions=keys
        )
        if state == "failed":
            rest = "" if closed is State.FAILED else "; its other actions go on"
            self._note(f"alert of {queued.alert.rule!r} at {float(queued.alert.start):.1f} s was refused: {note}{rest}")

    def _of(self, rule: str) -> list[Action]:
        return self._for_all if self._by_rule is None else _once(self._by_rule.get(rule, []))

    def _rules(self, action: Action) -> list[str] | None:
        if self._by_rule is None:
            return None
        return [rule for rule, own in self._by_rule.items() if any(a.key == action.key for a in own)]

    def _take_turn(self) -> bool:
        """Lock the folder, for all streams alone or for one stream beside others."""
        names = [("alerts.lock", fcntl.LOCK_EX if self.stream is None else fcntl.LOCK_SH)]
        if self.stream is not None:
            names.append((f"alerts-{hashlib.sha256(self.stream.encode()).hexdigest()[:8]}.lock", fcntl.LOCK_EX))
        for name, kind in names:
            try:
                handle = os.open(self.alerts.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                self.close()
                raise BankError(
                    f"cannot lock {self.alerts.folder / name}: {error.strerror}; check the permissions of the folder"
                ) from None
            self._locks.append(handle)
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                if not self._told_waiting:
                    self._told_waiting = True
                    self._note(
                        f"another process delivers the alerts in {self.alerts.folder}; this one waits for its end"
                    )
                return False
        rules = self._by_rule if self._by_rule is not None else self.alerts.rules()
        self.alerts.settle({rule: [a.key for a in self._of(rule)] for rule in rules}, stream=self.stream)
        return True


def _as_it_is(alert: Alert) -> dict[str, Any]:
    """The message, without files that are gone or were never finished."""
    message = alert.message()
    for name in ("frame", "clip"):
        if message[name] and not os.path.exists(message[name]):
            message[name] = ""
    return message


def _once(actions: Sequence[Action]) -> list[Action]:
    """Without repetitions, in order."""
    return list({action.key: action for action in actions}.values())
