"""Decoding: exact times, the right stream, upright pictures, damage passed over, jumps that change nothing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from streamvid.ingest import DecodeStats, Sampling
from streamvid.ingest.clips import clips
from streamvid.ingest.pyav import PyavPictures, PyavReader
from tests.ingest.here import open_source
from tests.ingest.synthetic import even, number, numbers, same, write, write_two

VARIABLE = [Fraction(t, 1000) for t in (0, 40, 200, 210, 1000, 1033, 1066, 4000, 4001, 4500)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
@pytest.mark.parametrize("bframes", [0, 2])
def test_times_are_the_containers(tmp_path: Path, name: str, bframes: int) -> None:
    path = write(tmp_path / name, VARIABLE, bframes=bframes, last=Fraction(7, 10))
    with open_source(path) as source:
        frames = list(source.frames())
        assert [f.pts for f in frames] == VARIABLE
        assert numbers(frames) == list(range(10))
        ends = [*VARIABLE[1:], frames[-1].pts + frames[-1].duration]
        assert [f.pts + f.duration for f in frames] == ends
        assert source.stats.decoded == 10 and source.stats.skipped == 0


def test_times_do_not_come_from_a_rate(tmp_path: Path) -> None:
    """Sampling a variable rate by index / fps would show pictures 0, 3, 6; by time it shows what is on screen."""
    frames = list(open_source(write(tmp_path / "v.mp4", VARIABLE)).frames(Sampling(fps=1)))
    assert numbers(frames) == [0, 4, 6, 6, 7]
    assert [f.pts for f in frames] == [0, 1, Fraction(1066, 1000), 3, 4]


def test_still_tail_is_seen_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "tail.mp4", [*even(10), Fraction(1)], last=5)
    source = open_source(path)
    assert source.info.duration == 6
    frames = list(source.frames(Sampling(fps=1)))
    assert [f.pts for f in frames] == [0, 1, 2, 3, 4, 5]
    assert numbers(frames) == [0, *[10] * 5]


@pytest.mark.parametrize("name", ["o.mp4", "o.mkv", "o.ts"])
def test_start_offset_is_kept(tmp_path: Path, name: str) -> None:
    source = open_source(write(tmp_path / name, even(20, start=10.0)))
    shift = source.info.start - 10
    assert shift == 0 if name != "o.ts" else 0 <= shift < 3  # a transport stream adds its own delay
    assert source.info.duration == 2
    frames = list(source.frames(Sampling(fps=2)))
    assert [f.pts - shift for f in frames] == [10, Fraction(21, 2), 11, Fraction(23, 2)]
    assert numbers(frames) == [0, 5, 10, 15]


def test_span_in_the_middle_shows_what_is_on_screen_there(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "m.mp4", even(100)))
    frames = list(source.frames(Sampling(fps=2, start=3.05, stop=5)))
    assert numbers(frames) == [30, 35, 40, 45]
    assert frames[0].pts == Fraction(305, 100) and frames[1].pts == Fraction(35, 10)
    assert frames[-1].pts + frames[-1].duration <= 5


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_pictures_are_upright(tmp_path: Path, degrees: int) -> None:
    """The stored picture is light at its left end; the tag says how far to turn it counterclockwise."""
    times = even(3)
    plain = next(open_source(write(tmp_path / "p.mp4", times, first=31)).frames())
    source = open_source(write(tmp_path / "r.mp4", times, first=31, rotation=degrees))
    turned = next(source.frames())
    expected = torch.rot90(plain.pixels, degrees // 90, dims=(0, 1))
    assert turned.pixels.shape == expected.shape == (source.info.height, source.info.width, 3)
    assert torch.equal(turned.pixels, expected)
    assert source.info.rotation == (360 - degrees) % 360
    small = next(source.frames(size=(40, 20)))
    assert small.pixels.shape == (40, 20, 3)


def test_largest_stream_is_chosen(tmp_path: Path) -> None:
    source = open_source(write_two(tmp_path / "two.mp4", [(32, 160), (64, 320)]))
    assert (source.info.height, source.info.width) == (64, 320)
    assert number(next(source.frames()).pixels) == 1


def test_scaling_only_when_asked(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "s.mp4", even(2)))
    assert next(source.frames()).pixels.shape == (32, 160, 3)
    half = next(source.frames(size=(16, 80)))
    assert half.pixels.shape == (16, 80, 3) and number(half.pixels) == 0


def test_raw_stream_without_times_is_counted_out(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "raw.h264", even(50), kind="h264", bframes=0))
    frames = list(source.frames(Sampling(fps=1)))
    assert "stores no times" in source.info.notes[0]
    assert [f.pts for f in frames] == [0, 1] and numbers(frames) == [0, 25]
    assert source.stats.untimed == source.stats.decoded
    assert len(list(source.frames(Sampling(count=5)))) == 5


def test_size_change_in_mid_stream_is_scaled_to_the_first(tmp_path: Path) -> None:
    small = write(tmp_path / "a.h264", even(5), kind="h264", bframes=0).read_bytes()
    large = write(tmp_path / "b.h264", even(5), kind="h264", bframes=0, size=(64, 320), first=5).read_bytes()
    path = tmp_path / "both.h264"
    path.write_bytes(small + large)
    source = open_source(path)
    frames = list(source.frames())
    assert {tuple(f.pixels.shape) for f in frames} == {(32, 160, 3)}
    assert numbers(frames) == list(range(10)) and source.stats.rescaled == 5


def test_clock_that_starts_again_goes_on(tmp_path: Path) -> None:
    """Two recordings in one transport stream: the second one's times fall back by 20 s."""
    first = write(tmp_path / "a.ts", even(20, start=20.0)).read_bytes()
    second = write(tmp_path / "b.ts", even(20), first=20).read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(first + second)
    source = open_source(path)
    frames = list(source.frames())
    assert source.stats.jumps == 1
    assert [y.pts > x.pts for x, y in zip(frames, frames[1:], strict=False)].count(False) == 0
    assert numbers(frames)[-1] == 39 and frames[-1].pts - frames[0].pts < 5


def test_misplaced_pictures_are_passed_over_and_counted(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "x.mp4", even(3)))
    assert isinstance(source.reader, PyavReader)
    with PyavPictures(source.reader._film) as pictures:
        times, stats = place(pictures, [0, 10, 10, 9, 20, None, 40])
        assert times == [0, 10, 20, 30, 40]
        assert stats.misplaced == 2 and stats.untimed == 1


@pytest.mark.parametrize(
    ("stamps", "times", "jumps", "misplaced"),
    [
        ([0, 10, 90000, 20, 30], [0, 10, 20, 30], 0, 1),  # one damaged time ahead
        ([900, 910, 3, 920, 930], [900, 910, 920, 930], 0, 1),  # one damaged time behind
        ([0, 10, 3000, 3010], [0, 10, 3000, 3010], 0, 0),  # a picture that stays for half a minute
        ([0, 10, 3000, 6000, 9000], [0, 10, 3000, 6000, 9000], 0, 0),  # one picture every half minute
        ([900, 910, 0, 10, 20], [900, 910, 920, 930, 940], 1, 0),  # a new clock
        ([0, 10, 3000], [0, 10, 3000], 0, 0),
    ],
)
def test_one_damaged_time_spoils_no_other(
    tmp_path: Path, stamps: list[int], times: list[int], jumps: int, misplaced: int
) -> None:
    source = open_source(write(tmp_path / "x.mp4", even(3)))
    assert isinstance(source.reader, PyavReader)
    with PyavPictures(source.reader._film) as pictures:
        got, stats = place(pictures, list(stamps))
        assert (got, stats.jumps, stats.misplaced) == (times, jumps, misplaced)


def place(pictures: PyavPictures, stamps: list[int | None]) -> tuple[list[Fraction], DecodeStats]:
    """What becomes of frames with these stamps, in hundredths of a second."""
    pictures._frames = iter(  # type: ignore[assignment]
        [SimpleNamespace(pts=p, dts=None, duration=0, time_base=Fraction(1, 100), is_corrupt=False) for p in stamps]
    )
    return [picture.pts * 100 for picture in pictures], pictures.stats


@pytest.mark.parametrize("name", ["d.mp4", "d.mkv", "d.ts"])
def test_damage_is_passed_over_and_counted(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, even(120), gop=20, size=(64, 320), noise=30)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes()
    path.write_bytes(content)
    source = open_source(path)
    frames = list(source.frames())
    stats = source.stats
    assert 90 <= len(frames) < 120
    assert stats.skipped + stats.damaged + stats.misplaced > 0
    wrong = [f.pts - frames[0].pts for f in frames if f.pts - frames[0].pts != Fraction(number(f.pixels), 10)]
    assert all(6 <= time < 8 for time in wrong)  # the rest of the damaged group may show traces of it
    assert all(x.pts < y.pts for x, y in zip(frames, frames[1:], strict=False))
    assert number(frames[0].pixels) == 0 and number(frames[-1].pixels) == 119


JUMPS = [
    ("j.mp4", {"gop": 10, "bframes": 2}),
    ("j.mp4", {"gop": 10, "bframes": 2, "options": {"x264-params": "open-gop=1"}}),
    ("j.mp4", {"gop": 10, "bframes": 2, "container": {"movflags": "frag_keyframe+empty_moov"}}),
    ("j.mp4", {"gop": 30, "bframes": 0, "options": {"x264-params": "intra-refresh=1"}}),
    ("j.mkv", {"gop": 10, "bframes": 2}),
    ("j.mov", {"gop": 7, "bframes": 1}),
    ("j.ts", {"gop": 10}),
    ("j.avi", {"codec": "mjpeg"}),
]


@pytest.mark.parametrize(("name", "how"), JUMPS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(JUMPS)])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(fps=0.4), Sampling(fps=3), Sampling(count=4, start=7), Sampling(count=3, start=0.5, stop=19.95)],
    ids=str,
)
def test_jumping_gives_exactly_what_reading_on_gives(
    tmp_path: Path, name: str, how: dict[str, object], sampling: Sampling
) -> None:
    source = open_source(write(tmp_path / name, even(200, start=0.5), **how))  # type: ignore[arg-type]
    assert isinstance(source.reader, PyavReader)
    frames = source.frames(sampling)
    jumped = list(frames)
    stats, report = source.stats, source.report
    source.reader._film.jumps, source.reader._film.linear, source.reader._film.keys = False, False, None
    plain = list(source.frames(sampling))
    assert same(jumped, plain) and report == source.report
    assert source.stats.seeks == 0
    if name in ("j.mkv", "j.mov") or how == JUMPS[0][1]:
        assert stats.restarts == 0
        if sampling.fps == 0.4:
            assert stats.seeks > 0 and stats.decoded < source.stats.decoded / 2


def test_false_key_frames_do_not_mislead(tmp_path: Path) -> None:
    """An mp4 whose every picture is marked as key frame: a jump lands in the middle of a group."""
    path = write(tmp_path / "k.mp4", even(200), gop=200, bframes=0)
    content = path.read_bytes()
    assert content.count(b"stss") == 1
    path.write_bytes(content.replace(b"stss", b"free"))
    source = open_source(path)
    frames = list(source.frames(Sampling(fps=0.3)))
    assert numbers(frames) == [round(k / 0.3 * 10 - 0.4999) for k in range(len(frames))]
    assert source.stats.restarts >= 1


MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full", [False, True])
def test_colors_follow_matrix_and_range_of_the_file(tmp_path: Path, matrix: int, full: bool) -> None:
    yuv = (110, 150, 100)
    path = tmp_path / "c.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"qp": "0", "threads": "1"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv444p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 2 if full else 1, matrix
        frame = av.VideoFrame(32, 32, "yuv444p")
        for plane, value in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.pts, frame.time_base = 0, Fraction(1, 10)
        frame.color_range, frame.colorspace = 2 if full else 1, matrix
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    red, blue = MATRICES[matrix]
    scale_y, scale_c, black = (255, 255, 0) if full else (219, 224, 16)
    y, u, v = (yuv[0] - black) / scale_y, (yuv[1] - 128) / scale_c, (yuv[2] - 128) / scale_c
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    got = next(open_source(path).frames()).pixels[16, 16].double()
    expected = (torch.tensor([r, g, b]).clamp(0, 1) * 255).double()
    assert (got - expected).abs().max() <= 1.5


def test_passes_are_independent(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "i.mp4", even(40)))
    alone = list(source.frames(Sampling(fps=2)))
    a, b = source.frames(Sampling(fps=2)), source.frames(Sampling(fps=2))
    woven = [(next(a), next(b)) for _ in alone]
    assert same([x for x, _ in woven], alone) and same([y for _, y in woven], alone)


def test_clips_of_a_file_tile_it(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "t.mp4", even(50)))
    got = list(clips(source.frames(), 16))
    assert [len(clip) for clip in got] == [16, 16, 16, 2]
    assert all(a.stop == b.start for a, b in zip(got, got[1:], strict=False))


def test_info_before_any_frame(tmp_path: Path) -> None:
    info = open_source(write(tmp_path / "n.mkv", even(25, fps=5, start=2.0), last=0.2)).info
    assert (info.codec, info.start, info.duration, info.decoder) == ("h264", 2, 5, "pyav")
    assert info.container.startswith("matroska") and info.notes == ()
