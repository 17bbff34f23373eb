"""Toy scenes as files: what is decoded is what was drawn, when it was drawn."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest import Sampling, open_source
from streamvid.toy import video as toy_video
from streamvid.toy.questions import ask_all
from streamvid.toy.video import parse_size, render, write_truth, write_video
from streamvid.toy.world import Scene, needle_scene, sample_scene


@pytest.mark.parametrize("fps", [4, 10, 25])
def test_event_is_on_screen_exactly_from_start_to_end(tmp_path: Path, fps: int) -> None:
    scene = sample_scene(5, seconds=8, events=1, clean=True)
    event = scene.events[0]
    source = open_source(write_video(scene, tmp_path / "x.mp4", height=64, width=64, fps=fps))
    empty = scene.backdrop(64, 64)
    seen = [float(f.pts) for f in source.frames() if np.abs(f.pixels.numpy() - empty).max() > 60]
    assert seen[0] == event.start_seconds
    assert seen[-1] == pytest.approx(event.end_seconds - 1 / fps)
    assert len(seen) == (event.end_seconds - event.start_seconds) * fps
    assert source.info.duration == 8


def test_decoded_pictures_are_the_drawn_ones(tmp_path: Path) -> None:
    scene = sample_scene(2, seconds=4, events=1, clean=True)
    frames = list(open_source(write_video(scene, tmp_path / "x.mp4", height=96, width=128)).frames())
    assert [f.pts for f in frames] == [Fraction(k, 10) for k in range(40)]
    drawn = scene.draw([k / 10 for k in range(40)], height=96, width=128)
    error = np.abs(np.stack([f.pixels.numpy() for f in frames]).astype(float) - drawn)
    assert error.mean() < 2.5


def test_colours_come_back_with_the_matrix_of_the_tags(tmp_path: Path) -> None:
    """Reading BT.709 as BT.601, or one range as the other, moves pure colours by 10 and more."""
    scene = replace(
        sample_scene(0, seconds=4, events=0, background="plain", clean=True), tones=((40.0, 90.0, 160.0),) * 2
    )
    source = open_source(write_video(scene, tmp_path / "x.mp4", height=32, width=32))
    middle = next(source.frames()).pixels[16, 16].tolist()
    assert np.abs(np.array(middle) - [40, 90, 160]).max() <= 4


def test_same_scene_same_bytes(tmp_path: Path) -> None:
    scene = sample_scene(9, seconds=4, events=1)
    a = write_video(scene, tmp_path / "a.mp4", height=64, width=64).read_bytes()
    assert a == write_video(scene, tmp_path / "b.mp4", height=64, width=64).read_bytes()
    assert a != write_video(sample_scene(10, seconds=4, events=1), tmp_path / "c.mp4", height=64, width=64).read_bytes()


def test_moments_without_change_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    draw = Scene.draw

    def counting(self: Scene, seconds: list[float], *, height: int, width: int) -> object:
        drawn.extend(seconds)
        return draw(self, seconds, height=height, width=width)

    monkeypatch.setattr(Scene, "draw", counting)
    scene = sample_scene(5, seconds=20, events=1, clean=True)
    event = replace(scene.events[0], action="stays still", travel=0.0)
    write_video(replace(scene, events=(event,)), tmp_path / "x.mp4", height=32, width=32)
    assert len(drawn) == 3
    drawn.clear()
    write_video(replace(scene, noise=1.0), tmp_path / "y.mp4", height=32, width=32)
    assert len(drawn) == 200


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = sample_scene(4, seconds=6, events=1)
    whole = write_video(scene, tmp_path / "a.mp4", height=32, width=32).read_bytes()
    monkeypatch.setattr(toy_video, "_CHUNK", 7)
    assert write_video(scene, tmp_path / "b.mp4", height=32, width=32).read_bytes() == whole


def test_truth_lists_events_and_questions(tmp_path: Path) -> None:
    scene = sample_scene(11, events=2)
    truth = json.loads(write_truth(scene, tmp_path / "x.json").read_text(encoding="utf-8"))
    assert set(truth) == {"events", "questions", "seed", "seconds", "background"}
    assert (truth["seed"], truth["seconds"], truth["background"]) == (11, 16, scene.background)
    assert [set(event) for event in truth["events"]] == [
        {"shape", "color", "action", "start_seconds", "end_seconds"}
    ] * 2
    assert truth["events"][0]["start_seconds"] == scene.events[0].start_seconds
    assert truth["questions"] == [{"question": q.question, "answer": q.answer, "kind": q.kind} for q in ask_all(scene)]


def test_render_writes_both_beside_each_other(tmp_path: Path) -> None:
    out = tmp_path / "scene.mp4"
    paths = render(3, out, seconds=8, size="64x48", events=2, background="gradient", fps=5)
    assert paths == (out, tmp_path / "scene.json")
    info = open_source(out).info
    assert (info.width, info.height, info.duration) == (64, 48, 8)
    truth = json.loads(paths[1].read_text())
    assert len(truth["events"]) == 2 and truth["background"] == "gradient"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.json", "scene.mp4"]


@pytest.mark.parametrize(
    ("text", "size"), [("256", (256, 256)), (64, (64, 64)), ("320x240", (240, 320)), (" 64X48 ", (48, 64))]
)
def test_sizes_read_as_width_by_height(text: str | int, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "words"), [("255", "take 254 or 256"), ("64x47", "take 46 or 48"), ("big", "320x240"), ("8", "32 to 4096")]
)
def test_impossible_sizes_teach_a_possible_one(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_size(text)


@pytest.mark.parametrize(
    "bad", [{"events": 9}, {"background": "plaid"}, {"seconds": 2}, {"fps": 0}, {"size": "33"}, {"seed": -1}], ids=str
)
def test_impossible_requests_leave_nothing_behind(tmp_path: Path, bad: dict[str, object]) -> None:
    arguments: dict[str, object] = {"seed": 1, "out": tmp_path / "x.mp4", "size": "64", **bad}
    with pytest.raises(SettingsError):
        render(**arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(6))
def test_short_scenes_hold_what_fits(tmp_path: Path, seed: int) -> None:
    for seconds in (4, 7, 8, 11):
        _, truth = render(seed, tmp_path / "x.mp4", seconds=seconds, size=32, fps=2)
        assert 1 <= len(json.loads(truth.read_text())["events"]) <= seconds // 4


def test_name_must_end_in_mp4(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=".mp4"):
        render(1, tmp_path / "x.avi")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.mp4"
    out.write_bytes(b"old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy_video, "_to_yuv", full_disk)
    with pytest.raises(SourceError, match="No space left"):
        write_video(sample_scene(1, seconds=4, events=1), out, height=32, width=32)
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.mp4"]


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be written"):
        write_video(sample_scene(1, seconds=4, events=1), tmp_path / "no" / "x.mp4", height=32, width=32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "busy"])
def test_ten_minutes_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    scene, needle = needle_scene(3, distractors=kind)
    process = psutil.Process()
    write_video(sample_scene(1, seconds=8, events=2), tmp_path / "warm.mp4")
    before = process.memory_info().rss
    source = open_source(write_video(scene, tmp_path / "x.mp4"))
    middle = (needle.start_seconds + needle.end_seconds) / 2
    frames = source.frames(Sampling(fps=2))
    count = sum(1 for _ in frames)
    assert process.memory_info().rss - before < 150e6
    assert count == 1200 and source.info.duration == 600
    shown = next(source.frames(Sampling(fps=1, start=middle))).pixels.numpy().astype(float)
    assert np.abs(shown - scene.draw([middle], height=256, width=256)[0]).mean() < 4
