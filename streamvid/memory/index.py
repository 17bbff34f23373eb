"""Searching keys: the interface of every index, and the exact one all others are compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Index(ABC):
    """Finds the ids whose keys are most similar to a query; similarity is the cosine, higher is better.

    An id may have several keys (a span has one per frame, say); it counts with its most similar one and
    is found once.  Nothing here is the truth: an index is rebuilt from the catalogue at any time.

    Args:
        width: length of a key, >= 1.
    """

    note: str = ""
    """What the caller should tell the user about this index, once; empty for nothing."""

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"keys must have at least one number, got {width = }")
        self.width = width

    @abstractmethod
    def __len__(self) -> int:
        """How many keys are in it."""

    @abstractmethod
    def _add(self, ids: Tensor, keys: Tensor) -> None:
        """Take in unit keys (M, Dk) float32 under ids (M,) int64."""

    @abstractmethod
    def _best_keys(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(ids, similarity) of the ``count`` best keys, falling; ids may repeat, 1 <= count <= len."""

    def add(self, ids: Tensor, keys: Tensor) -> None:
        """Take in keys.

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
        query = unit(query[None])[0]
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

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._ids = torch.empty(0, dtype=torch.int64)
        self._keys = torch.empty(0, width)

    def __len__(self) -> int:
        return len(self._ids)

    def _add(self, ids: Tensor, keys: Tensor) -> None:
        self._ids = torch.cat([self._ids, ids])
        self._keys = torch.cat([self._keys, keys])

    def _best_keys(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        similarity = self._keys @ query
        best = torch.argsort(similarity, descending=True, stable=True)[:count]
        return self._ids[best], similarity[best]


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


def _first_of_each(ids: Tensor) -> Tensor:
    """Indices of the first occurrence of each id, rising."""
    order = torch.argsort(ids, stable=True)
    new = torch.ones(len(ids), dtype=torch.bool)
    new[1:] = ids[order][1:] != ids[order][:-1]
    first: Tensor = order[new].sort().values
    return first
