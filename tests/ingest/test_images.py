"""Folders, patterns and animated WebP: order, times, broken ones, and only what is looked at is decoded."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngImageFile

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest.images import ImageFiles, ImagesPictures, ImagesReader, expand, is_image_folder
from streamvid.ingest.pictures import Picture
from streamvid.ingest.sampling import Sampler, Sampling
from tests.ingest.drawn import (
    SIZE,
    animation,
    broken,
    exif,
    folder,
    frames_of,
    opened,
    plain,
    read,
    reds,
    spoil,
)


def test_natural_order(tmp_path: Path) -> None:
    names = ["frame10.png", "frame2.png", "Frame1.png", "frame2b.png", "frame02.png", "a.png"]
    for k, name in enumerate(names):
        plain(k).save(tmp_path / name)
    expected = ["a.png", "Frame1.png", "frame02.png", "frame2.png", "frame2b.png", "frame10.png"]
    assert list(ImageFiles.folder(tmp_path).names) == expected
    assert [path.name for path in expand(str(tmp_path / "*.png"))] == expected


def test_patterns(tmp_path: Path) -> None:
    folder(folder(tmp_path / "day2", 3) / "deep", 2)
    folder(tmp_path / "day10", 2)
    (tmp_path / "day2" / "notes.txt").write_text("hello")
    files = ImageFiles.find(f"{tmp_path}/**/*")
    inside = [f"day2/{name}" for name in ("deep/frame0.png", "deep/frame1.png", *(f"frame{k}.png" for k in range(3)))]
    assert sorted(files.names) == sorted([*inside, "day10/frame0.png", "day10/frame1.png"])
    assert [name.split("/")[0] for name in files.names] == ["day2"] * 5 + ["day10"] * 2
    assert any(note.startswith("1 file left out") for note in files.notes)
    assert len(read(ImagesReader(files))[0]) == 7
    assert ImageFiles.find(f"{tmp_path}/day2/frame[12].png").names == ("frame1.png", "frame2.png")
    with pytest.raises(SourceError, match=r"frame9\* matches no file"):
        ImageFiles.find(f"{tmp_path}/frame9*")
    with pytest.raises(SourceError, match="matches 1 file and no image"):
        ImageFiles.find(f"{tmp_path}/day2/*.txt")


def test_a_name_with_brackets_is_itself(tmp_path: Path) -> None:
    plain(0).save(tmp_path / "shot[1].png")
    assert ImageFiles.find(tmp_path / "shot[1].png").names == ("shot[1].png",)


def test_what_is_no_image_in_a_folder_is_counted(tmp_path: Path) -> None:
    folder(tmp_path / "in", 4)
    for name in ("notes.txt", "film.mp4", ".DS_Store", "._frame1.png"):
        (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / "in" / "more").mkdir()
    reader = opened(tmp_path / "in")
    assert len(read(reader)[0]) == 4
    assert reader.info.notes[0].startswith("4 files left out") and "1 of them videos" in reader.info.notes[0]
    assert reader.info.notes[1].startswith("1 folder in it not looked into")
    assert is_image_folder(tmp_path / "in")


def test_a_folder_of_videos_is_no_image_folder(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mkv", "c.gif"):
        (tmp_path / name).write_bytes(b"x")
    plain(0).save(tmp_path / "cover.jpg")
    assert not is_image_folder(tmp_path)
    assert not is_image_folder(tmp_path / "absent")
    with pytest.raises(SourceError, match="is a folder; name one video in it, for example .*a.mp4"):
        ImageFiles.find(tmp_path)
    (tmp_path / "cover.jpg").unlink()
    with pytest.raises(SourceError, match="folder without images"):
        ImageFiles.folder(tmp_path)


@pytest.mark.parametrize("rate", [25, 0.1, Fraction(30000, 1001)])
def test_a_rate_gives_exact_times(tmp_path: Path, rate: float | Fraction) -> None:
    reader = opened(folder(tmp_path / "in", 5), rate)
    exact = Fraction(str(rate))
    shots, _ = read(reader)
    assert [shot.pts for shot in shots] == [k / exact for k in range(5)]
    assert reader.info.duration == 5 / exact and reader.info.average_rate == exact
    assert reader.info.time_base == 1 / exact and not reader.info.notes
    assert reds(shots) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_make_sense(tmp_path: Path, rate: float) -> None:
    with pytest.raises(SettingsError):
        opened(folder(tmp_path / "in", 2), rate)


def test_without_rate_and_times_it_is_one_a_second(tmp_path: Path) -> None:
    reader = opened(folder(tmp_path / "in", 3))
    assert [shot.pts for shot in read(reader)[0]] == [0, 1, 2]
    assert reader.info.notes == (
        "no rate was given and the images have no times; 1 picture a second is assumed (set it with --rate)",
    )


def photos(path: Path, moments: list[tuple[str | None, str | None, str | None]]) -> Path:
    path.mkdir()
    for k, moment in enumerate(moments):
        plain(10 * k).save(path / f"p{k}.jpg", exif=exif(*moment))
    return path


def test_times_taken_set_order_and_times(tmp_path: Path) -> None:
    path = photos(
        tmp_path / "in",
        [
            ("2024:02:28 23:59:59", "25", None),
            ("2024:03:01 00:00:00", None, None),
            ("2024:02:28 23:59:59", "125", None),
        ],
    )
    reader = opened(path)
    shots, _ = read(reader)
    day = Fraction(86400)
    assert [shot.pts for shot in shots] == [0, Fraction(1, 8), day + 1 - Fraction(1, 8)]
    assert reds(shots) == [2, 0, 1]
    assert shots[-1].duration == Fraction(1, 8)  # the median way to the next, the lower of two
    assert reader.info.time_base == Fraction(1, 1000)
    assert any("taken at 2024-02-28 23:59:59.125 (local time)" in note for note in reader.info.notes)


def test_time_zones_are_taken_off(tmp_path: Path) -> None:
    path = photos(
        tmp_path / "in",
        [("2024:05:01 12:00:00", None, "+02:00"), ("2024:05:01 06:00:30", None, "-04:00")],
    )
    reader = opened(path)
    assert [shot.pts for shot in read(reader)[0]] == [0, 30]
    assert "2024-05-01 12:00:00 (UTC+02:00)" in reader.info.notes[0]


def test_time_zones_that_some_do_not_tell_are_not_used(tmp_path: Path) -> None:
    path = photos(tmp_path / "in", [("2024:05:01 12:00:00", None, "+02:00"), ("2024:05:01 12:00:30", None, None)])
    reader = opened(path)
    assert [shot.pts for shot in read(reader)[0]] == [0, 30]
    assert "do not tell their time zone" in reader.info.notes[1]


@pytest.mark.parametrize(
    ("moments", "why"),
    [
        ([("2024:05:01 12:00:00", None, None), ("2024:05:01 12:00:00", None, None)], "p0.jpg and p1.jpg were taken at"),
        ([("2024:05:01 12:00:00", None, None), (None, None, None)], "p1.jpg has no time"),
        ([("0000:00:00 00:00:00", None, None), ("2024:05:01 12:00:00", None, None)], "the images have no times"),
    ],
)
def test_times_taken_that_tell_too_little_are_not_used(
    tmp_path: Path, moments: list[tuple[str | None, str | None, str | None]], why: str
) -> None:
    reader = opened(photos(tmp_path / "in", moments))
    assert [shot.pts for shot in read(reader)[0]] == [0, 1]
    assert why in reader.info.notes[0] and "--rate" in reader.info.notes[0]


def test_a_rate_outranks_times_taken(tmp_path: Path) -> None:
    path = photos(tmp_path / "in", [("2024:05:01 12:00:00", None, None), ("2024:05:01 12:00:09", None, None)])
    assert [shot.pts for shot in read(opened(path, 2))[0]] == [0, Fraction(1, 2)]


def test_an_unreadable_photo_takes_no_time_from_the_others(tmp_path: Path) -> None:
    path = photos(tmp_path / "in", [(f"2024:05:01 12:00:0{k}", None, None) for k in range(4)])
    (path / "p1.jpg").write_bytes(b"\xff\xd8\xff")
    shots, sampler = read(opened(path))
    assert [shot.pts for shot in shots] == [0, 2, 3]
    assert sampler.stats.damaged == 1


def test_other_sizes_are_scaled_to_the_first_and_counted(tmp_path: Path) -> None:
    folder(tmp_path / "in", 4)
    plain(20, (48, 50)).save(tmp_path / "in" / "frame2.png")
    shots, sampler = read(opened(tmp_path / "in"))
    assert {shot.pixels.shape for shot in shots} == {(*SIZE, 3)} and sampler.stats.rescaled == 1
    shots, sampler = read(opened(tmp_path / "in"), size=(10, 12))
    assert {shot.pixels.shape for shot in shots} == {(10, 12, 3)} and sampler.stats.rescaled == 1


@pytest.mark.parametrize("name", ["frame{}.png", "frame{}.jpg", "frame{}.webp", "frame{}.avif"])
@pytest.mark.parametrize("how", ["empty", "text", "cut", "head"])
@pytest.mark.parametrize("where", [0, 2, 4])
def test_broken_images_are_passed_over_and_counted(tmp_path: Path, name: str, how: str, where: int) -> None:
    folder(tmp_path / "in", 5, name=name)
    broken(tmp_path / "in" / name.format(where), how)
    reader = opened(tmp_path / "in", 10)
    shots, sampler = read(reader)
    left = [k for k in range(5) if k != where]
    assert sampler.stats.damaged == 1 == read(reader)[1].stats.damaged
    assert reds(shots) == left
    assert [shot.pts for shot in shots] == [Fraction(k, 10) for k in left]
    assert reader.info.start == shots[0].pts
    assert reader.info.start + (reader.info.duration or 0) == Fraction(left[-1] + 1, 10)


@pytest.mark.parametrize("how", ["gone", "folder"])
def test_images_that_change_after_opening_are_passed_over(tmp_path: Path, how: str) -> None:
    reader = opened(folder(tmp_path / "in", 5))
    broken(tmp_path / "in" / "frame2.png", how)
    shots, sampler = read(reader)
    assert reds(shots) == [0, 1, 3, 4] and sampler.stats.damaged == 1
    broken(tmp_path / "in" / "frame0.png", how)
    with pytest.raises(SourceError, match="the first image .*; when opened it was whole"):
        read(reader)


def test_damage_that_only_decoding_shows_keeps_the_picture_before(tmp_path: Path) -> None:
    folder(tmp_path / "in", 6)
    for k in (0, 2, 3, 5):
        spoil(tmp_path / "in" / f"frame{k}.png")
    reader = opened(tmp_path / "in")
    assert reader.info.start == 1
    shots, sampler = read(reader)
    assert [(shot.pts, red) for shot, red in zip(shots, reds(shots), strict=True)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 4),
        (5, 4),
    ]
    assert sampler.stats.damaged == 4 and sampler.stats.decoded == 5


def test_nothing_readable_is_one_line(tmp_path: Path) -> None:
    folder(tmp_path / "in", 3)
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(SourceError, match="holds no image that can be shown; the first, frame0.png, is ") as told:
        opened(tmp_path / "in")
    assert "\n" not in str(told.value)
    with pytest.raises(SourceError, match="frame1.png is (cut off|damaged); copy it again"):
        opened(tmp_path / "in" / "frame1.png")


def test_only_what_is_sampled_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "in", 1)
    for k in range(1, 2000):
        os.link(path / "frame0.png", path / f"frame{k}.png")
    seen: list[str] = []
    open_ = Path.open

    def spy(self: Path, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.name)
        return open_(self, *args, **kwargs)

    decoded: list[int] = []
    monkeypatch.setattr(Path, "open", spy)
    monkeypatch.setattr(PngImageFile, "load_end", lambda self: decoded.append(1))
    files = ImageFiles.find(path)
    assert not seen
    reader = ImagesReader(files)
    assert set(seen) == {"frame0.png", "frame1999.png"} and len(decoded) == 1
    seen.clear()
    shots, sampler = read(reader, Sampling(count=8))
    assert len(shots) == 8 and sampler.stats.decoded == 8 and sampler.stats.seeks == 7
    assert len(decoded) == 9
    assert set(seen) == {f"frame{250 * k + n}.png" for k in range(8) for n in (0, 1)}
    assert reader.count_pictures(Fraction(3), Fraction(7)) == 4


class Steps(ImagesPictures):
    """A pass that takes no leave to jump."""

    def skip_to(self, seconds: Fraction) -> None:
        return


@pytest.fixture(scope="module")
def bumpy(tmp_path_factory: pytest.TempPathFactory) -> ImagesReader:
    path = folder(tmp_path_factory.mktemp("images") / "in", 24)
    for k in (0, 5, 6, 11, 23):
        broken(path / f"frame{k}.png", "cut")
    for k in (3, 7, 12, 22):
        spoil(path / f"frame{k}.png")
    return opened(path, 3)


@settings(deadline=None, max_examples=60)
@given(
    fps=st.fractions(min_value=Fraction(1, 10), max_value=7, max_denominator=12),
    start=st.fractions(min_value=0, max_value=7, max_denominator=9),
)
def test_a_jump_changes_nothing(bumpy: ImagesReader, fps: Fraction, start: Fraction) -> None:
    plan = bumpy.plan(Sampling(fps=fps, start=start))
    jumping = list(Sampler(bumpy.pictures(), plan))
    steps = bumpy.pictures()
    steps.__class__ = Steps
    stepping = list(Sampler(steps, plan))
    assert [(a.pts, a.duration) for a in jumping] == [(b.pts, b.duration) for b in stepping]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(jumping, stepping, strict=True))


def test_two_passes_side_by_side(tmp_path: Path) -> None:
    reader = opened(folder(tmp_path / "in", 4))
    one, two = reader.pictures(), reader.pictures()
    first = [next(one), next(one)]
    second = [next(two)]
    first += list(one)
    second += list(two)
    # Pictures may be looked at in any order, and after the end of the pass.
    assert [p.pts for p in first] == [p.pts for p in second] == [0, 1, 2, 3]
    assert [round(p.pixels()[..., 0].mean() / 10) for p in reversed(first)] == [3, 2, 1, 0]
    closed = reader.pictures()
    closed.close()
    assert next(closed, None) is None


def test_an_animation_has_its_own_times(tmp_path: Path) -> None:
    durations = [40, 33, 1000, 7, 250]
    path = animation(tmp_path / "a.webp", durations)
    reader = opened(path)
    info = reader.info
    assert (info.container, info.codec, info.decoder) == ("webp", "webp", "pillow")
    assert info.duration == Fraction(sum(durations), 1000) and info.time_base == Fraction(1, 1000)
    shots, sampler = read(reader)
    expected = frames_of(path)
    assert [shot.pts for shot in shots] == [Fraction(ms, 1000) for ms, _ in expected]
    assert [shot.duration for shot in shots] == [Fraction(ms, 1000) for ms in durations]
    assert all(np.array_equal(shot.pixels, pixels) for shot, (_, pixels) in zip(shots, expected, strict=True))
    assert sampler.stats.decoded == 5 and not info.notes


def test_frames_of_no_time_stay_a_tenth_of_a_second(tmp_path: Path) -> None:
    reader = opened(animation(tmp_path / "a.webp", [40, 0, 0, 20]), rate=5)
    assert [shot.pts for shot in read(reader)[0]] == [0, *(Fraction(ms, 1000) for ms in (40, 140, 240))]
    assert reader.info.duration == Fraction(260, 1000)
    assert "2 frames of 0 ms shown for 100 ms, as browsers do" in reader.info.notes
    assert any("rate is not used" in note for note in reader.info.notes)


@settings(deadline=None, max_examples=25)
@given(fps=st.fractions(min_value=1, max_value=40, max_denominator=7))
def test_a_jump_in_an_animation_changes_nothing(moving: ImagesReader, fps: Fraction) -> None:
    plan = moving.plan(Sampling(fps=fps))
    steps = moving.pictures()
    steps.__class__ = Steps
    for a, b in zip(Sampler(moving.pictures(), plan), Sampler(steps, plan), strict=True):
        assert a.pts == b.pts and np.array_equal(a.pixels, b.pixels)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> ImagesReader:
    return opened(animation(tmp_path_factory.mktemp("webp") / "a.webp", [30, 70, 10, 200, 45, 5, 90] * 2))


def test_key_frames_of_an_animation_need_no_other(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.webp", [100] * 9, kmin=2, kmax=3)
    reader = opened(path)
    keys = [picture.pts for picture in reader.pictures(keys_only=True)]
    times = [picture.pts for picture in reader.pictures()]
    assert keys[0] == 0 and 1 < len(keys) < len(times) == 9 and set(keys) < set(times)
    data = bytearray(path.read_bytes())
    whole = []
    start = data.find(b"ANMF")
    while start >= 0:
        whole.append(data[start + 14 : start + 20] == data[24:30])
        data[start + 23] |= 2  # every frame replaces what it covers, which need not be all
        start = data.find(b"ANMF", start + 1)
    path.write_bytes(data)
    keys = [picture.pts for picture in opened(path).pictures(keys_only=True)]
    assert 1 <= len(keys) < 9 and keys == [time for time, all_ in zip(times, whole, strict=True) if all_]


def test_pictures_of_an_animation_in_any_order(moving: ImagesReader) -> None:
    pictures: list[Picture] = list(moving.pictures())
    forward = [picture.pixels() for picture in pictures]
    backward = [picture.pixels() for picture in reversed(pictures)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not np.array_equal(forward[0], forward[-1])


def test_a_cut_animation_is_refused(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.webp", [100] * 5)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SourceError, match="a.webp is (damaged|cut off); copy it again"):
        opened(path)


def test_a_damaged_frame_of_an_animation_leaves_the_one_before(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.webp", [100] * 5)
    good = frames_of(path)
    data = bytearray(path.read_bytes())
    start = -1
    for _ in range(4):
        start = data.index(b"ANMF", start + 1)
    inside = data.index(b"VP8L", start) + 14
    data[inside : inside + 20] = bytes(255 - byte for byte in data[inside : inside + 20])
    path.write_bytes(data)
    with pytest.raises((EOFError, OSError)):
        frames_of(path)
    shots, sampler = read(opened(path))
    assert [shot.pts for shot in shots] == [Fraction(k, 10) for k in range(5)]
    for shot, k in zip(shots, (0, 1, 2, 2, 2), strict=True):
        assert np.array_equal(shot.pixels, good[k][1])
    assert sampler.stats.damaged == 2


def test_the_identity_is_that_of_contents_order_and_times(tmp_path: Path) -> None:
    path = folder(tmp_path / "in", 3)
    whole = opened(path).identity()
    assert opened(folder(tmp_path / "copy", 3)).identity() == whole == opened(f"{path}/*.png").identity()
    assert opened(path, 1).identity() == whole  # 1 a second is what it is without a rate
    others = {whole, opened(path, 2).identity(), opened(path / "frame0.png").identity()}
    (path / "frame1.png").rename(path / "frame01.png")
    others.add(opened(path).identity())
    plain(99).save(path / "frame01.png")
    others.add(opened(path).identity())
    assert len(others) == 5
    reader = opened(path)
    (path / "frame2.png").unlink()
    with pytest.raises(SourceError, match="frame2.png of .* cannot be read any more"):
        reader.identity()


def test_a_reader_can_be_sent_to_another_process(bumpy: ImagesReader) -> None:
    again: ImagesReader = pickle.loads(pickle.dumps(bumpy))
    assert again.info == bumpy.info and reds(read(again)[0]) == reds(read(bumpy)[0])


def test_torch_is_not_loaded() -> None:
    parts = ", ".join(f"streamvid.ingest.{part}" for part in ("images", "arrays", "spool"))
    code = f"import sys, {parts}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
