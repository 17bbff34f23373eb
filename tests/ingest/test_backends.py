"""All decoders give the same pictures at the same times, or say in one line why they do not read a file.

The yardstick is one pass of PyAV over all pictures in order, sampled by this file's own arithmetic.
torchcodec and decord are skipped where they are not installed.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.container import InputContainer
from numpy.typing import NDArray

from streamvid.errors import MissingExtra, SettingsError, SourceError
from streamvid.ingest import choice, torchcodec
from streamvid.ingest.choice import KNOWN_WRONG, facts_of
from streamvid.ingest.decord import Decord
from streamvid.ingest.openers import FileOpener, Opener
from streamvid.ingest.pictures import Picture
from streamvid.ingest.pyav import PyavReader
from streamvid.ingest.reader import Reader
from streamvid.ingest.sampling import Plan, Sampling
from streamvid.ingest.torchcodec import Library, NumberedReader, Torchcodec
from tests.ingest.synthetic import even, write

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
LIBRARIES: dict[str, type[Library]] = {"torchcodec": Torchcodec, "decord": Decord}
TOLERANCE = 2
"""Grey levels; all that is accepted is equal with FFmpeg 5.1, other versions may round differently."""

SCALED = 10.0
"""Grey levels on average, for pictures scaled from RGB instead of from what is stored; colour edges differ most."""

ONE_KEY = 1000
"""A group longer than any film here."""


def installed(name: str) -> str:
    """The name of a decoder that can be used here; skips otherwise."""
    if name in LIBRARIES:
        try:
            LIBRARIES[name].load()
        except SettingsError as reason:
            pytest.skip(str(reason))
    return name


@pytest.fixture(params=["pyav", "torchcodec", "decord"])
def decoder(request: pytest.FixtureRequest) -> str:
    return installed(request.param)


@pytest.fixture(params=["torchcodec", "decord"])
def optional(request: pytest.FixtureRequest) -> str:
    return installed(request.param)


def opened(path: Path, decoder: str = "pyav") -> Reader:
    return choice.reader(FileOpener(path, path.name), decoder)


# The yardstick


@dataclass
class Yardstick:
    """Every picture of a film up to a moment, in order; pixels of those a plan needs."""

    path: Path
    pts: list[Fraction] = field(default_factory=list)
    gone: list[Fraction] = field(default_factory=list)
    pixels: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def read(self, stop: Fraction | None, plans: list[Plan]) -> None:
        with opened(self.path).pictures() as pictures:
            self.pts = [pts for pts, _ in self._times(pictures, stop)]
        wanted = {number for plan in plans for _, _, number in self.shots(plan)}
        with opened(self.path).pictures() as pictures:
            for number, picture in enumerate(pictures):
                if number in wanted:
                    self.pixels[number] = picture.pixels()
                if len(self.pixels) == len(wanted):
                    break

    def _times(self, pictures: Iterator[Picture], stop: Fraction | None) -> Iterator[tuple[Fraction, Fraction]]:
        for picture in pictures:
            if self.gone:
                self.gone[-1] = picture.pts
            if stop is not None and picture.pts >= stop:
                return
            self.gone.append(picture.pts + picture.duration)
            yield picture.pts, picture.duration

    def shots(self, plan: Plan) -> list[tuple[Fraction, Fraction, int]]:
        """Time, duration and number of the picture for each frame of a plan."""
        assert plan.stop is not None
        if plan.fps is None:
            inside = [n for n, gone in enumerate(self.gone) if gone > plan.start and self.pts[n] < plan.stop]
            starts = [max(self.pts[n], plan.start) for n in inside]
            return [(a, min(self.gone[n], plan.stop) - a, n) for a, n in zip(starts, inside, strict=True)]
        result: list[tuple[Fraction, Fraction, int]] = []
        before = None
        k = 0
        while (target := plan.start + k / plan.fps) < plan.stop and k != plan.max_frames:
            number = max(0, bisect_right(self.pts, target) - 1)
            if target >= self.gone[number]:
                break
            pts = target if number == before else max(self.pts[number], plan.start)
            ends = min(plan.start + (k + 1) / plan.fps, self.gone[number], plan.stop)
            result.append((pts, ends - pts, number))
            before = number
            k += 1
        return result


def plans_of(reader: Reader, *, seconds: Fraction) -> list[Plan]:
    """All pictures of a second, the last quarter first, five over everything, two a second from within a picture."""
    start = reader.info.start
    third = start + Fraction(1, 3)
    asked = [Sampling(count=2, start=start + seconds * Fraction(3, 4), stop=start + seconds)]
    asked += [Sampling(stop=start + min(Fraction(1), seconds)), Sampling(count=5, stop=start + seconds)]
    if seconds > 1:
        asked.append(Sampling(fps=2, start=third, stop=start + min(Fraction(4), seconds)))
    return [reader.plan(sampling) for sampling in asked]


def check_equal(reader: Reader, path: Path, *, most_seconds: int = 20) -> None:
    """The reader gives what the yardstick says for all plans."""
    measured = Yardstick(path)
    plans = plans_of(reader, seconds=min(reader.end - reader.info.start, Fraction(most_seconds)))
    measured.read(max(plan.stop for plan in plans if plan.stop is not None), plans)
    for plan in plans:
        with closing(reader.sample(plan)) as shots:
            got = []
            for expected, shot in zip(measured.shots(plan), shots, strict=True):
                got.append((shot.pts, shot.duration))
                assert got[-1] == expected[:2]
                assert shot.pixels.dtype == np.uint8
                assert apart(shot.pixels, measured.pixels[expected[2]]) <= TOLERANCE


def apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    """The largest difference of any value."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(np.int16) - b).max())


def one_line(reason: BaseException, path: Path) -> bool:
    return "\n" not in str(reason) and path.name in str(reason) and "pyav" in str(reason)


# Films with known pictures


X264 = {"preset": "ultrafast", "g": "12", "bf": "2", "threads": "1"}
X265 = {"preset": "ultrafast", "x265-params": "keyint=12:bframes=2:log-level=none:pools=1"}
CLOSED = {"preset": "ultrafast", "x265-params": "keyint=12:bframes=2:open-gop=0:log-level=none:pools=1"}
VP9 = {"cpu-used": "8", "g": "12", "deadline": "realtime"}
AV1 = {"preset": "12", "g": "12", "svtav1-params": "lp=1"}


def film(
    path: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    count: int = 40,
    size: tuple[int, int] = (64, 128),
    pixels: str = "yuv420p",
    times: Callable[[int], int] = lambda k: 100 * k,
    container: dict[str, str] | None = None,
    rotation: int = 0,
    on_stream: Callable[[Any], None] = lambda stream: None,
    on_frame: Callable[[Any], None] = lambda frame: None,
) -> Path:
    """A coarse colourful pattern that moves; ``times`` are milliseconds."""
    pattern = np.random.default_rng(0).integers(0, 256, (size[0] // 8 + 2, 40 + size[1] // 8, 3), dtype=np.uint8)
    pattern = pattern.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w", container_options=container or {}) as file:
        stream = file.add_stream(codec, rate=10, options=options if options is not None else X264)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        on_stream(stream)
        for k in range(count):
            image = np.ascontiguousarray(pattern[: size[0], 2 * k % 160 : 2 * k % 160 + size[1]])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = times(k), Fraction(1, 1000)
            on_frame(frame)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def uneven(k: int) -> int:
    return 10000 + sum(1 + (37 * j * j) % 200 for j in range(k))


FILMS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264-mp4": ("a.mp4", {}),
    "h264-mkv": ("a.mkv", {}),
    "h264-mov": ("a.mov", {}),
    "h264-flv": ("a.flv", {}),
    "h264-fragments": ("a.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264-one-key": ("a.mkv", {"options": {**X264, "g": str(ONE_KEY)}}),
    "h264-no-b": ("a.mp4", {"options": {**X264, "bf": "0"}}),
    "h264-intra": ("a.mp4", {"options": {**X264, "g": "1"}}),
    "h264-late": ("a.mp4", {"times": lambda k: 10000 + 100 * k}),
    "h264-very-late": ("a.mkv", {"times": lambda k: 90_000_000 + 100 * k}),
    "h264-uneven": ("a.mp4", {"times": uneven}),
    "h264-turned": ("a.mp4", {"rotation": 90}),
    "h264-upside-down": ("a.mp4", {"rotation": 180}),
    "h264-444": ("a.mp4", {"pixels": "yuv444p", "size": (66, 130)}),
    "h264-422": ("a.mp4", {"pixels": "yuv422p"}),
    "h264-full-range": ("a.mp4", {"pixels": "yuvj420p"}),
    "h264-bt709": ("a.mkv", {"on_stream": lambda s: matrix(s.codec_context, 1), "on_frame": lambda f: matrix(f, 1)}),
    "h264-odd-width": ("a.mp4", {"pixels": "yuv444p", "size": (64, 101)}),
    "hevc-mp4": ("a.mp4", {"codec": "libx265", "options": X265}),
    "hevc-mkv": ("a.mkv", {"codec": "libx265", "options": X265}),
    "hevc-closed": ("a.mp4", {"codec": "libx265", "options": CLOSED}),
    "vp8-webm": ("a.webm", {"codec": "libvpx", "options": VP9}),
    "vp9-webm": ("a.webm", {"codec": "libvpx-vp9", "options": VP9}),
    "vp9-mp4": ("a.mp4", {"codec": "libvpx-vp9", "options": VP9}),
    "vp9-odd": ("a.webm", {"codec": "libvpx-vp9", "options": VP9, "size": (61, 121)}),
    "av1-mp4": ("a.mp4", {"codec": "libsvtav1", "options": AV1, "count": 26}),
    "av1-mkv": ("a.mkv", {"codec": "libsvtav1", "options": AV1, "count": 26}),
    "mjpeg-mov": ("a.mov", {"codec": "mjpeg", "options": {}, "pixels": "yuvj420p"}),
    "mjpeg-avi": ("a.avi", {"codec": "mjpeg", "options": {}, "pixels": "yuvj420p"}),
}
NOT_FOR_DECORD = {"hevc-mp4", "hevc-mkv", "vp9-odd", "av1-mp4", "av1-mkv"}


def matrix(of: Any, number: int) -> None:
    of.colorspace, of.color_range = number, 1


@pytest.mark.parametrize("name", FILMS)
def test_same_pictures_at_the_same_times(tmp_path: Path, decoder: str, name: str) -> None:
    file, how = FILMS[name]
    path = film(tmp_path / file, **how)
    if decoder == "decord" and name in NOT_FOR_DECORD:
        with pytest.raises(SettingsError) as refusal:
            opened(path, decoder)
        assert one_line(refusal.value, path)
        return
    reader = opened(path, decoder)
    assert reader.info.decoder == decoder and reader.info.chosen
    plain = opened(path)
    told = ("start", "duration", "width", "height", "rotation", "container", "codec", "time_base")
    assert [getattr(reader.info, key) for key in told] == [getattr(plain.info, key) for key in told]
    assert reader.end == plain.end
    check_equal(reader, path)


def test_every_picture_to_the_last(tmp_path: Path, optional: str) -> None:
    path = film(tmp_path / "a.mp4", times=uneven, options={**X264, "bf": "0"}, count=30)
    with opened(path).pictures() as ours, opened(path, optional).pictures() as theirs:
        for a, b in zip(ours, theirs, strict=True):
            assert (a.pts, a.duration) == (b.pts, b.duration)
            assert apart(a.pixels(), b.pixels()) <= TOLERANCE


@pytest.mark.parametrize("name", ["h264-mp4", "vp9-webm", "hevc-closed", "h264-late"])
def test_same_key_frames(tmp_path: Path, optional: str, name: str) -> None:
    path = film(tmp_path / FILMS[name][0], **FILMS[name][1])
    with opened(path).pictures(keys_only=True) as ours, opened(path, optional).pictures(keys_only=True) as theirs:
        keys = 0
        for a, b in zip(ours, theirs, strict=True):
            assert (a.pts, a.duration) == (b.pts, b.duration)
            assert apart(a.pixels(), b.pixels()) <= TOLERANCE
            keys += 1
    assert keys >= 3


def test_same_counts_of_pictures(tmp_path: Path, optional: str) -> None:
    path = film(tmp_path / "a.mp4", times=lambda k: 10000 + 100 * k)
    ours, theirs = opened(path), opened(path, optional)
    for edge in (Fraction(10), Fraction(101, 10), Fraction(10149, 1000), Fraction(13), Fraction(14), Fraction(20)):
        assert theirs.count_pictures(Fraction(10), edge) == ours.count_pictures(Fraction(10), edge)
        assert theirs.count_pictures(edge, Fraction(12)) == ours.count_pictures(edge, Fraction(12))


@pytest.mark.parametrize("size", [(32, 64), (50, 70), (128, 256)])
def test_scaled_and_grey_pictures_are_nearly_the_same(tmp_path: Path, optional: str, size: tuple[int, int]) -> None:
    path = film(tmp_path / "a.mp4", count=3)
    ours, theirs = next(opened(path).pictures()), next(opened(path, optional).pictures())
    assert theirs.pixels(size).shape == (*size, 3) and theirs.grey(size).shape == size
    assert np.abs(ours.pixels(size).astype(int) - theirs.pixels(size)).mean() <= SCALED
    assert np.abs(ours.grey(size).astype(int) - theirs.grey(size)).mean() <= 2


def test_a_pickled_reader_reads_on(tmp_path: Path, optional: str) -> None:
    path = film(tmp_path / "a.mp4")
    state = opened(path, optional).state()
    assert state is not None
    check_equal(pickle.loads(state), path)


def test_passes_are_independent(tmp_path: Path, optional: str) -> None:
    reader = opened(film(tmp_path / "a.mp4"), optional)
    plan = reader.plan(Sampling(fps=2))
    alone = [shot.pixels for shot in reader.sample(plan)]
    a, b = reader.sample(plan), reader.sample(plan)
    for expected in alone:
        assert np.array_equal(next(a).pixels, expected) and np.array_equal(next(b).pixels, expected)


def test_damage_is_not_told_of_and_a_note_says_so(tmp_path: Path, optional: str) -> None:
    """Up to the damage all is the same; from there on it may differ, which is why there is a note."""
    path = write(tmp_path / "d.mp4", even(120), gop=20, size=(64, 320), noise=30)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes()
    path.write_bytes(content)
    ours, theirs = opened(path), opened(path, optional)
    assert any("damage" in note for note in theirs.info.notes) and not ours.info.notes
    same = 0
    with ours.pictures() as whole, theirs.pictures() as parts:
        for a, b in zip(whole, parts, strict=False):
            if a.pts != b.pts or apart(a.pixels(), b.pixels()) > TOLERANCE:
                break
            same += 1
        assert whole.stats.damaged + whole.stats.skipped > 0
    assert 40 <= same < 80


# What is known to go wrong is refused


def raw(folder: Path) -> Path:
    return write(folder / "a.h264", even(20), kind="h264", bframes=0)


def without_key_table(folder: Path, codec: str, options: dict[str, str]) -> Path:
    path = film(folder / "a.mp4", codec, options)
    content = path.read_bytes()
    assert content.count(b"stss") == 1
    path.write_bytes(content.replace(b"stss", b"free"))
    return path


def mirrored(folder: Path) -> Path:
    path = film(folder / "a.mp4")
    content = bytearray(path.read_bytes())
    straight = (1 << 16).to_bytes(4, "big") + bytes(12)
    at = content.index(straight, content.index(b"tkhd"))
    content[at : at + 4] = (-(1 << 16)).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    return path


def edited(folder: Path) -> Path:
    """The edit list begins 0.3 s later than the first picture."""
    path = film(folder / "a.mp4")
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 16
    ticks = int.from_bytes(content[at : at + 4], "big") + 300 * 16
    content[at : at + 4] = ticks.to_bytes(4, "big")
    path.write_bytes(content)
    return path


def cut_off(folder: Path) -> Path:
    path = film(folder / "a.mp4", container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def remuxed(folder: Path, change: Callable[[int, av.Packet], av.Packet]) -> Path:
    """VP8 whose packets were changed one by one."""
    source = film(folder / "a.webm", "libvpx", VP9)
    with av.open(str(source)) as file, av.open(str(folder / "b.mkv"), "w") as copy:
        stream = copy.add_stream_from_template(file.streams.video[0])
        for number, packet in enumerate(file.demux(video=0)):
            if packet.size:
                changed = change(number, packet)
                changed.stream = stream
                copy.mux(changed)
    return folder / "b.mkv"


def hidden(folder: Path) -> Path:
    def hide(number: int, packet: av.Packet) -> av.Packet:
        content = bytearray(bytes(packet))
        if number in (5, 9):
            content[0] &= 0b11101111
        changed = av.Packet(bytes(content))
        changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
        changed.is_keyframe = packet.is_keyframe
        return changed

    return remuxed(folder, hide)


def repeated(folder: Path) -> Path:
    def repeat(number: int, packet: av.Packet) -> av.Packet:
        if number == 6:
            packet.pts = packet.dts = packet.pts - 100
        return packet

    return remuxed(folder, repeat)


def pq(folder: Path) -> Path:
    def mark(of: Any) -> None:
        of.color_trc = 16

    return film(folder / "a.mkv", on_stream=lambda stream: mark(stream.codec_context), on_frame=mark)


def interlaced(folder: Path) -> Path:
    return film(folder / "a.mp4", options={**X264, "flags": "+ildct+ilme", "x264-params": "interlaced=1:tff=1"})


def oblong(folder: Path) -> Path:
    def stretch(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    return film(folder / "a.mp4", on_stream=stretch)


NO_TABLE = {"preset": "ultrafast", "x265-params": f"keyint={ONE_KEY}:bframes=0:log-level=none:pools=1"}
REFRESH = {**X264, "g": "30", "bf": "0", "x264-params": "intra-refresh=1"}
OPEN = {**X264, "x264-params": "open-gop=1"}
BOTH = ("torchcodec", "decord")
DECORD = ("decord",)


@dataclass(frozen=True)
class Wrong:
    """A film that is refused, and with which words."""

    words: str
    decoders: tuple[str, ...]
    make: Callable[[Path], Path]
    shows: tuple[str, ...] = ()
    """Decoders that would show something else, or stop, if they were let to it."""


WRONG = {
    "raw": Wrong("store no times", BOTH, raw),
    "ts": Wrong("MPEG and Ogg", BOTH, lambda d: film(d / "a.ts"), BOTH),
    "ts-hevc": Wrong("MPEG and Ogg", BOTH, lambda d: film(d / "a.ts", "libx265", X265), BOTH),
    "avi": Wrong("AVI", BOTH, lambda d: film(d / "a.avi"), BOTH),
    "mpeg4": Wrong("of this codec", BOTH, lambda d: film(d / "a.mp4", "mpeg4", {"g": "12", "bf": "2"}), DECORD),
    "av1": Wrong("AV1", DECORD, lambda d: film(d / "a.mp4", "libsvtav1", AV1, count=3), DECORD),
    "no-table-hevc": Wrong("fresh start", BOTH, lambda d: without_key_table(d, "libx265", NO_TABLE), BOTH),
    "no-table-h264": Wrong("fresh start", BOTH, lambda d: without_key_table(d, "libx264", X264), DECORD),
    "no-table-vp9": Wrong("fresh start", BOTH, lambda d: without_key_table(d, "libvpx-vp9", VP9)),
    "no-table-av1": Wrong("fresh start|AV1", BOTH, lambda d: without_key_table(d, "libsvtav1", AV1), DECORD),
    "refresh": Wrong("fresh start", BOTH, lambda d: film(d / "a.mp4", options=REFRESH), BOTH),
    "open-h264": Wrong("fresh start", BOTH, lambda d: film(d / "a.mkv", options=OPEN), DECORD),
    "open-hevc": Wrong("open groups", DECORD, lambda d: film(d / "a.mp4", "libx265", X265), DECORD),
    "hidden": Wrong("hidden", BOTH, hidden, BOTH),
    "edited": Wrong("edit list", DECORD, edited, DECORD),
    "repeated": Wrong("repeat", BOTH, repeated),
    "cut-off": Wrong("damaged", BOTH, cut_off),
    "10-bit": Wrong("8 bits", BOTH, lambda d: film(d / "a.mp4", pixels="yuv420p10le"), BOTH),
    "pq": Wrong("HDR", BOTH, pq, BOTH),
    "mirrored": Wrong("mirror", BOTH, mirrored, BOTH),
    "oblong": Wrong("square", BOTH, oblong, BOTH),
    "interlaced": Wrong("deinterlace", BOTH, interlaced, BOTH),
    "odd": Wrong("odd", DECORD, lambda d: film(d / "a.webm", "libvpx-vp9", VP9, size=(61, 120)), DECORD),
    "narrow": Wrong("narrow", DECORD, lambda d: film(d / "a.mp4", size=(64, 16)), DECORD),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_known_to_go_wrong_is_refused(tmp_path: Path, case: str) -> None:
    path = WRONG[case].make(tmp_path)
    opener = FileOpener(path, path.name)
    with PyavReader(opener) as plain:
        facts = facts_of(plain, opener)
    for name in LIBRARIES:
        if name in WRONG[case].decoders:
            with pytest.raises(SettingsError, match=WRONG[case].words) as refusal:
                choice.choose(name, facts)
            assert one_line(refusal.value, path)
        else:
            assert choice.choose(name, facts)[0] == name


def test_every_finding_has_a_film_that_shows_it() -> None:
    for finding in KNOWN_WRONG:
        cases = [case.decoders for case in WRONG.values() if case.words in finding.what]
        assert finding.decoders in cases or "files of this machine" in finding.what


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in WRONG for name in WRONG[case].shows])
def test_what_is_refused_does_go_wrong(tmp_path: Path, case: str, name: str) -> None:
    """A table of findings that cannot be repeated would only keep people from using what they asked for."""
    installed(name)
    path = WRONG[case].make(tmp_path)
    opener = FileOpener(path, path.name)
    with PyavReader(opener) as plain:
        facts = facts_of(plain, opener)
        with pytest.raises((SourceError, AssertionError)):
            check_out_of_order(NumberedReader(plain.info, facts, LIBRARIES[name], why="", threads=1), plain)


def check_out_of_order(reader: NumberedReader, plain: PyavReader) -> None:
    """Pictures from the last to the first are those of PyAV."""
    with plain.pictures() as pictures:
        ours = [(picture.pts, picture.pixels()) for picture in pictures]
    with reader.pictures() as pictures:
        theirs = list(pictures)
        assert [picture.pts for picture in theirs] == [pts for pts, _ in ours]
        for picture, (_, pixels) in reversed(list(zip(theirs, ours, strict=True))):
            assert apart(picture.pixels(), pixels) <= TOLERANCE


def test_only_files_of_this_machine(tmp_path: Path) -> None:
    class Elsewhere(Opener):
        def __init__(self, path: Path) -> None:
            self.name = self.where = "https://example.org/film.mp4"
            self._path = path

        def open(self) -> InputContainer:
            return av.open(str(self._path))

    opener = Elsewhere(film(tmp_path / "a.mp4", count=3))
    with PyavReader(opener) as plain:
        facts = facts_of(plain, opener)
    for name in LIBRARIES:
        with pytest.raises(SettingsError, match="files of this machine"):
            choice.choose(name, facts)


# Choosing


def test_auto_is_pyav_and_says_why(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", count=3)
    auto, asked = opened(path, "auto").info, opened(path, "pyav").info
    assert (auto.decoder, asked.decoder) == ("pyav", "pyav")
    assert len(auto.chosen) > len(asked.chosen) > 0


def test_unknown_decoders_are_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean torchcodec"):
        choice.choose("torchcodek")


def test_where_there_is_no_choice_only_auto_is_taken() -> None:
    choice.only_auto("auto", "a.png", "images are decoded by Pillow")
    choice.only_auto("pyav", "camera", "live sources are decoded by pyav", also="pyav")
    for wanted in ("pyav", "torchcodec"):
        with pytest.raises(SettingsError, match=f"a.png: images are decoded by Pillow, so {wanted} cannot"):
            choice.only_auto(wanted, "a.png", "images are decoded by Pillow")


def test_hardware_is_not_asked_of_a_decoder_that_has_none(tmp_path: Path, optional: str) -> None:
    path = film(tmp_path / "a.mp4", count=3)
    with pytest.raises(SettingsError, match="does not decode by cuda"):
        choice.reader(FileOpener(path, path.name, "cuda"), optional)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(sys.modules[LIBRARIES[name].__module__], "import_module", fail)
    with pytest.raises(MissingExtra, match=rf"pip install .*\[{name}\]"):
        LIBRARIES[name].load()


def test_decord_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise OSError("libdecord.so: cannot open shared object file\nand more")

    monkeypatch.setattr(sys.modules[Decord.__module__], "import_module", fail)
    with pytest.raises(SettingsError, match=r"does not load here \(libdecord.so.*--decoder pyav") as refusal:
        Decord.load()
    assert "\n" not in str(refusal.value) and not isinstance(refusal.value, MissingExtra)


def test_torchcodec_without_ffmpeg_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise RuntimeError("Could not load libtorchcodec.\nLikely causes:\n  1. FFmpeg is not installed\n" * 20)

    monkeypatch.setattr(torchcodec, "import_module", fail)
    with pytest.raises(SettingsError, match="apt install ffmpeg.*--decoder pyav") as refusal:
        Torchcodec.load()
    assert "\n" not in str(refusal.value) and not isinstance(refusal.value, MissingExtra)


def test_nothing_optional_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys\n"
        "import streamvid.ingest.choice, streamvid.ingest.torchcodec, streamvid.ingest.decord\n"
        "print({'torch', 'torchcodec', 'decord'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# What a library gives is checked


class Fake(Library):
    """A library that gives grey pictures of the right number, and what a test wants it to do instead."""

    decoder = "fake"
    count = 40
    late = Fraction(0)
    shape = (64, 128, 3)
    fails: tuple[int, ...] = ()
    drawn: list[int] = []

    @classmethod
    def load(cls) -> Any:
        return None

    def _open(self, threads: int) -> None:
        if self.count < 0:
            raise RuntimeError("scan, /src/Decoder.cpp:358, Could not seek file to pts=0: Operation not permitted")

    def _count(self) -> int:
        return self.count

    def _draw(self, number: int) -> tuple[NDArray[np.uint8], float | None]:
        self.drawn.append(number)
        if number in self.fails:
            raise RuntimeError("broken\nand a page about it")
        time = self._facts.shown.pts(number) + (self.late if number else 0)
        return np.full(self.shape, number, dtype=np.uint8), float(time)

    def close(self) -> None:
        pass


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., NumberedReader]:
    path = film(tmp_path / "a.mp4", times=lambda k: 10000 + 100 * k)
    opener = FileOpener(path, path.name)
    with PyavReader(opener) as plain:
        facts = facts_of(plain, opener)

    def make(**settings: Any) -> NumberedReader:
        library = type("Other", (Fake,), {"drawn": [], **settings})
        return NumberedReader(plain.info, facts, library, why="", threads=0)

    return make


def test_only_pictures_that_are_looked_at_are_drawn(fake: Callable[..., NumberedReader]) -> None:
    drawn: list[int] = []
    reader = fake(drawn=drawn)
    assert drawn == [0]
    shots = reader.sample(reader.plan(Sampling(count=4)))
    assert [int(shot.pixels.max()) for shot in shots] == [0, 10, 20, 30]
    assert drawn == [0, 0, 10, 20, 30]
    assert shots.stats.decoded == 4 and shots.stats.seeks == 2  # key frames are 0, 12, 24 and 36


def test_a_picture_that_is_looked_at_twice_is_drawn_once(fake: Callable[..., NumberedReader]) -> None:
    drawn: list[int] = []
    with fake(drawn=drawn).pictures() as pictures:
        picture = next(pictures)
        first = picture.pixels()
        first[:] = 7
        assert picture.pixels().max() == 0 and picture.grey((8, 16)).shape == (8, 16)
    assert drawn == [0, 0]  # once when it was opened


def test_jumps_land_on_the_picture_on_screen(fake: Callable[..., NumberedReader]) -> None:
    with fake().pictures() as pictures:
        pictures.skip_to(Fraction(1259, 100))
        assert next(pictures).pts == Fraction(125, 10)
        pictures.skip_to(Fraction(11))
        assert next(pictures).pts == Fraction(126, 10)
    with fake().pictures(keys_only=True) as pictures:
        pictures.skip_to(Fraction(125, 10))
        assert [picture.pts for picture in pictures] == [Fraction(124, 10), Fraction(136, 10)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 41}, "fake sees 41 pictures where the container shows 40"),
        ({"count": 39}, "fake sees 39 pictures where the container shows 40"),
        ({"count": -1}, r"fake cannot open it \(Could not seek file to pts=0: Operation not permitted\)"),
        ({"shape": (64, 128, 48)}, r"gives an array of shape \(64, 128, 48\) where \(64, 128, 3\) was expected"),
        ({"shape": (128, 64, 3)}, "gives an array of shape"),
    ],
)
def test_a_library_that_sees_something_else_is_not_believed(
    fake: Callable[..., NumberedReader], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(SourceError, match=said) as refusal:
        fake(**settings)
    assert one_line(refusal.value, Path("a.mp4"))


@pytest.mark.parametrize("late", [Fraction(1, 10), Fraction(-1, 10), Fraction(1, 1000)])
def test_a_picture_of_another_time_is_not_believed(fake: Callable[..., NumberedReader], late: Fraction) -> None:
    reader = fake(late=late)
    with pytest.raises(SourceError, match="gives the picture of .* s for that of 10.1 s") as refusal:
        list(reader.sample(reader.plan(Sampling())))
    assert one_line(refusal.value, Path("a.mp4"))


def test_a_picture_that_fails_ends_the_pass(fake: Callable[..., NumberedReader]) -> None:
    reader = fake(fails=(3,))
    shots = reader.sample(reader.plan(Sampling()))
    assert [int(next(shots).pixels.max()) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SourceError, match=r"fails at the picture of 10.3 s \(broken\)") as refusal:
        next(shots)
    assert one_line(refusal.value, Path("a.mp4"))


# Real files


NEVER_BY_NUMBER = {"carphone.mp4", "earth_night.avi", "vtest_360p.avi"}
"""Natural films with oblong pixels, or without times."""


def files(folder: str) -> list[Any]:
    found = sorted(p for p in (VIDEOS / folder).glob("*") if p.suffix not in {".txt", ".json"})
    return [pytest.param(p, id=p.name) for p in found] if VIDEOS.is_dir() else []


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside this checkout")
@pytest.mark.slow
@pytest.mark.parametrize("path", files("natural"))
def test_natural_films_are_the_same(optional: str, path: Path) -> None:
    if path.name in NEVER_BY_NUMBER or (optional == "decord" and path.suffix == ".gif"):
        with pytest.raises((SettingsError, SourceError)) as refusal:
            opened(path, optional)
        assert one_line(refusal.value, path)
    else:
        check_equal(opened(path, optional), path)


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside this checkout")
@pytest.mark.slow
@pytest.mark.parametrize("path", files("odd"))
def test_odd_files_are_the_same_or_refused(optional: str, path: Path) -> None:
    """Stopping in the middle is allowed only where PyAV meets damage too."""
    try:
        opened(path)
    except SourceError:
        pytest.skip("PyAV does not read it, and nobody else is asked")
    try:
        reader = opened(path, optional)
    except (SettingsError, SourceError) as refusal:
        assert one_line(refusal, path)
        return
    try:
        check_equal(reader, path)
    except SourceError as refusal:
        assert one_line(refusal, path)
        with opened(path).pictures() as pictures:
            assert sum(1 for _ in pictures) and pictures.stats.skipped + pictures.stats.damaged > 0
