"""Searching keys: the interface of every index, and the exact one all others are compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

BLOCK_IDS = 4096
"""How many ids' keys are in memory at once while all keys are gone through; 12 MB at 768 numbers."""


class ExactKeys(Protocol):
    """Where the exact keys of an index lie; ids are span ids, keys have unit length."""

    def ids(self) -> Tensor:
        """(S,) int64, rising, each once: the ids there are now."""

    def keys(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """All keys of some ids: (M,) int64, together per id, and (M, Dk) float32; ids that are gone are left out."""


def key_blocks(exact: ExactKeys, ids: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys of some ids (None: of all) in blocks: (M,) int64 and (M, Dk) float32."""
    ids = exact.ids() if ids is None else ids
    for first in range(0, len(ids), BLOCK_IDS):
        yield exact.keys(ids[first : first + BLOCK_IDS])


class Index(ABC):
    """Finds the ids whose keys are most similar to a query; similarity is the cosine, higher is better.

    An id may have several keys (a span has one per frame, say); it counts with its most similar one and
    is found once.  Nothing here is the truth: an index is rebuilt from the catalogue at any time.

    Args:
        width: length of a key, >= 1.
    """

    kind: ClassVar[str]
    """What it is asked for by."""

    exact: ClassVar[bool] = True
    """Whether every key is compared with the query, so that asking for all costs no more than asking for few."""

    note: str = ""
    """What the caller should tell the user about this index, once; empty for nothing."""

    chosen: str = ""
    """Why this kind, where nobody asked for it by name; empty otherwise."""

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"keys must have at least one number, got {width = }")
        self.width = width

    @abstractmethod
    def __len__(self) -> int:
        """How many keys are in it."""

    @abstractmethod
    def ids(self) -> Tensor:
        """(S,) int64, rising: the ids that have keys in it, each once."""

    @abstractmethod
    def _add(self, ids: Tensor, keys: Tensor) -> None:
        """Take in unit keys (M, Dk) float32 under ids (M,) int64."""

    @abstractmethod
    def _remove(self, ids: Tensor) -> None:
        """Forget all keys of ids (M,) int64, rising; ids that are not in it are left alone."""

    @abstractmethod
    def _best_keys(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(ids, similarity) of the ``count`` best keys, falling; ids may repeat, 1 <= count <= len."""

    @property
    def said(self) -> str:
        """What it is, how large, and why it was chosen, in one line."""
        why = f"; {self.chosen}" if self.chosen else ""
        return f"{self._described()}, {len(self)} keys of {self.width} numbers{why}"

    def _described(self) -> str:
        return f"{self.kind} (exact)"

    def add(self, ids: Tensor, keys: Tensor) -> None:
        """Take in keys; may be called at any time, also between searches.

        Args:
            ids: (M,) int64, may repeat.
            keys: (M, Dk) float, any length but zero; made unit length here.

        Raises:
            ValueError: if shapes do not match, or a key is zero or not finite.
        """
        if keys.ndim != 2 or keys.shape[1] != self.width or ids.shape != (len(keys),):
            raise ValueError(f"ids must be (M,) and keys (M, {self.width}), got {ids.shape = } {keys.shape = }")
        if len(keys):
            self._add(ids.to("cpu", torch.int64), unit(keys))

    def remove(self, ids: Tensor) -> int:
        """Forget ids with all their keys.

        Args:
            ids: (M,) int64; those that are not in it are left alone.

        Returns:
            How many keys went.
        """
        before = len(self)
        if len(ids) and before:
            self._remove(distinct(ids.to("cpu", torch.int64)))
        return before - len(self)

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The best ids, most similar first.

        Args:
            query: (Dk,) float, any length but zero.
            k: how many ids, >= 1.

        Returns:
            ids (M,) int64, each once, and similarity (M,) float32; M = min(k, ids there are).
            How ties break is up to the index.
        """
        if query.shape != (self.width,) or k < 1:
            raise ValueError(f"search needs a query ({self.width},) and k >= 1, got {query.shape = } {k = }")
        return self._best_ids(unit(query[None])[0], k)

    def _best_ids(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`search` for a unit query."""
        count = min(k, len(self))
        while count:
            ids, similarity = self._best_keys(query, count)
            first = _first_of_each(ids)
            # Enough different ids among the best keys: no key further down can change the answer.
            if len(first) >= k or count == len(self):
                return ids[first[:k]], similarity[first[:k]]
            count = min(2 * count, len(self))
        return torch.empty(0, dtype=torch.int64), torch.empty(0)


class FlatIndex(Index):
    """Compares the query with every key; exact, and the reference for all other indexes.

    Ties keep the key that was added first.
    """

    kind = "flat"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._count = 0
        # Grown by half when full, so that adding one by one copies each key a few times, not each time.
        self._ids = torch.empty(0, dtype=torch.int64)
        self._keys = torch.empty(0, width)

    def __len__(self) -> int:
        return self._count

    def ids(self) -> Tensor:
        """See `Index.ids`."""
        return distinct(self.held[0])

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """(M,) ids and (M, Dk) unit keys in the order they were added; views, good until it changes."""
        return self._ids[: self._count], self._keys[: self._count]

    def _add(self, ids: Tensor, keys: Tensor) -> None:
        total = self._count + len(ids)
        if total > len(self._ids):
            self._resize(max(total, self._count * 3 // 2))
        self._ids[self._count : total] = ids
        self._keys[self._count : total] = keys
        self._count = total

    def _remove(self, ids: Tensor) -> None:
        stays = (~torch.isin(self._ids[: self._count], ids)).nonzero().squeeze(1)
        self._ids, self._keys, self._count = self._ids[stays], self._keys[stays], len(stays)

    def _resize(self, room: int) -> None:
        held_ids, held_keys = self.held
        self._ids, self._keys = torch.empty(room, dtype=torch.int64), torch.empty(room, self.width)
        self._ids[: self._count], self._keys[: self._count] = held_ids, held_keys

    def _best_keys(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ids, keys = self.held
        return best_of(ids, keys @ query, count)


def best_of(ids: Tensor, similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` most similar with their ids, falling; ties keep the earlier row."""
    if 4 * count < len(ids):
        # All that can be among them, ties included: sorting those few is what a stable sort of all would give.
        able = (similarity >= similarity.topk(count).values[-1]).nonzero().squeeze(1)
        ids, similarity = ids[able], similarity[able]
    best = torch.argsort(similarity, descending=True, stable=True)[:count]
    return ids[best], similarity[best]


def unit(keys: Tensor) -> Tensor:
    """Rows made unit length: (M, Dk) float32 on the CPU.

    Raises:
        ValueError: if a row is zero or not finite; it has no direction to compare.
    """
    keys = keys.detach().to("cpu", torch.float32)
    length: Tensor = keys.norm(dim=1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise ValueError("a key must be finite and not all zero")
    return keys / length


def distinct(ids: Tensor) -> Tensor:
    """Each id once, rising."""
    out: Tensor = torch.unique(ids)
    return out


def _first_of_each(ids: Tensor) -> Tensor:
    """Indices of the first occurrence of each id, rising."""
    order = torch.argsort(ids, stable=True)
    new = torch.ones(len(ids), dtype=torch.bool)
    new[1:] = ids[order][1:] != ids[order][:-1]
    first: Tensor = order[new].sort().values
    return first
