"""Search by FAISS, and the one place that imports it."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamvid.errors import MissingExtra
from streamvid.memory.index import Index


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

    def __init__(self, width: int) -> None:
        super().__init__(width)
        faiss = load_faiss()
        self._index: Any = faiss.IndexIDMap(faiss.IndexFlatIP(width))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def _add(self, ids: Tensor, keys: Tensor) -> None:
        self._index.add_with_ids(np.ascontiguousarray(keys.numpy()), np.ascontiguousarray(ids.numpy()))

    def _best_keys(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        similarity, ids = self._index.search(query.numpy()[None], count)
        return torch.from_numpy(ids[0].copy()), torch.from_numpy(similarity[0].copy())
