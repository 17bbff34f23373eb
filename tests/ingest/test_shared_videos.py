"""Real files, natural and hostile, where they lie beside the checkout; each is read, none is changed."""

from __future__ import annotations

import time
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path

import av
import pytest

from streamvid.errors import SourceError
from streamvid.ingest import Sampling
from streamvid.ingest.pyav import PyavReader
from tests.ingest.here import open_source
from tests.ingest.synthetic import same

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
NO_VIDEO = {".txt", ".json"}
HEAVY = {"long_1080p_videoonly_lowbitrate.mp4"}
SECONDS_PER_FILE = 30

REFUSED = {
    "0-timescale.mp4",
    "RIFF.avi",
    "ac3.mkv",
    "bbb_1ch_12kHz_q10_vorbis.webm",
    "bipbop_480wp_1001kbps-cenc-video-key1-init.mp4",
    "bipbop_nonfragment_header.mp4",
    "bug1079747.mp4",
    "bug499519.ogv",
    "cbcs.mp4",
    "chunk_out_of_range.mp4",
    "cmaf_segment_without_init.m4s",
    "init_prog.mp4",
    "init_truncated.mp4",
    "invalid-bitstream.webm",
    "invalid_userdata.mp4",
    "lfs_pointer_text.mp4",
    "no_samples_35s.mp4",
    "piff_encrypted.mp4",
    "prog_8s_enc_dashinit.mp4",
    "quicktime-jpeg.mov",
    "sample_audio_only.mp4",
    "sample_fragmented_clearkey.mp4",
    "sample_fragmented_uuid.mp4",
    "sample_malformed_free_box.mp4",
    "sample_with_sdt.ts",
    "short-cenc.mp4",
    "subsample_encrypted_altref.webm",
    "test_case_1185230.mp4",
    "tiny.wmv",
    "tiny_14bytes.gif",
    "tiny_audio.mp4",
    "tiny_no_frames.avi",
    "tiny_no_tracks.mp4",
    "zero_bytes.webm",
    "zero_empty_stsc.mp4",
}
"""Files without one picture that could be shown, and encrypted ones."""


def files(folder: str) -> list[Path]:
    return sorted(p for p in (VIDEOS / folder).glob("*") if p.suffix not in NO_VIDEO) if VIDEOS.is_dir() else []


def cases(folder: str) -> list[object]:
    return [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in HEAVY else []) for p in files(folder)]


pytestmark = pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside this checkout")


def shown_times(path: Path, index: int) -> list[Fraction]:
    """Presentation times of all packets that are shown, from the container alone."""
    with av.open(str(path)) as file:
        stream = file.streams[index]
        packets = [p for p in file.demux(stream) if p.size and p.pts is not None and not p.is_discard]
        return sorted({p.pts * p.time_base for p in packets})


def check_times(path: Path, sampling: Sampling) -> None:
    """Every frame is the picture on screen at its target, by the container's own times."""
    source = open_source(path)
    assert isinstance(source.reader, PyavReader)
    frames = list(source.frames(sampling))
    times = shown_times(path, source.reader._film.index)
    plan = source.plan(sampling)
    assert plan.fps is not None and frames
    # AVI stores no times of its own: FFmpeg counts packets there, and frames come a few of them later.
    if source.info.container == "avi":
        times = [time + source.info.start - times[0] for time in times]
    targets = [plan.start + k / plan.fps for k in range(len(frames))]
    before = None
    for target, frame in zip(targets, frames, strict=True):
        own = times[bisect_right(times, target) - 1]
        assert frame.pts == (target if own == before else max(own, plan.start))
        before = own
    assert all(a.pts + a.duration <= b.pts for a, b in zip(frames, frames[1:], strict=False))


@pytest.mark.parametrize("path", cases("natural"))
def test_sampled_times_are_those_on_screen(path: Path) -> None:
    start = open_source(path).info.start
    check_times(path, Sampling(fps=2, start=start, stop=start + 2))


@pytest.mark.slow
@pytest.mark.parametrize("path", cases("natural"))
def test_sampled_times_are_those_on_screen_to_the_end(path: Path) -> None:
    check_times(path, Sampling(fps=1))


@pytest.mark.parametrize("path", cases("odd"))
def test_odd_files_give_frames_or_one_clear_line(path: Path) -> None:
    began = time.monotonic()
    try:
        with open_source(path) as source:
            frames = source.frames(Sampling(fps=1, max_frames=4), size=(32, 32))
            times = [(frame.pts, frame.pts + frame.duration) for frame in frames]
    except SourceError as refusal:
        assert path.name in REFUSED, refusal
        assert "\n" not in str(refusal) and path.name in str(refusal)
    else:
        assert path.name not in REFUSED
        assert times and all(a < b for a, b in times)
        assert all(a[1] <= b[0] for a, b in zip(times, times[1:], strict=False))
    assert time.monotonic() - began < SECONDS_PER_FILE


@pytest.mark.slow
@pytest.mark.parametrize("path", cases("natural"))
def test_jumping_gives_exactly_what_reading_on_gives(path: Path) -> None:
    source = open_source(path)
    assert isinstance(source.reader, PyavReader)
    sampling = Sampling(count=5, start=source.info.start + Fraction(1, 3))
    jumped = list(source.frames(sampling))
    source.reader._film.jumps, source.reader._film.linear, source.reader._film.keys = False, False, None
    assert same(jumped, list(source.frames(sampling)))


def odd(name: str) -> Path:
    return VIDEOS / "odd" / name


@pytest.mark.parametrize(
    ("name", "size", "rotation"),
    [
        ("rotate-buck-bunny.mp4", (1920, 1080), 90),
        ("video_90.mov", (568, 320), 90),
        ("video_180.mov", (320, 568), 180),
        ("video_270.mov", (568, 320), 270),
        ("dolbyVision-hdr.MOV", (1280, 720), 90),
        ("no_timescale.mp4", (240, 320), 0),
        ("bear-vp9-odd-dimensions.webm", (121, 161), 0),
    ],
)
def test_size_of_the_upright_picture(name: str, size: tuple[int, int], rotation: int) -> None:
    source = open_source(odd(name))
    assert (source.info.height, source.info.width) == size and source.info.rotation == rotation
    assert next(source.frames()).pixels.shape == (*size, 3)


def test_mirror_is_not_lost() -> None:
    assert any("mirrored" in note for note in open_source(odd("sample_rotate_and_reflect.mp4")).info.notes)


@pytest.mark.parametrize(
    ("name", "start", "duration"),
    [
        ("header_says_3900s.mp4", 0.0667, 8.0),
        ("start_10s_gap.mp4", 10.0, 7.133),
        ("bbb_800x640_768kbps_30fps_avc_2b_firstpts_10_sec.mp4", 10.0, 4.0),
        ("delayed_start.mp4", 1.075, 0.96),
        ("test-middle-pat-pmt.ts", 59857.456, 0.5),
        ("edts.mp4", 0.0, 9.0),
        ("annex-b.mp4", 0.0, 0.5),
    ],
)
def test_start_and_duration_are_those_of_the_pictures(name: str, start: float, duration: float) -> None:
    info = open_source(odd(name)).info
    assert float(info.start) == pytest.approx(start, abs=1e-3)
    assert info.duration is not None and float(info.duration) == pytest.approx(duration, abs=1e-3)


def test_larger_of_two_films_is_taken() -> None:
    info = open_source(VIDEOS / "natural" / "nasa_13013.mp4").info
    assert (info.width, info.height) == (480, 270)


def test_cover_picture_is_not_the_film() -> None:
    assert open_source(odd("metadata.mp4")).info.codec == "h264"


def test_printed_counter_agrees_with_time() -> None:
    """The cards turn from grey to red at the eleventh picture (1.0 s) and to green at the 21st (2.0 s)."""
    source = open_source(VIDEOS / "natural" / "counter_10fps.mp4")
    means = {f.pts: f.pixels[:200, :200].float().mean((0, 1)) for f in source.frames(Sampling(fps=10))}
    assert list(means) == [Fraction(k, 10) for k in range(30)]
    red = [float(t) for t, (r, g, b) in means.items() if r > g + 40 and r > b + 40]
    green = [float(t) for t, (r, g, b) in means.items() if g > r + 40 and g > b + 40]
    assert red == [k / 10 for k in range(10, 20)] and green == [k / 10 for k in range(20, 30)]


def test_full_and_limited_range_agree_with_their_bars() -> None:
    pixels = next(open_source(odd("bt709_full_range.mp4")).frames()).pixels
    assert int(pixels.min()) <= 3 and int(pixels.max()) >= 252
