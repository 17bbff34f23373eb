"""What the catalogue says besides spans: answers, gaps, what expired, and digests of files."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from typing import Any

from streamvid.memory.database import now
from streamvid.memory.records import AnswerRecord, ExpiredRecord, GapRecord, Totals
from streamvid.memory.scopes import Scopes


def _seconds(column: str) -> str:
    """SQL: a column of exact seconds, ``n`` or ``n/d``, as a real number."""
    return (
        f"CAST({column} AS REAL) / CASE instr({column}, '/') WHEN 0 THEN 1.0 "
        f"ELSE CAST(substr({column}, instr({column}, '/') + 1) AS REAL) END"
    )


class History(Scopes):
    """The part of the catalogue that tells what happened."""

    def totals(self, source_id: int) -> Totals:
        """How much there is of what happened to a source; reads no record."""
        length = f"SUM({_seconds('stop')} - {_seconds('start')})"
        [answers] = self._rows("SELECT COUNT(*) AS count FROM answers WHERE source_id = ?", source_id)
        [gaps] = self._rows(f"SELECT COUNT(*) AS count, {length} AS seconds FROM gaps WHERE source_id = ?", source_id)
        [gone] = self._rows(
            f"SELECT COUNT(*) AS count, SUM(spans) AS spans, {length.replace('SUM(', 'SUM((spans > 0) * (', 1)}) "
            "AS seconds FROM expired WHERE source_id = ?",
            source_id,
        )
        return Totals(
            answers=answers["count"],
            gaps=gaps["count"],
            gap_seconds=gaps["seconds"] or 0.0,
            expired=gone["count"],
            expired_spans=gone["spans"] or 0,
            expired_seconds=gone["seconds"] or 0.0,
        )

    def add_answer(self, source_id: int, *, question: str, answer: str, receipt: Mapping[str, Any]) -> int:
        """Keep an answer; returns its id."""
        with self.transaction():
            cursor = self._db.execute(
                "INSERT INTO answers (source_id, question, answer, receipt, created) VALUES (?, ?, ?, ?, ?)",
                (source_id, question, answer, json.dumps(receipt, sort_keys=True), now()),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def answers(self, source_id: int, *, ends: int | None = None) -> list[AnswerRecord]:
        """The answers given from a source, oldest first; with ``ends`` only so many oldest and newest."""
        rows = self._ends("answers", source_id, ends)
        return [
            AnswerRecord(
                id=row["id"],
                source_id=row["source_id"],
                question=row["question"],
                answer=row["answer"],
                receipt=json.loads(row["receipt"]),
                created=datetime.fromisoformat(row["created"]),
            )
            for row in rows
        ]

    def add_gap(self, source_id: int, *, start: Fraction, stop: Fraction, reason: str) -> None:
        """Enter a stretch of which nothing was seen; one with the same start is still the same gap."""
        with self.transaction():
            known = self._db.execute(
                "UPDATE gaps SET stop = ?, reason = ? WHERE source_id = ? AND start = ?",
                (str(stop), reason, source_id, str(start)),
            )
            if not known.rowcount:
                self._db.execute(
                    "INSERT INTO gaps (source_id, start, stop, reason, created) VALUES (?, ?, ?, ?, ?)",
                    (source_id, str(start), str(stop), reason, now()),
                )

    def gaps(self, source_id: int, *, ends: int | None = None) -> list[GapRecord]:
        """The stretches of a source of which nothing was seen, in time order.

        With ``ends`` only so many that were noted first and last.
        """
        rows = self._ends("gaps", source_id, ends)
        found = [
            GapRecord(
                source_id=row["source_id"],
                start=Fraction(row["start"]),
                stop=Fraction(row["stop"]),
                reason=row["reason"],
                created=datetime.fromisoformat(row["created"]),
            )
            for row in rows
        ]
        return sorted(found, key=lambda gap: gap.start)

    def expired(self, source_id: int, *, ends: int | None = None) -> list[ExpiredRecord]:
        """What of a source was remembered once and is not any more, in the order it went.

        With ``ends`` only so many that went first and last.
        """
        rows = self._ends("expired", source_id, ends)
        return [
            ExpiredRecord(
                source_id=row["source_id"],
                start=Fraction(row["start"]),
                stop=Fraction(row["stop"]),
                spans=row["spans"],
                tokens=row["tokens"],
                reason=row["reason"],
                created=datetime.fromisoformat(row["created"]),
            )
            for row in rows
        ]

    def content_digest(self, path: str, *, stamp: str) -> str | None:
        """The remembered digest of a file, if it was remembered under this very stamp."""
        rows = self._rows("SELECT digest FROM digests WHERE path = ? AND stamp = ?", path, stamp)
        return str(rows[0]["digest"]) if rows else None

    def remember_digest(self, path: str, *, stamp: str, digest: str) -> None:
        """Remember the digest of a file under a stamp, in place of an older one."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO digests (path, stamp, digest) VALUES (?, ?, ?) "
                "ON CONFLICT (path) DO UPDATE SET stamp = excluded.stamp, digest = excluded.digest",
                (path, stamp, digest),
            )

    def forget_digest(self, path: str) -> None:
        """Forget the digest of a file that is gone."""
        with self.transaction():
            self._db.execute("DELETE FROM digests WHERE path = ?", (path,))

    def _ends(self, table: str, source_id: int, count: int | None, *, order: str = "id") -> list[sqlite3.Row]:
        """Rows of a source in order: all, or so many from either end, each once."""
        if count is None:
            return self._rows(f"SELECT * FROM {table} WHERE source_id = ? ORDER BY {order}", source_id)
        some = f"SELECT id FROM (SELECT id FROM {table} WHERE source_id = ? ORDER BY {order} %s LIMIT ?)"
        return self._rows(
            f"SELECT * FROM {table} WHERE id IN ({some % 'ASC'} UNION {some % 'DESC'}) ORDER BY {order}",
            *(source_id, count, source_id, count),
        )
