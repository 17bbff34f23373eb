"""Write a token-reduction method of your own and run it on a real clip.

A method says which tokens survive; streamvid moves features, positions, times and memory.  This
one keeps the tokens that differ most from the mean token of their frame.

    python samples/own_method.py [VIDEO]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from streamvid.budget import Budget
from streamvid.memory.bank import Bank
from streamvid.signals import Signals
from streamvid.temporal.methods.base import Scored
from streamvid.temporal.methods.compose import Chain
from streamvid.tokens import VideoTokens
from streamvid_pipelines.ask import AskVideo, Request, load


@dataclass
class Odd(Scored):
    """Keep the tokens that are unlike the rest of their frame."""

    budget: Budget = Budget(keep_ratio=0.3)

    paper = "a sample"

    def score(self, tokens: VideoTokens, signals: Signals) -> torch.Tensor:
        """Distance to the frame's mean token."""
        frame = tokens.position[:, 0]
        frames = int(frame.max()) + 1
        total = torch.zeros(frames, tokens.features.shape[1]).index_add_(0, frame, tokens.features)
        mean = total / torch.bincount(frame, minlength=frames).clamp_min(1)[:, None]
        return (tokens.features - mean[frame]).norm(dim=1)


if __name__ == "__main__":
    video = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "three_shapes.mp4"
    request = Request(model="toy", reduce="none")
    with tempfile.TemporaryDirectory() as folder, Bank.open(Path(folder)) as bank:
        asking = AskVideo(video, request, load(request, print), bank)
        asking.session.chain = Chain((Odd(),))
        answer = asking.ask("what happens?")
        print(answer.text)
        print(f"{answer.receipt.tokens_remembered} of {answer.receipt.tokens_seen} tokens remembered")
