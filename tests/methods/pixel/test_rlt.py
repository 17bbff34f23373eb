from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamvid.errors import SettingsError
from streamvid.signals import Signals
from streamvid.temporal.methods.base import PixelView
from streamvid.temporal.methods.pixel.rlt import FIRST_CHANGE, Rlt

IMAGENET = torch.tensor([0.229, 0.224, 0.225])


def view(pixels: Tensor, *, std: Tensor = IMAGENET, tubelet: int = 2, cell: int = 4) -> PixelView:
    return PixelView(pixels, std=std, tubelet=tubelet, cell=cell)


def still(patches: int, *, tubelet: int = 2, size: tuple[int, int] = (8, 12)) -> Tensor:
    picture = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    return picture.repeat(patches * tubelet, 1, 1, 1)


def kept(method: Rlt, shown: PixelView) -> Tensor:
    """(T, cells) which cells were kept."""
    plan = method.select(shown, Signals())
    return plan.spread(torch.ones(plan.num_outputs)).bool().reshape(shown.grid[0], -1)


def test_still_video_keeps_one_temporal_patch() -> None:
    keep = kept(Rlt(), view(still(5)))
    assert keep[0].all()
    assert not keep[1:].any()


def test_only_the_cell_that_changes_is_kept() -> None:
    pixels = still(4)
    pixels[4:, :, 4:8, 8:12] += 1  # from temporal patch 2 on, row 1, column 2
    keep = kept(Rlt(), view(pixels))
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[0] = True
    expected[2, 5] = True
    assert torch.equal(keep, expected)


def test_last_frame_of_a_patch_is_compared_with_the_first_of_the_one_before() -> None:
    pixels = still(3, tubelet=3)
    pixels[5, :, :4, :4] += 1  # last of patch 1: seen there; patch 2 compares with the first of patch 1
    pixels[7, :, 4:, 4:8] += 1  # middle of patch 2: never looked at
    keep = kept(Rlt(), view(pixels, tubelet=3))
    assert keep.nonzero()[6:].tolist() == [[1, 0]]


def test_threshold_is_exclusive_and_in_imagenet_units() -> None:
    """The same picture gives the same cells in every normalisation."""
    grey = still(2)
    grey[2:, :, :4, :4] += 0.02 * 0.226
    grey[2:, :, :4, 4:8] += 0.2 * 0.226
    for std in (IMAGENET, torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0])):
        keep = kept(Rlt(threshold=0.1), view(grey / std[:, None, None], std=std))
        assert keep[1].nonzero().flatten().tolist() == [1]


def test_slow_drift_is_never_seen_unless_refreshed() -> None:
    pixels = still(9) + torch.arange(18)[:, None, None, None] * 0.02
    assert kept(Rlt(), view(pixels)).any(1).sum() == 1
    assert kept(Rlt(refresh=3), view(pixels)).all(1).nonzero().flatten().tolist() == [0, 3, 6]


def test_no_run_is_longer_than_refresh_even_across_clips() -> None:
    method = Rlt(refresh=3)
    parts = [kept(method, view(still(2))) for _ in range(5)]
    assert torch.cat(parts).all(1).nonzero().flatten().tolist() == [0, 3, 6, 9]


def test_later_clip_continues_the_stream_and_reset_does_not() -> None:
    method = Rlt()
    assert kept(method, view(still(2)))[0].all()
    assert not kept(method, view(still(2))).any()
    method.reset()
    assert kept(method, view(still(2)))[0].all()


def test_change_of_size_starts_anew() -> None:
    method = Rlt(refresh=2)
    kept(method, view(still(3)))
    other = view(still(2, size=(12, 8)))
    assert kept(method, other)[0].all()
    assert kept(method, view(still(2)))[0].all()


def test_carried_frame_does_not_follow_later_writes_to_the_clip() -> None:
    """Decoders reuse buffers: state must be a copy, or a still video seems to stay still for ever."""
    method = Rlt()
    pixels = still(2)
    kept(method, view(pixels))
    pixels += 1
    assert kept(method, view(pixels)).any()


def test_change_is_what_select_judges_by_and_moves_nothing() -> None:
    method = Rlt()
    pixels = still(3)
    pixels[2:, :, :4, :4] += 0.5
    shown = view(pixels)
    change = method.change(shown)
    assert torch.equal(change, method.change(shown))
    assert (change[:6] == FIRST_CHANGE).all()
    assert change[6].item() == pytest.approx(0.5, abs=1e-5)
    assert torch.equal((change > 0.1).reshape(3, 6), kept(method, shown))
    after = method.change(shown)  # the end of the clip is now what comes before
    assert after[:6].tolist() == pytest.approx([0.5, 0, 0, 0, 0, 0], abs=1e-5)


def test_run_lengths_stand_in_token_order_and_cover_everything() -> None:
    pixels = still(5)
    pixels[4:, :, :4, :4] += 1  # cell 0 changes at temporal patch 2
    pixels[8:, :, :4, 4:8] += 1  # cell 1 at 4
    method = Rlt()
    shown = view(pixels)
    plan = method.select(shown, Signals())
    lengths = method.run_lengths(plan, shown.grid)
    assert lengths.tolist() == [2, 4, 5, 5, 5, 5, 3, 1]
    assert lengths.sum() == plan.num_inputs


def test_still_later_clip_may_keep_nothing() -> None:
    method = Rlt()
    method.select(view(still(2)), Signals())
    plan = method.select(view(still(2)), Signals())
    assert plan.num_outputs == 0
    assert method.run_lengths(plan, (2, 2, 3)).tolist() == []


@pytest.mark.parametrize("settings", [{"threshold": -0.1}, {"threshold": 300.0}, {"refresh": -1}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        Rlt(**settings)  # type: ignore[arg-type]


def test_parts_of_cells_or_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="whole"):
        Rlt().select(view(still(2)[:3]), Signals())
    with pytest.raises(ValueError, match="whole"):
        Rlt().select(view(still(2, size=(8, 10))), Signals())
