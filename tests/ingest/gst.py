"""Starts GStreamer's RTSP server, which is not ours, for tests; says why where it is not there."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import pytest

PYTHON = "/usr/bin/python3"
SERVER = Path(__file__).with_name("gst_server.py")
_NEEDED = (
    "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0');"
    "from gi.repository import Gst, GstRtspServer; Gst.init(None);"
    "assert Gst.ElementFactory.find('rtph264pay') and Gst.ElementFactory.find('h264parse')"
)


@functools.cache
def missing() -> bool:
    """Whether the server cannot be started here."""
    try:
        return subprocess.run([PYTHON, "-c", _NEEDED], capture_output=True, timeout=60).returncode != 0
    except OSError:
        return True


class GstServer:
    """A running server; it can be killed, started again at the same port, and stopped for a while."""

    def __init__(self, film: Path, *options: str, space: str | None = None) -> None:
        self.film, self.options, self._space = film, options, space
        self.port = 0
        self.start()

    def start(self) -> None:
        """Take clients, at the port of before."""
        inside = ["ip", "netns", "exec", self._space] if self._space is not None else []
        command = [*inside, PYTHON, str(SERVER), str(self.film), "--port", str(self.port), *self.options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().split()[1])

    def kill(self) -> None:
        """As when its power fails."""
        self._process.kill()
        self._process.communicate()

    def pause(self) -> None:
        """It hangs: connections stay and nothing comes."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def gst_server(film: Path, *options: str, space: str | None = None) -> Iterator[GstServer]:
    """A server for as long as the block runs, in a network namespace if one is named; skips the test where none is."""
    if missing():
        pytest.skip("GStreamer's RTSP server is not installed; Debian has it in gir1.2-gst-rtsp-server-1.0")
    server = GstServer(film, *options, space=space)
    try:
        yield server
    finally:
        server.kill()


def pack(path: Path, parts: Sequence[Path]) -> Path:
    """Transport streams of one codec one after another, as ``gst_server.py`` wants them."""
    data, index, end = b"", [], 0
    for part in parts:
        with av.open(str(part)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            times = [(round(p.pts * p.time_base * 1000), round(p.dts * p.time_base * 1000)) for p in packets]
        begin = min(dts for _, dts in times)
        for packet, (pts, dts) in zip(packets, times, strict=True):
            data += bytes(packet)
            index.append([packet.size, pts - begin + end, dts - begin + end])
        end += max(dts for _, dts in times) - begin + 100
    path.write_bytes(data)
    Path(f"{path}.json").write_text(json.dumps({"packets": index, "length": end}))
    return path
