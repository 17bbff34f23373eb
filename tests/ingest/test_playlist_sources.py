"""Playlists through ``open_source``: sampled like files, from a folder and from an address; attacks read nothing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from streamvid.errors import SourceError
from streamvid.ingest import Sampling, open_source
from tests.ingest.synthetic import even, numbers, write
from tests.ingest.web import serving

HLS = {"hls_time": "0.5", "hls_list_size": "0", "hls_playlist_type": "vod"}
SECRET = b"root:x:0:0: nobody may read this\n" * 40


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lists")
    for name, kind, options in (
        ("ts/a.m3u8", "hls", HLS),
        ("fmp4/a.m3u8", "hls", {**HLS, "hls_segment_type": "fmp4"}),
        ("dash/a.mpd", "dash", {"seg_duration": "0.5"}),
    ):
        path = root / name
        path.parent.mkdir()
        write(path, even(40), kind=kind, gop=5, bframes=0, container=options)
    return root


@pytest.mark.parametrize("name", ["ts/a.m3u8", "fmp4/a.m3u8", "dash/a.mpd"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_playlist_is_sampled_like_a_file(films: Path, name: str, remote: bool) -> None:
    with serving() as web:
        address = str(films / name)
        if remote:
            for path in (films / name).parent.iterdir():
                web.put(f"/x/{path.name}", path.read_bytes(), content_type="text/plain")
            address = web.url(f"/x/{Path(name).name}?token=s3cr3t")
        with open_source(address, stall_seconds=10) as source:
            start = source.info.start
            every = list(source.frames())
            assert numbers(every) == list(range(40))
            assert [frame.pts - start for frame in every] == [Fraction(k, 10) for k in range(40)]
            assert numbers(list(source.frames(Sampling(count=4)))) == [0, 10, 20, 30]
            assert numbers(list(source.frames(Sampling(fps=2, start=start + 1, stop=start + 3)))) == [10, 15, 20, 25]
            assert "s3cr3t" not in repr(source.info)


@pytest.mark.parametrize("name", ["secret.ts", "../secret.ts", "/etc/passwd", "file:///etc/passwd", "link.ts"])
def test_a_playlist_cannot_read_files(films: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    for place in (folder / "secret.ts", tmp_path / "secret.ts"):
        place.write_bytes(SECRET)
    (folder / "link.ts").symlink_to(tmp_path / "secret.ts")
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{name}\n#EXT-X-ENDLIST\n"
    (folder / "a.m3u8").write_text(text)
    with serving() as web:
        remote = web.put("/a.m3u8", text.encode())
        for address in (str(folder / "a.m3u8"), *([] if name == "secret.ts" else [remote])):
            with pytest.raises(SourceError) as caught:
                open_source(address, stall_seconds=3)
            assert "nobody" not in str(caught.value) and "root:" not in str(caught.value)


def test_a_local_playlist_opens_no_network(films: Path, tmp_path: Path) -> None:
    with serving() as web:
        segment = web.put("/a.ts", (films / "ts" / "a0.ts").read_bytes())
        (tmp_path / "a.m3u8").write_text(f"#EXTM3U\n#EXTINF:0.5,\n{segment}\n#EXT-X-ENDLIST\n")
        with pytest.raises(SourceError):
            open_source(tmp_path / "a.m3u8")
        assert web.asked == []
