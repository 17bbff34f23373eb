"""The bank: everything remembered in one folder.

::

    FOLDER/catalog.sqlite3              what there is, and where: the truth
    FOLDER/segments/<key>-<id>/*.seg    the tokens of one source
    FOLDER/index/                       saved search indexes, which can be made anew
    FOLDER/locks/                       who is writing

Any number of processes read while each source is written by at most one.  A span is either wholly
there or not at all, whenever a process is killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from streamvid.budget import Limits
from streamvid.errors import BankError, SourceError, Vanished, near
from streamvid.memory import bounds
from streamvid.memory import keys as keys_module
from streamvid.memory.catalog import Catalog
from streamvid.memory.codebooks import Codebooks
from streamvid.memory.codec import DEFAULT_CODEC, CodecSetting, FolderCodecs
from streamvid.memory.folder import refuse_headless, reported, writable
from streamvid.memory.index import Index
from streamvid.memory.keys import MemoryKey
from streamvid.memory.kv import KeptKv, folder_bytes, load_kv, save_kv, size_of
from streamvid.memory.records import AnswerRecord, ExpiredRecord, GapRecord, SourceRecord, SpanRecord, Totals
from streamvid.memory.schema import FILE_NAME, refuse_foreign
from streamvid.memory.segments import SegmentReader
from streamvid.memory.snapshots import Scope, Snapshots
from streamvid.memory.writer import Writer
from streamvid.temporal.methods.base import MemoryView, StoredKeys
from streamvid.tokens import VideoTokens

SEGMENT_BYTES = 256 << 20

SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again without its time stamps showing it."""

SHORTEST_PREFIX = 4
"""Digits of a key that are enough to name a source."""


class Bank:
    """What is remembered in one folder; made by `Bank.open`, a context manager.

    One bank belongs to one thread; open another for another thread, or after a fork.
    """

    def __init__(self, folder: Path, catalog: Catalog, *, codec: str, limits: Limits, segment_bytes: int) -> None:
        self.folder = folder
        self.limits = limits
        self.bytes_read = 0
        """Read from segment files since the bank was opened."""
        self.notes: list[str] = []
        """What the user should hear about how the folder was opened."""
        self._catalog = catalog
        self.codecs = FolderCodecs(CodecSetting.parse(codec), Codebooks(folder / "codebooks"))
        """How features are stored, and what was learned for it."""
        self._segment_bytes = bounds.segment_bytes(limits, segment_bytes)
        self._snapshots = Snapshots(folder, catalog, may_grow=self._may_grow)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        codec: str = DEFAULT_CODEC,
        limits: Limits | None = None,
        create: bool = True,
        segment_bytes: int = SEGMENT_BYTES,
        read_only: bool = False,
    ) -> Self:
        """Open a memory folder.

        Args:
            folder: the folder; its parents need not exist.
            codec: how new features are stored: ``fp32``, ``fp16``, ``sq8``, ``sq4`` or ``pq``, or
                FEATURES+LAYERS as in ``sq8+sq4``.  What is there already is read by the codec it was
                written with.
            limits: ``disk_bytes`` bounds the folder; about half a MB of it is held free for the catalogue.
            create: make the folder if there is no memory in it; otherwise that is an error.
            segment_bytes: size at which a new segment file is begun, >= 1.
            read_only: change nothing in the folder.  A memory that cannot be written is opened so by
                itself, and ``notes`` says it.

        Raises:
            SettingsError: if there is no such codec.
            BankError: if the folder cannot be used; nothing in it was changed.
        """
        if segment_bytes < 1:
            raise ValueError(f"segment_bytes must be at least 1, got {segment_bytes}")
        CodecSetting.parse(codec)
        path = folder / FILE_NAME
        with reported(folder):
            if not (create and not read_only) and not path.exists():
                with suppress(FileNotFoundError):
                    os.stat(f"{folder}/.")  # a file in its place is said to be one
                refuse_headless(folder)
                raise BankError(f"there is no memory in {folder}; ask about a video first, or choose another folder")
            refuse_foreign(path)
            notes = []
            if path.exists() and not read_only and not writable(folder):
                read_only = True
                notes.append(f"{folder} cannot be written: it is open for reading only, and nothing new is remembered")
            if read_only:
                catalog = Catalog(path, read_only=True)
                notes += [catalog.note] if catalog.note else []
                bank = cls(folder, catalog, codec=codec, limits=limits or Limits(), segment_bytes=segment_bytes)
                bank.notes = notes
                return bank
            if not path.exists() or not path.stat().st_size:
                refuse_headless(folder)
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            (folder / "segments").mkdir(exist_ok=True)
            # Two processes may both be the first: one prepares the catalogue, the other finds it done.
            with open(folder / "locks" / "open.lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                catalog = Catalog(path)
        return cls(folder, catalog, codec=codec, limits=limits or Limits(), segment_bytes=segment_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the catalogue."""
        self._catalog.close()

    @property
    def read_only(self) -> bool:
        """Whether nothing can be stored in it."""
        return self._catalog.read_only

    def find(self, key: MemoryKey) -> SourceRecord | None:
        """The source remembered under exactly this key; None if anything about it differs."""
        return self._catalog.source(key.digest)

    def sources(self) -> list[SourceRecord]:
        """All sources, oldest first."""
        return self._catalog.sources()

    def source(self, which: int | str) -> SourceRecord:
        """One source, by id, by the first digits of its key (at least four), by name or by path.

        Raises:
            BankError: if there is none, with near names, or if there are several, with their ids.
        """
        sources = self.sources()
        text = str(which)
        found = [s for s in sources if text == str(s.id)]
        if not found and isinstance(which, str):
            found = [
                s
                for s in sources
                if text in (s.name, s.path) or (len(text) >= SHORTEST_PREFIX and s.key.digest.startswith(text))
            ]
        if len(found) == 1:
            return found[0]
        if found:
            listing = ", ".join(f"{s.id} ({s.name}, key {s.key.short})" for s in found)
            raise BankError(f"{text!r} names {len(found)} remembered sources; say which by its id: {listing}")
        if not sources:
            raise BankError(f"nothing is remembered in {self.folder}; ask about a video first")
        names = [name for s in sources for name in (str(s.id), s.name, s.key.short)]
        raise BankError(f"{text!r} is not remembered in {self.folder}; {near(text, names)}")

    def spans(self, source_id: int, *, ends: int | None = None) -> list[SpanRecord]:
        """The spans of a source in time order; with ``ends`` only so many oldest and newest."""
        return self._catalog.spans(source_id, ends=ends)

    def each_span(self, source_id: int) -> Iterator[SpanRecord]:
        """The spans of a source in time order, one in memory at a time."""
        return self._catalog.each_span(source_id)

    def level_counts(self, source_id: int) -> dict[int, int]:
        """How many spans of a source were merged how often: by level, rising; 0 is as watched."""
        return dict(sorted(self._catalog.level_counts(source_id).items()))

    def totals(self, source_id: int) -> Totals:
        """How many answers, gaps and forgotten stretches a source has; reads no record."""
        return self._catalog.totals(source_id)

    def records(self, span_ids: Sequence[int]) -> list[SpanRecord]:
        """Spans by id, in the order asked; those that are gone are left out."""
        return [span for span, _ in self._catalog.entries(span_ids)]

    def view(self, source_id: int) -> tuple[Tensor, MemoryView]:
        """What a recall method sees of a source: 32 bytes a span; keys are read as they are looked at.

        Returns:
            ids (S,) int64 in time order, for `records`, and what is known of those spans.  A span that was
            merged or expired later has no keys any more.
        """
        with self._catalog.snapshot():
            ids, start, stop, tokens = self._catalog.span_columns(source_id)
            width = self._catalog.key_width(source_id) or 0
        keys = StoredKeys(lambda rows: self._keys(ids[rows], width), width)
        return ids, MemoryView(start, stop, tokens, keys)

    def read(self, wanted: Sequence[tuple[SpanRecord, int]]) -> list[VideoTokens]:
        """The best tokens of some spans, each in raster and time order, in the order asked.

        Args:
            wanted: spans of any sources, each with how many of its tokens to read, 1 <= count <= span.tokens.

        Raises:
            BankError: if a span is gone, damaged, or not of the source the catalogue says.  A span that was
                merged or expired after it was looked up may still be there, or the error says to ask again.
        """
        sources = {s.id: s for s in self.sources()}
        readers: dict[Path, SegmentReader] = {}
        result = []
        try:
            for span, count in wanted:
                if not 1 <= count <= span.tokens:
                    raise ValueError(
                        f"span {span.id} has {span.tokens} tokens, asked for {count}; leave out what is not read"
                    )
                if span.source_id not in sources:
                    raise Vanished(
                        f"source {span.source_id} was removed from {self.folder}; ask again to watch it anew"
                    )
                result.append(self._read_span(readers, sources[span.source_id], span, count))
        finally:
            for reader in readers.values():
                self.bytes_read += reader.bytes_read
                reader.close()
        return result

    def index(self, source_id: int | None, *, embedder: str | None = None, kind: str = "auto") -> Index:
        """An index over the keys of a source, or of all sources of one embedder; ids are span ids.

        It is brought up to date by each call and good until the next one, while the bank is open.

        Args:
            source_id: of a source with at least one span; None for every source of ``embedder``.
            embedder: fingerprint of what made the keys, as in their memory keys; needed where there is no source.
            kind: ``flat``, ``faiss`` (flat, too), ``hnsw``, ``ivf``, ``ivf-flat``, ``ivfpq``, ``gpu``, or
                ``auto``: by the number of keys; ``said`` tells which and why.  Without faiss it is flat,
                which the ``note`` of the first such index says.

        Raises:
            MissingExtra: if faiss is asked for by name and not installed.
            SettingsError: if there is no such kind.
            BankError: if there are no spans to search, or they have no keys.
        """
        if source_id is None:
            if embedder is None:
                raise ValueError("an index over all sources needs their embedder: its keys compare with no other's")
            return self._snapshots.index(Scope(None, embedder), kind)
        source = self._catalog.source_by_id(source_id)
        if source is None:
            raise BankError(f"source {source_id} is not in {self.folder}: it was removed; ask again to watch it anew")
        if embedder not in (None, source.key.embedder):
            raise ValueError(f"source {source_id} has keys of {source.key.embedder!r}, asked for {embedder!r}")
        return self._snapshots.index(Scope(source_id, source.key.embedder), kind)

    def usage(self) -> int:
        """Bytes on the disk: segments, codebooks, saved indexes, kept keys and values, and catalogue with its log."""
        catalog = self._catalog
        beside = self.codecs.books.num_bytes() + catalog.snapshot_bytes() + folder_bytes(self.folder / "kv")
        return catalog.segment_bytes() + catalog.own_bytes() + beside

    def writer(self, key: MemoryKey, *, path: str | Path, name: str) -> Writer:
        """What a source's spans are stored with; a context manager that holds the source for writing.

        Args:
            key: what the tokens depend on; a source under this key that is still open goes on where it ended.
            path: where the video is; for people.
            name: what people call it.
        """
        return Writer(self, key, path=str(path), name=name)

    def remove(self, which: SourceRecord | int | str) -> SourceRecord:
        """Forget a source: its spans, tokens and answers; returns what it was.

        Raises:
            BankError: if there is no such source (see `source`), or it is being written.
        """
        source = self.source(which.id if isinstance(which, SourceRecord) else which)
        with reported(self.folder), self._locked(source.key, source.name):
            # First from the catalogue: files without rows are only lost space, rows without files are wrong.
            self._catalog.remove_source(source.id)
            shutil.rmtree(self.folder / source.folder, ignore_errors=True)
            self._kv_path(source).unlink(missing_ok=True)
            self._sweep()
        return source

    def save_answer(self, source_id: int, *, question: str, answer: str, receipt: Mapping[str, Any]) -> int:
        """Keep an answer with its receipt (JSON values); returns its id."""
        return self._catalog.add_answer(source_id, question=question, answer=answer, receipt=receipt)

    def answers(self, source_id: int, *, ends: int | None = None) -> list[AnswerRecord]:
        """The answers given from a source, oldest first; with ``ends`` only so many oldest and newest."""
        return self._catalog.answers(source_id, ends=ends)

    def kept_kv(self, source: SourceRecord) -> KeptKv | None:
        """What the language model computed for the latest prompt of a source, if it was kept; on the CPU."""
        return load_kv(self._kv_path(source), digest=source.key.digest)

    def keep_kv(self, source: SourceRecord, kept: KeptKv) -> None:
        """Keep what the language model computed for a prompt of a source, in place of an earlier one's.

        Raises:
            BankError: if it does not fit the limit or the disk; the earlier one stays.
        """
        if self.read_only:
            raise BankError(f"{self.folder} is open for reading only: keys and values are not kept")
        limit, needed = self.limits.disk_bytes, size_of(kept.layers)
        if limit is not None and self.usage() + needed > limit:
            raise BankError(
                f"keys and values of {needed} bytes are not kept: memory in {self.folder} may hold {limit} bytes and "
                f"holds {self.usage()}; raise the limit (--disk) or ask with a smaller --budget"
            )
        with reported(self.folder):
            save_kv(self._kv_path(source), kept, digest=source.key.digest)

    def _kv_path(self, source: SourceRecord) -> Path:
        return self.folder / "kv" / f"{Path(source.folder).name}.safetensors"

    def gaps(self, source_id: int, *, ends: int | None = None) -> list[GapRecord]:
        """The stretches of a source of which nothing was seen, in time order; with ``ends`` so many first and last."""
        return self._catalog.gaps(source_id, ends=ends)

    def expired(self, source_id: int, *, ends: int | None = None) -> list[ExpiredRecord]:
        """What of a source was remembered once and is not any more; with ``ends`` so many first and last."""
        return self._catalog.expired(source_id, ends=ends)

    def pin(self, which: SourceRecord | int | str, *, pinned: bool = True) -> SourceRecord:
        """Keep a source when space is made, or no longer; returns what it is now."""
        source = self.source(which.id if isinstance(which, SourceRecord) else which)
        self._catalog.set_pinned(source.id, pinned)
        return self.source(source.id)

    def content_digest(self, path: Path) -> str:
        """sha256 over the whole file, reread only when the file may have changed.

        The digest is remembered under the absolute path with size, inode, time of the last write and time
        of the last change of any kind (mtime and ctime, in nanoseconds).  That is a trade: a second
        question on a 10 GB file starts at once, and in return we trust the file system to move a stamp when
        bytes change.  ctime is in it because programs can set mtime back and cannot set ctime; it also
        moves on chmod and rename, which costs one needless reading.  A file changed in the last 2 s is not
        remembered, as coarse clocks could give its next change the same stamp.  What remains: a file system
        that keeps no true ctime, and bytes changed underneath it.

        Raises:
            SourceError: if the file cannot be read, or changes while it is.
        """
        path = Path(os.path.abspath(path))
        stamp, changed_ns = _stamp(path)
        known = self._catalog.content_digest(str(path), stamp=stamp)
        if known is not None:
            return known
        now_ns = time.time_ns()
        digest = keys_module.content_digest(path)
        if _stamp(path)[0] != stamp:
            raise SourceError(f"{path} changed while it was read; wait until it is complete and ask again")
        if now_ns - changed_ns >= SETTLED_NS and not self.read_only:
            self._catalog.remember_digest(str(path), stamp=stamp, digest=digest)
        return digest

    def _read_span(
        self, readers: dict[Path, SegmentReader], source: SourceRecord, span: SpanRecord, count: int
    ) -> VideoTokens:
        """The best tokens of a span, which may have been moved, merged or expired since it was looked up."""
        while True:
            path = self.folder / source.folder / span.file
            try:
                if path not in readers:
                    readers[path] = SegmentReader(path, key=source.key, codecs=self.codecs)
                head = readers[path].head(span.offset)
                if (head.start, head.stop, head.tokens) == (span.start, span.stop, span.tokens):
                    return readers[path].read(span.offset, tokens=count)
                error = BankError(
                    f"{path} holds another span at offset {span.offset} than the catalogue says; "
                    f"run: streamvid memory repair --memory {self.folder}"
                )
            except BankError as caught:
                error = caught
            now = self._catalog.span(span.id)
            if now is None:
                raise Vanished(
                    f"what was remembered of {source.name} from {float(span.start):.1f} to {float(span.stop):.1f} s "
                    "was merged or expired to make room since it was looked up; ask again"
                ) from error
            if (now.file, now.offset) == (span.file, span.offset):
                raise error
            span = now

    def _first_tokens(self, model: str, count: int) -> list[Tensor]:
        """Features, then each layer, of the first ``count`` tokens stored of a model; fewer where there are fewer."""
        parts: list[list[Tensor]] = []
        found = 0
        for source in self.sources():
            if source.key.model != model or found >= count:
                continue
            for span in self.spans(source.id):
                if span.tokens and found < count:
                    tokens = self.read([(span, span.tokens)])[0]
                    parts.append([tokens.features, *tokens.layers])
                    found += len(tokens)
        return [torch.cat(blocks)[:count] for blocks in zip(*parts, strict=True)] or [torch.zeros(0, 0)]

    def _keys(self, ids: Tensor, width: int) -> Tensor:
        """(M, K, width) the keys of spans, rows of zeros where there are fewer."""
        if not width or not len(ids):
            return torch.zeros(len(ids), 0, width)
        found, keys = self._catalog.keys_of(ids, width=width)
        held, counts = torch.unique(found, return_counts=True)
        table = torch.zeros(len(held) + 1, int(counts.max()) if len(counts) else 0, width)
        place = torch.arange(len(found)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        table[torch.arange(len(held)).repeat_interleave(counts), place] = keys
        at = torch.searchsorted(held, ids).clamp(max=max(len(held) - 1, 0))
        there = held[at] == ids if len(held) else torch.zeros(len(ids), dtype=torch.bool)
        return table[torch.where(there, at, len(held))]

    def _may_grow(self, num_bytes: int) -> bool:
        limit = self.limits.disk_bytes
        return limit is None or self.usage() + num_bytes <= limit

    @contextmanager
    def _locked(self, key: MemoryKey, name: str) -> Iterator[None]:
        """Hold a source for writing; the system lets go of it when the process ends, however it does."""
        if self.read_only:
            raise BankError(
                f"{self.folder} is open for reading only and {name} cannot be written there; "
                "check permissions, or choose another memory folder"
            )
        with open(self.folder / "locks" / f"{key.digest[:32]}.lock", "a+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read(20).decode("ascii", "replace").strip()
                raise BankError(
                    f"{name} is being written by process {holder or 'unknown'}; wait until it is done or stop it, "
                    "then run the same again"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()).encode("ascii"))
            lock.flush()
            yield

    def _sweep(self) -> None:
        """Give back the space of sources that were removed by a process that did not live to do it."""
        # Folders first: a source enters the catalogue before it gets a folder.
        folders = [entry.name for entry in os.scandir(self.folder / "segments")]
        known = {s.folder for s in self.sources()}
        for name in folders:
            if f"segments/{name}" not in known:
                shutil.rmtree(self.folder / "segments" / name, ignore_errors=True)
        self._snapshots.sweep()


def _stamp(path: Path) -> tuple[str, int]:
    """What must be unchanged for a file to count as unchanged, and when it last changed, in ns."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    text = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_dev} {stat.st_ino}"
    return text, max(stat.st_ctime_ns, stat.st_mtime_ns)
