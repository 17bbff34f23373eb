"""Standing questions at work: who is asked when, what becomes of it, and what lies on the disk."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch

import streamvid_pipelines.live.engine as module
import streamvid_pipelines.live.guard as guarding
from streamvid.errors import BankError, SettingsError, StreamvidError
from streamvid.frames import Clip, Frame
from streamvid.session import Watched
from streamvid.toy.world import Event, Scene
from streamvid.watch.alerts import FILE_NAME, Alert, Alerts
from streamvid.watch.rules import Rule, When
from streamvid_pipelines.ask import Loaded, Request, load
from streamvid_pipelines.live.engine import Live, Said
from streamvid_pipelines.live.guard import Guard
from streamvid_pipelines.live.pictures import Ring, Shelf, write_clip
from streamvid_pipelines.live.sentry import LOOKS, WAITING, Finding, Sentry
from streamvid_pipelines.live.settings import CameraRequest, LiveRequest
from tests.live.cameras import NOON, FakeCamera, Item
from tests.watch.words import Words, picture


class Model:
    """Answers as told, and remembers what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[tuple[str, tuple[float, float]]]()

    def __call__(self, question: str, within: tuple[float, float]) -> str:
        self.asked.append((question, within))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def rule(what: str = "red circle", when: When = When.APPEARS, **settings: Any) -> Rule:
    return Rule(name=settings.pop("name", what or "change"), what=what, when=when, **settings)


def sentry(model: Model, *rules: Rule, **settings: Any) -> tuple[Sentry, list[Finding]]:
    found: list[Finding] = []
    return Sentry(rules or (rule(),), Words(), ask=model, found=found.append, **settings), found


def show(to: Sentry, shown: Sequence[str], *, first: int = 0, look: bool = True) -> int:
    """One clip of a picture a second at a time; returns the second it ends at."""
    for second, words in enumerate(shown, first):
        keys = picture(words, seed=second)[None]
        to.watch(Watched([(Fraction(second), Fraction(second + 1))], keys, torch.tensor([0.2]), 1))
        while look and to.look(Fraction(second + 1), Fraction(second + 1)):
            pass
    return first + len(shown)


QUIET = [""] * 20
CIRCLE = ["red circle"] * 5


def test_what_the_model_confirms_is_found_with_its_span_and_the_model_was_shown_the_seconds_around_it() -> None:
    model = Model("yes")
    guard, found = sentry(model)
    show(guard, [*QUIET, *CIRCLE, *QUIET])
    assert model.asked == [("is there a red circle?", (19.0, 21.0))]
    assert [(float(f.start), float(f.at), f.confirmed, f.answer) for f in found] == [(20, 20, True, "yes")]
    assert guard.counts.confirmed == 1 and guard.waiting == 0


def test_a_refusal_is_asked_again_two_seconds_later_with_more_to_see() -> None:
    model = Model("no", "Yes, there is.")
    guard, found = sentry(model)
    show(guard, [*QUIET, *CIRCLE, *QUIET])
    assert [within for _, within in model.asked] == [(19.0, 21.0), (19.0, 23.0)]
    assert [f.confirmed for f in found] == [True]
    assert found[0].stop == 23, "seen up to the second look"


def test_two_refusals_are_told_and_count_as_refused() -> None:
    guard, found = sentry(Model("no"))
    show(guard, [*QUIET, *CIRCLE, *QUIET])
    assert [f.confirmed for f in found] == [False]
    assert (guard.counts.refused, guard.counts.looks) == (1, len(LOOKS))


@pytest.mark.parametrize("text", ["nothing is remembered of 0:19", "a red circle", "I know", ""])
def test_only_yes_confirms(text: str) -> None:
    """Our own "nothing is remembered" begins like a no and "I know" ends like one; neither says anything."""
    guard, found = sentry(Model(text))
    show(guard, [*QUIET, *CIRCLE, *QUIET])
    assert [f.confirmed for f in found] == [False]
    absent, found = sentry(Model(text), rule(when=When.ABSENT))
    show(absent, QUIET)
    assert found and all(f.confirmed is False for f in found)


def test_of_what_leaves_the_model_is_asked_whether_it_had_been_there() -> None:
    """The memory of the moment it left still shows it: "is it gone?" would get the wrong answer."""
    model = Model("no", "yes")
    guard, found = sentry(model, rule(when=When.LEAVES))
    show(guard, [*QUIET, *CIRCLE, *QUIET])
    assert [within for _, within in model.asked] == [(19.0, 23.0), (19.0, 25.0)]
    assert [(float(f.at), f.confirmed) for f in found] == [(25, True)]


def test_a_rule_that_asks_nothing_needs_no_model_and_no_embedder() -> None:
    found: list[Finding] = []
    guard = Sentry([rule("", When.CHANGE)], None, ask=Model("no"), found=found.append)
    for second in range(40):
        changed = torch.tensor([0.5 if second == 30 else 0.0])
        guard.watch(Watched([(Fraction(second), Fraction(second + 1))], torch.zeros(1, 0), changed, 1))
    assert [(float(f.at), f.confirmed) for f in found] == [(30, None)]
    with pytest.raises(SettingsError, match="watch for any change"):
        Sentry([rule()], None, ask=Model("no"), found=found.append)


def test_looks_are_bounded_a_minute_what_matters_goes_first_and_the_rest_is_said() -> None:
    rules = [rule(name="late"), rule(name="soon", priority=9), rule(name="never", priority=0)]
    said: list[str] = []
    guard, found = sentry(Model("yes"), *rules, looks_a_minute=1, say=said.append)
    show(guard, [*QUIET, *CIRCLE, *[""] * 160])
    assert [f.rule.name for f in found] == ["soon", "late"]
    assert guard.counts.given_up == 1 and "'never' at 20.0 s was not looked at" in said[0]
    assert guard.waiting == 0


def test_never_more_wait_than_there_is_room_for() -> None:
    guard, _ = sentry(Model("yes"), *(rule(name=str(n), priority=n % 10) for n in range(WAITING + 20)))
    show(guard, [*QUIET, *CIRCLE], look=False)
    assert guard.waiting == WAITING and guard.counts.given_up == 20


def test_a_camera_that_is_cut_off_by_what_it_saw_still_alarms() -> None:
    model = Model("yes")
    guard, found = sentry(model)
    show(guard, [*QUIET, "red circle"], look=False)
    end = Fraction(21) - Fraction(1, 2)
    assert not guard.look(end, end), "there may be more to see"
    assert guard.look(end, end + 60) and [f.confirmed for f in found] == [True]


def test_what_waits_and_what_the_triggers_know_outlives_a_restart() -> None:
    """Without the state the circle would be there from the first picture on, and nobody would hear of it."""
    first, _ = sentry(Model("no"))
    end = show(first, [*QUIET, "red circle"], look=False)
    saved = json.loads(json.dumps(first.state()))
    model = Model("yes")
    second, found = sentry(model)
    second.restore(saved)
    end = show(second, ["red circle"] * 4, first=end)
    assert [(float(f.start), f.confirmed) for f in found] == [(20, True)]
    show(second, [*[""] * 20, *CIRCLE, ""], first=end)
    assert [f.start for f in found] == [20, 45]


def test_a_saved_state_that_is_ahead_of_the_memory_is_begun_anew() -> None:
    """After a power cut the memory may end before the state does; times that do not rise are no reason to fail."""
    ahead, _ = sentry(Model("no"))
    show(ahead, QUIET)
    behind, found = sentry(Model("yes"))
    behind.restore(ahead.state())
    show(behind, [*QUIET, *CIRCLE, ""], first=5)
    assert [f.start for f in found] == [25]


def test_changed_rules_begin_anew_and_say_so() -> None:
    before, _ = sentry(Model("no"), rule("red circle", name="it"))
    show(before, QUIET)
    said: list[str] = []
    after, _ = sentry(Model("no"), rule("blue square", name="it"), say=said.append)
    after.restore(before.state())
    assert said == ["rule 'it' was changed since it was last watched; it begins anew"]


def test_an_alert_is_raised_where_the_model_cannot_be_asked() -> None:
    def broken(question: str, within: tuple[float, float]) -> str:
        raise StreamvidError("out of memory")

    found: list[Finding] = []
    guard = Sentry([rule()], Words(), ask=broken, found=found.append)
    show(guard, [*QUIET, *CIRCLE])
    assert found[0].confirmed is None and found[0].reason.endswith("the model could not be asked: out of memory")


# --- pictures ---------------------------------------------------------------------------------------------------------


def frames(times: Sequence[float], *, height: int = 33, width: int = 49) -> Clip:
    shades = [torch.full((height, width, 3), int(t * 10) % 256, dtype=torch.uint8) for t in times]
    return Clip.of([Frame(s, Fraction(t), Fraction(1, 2)) for s, t in zip(shades, times, strict=True)])


def test_a_clip_keeps_real_times_over_a_gap(tmp_path: Path) -> None:
    ring = Ring()
    ring.add(frames([0, 0.5, 1, 1.5, 7.25, 7.75]))
    write_clip(ring.between(Fraction(1), Fraction(20)), tmp_path / "a.mp4", began=NOON)
    with av.open(str(tmp_path / "a.mp4")) as file:
        shown = [(f.time, int(f.to_ndarray(format="gray").mean())) for f in file.decode(video=0)]
        assert file.streams.video[0].width == 48 and file.metadata["creation_time"].startswith("2026-03-04T12:00:00")
    assert [at for at, _ in shown] == [0, 0.5, 6.25, 6.75]
    assert [abs(value - wanted) <= 3 for (_, value), wanted in zip(shown, (10, 15, 72, 77), strict=True)] == [True] * 4
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_the_ring_holds_what_is_asked_for_and_no_more_than_its_bound() -> None:
    ring = Ring(megabytes=1)
    noisy = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for second in range(60):
        ring.add(Clip.of([Frame(noisy, Fraction(second), Fraction(1))]))
    held = ring.between(Fraction(0), Fraction(100))
    assert 4 < len(held) < 60 and sum(len(p.jpeg) for p in held) <= 1 << 20 and held[-1].pts == 59
    ring.forget(Fraction(58))
    assert [p.pts for p in ring.between(Fraction(0), Fraction(100))] == [58, 59]
    assert ring.at(Fraction(58)) is not None and ring.at(Fraction(57)) is None


def test_beyond_the_bound_the_oldest_go_and_undelivered_ones_last(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, most_bytes=250, undelivered=lambda: {"0"})
    shelf.open("yard")
    for number in range(5):
        path = shelf.path("yard", str(number), ".mp4")
        path.write_bytes(bytes(100))
        os.utime(path, (number, number))
    assert shelf.tidy() == 3
    assert sorted(os.listdir(tmp_path / "yard")) == ["0.mp4", "4.mp4"]
    shelf.most_bytes = 100
    shelf.tidy()
    assert os.listdir(tmp_path / "yard") == ["0.mp4"]


# --- with the engine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(Request(model="toy", threads=1), lambda text: None)


RED = Event("circle", "red", "moves right", 20, 26, 0.3, 0.5, 0.4, 0.18)


@pytest.fixture
def yard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A camera that shows a red circle from 20 s to 26 s of a minute."""
    scene = Scene(7, 48, "plain", (RED,), tones=((120.0, 120.0, 130.0),))
    times = [Fraction(n, 2) for n in range(scene.seconds * 2)]
    pictures = torch.from_numpy(scene.draw([float(at) for at in times], height=128, width=128))
    items: list[Item] = [Frame(p, at, Fraction(1, 2)) for p, at in zip(pictures, times, strict=True)]

    def made(source: str, *, origin: datetime | None = None, **_: Any) -> FakeCamera:
        return FakeCamera(items, origin=origin, name=source)

    monkeypatch.setattr(module, "Supervised", made)


def run(folder: Path, loaded: Loaded, *rules: Rule, **settings: Any) -> list[Said]:
    request = LiveRequest(model="toy", memory=folder, fps=2, overload="all", disk_bytes=None, threads=1)
    said: list[Said] = []
    cameras = [CameraRequest("yard", "yard", rules=rules)]
    guard = Guard(cameras, request, loaded, say=said.append, **settings)
    with guard, Live(cameras, request, loaded, say=said.append, **guard.hooks) as live:
        assert live.wait(60)
    return said


def old(what: str) -> Rule:
    """The clock of the camera stands in the past."""
    return Rule.parse({"what": what, "stale_after": "9999d"})


def test_an_alert_has_reason_span_picture_and_a_clip_that_begins_before(
    tmp_path: Path, loaded: Loaded, yard: None
) -> None:
    heard: list[Mapping[str, Any]] = []
    wanted = old("a red circle appears")
    said = run(tmp_path, loaded, wanted, Rule.parse("a blue square appears"), tell=heard.append)
    assert [one.text for one in said] == []
    assert len(heard) == 1
    alert = heard[0]
    assert alert["rule"] == "a red circle appears" and alert["confirmed"] is True
    assert 19 <= alert["start_seconds"] <= 21 < alert["stop_seconds"]
    assert alert["wall"].startswith("2026-03-04T12:00:") and "'red circle' fits by" in alert["reason"]
    with av.open(alert["clip"]) as file:
        decoded = [(f.time or 0.0, f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]
    assert decoded[-1][0] == pytest.approx(14.5, abs=1), "10 s before and 5 s after, at 2 pictures a second"
    red = [int(((p[..., 0] > 180) & (p[..., 1] < 90)).sum()) for _, p in decoded]
    assert red[0] == 0 and max(red) > 300, "begins without it and shows it later"
    assert Path(alert["frame"]).read_bytes()[:2] == b"\xff\xd8"
    with Alerts(tmp_path) as alerts:
        assert alerts.counts() == {"waiting": 0, "done": 1, "expired": 0, "failed": 0}
    assert not list(tmp_path.glob("alerts/yard/*.part"))


def test_nothing_is_delivered_before_its_clip_is_there(tmp_path: Path) -> None:
    alert = Alert(
        rule="r", stream="s", start=Fraction(1), stop=Fraction(2), wall=1.0, score=1.0, reason="seen", priority=5
    )
    with Alerts(tmp_path) as alerts:
        alerts.raise_(alert, ready=1000.0)
        assert alerts.due("told", rules=None, stream=None, now=999.0) is None
        assert alerts.due("told", rules=None, stream=None, now=1001.0) is not None, "killed before its clip was written"
        alerts.release(alert.id)
        assert alerts.due("told", rules=None, stream=None, now=1.0) is not None


def test_what_failed_can_be_delivered_again_and_what_was_done_is_not_repeated(tmp_path: Path) -> None:
    alert = Alert(rule="r", stream="s", start=Fraction(1), stop=Fraction(2), wall=1.0, score=1.0, reason="seen")
    with Alerts(tmp_path) as alerts:
        alerts.raise_(alert)
        for action, state in (("good", "done"), ("bad", "failed")):
            alerts.mark(1, action, state=state, attempts=1, next_try=0, note="no", actions=["good", "bad"])
        assert alerts.counts()["failed"] == 1
        assert alerts.retry(alert.id) and not alerts.retry(alert.id)
        assert alerts.counts() == {"waiting": 1, "done": 0, "expired": 0, "failed": 0}
        assert alerts.due("good", rules=None, stream=None, now=1.0) is None
        assert alerts.due("bad", rules=None, stream=None, now=1.0) is not None


def test_rules_are_watched_beside_questions_and_leave_the_memory_as_it_is(
    tmp_path: Path, loaded: Loaded, yard: None
) -> None:
    run(tmp_path / "with", loaded, Rule.parse("a red circle appears"))
    run(tmp_path / "without", loaded)
    assert not (tmp_path / "without" / FILE_NAME).exists() and not (tmp_path / "without" / "alerts").exists()
    rows = []
    for name in ("with", "without"):
        with sqlite3.connect(next((tmp_path / name).glob("catalog*.sqlite3"))) as db:
            rows.append(db.execute("SELECT COUNT(*), SUM(tokens) FROM spans").fetchone())
        db.close()
    assert rows[0] == rows[1] and rows[0][0] > 0


def test_a_queue_that_cannot_be_written_for_a_while_costs_no_alert_and_no_picture(
    tmp_path: Path, loaded: Loaded, yard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = Alerts.raise_, [BankError("the disk is full")]

    def sometimes(self: Alerts, alert: Alert, *, ready: float = 0.0) -> str:
        if failures:
            raise failures.pop()
        return real(self, alert, ready=ready)

    monkeypatch.setattr(Alerts, "raise_", sometimes)
    monkeypatch.setattr(guarding, "SAVE_SECONDS", 0.0)
    heard: list[Mapping[str, Any]] = []
    said = run(tmp_path, loaded, old("a red circle appears"), tell=heard.append)
    assert [one.text for one in said if one.kind == "rules"] == [
        "the alert of 'a red circle appears' at 20.0 s cannot be kept yet: the disk is full"
    ]
    assert [alert["rule"] for alert in heard] == ["a red circle appears"]


def test_a_stream_without_an_embedder_watches_for_change_only(tmp_path: Path, loaded: Loaded, yard: None) -> None:
    blind = Loaded(loaded.adapter, None)
    with pytest.raises(SettingsError, match="needs an image-text encoder"):
        run(tmp_path, blind, Rule.parse("a red circle appears"))
    heard: list[Mapping[str, Any]] = []
    run(tmp_path, blind, old("anything changes"), tell=heard.append)
    assert heard and 19 <= heard[0]["start_seconds"] <= 21 and heard[0]["confirmed"] is None
