"""An embedder whose vectors are known: one axis for each colour and each shape, and one that all share."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from streamvid.models.embedder import Embedder

WORDS = ("red", "green", "blue", "yellow", "circle", "square", "person", "car", "tree", "wall", "sky", "water", "room")


class Words(Embedder):
    """Texts to the words they hold; words it does not know are left out."""

    name = fingerprint = "words"
    width = len(WORDS) + 1

    def texts(self, texts: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), self.width)
        rows[:, -1] = 0.3
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text):
                if word in WORDS:
                    row[WORDS.index(word)] = 1.0
        return F.normalize(rows, dim=-1)

    def frames(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


def picture(shown: str, *, noise: float = 0.05, seed: int = 0) -> Tensor:
    """The vector of a picture that shows these words over a wall."""
    generator = torch.Generator().manual_seed(seed)
    clean = Words().texts([shown])[0] * (1.0 if shown else 0.0) + 0.5 * Words().texts(["wall"])[0]
    return F.normalize(clean + noise * torch.randn(Words.width, generator=generator), dim=-1)
