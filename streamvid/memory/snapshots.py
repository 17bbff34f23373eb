"""Search indexes of a memory folder: made from the catalogue, saved beside it, and brought up to date.

::

    FOLDER/index/<scope>-<last span>-<random>.index     FAISS's file, then ids, then what it is

A saved index saves time and nothing else.  One that is missing, damaged, of another version or of spans
that are mostly gone is put aside for a new one; what is found never depends on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamvid.errors import BankError
from streamvid.memory.catalog import Catalog
from streamvid.memory.faiss_index import (
    REMOVED_SHARE,
    TAIL_SHARE,
    ApproximateIndex,
    choose_kind,
    load_faiss,
    new_index,
)
from streamvid.memory.index import BLOCK_IDS, FlatIndex, Index
from streamvid.memory.records import SnapshotRecord

FOLDER_NAME = "index"

FORMAT = 1
"""Of what stands after FAISS's part; raised when what was written before can no longer be read."""

MAGIC = b"SvIndex1"
"""Ends every file, after the length of the JSON before it."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What an index searches: one source, or all sources whose keys one embedder made."""

    source_id: int | None
    """None for all sources of the embedder."""

    embedder: str

    @property
    def name(self) -> str:
        """For file names."""
        if self.source_id is not None:
            return f"source{self.source_id}"
        return f"all{hashlib.sha256(self.embedder.encode()).hexdigest()[:12]}"


class CatalogKeys:
    """The exact keys of some sources, read from the catalogue as they are asked for; good while it is open."""

    def __init__(self, catalog: Catalog, source_ids: Callable[[], list[int]], *, width: int) -> None:
        self._catalog, self._source_ids, self._width = catalog, source_ids, width
        self.until = 0
        """Highest span id that counts: what is stored meanwhile comes when its turn does."""

    def ids(self) -> Tensor:
        """See `streamvid.memory.index.ExactKeys`."""
        ids = self._catalog.scope_ids(self._source_ids())
        return ids[ids <= self.until]

    def keys(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `streamvid.memory.index.ExactKeys`."""
        return self._catalog.keys_of(ids, width=self._width)


@dataclass(slots=True)
class _Held:
    """An index in use, and how much of the catalogue is in it."""

    index: Index
    exact: CatalogKeys
    spans: int = 0
    last: int = 0
    """Highest span id that was taken in."""

    tried: int = 0
    """How many keys there were when it was last saved, or could not be."""


class Snapshots:
    """Gives indexes that are up to date with the catalogue, by the shortest way there is.

    An index that was given before takes in the spans stored since and forgets those removed; otherwise
    the newest saved one is opened, which is mapped and not read, and does the same; otherwise it is made
    from the catalogue.  A lossy index is saved once it was trained (from 20,000 keys on; reading fewer from
    the catalogue takes a tenth of a second), and again when the keys that came since are more than its
    tail holds (2 % of all).  Older ones are deleted after the new one is entered.

    Args:
        folder: of the memory.
        catalog: of the memory, open.
        may_grow: says whether the folder may grow by so many bytes.
    """

    def __init__(self, folder: Path, catalog: Catalog, *, may_grow: Callable[[int], bool] = lambda _: True) -> None:
        self._folder = folder / FOLDER_NAME
        self._lock = folder / "locks" / "index.lock"
        self._catalog = catalog
        self._may_grow = may_grow
        self._held: dict[tuple[Scope, str], _Held] = {}
        self._counted: dict[Scope, tuple[tuple[int, int], tuple[int, int]]] = {}
        self._notes: list[str] = []
        self._said: set[str] = set()

    def index(self, scope: Scope, kind: str = "auto") -> Index:
        """The index of a scope; its ``note`` says what the user should hear, each thing once.

        The same index is given again and again: it is good until the next call for its scope, and while
        the catalogue is open.

        Raises:
            SettingsError: if there is no such kind.
            MissingExtra: if FAISS is needed and not installed.
            BankError: if there is nothing to search.
        """
        sources = self._source_ids(scope)
        version = self._catalog.version()
        if self._counted.get(scope, (None,))[0] != version:
            # The one thing here that takes longer the more spans there are: 70 ms for a million.
            self._counted[scope] = (version, self._catalog.scope_size(sources))
        size = self._counted[scope][1]
        what = f"source {scope.source_id}" if scope.source_id is not None else "memory"
        if not size[0]:
            raise BankError(f"{what} has no spans to search yet; watch it first")
        width = next((w for w in map(self._catalog.key_width, sources) if w is not None), 0)
        if not width:
            raise BankError(f"{what} was watched without an embedder and has no keys to search; watch it with one")
        chosen, why = choose_kind(kind, round(size[0] * self._catalog.keys_per_span(sources, width=width)))
        held = self._held.get((scope, chosen))
        if held is None:
            # Of one scope one index is enough in memory.
            self._held = {key: value for key, value in self._held.items() if key[0] != scope}
            exact = CatalogKeys(self._catalog, lambda: self._source_ids(scope), width=width)
            held = _Held(new_index(chosen, width, exact=exact), exact)
            self._fill(held, scope, size)
            self._held[scope, chosen] = held
        else:
            self._follow(held, scope, size)
        held.index.chosen = why
        if why and chosen == FlatIndex.kind:
            self._note(f"searching memory without faiss, which is as exact and slower on large banks: {why}")
        held.index.note = "; ".join(self._notes)
        self._notes = []
        return held.index

    def _source_ids(self, scope: Scope) -> list[int]:
        return self._catalog.embedder_sources(scope.embedder) if scope.source_id is None else [scope.source_id]

    def _fill(self, held: _Held, scope: Scope, size: tuple[int, int]) -> None:
        """Open a saved index, or make one."""
        index = held.index
        if not isinstance(index, ApproximateIndex):
            self._follow(held, scope, size)
            return
        tried = None
        while (record := self._newest(scope, index.kind)) is not None and record.file != tried:
            if self._restore(held, scope, index, record):
                self._follow(held, scope, size)
                return
            # Once more if another process has put a newer one in place meanwhile.
            tried = record.file
        held.spans, held.last = size
        held.exact.until = held.last
        index.rebuild()
        self._save(held, scope, index)

    def _newest(self, scope: Scope, kind: str) -> SnapshotRecord | None:
        wanted = (scope.source_id, scope.embedder, kind)
        return next((r for r in self._catalog.snapshots() if (r.source_id, r.embedder, r.kind) == wanted), None)

    def _follow(self, held: _Held, scope: Scope, size: tuple[int, int]) -> None:
        """Take in what was stored since, and forget what was removed."""
        index, sources = held.index, self._source_ids(scope)
        spans, last = size
        if size == (held.spans, held.last):
            return
        new = self._catalog.scope_ids(sources, after=held.last)
        new = new[new <= last]
        # Ids are never used twice: fewer spans than were here and came since means that some are gone.
        now = self._catalog.scope_ids(sources) if held.spans + len(new) != spans else None
        if now is not None:
            known = index.ids()
            index.remove(known[~torch.isin(known, now)])
        for first in range(0, len(new), BLOCK_IDS):
            part = new[first : first + BLOCK_IDS]
            held.exact.until = int(part[-1])
            index.add(*held.exact.keys(part))
        held.spans, held.last, held.exact.until = spans, last, last
        if isinstance(index, ApproximateIndex):
            self._save(held, scope, index)

    def _restore(self, held: _Held, scope: Scope, index: ApproximateIndex, record: SnapshotRecord) -> bool:
        """Open a saved index; says why if it cannot."""
        path = self._folder / record.file
        try:
            about, ids = self._read(path, record, width=index.width)
            left = self._catalog.scope_size(self._source_ids(scope), until=record.last_span_id)[0]
            if not (1 - REMOVED_SHARE) * about["spans"] <= left <= about["spans"]:
                raise BankError(f"of its {about['spans']} spans {left} are left")
            index.restore(path, ids=ids, trained_keys=about["trained_keys"])
        except BankError as error:
            self._note(f"the saved search index {record.file} could not be used and was made anew: {error}")
            return False
        held.spans, held.last, held.exact.until = about["spans"], record.last_span_id, record.last_span_id
        held.tried = len(index)
        return True

    def _read(self, path: Path, record: SnapshotRecord, *, width: int) -> tuple[dict[str, Any], Tensor]:
        """What a file says of itself, and the ids of its keys, if it is what the catalogue says."""
        try:
            if path.stat().st_size != record.num_bytes or self._digest(path) != record.digest:
                raise BankError("it is damaged")
            with open(path, "rb") as file:
                file.seek(-16, os.SEEK_END)
                length, magic = int.from_bytes(file.read(8), "little"), file.read(8)
                if magic != MAGIC or not 0 < length < record.num_bytes:
                    raise BankError("it is of another version")
                file.seek(-16 - length, os.SEEK_END)
                about = json.loads(file.read(length))
                expected = {"format": FORMAT, "faiss": load_faiss().__version__, "kind": record.kind, "width": width}
                if any(about.get(name) != value for name, value in expected.items()):
                    raise BankError("it is of another version")
                file.seek(-16 - length - 8 * about["vectors"], os.SEEK_END)
                ids = np.fromfile(file, "<i8", about["vectors"]).astype(np.int64, copy=False)
        except FileNotFoundError:
            raise BankError("it is missing") from None
        except OSError as error:
            raise BankError(f"it cannot be read ({error.strerror})") from error
        return about, torch.from_numpy(ids)

    def _save(self, held: _Held, scope: Scope, index: ApproximateIndex) -> None:
        """Write an index that is worth it beside the catalogue and enter it; does without where it cannot."""
        changed = abs(len(index) - held.tried) > TAIL_SHARE * held.tried
        if self._catalog.read_only or index.saved or not index.trained_keys or not changed:
            return
        held.tried = len(index)
        try:
            with self._alone() as alone:
                if alone:
                    self._write(held, scope, index)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "the disk may be full"
            self._note(f"the search index could not be saved in {self._folder} ({reason}); it is made anew next time")

    def _write(self, held: _Held, scope: Scope, index: ApproximateIndex) -> None:
        self._folder.mkdir(exist_ok=True)
        name = f"{scope.name}-{held.last}-{secrets.token_hex(4)}.index"
        path, unfinished = self._folder / name, self._folder / f"{name}.tmp"
        try:
            ids = index.write(unfinished)
            about = {
                "format": FORMAT,
                "faiss": load_faiss().__version__,
                "kind": index.kind,
                "width": index.width,
                "vectors": len(ids),
                "spans": held.spans,
                "trained_keys": index.trained_keys,
            }
            text = json.dumps(about, sort_keys=True).encode("ascii")
            with open(unfinished, "ab") as file:
                file.write(ids.numpy().astype("<i8", copy=False).tobytes())
                file.write(text + len(text).to_bytes(8, "little") + MAGIC)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            if not self._may_grow(size):
                self._note(f"the search index was not saved: its {size} bytes would go beyond the limit of the memory")
                return
            digest = _sha256(unfinished)
            os.rename(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_folder(self._folder)
        self._catalog.add_snapshot(
            SnapshotRecord(
                source_id=scope.source_id,
                embedder=scope.embedder,
                kind=index.kind,
                width=index.width,
                vectors=len(ids),
                last_span_id=held.last,
                file=name,
                num_bytes=size,
                digest=digest,
            )
        )
        # Mapped from here on: what was in memory for building is given back.
        index.restore(path, ids=ids, trained_keys=index.trained_keys)
        self._sweep()

    def _sweep(self) -> None:
        """Delete what the catalogue does not know; only while no other process saves."""
        known = {record.file for record in self._catalog.snapshots()}
        for entry in os.scandir(self._folder):
            if entry.name not in known:
                os.unlink(entry.path)
                self._catalog.forget_digest(os.path.abspath(entry.path))

    def sweep(self) -> None:
        """Give back the space of saved indexes that are no longer in the catalogue, as of removed sources."""
        if self._catalog.read_only or not self._folder.is_dir():
            return
        with self._alone() as alone:
            if alone:
                self._sweep()

    def _digest(self, path: Path) -> str:
        """sha256 of a file, remembered under its stamps like that of a video: reading 800 MB takes half a second."""
        stat = path.stat()
        stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_dev} {stat.st_ino}"
        known = self._catalog.content_digest(str(path.absolute()), stamp=stamp)
        if known is not None:
            return known
        digest = _sha256(path)
        if not self._catalog.read_only:
            self._catalog.remember_digest(str(path.absolute()), stamp=stamp, digest=digest)
        return digest

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process saves an index now."""
        with open(self._lock, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._notes.append(text)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
