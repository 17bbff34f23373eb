"""Mending what lies apart from spans: rows that do not fit their checksums, and what can be made anew."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from fractions import Fraction
from typing import Any

from streamvid.memory.bank import Bank
from streamvid.memory.beside import examine_spare
from streamvid.memory.care import Problem, Repaired, segment_files
from streamvid.memory.catalog import Catalog
from streamvid.memory.records import SourceRecord
from streamvid.memory.rows import HISTORY, count_spans, insert
from streamvid.memory.seals import seal_keys
from streamvid.memory.snapshots import FOLDER_NAME


def mend_rows(
    bank: Bank, problems: Iterable[Problem], result: Repaired, *, source: SourceRecord | None = None, dry_run: bool
) -> None:
    """Mend rows that do not fit their checksums, after all that the segments tell was mended.

    A row that fits then was mended; one that still does not is kept as it is and told to be doubtful, and its
    checksum is renewed; one that makes no sense is dropped.

    Args:
        bank: of the folder.
        problems: each with its row.
        result: takes what was done.
        source: whose they are, held for writing; None for what is of none.
        dry_run: only say what would be done.
    """
    catalog = bank._catalog
    for problem in problems:
        row = problem.row
        assert row is not None
        if row.table in ("snapshots", "digests"):
            result.done.append(f"{problem.text}: removed")
            if not dry_run:
                _forget(bank, row.table, row.rowid)
            continue
        read = _readable(catalog, row.table, row.rowid) if row.table in HISTORY else None
        if row.table in HISTORY and read is None:
            result.lose(f"{problem.text}, and it makes no sense any more")
            if not dry_run:
                with catalog.transaction():
                    catalog.execute(f"DELETE FROM {row.table} WHERE id = ?", row.rowid)
            continue
        told = row.table in ("spans", "sources")
        if dry_run and told:
            result.done.append(f"{problem.text}: mended as far as the segments tell it")
            continue
        if not dry_run:
            with catalog.transaction():
                if read is not None and read[1]:
                    # Not an update: what it was cannot be read as text, even for its checksum.
                    owner = catalog.execute(f"SELECT source_id FROM {row.table} WHERE id = ?", row.rowid).fetchone()[0]
                    catalog.execute(f"DELETE FROM {row.table} WHERE id = ?", row.rowid)
                    insert(catalog, row.table, id=row.rowid, source_id=owner, **read[0])
                elif row.table == "spans":
                    _seal_keys(catalog, row.rowid)
                elif row.table == "sources" and source is not None:
                    size = sum(segment_files(bank.folder / source.folder).values())
                    catalog.execute("UPDATE sources SET bytes = ? WHERE id = ? AND bytes != ?", size, source.id, size)
                    count_spans(catalog, source.id)
                if not catalog.reseal(row.table, row.rowid) and read is None:
                    result.done.append(f"{problem.text}: mended")
                    continue
        result.doubt(f"{problem.text}; it is kept as it is, and only a copy of the catalogue tells more")


def mend_sequences(bank: Bank, result: Repaired, *, dry_run: bool) -> None:
    """Make the last ids that were given what they were."""
    for table in bank._catalog.wrong_sequences():
        result.done.append(f"the last id of {table} is not as it was written: mended")
        if not dry_run:
            with bank._catalog.transaction():
                bank._catalog.mend_sequence(table)


def remove_spare(bank: Bank, result: Repaired, *, dry_run: bool) -> None:
    """Remove saved indexes and kept keys and values that are not as written."""
    for problem in list(examine_spare(bank)):
        result.done.append(f"{problem.text}: removed")
        if dry_run:
            continue
        if problem.file.startswith(f"{FOLDER_NAME}/"):
            with bank._catalog.transaction():
                bank._catalog.execute(
                    "DELETE FROM snapshots WHERE file = ?", problem.file.removeprefix(f"{FOLDER_NAME}/")
                )
        (bank.folder / problem.file).unlink(missing_ok=True)
        bank._catalog.forget_digest(str((bank.folder / problem.file).absolute()))


def _forget(bank: Bank, table: str, rowid: int) -> None:
    catalog = bank._catalog
    with catalog.transaction():
        # A saved index whose row is gone is swept like any that is not in the catalogue.
        catalog.execute(f"DELETE FROM {table} WHERE rowid = ?", rowid)
    if table == "snapshots":
        bank._snapshots.sweep()


def _seal_keys(catalog: Catalog, span_id: int) -> None:
    """The keys were compared with the segment's: seal what they are now."""
    row = catalog.execute("SELECT width, vectors FROM keys WHERE span_id = ?", span_id).fetchone()
    if row is not None and not catalog.keys_fit(span_id):
        catalog.execute("UPDATE spans SET keys_seal = ? WHERE id = ?", seal_keys(row[0], row[1]), span_id)


def _readable(catalog: Catalog, table: str, rowid: int) -> tuple[dict[str, Any], bool] | None:
    """A row of what is told by nothing else, and whether letters had to be replaced; None if it makes no sense."""
    columns = HISTORY[table]
    # As bytes: text that is no UTF-8 cannot be read as text.
    row = catalog.execute(
        f"SELECT {', '.join(f'typeof({name}), CAST({name} AS BLOB)' for name in columns)} FROM {table} WHERE id = ?",
        rowid,
    ).fetchone()
    told: dict[str, Any] = {}
    replaced = False
    for index, name in enumerate(columns):
        number = name in ("spans", "tokens")
        if row is None or row[2 * index] != ("integer" if number else "text"):
            return None
        data = bytes(row[2 * index + 1])
        text = data.decode("utf-8", "replace")
        replaced |= text.encode("utf-8") != data
        told[name] = int(text) if number else text
    try:
        datetime.fromisoformat(told["created"])
        for name in ("start", "stop"):
            Fraction(told.get(name, "0"))
        json.loads(told.get("receipt", "{}"))
    except (ValueError, ZeroDivisionError):
        return None
    return told, replaced
