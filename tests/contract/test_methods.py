"""What every method promises, whatever it does; a new file in a stage folder is picked up by itself."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from streamvid.budget import Budget
from streamvid.reduction import Reduction
from streamvid.signals import Signal, Signals
from streamvid.temporal.methods.base import (
    EmbeddingMethod,
    LayerView,
    LlmMethod,
    MemoryMethod,
    MemoryView,
    Method,
    PixelMethod,
    PixelView,
    Stage,
)
from streamvid.temporal.methods.registry import build, methods
from streamvid.tokens import VideoTokens

IDS = list(methods())


def ids_of(*stages: Stage) -> list[str]:
    return [name for name, cls in methods().items() if cls.stage in stages]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(plan: Reduction | None, count: int) -> Tensor:
    """(M, N) the decision as a dense matrix; also checks what every decision must be."""
    if plan is None:
        return torch.eye(count)
    assert plan.num_inputs == count
    lead = plan.leader()
    assert len(lead) == plan.num_outputs
    assert bool((lead[1:] > lead[:-1]).all()), "outputs must stand in raster and time order"
    dense = plan.apply(torch.eye(count))
    assert dense.isfinite().all()
    assert bool((dense >= 0).all())
    return dense


class Stream(ABC):
    """Something a method is shown step by step; the same seed shows the same."""

    def __init__(self, seed: int, *, constant: bool = False, only: frozenset[Signal] | None = None) -> None:
        self.seed, self.constant, self.only = seed, constant, only
        self.prepare()

    def signals(self, **given: Tensor) -> Signals:
        return Signals(**{k: v for k, v in given.items() if self.only is None or Signal(k) in self.only})

    @abstractmethod
    def prepare(self) -> None: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def step(self, method: Method, index: int) -> Tensor:
        """Show the next part; the answer as numbers."""


class PixelStream(Stream):
    """A still noisy picture over which a square moves, three clips of two temporal patches."""

    tubelet, side, patches = 2, 4, 6
    std = torch.tensor([0.3, 0.25, 0.27])

    def prepare(self) -> None:
        frames = self.tubelet * self.patches
        picture = torch.rand(3, 16, 20, generator=seeded(self.seed))
        self.pixels = picture.repeat(frames, 1, 1, 1)
        if not self.constant:
            self.pixels += 0.002 * torch.randn(self.pixels.shape, generator=seeded(self.seed + 1))
            for frame in range(frames):
                self.pixels[frame, :, 4:8, frame : frame + 5] += 1 + self.seed % 7

    def view(self, start: int, stop: int) -> PixelView:
        part = self.pixels[start * self.tubelet : stop * self.tubelet]
        return PixelView(part, std=self.std, tubelet=self.tubelet, cell=self.side)

    def show(self, method: Method, start: int, stop: int) -> Tensor:
        assert isinstance(method, PixelMethod)
        view = self.view(start, stop)
        times, rows, columns = view.grid
        plan = method.select(view, Signals())
        assert plan is None or plan.is_selection
        return matrix(plan, times * rows * columns)

    def __len__(self) -> int:
        return 3

    def step(self, method: Method, index: int) -> Tensor:
        return self.show(method, 2 * index, 2 * index + 2)


def clip(seed: int, *, constant: bool = False, ragged: bool = False) -> tuple[VideoTokens, Tensor, Tensor]:
    """Tokens of 10 frames in three scenes, their received attention and frame features."""
    frames, height, width, channels = 10, 4, 5, 12
    cells = height * width
    position = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    scene = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    if constant:
        features = torch.ones(frames * cells, channels)
        attention = torch.ones(frames * cells)
        pooled = torch.ones(frames, channels)
    else:
        base = torch.randn(3, cells, channels, generator=seeded(seed))
        noise = torch.randn(frames, cells, channels, generator=seeded(seed + 1))
        features = (base[scene] + 0.1 * noise).flatten(0, 1)
        attention = torch.rand(frames * cells, generator=seeded(seed + 2)) * 2
        pooled = features.reshape(frames, cells, channels).mean(1)
    tokens = VideoTokens(
        features=features,
        grid=(frames, height, width),
        position=position,
        pts_seconds=position[:, 0] / 2.0,
        duration_seconds=torch.full((frames * cells,), 0.5, dtype=torch.float64),
        size=torch.ones(frames * cells),
        score=attention,
    )
    if ragged:
        keep = torch.rand(len(tokens), generator=seeded(seed + 3)) < 0.6
        keep[2 * cells : 3 * cells] = False
        return tokens.select(keep), attention[keep], pooled
    return tokens, attention, pooled


class TokenStream(Stream):
    """Three clips: a full one, a ragged one, a full one."""

    def prepare(self) -> None:
        self.clips = [clip(self.seed + 10 * i, constant=self.constant, ragged=i == 1) for i in range(3)]

    def __len__(self) -> int:
        return 3

    def step(self, method: Method, index: int) -> Tensor:
        assert isinstance(method, EmbeddingMethod)
        tokens, attention, pooled = self.clips[index]
        signals = self.signals(received_attention=attention, cls_attention=attention, frame_features=pooled)
        plan = method.reduce(tokens, signals)
        reduced = tokens.reduce(plan)
        assert reduced.features.isfinite().all()
        return matrix(plan, len(tokens))


class PromptStream(Stream):
    """A prompt of text, 8 frames of 3 x 3 tokens with a time stamp before each, and text; 12 layers of stand-ins."""

    layers = 12

    def prepare(self) -> None:
        cells, channels, frames = 9, 16, 8
        parts = [torch.full((4,), -1)]
        for _ in range(frames):
            parts += [torch.full((2,), -1), torch.arange(cells)]
        self.cell = torch.cat([*parts, torch.full((5,), -1)])
        self.length = len(self.cell)
        self.positions = torch.arange(self.length)
        scene = torch.randn(cells, channels, generator=seeded(self.seed))
        noise = torch.randn(self.length, channels, generator=seeded(self.seed + 1))
        self.hidden = torch.where(self.cell[:, None] >= 0, scene[self.cell] + 0.3 * noise, noise)
        if self.constant:
            self.hidden = torch.ones_like(self.hidden)
        weights = torch.randn(self.layers, channels, channels, generator=seeded(self.seed + 2))
        self.weights = weights / channels**0.5

    def __len__(self) -> int:
        return self.layers + 1

    def step(self, method: Method, index: int) -> Tensor:
        assert isinstance(method, LlmMethod)
        if index > 1:  # steps 0 and 1 are both in layer 0, before and after its attention
            self.hidden = self.hidden + 0.3 * torch.tanh(self.hidden @ self.weights[index - 1])
        length = len(self.hidden)

        def attention(queries: int) -> Tensor:
            scores = self.hidden[-queries:] @ self.hidden.T / 4
            late = torch.arange(length)[None] > torch.arange(length - queries, length)[:, None]
            return scores.masked_fill(late, float("-inf")).softmax(-1)[None]

        view = LayerView(
            index=max(index - 1, 0),
            num_layers=self.layers,
            after_attention=index > 0,
            hidden=self.hidden,
            cell=self.cell,
            positions=self.positions,
            original_length=self.length,
            attention=attention if index else None,
        )
        plan = method.reduce_layer(view, Signals())
        dense = matrix(plan, length)
        if plan is not None:
            text = self.positions[self.cell < 0]
            self.hidden, lead = plan.apply(self.hidden), plan.leader()
            self.cell, self.positions = self.cell[lead], self.positions[lead]
            assert torch.equal(self.positions[self.cell < 0], text), "text must survive in order"
        assert self.hidden.isfinite().all()
        return dense


class MemoryStream(Stream):
    """Spans of very different sizes, one of them empty, asked with growing budgets."""

    budgets = (0, 1, 5, 20, 100, 10_000)

    def prepare(self) -> None:
        spans = 9
        tokens = torch.randint(1, 40, (spans,), generator=seeded(self.seed))
        tokens[4] = 0
        keys = torch.nn.functional.normalize(torch.randn(spans, 2, 8, generator=seeded(self.seed + 1)), dim=-1)
        if self.constant:
            tokens, keys = torch.full((spans,), 7), torch.zeros(spans, 2, 8)
        start = torch.arange(spans, dtype=torch.float64)
        self.memory = MemoryView(start, start + 1, tokens, keys, attention=lambda rows, each, depth: keys[rows, 0, 0])
        self.question = torch.nn.functional.normalize(torch.randn(8, generator=seeded(self.seed + 2)), dim=0)

    def __len__(self) -> int:
        return len(self.budgets)

    def step(self, method: Method, index: int) -> Tensor:
        assert isinstance(method, MemoryMethod)
        budget = self.budgets[index]
        given = method.recall(self.memory, budget, self.signals(question=self.question))
        assert given.dtype == torch.int64
        assert given.shape == self.memory.tokens.shape
        assert bool(((given >= 0) & (given <= self.memory.tokens)).all())
        assert int(given.sum()) <= budget
        return given


STREAMS: dict[Stage, Callable[..., Stream]] = {
    Stage.PIXEL: PixelStream,
    Stage.EMBEDDING: TokenStream,
    Stage.LLM: PromptStream,
    Stage.MEMORY: MemoryStream,
}


def stream_for(name: str, seed: int, *, constant: bool = False, only: frozenset[Signal] | None = None) -> Stream:
    return STREAMS[methods()[name].stage](seed, constant=constant, only=only)


def play(method: Method, stream: Stream) -> list[Tensor]:
    return [stream.step(method, i) for i in range(len(stream))]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert [t.shape for t in left] == [t.shape for t in right]
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", IDS)
def test_says_what_it_is_and_lives_in_its_stage(name: str) -> None:
    cls = methods()[name]
    assert cls.paper.strip()
    assert (cls.__doc__ or "").strip()
    assert not (cls.__doc__ or "").startswith(cls.__name__ + "("), "the docstring must be written, not generated"
    assert dataclasses.is_dataclass(cls)
    assert all(isinstance(need, Signal) for need in cls.needs)
    assert cls.__module__.split(".")[-2:] == [cls.stage.value, name]


@pytest.mark.parametrize("name", IDS)
def test_every_setting_has_a_default(name: str) -> None:
    for setting in fields(methods()[name]):  # type: ignore[arg-type]
        has = setting.default is not dataclasses.MISSING or setting.default_factory is not dataclasses.MISSING
        assert has, f"{name}.{setting.name} has no default"


@pytest.mark.parametrize("name", IDS)
def test_settings_survive_being_written_and_built(name: str) -> None:
    method = methods()[name].tiny()
    written = []
    for key, value in method.settings().items():
        if isinstance(value, Budget):
            written.append(f"tokens={value.tokens}" if value.tokens else f"keep_ratio={value.keep_ratio}")
        elif value is not None:
            written.append(f"{key}={value}")
    built = build(f"{name}:{','.join(written)}")
    assert type(built) is type(method)
    assert built.settings() == method.settings()


@pytest.mark.parametrize("name", IDS)
def test_tiny_works_with_no_more_than_the_signals_it_needs(name: str) -> None:
    method = methods()[name].tiny()
    assert play(method, stream_for(name, 1, only=method.needs))


@pytest.mark.parametrize("name", IDS)
def test_constant_input_is_no_trouble(name: str) -> None:
    assert play(methods()[name].tiny(), stream_for(name, 1, constant=True))


@pytest.mark.parametrize("name", IDS)
def test_spawn_has_the_settings_and_none_of_the_state(name: str) -> None:
    used = methods()[name].tiny()
    play(used, stream_for(name, 1))
    twin = used.spawn()
    assert twin is not used
    assert twin.settings() == used.settings()
    assert_same(play(twin, stream_for(name, 2)), play(methods()[name].tiny(), stream_for(name, 2)))


@pytest.mark.parametrize("name", IDS)
def test_reset_forgets_even_in_the_middle(name: str) -> None:
    method = methods()[name].tiny()
    fresh = play(method, stream_for(name, 1))
    method.reset()
    stream_for(name, 2).step(method, 0)
    method.reset()
    assert_same(play(method, stream_for(name, 1)), fresh)


@pytest.mark.parametrize("name", IDS)
def test_two_interleaved_streams_equal_two_separate_ones(name: str) -> None:
    prototype = methods()[name].tiny()
    separate = [play(prototype.spawn(), stream_for(name, seed)) for seed in (1, 2)]
    pair = [(prototype.spawn(), stream_for(name, seed)) for seed in (1, 2)]
    together = [[s.step(m, i) for m, s in pair] for i in range(len(pair[0][1]))]
    for which in (0, 1):
        assert_same([step[which] for step in together], separate[which])


@pytest.mark.parametrize("name", [name for name in ids_of(Stage.PIXEL) if methods()[name].causal])
def test_clip_by_clip_equals_all_at_once(name: str) -> None:
    stream = PixelStream(1)
    method = methods()[name].tiny()
    whole = stream.show(method, 0, stream.patches)
    for cuts in ([0, 2, 4, 6], [0, 1, 6], [0, 1, 2, 3, 4, 5, 6]):
        method.reset()
        parts = [stream.show(method, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        joined = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        assert_same([joined], [whole])


@pytest.mark.parametrize("name", ids_of(Stage.PIXEL, Stage.EMBEDDING, Stage.LLM))
def test_something_is_reduced_and_something_is_left(name: str) -> None:
    plans = play(methods()[name].tiny(), stream_for(name, 1))
    assert any(len(plan) < plan.shape[1] for plan in plans)
    assert all(len(plan) for plan in plans)


@pytest.mark.parametrize("name", [name for name in ids_of(Stage.EMBEDDING) if hasattr(methods()[name], "budget")])
def test_budget_is_an_upper_limit_of_the_whole_grid(name: str) -> None:
    for ragged in (False, True):
        tokens, attention, pooled = clip(3, ragged=ragged)
        signals = Signals(received_attention=attention, cls_attention=attention, frame_features=pooled)
        total = tokens.grid[0] * tokens.grid[1] * tokens.grid[2]
        for text in ("tokens=1", "tokens=7", "keep_ratio=0.1", "keep_ratio=0.37", "keep_ratio=0.9", "keep_ratio=1"):
            method = build(f"{name}:{text}")
            assert isinstance(method, EmbeddingMethod)
            budget = method.settings()["budget"]
            assert isinstance(budget, Budget)
            kept = len(tokens.reduce(method.reduce(tokens, signals)))
            assert 1 <= kept <= budget.count(total)


@pytest.mark.parametrize("name", ids_of(Stage.EMBEDDING))
def test_caller_keeps_dtype(name: str) -> None:
    tokens, attention, pooled = clip(3)
    half = dataclasses.replace(tokens, features=tokens.features.bfloat16())
    signals = Signals(received_attention=attention, cls_attention=attention, frame_features=pooled.bfloat16())
    method = methods()[name].tiny()
    assert isinstance(method, EmbeddingMethod)
    reduced = half.reduce(method.reduce(half, signals))
    assert reduced.features.dtype == torch.bfloat16
    assert reduced.features.isfinite().all()


@pytest.mark.parametrize("name", ids_of(Stage.MEMORY))
def test_larger_budget_never_reads_less_in_all(name: str) -> None:
    amounts = [int(given.sum()) for given in play(methods()[name].tiny(), stream_for(name, 1))]
    assert amounts == sorted(amounts)
    assert amounts[-1] == int(MemoryStream(1).memory.tokens.sum())
