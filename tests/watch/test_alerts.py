"""The queue and its courier: nothing is lost, nothing is silent."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.errors import BankError, SettingsError
from streamvid.watch.actions import Action, NotDelivered
from streamvid.watch.alerts import FILE_NAME, Alert, Alerts, State
from streamvid.watch.courier import Courier

NOW = 1.8e9


def alert(number: int, *, priority: int = 5, expires: float | None = None, rule: str = "r", stream: str = "s") -> Alert:
    return Alert(
        rule=rule, stream=stream, start=Fraction(number, 3), stop=Fraction(number + 1), wall=NOW + number, score=1.0,
        reason="seen", priority=priority, expires=expires,
    )  # fmt: skip


class Box(Action):
    """Takes what it is given, after it has failed as often as told."""

    def __init__(self, name: str = "box", *failures: NotDelivered) -> None:
        self.label = self.key = name
        self.failures = list(failures)
        self.got: list[str] = []
        self.tried = 0

    def deliver(self, message: Mapping[str, Any]) -> None:
        self.tried += 1
        if self.failures:
            raise self.failures.pop(0)
        self.got.append(str(message["id"]))


def drain(courier: Courier, now: float = NOW) -> None:
    while courier.step(now):
        pass


def test_an_alert_reads_back_exactly(tmp_path: Path) -> None:
    sent = replace(alert(1), confirmed=True, answer="yes", expires=NOW + 5)
    with Alerts(tmp_path) as queue:
        id = queue.raise_(sent)
    with Alerts(tmp_path) as queue:
        found = queue.get(id)
        assert found is not None
        assert found.alert == sent
        assert found.alert.start == Fraction(1, 3)


def test_an_alert_raised_twice_is_one_alert(tmp_path: Path) -> None:
    with Alerts(tmp_path) as queue, Courier(queue, [Box()]) as courier:
        assert queue.raise_(alert(1)) == queue.raise_(alert(1)) != queue.raise_(alert(2))
        drain(courier)
        queue.raise_(alert(1))
        assert queue.counts() == {"waiting": 0, "done": 2, "expired": 0, "failed": 0}


def test_higher_priority_goes_first_then_older(tmp_path: Path) -> None:
    box = Box()
    made = [alert(1, priority=2), alert(2, priority=9), alert(3, priority=2), alert(4, priority=9)]
    with Alerts(tmp_path) as queue, Courier(queue, [box]) as courier:
        for one in made:
            queue.raise_(one)
        drain(courier)
    assert box.got == [made[i].id for i in (1, 3, 0, 2)]


def test_failures_are_tried_again_later_each_time_and_said_once(tmp_path: Path) -> None:
    box = Box("box", *[NotDelivered("busy") for _ in range(4)])
    notes: list[str] = []
    with Alerts(tmp_path) as queue, Courier(queue, [box], note=notes.append) as courier:
        queue.raise_(alert(1))
        tries = [t for t in range(40) if courier.step(NOW + t)]
    assert tries == [0, 1, 3, 7, 15]
    assert box.got == [alert(1).id]
    assert notes == ["busy; trying again"]


def test_one_alert_that_always_fails_does_not_hold_up_others(tmp_path: Path) -> None:
    class Picky(Box):
        def deliver(self, message: Mapping[str, Any]) -> None:
            if message["priority"] == 9:
                raise NotDelivered("cannot digest it")
            super().deliver(message)

    box = Picky()
    with Alerts(tmp_path) as queue, Courier(queue, [box]) as courier:
        queue.raise_(alert(0, priority=9))
        for i in range(1, 6):
            queue.raise_(alert(i))
        drain(courier)
        assert box.got == [alert(i).id for i in range(1, 6)]
        assert [q.note for q in queue.waiting()] == ["cannot digest it"]


def test_a_receiver_that_is_down_is_asked_once_a_pause_and_others_go_on(tmp_path: Path) -> None:
    down = Box("hook", *[NotDelivered("nobody answers", down=True) for _ in range(3)])
    file = Box("file")
    with Alerts(tmp_path) as queue, Courier(queue, [down, file]) as courier:
        for i in range(20):
            queue.raise_(alert(i))
        drain(courier)
        assert (down.tried, len(file.got)) == (1, 20)
        assert queue.counts()["waiting"] == 20
        for t in range(1, 8):
            drain(courier, NOW + t)
        assert down.got == [alert(i).id for i in range(20)]
        assert down.tried == 23
        assert queue.counts()["done"] == 20


def test_the_receiver_says_how_long_to_wait(tmp_path: Path) -> None:
    box = Box("hook", NotDelivered("too many", down=True, after_seconds=90.0))
    with Alerts(tmp_path) as queue, Courier(queue, [box]) as courier:
        queue.raise_(alert(1))
        assert [t for t in range(0, 100, 5) if courier.step(NOW + t)] == [0, 90]


def test_a_refusal_is_final_and_the_other_actions_still_run(tmp_path: Path) -> None:
    notes: list[str] = []
    refuses, takes = Box("hook", NotDelivered("answers 404", again=False)), Box("file")
    with Alerts(tmp_path) as queue, Courier(queue, [refuses, takes], note=notes.append) as courier:
        queue.raise_(alert(1))
        drain(courier, NOW)
        drain(courier, NOW + 1e6)
        assert (refuses.tried, takes.got) == (1, [alert(1).id])
        assert [(q.state, q.note) for q in queue.over()] == [(State.FAILED, "answers 404")]
    assert len(notes) == 1 and "was refused: answers 404" in notes[0]


def test_what_is_stale_is_marked_and_said(tmp_path: Path) -> None:
    notes: list[str] = []
    box = Box("hook", NotDelivered("nobody answers"))
    with Alerts(tmp_path) as queue, Courier(queue, [box], note=notes.append) as courier:
        queue.raise_(alert(1, expires=NOW + 0.5))
        queue.raise_(alert(2))
        courier.step(NOW)
        drain(courier, NOW + 0.5)
        assert box.got == [alert(2).id]
        over = {q.alert.id: q for q in queue.over()}
        assert over[alert(1).id].state is State.EXPIRED
        assert over[alert(1).id].note.endswith("last attempt: nobody answers")
    assert "was not delivered: stale since 2027" in notes[-1]


def test_a_full_queue_gives_up_the_oldest_of_the_lowest_priority_and_counts_it(tmp_path: Path) -> None:
    with Alerts(tmp_path, limit=3) as queue:
        for number, priority in enumerate([5, 1, 1, 5, 5, 0]):
            queue.raise_(alert(number, priority=priority))
        assert {q.alert.wall - NOW for q in queue.waiting()} == {0, 3, 4}
        assert queue.counts() == {"waiting": 3, "done": 0, "expired": 3, "failed": 0}
        assert all("3 alerts were waiting" in q.note for q in queue.over())


def test_what_is_over_is_kept_up_to_a_number_and_all_are_counted(tmp_path: Path) -> None:
    with Alerts(tmp_path, keep=5) as queue, Courier(queue, [Box()]) as courier:
        for i in range(12):
            queue.raise_(alert(i))
        drain(courier)
        assert [q.alert.wall - NOW for q in queue.over()] == [11, 10, 9, 8, 7]
        assert queue.counts()["done"] == 12


def test_each_rule_has_its_own_actions(tmp_path: Path) -> None:
    one, two = Box("one"), Box("two")
    with Alerts(tmp_path) as queue, Courier(queue, {"a": [one, two], "b": [two]}) as courier:
        for i, rule in enumerate(["a", "b", "unknown"]):
            queue.raise_(alert(i, rule=rule))
        drain(courier)
        assert one.got == [alert(0, rule="a").id]
        assert two.got == [alert(0, rule="a").id, alert(1, rule="b").id]
        assert [q.alert.rule for q in queue.waiting()] == ["unknown"]
    with Alerts(tmp_path) as queue:
        for wrong in ([], {"a": []}, {}):
            with pytest.raises(SettingsError, match="no actions"):
                Courier(queue, wrong)


def test_a_second_courier_waits_for_the_first(tmp_path: Path) -> None:
    notes: list[str] = []
    with Alerts(tmp_path) as queue:
        first, second = Courier(queue, [Box()]), Courier(queue, [Box()], note=notes.append)
        queue.raise_(alert(1))
        queue.raise_(alert(2))
        assert (first.step(NOW), second.step(NOW), second.step(NOW)) == (1, 0, 0)
        assert len(notes) == 1
        first.close()
        assert second.step(NOW) == 1
        second.close()
        with Courier(queue, [Box()], stream="x") as x, Courier(queue, [Box()], stream="y") as y:
            for name in "xy":
                queue.raise_(alert(3, stream=name))
            assert (x.step(NOW), x.step(NOW), y.step(NOW)) == (1, 0, 1)


def test_an_action_that_was_taken_away_does_not_leave_alerts_waiting(tmp_path: Path) -> None:
    with Alerts(tmp_path) as queue:
        queue.raise_(alert(1))
        with Courier(queue, [Box("file"), Box("hook", NotDelivered("busy"))]) as courier:
            courier.step(NOW)
        assert queue.counts()["waiting"] == 1
        with Courier(queue, [Box("file")]) as courier:
            assert courier.step(NOW) == 0
        assert queue.counts()["done"] == 1


def test_run_delivers_what_comes_and_stops_when_told(tmp_path: Path) -> None:
    stop, box = threading.Event(), Box()
    with Alerts(tmp_path) as mine:

        def work() -> None:
            with Alerts(tmp_path) as queue, Courier(queue, [box]) as courier:
                courier.run(stop)

        thread = threading.Thread(target=work)
        thread.start()
        for i in range(5):
            mine.raise_(alert(i))
        for _ in range(200):
            if mine.counts()["done"] == 5:
                break
            stop.wait(0.05)
        stop.set()
        thread.join(5)
    assert not thread.is_alive()
    assert sorted(box.got) == sorted(alert(i).id for i in range(5))


def test_a_foreign_newer_or_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"something else entirely" * 100)
    with pytest.raises(BankError, match="is not a queue of alerts"):
        Alerts(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    db = sqlite3.connect(tmp_path / FILE_NAME)
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(BankError, match="another program's"):
        Alerts(tmp_path)
    newer = tmp_path / "newer"
    Alerts(newer).close()
    db = sqlite3.connect(newer / FILE_NAME)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(BankError, match="newer streamvid"):
        Alerts(newer)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("raise"), st.integers(0, 9), st.booleans()),
            st.tuples(st.just("step"), st.integers(0, 3), st.sampled_from(["ok", "again", "down", "never"])),
            st.tuples(st.just("restart"), st.just(0), st.just(False)),
        ),
        max_size=30,
    )
)
def test_every_alert_is_delivered_refused_or_said_to_be_expired(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("queue")
    box, notes = Box(), list[str]()
    queue = Alerts(folder, limit=4)
    courier = Courier(queue, [box], note=notes.append)
    raised, refused, now = 0, 0, NOW
    for kind, number, how in steps:
        if kind == "raise":
            queue.raise_(alert(raised, priority=number, expires=NOW + 40 if how else None))
            raised += 1
        elif kind == "step":
            now += number
            box.failures = [NotDelivered("x", again=how != "never", down=how == "down")] if how != "ok" else []
            refused += bool(courier.step(now)) and how == "never"
        else:
            courier.close()
            queue.close()
            queue = Alerts(folder, limit=4)
            courier = Courier(queue, [box], note=notes.append)
    counts = queue.counts()
    assert sum(counts.values()) == raised
    assert counts["done"] == len(box.got) == len(set(box.got))
    assert counts["failed"] == refused
    assert counts["waiting"] == len(queue.waiting()) <= 4
    assert sum(q.state is State.EXPIRED and bool(q.note) for q in queue.over()) == counts["expired"]
    courier.close()
    queue.close()
