"""What streamvid asks of a video language model; one adapter per family, found by model type."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from torch import Tensor

from streamvid.frames import Clip
from streamvid.temporal.methods.base import LlmMethod, PixelView
from streamvid.tokens import VideoTokens

if TYPE_CHECKING:
    from streamvid.models.prefix import Prefix


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is."""

    name: str
    family: str
    parameters: int
    hidden_size: int
    num_layers: int
    device: str
    dtype: str
    fingerprint: str
    """Changes whenever weights or configuration change."""

    processor_fingerprint: str
    """Changes whenever pixels or prompts would be prepared differently."""

    default_fps: float
    max_frames: int
    context_tokens: int
    """Longest prompt the model was made for."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A clip after the vision tower."""

    tokens: VideoTokens
    received_attention: Tensor
    """(N,) see ``Signals.received_attention``."""

    frame_features: Tensor
    """(T, D) mean of each frame's tokens, cells that were not encoded standing in with their last features."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Everything a prefill needs."""

    input_ids: Tensor
    """(1, L) int64."""

    position_ids: Tensor
    """(4, 1, L) int64: text, time, height, width."""

    visual: Tensor
    """(L,) bool: where visual tokens stand."""

    cell: Tensor
    """(L,) int64 spatial cell of visual tokens, -1 for text."""

    features: Tensor
    """(N, D)"""

    layers: tuple[Tensor, ...]
    next_position: int
    """Position of the first generated token."""


@dataclass(slots=True)
class GenerationStats:
    """What one answer cost inside the language model."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Of these, how many an earlier prompt had left keys and values for."""

    new_tokens: int = 0
    visual_tokens: int = 0
    visual_tokens_last_layer: int = 0
    """Visual tokens still there in the last layer; smaller than ``visual_tokens`` when an llm method was at work."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped: str = ""
    """"end" or "length"."""

    notes: list[str] = field(default_factory=list)


class Adapter(ABC):
    """A loaded video language model, seen through what streamvid needs of it."""

    info: ModelInfo

    tubelet: int
    """Frames in a temporal patch."""

    token_bytes: int
    """Memory that one token takes while a prompt is read: keys and values, and the widest activations."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, *, name: str, device: str, dtype: str) -> Adapter:
        """Load a checkpoint from a local folder."""

    @abstractmethod
    def frame_size(self, *, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """Size in pixels that frames of this size will be scaled to."""

    @abstractmethod
    def view(self, clip: Clip, *, size: tuple[int, int]) -> PixelView:
        """The clip as the vision tower will see it."""

    @abstractmethod
    def encode(self, view: PixelView, times: Sequence[tuple[float, float]], *, keep: Tensor | None) -> Encoded:
        """Run the vision tower.

        Args:
            view: from ``view``.
            times: start and stop in seconds of each of the view's T temporal patches.
            keep: (M,) cells to encode, ascending; None encodes all.  The others never enter the tower.
        """

    def stream(self) -> Self:
        """The same model for another stream: weights are shared, what is known of the last clip is not."""
        twin = copy.copy(self)
        twin.reset()
        return twin

    @abstractmethod
    def reset(self) -> None:
        """Forget the last clip: the next one starts a new stream."""

    @abstractmethod
    def prompt(self, tokens: VideoTokens | None, question: str) -> Prompt:
        """Lay out frames with their time stamps, then the question.

        Tokens of one frame share ``pts_seconds``; frames without tokens leave no trace.
        """

    @abstractmethod
    def prompt_overhead(self, num_frames: int) -> int:
        """Text tokens that the time stamps of this many frames cost."""

    @abstractmethod
    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        methods: Sequence[LlmMethod] = (),
        stats: GenerationStats | None = None,
        prefix: Prefix | None = None,
    ) -> Iterator[str]:
        """Answer greedily, piece by piece as text becomes certain.

        Args:
            prompt: from ``prompt``.
            max_new_tokens: longest answer.
            methods: act between the decoder layers.
            stats: gets what the answer cost.
            prefix: keys and values of the prompt before, from which what is the same is taken, and to which
                those of this prompt's video go; not together with methods.
        """
