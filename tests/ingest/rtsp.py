"""A small RTSP server: one film over and over as RTP within the connection, with what cameras do wrong on demand."""

from __future__ import annotations

import base64
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av

SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=film\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
    "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\na=control:film\r\n"
)


class RtspServer:
    """Serves an H.264 file to any number of clients, each from its start.

    Args:
        film: sent as fast as it is taken.
        user: ``name:password`` that is asked for; None lets everybody in.
        silent_after: packets after which nothing more is sent and the connection stays; None for never.
        cut_after: packets after which the connection is closed; None for never.
    """

    def __init__(
        self, film: Path, *, user: str | None = None, silent_after: int | None = None, cut_after: int | None = None
    ) -> None:
        self._packets = _rtp(film)
        self._user = user
        self._silent_after, self._cut_after = silent_after, cut_after
        self._stop = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.requests: list[str] = []
        """First lines of what was asked."""

        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more clients and leave those there are."""
        self._stop.set()
        self._socket.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError), client.makefile("rb") as lines:
            while not self._stop.is_set():
                request = lines.readline().decode().split()
                if not request:
                    return
                head = {}
                while line := lines.readline().decode().strip():
                    name, _, value = line.partition(":")
                    head[name.lower()] = value.strip()
                self.requests.append(" ".join(request[:2]))
                reply = self._reply(request, head)
                client.sendall(reply)
                if request[0] == "PLAY" and b"200 OK" in reply:
                    self._play(client)
                    return

    def _reply(self, request: list[str], head: dict[str, str]) -> bytes:
        lines, body = [f"CSeq: {head.get('cseq', '0')}"], ""
        status = "200 OK"
        token = base64.b64encode(self._user.encode()).decode() if self._user is not None else None
        if token is not None and head.get("authorization") != f"Basic {token}":
            status = "401 Unauthorized"
            lines.append('WWW-Authenticate: Basic realm="camera"')
        elif request[0] == "OPTIONS":
            lines.append("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
        elif request[0] == "DESCRIBE":
            body = SDP
            lines += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
        elif request[0] == "SETUP":
            if "TCP" not in head.get("transport", ""):
                status = "461 Unsupported Transport"
            lines += ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1"]
        elif request[0] == "PLAY":
            lines.append("Session: 1")
        return "\r\n".join([f"RTSP/1.0 {status}", *lines, "", body]).encode()

    def _play(self, client: socket.socket) -> None:
        for number, packet in enumerate(self._packets):
            if self._stop.is_set() or number == self._cut_after:
                return
            if number == self._silent_after:
                self._stop.wait()
                return
            client.sendall(b"$\0" + struct.pack(">H", len(packet)) + packet)


def _rtp(film: Path) -> list[bytes]:
    """The film as RTP packets, made by FFmpeg."""
    packets: list[bytes] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taker:
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        taker.bind(("127.0.0.1", 0))
        taker.settimeout(1)
        port = taker.getsockname()[1]
        with av.open(str(film)) as source, av.open(f"rtp://127.0.0.1:{port}", "w", format="rtp") as out:
            stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux_one(packet)
                taker.setblocking(False)
                with suppress(BlockingIOError):
                    while True:
                        packets.append(taker.recv(1 << 16))
    return [packet for packet in packets if packet[1] & 0x7F == 96]


@contextmanager
def rtsp(film: Path, **how: object) -> Iterator[RtspServer]:
    """A server for as long as the block runs."""
    server = RtspServer(film, **how)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()
