"""What lies beside the tokens of a memory folder.

Saved indexes and kept keys and values can be made anew; codebooks cannot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from streamvid.memory.bank import Bank
from streamvid.memory.care import Kind, Problem
from streamvid.memory.kv import intact_kv
from streamvid.memory.records import SourceRecord, SpanRecord
from streamvid.memory.snapshots import FOLDER_NAME

NAMED = 8
"""Sources that are named as losing a codebook; more are counted."""


@dataclass(slots=True)
class Needing:
    """The spans of a source that need a codebook."""

    name: str
    start: Fraction
    stop: Fraction
    spans: int = 0


class Books:
    """Which spans need which codebook; as large as there are sources."""

    def __init__(self) -> None:
        self._needing: dict[str, dict[int, Needing]] = {}

    def need(self, books: tuple[str, ...], source: SourceRecord, span: SpanRecord) -> None:
        """Count a span for the codebooks that it names."""
        for book in {*books} - {""}:
            told = self._needing.setdefault(book, {}).setdefault(source.id, Needing(source.name, span.start, span.stop))
            told.start, told.stop = min(told.start, span.start), max(told.stop, span.stop)
            told.spans += 1

    def digests(self) -> set[str]:
        """Of all that are needed."""
        return {*self._needing}

    def lost(self, digest: str) -> str:
        """What cannot be decoded without a codebook; empty if nothing."""
        told = [*self._needing.get(digest, {}).values()]
        named = [f"{n.name} {float(n.start):.3f}-{float(n.stop):.3f} s ({n.spans} spans)" for n in told[:NAMED]]
        return ", ".join([*named, *([f"{len(told) - NAMED} more sources"] if len(told) > NAMED else [])])


def examine_codebooks(folder: Path, needed: Books, *, every: bool) -> Iterator[Problem]:
    """Codebooks that spans need and that are not there, or whose bytes do not give their name."""
    there = {path.stem: path for path in sorted(folder.glob("*.book"))}
    for digest in sorted(needed.digests() - there.keys()):
        yield Problem(
            Kind.CODEBOOK,
            f"codebook {digest} is missing: restore {folder / digest}.book from a copy; until then these cannot be "
            f"decoded: {needed.lost(digest)}",
            file=f"codebooks/{digest}.book",
        )
    for digest, path in there.items():
        lost = needed.lost(digest)
        if (every or lost) and _sha256(path) != digest:
            what = f"restore it from a copy; until then these cannot be decoded: {lost}" if lost else "no span needs it"
            yield Problem(
                Kind.CODEBOOK if lost else Kind.SPARE,
                f"codebook {path} is damaged: its bytes do not give its name; {what}",
                file=f"codebooks/{path.name}",
            )


def examine_spare(bank: Bank, only: set[int] | None = None) -> Iterator[Problem]:
    """Saved indexes and kept keys and values that are not as written.

    Args:
        bank: may be written meanwhile.
        only: of these sources; None: of all, and what is of none.
    """
    catalog = bank._catalog
    for record in catalog.snapshots():
        path = bank.folder / FOLDER_NAME / record.file
        if only is not None and record.source_id not in only:
            continue
        try:
            intact = path.stat().st_size == record.num_bytes and _sha256(path) == record.digest
            how = "damaged"
        except OSError:
            intact, how = False, "missing or unreadable"
        if not intact and record in catalog.snapshots():
            yield Problem(
                Kind.SPARE,
                f"saved index {FOLDER_NAME}/{record.file} is {how}: it is made anew when it is next needed",
                record.source_id,
                f"{FOLDER_NAME}/{record.file}",
            )
    kept = {path.name: path for path in sorted((bank.folder / "kv").glob("*.safetensors"))}
    for source_id in catalog.source_ids() if only is None else sorted(only):
        if not kept:
            return
        source = catalog.source_by_id(source_id)
        if source is None:
            continue
        path_or_none = kept.pop(bank._kv_path(source).name, None)
        if path_or_none is not None and not intact_kv(path_or_none, digest=source.key.digest):
            yield Problem(
                Kind.SPARE,
                f"kept keys and values kv/{path_or_none.name} are damaged or of an older format: "
                f"they are computed anew with the next question about {source.name}",
                source_id,
                f"kv/{path_or_none.name}",
            )
    for name in kept if only is None else ():
        yield Problem(Kind.SPARE, f"kept keys and values kv/{name} are of no source", file=f"kv/{name}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
