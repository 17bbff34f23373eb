"""One way to open whatever holds pictures: each kind is recognised, read, or refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest import Sampling, open_source
from streamvid.ingest.devices import camera, lavfi, stream
from streamvid.ingest.named import Decoding, Kind, find
from tests.ingest.synthetic import even, numbers, same, write
from tests.ingest.web import serving


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("v") / "holiday.mp4", even(60), noise=30, container={"movflags": "faststart"})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shots")
    for k in range(12):
        Image.new("RGB", (40, 30), (20 * k, 0, 0)).save(folder / f"frame{k}.png")
    return folder


def test_every_kind_is_recognised_without_being_opened(video: Path, images: Path, tmp_path: Path) -> None:
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXTINF:3,\na.ts\n")
    for address, kind in {
        str(video): Kind.FILE,
        video.as_uri(): Kind.FILE,
        str(images): Kind.IMAGES,
        str(images / "*.png"): Kind.IMAGES,
        str(images / "frame3.png"): Kind.IMAGES,
        str(playlist): Kind.PLAYLIST,
        "http://127.0.0.1:1/a.mp4": Kind.HTTP,
        "https://example.invalid/a": Kind.HTTP,
        "lavfi:testsrc": Kind.TEST,
        "camera:0": Kind.CAMERA,
        "rtsp://camera.invalid/1": Kind.STREAM,
        "srt://camera.invalid:9": Kind.STREAM,
        "udp://@239.0.0.1:1234": Kind.STREAM,
    }.items():
        assert find(address).kind is kind, address


def test_a_file_with_the_name_of_a_device_or_pattern_is_a_file(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("camera:0", "lavfi:testsrc", "what?[1].mp4", "-dash.mp4", "a%03d.mp4"):
        Path(name).write_bytes(video.read_bytes())
        assert find(name).kind is Kind.FILE
        with open_source(name) as source:
            assert source.info.codec == "h264"


@pytest.mark.parametrize("address", ["ftp://a/b.mp4", "data://x", "gopher://x/y", "concat:a|b", "subfile,,start,0:x"])
def test_other_protocols_are_refused(address: str) -> None:
    with pytest.raises(SourceError):
        find(address)


def test_standard_input_is_read_like_a_file(video: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(video.read_bytes())))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with open_source("-") as piped, open_source(video) as named:
        assert piped.info.name == "standard input"
        assert same(list(piped.frames(Sampling(count=4))), list(named.frames(Sampling(count=4))))
        spooled = Path(piped.info.path)
        assert spooled.exists()
    assert not spooled.exists()


def test_arrays_are_read_without_another_process() -> None:
    pixels = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
    with open_source(pixels, rate=2) as source:
        frames = list(source.frames())
    assert [frame.pts for frame in frames] == [Fraction(k, 2) for k in range(5)]
    assert np.array_equal(np.stack([frame.pixels for frame in frames]), pixels)
    with open_source(pixels, times=[0, 0.5, 3, 4, 10]) as source:
        assert [frame.pts for frame in source.frames()] == [0, Fraction(1, 2), 3, 4, 10]
    with pytest.raises(SettingsError):
        open_source(pixels)
    with pytest.raises(SettingsError, match="times are for arrays"):
        open_source("a.mp4", times=[0, 1])


def test_a_folder_of_images_goes_at_the_rate_that_is_stated(images: Path) -> None:
    with open_source(images, rate=4) as source:
        frames = list(source.frames())
    assert [frame.pts for frame in frames] == [Fraction(k, 4) for k in range(12)]
    assert [int(frame.pixels[0, 0, 0]) for frame in frames] == [20 * k for k in range(12)]


def test_an_address_gives_what_the_file_gives(video: Path) -> None:
    with serving() as web:
        address = web.put("/films/holiday.mp4", video.read_bytes())
        with open_source(address, stall_seconds=5) as there, open_source(video) as here:
            for sampling in (Sampling(), Sampling(count=5), Sampling(fps=2, start=1, stop=3)):
                assert same(list(there.frames(sampling)), list(here.frames(sampling)))
            assert there.info.duration == here.info.duration
        assert not any("Lavf" in (asked.headers.get("User-Agent") or "") for asked in web.asked)


def test_secrets_are_in_no_message_and_no_field(video: Path) -> None:
    secrets = ("hunter2", "s3cr3t")
    with serving() as web:
        web.put("/a.mp4", video.read_bytes(), login=("me", "hunter2"))
        address = web.url("/a.mp4", login="me:hunter2@") + "?token=s3cr3t"
        with open_source(address, stall_seconds=5) as source:
            shown = repr(source.info) + repr(find(address)) + str(find(address).identity())
            list(source.frames(Sampling(count=2)))
    for address in (
        "rtsp://me:hunter2@127.0.0.1:1/s?token=s3cr3t",
        "rtmp://me:hunter2@127.0.0.1:1/s?token=s3cr3t",
        "http://me:hunter2@127.0.0.1:1/s?token=s3cr3t",
        "ftp://me:hunter2@127.0.0.1:1/s?token=s3cr3t",
        "srt://127.0.0.1:1?passphrase=hunter2",
    ):
        with pytest.raises(SourceError) as caught:
            open_source(address, stall_seconds=2)
        shown += str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert not [secret for secret in secrets if secret in shown]


def test_the_decoding_process_is_not_told_secrets_on_its_command_line(video: Path) -> None:
    import psutil

    with serving() as web:
        web.put("/a.mp4", video.read_bytes())
        with open_source(web.url("/a.mp4", login="me:hunter2@"), stall_seconds=5):
            lines = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert any("streamvid.ingest.worker" in line for line in lines)
    assert not any("hunter2" in line for line in lines)


def test_a_pattern_that_ends_is_a_film(tmp_path: Path) -> None:
    with open_source("lavfi:testsrc=duration=2:rate=5:size=64x48") as source:
        assert not source.info.live and (source.info.height, source.info.width) == (48, 64)
        assert [frame.pts for frame in source.frames()] == [Fraction(k, 5) for k in range(10)]
        assert source.end == 2
        assert len(list(source.frames(Sampling(count=4)))) == 4


def test_a_pattern_without_end_is_live() -> None:
    with open_source("lavfi:testsrc=rate=5:size=64x48") as source:
        assert source.info.live and source.info.duration is None
        frames = list(source.frames(Sampling(fps=5, stop=2)))
        assert [frame.pts for frame in frames] == [Fraction(k, 5) for k in range(10)]
        with pytest.raises(SourceError, match="was read already"):
            next(source.frames(Sampling(fps=1, stop=3)))
    with open_source("lavfi:testsrc=rate=5:size=64x48") as source:
        assert len(list(source.frames(Sampling(fps=5, max_frames=7)))) == 7
    with open_source("lavfi:testsrc=rate=5:size=64x48") as source:
        for sampling in (Sampling(count=5), Sampling(max_frames=5)):
            with pytest.raises(SourceError, match="has no end"):
                source.frames(sampling)


@pytest.mark.parametrize("graph", ["movie=/etc/passwd", "nullsrc[a];amovie='x'[b];[a][b]overlay", "[in]movie = x"])
def test_a_pattern_reads_no_files(graph: str) -> None:
    with pytest.raises(SourceError, match="reads a file"):
        lavfi(f"lavfi:{graph}", stall_seconds=1)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(SourceError, match="no filter graph"):
        open_source("lavfi:nonsense")
    with pytest.raises(SourceError, match="needs a filter graph"):
        open_source("lavfi:")


def test_cameras_are_named_as_each_platform_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, address, format_, given in (
        ("linux", "camera:0", "v4l2", "/dev/video0"),
        ("linux", "camera:/dev/video2", "v4l2", "/dev/video2"),
        ("darwin", "camera:1", "avfoundation", "1:none"),
        ("win32", "camera:Integrated Webcam", "dshow", "video=Integrated Webcam"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        opener = camera(address + "?size=640x480&fps=15", stall_seconds=1)
        assert (opener.format, opener.address) == (format_, given) and opener.live
        assert opener.options == {"video_size": "640x480", "framerate": "15"}
    monkeypatch.setattr(sys, "platform", "linux")
    for address in ("camera:front", "camera:0?colour=red"):
        with pytest.raises(SourceError):
            camera(address, stall_seconds=1)


@pytest.mark.skipif(os.path.exists("/dev/video77"), reason="there is such a camera")
@pytest.mark.skipif(sys.platform != "linux", reason="device files are Linux's")
def test_a_camera_that_is_not_there_is_refused() -> None:
    with pytest.raises(SourceError, match="is not there"):
        open_source("camera:77")


def test_streams_may_use_their_own_protocols_only() -> None:
    for address in ("rtsp://x/1", "rtsps://x/1", "rtmp://x/1", "srt://x:1", "udp://x:1", "rtp://x:1"):
        opener = stream(address, stall_seconds=1)
        allowed = opener.options["protocol_whitelist"].split(",")
        assert not {"file", "http", "https", "concat", "crypto", "data", "pipe"} & set(allowed)


def test_pictures_come_over_udp_as_they_are_sent(tmp_path: Path) -> None:
    source_file = write(tmp_path / "a.ts", even(80, fps=20), gop=5, bframes=0, options={"repeat-headers": "1"})
    port = 23000 + os.getpid() % 2000
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, str(source_file), f"udp://127.0.0.1:{port}?pkt_size=1316"],
        stdout=subprocess.DEVNULL,
    )
    try:
        with open_source(f"udp://127.0.0.1:{port}", stall_seconds=15) as source:
            assert source.info.live
            frames = list(source.frames(Sampling(fps=20, stop=1)))
    finally:
        sender.kill()
        sender.wait()
    assert frames[0].pts == 0 and len(frames) == 20
    shown = numbers(frames)
    assert [b - a for a, b in zip(shown, shown[1:], strict=False)] == [1] * 19


SENDER = """
import sys, time
import av
while True:
    with av.open(sys.argv[1]) as file, av.open(sys.argv[2], "w", format="mpegts") as out:
        stream = file.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in file.demux(stream):
            if packet.dts is None:
                continue
            packet.stream = copy
            out.mux(packet)
            time.sleep(0.02)
"""


def test_raw_streams_take_a_rate_and_files_with_times_do_not(tmp_path: Path, video: Path) -> None:
    raw = tmp_path / "a.264"
    with av.open(str(video)) as file, av.open(str(raw), "w", format="h264") as out:
        stream = file.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in file.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    with open_source(raw, rate=10) as source:
        assert [frame.pts for frame in source.frames()] == [Fraction(k, 10) for k in range(60)]
        assert any("10 pictures a second" in note for note in source.info.notes)
    with open_source(video, rate=3) as source:
        assert source.info.duration == 6
        assert any("rate" in note and "times of its own" in note for note in source.info.notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"decoder": "ffmpeg"},
        {"threads": 0},
        {"hwaccel": "magic"},
        {"stall_seconds": 0},
        {"rate": 0},
        {"rate": -3},
    ],
)
def test_settings_that_make_no_sense_are_refused(video: Path, settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        open_source(video, **settings)  # type: ignore[arg-type]


def test_hardware_that_is_not_here_is_replaced_with_a_note(video: Path) -> None:
    devices = av.codec.hwaccel.hwdevices_available()
    if not devices:
        pytest.skip("FFmpeg was built without hardware decoding")
    with open_source(video, hwaccel="qsv" if "qsv" in devices else devices[0]) as source, open_source(video) as plain:
        frames = list(source.frames(Sampling(count=3)))
        assert len(frames) == 3
        if any("in software" in note for note in source.info.notes):
            assert same(frames, list(plain.frames(Sampling(count=3))))


def test_the_number_of_threads_changes_nothing(video: Path) -> None:
    with open_source(video) as usual:
        expected = list(usual.frames(Sampling(fps=5)))
    for threads in (1, 3):
        with open_source(video, threads=threads) as source:
            assert same(list(source.frames(Sampling(fps=5))), expected)


def test_named_sources_can_be_sent_and_print_nothing_secret() -> None:
    named = find("http://me:hunter2@127.0.0.1:1/a.mp4?token=s3cr3t")
    assert pickle.loads(pickle.dumps(named)) == named
    assert not re.search("hunter2|s3cr3t", repr(named) + named.name)


def test_identity_tells_contents_apart(images: Path, tmp_path: Path, video: Path) -> None:
    first = find(images).identity()
    assert first == find(images).identity() and first != find(images, rate=3).identity()
    Image.new("RGB", (40, 30), (1, 2, 3)).save(images / "frame99.png")
    assert find(images).identity() != first
    assert find("lavfi:testsrc=d=3").identity() != find("lavfi:testsrc=d=4").identity()
    assert find("lavfi:testsrc").identity() is None and find("camera:0").identity() is None
    with serving() as web:
        address = web.put("/a.mp4", video.read_bytes(), etag='"one"')
        one = find(address).identity()
        assert one is not None and one == find(address + "?token=another").identity()
        web.put("/a.mp4", video.read_bytes(), etag='"two"')
        assert find(address).identity() != one


def test_decoding_settings_have_defaults_that_fit_all() -> None:
    assert Decoding() == Decoding("auto", None, None, 30.0)
