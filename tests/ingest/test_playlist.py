"""Playlists: the film they name is read, what they must not name is never touched."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import pickle
import struct
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest import playlist
from streamvid.ingest import web as connections
from streamvid.ingest.files import is_playlist
from streamvid.ingest.playlist import Playlist, PlaylistGate
from tests.ingest.synthetic import even, number, write, write_sound
from tests.ingest.web import WebServer, serving

HLS = {"hls_time": "0.5", "hls_list_size": "0"}
KEY = b"0123456789abcdef"
CANARY = b"\x00canary that nobody may read\x00" * 20


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures at ten a second, with a key frame every half second, as every kind of playlist."""
    root = tmp_path_factory.mktemp("films")

    def make(name: str, kind: str = "hls", **options: str) -> None:
        path = root / name
        path.parent.mkdir()
        container = {**(HLS if kind == "hls" else {"seg_duration": "0.5"}), **options}
        write(path, even(30), kind=kind, gop=5, bframes=0, container=container)

    make("ts/a.m3u8")
    make("fmp4/a.m3u8", hls_segment_type="fmp4")
    make("one/a.m3u8", hls_flags="single_file")
    # Given by its address alone, FFmpeg would write the key into the current folder.
    (root / "key").write_bytes(KEY)
    (root / "key.info").write_text(f"a.key\n{root / 'key'}\n")
    make("secret/a.m3u8", hls_key_info_file=str(root / "key.info"))
    (root / "secret/a.key").write_bytes(KEY)
    make("timeline/a.mpd", "dash")
    make("template/a.mpd", "dash", use_timeline="0")
    make("list/a.mpd", "dash", use_template="0", use_timeline="0")
    make("whole/a.mpd", "dash", single_file="1")
    for path, size in (("small", (16, 80)), ("large", (32, 160))):
        (root / "master" / path).mkdir(parents=True)
        write(root / "master" / path / "a.m3u8", even(30), kind="hls", gop=5, bframes=0, container=HLS, size=size)
    (root / "master/a.m3u8").write_text(
        "#EXTM3U\n"
        '#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="s",NAME="x",URI="sound/a.m3u8"\n'
        '#EXT-X-STREAM-INF:BANDWIDTH=9000000,CODECS="mp4a.40.2"\nsound/a.m3u8\n'
        '#EXT-X-STREAM-INF:BANDWIDTH=2000,RESOLUTION=160x32,AUDIO="s",CODECS="avc1.4d,mp4a"\nlarge/a.m3u8\n'
        "#EXT-X-STREAM-INF:BANDWIDTH=1000,RESOLUTION=80x16\nsmall/a.m3u8\n"
    )
    return root


KINDS = [
    "ts/a.m3u8",
    "fmp4/a.m3u8",
    "one/a.m3u8",
    "secret/a.m3u8",
    "timeline/a.mpd",
    "template/a.mpd",
    "list/a.mpd",
    "whole/a.mpd",
    "master/a.m3u8",
]


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")


def serve(web: WebServer, root: Path, folder: str) -> None:
    for path in (root / folder).rglob("*"):
        if path.is_file():
            web.put("/" + path.relative_to(root).as_posix(), path.read_bytes(), content_type="text/plain")


def shown(source: Playlist, seek: Fraction | None = None) -> list[int]:
    """The numbers of all pictures, or of those from the key frame before ``seek`` on."""
    with source.open() as container:
        (stream,) = container.streams.video
        if seek is not None:
            container.seek(int((stream.start_time or 0) + seek / stream.time_base), stream=stream)
        return [number(torch.from_numpy(frame.to_ndarray(format="rgb24"))) for frame in container.decode(stream)]


def refusal(source: Playlist) -> str:
    with pytest.raises(SourceError) as caught:
        shown(source)
    message = str(caught.value)
    assert "\n" not in message and "nobody" not in message and "secret" not in message
    return message


# What is read


@pytest.mark.parametrize("name", KINDS)
def test_folder_gives_every_picture_in_order(films: Path, name: str) -> None:
    source = Playlist(films / name)
    assert shown(source) == list(range(30)) and shown(source) == list(range(30))
    assert not source.live and source.requests == 0


@pytest.mark.parametrize("name", KINDS)
def test_network_gives_every_picture_in_order(films: Path, web: WebServer, name: str) -> None:
    serve(web, films, name.partition("/")[0])
    source = Playlist(web.url("/" + name))
    assert shown(source) == list(range(30))
    assert {asked.headers["user-agent"].partition("/")[0] for asked in web.asked} == {"streamvid"}
    assert len(web.asked) == source.requests <= 10 and source.bytes_received == web.sent
    assert web.connections <= 2  # nearly everything goes through one connection
    source.close()
    assert shown(source) == list(range(30))


@pytest.mark.parametrize("name", KINDS)
def test_jump_lands_on_the_key_frame_before(films: Path, web: WebServer, name: str) -> None:
    serve(web, films, name.partition("/")[0])
    source = Playlist(web.url("/" + name))
    assert shown(source, Fraction(22, 10)) == list(range(20, 30))


def test_names_do_not_matter(films: Path, web: WebServer) -> None:
    """Extensions that FFmpeg would refuse, and none at all, are fine: content decides."""
    text = (films / "ts/a.m3u8").read_text()
    for k in range(6):
        text = text.replace(f"a{k}.ts", f"seg/{k}.php?token=secret{k}")
        web.put(f"/seg/{k}.php", (films / f"ts/a{k}.ts").read_bytes())
    assert shown(Playlist(web.put("/live", text.encode()))) == list(range(30))


def test_master_reads_one_version_and_leaves_the_others_alone(films: Path, web: WebServer) -> None:
    serve(web, films, "master")
    source = Playlist(web.url("/master/a.m3u8"))
    with source.open() as container:
        assert [(stream.width, stream.height) for stream in container.streams.video] == [(160, 32)]
    shown(source)
    assert source.notes == ("3 versions are offered; 160x32 at 2000 bit/s is read",)
    assert not any("small" in path or "sound" in path for path in web.paths())
    assert web.paths().count("/master/a.m3u8") == web.paths().count("/master/large/a.m3u8") == 1


@pytest.mark.parametrize(("rows", "height"), [(31, 16), (16, 16), (32, 32), (None, 32)])
def test_max_height(films: Path, rows: int | None, height: int) -> None:
    with Playlist(films / "master/a.m3u8", max_height=rows).open() as container:
        assert container.streams.video[0].height == height


def test_max_height_that_no_version_has(web: WebServer, films: Path) -> None:
    text = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=2,RESOLUTION=160x32\nlarge/a.m3u8\n"
    serve(web, films, "master")
    source = Playlist(web.put("/master/b.m3u8", text.encode()), max_height=8)
    assert shown(source) == list(range(30)) and "no version has at most max_height = 8 rows" in source.notes
    with pytest.raises(SettingsError, match="max_height must be 1 or more"):
        Playlist("a.m3u8", max_height=0)


def test_dash_chooses_as_well(films: Path, web: WebServer) -> None:
    serve(web, films, "timeline")
    text = (films / "timeline/a.mpd").read_text()
    one = text[text.index("<Representation") : text.index("</Representation>") + len("</Representation>")]
    low = one.replace('id="0"', 'id="9"').replace('height="32"', 'height="16"')
    web.put("/timeline/a.mpd", text.replace(one, low + one).encode())
    source = Playlist(web.url("/timeline/a.mpd"))
    assert shown(source) == list(range(30))
    assert source.notes[0].startswith("2 versions are offered; 160x32") and not any("stream9" in p for p in web.paths())
    assert "does not exist (404)" in refusal(Playlist(web.url("/timeline/a.mpd"), max_height=16))


def test_redirected_playlist_names_things_from_where_it_is(films: Path, web: WebServer) -> None:
    serve(web, films, "master")
    web.put("/go", redirect="/master/a.m3u8")
    web.pages["/variant"] = web.pages.pop("/master/large/a.m3u8")
    web.put("/master/large/a.m3u8", redirect="/master/large/there.m3u8")
    web.pages["/master/large/there.m3u8"] = web.pages.pop("/variant")
    assert shown(Playlist(web.url("/go"))) == list(range(30))


def test_byte_ranges_take_few_requests(films: Path, web: WebServer) -> None:
    serve(web, films, "one")
    source = Playlist(web.url("/one/a.m3u8"))
    assert shown(source) == list(range(30))
    assert source.requests == 2  # the list, and the file that holds all segments


def test_login_is_for_the_playlist_and_its_neighbours(films: Path, web: WebServer) -> None:
    serve(web, films, "ts")
    for page in web.pages.values():
        page.login = ("me", "secret")
    assert shown(Playlist(web.url("/ts/a.m3u8", login="me:secret@"))) == list(range(30))
    assert "login" in refusal(Playlist(web.url("/ts/a.m3u8", login="me:wrong@")))


def test_it_can_be_sent_to_another_process(films: Path) -> None:
    source = Playlist(films / "master/a.m3u8", stall_seconds=5, max_height=16)
    shown(source)
    other = pickle.loads(pickle.dumps(source))
    assert (other.address, other.stall_seconds, other.max_height) == (source.address, 5, 16)
    assert shown(other) == list(range(30))


def test_two_passes_side_by_side(films: Path, web: WebServer) -> None:
    serve(web, films, "one")
    source = Playlist(web.url("/one/a.m3u8"))
    with source.open() as a, source.open() as b:
        times = [(x.pts, y.pts) for x, y in zip(a.decode(video=0), b.decode(video=0), strict=True)]
    assert len(times) == 30 and all(x == y for x, y in times)


def test_nothing_is_left_open(films: Path, web: WebServer) -> None:
    """An unclosed socket or file would be a warning, and warnings are errors."""
    for name in ("master/a.m3u8", "one/a.m3u8", "whole/a.mpd"):
        serve(web, films, name.partition("/")[0])
        for source in (Playlist(films / name), Playlist(web.url("/" + name))):
            container = source.open()
            next(container.decode(video=0))
            del source, container
            gc.collect()


def test_breaks_are_noted(films: Path, tmp_path: Path) -> None:
    for path in (films / "ts").glob("*.ts"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (films / "ts/a.m3u8").read_text()
    (tmp_path / "a.m3u8").write_text(text.replace("#EXTINF", "#EXT-X-DISCONTINUITY\n#EXTINF"))
    source = Playlist(tmp_path / "a.m3u8")
    assert shown(source) == list(range(30))
    assert source.notes[0].startswith("the playlist has 5 breaks")


def test_segment_that_is_cut_off_is_noted(films: Path, web: WebServer) -> None:
    serve(web, films, "ts")
    web.pages["/ts/a3.ts"].gap_at = 1000
    source = Playlist(web.url("/ts/a.m3u8"))
    assert len(shown(source)) >= 25 and source.notes == ("segments are cut off: their server sends less than it says",)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n", "hls"),
        (b"\xef\xbb\xbf\n #EXTM3U", "hls"),
        (b'<?xml version="1.0"?>\n<!-- x -->\n<MPD type="static">', "dash"),
        (b'<mpd:MPD xmlns:mpd="urn:mpeg:dash:schema:mpd:2011">', "dash"),
        (b"<html>MPD</html>", None),
        (b"\x00\x00\x00\x18ftypmp42#EXTM3U", None),
        (b"", None),
    ],
)
def test_content_tells_a_playlist(head: bytes, kind: str | None) -> None:
    assert is_playlist(head) == kind


# Live


def test_live_hls_is_followed_to_its_end(films: Path, web: WebServer) -> None:
    serve(web, films, "ts")
    text = (films / "ts/a.m3u8").read_text()
    early = text[: text.index("#EXTINF:0.500000,\na3.ts")]
    web.put("/ts/a.m3u8", early.encode())
    source = Playlist(web.url("/ts/a.m3u8"))
    assert source.live
    with source.open() as container:
        late = text.replace("SEQUENCE:0", "SEQUENCE:1").replace("#EXTINF:0.500000,\na0.ts\n", "")
        web.put("/ts/a.m3u8", late.encode())
        assert len(list(container.decode(video=0))) == 30
    assert not source.live
    assert {asked.headers["user-agent"].partition("/")[0] for asked in web.asked} == {"streamvid"}


def test_live_dash_is_followed_to_its_end(films: Path, web: WebServer) -> None:
    serve(web, films, "timeline")
    text = (films / "timeline/a.mpd").read_text()
    live = text.replace('type="static"', 'type="dynamic"')
    assert 'd="8000" r="5"' in text
    web.put("/timeline/a.mpd", live.replace('r="5"', 'r="2"').encode())
    source = Playlist(web.url("/timeline/a.mpd"))
    assert source.live
    with source.open() as container:
        late = text.replace('t="0" d="8000" r="5"', 't="8000" d="8000" r="4"').replace('Number="1"', 'Number="2"')
        web.put("/timeline/a.mpd", late.encode())
        assert len(list(container.decode(video=0))) == 30


def test_live_dash_counts_segments_by_the_clock(films: Path, web: WebServer) -> None:
    serve(web, films, "template")
    born = (datetime.now(UTC) - timedelta(seconds=2.75)).isoformat().replace("+00:00", "Z")
    text = (
        (films / "template/a.mpd")
        .read_text()
        .replace('type="static"', f'type="dynamic" availabilityStartTime="{born}"')
    )
    source = Playlist(web.put("/template/a.mpd", text.replace("<Period ", '<Period start="PT0S" ', 0).encode()))
    media = source._load()
    assert not media.ended and 5 <= len(media.segments) and media.sequence == 1
    assert media.segments[0].part.address.endswith("00001.m4s")


def test_silent_live_playlist_ends(films: Path, web: WebServer) -> None:
    serve(web, films, "ts")
    text = (films / "ts/a.m3u8").read_text().replace("#EXT-X-ENDLIST", "").replace(":0.5", ":0.1")
    source = Playlist(web.put("/ts/a.m3u8", text.encode()), stall_seconds=0.2)
    assert shown(source) == list(range(15, 30))  # the last three segments, as live streams start
    assert "the live playlist brought nothing new for 0.2 s and is taken as ended" in source.notes


def test_live_playlist_that_vanishes_is_an_error(
    films: Path, web: WebServer, capfd: pytest.CaptureFixture[str]
) -> None:
    serve(web, films, "ts")
    text = (films / "ts/a.m3u8").read_text().replace("#EXT-X-ENDLIST", "").replace(":0.5", ":0.1")
    source = Playlist(web.put("/ts/a.m3u8", text.encode()))
    with source.open() as container:
        web.pages["/ts/a.m3u8"].status = 404
        with pytest.raises(SourceError, match="does not exist"):
            list(container.decode(video=0))
    assert capfd.readouterr().err == ""


# What is broken


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#EXTM3U\n", "names no segments"),
        ("#EXTM3U\n#EXTINF:x,\na.ts\n", "makes no sense"),
        ("#EXTM3U\n#EXTINF:nan,\na.ts\n", "makes no sense"),
        ("#EXTM3U\n#EXT-X-BYTERANGE:5@-3\n#EXTINF:1,\na.ts\n", "makes no sense"),
        ("#EXTM3U\n#EXT-X-BYTERANGE:-5\n#EXTINF:1,\na.ts\n", "makes no sense"),
        ("#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:-5\n#EXTINF:1,\na.ts\n", "makes no sense"),
        ("#EXTM3U\n#EXTINF:1e300,\na.ts\n", "makes no sense"),
        ("#EXTM3U\n#EXT-X-MAP:BYTERANGE=3\n#EXTINF:1,\na.ts\n", "makes no sense"),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=x\na.m3u8\n", "makes no sense"),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\na.m3u8\n", "names playlists where segments should be"),
        ('#EXTM3U\n#EXT-X-DEFINE:NAME="a",VALUE="b"\n#EXTINF:1,\n{$a}.ts\n', "uses variables"),
        ('#EXTM3U\n#EXT-X-KEY:METHOD=SAMPLE-AES,URI="skd://x"\n#EXTINF:1,\na.ts\n', "is encrypted (DRM)"),
        ('#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,KEYFORMAT="com.apple",URI="skd://x"\n#EXTINF:1,\na.ts\n', "(DRM)"),
        ("<MPD>", "makes no sense"),
        ("<MPD></MPD>", "names no period"),
        ('<?xml version="1.0" encoding="x"?><MPD></MPD>', "makes no sense"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><MPD>&a;</MPD>', "defines entities"),
        ("<MPD><Period><AdaptationSet/></Period></MPD>", "names no video"),
        (
            '<MPD><Period><AdaptationSet contentType="video"><ContentProtection/><Representation/>'
            "</AdaptationSet></Period></MPD>",
            "is encrypted (DRM)",
        ),
        (
            '<MPD><Period><AdaptationSet contentType="video"><SegmentTemplate media="$Number$" duration="x"'
            "/><Representation/></AdaptationSet></Period></MPD>",
            "makes no sense",
        ),
        (
            '<MPD><Period duration="PT99999999S"><AdaptationSet contentType="video"><SegmentTemplate media="$Number$"'
            ' duration="1"/><Representation/></AdaptationSet></Period></MPD>',
            "makes no sense",
        ),
        (
            '<MPD><Period><AdaptationSet contentType="video"><SegmentTemplate media="$Number$"><SegmentTimeline>'
            '<S d="1" r="999999999"/></SegmentTimeline></SegmentTemplate><Representation/>'
            "</AdaptationSet></Period></MPD>",
            "makes no sense",
        ),
        (
            '<MPD><Period><AdaptationSet contentType="video"><Representation/></AdaptationSet></Period></MPD>',
            "no segments",
        ),
    ],
)
@pytest.mark.parametrize("remote", [True, False], ids=["network", "folder"])
def test_damaged_playlists_are_refused_in_one_line(
    web: WebServer, tmp_path: Path, text: str, words: str, remote: bool
) -> None:
    if "EXT-X-STREAM-INF:BANDWIDTH=1\n" in text:
        (tmp_path / "a.m3u8").write_text(text)
    (tmp_path / "a.m3u8").write_text(text)
    address = web.put("/a.m3u8", text.encode()) if remote else str(tmp_path / "a.m3u8")
    assert words in refusal(Playlist(address))


def test_what_is_no_playlist(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "a.m3u8").write_text("nobody")
    assert "is no HLS or DASH playlist" in refusal(Playlist(tmp_path / "a.m3u8"))
    assert "is no file" in refusal(Playlist(tmp_path))
    assert "is no file" in refusal(Playlist(tmp_path / "none.m3u8"))
    assert "is a web page" in refusal(Playlist(web.put("/a.m3u8", b"<html>log in</html>")))
    assert "is no HLS or DASH playlist" in refusal(Playlist(web.put("/b.m3u8", b"\x00\x01\x02")))


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"status": 404}, "does not exist (404)"),
        ({"status": 403}, "get a new one"),
        ({"body": b"<html>log in</html>"}, "is a web page"),
        ({"stall_after": 100}, "sent nothing for 0.3 s"),
        ({"redirect": "file:///etc/passwd"}, "other than http or https"),
    ],
    ids=["missing", "expired", "login", "stall", "redirect"],
)
def test_bad_segment_is_an_error_and_no_traceback(
    films: Path, web: WebServer, capfd: pytest.CaptureFixture[str], place: int, how: dict[str, object], words: str
) -> None:
    serve(web, films, "ts")
    for key, value in how.items():
        setattr(web.pages[f"/ts/a{place}.ts"], key, value)
    message = refusal(Playlist(web.url("/ts/a.m3u8?sig=secret"), stall_seconds=0.3))
    assert words in message and f"/ts/a{place}.ts" in message
    assert capfd.readouterr().err == ""


def test_many_bad_segments_are_one_error(films: Path, web: WebServer, capfd: pytest.CaptureFixture[str]) -> None:
    serve(web, films, "ts")
    for k in range(1, 6):
        web.pages[f"/ts/a{k}.ts"].status = 404
    assert "/ts/a1.ts does not exist (404)" in refusal(Playlist(web.url("/ts/a.m3u8")))
    assert web.paths() == ["/ts/a.m3u8", "/ts/a0.ts", "/ts/a1.ts"]
    assert capfd.readouterr().err == ""


def test_wrong_key_is_said_so(films: Path, web: WebServer) -> None:
    serve(web, films, "secret")
    web.put("/secret/a.key", b"another key, too", content_type="text/plain")
    with pytest.raises(SourceError, match="do not decrypt with the key it names"):
        shown(Playlist(web.url("/secret/a.m3u8")))
    web.put("/secret/a.key", b"too short")
    with pytest.raises(SourceError, match="does not decrypt; the key is wrong"):
        shown(Playlist(web.url("/secret/a.m3u8")))
    web.put("/secret/a.key", KEY)
    web.pages["/secret/a2.ts"].body = web.pages["/secret/a2.ts"].body[:-5]
    with pytest.raises(SourceError, match="or the segment damaged"):
        shown(Playlist(web.url("/secret/a.m3u8")))


def test_folder_of_what_is_no_film(tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_bytes(CANARY)
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    assert "holds no video that can be read" in refusal(Playlist(tmp_path / "a.m3u8"))


def test_sound_without_pictures(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.ts")
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:0.4,\na.ts\n#EXT-X-ENDLIST\n")
    with Playlist(tmp_path / "a.m3u8").open() as container:
        assert not container.streams.video and container.streams.audio


# What must not be opened


class Watch:
    """Whether a file was opened since; asks the kernel, so that nobody's open goes unseen."""

    def __init__(self, path: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.inotify_init1(os.O_NONBLOCK)
        opened_or_read = 0x20 | 0x01
        assert self._libc.inotify_add_watch(self._handle, os.fsencode(path), opened_or_read) >= 0

    def touched(self) -> bool:
        try:
            return len(os.read(self._handle, 4096)) >= struct.calcsize("iIII")
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._handle)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file outside the playlist's folder that must not even be opened."""
    path = tmp_path / "canary.ts"
    path.write_bytes(CANARY)
    if not sys.platform.startswith("linux"):
        yield path
        return
    watch = Watch(path)
    yield path
    touched = watch.touched()
    watch.close()
    assert not touched


def test_the_watch_sees_an_open(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs inotify")
    (tmp_path / "a").write_bytes(b"x")
    watch = Watch(tmp_path / "a")
    assert not watch.touched()
    (tmp_path / "a").read_bytes()
    assert watch.touched()
    watch.close()


LINES = {
    "segment": "#EXTINF:1,\n{}\n",
    "header": '#EXT-X-MAP:URI="{}"\n#EXTINF:1,\na0.ts\n',
    "key": '#EXT-X-KEY:METHOD=AES-128,URI="{}"\n#EXTINF:1,\na0.ts\n',
    "variant": "#EXT-X-STREAM-INF:BANDWIDTH=1\n{}\n",
    "second": "#EXTINF:0.5,\na0.ts\n#EXTINF:0.5,\n{}\n",
}


@pytest.mark.parametrize("where", LINES)
@pytest.mark.parametrize(
    "name",
    [
        "file://{canary}",
        "file:{canary}",
        "{canary}",
        "../canary.ts",
        "sub/../../canary.ts",
        "..%2Fcanary.ts",
        "link.ts",
        "out/canary.ts",
        "concat:{canary}|{canary}",
        "crypto:{canary}",
        "subfile,,start,0,end,0,,:{canary}",
        "data:text/plain,x",
        "pipe:0",
        "{web}",
    ],
)
def test_folder_names_nothing_outside(
    tmp_path: Path, films: Path, canary: Path, web: WebServer, where: str, name: str
) -> None:
    folder = tmp_path / "playlist"
    folder.mkdir()
    (folder / "link.ts").symlink_to(canary)
    (folder / "out").symlink_to(tmp_path)
    (folder / "a0.ts").write_bytes((films / "ts/a0.ts").read_bytes())
    named = name.format(canary=canary, web=web.put("/x.ts", CANARY))
    (folder / "a.m3u8").write_text(f"#EXTM3U\n{LINES[where].format(named)}#EXT-X-ENDLIST\n")
    message = refusal(Playlist(folder / "a.m3u8"))
    if "/x.ts" in named:
        assert "give the http address of the playlist itself" in message
    assert web.asked == []


def test_way_out_is_refused_with_the_list_before_any_segment(tmp_path: Path, films: Path, canary: Path) -> None:
    folder = tmp_path / "playlist"
    folder.mkdir()
    for name in (str(canary), "../canary.ts", "file:x", "http://127.0.0.1/x"):
        (folder / "a.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\na0.ts\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n")
        with pytest.raises(SourceError, match="opened"):
            Playlist(folder / "a.m3u8").live  # noqa: B018 - reads the list alone


@pytest.mark.parametrize("where", LINES)
@pytest.mark.parametrize(
    "name",
    [
        "file://{canary}",
        "file:{canary}",
        "concat:{canary}|{canary}",
        "crypto:{canary}",
        "crypto+file:{canary}",
        "ftp://127.0.0.1/x",
        "rtmp://127.0.0.1/x",
        "data:text/plain,x",
        "pipe:0",
    ],
)
def test_network_names_http_only(canary: Path, films: Path, web: WebServer, where: str, name: str) -> None:
    web.put("/a0.ts", (films / "ts/a0.ts").read_bytes())
    text = f"#EXTM3U\n{LINES[where].format(name.format(canary=canary))}#EXT-X-ENDLIST\n"
    assert "only http and https are opened" in refusal(Playlist(web.put("/a.m3u8", text.encode())))
    assert web.paths() == ["/a.m3u8"]


@pytest.mark.parametrize("base", ["file:///etc/", "../", "/etc/", "{web}"])
def test_dash_base_leads_nowhere_else(tmp_path: Path, films: Path, web: WebServer, base: str) -> None:
    folder = tmp_path / "playlist"
    folder.mkdir()
    text = (films / "timeline/a.mpd").read_text()
    text = text.replace("<Period", f"<BaseURL>{base.format(web=web.url('/'))}</BaseURL>\n<Period", 1)
    (folder / "a.mpd").write_text(text)
    refusal(Playlist(folder / "a.mpd"))
    assert web.asked == []


def test_dash_base_within_the_folder(films: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for path in (films / "timeline").glob("*.m4s"):
        (tmp_path / "parts" / path.name).write_bytes(path.read_bytes())
    text = (films / "timeline/a.mpd").read_text().replace("<Period", "<BaseURL>parts/</BaseURL>\n<Period", 1)
    (tmp_path / "a.mpd").write_text(text)
    assert shown(Playlist(tmp_path / "a.mpd")) == list(range(30))


@pytest.mark.parametrize("where", ["segment", "header", "second"])
def test_text_in_the_folder_is_not_handed_out(tmp_path: Path, films: Path, where: str) -> None:
    (tmp_path / "a0.ts").write_bytes((films / "ts/a0.ts").read_bytes())
    (tmp_path / "notes.txt").write_text("nobody reads plain words\n" * 50)
    (tmp_path / "a.m3u8").write_text(f"#EXTM3U\n{LINES[where].format('notes.txt')}#EXT-X-ENDLIST\n")
    assert "is a text file" in refusal(Playlist(tmp_path / "a.m3u8"))


def test_pipe_in_the_folder_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ts")
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    assert "is not a regular file" in refusal(Playlist(tmp_path / "a.m3u8"))


def test_outside_playlist_cannot_lead_inside(films: Path, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The playlist's server counts as one outside, every other connection as one inside."""
    with serving() as inner:
        monkeypatch.setattr(connections, "_is_private", lambda address: bool(web.asked))
        serve(inner, films, "ts")
        text = (films / "ts/a.m3u8").read_text().replace("a0.ts", inner.url("/ts/a0.ts"))
        assert "leads into a private network" in refusal(Playlist(web.put("/a.m3u8", text.encode())))
        assert inner.asked == []


def test_gate_knows_its_own_names_only(films: Path, canary: Path) -> None:
    source = Playlist(films / "ts/a.m3u8")
    media = source._load()

    def gate() -> PlaylistGate:
        return PlaylistGate("a.m3u8", source._home, media, source._load, source._note)

    for name, flags in ((str(canary), 1), (f"file://{canary}", 1), ("a0.ts", 1), ("segment-99", 1), ("segment-0", 3)):
        one = gate()
        one("playlist.m3u8", 1, {})
        with pytest.raises(SourceError, match="this is refused"):
            one(name, flags, {})
        assert one.refused is not None and one.opened == 0
        assert one("segment-0", 1, {}).read() == b""  # after the first refusal nothing is given
    one = gate()
    one("playlist.m3u8", 1, {})
    with one("segment-0", 1, {}) as open_before:
        assert open_before.read(4)
        with pytest.raises(SourceError):
            one("elsewhere", 1, {})
        assert open_before.read(4) == b""
    one = gate()
    text = one("playlist.m3u8", 1, {}).read() or b""
    assert b"a0.ts" not in text and b"segment-0" in text
    with one("segment-0", 1, {}) as file:
        assert file.read(10) == (films / "ts/a0.ts").read_bytes()[:10]
        assert file.seek(-5, io.SEEK_END) and file.read(10) == (films / "ts/a0.ts").read_bytes()[-5:]


@pytest.mark.parametrize("kind", ["hls", None])
def test_ffmpeg_itself_can_open_nothing(web: WebServer, canary: Path, films: Path, kind: str | None) -> None:
    """The second lock: with these options a playlist that reached FFmpeg as it is would open nothing, either."""
    serve(web, films, "ts")
    for name in (web.url("/ts/a0.ts"), str(canary), f"file://{canary}", f"crypto+file://{canary}"):
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n".encode()
        with pytest.raises(av.error.FFmpegError):
            av.open(io.BytesIO(text), "r", kind, container_options=playlist._OPTIONS).close()
    assert web.asked == []
