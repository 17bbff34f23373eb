"""A thing by its name, as texts that an image-text encoder compares with pictures.

Knows words and vectors; knows no stream and no memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from streamvid.watch.rules import with_article

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

PROMPTS = ("is there {a}?", "do you see {a}?", "when does the {} appear?")
"""A thing is looked for by the mean of these texts; ``{a}`` is it with its article."""

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white", "black", "pink", "brown", "grey")

OTHERS = (
    "what do you see?", "an empty scene", "a wall", "a room", "a street", "a person", "many people", "a car",
    "an animal", "a tree", "the sky", "water", "text on a screen", "a blurred picture", "a dark picture",
)  # fmt: skip
"""How differently these fit a picture is the embedder's own measure of different."""

_SAME = 0.98
"""Texts closer than this cosine are one text to the embedder, as where it does not know a word."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a picture fits the texts of one thing, as cosines."""

    own: float
    """The thing itself."""

    middle: float
    """What a text that has nothing to do with the picture gets."""

    width: float
    """Spread among other texts."""

    rival: float
    """The best of those that must not fit better; -inf without any."""

    name: str
    """Which that is; empty without any."""


@dataclass(frozen=True, slots=True)
class Texts:
    """All texts of a thing as rows: its own, those that must not fit better, those that give the spread."""

    rows: Tensor  # (1 + rivals + others, Dk)
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, what: str, embedder: Embedder, *, unlike: Sequence[str] = (), prompts: Sequence[str] = PROMPTS
    ) -> Texts:
        """The texts of a thing, and against them the same in other colours.

        Args:
            what: the thing, without its article.
            embedder: makes the vectors.
            unlike: further things that must not fit better.
            prompts: texts around the thing; see `PROMPTS`.
        """
        with torch.inference_mode():
            own = vectors([what], embedder, prompts)
            named = [name for name in (*_recolored(what), *unlike) if name != what]
            rivals = vectors(named, embedder, prompts) if named else own[:0]
            bare = vectors([_colorless(what)], embedder, prompts)
            # A colour the embedder does not know leaves the thing itself, which fits as well as its own text.
            known = (rivals @ torch.cat([own, bare]).T < _SAME).all(1)
            others = _distinct(torch.cat([embedder.texts(OTHERS).float().cpu(), rivals[known]]))
            rows = torch.cat([own, rivals[known], others])
        return cls(rows.clone(), tuple(name for name, good in zip(named, known.tolist(), strict=True) if good))

    def fit(self, key: Tensor) -> Fit:
        """How well one picture, (Dk,), fits each; of several pictures give the mean.

        Raises:
            ValueError: if it is not a vector of the encoder's width.
        """
        if key.shape != self.rows.shape[1:]:
            raise ValueError(f"key must be one vector of {self.rows.shape[1]} numbers, got {key.shape = }")
        own, *found = (self.rows @ key.detach().float().cpu()).tolist()
        rivals, others = found[: len(self.names)], found[len(self.names) :]
        middle = math.fsum(others) / len(others)
        width = math.sqrt(math.fsum((x - middle) ** 2 for x in others) / len(others))
        rival = max(rivals, default=-math.inf)
        return Fit(own, middle, max(width, 1e-4), rival, self.names[rivals.index(rival)] if rivals else "")


def vectors(names: Sequence[str], embedder: Embedder, prompts: Sequence[str]) -> Tensor:
    """(n, Dk) float32, unit length: the mean over the prompts."""
    texts = [prompt.replace("{a}", with_article(name)).replace("{}", name) for name in names for prompt in prompts]
    found = embedder.texts(texts).detach().float().cpu()
    return F.normalize(found.view(len(names), len(prompts), -1).mean(1), dim=-1)


def _distinct(vectors: Tensor) -> Tensor:
    """Without those that come again; the first of each stays."""
    close = (vectors @ vectors.T >= _SAME).tril(-1).any(1)
    return vectors[~close]


_COLOR = re.compile(rf"\b(?:{'|'.join(COLORS)})\b", re.IGNORECASE)


def _recolored(what: str) -> list[str]:
    """The same with every other colour in place of the first one; empty if it names none."""
    found = _COLOR.search(what)
    if found is None:
        return []
    return [what[: found.start()] + c + what[found.end() :] for c in COLORS if c != found[0].lower()]


def _colorless(what: str) -> str:
    return " ".join(_COLOR.sub("", what, count=1).split()) or what
