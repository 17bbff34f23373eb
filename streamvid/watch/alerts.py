"""Alerts on the disk until they are delivered: a durable, bounded queue beside the memory.

Knows alerts and their states; runs no action and sees no picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from streamvid.errors import BankError

FILE_NAME = "alerts.sqlite3"

APPLICATION_ID = 0x53764151
"""Marks the SQLite file as ours ("SvAQ"), so that a foreign one is refused."""

BUSY_SECONDS = 30

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE alerts (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            rule TEXT NOT NULL,
            stream TEXT NOT NULL,
            priority INTEGER NOT NULL,
            expires REAL,
            ready REAL NOT NULL DEFAULT 0,
            state TEXT NOT NULL CHECK (state IN ('waiting', 'done', 'expired', 'failed')),
            note TEXT NOT NULL DEFAULT '',
            body TEXT NOT NULL
        )""",
        "CREATE INDEX alerts_in_turn ON alerts (state, priority DESC, number)",
        # One row for each action an alert has been through; an alert without rows was never tried.
        """CREATE TABLE deliveries (
            number INTEGER NOT NULL REFERENCES alerts (number) ON DELETE CASCADE,
            action TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('trying', 'done', 'failed')),
            attempts INTEGER NOT NULL,
            next_try REAL NOT NULL,
            note TEXT NOT NULL,
            PRIMARY KEY (number, action)
        )""",
        """CREATE TABLE counts (
            state TEXT PRIMARY KEY,
            alerts INTEGER NOT NULL
        )""",
    ),
)
"""Statements that lead from each schema version to the next; a released entry is never edited."""


class State(StrEnum):
    """What became of an alert."""

    WAITING = "waiting"
    DONE = "done"
    """Every action succeeded."""

    EXPIRED = "expired"
    """Given up because it was stale or the queue was full; the note says which."""

    FAILED = "failed"
    """Over, and at least one action refused it for good; the note says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something a rule was waiting for happened: what, where, when, why, and what to look at."""

    rule: str
    """Name of the rule."""

    stream: str
    """Name of the stream as it may be printed: no credentials."""

    start: Fraction
    """When it began, in seconds of the stream."""

    stop: Fraction
    """Up to when it was seen, in seconds of the stream, >= start."""

    wall: float
    """When it began by the clock, in seconds since 1970 (UTC)."""

    score: float
    """The trigger's; higher is surer."""

    reason: str
    """Why, in one line."""

    confirmed: bool | None = None
    """Whether a model confirmed it; None if none was asked."""

    answer: str = ""
    """What the model said."""

    frame_path: str = ""
    """A picture of the moment; empty if none was saved."""

    clip_path: str = ""
    """A clip with some seconds before; empty if none was saved."""

    priority: int = 5
    """0 to 9; higher is delivered first."""

    expires: float | None = None
    """After this time (seconds since 1970) it is not delivered any more; None never."""

    def __post_init__(self) -> None:
        if self.stop < self.start:
            raise ValueError(f"stop must not be before start, got {float(self.start)} to {float(self.stop)}")
        if not 0 <= self.priority <= 9:
            raise ValueError(f"priority must be in 0..9, got {self.priority}")
        for field in ("score", "wall", "expires"):
            value = getattr(self, field)
            if value is not None and not -1e300 < value < 1e300:
                raise ValueError(f"{field} must be a finite number, got {value}")

    @property
    def id(self) -> str:
        """The same for the same event of the same rule and stream, however often it is raised or delivered."""
        said = json.dumps([self.rule, self.stream, str(self.start), round(self.wall, 3)])
        return hashlib.sha256(said.encode()).hexdigest()[:20]

    def message(self) -> dict[str, Any]:
        """What a receiver gets, as JSON: ``id`` tells duplicates, times are seconds and UTC."""
        return {
            "id": self.id,
            "rule": self.rule,
            "stream": self.stream,
            "start_seconds": float(self.start),
            "stop_seconds": float(self.stop),
            "wall": _iso(self.wall),
            "score": round(self.score, 4),
            "reason": self.reason,
            "confirmed": self.confirmed,
            "answer": self.answer,
            "frame": self.frame_path,
            "clip": self.clip_path,
            "priority": self.priority,
            "expires": None if self.expires is None else _iso(self.expires),
        }

    def to_json(self) -> str:
        """Everything, exact, for the queue."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields | {"start": str(self.start), "stop": str(self.stop)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        found = json.loads(text)
        return cls(**found | {"start": Fraction(found["start"]), "stop": Fraction(found["stop"])})


@dataclass(frozen=True, slots=True)
class Queued:
    """An alert as it stands in the queue."""

    number: int
    """Rises with the order in which alerts were raised."""

    alert: Alert
    state: State
    note: str
    """Why it expired or failed, or what the last failed attempt said."""


class Alerts:
    """The queue: what is raised stays until it is delivered, stale, or pushed out by what matters more.

    Every change is on the disk before the call returns.  An alert that is raised twice, as after a
    restart, is one alert.  Where the queue is full, the oldest of the lowest priority expires; all
    that ever expired are counted.  Of alerts that are over, the newest ``keep`` stay to be looked at.
    One object serves one thread; several processes may open the same folder.

    Args:
        folder: where ``alerts.sqlite3`` lies or is made, usually the memory folder.
        limit: alerts that may wait at a time, >= 1.
        keep: alerts that are over and still listed, >= 0.

    Raises:
        BankError: if the file is another program's, damaged, newer, or cannot be read or written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, limit: int = 1000, keep: int = 10_000) -> None:
        if limit < 1 or keep < 0:
            raise ValueError(f"limit must be at least 1 and keep at least 0, got {limit} and {keep}")
        self.folder, self.limit, self.keep = Path(folder), limit, keep
        self.path = self.folder / FILE_NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankError(f"cannot make {self.folder}: {error.strerror}; choose another memory folder") from None
        with self._reported():
            self._db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            with self._reported():
                self._check()
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA foreign_keys = ON")
                self._migrate()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what waits is there for the next one."""
        with self._reported():
            self._db.close()

    def raise_(self, alert: Alert, *, ready: float = 0.0) -> str:
        """Put an alert into the queue; it is on the disk when this returns.

        Args:
            alert: what happened.
            ready: it is not delivered before this time (seconds since 1970) or `release`: its clip is not complete.

        Returns:
            Its id.  An alert that is already there, waiting or over, is left as it is.
        """
        with self._transaction():
            given = (alert.id, alert.rule, alert.stream, alert.priority, alert.expires, ready, State.WAITING)
            added = self._db.execute(
                "INSERT OR IGNORE INTO alerts (id, rule, stream, priority, expires, ready, state, body) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*given, alert.to_json()),
            ).rowcount
            if added:
                self._count(State.WAITING, 1)
                self._make_room()
        return alert.id

    def release(self, id: str) -> None:
        """Let an alert be delivered now; one that is over or unknown is left alone."""
        with self._transaction():
            self._db.execute("UPDATE alerts SET ready = 0 WHERE id = ? AND state = 'waiting'", (id,))

    def retry(self, id: str) -> bool:
        """Let an alert that failed or expired wait again, without end; actions that were done are not repeated.

        Returns:
            False if there is no such alert, or it waits or is done.
        """
        with self._transaction():
            row = self._db.execute(
                "SELECT number, state FROM alerts WHERE id = ? AND state IN ('failed', 'expired')", (id,)
            ).fetchone()
            if row is None:
                return False
            self._db.execute(
                "UPDATE alerts SET state = 'waiting', expires = NULL, ready = 0, note = '' WHERE number = ?",
                (row["number"],),
            )
            self._db.execute("DELETE FROM deliveries WHERE number = ? AND state != 'done'", (row["number"],))
            self._count(State(row["state"]), -1)
            self._count(State.WAITING, 1)
            self._make_room()
        return True

    def waiting(self, *, stream: str | None = None, limit: int = 100) -> list[Queued]:
        """The next in turn: by priority, then age; at most so many."""
        return self._list("state = 'waiting'", stream, "priority DESC, number", limit)

    def over(self, *, stream: str | None = None, limit: int = 100) -> list[Queued]:
        """Delivered, expired and failed ones, newest first."""
        return self._list("state != 'waiting'", stream, "number DESC", limit)

    def counts(self) -> dict[str, int]:
        """Alerts by state: waiting now, and done, expired and failed since the file was made."""
        found = {str(row["state"]): int(row["alerts"]) for row in self._rows("SELECT state, alerts FROM counts")}
        return {state.value: found.get(state.value, 0) for state in State}

    def rules(self) -> list[str]:
        """Names of the rules of which alerts wait."""
        return [str(row["rule"]) for row in self._rows("SELECT DISTINCT rule FROM alerts WHERE state = 'waiting'")]

    def due(
        self, action: str, *, rules: Sequence[str] | None, stream: str | None, now: float
    ) -> tuple[Queued, int] | None:
        """The first alert in turn that this action has not dealt with, and its attempts so far.

        Args:
            action: key of the action.
            rules: names of the rules it belongs to; None all.
            stream: only of this stream; None of all.
            now: seconds since 1970; alerts whose next attempt is later are passed over.
        """
        wanted, values = "", []
        if rules is not None:
            wanted += f" AND a.rule IN ({', '.join('?' * len(rules))})"
            values += list(rules)
        if stream is not None:
            wanted += " AND a.stream = ?"
            values.append(stream)
        rows = self._rows(
            "SELECT a.*, COALESCE(d.attempts, 0) AS attempts FROM alerts a "
            "LEFT JOIN deliveries d ON d.number = a.number AND d.action = ? "
            "WHERE a.state = 'waiting' AND (d.state IS NULL OR (d.state = 'trying' "
            f"AND d.next_try <= ?)) AND a.ready <= ?{wanted} ORDER BY a.priority DESC, a.number LIMIT 1",
            action, now, now, *values,
        )  # fmt: skip
        return (_queued(rows[0]), int(rows[0]["attempts"])) if rows else None

    def mark(
        self, number: int, action: str, *, state: str, attempts: int, next_try: float, note: str, actions: Sequence[str]
    ) -> State | None:
        """Note how one attempt of one action went, and close the alert if that was the last it waited for.

        Args:
            number: of the alert.
            action: key of the action.
            state: "trying" (again later), "done" or "failed" (for good).
            attempts: how often it has been tried by now.
            next_try: when it may be tried again, in seconds since 1970.
            note: what went wrong, on one line; empty if nothing.
            actions: keys of all actions the alert must go through.

        Returns:
            The state it was closed with; None if it goes on waiting.
        """
        with self._transaction():
            self._db.execute(
                "INSERT INTO deliveries (number, action, state, attempts, next_try, note) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (number, action) DO UPDATE SET state = excluded.state, attempts = excluded.attempts, "
                "next_try = excluded.next_try, note = excluded.note",
                (number, action, state, attempts, next_try, note),
            )
            if note:
                self._db.execute("UPDATE alerts SET note = ? WHERE number = ?", (note, number))
            return self._finish(number, actions)

    def settle(self, actions: Mapping[str, Sequence[str]], *, stream: str | None = None) -> None:
        """Close what waits for no action any more, as after a change of the actions.

        Args:
            actions: keys of the actions by rule.
            stream: only alerts of this stream; None of all.
        """
        with self._transaction():
            wanted = "" if stream is None else " AND stream = ?"
            rows = self._db.execute(
                f"SELECT number, rule FROM alerts WHERE state = 'waiting'{wanted}", () if stream is None else (stream,)
            ).fetchall()
            for row in rows:
                if row["rule"] in actions:
                    self._finish(row["number"], actions[row["rule"]])

    def _finish(self, number: int, actions: Sequence[str]) -> State | None:
        rows = self._db.execute("SELECT action, state FROM deliveries WHERE number = ?", (number,)).fetchall()
        found = {str(row["action"]): str(row["state"]) for row in rows}
        states = [found.get(action, "trying") for action in actions]
        if "trying" in states:
            return None
        state = State.FAILED if "failed" in states else State.DONE
        self._close(number, state, None if state is State.FAILED else "")
        return state

    def expire(self, now: float, *, stream: str | None = None) -> list[Queued]:
        """Give up what is stale; returns what was given up, each with a note."""
        with self._transaction():
            wanted = "" if stream is None else " AND stream = ?"
            rows = self._db.execute(
                f"SELECT * FROM alerts WHERE state = 'waiting' AND expires IS NOT NULL AND expires <= ?{wanted} "
                "ORDER BY number",
                (now,) if stream is None else (now, stream),
            ).fetchall()
            for row in rows:
                last = f"; last attempt: {row['note']}" if row["note"] else ""
                self._close(row["number"], State.EXPIRED, f"stale since {_iso(row['expires'])}{last}")
        return [found for row in rows if (found := self.get(str(row["id"]))) is not None]

    def get(self, id: str) -> Queued | None:
        """The alert with this id, if it is still listed."""
        rows = self._rows("SELECT * FROM alerts WHERE id = ?", id)
        return _queued(rows[0]) if rows else None

    def attempts(self, number: int) -> dict[str, int]:
        """How often each action tried an alert."""
        rows = self._rows("SELECT action, attempts FROM deliveries WHERE number = ?", number)
        return {str(row["action"]): int(row["attempts"]) for row in rows}

    def _make_room(self) -> None:
        waiting = int(self._db.execute("SELECT alerts FROM counts WHERE state = 'waiting'").fetchone()[0])
        rows = self._db.execute(
            "SELECT number FROM alerts WHERE state = 'waiting' ORDER BY priority, number LIMIT ?",
            (max(0, waiting - self.limit),),
        ).fetchall()
        for row in rows:
            self._close(
                row["number"], State.EXPIRED, f"{self.limit} alerts were waiting and others mattered more or were newer"
            )

    def _close(self, number: int, state: State, note: str | None) -> None:
        changed = self._db.execute(
            "UPDATE alerts SET state = ?, note = COALESCE(?, note) WHERE number = ? AND state = 'waiting'",
            (state.value, note, number),
        ).rowcount
        if not changed:
            return
        self._count(State.WAITING, -1)
        self._count(state, 1)
        self._db.execute(
            "DELETE FROM alerts WHERE state != 'waiting' AND number <= "
            "(SELECT number FROM alerts WHERE state != 'waiting' ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (self.keep,),
        )

    def _count(self, state: State, by: int) -> None:
        self._db.execute(
            "INSERT INTO counts (state, alerts) VALUES (?, ?) ON CONFLICT (state) DO UPDATE SET alerts = alerts + ?",
            (state.value, max(by, 0), by),
        )

    def _list(self, where: str, stream: str | None, order: str, limit: int) -> list[Queued]:
        wanted = "" if stream is None else " AND stream = ?"
        values = [limit] if stream is None else [stream, limit]
        rows = self._rows(f"SELECT * FROM alerts WHERE {where}{wanted} ORDER BY {order} LIMIT ?", *values)
        return [_queued(row) for row in rows]

    def _rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self._reported():
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing; the write lock is taken at once, so that what was read is still so when it is written."""
        with self._reported():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _check(self) -> None:
        version, application = self._pragma("user_version"), self._pragma("application_id")
        used = bool(self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0])
        if application != APPLICATION_ID and (application or version or used):
            raise BankError(f"{self.path} is another program's SQLite file; choose another memory folder")
        if version > len(MIGRATIONS):
            raise BankError(
                f"{self.path} was written by a newer streamvid (format {version}, this one knows {len(MIGRATIONS)}); "
                "it was left as it is: update streamvid, or choose another memory folder"
            )

    def _migrate(self) -> None:
        if self._pragma("user_version") == len(MIGRATIONS):
            return
        with self._transaction():
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            for version in range(self._pragma("user_version"), len(MIGRATIONS)):
                for statement in MIGRATIONS[version]:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn SQLite's errors into one line that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            advice = next((a for start, a in _ADVICE.items() if code.startswith(start)), "")
            if not advice:
                advice = f"cannot be used: {error} ({code}); nothing stored was changed"
            raise BankError(f"{self.path} {advice}") from error


_ADVICE = {
    "SQLITE_BUSY": f"was locked by another process for {BUSY_SECONDS} s; end that one, or wait",
    "SQLITE_FULL": "cannot grow: the disk is full; free some space and run again",
    "SQLITE_READONLY": "may not be written; check the permissions of the memory folder",
    "SQLITE_CANTOPEN": "cannot be opened; check the permissions of the memory folder",
    "SQLITE_NOTADB": "is not a queue of alerts; move it away, or choose another memory folder",
    "SQLITE_CORRUPT": "is damaged; move it away: what waited in it is lost, the memory is not",
}


def _queued(row: sqlite3.Row) -> Queued:
    return Queued(int(row["number"]), Alert.from_json(row["body"]), State(row["state"]), str(row["note"]))


def _iso(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
