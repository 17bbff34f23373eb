"""What crosses stages: measurements one stage makes that a method of another stage needs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from torch import Tensor


class Signal(StrEnum):
    """Names of signals, as methods list them in ``needs``."""

    QUESTION = "question"
    CLS_ATTENTION = "cls_attention"
    RECEIVED_ATTENTION = "received_attention"
    FRAME_FEATURES = "frame_features"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """The signals at hand; None where there is none.  Rows match the tokens a method is given."""

    question: Tensor | None = None
    """(Dk,) the question in the space of the bank's keys."""

    cls_attention: Tensor | None = None
    """(N,) attention of the CLS token to each token."""

    received_attention: Tensor | None = None
    """(N,) attention each token received in the tower's last block from its own frame, 1 on average."""

    frame_features: Tensor | None = None
    """(T, Dg) one global feature per frame of the grid."""

    def available(self) -> frozenset[Signal]:
        """The signals that are not None."""
        return frozenset(Signal(f.name) for f in fields(self) if getattr(self, f.name) is not None)
