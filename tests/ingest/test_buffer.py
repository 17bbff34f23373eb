"""The bounded queue between decoding and encoding."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamvid.errors import SettingsError
from streamvid.ingest.buffer import Ahead, Buffer, Closed, Policy


@given(st.lists(st.sampled_from(["put", "get"]), max_size=60), st.integers(1, 5), st.sampled_from(list(Policy)))
def test_policies_do_what_they_say(steps: list[str], capacity: int, policy: Policy) -> None:
    lost: list[int] = []
    buffer: Buffer[int] = Buffer(capacity, policy, lost.append)
    waiting: list[int] = []
    expected_lost: list[int] = []
    for number, step in enumerate(steps):
        if step == "get":
            if waiting:
                assert buffer.get(timeout=0) == waiting.pop(0)
            else:
                with pytest.raises(TimeoutError):
                    buffer.get(timeout=0)
        elif len(waiting) < capacity:
            buffer.put(number)
            waiting.append(number)
        elif policy is Policy.DROP_OLDEST:
            buffer.put(number)
            expected_lost.append(waiting.pop(0))
            waiting.append(number)
        elif policy is Policy.DROP_NEWEST:
            buffer.put(number)
            expected_lost.append(number)
        assert len(buffer) == len(waiting) <= capacity
    assert lost == expected_lost and buffer.dropped == len(lost)


def test_waiting_holds_the_side_that_puts() -> None:
    buffer: Buffer[int] = Buffer(2)
    done = threading.Event()

    def fill() -> None:
        for number in range(5):
            buffer.put(number)
        buffer.finish(last=5)
        done.set()

    threading.Thread(target=fill, daemon=True).start()
    assert not done.wait(0.1) and len(buffer) == 2
    taken = []
    with pytest.raises(StopIteration):
        while True:
            taken.append(buffer.get(timeout=5))
    assert taken == [0, 1, 2, 3, 4, 5] and buffer.dropped == 0


def test_a_failure_comes_after_what_was_put_before_it() -> None:
    buffer: Buffer[int] = Buffer(3)
    buffer.put(1)
    buffer.finish(failure=ValueError("late"))
    assert buffer.get() == 1
    with pytest.raises(ValueError, match="late"):
        buffer.get()
    with pytest.raises(StopIteration):
        buffer.get()


def test_closing_frees_both_sides_and_everything_that_waits() -> None:
    lost: list[int] = []
    buffer: Buffer[int] = Buffer(1, drop=lost.append)
    buffer.put(1)
    failed: list[type[Exception]] = []

    def put() -> None:
        try:
            buffer.put(2)
        except Closed as reason:
            failed.append(type(reason))

    blocked = threading.Thread(target=put)
    blocked.start()
    buffer.close()
    blocked.join(5)
    assert failed == [Closed] and lost == [1] and buffer.dropped == 0
    with pytest.raises(StopIteration):
        buffer.get()


@pytest.mark.parametrize("settings", [{"frames": 0}, {"megabytes": 0}, {"policy": "drop-some"}])
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Ahead(**settings)  # type: ignore[arg-type]


def test_capacity_follows_memory_down_to_two() -> None:
    ahead = Ahead(frames=8, megabytes=100)
    assert [ahead.capacity(size) for size in (1, 10 << 20, 25 << 20, 400 << 20)] == [8, 8, 4, 2]
    assert Ahead(frames=1).capacity(1 << 40) == 1
