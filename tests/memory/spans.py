"""Small seeded tokens and keys, for the tests of memory and for the process that they kill."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from streamvid.memory.bank import Bank
from streamvid.memory.keys import MemoryKey
from streamvid.memory.writer import Writer
from streamvid.tokens import VideoTokens

WIDTH = 16
KEY_WIDTH = 8

KEY = MemoryKey(
    content="ab" * 32,
    sampling={"fps": 1, "max_frames": None, "from": None, "to": None},
    model="toy 1",
    processor="toy pixels 1",
    methods=[{"method": "rlt", "threshold": 0.1}, {"method": "fastvid", "keep_ratio": 0.25}],
    embedder="toy embedder 1",
)


def source_key(content: str) -> MemoryKey:
    return replace(KEY, content=content)


def span_tokens(
    seed: int, *, count: int = 100, width: int = WIDTH, num_layers: int = 1, dtype: torch.dtype = torch.float32
) -> VideoTokens:
    """Tokens of two 8 x 8 frames, some dropped, with scores that have ties; features survive fp16 exactly."""
    random = torch.Generator().manual_seed(seed)
    cell = torch.randperm(128, generator=random)[:count].sort().values
    frame = cell // 64

    def features() -> Tensor:
        return torch.randn(count, width, generator=random).half().to(dtype)

    return VideoTokens(
        features=features(),
        layers=tuple(features() for _ in range(num_layers)),
        grid=(2, 8, 8),
        position=torch.stack([frame, cell % 64 // 8, cell % 8], dim=1),
        pts_seconds=seed * 2 + frame.double() + 1 / 3,
        duration_seconds=torch.full((count,), 1.001, dtype=torch.float64),
        size=torch.randint(1, 5, (count,), generator=random).float(),
        score=torch.randint(0, 20, (count,), generator=random).float(),
    )


def span_keys(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, KEY_WIDTH, generator=torch.Generator().manual_seed(1000 + seed))


def span_times(number: int) -> tuple[Fraction, Fraction]:
    """29.97 fps, so that no time is a round number."""
    return Fraction(number * 60 * 1001, 30000), Fraction((number + 1) * 60 * 1001, 30000)


def append(writer: Writer, number: int, *, seed: int | None = None) -> None:
    start, stop = span_times(number)
    seed = number if seed is None else seed
    writer.append(span_tokens(seed), start=start, stop=stop, keys=span_keys(seed))


def store(bank: Bank, key: MemoryKey, numbers: range, *, name: str = "a.mp4", seed: int = 0) -> int:
    """A complete source with a span per number; returns its id."""
    with bank.writer(key, path=f"/videos/{name}", name=name) as writer:
        for number in numbers:
            append(writer, number, seed=seed + number)
        writer.finish({"frames": len(numbers)})
        source = bank.find(key)
        assert source is not None
        return source.id


def assert_same(a: VideoTokens, b: VideoTokens) -> None:
    assert a.grid == b.grid
    for name in ("features", "position", "pts_seconds", "duration_seconds", "size", "score"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and torch.equal(x, y), name
    assert len(a.layers) == len(b.layers)
    assert all(torch.equal(x, y) for x, y in zip(a.layers, b.layers, strict=True))


def best(tokens: VideoTokens, count: int) -> VideoTokens:
    """The highest scores, in raster and time order; ties keep the earlier."""
    order = torch.argsort(tokens.score, descending=True, stable=True)[:count]
    return tokens.select(order.sort().values)
