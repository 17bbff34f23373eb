"""Search by FAISS, and the one place that imports it."""

from __future__ import annotations

import importlib
import math
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from streamvid.errors import BankError, MissingExtra, SettingsError, UnsupportedError, near
from streamvid.memory.index import ExactKeys, FlatIndex, Index, best_of, distinct, key_blocks

FLAT_KEYS = 20_000
"""Up to here comparing with every key takes 2 to 4 ms on one core at 768 numbers, and nothing is gained by less."""

SQ8_KEYS = 5_000_000
"""Up to here one byte a number is kept (3.9 GB at 768, mapped from the disk); beyond, an eighth of a byte."""

TAIL_SHARE = 0.02
"""New keys, as a share of all, that are compared one by one before they are sorted into the index."""

TAIL_KEYS = 10_000
"""The same as a number, for indexes that are small."""

TRAIN_PER_LIST = 64
"""Keys a list's centre is learned from; FAISS asks for 39 at least and stops looking beyond 256."""

REMOVED_SHARE = 0.2
"""An index is trained anew when more than this share of its codes stands for removed ids."""

SQ8_MARGIN = 0.5
"""How far a byte reaches beyond what was seen in training, on each side, as a share of the range.

Keys drift, and what lies outside is cut off: without it recall falls to 0.95 where keys have drifted away.
"""

PROBES = 32
"""Lists that are searched, of about the square root of the number of keys: at 10^6 keys 1024, so 3 %."""

CANDIDATES = 100
"""Fewest keys that lossy codes put forward for exact comparison."""

OVERSAMPLE = 10
"""Keys put forward for each id asked for."""

SCAN_SHARE = 4
"""Asked for more than a quarter of all keys, every key is compared exactly: it is no slower then."""


def load_faiss() -> Any:
    """The faiss module.

    Raises:
        MissingExtra: if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # SWIG's own types lack __module__, which newer Pythons complain about on import.
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("faiss")
    except ImportError as error:
        raise MissingExtra("faiss", extra="cpu") from error


class FaissIndex(Index):
    """Exact search by FAISS's flat inner-product index: what `FlatIndex` finds, at FAISS's speed.

    Raises:
        MissingExtra: if faiss is not installed.
    """

    kind = "faiss"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._faiss = load_faiss()
        self._index: Any = self._faiss.IndexIDMap(self._faiss.IndexFlatIP(width))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def ids(self) -> Tensor:
        """See `Index.ids`."""
        return distinct(torch.from_numpy(self._faiss.vector_to_array(self._index.id_map)))

    def _add(self, ids: Tensor, keys: Tensor) -> None:
        self._index.add_with_ids(_array(keys), _array(ids))

    def _remove(self, ids: Tensor) -> None:
        self._index.remove_ids(_array(ids))

    def _best_keys(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        similarity, ids = self._index.search(_array(query[None]), count)
        return torch.from_numpy(ids[0].copy()), torch.from_numpy(similarity[0].copy())

    def _described(self) -> str:
        return "faiss flat (exact)"


class HeldKeys:
    """Exact keys in memory, for an index without a catalogue behind it."""

    def __init__(self, width: int) -> None:
        self._flat = FlatIndex(width)
        self._order: Tensor | None = None

    def add(self, ids: Tensor, keys: Tensor) -> None:
        """Take in unit keys."""
        self._flat.add(ids, keys)
        self._order = None

    def remove(self, ids: Tensor) -> None:
        """Forget ids."""
        self._flat.remove(ids)
        self._order = None

    def ids(self) -> Tensor:
        """See `ExactKeys`."""
        return distinct(self._flat.held[0])

    def keys(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `ExactKeys`."""
        held, keys = self._flat.held
        if self._order is None:
            self._order = torch.argsort(held, stable=True)
            self._sorted = held[self._order]
        ids = distinct(ids)
        first = torch.searchsorted(self._sorted, ids)
        count = torch.searchsorted(self._sorted, ids, right=True) - first
        # Runs of rows, one run an id: the start of each run repeated, plus 0, 1, 2 ... within it.
        within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        rows = self._order[first.repeat_interleave(count) + within]
        return held[rows], keys[rows]


class ApproximateIndex(Index):
    """Looks at the keys that lie near the query only, then compares those exactly.

    Two parts: the *main* part, a trained FAISS index with lossy codes that may be mapped from a file, and
    the *tail*, the newest keys, compared one by one until there are enough of them to be sorted in.  The
    main part puts ids forward; all keys of these are read back exactly (from the catalogue, or from
    memory where there is none) and decide order and similarity.  So a similarity is always the exact one,
    number for number what `FlatIndex` gives for that id; what can be missed is an id that no code put
    forward.  Ties go to the lower id.

    An id that is removed is forgotten at once and its codes stay until the next training.  Asked for more
    than a quarter of what there is, all keys are compared exactly.

    Args:
        width: length of a key, >= 1.
        exact: where exact keys are read back from; None keeps them in memory.  What is added here must be
            there already, and what is removed here gone.
        train_at: keys from which on there is a main part; below, search is exact.
        tail_keys: most keys in the tail, before 2 % of all are more.  Larger searches slower and sorts in
            more rarely.

    Raises:
        MissingExtra: if faiss is not installed.
    """

    exact = False

    retrain_growth: ClassVar[float] = 4.0
    """It is trained anew when it holds more than so many times the keys it was trained for."""

    def __init__(
        self, width: int, *, exact: ExactKeys | None = None, train_at: int = FLAT_KEYS, tail_keys: int = TAIL_KEYS
    ) -> None:
        super().__init__(width)
        self._faiss = load_faiss()
        self._held = HeldKeys(width) if exact is None else None
        self._exact: ExactKeys = self._held if self._held is not None else exact  # type: ignore[assignment]
        self._train_at = train_at
        self._tail_keys = tail_keys
        self._main: Any = None
        self._main_ids = torch.empty(0, dtype=torch.int64)
        self._file: Path | None = None
        self._tail = FlatIndex(width)
        self.trained_keys = 0
        """How many keys the main part was trained for; 0 without one."""

    @abstractmethod
    def _empty(self, count: int) -> Any:
        """An untrained FAISS index for about ``count`` keys, which takes ids."""

    @abstractmethod
    def _effort(self, count: int) -> Any:
        """How hard to search for ``count`` keys: FAISS's search parameters."""

    @abstractmethod
    def _samples(self, count: int) -> int:
        """How many keys to train on for ``count`` keys."""

    def __len__(self) -> int:
        return len(self._main_ids) + len(self._tail)

    def ids(self) -> Tensor:
        """See `Index.ids`."""
        return distinct(torch.cat([self._main_ids, self._tail.held[0]]))

    @property
    def tail(self) -> int:
        """Keys that are compared one by one."""
        return len(self._tail)

    @property
    def saved(self) -> bool:
        """Whether all but the tail is in a file."""
        return self._file is not None

    @property
    def dead_share(self) -> float:
        """Share of codes in the main part whose ids were removed, 0..1; it slows search down and wastes space."""
        total = 0 if self._main is None else int(self._main.ntotal)
        return 1 - len(self._main_ids) / total if total else 0.0

    @property
    def tail_limit(self) -> int:
        """Keys in the tail beyond which they are sorted in."""
        return max(self._tail_keys, int(TAIL_SHARE * len(self._main_ids)))

    def _add(self, ids: Tensor, keys: Tensor) -> None:
        if self._held is not None:
            self._held.add(ids, keys)
        self._tail.add(ids, keys)
        if self._main is None:
            if len(self._tail) >= self._train_at:
                self.rebuild()
        elif len(self._tail) > self.tail_limit:
            self.fold()

    def _remove(self, ids: Tensor) -> None:
        if self._held is not None:
            self._held.remove(ids)
        self._tail.remove(ids)
        self._main_ids = self._main_ids[~torch.isin(self._main_ids, ids)]
        if self.dead_share > REMOVED_SHARE:
            self.rebuild()

    def fold(self) -> None:
        """Sort the tail into the main part; trains anew where that has outgrown its training."""
        if self._main is None or len(self) > self.retrain_growth * self.trained_keys or not self._own_main():
            self.rebuild()
            return
        ids, keys = self._tail.held
        self._main.add_with_ids(_array(keys), _array(ids))
        self._main_ids = torch.cat([self._main_ids, ids]).sort().values
        self._tail = FlatIndex(self.width)
        self._changed()

    def rebuild(self) -> None:
        """Train anew and take in every exact key there is."""
        ids = self._exact.ids()
        self._main, self._file, self.trained_keys = None, None, 0
        self._main_ids, self._tail = torch.empty(0, dtype=torch.int64), FlatIndex(self.width)
        self._changed()
        few = ids[_spread(len(ids), 1000)]
        each = len(self._read(few)) / max(1, len(few))
        total = round(each * len(ids))
        if total < self._train_at:
            for block_ids, keys in key_blocks(self._exact, ids):
                self._tail.add(block_ids, keys)
            return
        main = self._empty(total)
        # Evenly over all ids, as video drifts.
        main.train(_array(self._read(ids[_spread(len(ids), math.ceil(self._samples(total) / each))])))
        parts = [torch.empty(0, dtype=torch.int64)]
        for block_ids, keys in key_blocks(self._exact, ids):
            main.add_with_ids(_array(keys), _array(block_ids))
            parts.append(block_ids)
        self._main, self._main_ids = main, torch.cat(parts).sort().values
        self.trained_keys = len(self._main_ids)

    def write(self, path: Path) -> Tensor:
        """Write the main part, tail sorted in, to a file; returns its ids (M,) int64, rising, one a key."""
        if len(self._tail):
            self.fold()
        if self._main is None:
            raise ValueError(f"{len(self)} keys are too few for an index that is worth a file")
        self._faiss.write_index(self._main, str(path))
        return self._main_ids

    def restore(self, path: Path, *, ids: Tensor, trained_keys: int) -> None:
        """Take the main part from a file that `write` made, mapped where FAISS can, in place of what is here.

        Raises:
            BankError: if FAISS cannot read it, or it is not what `ids` says.
        """
        try:
            main = self._faiss.read_index(str(path), self._mapping())
        except RuntimeError as error:
            raise BankError(f"FAISS cannot read {path.name}") from error
        if main.d != self.width or main.ntotal < len(ids):
            wanted = f"{len(ids)} of {self.width}"
            raise BankError(f"{path.name} holds {main.ntotal} keys of {main.d} numbers, not {wanted}")
        self._main, self._file, self._main_ids = main, path, ids
        self._tail, self.trained_keys = FlatIndex(self.width), trained_keys
        self._changed()

    def _mapping(self) -> int:
        flags: int = self._faiss.IO_FLAG_MMAP | self._faiss.IO_FLAG_READ_ONLY
        return flags

    def _own_main(self) -> bool:
        """Bring a mapped main part into memory, where it can grow; False if its file is gone."""
        if self._file is None:
            return True
        try:
            self._main = self._faiss.read_index(str(self._file))
        except RuntimeError:
            return False
        self._file = None
        return True

    def _changed(self) -> None:
        """Called when the main part is another or has grown."""

    def _read(self, ids: Tensor) -> Tensor:
        return torch.cat([torch.empty(0, self.width), *(keys for _, keys in key_blocks(self._exact, ids))])

    def _put_forward(self, query: Tensor, count: int) -> Tensor:
        found = self._main.search(_array(query[None]), count, params=self._effort(count))[1][0]
        return torch.from_numpy(found[found >= 0])

    def _best_keys(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        parts = [(ids, keys @ query) for ids, keys in key_blocks(self._exact)]
        return best_of(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), count)

    def _best_ids(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self._main is None:
            return self._tail._best_ids(query, k)
        count = max(CANDIDATES, OVERSAMPLE * k)
        while SCAN_SHARE * count < len(self):
            forward = distinct(self._put_forward(query, count))
            newest = self._tail._best_ids(query, k)[0]
            ids, keys = self._exact.keys(distinct(torch.cat([forward, newest])))
            found = distinct(ids)
            # The tail must not make up for what the main part has not put forward yet.
            if int(torch.isin(forward, found).sum()) >= k:
                best = torch.full((len(found),), -torch.inf)
                best = best.scatter_reduce(0, torch.searchsorted(found, ids), keys @ query, "amax")
                return best_of(found, best, k)
            # Many keys an id, or many removed: ask for more.
            count *= 4
        return super()._best_ids(query, k)

    def _described(self) -> str:
        main = "all compared exactly" if self._main is None else self._main_described()
        where = ", mapped" if self._file is not None else ""
        return f"{self.kind} ({main}{where}; found by codes, compared exactly; {len(self._tail)} newest one by one)"

    @abstractmethod
    def _main_described(self) -> str: ...


class IvfIndex(ApproximateIndex):
    """Keys sorted into lists by the nearest of many centres, one byte a number; the nearest lists are searched.

    There are about as many lists as the square root of the number of keys, of which 32 are searched.
    """

    kind = "ivf"
    codes: ClassVar[str] = "SQ8"

    def _lists(self, count: int) -> int:
        return 1 << round(math.log2(max(count, 64)) / 2)

    def _samples(self, count: int) -> int:
        return TRAIN_PER_LIST * self._lists(count)

    def _empty(self, count: int) -> Any:
        index = self._coded(self._faiss.IndexFlatIP(self.width), self._lists(count))
        # Otherwise FAISS prints advice to stderr when a small index is trained.
        index.cp.min_points_per_centroid = 1
        return index

    def _coded(self, centres: Any, lists: int) -> Any:
        sq8, metric = self._faiss.ScalarQuantizer.QT_8bit, self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.IndexIVFScalarQuantizer(centres, self.width, lists, sq8, metric)
        index.sq.rangestat_arg = SQ8_MARGIN
        return index

    def _effort(self, count: int) -> Any:
        # More candidates than usual are wanted where too few were found: then more lists, too.
        return self._faiss.SearchParametersIVF(nprobe=PROBES * max(1, count // (10 * CANDIDATES)))

    def _main_described(self) -> str:
        return f"{self._main.nlist} lists, {self.codes}"


class IvfFlatIndex(IvfIndex):
    """Like `IvfIndex` with codes that lose nothing: four times the bytes, for keys that differ very little."""

    kind = "ivf-flat"
    codes = "whole keys"

    def _coded(self, centres: Any, lists: int) -> Any:
        return self._faiss.IndexIVFFlat(centres, self.width, lists, self._faiss.METRIC_INNER_PRODUCT)


class IvfPqIndex(IvfIndex):
    """Like `IvfIndex` with one byte for each eight numbers (product quantisation), for many millions of keys."""

    kind = "ivfpq"
    codes = "PQ"
    # Its codes know only what they were trained on: grown fourfold with drift, recall was 0.72.
    retrain_growth = 1.5

    def _coded(self, centres: Any, lists: int) -> Any:
        parts = max(m for m in range(1, max(1, self.width // 8) + 1) if self.width % m == 0)
        index = self._faiss.IndexIVFPQ(centres, self.width, lists, parts, 8, self._faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid = 1
        return index

    def _samples(self, count: int) -> int:
        return max(super()._samples(count), 10_000)

    def _put_forward(self, query: Tensor, count: int) -> Tensor:
        # These codes order coarsely: four times as many to be compared exactly.
        return super()._put_forward(query, 4 * count)


class HnswIndex(ApproximateIndex):
    """A graph of near neighbours, one byte a number; fastest to search, slowest to build.

    24 neighbours a key; the search keeps at least 1024 keys in view.  Queries far from every key, as
    sentences are from pictures, are its weak side: at 10^5 keys recall@10 is 0.82 with 256, 0.97 with 1024.
    """

    kind = "hnsw"

    def _samples(self, count: int) -> int:
        return 10_000

    def _empty(self, count: int) -> Any:
        sq8, metric = self._faiss.ScalarQuantizer.QT_8bit, self._faiss.METRIC_INNER_PRODUCT
        graph = self._faiss.IndexHNSWSQ(self.width, sq8, 24, metric)
        graph.hnsw.efConstruction = 80
        self._faiss.downcast_index(graph.storage).sq.rangestat_arg = SQ8_MARGIN
        return self._faiss.IndexIDMap(graph)

    def _effort(self, count: int) -> Any:
        return self._faiss.SearchParametersHNSW(efSearch=max(1024, 4 * count))

    def _mapping(self) -> int:
        return int(getattr(self._faiss, "IO_FLAG_MMAP_IFC", 0))

    def _main_described(self) -> str:
        return "24 neighbours, SQ8"


class GpuIndex(IvfIndex):
    """`IvfIndex` searched on the first GPU; built, kept and saved on the CPU.

    Raises:
        MissingExtra: if faiss was installed without its GPU part.
        UnsupportedError: if there is no GPU.
    """

    kind = "gpu"

    def __init__(
        self, width: int, *, exact: ExactKeys | None = None, train_at: int = FLAT_KEYS, tail_keys: int = TAIL_KEYS
    ) -> None:
        super().__init__(width, exact=exact, train_at=train_at, tail_keys=tail_keys)
        if not hasattr(self._faiss, "StandardGpuResources"):
            raise MissingExtra("faiss-gpu", extra="gpu")
        if not self._faiss.get_num_gpus():
            raise UnsupportedError("index gpu needs a GPU and FAISS sees none; use ivf, or leave the choice at auto")
        self._resources = self._faiss.StandardGpuResources()
        self._on_gpu: Any = None

    def _changed(self) -> None:
        self._on_gpu = None

    def _mapping(self) -> int:
        # What goes to the GPU must be in memory first.
        return 0

    def _put_forward(self, query: Tensor, count: int) -> Tensor:
        if self._on_gpu is None:
            self._on_gpu = self._faiss.index_cpu_to_gpu(self._resources, 0, self._main)
        # A GPU gives at most 2048 keys at once.
        count = min(count, 2048)
        found = self._on_gpu.search(_array(query[None]), count, params=self._effort(count))[1][0]
        return torch.from_numpy(found[found >= 0])

    def _main_described(self) -> str:
        return f"{super()._main_described()}, on the GPU"


APPROXIMATE: dict[str, type[ApproximateIndex]] = {
    one.kind: one for one in (GpuIndex, HnswIndex, IvfFlatIndex, IvfIndex, IvfPqIndex)
}
KINDS = ("auto", FlatIndex.kind, FaissIndex.kind, *sorted(APPROXIMATE))


def choose_kind(kind: str, count: int) -> tuple[str, str]:
    """The kind of index for about ``count`` keys, and why if nobody asked for it by name.

    Args:
        kind: one of `KINDS`.
        count: of keys.

    Raises:
        SettingsError: if there is no such kind.
    """
    if kind not in KINDS:
        raise SettingsError(f"there is no index {kind!r}; {near(kind, KINDS)}")
    if kind != "auto":
        return kind, ""
    try:
        load_faiss()
    except MissingExtra as missing:
        return FlatIndex.kind, f"chosen as {missing}"
    if count <= FLAT_KEYS:
        return FaissIndex.kind, f"chosen for up to {FLAT_KEYS} keys"
    if count <= SQ8_KEYS:
        return IvfIndex.kind, f"chosen for {FLAT_KEYS} to {SQ8_KEYS} keys"
    return IvfPqIndex.kind, f"chosen for more than {SQ8_KEYS} keys"


def new_index(kind: str, width: int, *, exact: ExactKeys | None = None) -> Index:
    """An empty index of one of `KINDS` but auto."""
    if kind in APPROXIMATE:
        return APPROXIMATE[kind](width, exact=exact)
    return FaissIndex(width) if kind == FaissIndex.kind else FlatIndex(width)


def _spread(length: int, count: int) -> Tensor:
    """At most ``count`` row numbers, evenly over ``length`` rows, rising."""
    return torch.linspace(0, length - 1, min(count, length), dtype=torch.float64).long()


def _array(values: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(values.numpy())
