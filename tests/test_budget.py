from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.budget import Budget, Limits
from streamvid.errors import SettingsError


@given(st.integers(1, 10_000), st.floats(0.001, 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_share_keeps_at_least_one_and_never_more_than_asked(total: int, ratio: float) -> None:
    kept = Budget(keep_ratio=ratio).count(total)
    assert 1 <= kept <= total
    assert kept <= max(1, total * ratio + 1e-6)


@pytest.mark.parametrize(("ratio", "total", "kept"), [(0.1, 30, 3), (0.7, 10, 7), (0.29, 100, 29), (1.0, 7, 7)])
def test_a_share_that_comes_out_even_is_not_rounded_down(ratio: float, total: int, kept: int) -> None:
    """0.29 * 100 is 28.999999999999996."""
    assert Budget(keep_ratio=ratio).count(total) == kept


def test_a_number_is_a_limit() -> None:
    assert Budget(tokens=5).count(3) == 3
    assert Budget(tokens=5).count(8) == 5


def test_of_nothing_nothing_is_kept() -> None:
    assert Budget(tokens=5).count(0) == Budget(keep_ratio=0.5).count(0) == 0


@pytest.mark.parametrize(
    "given_settings",
    [
        {},
        {"tokens": 1, "keep_ratio": 0.5},
        {"tokens": 0},
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.01},
        {"keep_ratio": float("nan")},
    ],
)
def test_senseless_budgets_are_refused(given_settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="budget|keep_ratio"):
        Budget(**given_settings)


def test_senseless_limits_are_refused() -> None:
    assert Limits().answer_tokens > 0
    with pytest.raises(SettingsError, match="at least 1"):
        Limits(answer_tokens=0)
    with pytest.raises(SettingsError, match="at least 1 byte"):
        Limits(disk_bytes=0)
