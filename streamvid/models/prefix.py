"""Keys and values of the video part of a prompt, used again by the next question.

A prompt holds the video first and the question last.  What the language model computed for the
video does not depend on the question, so a prompt that begins with the same frames begins with the
same keys and values.  Whether it does is told by digests of everything that goes in: token ids,
positions, features.  Nothing else is ever compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamvid.models.adapter import Prompt

if TYPE_CHECKING:
    from transformers import DynamicCache

Block = tuple[int, str]
"""Where a stretch of a prompt ends, and the digest of everything up to there."""


@dataclass(slots=True)
class Prefix:
    """Keys and values of the beginning of a prompt: (1, heads, L, width) for each layer.

    One object serves one model; ``generate`` takes from it what fits and leaves what the next
    question may use.
    """

    blocks: list[Block] = field(default_factory=list)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    reused: int = 0
    """Tokens that the latest prompt did not have to be prefilled with."""

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return self.blocks[-1][0] if self.blocks else 0

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def take(self, prompt: Prompt, cache: DynamicCache) -> Prompt:
        """Fill an empty cache with what a prompt shares with it; returns the rest of the prompt.

        What was held is let go of: the cache grows, and a copy would double the memory.
        """
        known = dict(self.blocks)
        self.reused = max((end for end, digest in blocks_of(prompt) if known.get(end) == digest), default=0)
        if self.reused:
            device = prompt.input_ids.device
            for index, pair in enumerate(self.layers):
                keys, values = (rows[..., : self.reused, :].to(device) for rows in pair)
                cache.update(keys, values, index)
        self.blocks, self.layers = [], []
        return _after(prompt, self.reused)

    def keep(self, prompt: Prompt, cache: DynamicCache) -> None:
        """Hold on to the video part of a prompt whose keys and values a cache begins with."""
        self.blocks = blocks_of(prompt)
        self.layers = [
            (layer.keys[..., : self.length, :], layer.values[..., : self.length, :])  # type: ignore[index, union-attr]
            for layer in cache.layers
        ]


def blocks_of(prompt: Prompt) -> list[Block]:
    """The frames of a prompt: where each ends, and the digest of everything up to there."""
    visual = prompt.visual.cpu()
    following = torch.cat([visual[1:], visual.new_zeros(1)])
    ends = ((visual & ~following).nonzero().squeeze(1) + 1).tolist()
    ids, positions = prompt.input_ids.cpu(), prompt.position_ids.cpu()
    rows = visual.cumsum(0)
    digest = hashlib.blake2b(digest_size=16)
    blocks: list[Block] = []
    begin, row = 0, 0
    for end in ends:
        last = int(rows[end - 1])
        parts = [ids[:, begin:end], positions[..., begin:end], prompt.features[row:last]]
        for part in (*parts, *(layer[row:last] for layer in prompt.layers)):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        blocks.append((end, digest.hexdigest()))
        begin, row = end, last
    return blocks


def _after(prompt: Prompt, count: int) -> Prompt:
    """A prompt without its first tokens; the last one always stays."""
    rows = int(prompt.visual[:count].sum())
    return replace(
        prompt,
        input_ids=prompt.input_ids[:, count:],
        position_ids=prompt.position_ids[..., count:],
        visual=prompt.visual[count:],
        cell=prompt.cell[count:],
        features=prompt.features[rows:],
        layers=tuple(layer[rows:] for layer in prompt.layers),
    )
