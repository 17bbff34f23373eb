"""An RTSP server by GStreamer, run by the system's own Python: ``python3 gst_server.py FILM [options]``.

Serves H.264 or HEVC in a loop, in real time, as ``/live``.  ``FILM`` holds raw packets and ``FILM.json``
the length, pts and dts of each and the length of the loop, in milliseconds.  It prints ``ready
PORT`` when it takes clients and ends when its standard input ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gio, GLib, Gst, GstRtspServer  # noqa: E402


class Film:
    """Packets that come again and again, their times rising."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as data, open(f"{path}.json") as told:
            index = json.load(told)
            self.packets = [(data.read(length), pts, dts) for length, pts, dts in index["packets"]]
        self.length = index["length"]

    def play(self, source: Gst.Element) -> None:
        """Give them to a source as it asks."""
        given = 0

        def more(*_: object) -> None:
            nonlocal given
            turn, place = divmod(given, len(self.packets))
            data, pts, dts = self.packets[place]
            buffer = Gst.Buffer.new_wrapped(data)
            buffer.pts = (pts + turn * self.length) * Gst.MSECOND
            buffer.dts = (dts + turn * self.length) * Gst.MSECOND
            given += 1
            source.emit("push-buffer", buffer)

        source.connect("need-data", more)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("film")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", default="0")
    parser.add_argument("--user", default="", help="name:password that is asked for")
    parser.add_argument("--basic", action="store_true", help="ask for it in plain text instead of a digest")
    parser.add_argument("--codec", default="h264", choices=["h264", "h265"])
    parser.add_argument("--certificate", default="", help="file with a key and a certificate; clients come by rtsps")
    told = parser.parse_args()
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address(told.address)
    server.set_service(told.port)
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_shared(True)
    factory.set_launch(
        f"( appsrc name=film format=time max-bytes=1 caps=video/x-{told.codec},stream-format=byte-stream,alignment=au"
        f" ! {told.codec}parse ! rtp{told.codec}pay name=pay0 pt=96 config-interval=-1 )"
    )
    film = Film(told.film)
    factory.connect("media-configure", lambda _, media: film.play(media.get_element().get_by_name("film")))
    guard = GstRtspServer.RTSPAuth()
    if told.certificate:
        guard.set_tls_certificate(Gio.TlsCertificate.new_from_file(told.certificate))
    if told.user or told.certificate:
        name, _, password = (told.user or "all:").partition(":")
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", name)
        if not told.user:
            guard.set_default_token(token)
        elif told.basic:
            guard.set_supported_methods(1)
            guard.add_basic(GstRtspServer.RTSPAuth.make_basic(name, password), token)
        else:
            guard.set_supported_methods(2)
            guard.add_digest(name, password, token)
        server.set_auth(guard)
        permissions = GstRtspServer.RTSPPermissions()
        permissions.add_permission_for_role(name, "media.factory.access", True)
        permissions.add_permission_for_role(name, "media.factory.construct", True)
        factory.set_permissions(permissions)
    server.get_mount_points().add_factory("/live", factory)
    if not server.attach(None):
        sys.exit(f"port {told.port} cannot be used")
    loop = GLib.MainLoop()
    threading.Thread(target=lambda: (sys.stdin.read(), loop.quit()), daemon=True).start()
    print("ready", server.get_bound_port(), flush=True)
    loop.run()


if __name__ == "__main__":
    main()
