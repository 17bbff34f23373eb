"""The seven stages of token reduction, one verb each.

A method sees views (what a host chooses to show it) and answers with a ``Reduction`` or None
("leave it").  It never moves features, positions or caches itself, and imports no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import ClassVar, Self

import torch
from torch import Tensor

from streamvid.budget import Budget
from streamvid.errors import UnsupportedError
from streamvid.reduction import Reduction
from streamvid.signals import Signal, Signals
from streamvid.tokens import VideoTokens


class Stage(StrEnum):
    """Where a method acts, in the order data passes."""

    PIXEL = "pixel"
    ENCODER = "encoder"
    PROJECTOR = "projector"
    EMBEDDING = "embedding"
    LLM = "llm"
    KV = "kv"
    MEMORY = "memory"


class Positions(StrEnum):
    """What becomes of the position ids of surviving tokens; hosts carry it out."""

    ORIGINAL = "original"
    RENUMBERED = "renumbered"
    COMPRESSED = "compressed"
    VIRTUAL = "virtual"


class Method(ABC):
    """One way to reduce tokens.

    Subclasses are dataclasses: fields are settings with the paper's defaults; running state is a
    field with ``init=False`` that ``reset()`` creates.  One object serves one stream.
    """

    stage: ClassVar[Stage]
    paper: ClassVar[str]
    """Title and arXiv number, or what it is where there is no paper."""

    needs: ClassVar[frozenset[Signal]] = frozenset()
    """Signals that must be there."""

    weights: ClassVar[bool] = False
    """Whether it has learned weights of its own."""

    causal: ClassVar[bool] = True
    """Whether what it decides about a frame depends on nothing later; clip by clip equals all at once."""

    positions: ClassVar[Positions] = Positions.ORIGINAL

    def spawn(self) -> Self:
        """The same settings with fresh state, for another stream."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]
        twin = type(self)(**settings)
        twin.reset()
        return twin

    def reset(self) -> None:
        """Start a new video: forget all running state."""
        return None

    @classmethod
    def tiny(cls) -> Self:
        """The smallest working instance, for tests; random weights where it has any."""
        return cls()

    def settings(self) -> dict[str, object]:
        """The settings as plain values, for keys and receipts."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class PixelView:
    """A clip as the encoder will see it, before it does."""

    pixels: Tensor
    """(F, C, H, W) float, normalised as the model wants it, padded to whole temporal patches: F = T * tubelet."""

    std: Tensor
    """(C,) the standard deviations the pixels were divided by: thresholds scale with it."""

    tubelet: int
    """Frames in a temporal patch."""

    cell: int
    """Side in pixels of the smallest square that can be left out (patch size times merge size)."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, rows, columns) of cells."""
        frames, _, height, width = self.pixels.shape
        return frames // self.tubelet, height // self.cell, width // self.cell


class PixelMethod(Method):
    """Chooses which cells of a clip are encoded at all."""

    stage = Stage.PIXEL

    @abstractmethod
    def select(self, view: PixelView, signals: Signals) -> Reduction | None:
        """A selection among the view's T * rows * columns cells, in (t, row, column) order."""


class EncoderMethod(Method):
    """Acts inside the vision tower, block by block."""

    stage = Stage.ENCODER


class ProjectorMethod(Method):
    """Computes new tokens between tower and language model."""

    stage = Stage.PROJECTOR


class EmbeddingMethod(Method):
    """Reduces projected tokens before the language model sees them."""

    stage = Stage.EMBEDDING

    @abstractmethod
    def reduce(self, tokens: VideoTokens, signals: Signals) -> Reduction | None:
        """What becomes of the tokens of one clip; signals' rows match the tokens."""


class Scored(EmbeddingMethod):
    """The score rung: say how important each token is; the best are kept, in original order.

    Subclasses have a ``budget: Budget`` setting.
    """

    budget: Budget

    @abstractmethod
    def score(self, tokens: VideoTokens, signals: Signals) -> Tensor:
        """(N,) importance, higher is kept; ties keep the earlier token."""

    def reduce(self, tokens: VideoTokens, signals: Signals) -> Reduction | None:
        """Keep the best of the budget, in original order."""
        count = self.budget.count(len(tokens))
        best = torch.argsort(self.score(tokens, signals), descending=True, stable=True)[:count]
        return Reduction.select(best.sort().values, len(tokens))


@dataclass(frozen=True, slots=True)
class LayerView:
    """The sequence at one point of the language model's prefill."""

    index: int
    """Decoder layer, 0-based."""

    num_layers: int

    after_attention: bool
    """False: before the layer.  True: between its attention and its feed-forward half."""

    hidden: Tensor
    """(L, D) hidden states of the tokens still there."""

    cell: Tensor
    """(L,) int64 spatial cell (row * columns + column) of visual tokens, -1 for text."""

    positions: Tensor
    """(L,) int64 index of each token in the original prompt, rising."""

    original_length: int
    """Tokens in the prompt before any reduction."""

    attention: Callable[[int], Tensor] | None = None
    """Rows of this layer's attention for the last ``n`` queries: call with n, get (Hh, n, L).
    Recomputed on demand; None before a layer."""


class LlmMethod(Method):
    """Drops or merges tokens between the layers of the language model during prefill."""

    stage = Stage.LLM

    @abstractmethod
    def reduce_layer(self, layer: LayerView, signals: Signals) -> Reduction | None:
        """What becomes of the sequence at this point; text tokens must survive in order."""


class KvMethod(Method):
    """Evicts entries of the key-value cache."""

    stage = Stage.KV


@dataclass(frozen=True, slots=True)
class StoredKeys:
    """Keys of many spans that are read when they are looked at; indexed like the tensor they stand for."""

    read: Callable[[Tensor], Tensor]
    """Call with rows (M,) int64, get (M, K, Dk) float32, K being what those rows need."""

    width: int
    """Dk; 0 where there are no keys."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.read(rows)

    def select(self, rows: Tensor) -> StoredKeys:
        """Only the keys of these rows (M,) int64."""
        return StoredKeys(lambda some: self.read(rows[some]), self.width)


BLOCK_ROWS = 4096
"""Spans whose keys are in memory at once while all are gone through."""


@dataclass(frozen=True, slots=True)
class MemoryView:
    """What a memory holds for one source, without its tokens: S spans in time order."""

    start_seconds: Tensor
    """(S,) float64"""

    stop_seconds: Tensor
    """(S,) float64"""

    tokens: Tensor
    """(S,) int64 stored tokens."""

    keys: Tensor | StoredKeys
    """(S, K, Dk) float32, unit length: up to K keys a span; rows of zeros where there are fewer.  Index it
    with the rows that matter: of a large memory only those are read."""

    similarity: Tensor | None = None
    """(S,) float32 of each span's best key to the question, as the memory's index finds it, higher is
    better; None where there is no question vector."""

    attention: Callable[[Tensor, int, float], Tensor] | None = None
    """How much the model itself looks at spans when it reads the question.  Call with rows (M,) int64, tokens
    to show of each span (its best ones) and how deep to read, 0..1 of the layers; get (M,) float32, higher is
    better.  Computed on demand, a bounded number of tokens at a time; None where there is no model to ask."""

    @property
    def key_width(self) -> int:
        """Dk; 0 where there are no keys."""
        return self.keys.width if isinstance(self.keys, StoredKeys) else self.keys.shape[-1]

    def likeness(self, vector: Tensor, rows: Tensor) -> Tensor:
        """(M,) float32 of the best key of each of some rows (M,) to a unit vector (Dk,); -1 without keys."""
        out = [torch.zeros(0)]
        for some in torch.split(rows, BLOCK_ROWS):
            keys = self.keys[some]
            like = (keys @ vector.float()).masked_fill(~(keys != 0).any(-1), -1.0)
            out.append(like.amax(1) if keys.shape[1] else torch.full((len(some),), -1.0))
        return torch.cat(out)

    def relevance(self, question: Tensor | None) -> Tensor | None:
        """(S,) float32 ``similarity``, or from the keys where it is not given; None without a question or keys."""
        if question is None or not self.key_width:
            return None
        if self.similarity is not None:
            return self.similarity
        return self.likeness(question, torch.arange(len(self.tokens)))

    def select(self, rows: Tensor) -> MemoryView:
        """Only these spans; rows (M,) int64, rising."""
        attention = self.attention
        return MemoryView(
            start_seconds=self.start_seconds[rows],
            stop_seconds=self.stop_seconds[rows],
            tokens=self.tokens[rows],
            keys=self.keys.select(rows) if isinstance(self.keys, StoredKeys) else self.keys[rows],
            similarity=None if self.similarity is None else self.similarity[rows],
            attention=None if attention is None else lambda some, each, depth: attention(rows[some], each, depth),
        )


class MemoryMethod(Method):
    """Decides how a budget of tokens is spent on remembered spans; some also how old ones are made smaller."""

    stage = Stage.MEMORY

    def consolidate(self, tokens: VideoTokens, count: int) -> Reduction:
        """What becomes of the tokens of neighbouring spans, (N,) in time order, when room is needed.

        Args:
            tokens: of both spans; frames that become one have the same frame number.
            count: how many tokens may be left, >= 1.

        Raises:
            UnsupportedError: if the method only recalls.
        """
        raise UnsupportedError(
            f"{type(self).__name__} recalls and does not make memory smaller; merge_time does: leave the other out"
        )

    def relevance(self, memory: MemoryView, signals: Signals) -> Tensor:
        """(S,) similarity of each span to the question, for methods that cannot do without.

        Raises:
            ValueError: if there is no question vector.
        """
        similarity = memory.relevance(signals.question)
        if similarity is None:
            raise ValueError(
                f"{type(self).__name__} recalls by a question vector and there is none; use coverage or uniform"
            )
        return similarity

    @abstractmethod
    def recall(self, memory: MemoryView, budget: int, signals: Signals) -> Tensor:
        """(S,) int64 tokens to read of each span: at most what it has, at most ``budget`` in all."""
