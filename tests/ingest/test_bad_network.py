"""RTSP over networks that lose and delay packets, in network namespaces; encrypted, by UDP, changing its codec."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from streamvid.errors import SettingsError, SourceError
from streamvid.frames import Frame
from streamvid.ingest import Gap, Notice, Supervised
from tests.ingest.gst import gst_server, pack
from tests.ingest.lossy import wire
from tests.ingest.synthetic import even, number, write
from tests.ingest.test_gst import QUICK, live, rises, watch


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of ten pictures a second, with B-frames; each shows its number."""
    folder = tmp_path_factory.mktemp("gst")
    part = write(folder / "film.ts", even(60), gop=10, bframes=2, noise=20, size=(64, 320))
    return pack(folder / "film", [part])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in HEVC."""
    folder = tmp_path_factory.mktemp("hevc")
    how = {"x265-params": "keyint=10:bframes=0:log-level=none:repeat-headers=1:pools=1", "preset": "ultrafast"}
    part = write(folder / "film.ts", even(60), bframes=0, codec="libx265", options=how, size=(64, 320))
    return pack(folder / "film", [part])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for 127.0.0.1 that nobody but its maker trusts."""
    folder = tmp_path_factory.mktemp("tls")
    key, own = folder / "key.pem", folder / "own.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=camera"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(own)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except OSError:
        pytest.skip("openssl is not installed; it makes the certificate")
    both = folder / "both.pem"
    both.write_bytes(key.read_bytes() + own.read_bytes())
    return both


def watch_through(film: Path, loss: float, delay: float, query: str, seconds: float) -> dict[str, Any]:
    """What is given of a camera behind a wire that loses packets as soon as the server runs."""
    with wire(loss, delay) as laid, gst_server(film, "--address", "10.99.0.2", space=laid.far) as server:
        address = f"rtsp://10.99.0.2:{server.port}/live{query}"
        command = ["ip", "netns", "exec", laid.near, sys.executable, "-m", "tests.ingest.watching", address]
        root = Path(__file__).parents[2]
        told = subprocess.run([*command, str(seconds)], cwd=root, capture_output=True, text=True, timeout=90)
        assert told.returncode == 0, told.stderr
        assert laid.carried > 100 and (laid.lost > 0) == (loss > 0)
        result: dict[str, Any] = json.loads(told.stdout)
        return result


def follow(frames: list[list[float]]) -> bool:
    """Whether each picture begins when the one before is gone or later."""
    return all(a[0] + a[1] <= b[0] + 1e-6 for a, b in zip(frames, frames[1:], strict=False))


@pytest.mark.slow
def test_packets_lost_on_the_way_cost_pictures_and_are_said(film: Path) -> None:
    """5 % of all packets and a way of 0.1 s, by UDP; three in four of these pictures lose a part."""
    seen = watch_through(film, 0.05, 0.1, "?udp", 12)
    assert seen["connects"] == 1 and seen["gaps"] == [] and follow(seen["frames"])
    assert len(seen["frames"]) > 20 and seen["quiet"] < 3
    assert seen["damaged"] > 5
    (said,) = [text for kind, text in seen["notices"] if kind == "damage"]
    assert "damaged pictures left out: " in said and "10.99.0.2" in said


@pytest.mark.slow
def test_a_slow_way_costs_nothing_over_tcp(film: Path) -> None:
    seen = watch_through(film, 0.02, 0.1, "", 10)
    assert seen["connects"] == 1 and seen["gaps"] == [] and follow(seen["frames"])
    assert seen["damaged"] == 0 and [kind for kind, _ in seen["notices"]] == ["connected"]
    steps = zip(seen["frames"], seen["frames"][1:], strict=False)
    assert {round(10 * (b[0] - a[0])) - (b[2] - a[2]) % 60 for a, b in steps} == {0}


def test_pictures_come_by_udp(film: Path) -> None:
    with gst_server(film) as server, Supervised(live(server) + "?udp", patience=QUICK) as watched:
        frames = [item for item in watch(watched, "Frame", 15) if isinstance(item, Frame)]
        shown = [number(frame.pixels) for frame in frames]
        assert [(b - a) % 60 for a, b in zip(shown, shown[1:], strict=False)] == [1] * 14
        assert watched.damaged == 0


def test_a_certificate_that_nobody_knows_is_refused_unless_that_is_asked_for(
    film: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gst_server(film, "--certificate", str(certificate)) as server:
        address = live(server).replace("rtsp:", "rtsps:")
        with pytest.raises(SourceError, match=r"not trusted \(self.signed certificate\).*STREAMVID_TLS_VERIFY=0"):
            list(Supervised(address, patience=QUICK))
        monkeypatch.setenv("STREAMVID_TLS_VERIFY", "0")
        with Supervised(address, patience=QUICK) as watched:
            items = watch(watched, "Frame", 5)
            (said,) = [item.text for item in items if isinstance(item, Notice) and item.kind == "connected"]
            assert "h264 320x64; the certificate is not checked" in said and "tls_verify" not in said
        monkeypatch.setenv("STREAMVID_TLS_VERIFY", "maybe")
        with pytest.raises(SettingsError, match="0 or 1"):
            Supervised(address)


def test_a_certificate_that_this_machine_knows_is_enough(
    film: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamvid.ingest.isolation import POOL

    POOL.close()  # what decodes reads the environment it was started in
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("own.pem")))
    with gst_server(film, "--certificate", str(certificate)) as server:
        with Supervised(live(server).replace("rtsp:", "rtsps:"), patience=QUICK) as watched:
            items = watch(watched, "Frame", 5)
            assert not any("certificate" in item.text for item in items if isinstance(item, Notice))
    POOL.close()


@pytest.mark.slow
def test_another_codec_after_a_restart_goes_on_in_the_same_stream(film: Path, other: Path) -> None:
    with gst_server(film) as server, Supervised(live(server), patience=QUICK, sampling=5) as watched:
        items = watch(watched, "Frame", 5)
        server.kill()
        items += watch(watched, "lost")
        time.sleep(watched.accuracy_seconds)  # a shorter gap may lie within what is known of the time
        server.film, server.options = other, ("--codec", "h265")
        server.start()
        items += watch(watched, "Gap") + watch(watched, "Frame", 8)
        told = [item.text for item in items if isinstance(item, Notice) and item.kind == "connected"]
        assert "h264 320x64" in told[0] and "hevc 320x64" in told[1] and rises(items)
        last = [item for item in items if isinstance(item, Frame)][-6:]
        steps = [(number(b.pixels) - number(a.pixels)) % 60 for a, b in zip(last, last[1:], strict=False)]
        assert all(step == round(10 * (b.pts - a.pts)) for step, a, b in zip(steps, last, last[1:], strict=False))
        assert len([item for item in items if isinstance(item, Gap)]) == 1
