from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamvid.errors import SettingsError
from streamvid.reduction import Reduction
from streamvid.signals import Signals
from streamvid.temporal.methods.base import LayerView
from streamvid.temporal.methods.llm.frame_fusion import FrameFusion, cell_similarity, fold_runs, pruning_ratio

CELLS, FRAMES = 4, 5


def prompt(*, stamps: int = 0, noise: float = 0.0, cells: int = CELLS, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Hidden states and cells of two text tokens, frames (with text before each if asked for), three text tokens."""
    parts = [torch.full((2,), -1)]
    for _ in range(frames):
        parts += [torch.full((stamps,), -1), torch.arange(cells)]
    cell = torch.cat([*parts, torch.full((3,), -1)])
    source = torch.Generator().manual_seed(0)
    picture = torch.randn(cells, 8, generator=source)
    hidden = torch.randn(len(cell), 8, generator=source)
    visual = cell >= 0
    hidden[visual] = picture[cell[visual]] + noise * hidden[visual]
    return hidden, cell


class Decoder:
    """Calls a method as the host does; layers between the calls leave the hidden states alone."""

    def __init__(self, hidden: Tensor, cell: Tensor, *, num_layers: int = 28) -> None:
        self.hidden, self.cell, self.num_layers = hidden, cell, num_layers
        self.length = len(hidden)
        self.positions = torch.arange(self.length)
        self.asked: list[int] = []

    def attention(self, queries: int) -> Tensor:
        """Every token is looked at more than the one before it, by prompt position."""
        self.asked.append(queries)
        return self.positions.float().softmax(0).expand(2, queries, -1)

    def call(self, method: FrameFusion, index: int, *, after: bool = True, blind: bool = False) -> Reduction | None:
        view = LayerView(
            index=index,
            num_layers=self.num_layers,
            after_attention=after,
            hidden=self.hidden,
            cell=self.cell,
            positions=self.positions,
            original_length=self.length,
            attention=self.attention if after and not blind else None,
        )
        plan = method.reduce_layer(view, Signals())
        if plan is not None:
            self.hidden, lead = plan.apply(self.hidden), plan.leader()
            self.cell, self.positions = self.cell[lead], self.positions[lead]
        return plan

    def run(self, method: FrameFusion) -> list[int]:
        """The length after every call."""
        lengths = []
        for step in range(self.num_layers + 1):
            self.call(method, max(step - 1, 0), after=step > 0)
            lengths.append(len(self.hidden))
        return lengths


def test_still_video_folds_into_its_first_frame() -> None:
    """The threshold would merge more than a generous budget asks for; the budget decides, exactly."""
    hidden, cell = prompt()
    decoder = Decoder(hidden, cell)
    method = FrameFusion(cost=0.2)
    plan = decoder.call(method, 0, after=False)
    assert plan is not None
    assert int((decoder.cell >= 0).sum()) == CELLS * FRAMES - int(0.8 * CELLS * FRAMES) == CELLS
    assert decoder.positions.tolist() == [0, 1, 2, 3, 4, 5, 22, 23, 24]
    assert torch.allclose(decoder.hidden, hidden[decoder.positions], atol=1e-6)
    assert method.merging_done
    assert method.pruning_done


def test_run_becomes_the_plain_mean_at_its_first_token() -> None:
    cell = torch.tensor([-1, 0, 1, 0, 1, 0, 1])
    hidden = torch.tensor([[9.0, 9], [1, 0], [0, 1], [2, 0], [1, 0], [3, 0.1], [1.1, 0]])
    similarity, index = cell_similarity(hidden, cell)
    assert index.tolist() == [1, 3, 5, 2, 4, 6]
    assert similarity.tolist() == pytest.approx([-2, 1, 0.9995, -2, 0, 1], abs=1e-3)
    plan = fold_runs(similarity >= 0.9, index, len(cell))
    expected = torch.tensor([[9.0, 9], [2, 0.1 / 3], [0, 1], [1.05, 0]])
    assert plan.leader().tolist() == [0, 1, 2, 4]
    torch.testing.assert_close(plan.apply(hidden), expected)


def test_runs_longer_than_half_precision_counts_are_exact() -> None:
    """In bfloat16 a count of 257 reads 256; run lengths must not live in the dtype of the hidden states."""
    frames = 700
    hidden = torch.ones(frames, 4, dtype=torch.bfloat16)
    cell = torch.zeros(frames, dtype=torch.int64)
    similarity, index = cell_similarity(hidden, cell)
    plan = fold_runs(similarity >= 0.6, index, frames)
    assert plan.num_outputs == 1
    assert torch.equal(plan.apply(hidden), hidden[:1])
    assert plan.total(torch.ones(frames)).item() == pytest.approx(frames)


def test_zero_vectors_resemble_nothing() -> None:
    similarity, _ = cell_similarity(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
    assert similarity.tolist() == [-2, 0, -2, 0]


def test_pruning_follows_one_call_after_merging_ends_and_keeps_the_most_looked_at() -> None:
    hidden, cell = prompt(noise=3.0)
    decoder = Decoder(hidden, cell)
    method = FrameFusion(cost=0.5, similarity_lower_bound=0.999)
    assert decoder.call(method, 0, after=False) is None
    assert method.merging_done
    assert not method.pruning_done
    plan = decoder.call(method, 0)
    assert plan is not None
    assert plan.is_selection
    visual = decoder.positions[decoder.cell >= 0]
    count = round(20 * (1 - pruning_ratio([0.0], 0.5, 28)))
    assert visual.tolist() == list(range(22 - count, 22))
    assert decoder.call(method, 1) is None


def test_compute_spent_is_the_cost() -> None:
    hidden, cell = prompt(noise=0.6, cells=16, frames=40)
    for cost in (0.3, 0.5, 0.8):
        decoder = Decoder(hidden, cell)
        method = FrameFusion(cost=cost, similarity_lower_bound=0.8, ratio_lower_bound=0.05)
        text = int((cell < 0).sum())
        # what a layer's feed-forward half runs on is what is left after the call before layer 0, 0 after, 1 after, ...
        spent = sum(length - text for length in decoder.run(method)[:-1])
        assert spent / (28 * 640) == pytest.approx(cost, abs=0.01)


def test_text_between_frames_survives_unless_the_released_behaviour_is_asked_for() -> None:
    hidden, cell = prompt(stamps=2, noise=3.0)
    counts = {}
    for keep_text in (True, False):
        decoder = Decoder(hidden, cell)
        decoder.run(FrameFusion(cost=0.2, similarity_lower_bound=0.999, keep_text=keep_text))
        counts[keep_text] = int((decoder.cell < 0).sum())
    assert counts[True] == 15
    assert counts[False] < 15


def test_attention_of_as_many_queries_as_asked_for_and_only_once() -> None:
    hidden, cell = prompt(noise=3.0)
    decoder = Decoder(hidden, cell)
    decoder.run(FrameFusion(similarity_lower_bound=0.999, attention_queries=4))
    assert decoder.asked == [4]


def test_pruning_waits_for_attention() -> None:
    hidden, cell = prompt(noise=3.0)
    decoder = Decoder(hidden, cell)
    method = FrameFusion(cost=0.5, similarity_lower_bound=0.999)
    decoder.call(method, 0, after=False)
    assert decoder.call(method, 0, blind=True) is None
    assert not method.pruning_done
    assert decoder.call(method, 1) is not None


def test_next_prompt_starts_by_itself() -> None:
    hidden, cell = prompt(noise=0.5)
    method = FrameFusion()
    first = Decoder(hidden, cell).run(method)
    assert Decoder(hidden, cell).run(method) == first


def test_merging_that_never_ends_stops_at_the_last_layer() -> None:
    hidden, cell = prompt(noise=3.0)
    method = FrameFusion(cost=1.0, similarity_lower_bound=1.0, ratio_lower_bound=0.0)
    lengths = Decoder(hidden, cell, num_layers=2).run(method)
    assert lengths[-1] == len(hidden)


def test_prompt_without_video_is_left_alone() -> None:
    method = FrameFusion()
    assert Decoder(torch.randn(4, 8), torch.full((4,), -1)).run(method) == [4] * 29


def test_budget_already_spent_says_what_cost_would_do() -> None:
    assert pruning_ratio([], 0.3, 28) == pytest.approx(0.7)
    assert pruning_ratio([0.5, 0.5], 0.9, 4) == 0
    with pytest.raises(SettingsError, match=r"at least 0\.475"):
        pruning_ratio([0.0, 0.1], 0.3, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"cost": 0.0},
        {"cost": 1.5},
        {"similarity_lower_bound": 2.0},
        {"ratio_lower_bound": -0.1},
        {"attention_queries": 0},
        {"num_layers_reference": 0},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        FrameFusion(**settings)  # type: ignore[arg-type]
