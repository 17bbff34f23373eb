"""What the language model looks at when it reads a question: measured during an ordinary prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from streamvid.signals import Signals
from streamvid.temporal.methods.base import LayerView, LlmMethod


class Seen(Exception):
    """All layers of interest have been measured; the layers behind them need not run."""


@dataclass
class Looking(LlmMethod):
    """Reads how much attention the question pays each visual token, and changes nothing.

    In every layer down to a depth, ``log(1 + attention to the token / attention to the opening)``, mean over
    heads and over the question's tokens; the score is the mean of the layers.  The opening of the prompt is
    always the same text, and softmax's denominator cancels, so scores of prompts with different pictures
    compare.

    Args:
        depth: 0..1; 0 measures the first layer only, 1 all of them.
        question: tokens at the end of the prompt that ask, >= 1.
    """

    depth: float = 0.5
    question: int = 1
    scores: Tensor | None = field(init=False, default=None)
    """(N,) float32 after a prefill, in prompt order."""

    paper: ClassVar[str] = "a measurement, no reduction"

    def reset(self) -> None:
        """Forget the last prompt."""
        self.scores = None

    def reduce_layer(self, layer: LayerView, signals: Signals) -> None:
        """Leave every token; raises `Seen` after the last layer of interest."""
        if layer.attention is None:
            return
        rows = layer.attention(self.question)  # (Hh, Q, L)
        visual = layer.cell >= 0
        opening = rows[..., : int(visual.nonzero()[0]) - 1].sum(-1, keepdim=True).clamp_min(1e-9)
        score = (rows[..., visual] / opening).log1p().mean((0, 1)).float().cpu()
        self.scores = score if self.scores is None else self.scores + (score - self.scores) / (layer.index + 1)
        if layer.index >= round(self.depth * (layer.num_layers - 1)):
            raise Seen
