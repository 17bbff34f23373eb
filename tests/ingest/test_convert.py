"""Frames to pictures: colours against the formulas of the standards, shape, turn, tones, fields, and what it costs."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from streamvid.errors import SourceError
from streamvid.ingest.convert import Converter, Look, look_of

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
LUMA = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
"""Weights of red and blue in brightness, by colour matrix; 2 is the one nobody named."""

DEPTHS = {
    "yuv420p": 8,
    "yuv422p": 8,
    "yuv444p": 8,
    "yuv420p10le": 10,
    "yuv422p10le": 10,
    "yuv444p10le": 10,
    "yuv420p12le": 12,
}
PQ, HLG = 16, 18
BT2020_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
"""As printed in BT.2087."""


def plane(frame: VideoFrame, index: int) -> NDArray[np.uint8]:
    """The samples of one plane, to be written into."""
    where = frame.planes[index]
    deep = max(c.bits for c in frame.format.components) > 8
    rows = np.asarray(memoryview(where)).view(np.uint16 if deep else np.uint8).reshape(where.height, -1)
    return rows[:, : where.width]


def flat(kind: str, yuv: tuple[int, ...], *, matrix: int = 2, full: bool = False, size: tuple[int, int] = (48, 64)):
    frame = VideoFrame(size[1], size[0], kind)
    for index, value in enumerate(yuv):
        plane(frame, index)[:] = value
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    return frame


def formula(yuv: tuple[float, ...], matrix: int, full: bool, depth: int) -> NDArray[np.float64]:
    """R'G'B' in 0..1 as BT.601, BT.709 and BT.2020 define it."""
    unit = 1 << (depth - 8)
    top = (1 << depth) - 1
    y = yuv[0] / top if full else (yuv[0] - 16 * unit) / (219 * unit)
    cb, cr = ((c - 128 * unit) / (top if full else 224 * unit) for c in yuv[1:])
    kr, kb = LUMA[matrix]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    return np.clip(np.array([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue]), 0, 1)


def signal(rgb: tuple[float, float, float], depth: int = 10) -> tuple[int, ...]:
    """Limited-range BT.2020 Y'CbCr of R'G'B' in 0..1."""
    kr, kb = LUMA[9]
    y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    cb, cr = (rgb[2] - y) / (2 - 2 * kb), (rgb[0] - y) / (2 - 2 * kr)
    unit = 1 << (depth - 8)
    return round((16 + 219 * y) * unit), round((128 + 224 * cb) * unit), round((128 + 224 * cr) * unit)


def shown(frame: VideoFrame, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    return Converter(look_of(frame, None)[0], "film").convert(frame, size)


def plain(frame: VideoFrame) -> NDArray[np.uint8]:
    """What swscale gives by itself."""
    scaled = VideoReformatter().reformat(frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
    return np.asarray(scaled.to_ndarray())


def noise(size: tuple[int, int] = (96, 128), seed: int = 0) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def filtered(frame: VideoFrame, name: str, settings: str) -> VideoFrame:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000), name="in"
    )
    graph.link_nodes(source, graph.add(name, settings), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


# Colour


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", sorted(LUMA))
@pytest.mark.parametrize("kind", sorted(DEPTHS))
def test_flat_colours_are_those_of_the_standards(kind: str, matrix: int, full: bool) -> None:
    """Within rounding; 1.5 levels if deeper than 8 bit (swscale dithers), 4 if 8 bit and not scaled (tables)."""
    rng = np.random.default_rng(matrix)
    depth = DEPTHS[kind]
    for _ in range(12):
        yuv = tuple(int(v) << (depth - 8) for v in (rng.integers(20, 235), *rng.integers(60, 195, 2)))
        frame = flat(kind, yuv, matrix=matrix, full=full)
        expected = formula(yuv, matrix, full, depth) * 255
        for size in ((48, 64), (12, 20), (67, 101)):
            coarse = size == (48, 64) and kind in {"yuv420p", "yuv422p"}
            assert np.abs(shown(frame, size) - expected).max() <= (4 if coarse else 0.6 if depth == 8 else 1.5)


@pytest.mark.parametrize("kind", ["yuv420p", "yuv420p10le"])
def test_gradient_is_smooth_and_right(kind: str) -> None:
    depth = DEPTHS[kind]
    frame = flat(kind, (0, 128 << (depth - 8), 128 << (depth - 8)), size=(32, 876))
    ramp = np.linspace(16 << (depth - 8), 235 << (depth - 8), 876).round()
    plane(frame, 0)[:] = ramp
    row = shown(frame)[16].astype(float)
    assert (
        np.abs(row - formula((ramp[:, None], 128 << (depth - 8), 128 << (depth - 8)), 2, False, depth)[0] * 255).max()
        <= 2
    )
    assert (np.diff(row, axis=0) >= 0).all()


def test_unnamed_matrix_is_bt601_at_every_size() -> None:
    for size in ((48, 64), (1080, 1920)):
        frame = flat("yuv444p", (120, 90, 160), size=size)
        assert np.abs(shown(frame)[5, 5] - formula((120, 90, 160), 6, False, 8) * 255).max() < 1


@pytest.mark.parametrize(("matrix", "near"), [(8, 6), (3, 6), (14, 6), (10, 9)])
def test_unknown_matrix_is_shown_with_a_note(matrix: int, near: int) -> None:
    frame = flat("yuv444p", (120, 90, 160), matrix=matrix)
    look, notes = look_of(frame, None)
    assert any(f"matrix {matrix}" in note for note in notes)
    assert (
        np.abs(Converter(look, "film").convert(frame)[5, 5] - formula((120, 90, 160), near, False, 8) * 255).max() < 1
    )
    assert frame.colorspace == matrix


@pytest.mark.parametrize(
    "kind", ["yuv420p", "yuvj420p", "yuv444p", "nv12", "gray", "gbrp", "bgra", "yuyv422", "yuva420p"]
)
def test_stored_size_in_8_bit_is_what_swscale_gives(kind: str) -> None:
    frame = VideoFrame.from_ndarray(noise(), format="rgb24").reformat(format=kind)
    assert np.array_equal(shown(frame), plain(frame))


@pytest.mark.parametrize("kind", ["rgb24", "gbrp", "bgra", "gbrp10le", "rgb48le", "p010le", "gray10le", "yuva444p"])
def test_other_kinds_are_converted_too(kind: str) -> None:
    picture = noise()
    if kind.startswith("gray"):
        picture = np.repeat(picture[..., 1:2], 3, axis=2)
    frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=kind)
    assert np.abs(shown(frame)[4:-4, 4:-4].astype(int) - picture[4:-4, 4:-4]).mean() < 2.5
    assert shown(frame, (20, 30)).shape == (20, 30, 3)


def test_palette_is_looked_up() -> None:
    frame = VideoFrame(16, 16, "pal8")
    np.asarray(memoryview(frame.planes[0]))[:] = 7
    np.asarray(memoryview(frame.planes[1])).view(np.uint32)[7] = 0xFF2040A0
    assert shown(frame)[3, 3].tolist() == [0x20, 0x40, 0xA0]


def test_alpha_is_left_out_and_said_only_where_something_is_transparent() -> None:
    frame = VideoFrame(16, 16, "rgba")
    np.asarray(memoryview(frame.planes[0])).reshape(16, -1)[:, :64] = np.tile([200, 100, 50, 255], 16)
    assert look_of(frame, None)[1] == ()
    np.asarray(memoryview(frame.planes[0]))[3] = 0
    look, notes = look_of(frame, None)
    assert any("transparent" in note for note in notes)
    assert (Converter(look, "film").convert(frame) == [200, 100, 50]).all()


def test_kind_that_swscale_refuses_is_named() -> None:
    frame = VideoFrame(32, 32, "y210be")
    look, _ = look_of(frame, None)
    for ask in (Converter(look, "film.mov").convert, Converter(look, "film.mov").grey):
        with pytest.raises(SourceError, match=r"^film\.mov has pictures of a kind that cannot be shown: y210be; .*$"):
            ask(frame, (8, 8))


def test_kind_and_size_may_change_on_the_way() -> None:
    picture = noise()
    first = VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
    converter = Converter(look_of(first, None)[0], "film")
    for kind, size in [("yuv420p", (96, 128)), ("yuv444p10le", (96, 128)), ("bgra", (48, 64)), ("yuv420p", (192, 256))]:
        other = VideoFrame.from_ndarray(picture, format="rgb24").reformat(size[1], size[0], kind)
        made = converter.convert(other)
        assert made.shape == (96, 128, 3) and np.abs(made.astype(int) - picture).mean() < 8
    assert np.array_equal(converter.convert(first), shown(first))


# Size and shape


@pytest.mark.parametrize(
    ("size", "ratio", "expected", "note"),
    [
        ((360, 640), Fraction(2), (360, 1280), "widened to 1280x360"),
        ((144, 176), Fraction(128, 117), (144, 193), "widened to 193x144"),
        ((100, 200), Fraction(1, 2), (200, 200), "stretched to 200x200"),
        ((480, 854), Fraction(1280, 1281), (480, 854), ""),
        ((3, 5), Fraction(3, 2), (3, 8), "widened to 8x3"),  # 7.5
        ((360, 640), Fraction(1), (360, 640), ""),
        ((360, 640), Fraction(0), (360, 640), ""),
        ((360, 640), None, (360, 640), ""),
        ((360, 640), Fraction(4), (360, 2560), "widened"),
        ((360, 640), Fraction(5), (360, 640), "hardly meant"),
        ((360, 640), Fraction(1, 40000), (360, 640), "hardly meant"),
        ((16, 9000), Fraction(2), (16, 9000), "hardly meant"),
    ],
)
def test_pixels_become_square(
    size: tuple[int, int], ratio: Fraction | None, expected: tuple[int, int], note: str
) -> None:
    frame = flat("yuv420p", (100, 128, 128), size=size)
    look, notes = look_of(frame, ratio)
    assert look.shown == expected and (note in notes[0] if note else not notes)
    assert Converter(look, "film").convert(frame).shape == (*expected, 3)


def test_widened_picture_keeps_its_places() -> None:
    frame = flat("yuv444p", (16, 128, 128), size=(40, 60))
    plane(frame, 0)[10:20, 15:45] = 235
    look, _ = look_of(frame, Fraction(2))
    white = Converter(look, "film").convert(frame)[..., 0] > 127
    assert np.flatnonzero(white.any(0))[[0, -1]].tolist() == [30, 89]
    assert np.flatnonzero(white.any(1))[[0, -1]].tolist() == [10, 19]


def test_look_travels() -> None:
    look, _ = look_of(flat("yuv420p", (100, 128, 128)), Fraction(3, 2))
    assert pickle.loads(pickle.dumps(look)) == look and isinstance(look, Look)


def test_scaling_makes_no_picture_of_the_full_size() -> None:
    """An 8K picture takes 100 MB as RGB; the process may not grow by a fifth of that."""
    program = """if True:
        import resource
        from av.video.frame import VideoFrame
        from streamvid.ingest.convert import Converter, look_of
        frame = VideoFrame(7680, 4320, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([128]) * plane.buffer_size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        converter = Converter(look_of(frame, None)[0], "film")
        small = converter.convert(frame, (252, 448)), converter.grey(frame, (36, 64))
        frame.color_trc, frame.color_primaries = 16, 9
        small += (Converter(look_of(frame, None)[0], "film").convert(frame, (252, 448)),)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *(x.shape for x in small))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kilobytes, shapes = done.stdout.strip().split(" ", 1)
    assert int(kilobytes) < 20_000 and shapes == "(252, 448, 3) (36, 64) (252, 448, 3)"


# Turn and mirror

CORNERS = np.zeros((64, 96, 3), dtype=np.uint8)
CORNERS[:32, :48], CORNERS[:32, 48:], CORNERS[32:, :48], CORNERS[32:, 48:] = 40, 90, 150, 210
TURNS = {
    (1, 0, 0, -1): CORNERS[::-1],
    (-1, 0, 0, 1): CORNERS[:, ::-1],
    (-1, 0, 0, -1): CORNERS[::-1, ::-1],
    (0, 1, -1, 0): np.rot90(CORNERS, -1),
    (0, -1, 1, 0): np.rot90(CORNERS),
    (0, 1, 1, 0): CORNERS.swapaxes(0, 1),
}
"""Pictures as seen, by the matrix (a, b, c, d) of the track."""


def film(path: Path, codec: str, **options: str) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
        for k in range(2):
            frame = VideoFrame.from_ndarray(CORNERS, format="rgb24")
            frame.pts = k
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a display matrix into the track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    assert data[place - 40] == 0 and struct.unpack(">i", data[place + 32 : place + 36]) == (1 << 30,)
    a, b, c, d = (x << 16 for x in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def first_frame(path: Path | io.BytesIO) -> VideoFrame:
    with av.open(path if isinstance(path, io.BytesIO) else str(path)) as file:
        return next(file.decode(video=0))


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9", "mpeg4", "mjpeg", "png"])
def test_every_turn_and_mirror_is_carried_out(tmp_path: Path, codec: str) -> None:
    path = film(tmp_path / "a.mov", codec) if codec in {"mjpeg", "png"} else film(tmp_path / "a.mp4", codec)
    for matrix, expected in TURNS.items():
        turn(path, matrix)
        frame = first_frame(path)
        look, notes = look_of(frame, None)
        assert look.shown == expected.shape[:2] and look.upright.mirrored == bool(notes)
        made = Converter(look, "film").convert(frame)
        assert np.abs(made[8::16, 8::16].astype(int) - expected[8::16, 8::16]).max() < 8
        small = Converter(look, "film").convert(frame, (expected.shape[0] // 2, expected.shape[1] // 2))
        assert np.abs(small[4::8, 4::8].astype(int) - expected[8::16, 8::16]).max() < 8
        grey = Converter(look, "film").grey(frame, (2, 2))
        corners = expected[:: expected.shape[0] - 1, :: expected.shape[1] - 1, 0]
        assert np.array_equal(np.argsort(grey, axis=None), np.argsort(corners, axis=None))


def test_pixels_are_made_square_before_the_turn(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", "libx264")
    turn(path, (0, 1, -1, 0))
    look, notes = look_of(first_frame(path), Fraction(3, 2))
    assert look.shown == (144, 64) and any("stretched to 64x144" in note for note in notes)


def test_odd_matrix_is_ignored_with_a_note(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", "libx264")
    turn(path, (1, 1, -1, 1))
    look, notes = look_of(first_frame(path), None)
    assert look.shown == (64, 96) and notes == ("the display matrix is no quarter turn and is ignored",)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_orientation_of_photographs_is_carried_out(kind: str, orientation: int) -> None:
    """PyAV itself cannot read the side data of these frames."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(CORNERS).save(file, kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    file.seek(0)
    made = shown(first_frame(file))
    assert made.shape == expected.shape and np.abs(made.astype(int) - expected).mean() < 4


def test_named_colour_profile_does_no_harm(tmp_path: Path) -> None:
    """Asking PyAV 18.1 for such a frame's side data frees a name twice and may end the process."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(CORNERS).save(tmp_path / "a.png", icc_profile=profile)
    program = f"""if True:
        import av, gc
        from streamvid.ingest.convert import look_of
        for _ in range(50):
            with av.open({str(tmp_path / "a.png")!r}) as file:
                frame = next(file.decode(video=0))
            assert look_of(frame, None)[1] == ()
            del frame
            gc.collect()
    """
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


# High dynamic range


def pq_nits(code: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084, equation 4.1."""
    root = code ** (1 / 78.84375)
    return 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def pq_code(nits: float) -> float:
    """SMPTE ST 2084, equation 5.1."""
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_nits(code: NDArray[np.float64]) -> NDArray[np.float64]:
    """BT.2100 table 5 for a screen of 1000 cd/m2."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    scene = np.array([x * x / 3 if x <= 0.5 else (np.exp((x - c) / a) + b) / 12 for x in code])
    return 1000 * scene * float(scene @ [0.2627, 0.6780, 0.0593]) ** 0.2


def sdr(nits: NDArray[np.float64], peak: float = 1000) -> NDArray[np.float64]:
    """What one pixel of linear BT.2020 light should give, step by step."""
    made = []
    for x in nits / 203:
        t, most = (min(x, peak / 203) - 0.6) / 0.4, (peak / 203 - 0.6) / 0.4
        made.append(x if x <= 0.6 else 0.6 + 0.4 * t * (1 + t / most**2) / (1 + t))
    return np.clip(BT2020_TO_709 @ made, 0, 1) ** (1 / 2.4) * 255


def hdr(rgb: tuple[float, float, float], transfer: int, size: tuple[int, int] = (16, 16)) -> VideoFrame:
    frame = flat("yuv420p10le", signal(rgb), matrix=9, size=size)
    frame.color_trc, frame.color_primaries = transfer, 9
    return frame


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize("size", [None, (8, 12)])
def test_tones_are_those_of_the_standards(transfer: int, size: tuple[int, int] | None) -> None:
    rng = np.random.default_rng(5)
    greys = [(v, v, v) for v in np.linspace(0, 0.75 if transfer == PQ else 1, 23)]
    for rgb in [*greys, *rng.uniform(0.05, 0.72, (60, 3))]:
        frame = hdr(tuple(rgb), transfer)
        code = formula(signal(tuple(rgb)), 9, False, 10)
        expected = sdr(pq_nits(code) if transfer == PQ else hlg_nits(code))
        assert np.abs(shown(frame, size)[4, 4] - expected).max() <= 2


def test_hdr_greys_rise_from_black_to_white_and_stay_grey() -> None:
    for transfer, top in ((PQ, pq_code(1000)), (HLG, 1.0)):
        levels = [shown(hdr((v, v, v), transfer))[4, 4].astype(int) for v in np.linspace(0, top, 40)]
        assert levels[0].tolist() == [0, 0, 0] and min(levels[-1]) >= 254
        assert all(np.ptp(level) <= 1 for level in levels)
        assert all((b >= a).all() for a, b in zip(levels, levels[1:], strict=False))


def test_white_paper_is_nearly_white_in_both_kinds() -> None:
    for frame in (hdr((pq_code(203),) * 3, PQ), hdr((0.75,) * 3, HLG)):
        assert 231 <= shown(frame)[4, 4].min() <= 235


def test_glare_beyond_the_peak_is_white_and_does_not_wrap() -> None:
    ramp = hdr((0, 0, 0), PQ, size=(16, 1024))
    plane(ramp, 0)[:] = np.arange(1024)
    row = shown(ramp)[8].astype(int)
    assert (np.diff(row, axis=0) >= 0).all() and (row[780:] == 255).all()


def test_brightness_the_file_names_becomes_white(tmp_path: Path) -> None:
    colours = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    screen = "mastering-display=G(8500,39850)B(6550,2300)R(35400,14600)WP(15635,16450)L(40000000,50)"
    for name, light, peak in (("a", "cll=600,100", 600), ("b", "cll=0,0", 4000)):
        path = film(tmp_path / f"{name}.mp4", "libx264", **{"x264-params": f"{colours}:{screen}:{light}"})
        look, notes = look_of(first_frame(path), None)
        assert look.peak_nits == peak and notes == ("high dynamic range (PQ) is tone-mapped to SDR",)
        codes = [pq_code(203), pq_code(450), pq_code(peak)]
        levels = [Converter(look, "film").convert(hdr((v, v, v), PQ))[4, 4].min() for v in codes]
        assert levels[2] >= 254 and levels[0] < levels[1] < 254


def test_colours_of_bt2020_without_hdr_keep_greys_and_gain_strength() -> None:
    frame = flat("yuv420p10le", signal((0.7, 0.35, 0.3)), matrix=9)
    frame.color_trc, frame.color_primaries = 14, 9
    look, notes = look_of(frame, None)
    assert any("BT.2020" in note for note in notes)
    light = formula(signal((0.7, 0.35, 0.3)), 9, False, 10) ** 2.4
    expected = np.clip(BT2020_TO_709 @ light, 0, 1) ** (1 / 2.4) * 255
    assert np.abs(Converter(look, "film").convert(frame)[4, 4] - expected).max() <= 2


def test_transfer_follows_the_frame_and_holds_where_none_is_named() -> None:
    dark, named, unnamed = hdr((0.5,) * 3, PQ), hdr((0.5,) * 3, 1), hdr((0.5,) * 3, 2)
    named.color_primaries = 1
    converter = Converter(look_of(dark, None)[0], "film")
    assert np.array_equal(converter.convert(dark), converter.convert(unnamed))
    assert converter.convert(named)[4, 4].tolist() == [128, 128, 128]


# Interlaced


def woven(first: NDArray[np.uint8], second: NDArray[np.uint8], mode: str = "tff") -> VideoFrame:
    """Two moments woven into one frame: the lines of the first field, then those of the second."""
    start = 0 if mode == "tff" else 1
    lines = second.copy()
    lines[start::2] = first[start::2]
    return filtered(VideoFrame.from_ndarray(lines, format="rgb24").reformat(format="yuv444p"), "setfield", mode)


def bar(left: int) -> NDArray[np.uint8]:
    picture = np.full((96, 128, 3), 40, dtype=np.uint8)
    picture[:, left : left + 20] = 210
    return picture


def comb(picture: NDArray[np.uint8]) -> float:
    """How much lines differ from the mean of their neighbours."""
    rows = picture.astype(float)
    return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())


@pytest.mark.parametrize("mode", ["tff", "bff"])
@pytest.mark.parametrize("size", [None, (72, 96), (36, 48)])
def test_moving_things_have_no_comb(mode: str, size: tuple[int, int] | None) -> None:
    frame = woven(bar(40), bar(70), mode)
    assert frame.interlaced_frame and comb(plain(frame)) > 20
    made = shown(frame, size)
    assert comb(made) < 0.5
    still = VideoFrame.from_ndarray(bar(40), format="rgb24").reformat(format="yuv444p")
    assert np.abs(made.astype(int) - shown(still, size)).max() <= 3  # the moment of the first field


def test_still_picture_keeps_its_detail() -> None:
    truth = noise()
    frame = woven(truth, truth)
    error = np.mean((shown(frame).astype(float) - plain(frame)) ** 2)
    assert 10 * np.log10(255**2 / error) > 38


def test_fields_of_other_frames_change_nothing() -> None:
    frames = [woven(bar(k), bar(k + 10)) for k in (10, 30, 50)]
    alone = [shown(frame) for frame in frames]
    converter = Converter(look_of(frames[0], None)[0], "film")
    assert all(np.array_equal(converter.convert(frames[k]), alone[k]) for k in (2, 0, 1, 1, 2))
    assert converter.deinterlaced == 5


def test_progressive_frames_are_left_alone() -> None:
    frame = VideoFrame.from_ndarray(bar(40), format="rgb24").reformat(format="yuv420p")
    converter = Converter(look_of(frame, None)[0], "film")
    assert np.array_equal(converter.convert(frame), plain(frame)) and converter.deinterlaced == 0


def test_interlacing_keeps_matrix_and_range() -> None:
    frame = filtered(flat("yuv444p", (120, 90, 160), matrix=9, full=True), "setfield", "tff")
    frame.colorspace, frame.color_range = 9, 2
    look, notes = look_of(frame, None)
    assert any("interlaced" in note for note in notes)
    for size in (None, (20, 30)):
        made = Converter(look, "film").convert(frame, size)
        assert np.abs(made - formula((120, 90, 160), 9, True, 8) * 255).max() < 1.5


# Thumbnails


@pytest.mark.parametrize("kind", ["yuv420p", "nv12", "yuv420p10le", "gray", "rgb24"])
def test_thumbnail_is_an_average_that_sees_small_things(kind: str) -> None:
    picture = np.full((360, 640, 3), 60, dtype=np.uint8)
    base = VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=kind)
    picture[100:106, 300:306] = 255
    spotted = VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=kind)
    converter = Converter(look_of(base, None)[0], "film")
    without, spot = (converter.grey(frame, (18, 32)).astype(int) for frame in (base, spotted))
    assert without.shape == (18, 32) and np.ptp(without) <= 1  # swscale dithers deeper kinds
    change = spot - without
    assert np.unravel_index(change.argmax(), change.shape) == (5, 15)
    share = 36 / 400  # of the 20 x 20 pixels that make one of the thumbnail
    assert change.max() >= 0.5 * share * 160 and 0.7 <= change.sum() / (share * 195 * 219 / 255) <= 1.5


@pytest.mark.parametrize("size", [(1080, 1920), (2160, 3840)])
def test_thumbnails_of_a_flat_picture_are_flat(size: tuple[int, int]) -> None:
    frame = flat("yuv420p", (120, 90, 160), size=size)
    grey = Converter(look_of(frame, None)[0], "film").grey(frame, (18, 32))
    assert np.ptp(grey) == 0 and abs(int(grey[0, 0]) - 120) <= 2
    tiny = shown(frame, (12, 20))
    assert (tiny == tiny[0, 0]).all()


# Real files


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside this checkout")
@pytest.mark.parametrize(
    "name",
    ["natural/bbb_480p_30s.mp4", "natural/cockatoo.mp4", "natural/asl_eat.mkv", "natural/dog_fetch_ball.mp4"]
    + ["natural/toy_elf.webm", "odd/pythagoras_5fps.gif", "odd/bt709_full_range.mp4", "odd/video_colr_nclx_rgb.mp4"]
    + ["odd/indeo4_1s.avi", "odd/sample_av1.mp4", "odd/320x180_422p_action-libx264.264"],
)
def test_ordinary_films_look_as_swscale_has_them(name: str) -> None:
    frame = first_frame(VIDEOS / name)
    assert np.array_equal(shown(frame), plain(frame))


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside this checkout")
@pytest.mark.parametrize("name", ["hdr10-av1.mp4", "sample_with_color_info.mp4", "dolbyVision-hdr.MOV"])
def test_hdr_films_use_the_range_of_the_screen(name: str) -> None:
    """Shown without tone mapping the same pictures are dull: their brightest tenth is below that of these."""
    frame = first_frame(VIDEOS / "odd" / name)
    look, notes = look_of(frame, None)
    small = Converter(look, "film").convert(frame, look.upright.size((180, 320)))
    dull = np.asarray(frame.reformat(320, 180, "rgb24").to_ndarray())
    assert any("tone-mapped" in note for note in notes)
    assert np.percentile(small, 90) > np.percentile(dull, 90) + 5 and (small == 255).mean() < 0.2


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside this checkout")
@pytest.mark.parametrize("name", ["CVFI1_SVA_C.264", "HCAFF1_HHI.264"])
def test_interlaced_films_lose_their_comb(name: str) -> None:
    frame = first_frame(VIDEOS / "odd" / name)
    assert frame.interlaced_frame and comb(shown(frame)) < 0.6 * comb(plain(frame))
