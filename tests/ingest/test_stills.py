"""One image file: its format, pixels as FFmpeg gives them, orientation, damage and bombs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from streamvid.errors import SourceError
from streamvid.ingest.images import ImageFiles, image_kind
from streamvid.ingest.openers import FileOpener
from streamvid.ingest.pyav import PyavReader
from streamvid.ingest.stills import MAX_PIXELS
from tests.ingest.drawn import (
    SAVED,
    animation,
    exif,
    folder,
    only,
    opened,
    plain,
    png_claiming,
    read,
    reds,
    smooth,
)


@pytest.mark.parametrize("name", SAVED)
def test_a_still_is_one_picture_of_a_second(tmp_path: Path, name: str) -> None:
    smooth().save(tmp_path / name, **SAVED[name])
    reader = opened(tmp_path / name)
    shots, sampler = read(reader)
    assert [(shot.pts, shot.duration) for shot in shots] == [(0, 1)]
    assert np.abs(shots[0].pixels.astype(int) - np.asarray(smooth())).max() <= 4
    assert (reader.info.height, reader.info.width, reader.info.duration) == (48, 64, 1)
    assert reader.info.notes == ("a still image; shown for 1 s",)
    assert sampler.stats.as_dict() == {name: int(name == "decoded") for name in sampler.stats.as_dict()}


def test_the_ending_of_a_single_files_name_does_not_matter(tmp_path: Path) -> None:
    smooth().save(tmp_path / "x", format="PNG")
    assert opened(tmp_path / "x").info.codec == "png"
    (tmp_path / "x").rename(tmp_path / "x.jpg")
    assert opened(tmp_path / "x.jpg").info.codec == "png"


@pytest.mark.parametrize(
    ("name", "settings_", "kind"),
    [
        *((name, saved, "still") for name, saved in SAVED.items()),
        ("moving.webp", {"save_all": True, "append_images": [plain(9)], "duration": 40}, "animated"),
        ("moving.png", {"save_all": True, "append_images": [plain(9)], "duration": 40}, None),
        ("moving.gif", {"save_all": True, "append_images": [plain(9)], "duration": 40}, None),
        ("moving.avif", {"save_all": True, "append_images": [plain(9)], "duration": 40}, None),
        ("still.gif", {}, None),
        ("a.pdf", {}, None),
        ("a.eps", {}, None),
    ],
)
def test_image_kind(tmp_path: Path, name: str, settings_: dict[str, Any], kind: str | None) -> None:
    plain(200).save(tmp_path / name, **settings_)
    assert image_kind((tmp_path / name).read_bytes()[:4096]) == kind


@pytest.mark.parametrize("head", [b"", b"\xff", b"RIFF\0\0\0\0WEBPVP8X", b"BM is text", b"\0\0\0\x18ftypisom\0\0\0\0"])
def test_short_or_similar_heads_are_no_images(head: bytes) -> None:
    assert image_kind(head) is None


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    plain(0).save(tmp_path / "a.eps")
    with pytest.raises(SourceError, match="neither a still image nor an animated WebP"):
        ImageFiles.file(tmp_path / "a.eps", name="a.eps")
    (tmp_path / "b.jpg").write_text("not an image at all")
    with pytest.raises(SourceError, match="text file"):
        ImageFiles.find(tmp_path / "b.jpg")
    with pytest.raises(SourceError, match="does not exist"):
        ImageFiles.find(tmp_path / "c.jpg")


def variants(path: Path) -> dict[str, Path]:
    """The same picture as many kinds of pixels."""
    image = smooth()
    seen_through = image.copy()
    seen_through.putalpha(Image.linear_gradient("L").resize(image.size))
    palette = image.quantize(64)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 211 + 7
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgba.png": (seen_through, {}),
        "grey.png": (image.convert("L"), {}),
        "grey_alpha.png": (seen_through.convert("LA"), {}),
        "bits.png": (image.convert("1"), {}),
        "palette.png": (palette, {}),
        "palette_alpha.png": (palette, {"transparency": bytes(range(64))}),
        "palette_one.png": (palette, {"transparency": 3}),
        "one_colour.png": (image, {"transparency": (0, 0, 0)}),
        "deep.png": (Image.fromarray(deep), {}),
        "deep.tif": (Image.fromarray(deep), {}),
        "cmyk.jpg": (image.convert("CMYK"), {"quality": 95}),
        "cmyk.tif": (image.convert("CMYK"), {}),
        "grey.jpg": (image.convert("L"), {"quality": 95}),
        "444.jpg": (image, {"quality": 95, "subsampling": 0}),
        "alpha.webp": (seen_through, {"lossless": True, "exact": True}),
    }
    for name, (variant, how) in made.items():
        variant.save(path / name, **how)
    return {name: path / name for name in made}


def test_pixels_are_those_of_ffmpeg(tmp_path: Path) -> None:
    for name, path in variants(tmp_path).items():
        with PyavReader(FileOpener(path, name)).pictures() as pictures:
            expected = next(pictures).pixels()
        assert np.abs(only(path).astype(int) - expected).max() <= 2, name


def test_what_is_seen_through_is_noted(tmp_path: Path) -> None:
    paths = variants(tmp_path)
    noted = {name for name, path in paths.items() if any("transparent" in note for note in opened(path).info.notes)}
    assert noted == {name for name in paths if "alpha" in name or "one" in name or name == "rgba.png"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "lzw.tiff", "a.avif"])
def test_orientation_is_honoured(tmp_path: Path, name: str, orientation: int) -> None:
    smooth().save(tmp_path / name, exif=exif(orientation=orientation), **SAVED[name])
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    reader = opened(tmp_path / name)
    picture = next(reader.pictures())
    assert np.array_equal(picture.pixels(), expected)
    assert (reader.info.height, reader.info.width) == expected.shape[:2]
    half = expected.shape[0] // 2, expected.shape[1] // 2
    assert picture.pixels(half).shape == (*half, 3)
    grey = np.asarray(Image.fromarray(expected).convert("L")).reshape(half[0], 2, half[1], 2).mean((1, 3))
    assert np.abs(picture.grey(half) - grey).max() <= 3
    turned = {1: 0, 3: 180, 6: 90, 8: 270}
    if orientation in turned:
        assert reader.info.rotation == turned[orientation]
    assert any("mirrored" in note for note in reader.info.notes) == (orientation in {2, 4, 5, 7})


def test_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    smooth().save(tmp_path / "a.png", exif=exif(orientation=6))
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(data[:start] + data[stop:end] + data[start:stop] + data[end:])
    assert np.array_equal(only(tmp_path / "a.png"), np.rot90(np.asarray(smooth()), -1))


def test_a_preview_inside_of_a_jpeg_does_not_hide_that_it_is_cut(tmp_path: Path) -> None:
    preview = io.BytesIO()
    plain(0).save(preview, "JPEG")
    data = Image.Exif()
    data[ExifTags.Base.ImageDescription] = "x"
    path = folder(tmp_path / "in", 3, name="f{}.jpg")
    smooth((480, 640)).save(path / "f1.jpg", exif=b"Exif\0\0" + data.tobytes()[6:] + preview.getvalue())
    whole = (path / "f1.jpg").read_bytes()
    assert reds(read(opened(path))[0])[::2] == [0, 2]
    (path / "f1.jpg").write_bytes(whole[: len(whole) - 500])
    assert b"\xff\xd9" in (path / "f1.jpg").read_bytes()
    shots, sampler = read(opened(path))
    assert reds(shots) == [0, 2] and sampler.stats.damaged == 1


@pytest.mark.parametrize("name", ["frame{}.png", "frame{}.jpg"])
def test_what_follows_a_whole_image_does_not_matter(tmp_path: Path, name: str) -> None:
    folder(tmp_path / "in", 3, name=name)
    with (tmp_path / "in" / name.format(1)).open("ab") as file:
        file.write(bytes(100_000))
    shots, sampler = read(opened(tmp_path / "in"))
    assert reds(shots) == [0, 1, 2] and sampler.stats.damaged == 0


def test_floats_and_wide_integers_are_refused(tmp_path: Path) -> None:
    Image.new("F", (8, 8)).save(tmp_path / "f.tif")
    with pytest.raises(SourceError, match="pixels of a kind that cannot be shown: F"):
        opened(tmp_path / "f.tif")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_claiming(MAX_PIXELS // 1024 + 1, 1024))
    with pytest.raises(SourceError, match=f"has 262145x1024 pixels and at most {MAX_PIXELS} in all are decoded"):
        opened(tmp_path / "bomb.png")
    folder(tmp_path / "in", 3)
    (tmp_path / "in" / "frame1.png").write_bytes((tmp_path / "bomb.png").read_bytes())
    shots, sampler = read(opened(tmp_path / "in"))
    assert reds(shots) == [0, 2]
    assert (sampler.stats.skipped, sampler.stats.damaged) == (1, 0)
    (tmp_path / "fits.png").write_bytes(png_claiming(MAX_PIXELS // 1024, 1024))
    with pytest.raises(SourceError, match="damaged|cut off"):  # tried: it has no pixels at all
        opened(tmp_path / "fits.png")


def test_a_large_jpeg_is_decoded_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (4320, 7680)
    image = smooth((216, 384)).resize(size[::-1])
    image.save(tmp_path / "8k.jpg", quality=90)
    reader = opened(tmp_path / "8k.jpg")
    loaded: list[tuple[int, int]] = []
    load = JpegImageFile.load

    def spy(self: JpegImageFile) -> Any:
        loaded.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", spy)
    picture = next(reader.pictures())
    small = picture.pixels((252, 448))
    assert set(loaded) == {(960, 540)}
    expected = np.asarray(image.resize((448, 252), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(small - expected).mean() < 1
    loaded.clear()
    assert picture.grey((54, 96)).shape == (54, 96) and set(loaded) == {(960, 540)}
    loaded.clear()
    assert picture.pixels((1080, 1920)).shape == (1080, 1920, 3) and set(loaded) == {(3840, 2160)}
    loaded.clear()
    assert picture.pixels().shape == (*size, 3) and set(loaded) == {(7680, 4320)}


def test_grey_is_the_mean_of_what_a_pixel_covers(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        smooth().save(tmp_path / name, **SAVED[name])
        grey = next(opened(tmp_path / name).pictures()).grey((6, 8))
        expected = np.asarray(smooth().convert("L")).reshape(6, 8, 8, 8).mean((1, 3))
        assert np.abs(grey - expected).max() <= 2, name


def test_odd_metadata_is_no_warning_and_no_damage(tmp_path: Path) -> None:
    path = folder(tmp_path / "in", 3, name="f{}.jpg")
    plain(10).save(path / "f1.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03\xff\xff\xff\xff\0")
    plain(20).save(path / "f2.jpg", exif=b"Exif\0\0garbage")
    shots, sampler = read(opened(path))
    assert reds(shots) == [0, 1, 2] and sampler.stats.damaged == 0


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_bytes_are_shown_or_refused(seeds: dict[str, bytes], data: st.DataObject) -> None:
    """Whatever is in a file, it gives a picture of the size in its header or one line."""
    name = data.draw(st.sampled_from(sorted(seeds)))
    seed = bytearray(seeds[name])
    for _ in range(data.draw(st.integers(0, 6))):
        seed[data.draw(st.integers(0, len(seed) - 1))] = data.draw(st.integers(0, 255))
    del seed[data.draw(st.integers(len(seed) // 4, len(seed))) :]
    path = Path(seeds["folder"].decode()) / f"x{Path(name).suffix}"
    path.write_bytes(seed)
    try:
        reader = opened(path)
        picture = next(reader.pictures()).pixels((8, 9))
    except SourceError as told:
        assert "\n" not in str(told)
    else:
        assert picture.shape == (8, 9, 3)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("seeds")
    for name, how in SAVED.items():
        smooth((16, 20)).save(
            path / name, **({} if name in {"a.jp2", "a.ppm", "a.bmp"} else {"exif": exif(orientation=6)}), **how
        )
    animation(path / "moving.webp", [40, 40, 40])
    return {file.name: file.read_bytes() for file in path.iterdir()} | {"folder": str(path).encode()}
