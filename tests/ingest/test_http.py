"""Files at http addresses: few requests, every misbehaving server ends in pictures or in one clear line."""

from __future__ import annotations

import base64
import gc
import io
import logging
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest import http
from streamvid.ingest import web as connections
from streamvid.ingest.http import BLOCK, HttpFile
from streamvid.ingest.web import Web
from tests.ingest.synthetic import even, write
from tests.ingest.web import Page, WebServer, serving

BODY = np.random.default_rng(0).integers(0, 256, 20 * BLOCK + 1001, dtype=np.uint8).tobytes()


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts are short, and no proxy of this machine is asked."""
    monkeypatch.setattr(connections, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 MB with a key frame every half second and the index at the end."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return write(path, even(300, fps=24), size=(240, 320), gop=12, noise=60)


def refusal(address: str, **settings: object) -> str:
    with pytest.raises(SourceError) as caught:
        HttpFile(address, **settings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and "Errno" not in message and "secret" not in message
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    return message


def content(file: HttpFile) -> bytes:
    return b"".join(iter(lambda: file.read(32768), b""))


# Reading


def test_whole_file_takes_few_growing_requests(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY)) as file:
        assert content(file) == BODY
        assert (file.size, file.tell(), file.name, file.notes) == (len(BODY), len(BODY), "a.mp4", ())
        assert file.requests == len(web.asked) == 5  # 1, 2, 4, 8 blocks, and the rest
        assert file.bytes_received == web.sent == len(BODY)
        assert web.connections == 1


def test_opening_asks_for_one_block(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY)) as file:
        assert file.read(10) == BODY[:10]
        assert (file.requests, web.sent) == (1, BLOCK)
    assert web.asked[0].headers["range"] == f"bytes=0-{BLOCK - 1}"


def test_it_is_a_python_file(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY)) as file:
        assert isinstance(file, io.RawIOBase) and file.readable() and file.seekable() and not file.writable()
        assert file.seek(-5, io.SEEK_END) == len(BODY) - 5 and file.read() == BODY[-5:]
        assert file.seek(-3, io.SEEK_CUR) == len(BODY) - 3 and file.read(2) == BODY[-3:-1]
        assert file.seek(len(BODY) + 10) and file.read(5) == b""
        buffer = bytearray(7)
        assert file.seek(BLOCK - 3) and file.readinto(buffer) == 3 and buffer[:3] == BODY[BLOCK - 3 : BLOCK]
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_reads_gives_the_bytes(web: WebServer, seed: int) -> None:
    random = np.random.default_rng(seed)
    with HttpFile(web.put("/a.mp4", BODY)) as file, file.reopen() as other:
        for reader in [file, other] * 30:
            at, count = int(random.integers(len(BODY))), int(random.integers(1, 2 * BLOCK))
            reader.seek(at)
            data = reader.read(count)
            assert data and data == BODY[at : at + len(data)]


def test_two_places_read_in_turn_keep_their_connections(web: WebServer) -> None:
    """Sound and pictures may lie in different halves: neither may restart the other's request."""
    half = 10 * BLOCK
    with HttpFile(web.put("/a.mp4", BODY)) as file:
        for k in range(80):
            for start in (0, half):
                file.seek(start + k * BLOCK // 8)
                assert file.read(BLOCK // 8) == BODY[start + k * BLOCK // 8 :][: BLOCK // 8]
        assert file.requests <= 8


def test_short_way_forward_is_read_over(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY)) as file:
        for block, requests in ((0, 1), (1, 2), (2, 2), (3, 3), (5, 3), (4, 3), (9, 4)):
            file.seek(block * BLOCK)
            assert file.read(9) == BODY[block * BLOCK :][:9] and file.requests == requests


def test_memory_is_bounded(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_KEPT_BLOCKS", 4)
    with HttpFile(web.put("/a.mp4", BODY)) as file:
        assert content(file) == BODY
        assert len(file._remote._blocks) == 4
        file.seek(0)
        assert content(file) == BODY


def test_sampling_fetches_a_fraction(web: WebServer, film: Path) -> None:
    with HttpFile(web.put("/film.mp4", film.read_bytes())) as file:
        with av.open(file, "r") as container:
            stream = container.streams.video[0]
            shown = []
            for k in range(8):
                goal = Fraction(25 * (2 * k + 1), 32)
                container.seek(int(goal / stream.time_base), stream=stream)
                frame = next(f for f in container.decode(stream) if f.pts * f.time_base + Fraction(1, 24) > goal)
                shown.append(frame.to_ndarray(format="gray"))
        assert film.stat().st_size > 15_000_000 and web.connections <= 1 + 8
        assert file.bytes_received < film.stat().st_size / 2 and file.requests <= 2 + 8 * 3
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        frames = [(f.pts * f.time_base + Fraction(1, 24), f) for f in container.decode(stream)]
        for k, picture in enumerate(shown):
            goal = Fraction(25 * (2 * k + 1), 32)
            assert np.array_equal(next(f for end, f in frames if end > goal).to_ndarray(format="gray"), picture)


def test_next_pass_finds_the_index_in_memory(web: WebServer, film: Path) -> None:
    with HttpFile(web.put("/film.mp4", film.read_bytes())) as file:
        av.open(file, "r").close()
        before = file.requests
        for _ in range(3):
            with file.reopen() as again, av.open(again, "r") as container:
                assert container.streams.video[0].frames == 300
        assert file.requests == before


def test_readers_end_one_by_one(web: WebServer) -> None:
    first = HttpFile(web.put("/a.mp4", BODY))
    second = first.reopen()
    first.close()
    assert second.read(4) == BODY[:4] and second.seek(5 * BLOCK) and second.read(4) == BODY[5 * BLOCK :][:4]
    second.close()
    second.close()


def test_forgotten_file_leaves_no_socket(web: WebServer) -> None:
    """An unclosed socket or file would be a warning, and warnings are errors."""
    for how in ({}, {"ranges": False}):
        HttpFile(web.put("/a.mp4", BODY, **how)).read(1)
        gc.collect()


# Servers without ranges


@pytest.mark.parametrize("how", [{}, {"chunked": True}], ids=["length", "chunked"])
def test_without_ranges_it_is_downloaded_once(web: WebServer, how: dict[str, bool]) -> None:
    with HttpFile(web.put("/a.mp4", BODY, ranges=False, **how)) as file:
        assert file.read(10) == BODY[:10]
        assert file.bytes_received < len(BODY) / 2
        assert file.seek(-10, io.SEEK_END) == len(BODY) - 10 and file.read(20) == BODY[-10:]
        with file.reopen() as other:
            assert content(other) == BODY
        assert file.requests == 1 and file.bytes_received == len(BODY)
        assert file.notes == (f"the server ignores ranges; {len(BODY)} bytes were downloaded",)


def test_download_is_as_long_as_needed(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY, ranges=False)) as file:
        file.seek(3 * BLOCK)
        assert file.read(100) == BODY[3 * BLOCK :][:100]
        assert file.bytes_received < 4 * BLOCK


def test_download_limit(web: WebServer) -> None:
    known = refusal(web.put("/a.mp4", BODY, ranges=False), max_download_bytes=BLOCK)
    assert f"max_download_bytes ({BLOCK})" in known and web.sent < len(BODY)
    with HttpFile(web.put("/b.mp4", BODY, ranges=False, chunked=True), max_download_bytes=2 * BLOCK) as file:
        with pytest.raises(SourceError, match="max_download_bytes"):
            content(file)


def test_download_looks_for_room_first(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    room = namedtuple("room", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room(10**9, 10**9 - 1000, 1000))
    assert "set TMPDIR" in refusal(web.put("/a.mp4", BODY, ranges=False))


def test_downloaded_file_is_gone_after_close(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with HttpFile(web.put("/a.mp4", BODY, ranges=False)) as file:
        content(file)
        inside = file._remote._download._file  # type: ignore[union-attr]
        assert inside._rolled  # type: ignore[attr-defined]  # it did go to disk
    assert list(tmp_path.iterdir()) == [] and inside.closed


def test_broken_download_starts_over_and_must_be_the_same(web: WebServer) -> None:
    address = web.put("/a.mp4", BODY, ranges=False, etag=None, stop_after=4 * BLOCK)
    with HttpFile(address) as file:
        file.read(10)
        web.pages["/a.mp4"].stop_after = None
        assert content(file) == BODY[10:]
        assert web.paths() == ["/a.mp4"] * 2
    with HttpFile(web.put("/a.mp4", BODY, ranges=False, etag=None, stop_after=4 * BLOCK)) as file:
        web.pages["/a.mp4"].body = BODY[::-1]
        with pytest.raises(SourceError, match="changed while it was read"):
            content(file)


# Connections that break


@pytest.mark.parametrize("how", ["reset_after", "stop_after"])
def test_broken_connections_are_resumed(web: WebServer, how: str) -> None:
    with HttpFile(web.put("/a.mp4", BODY, **{how: BLOCK + 5000})) as file:
        assert content(file) == BODY
        assert file.notes == ()


def test_trickle_is_patiently_read(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY[: 2 * BLOCK], trickle=997), stall_seconds=5) as file:
        assert content(file) == BODY[: 2 * BLOCK]


@pytest.mark.parametrize("ranges", [True, False])
def test_truncated_file_ends_with_a_note(web: WebServer, ranges: bool) -> None:
    at = 3 * BLOCK + 77
    how = {"gap_at": at} if ranges else {"stop_after": at, "ranges": False}
    with HttpFile(web.put("/a.mp4", BODY, **how)) as file:
        assert content(file) == BODY[:at]
        assert file.size == at and file.read(1) == b""
        assert file.notes[-1] == f"the file is cut off: the server sends {at} of {len(BODY)} bytes and no more"
        assert file.requests < 12


@pytest.mark.parametrize("ranges", [True, False])
def test_length_that_is_too_large_ends_with_a_note(web: WebServer, ranges: bool) -> None:
    with HttpFile(web.put("/a.mp4", BODY, ranges=ranges, said_length=10**9)) as file:
        assert content(file) == BODY
        assert bool(file.notes) != ranges


def test_length_that_is_too_small(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY, ranges=False, said_length=BLOCK)) as file:
        assert content(file) == BODY[:BLOCK]
    with HttpFile(web.put("/a.mp4", BODY, said_length=BLOCK // 2)) as file:
        assert content(file) == BODY


def test_server_that_breaks_without_progress_is_given_up(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY), attempts=3) as file:
        file.seek(5 * BLOCK)
        web.pages["/a.mp4"].reset_after = 0
        with pytest.raises(SourceError, match="3 times in a row"):
            file.read(1)
        assert file.requests == 1 + 3


def test_stall_is_an_error_in_time(web: WebServer) -> None:
    assert "sent nothing for 0.2 s" in refusal(web.put("/a.mp4", BODY, stall_after=0), stall_seconds=0.2)
    with HttpFile(web.put("/b.mp4", BODY, stall_after=BLOCK), stall_seconds=0.2) as file:
        assert file.read(10) == BODY[:10]
        file.seek(3 * BLOCK)
        web.pages["/b.mp4"].stall_after = 10
        with pytest.raises(SourceError, match="raise stall_seconds"):
            file.read(BLOCK)
        assert file.requests == 2


def test_error_comes_once_and_then_the_end(web: WebServer) -> None:
    """FFmpeg goes on reading after an error; PyAV prints a traceback for every second one."""
    with HttpFile(web.put("/a.mp4", BODY)) as file:
        web.pages["/a.mp4"].status = 404
        file.seek(9 * BLOCK)
        with pytest.raises(SourceError) as caught:
            file.read(1)
        assert file.failure is caught.value and file.read(1) == b"" and file.requests == 2


def test_error_passes_through_pyav_as_itself(web: WebServer, film: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with HttpFile(web.put("/film.mp4", film.read_bytes())) as file, av.open(file, "r") as container:
        web.pages["/film.mp4"].status = 403
        with pytest.raises(SourceError, match="get a new one"):
            for _ in container.decode(video=0):
                pass
    assert capfd.readouterr().err == ""


# Answers that are no file


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, "does not exist (404)"),
        (410, "does not exist (410)"),
        (401, "needs a login (401)"),
        (403, "expired link or needs a login (403); signed links expire: get a new one"),
        (418, "answers 418"),
        (204, "answers 204"),
        (500, "answers 500 (Internal Server Error), 2 times in a row"),
        (429, "answers 429 (Too Many Requests), 2 times in a row"),
    ],
)
def test_refusals_say_what_to_do(web: WebServer, status: int, words: str) -> None:
    web.put("/a.mp4", BODY, status=status)
    message = refusal(web.url("/a.mp4?sig=secret", login="secret:secret@").replace("secret:", "u:"), attempts=2)
    assert words in message.replace("refuses the login in the address", "is an expired link or needs a login")
    assert message.startswith(f"http://127.0.0.1:{web.port}/a.mp4?... ")
    assert len(web.asked) == (2 if status in (500, 429) else 1)


def test_busy_server_is_asked_again(web: WebServer) -> None:
    address = web.put("/a.mp4", BODY, first=[503, 500, 429], headers={"Retry-After": "0"})
    with HttpFile(address) as file:
        assert content(file) == BODY
        web.pages["/a.mp4"].first = [502]
        with file.reopen() as other:
            other.seek(0)
            assert other.read(1) == BODY[:1]
    assert len(web.asked) == 3 + 5


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"", "video/mp4", "is empty (0 bytes)"),
        (b"\n<!DOCTYPE html><html><form>log in</form></html>", "video/mp4", "is a web page, not a video file"),
        (b"please log in", "text/html; charset=utf-8", "is a web page, not a video file"),
        (b'{"error": "no"}', "application/json", "is a JSON answer"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "application/xml", "is text, not a video"),
        ("kein Film, größer".encode() * 1000, "video/mp4", "is text, not a video"),
    ],
    ids=["empty", "html", "login", "json", "xml", "text"],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_text_is_no_video(web: WebServer, body: bytes, kind: str, words: str, ranges: bool) -> None:
    assert words in refusal(web.put("/a.mp4", body, content_type=kind, ranges=ranges))


def test_bytes_outweigh_the_content_type(web: WebServer) -> None:
    with HttpFile(web.put("/a.ts", BODY, content_type="text/html")) as file:
        assert content(file) == BODY


def test_playlists_and_wanted_text_may_be_read(web: WebServer) -> None:
    with HttpFile(web.put("/a.m3u8", b"#EXTM3U\n", content_type="text/plain")) as file:
        assert file.read() == b"#EXTM3U\n"
    with HttpFile(web.put("/key", b"0123456789abcdef"), text=True) as file:
        assert file.read() == b"0123456789abcdef"


def test_compressed_answers_are_refused(web: WebServer) -> None:
    assert "compressed" in refusal(web.put("/a.mp4", BODY, headers={"Content-Encoding": "gzip"}))
    assert web.asked[0].headers["accept-encoding"] == "identity"


def test_servers_that_cannot_be_reached(web: WebServer) -> None:
    with serving() as gone:
        closed = gone.url("/a.mp4?sig=secret")
    assert "refuses connections" in refusal(closed)
    assert "names a server that is not known" in refusal("http://no-such-host.invalid/a.mp4?sig=secret")
    assert "no TLS connection" in refusal(web.url("/a.mp4?sig=secret").replace("http:", "https:"))


@pytest.mark.parametrize(
    "address", ["ftp://host/a", "http://", "http://[::1/a", "http:///a", "http://a b/c", "http://h:x/"]
)
def test_what_is_no_address(address: str) -> None:
    assert "is no http or https address" in refusal(address)


@pytest.mark.parametrize("settings", [{"stall_seconds": 0}, {"stall_seconds": float("nan")}, {"attempts": 0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match="must be"):
        HttpFile("http://127.0.0.1/a.mp4", **settings)  # type: ignore[arg-type]


# Redirects, logins, private networks, proxies


def test_redirects_are_followed_and_remembered(web: WebServer) -> None:
    web.put("/real.mp4", BODY)
    web.put("/two", redirect="/real.mp4?sig=1")
    with HttpFile(web.put("/one", redirect=web.url("/two"))) as file:
        assert content(file) == BODY and file.name == "real.mp4"
    assert web.paths() == ["/one", "/two"] + ["/real.mp4?sig=1"] * 5


def test_expired_target_is_asked_for_again(web: WebServer) -> None:
    web.put("/old.mp4", BODY)
    web.put("/new.mp4", BODY)
    with HttpFile(web.put("/one", redirect="/old.mp4")) as file:
        web.pages["/old.mp4"].status = 403
        web.pages["/one"].redirect = "/new.mp4"
        assert content(file) == BODY


def test_redirect_circle(web: WebServer) -> None:
    assert "redirects more than 10 times" in refusal(web.put("/a", redirect="/a"))
    assert len(web.asked) == 11


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://h/"])
def test_redirect_to_other_schemes_is_refused(web: WebServer, target: str) -> None:
    assert "other than http or https" in refusal(web.put("/a.mp4", redirect=target))


def test_login_goes_to_its_server_only(web: WebServer) -> None:
    with serving() as other:
        other.put("/b.mp4", BODY)
        web.put("/a.mp4", redirect=other.url("/b.mp4", login="x:y@"), login=("me@home", "s:p"))
        with HttpFile(web.url("/a.mp4", login="me%40home:s%3Ap@")) as file:
            assert content(file) == BODY
        assert web.asked[0].headers["authorization"] == "Basic " + base64.b64encode(b"me@home:s:p").decode()
        assert other.asked and not any("authorization" in asked.headers for asked in other.asked)
    assert not any("me" in asked.path for asked in web.asked)


def test_wrong_login_is_said_so(web: WebServer) -> None:
    web.put("/a.mp4", BODY, login=("me", "right"))
    assert "refuses the login in the address (401)" in refusal(web.url("/a.mp4", login="me:secret@"))
    assert "needs a login (401)" in refusal(web.url("/a.mp4"))


def test_outside_cannot_lead_inside(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as inner:
        monkeypatch.setattr(
            connections, "_is_private", lambda address: bool(web.asked)
        )  # only the first server is outside
        assert "leads into a private network" in refusal(web.put("/a.mp4", redirect=inner.put("/b.mp4", BODY)))
        assert inner.asked == []


def test_private_servers_may_be_forbidden(web: WebServer) -> None:
    with pytest.raises(SourceError, match="private network"):
        HttpFile(web.put("/a.mp4", BODY), web=Web(private=False))
    assert web.asked == []


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("192.168.0.1", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("::ffff:10.0.0.1", True),
        ("8.8.8.8", False),
        ("2606:4700:4700::1111", False),
    ],
)
def test_what_is_private(address: str, private: bool) -> None:
    assert connections._is_private(address) is private


def test_proxy_of_the_environment_is_used(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", web.url(""))
    monkeypatch.setenv("no_proxy", "elsewhere.invalid")
    address = "http://film.invalid/a.mp4"
    web.pages[address] = Page(BODY)
    with HttpFile(address) as file:
        assert content(file) == BODY
    assert set(web.paths()) == {address}
    assert "names a server that is not known" in refusal("http://elsewhere.invalid/a.mp4")


def test_requests_say_no_more_than_needed(web: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), HttpFile(web.put("/a.mp4", BODY)) as file:
        content(file)
    names = {"host", "user-agent", "accept", "accept-encoding", "range", "if-range"}
    assert all(set(asked.headers) <= names for asked in web.asked)
    assert {asked.headers["user-agent"].partition("/")[0] for asked in web.asked} == {"streamvid"}
    assert caplog.text == ""  # a log with whole addresses would hold signed links


# Which bytes these are


def test_change_between_two_reads_is_noticed(web: WebServer) -> None:
    for change in ({"etag": '"two"'}, {"body": BODY + b"x"}, {"ranges": False, "etag": '"two"'}):
        with HttpFile(web.put("/a.mp4", BODY)) as file:
            file.read(1)
            for key, value in change.items():
                setattr(web.pages["/a.mp4"], key, value)
            file.seek(5 * BLOCK)
            with pytest.raises(SourceError, match="changed while it was read"):
                file.read(1)
            assert web.asked[-1].headers["if-range"] == '"one"'


def test_server_that_stops_answering_ranges(web: WebServer) -> None:
    with HttpFile(web.put("/a.mp4", BODY)) as file:
        web.pages["/a.mp4"].ranges = False
        file.seek(5 * BLOCK)
        with pytest.raises(SourceError, match="no longer answers ranges"):
            file.read(1)


def identity(address: str) -> str | None:
    with HttpFile(address) as file:
        return file.identity()


def test_identity_by_strong_tag(web: WebServer) -> None:
    web.put("/a.mp4", BODY)
    one = identity(web.url("/a.mp4?sig=secret", login="secret:secret@"))
    assert one == identity(web.url("/a.mp4?sig=other")) and one is not None
    assert "secret" not in one and "127.0.0.1" not in one and len(web.asked) == 2
    assert identity(web.put("/a.mp4", BODY, etag='"two"')) != one
    assert identity(web.put("/a.mp4", BODY[:-1])) != one
    assert identity(web.put("/b.mp4", BODY)) != one


def test_identity_by_date_and_samples(web: WebServer) -> None:
    one = identity(web.put("/a.mp4", BODY, etag=None, modified=1e9))
    assert one is not None and web.sent < 2 * 8 * (1 << 16)
    assert identity(web.put("/a.mp4", BODY, etag=None, modified=1e9)) == one
    assert identity(web.put("/a.mp4", BODY, etag=None, modified=2e9)) != one
    for place in (0, -1, len(BODY) // 7 * 3 + 1000):
        other = bytearray(BODY)
        other[place] ^= 1
        assert identity(web.put("/a.mp4", bytes(other), etag=None, modified=1e9)) != one
    assert identity(web.put("/a.mp4", BODY, etag='W/"1"')) not in (None, one)


def test_identity_of_what_was_downloaded(web: WebServer) -> None:
    one = identity(web.put("/a.mp4", BODY, etag=None, ranges=False))
    assert one is not None and one == identity(web.put("/a.mp4", BODY, etag=None, ranges=False, chunked=True))
    assert identity(web.put("/a.mp4", BODY[:-1] + b"x", etag=None, ranges=False)) != one


def test_no_identity_where_nothing_can_be_trusted(web: WebServer) -> None:
    assert identity(web.put("/a.mp4", BODY, etag=None)) is None
    with HttpFile(web.put("/a.mp4", BODY, gap_at=BLOCK + 1)) as file:
        content(file)
        assert file.identity() is None
