"""Sources that are no files: test pictures, cameras of this machine, live streams of the network."""

from __future__ import annotations

import glob
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from urllib.parse import urlsplit

import av
from av.container import InputContainer

from streamvid.errors import SourceError
from streamvid.ingest.files import redact
from streamvid.ingest.openers import Opener

STREAMS: Mapping[str, str] = {
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsps,rtsp,rtp,srtp,udp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,rtmp,tls,tcp",
    "srt": "srt",
    "udp": "udp",
    "rtp": "rtp,udp",
    "tcp": "tcp",
}
"""Addresses of live streams, and the protocols each may use; none can read a file."""

SECURE = ("rtsps", "rtmps")
"""Those of them whose servers show a certificate."""

UNCHECKED = "tls_verify=0"
"""Behind such an address: whoever answers is trusted."""

_PORTS = {"rtsps": 322, "rtmps": 443}
_HOPELESS = (
    av.error.HTTPUnauthorizedError,
    av.error.HTTPForbiddenError,
    av.error.HTTPNotFoundError,
    av.error.ProtocolNotFoundError,
    av.error.FileNotFoundError,
    FileNotFoundError,
)
_READS_FILES = re.compile(r"(^|[;,\]\s=])a?movie\s*(=|$|,|;)")


class Hopeless(SourceError):
    """What failed will fail again: a wrong password, no such stream, an address that nobody knows."""


@dataclass(frozen=True)
class DeviceOpener(Opener):
    """Something FFmpeg opens by a format and options rather than as a file."""

    address: str = field(repr=False)
    """What FFmpeg is given; may hold credentials."""

    name: str
    where: str
    format: str | None
    options: Mapping[str, str]
    stall_seconds: float
    hint: str
    live: bool = True
    hwaccel: str | None = None
    slack: Fraction | None = Fraction(0)
    notes: tuple[str, ...] = ()

    def open(self) -> InputContainer:
        """The running stream."""
        try:
            return av.open(
                self.address,
                format=self.format,
                container_options=dict(self.options),
                timeout=self.stall_seconds,
                metadata_errors="replace",
            )
        except (av.error.FFmpegError, ValueError, OSError) as reason:
            if isinstance(reason, av.error.OSError) and _unknown_host(self.address):
                raise Hopeless(
                    f"{self.name} names a server that is not known; check its spelling and the network"
                ) from None
            if self.options.get("tls_verify") == "1" and (wrong := _distrusted(self.address, self.stall_seconds)):
                raise Hopeless(
                    f"{self.name} shows a certificate that is not trusted ({wrong}); name its "
                    f"issuer's in SSL_CERT_FILE, or trust anybody: {UNCHECKED} behind the address, "
                    "or STREAMVID_TLS_VERIFY=0"
                ) from None
            kind = Hopeless if isinstance(reason, _HOPELESS) else SourceError
            raise kind(f"{self.name} {_why(reason)}; {self.hint}") from None


def lavfi(address: str, *, stall_seconds: float) -> DeviceOpener:
    """``lavfi:GRAPH``: pictures made by FFmpeg's filters, such as ``lavfi:testsrc=duration=5:rate=10``.

    A graph that names no duration never ends and is read as a live source is.
    """
    graph = address.partition(":")[2].strip()
    if not graph:
        raise SourceError("lavfi: needs a filter graph, such as lavfi:testsrc=duration=5:rate=10")
    if _READS_FILES.search(graph):
        raise SourceError(f"{address} reads a file through a filter; give the file itself")
    ends = re.search(r"(?<![A-Za-z_])(d|duration|nb_frames|end_frame|end)\s*=", graph) is not None
    return DeviceOpener(
        graph, address, address, "lavfi", {}, stall_seconds,
        "it is no filter graph that makes pictures; try lavfi:testsrc=duration=5:rate=10", not ends, slack=None,
    )  # fmt: skip


def camera(address: str, *, stall_seconds: float) -> DeviceOpener:
    """``camera:N``, ``camera:/dev/video2`` or ``camera:NAME``, with ``?size=1280x720&fps=30`` behind it.

    Video4Linux on Linux, AVFoundation on macOS, DirectShow on Windows.
    """
    device, _, query = address.partition(":")[2].partition("?")
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in ("size", "fps", "format") or not value:
            raise SourceError(f"{address}: a camera takes size=WxH, fps=N and format=F, not {part!r}")
        options[{"size": "video_size", "fps": "framerate", "format": "input_format"}[key]] = value
    device = device or "0"
    hint = "check that it is plugged in, not in use and that you may use it"
    if sys.platform == "darwin":
        return DeviceOpener(f"{device}:none", address, address, "avfoundation", options, stall_seconds, hint)
    if sys.platform == "win32":
        options.pop("input_format", None)
        hint += "; DirectShow wants its name: camera:Integrated Webcam"
        return DeviceOpener(f"video={device}", address, address, "dshow", options, stall_seconds, hint)
    path = f"/dev/video{device}" if device.isdigit() else device
    if not path.startswith("/dev/"):
        raise SourceError(f"{address}: a camera is a number or a device, as in camera:0 or camera:/dev/video2")
    if not os.path.exists(path):
        found = sorted(glob.glob("/dev/video*"))
        hint = (
            "this machine shows no camera; plug one in, or hand it to the container (docker run --device /dev/video0)"
        )
        if found:
            hint = f"this machine has {', '.join(found)}"
    return DeviceOpener(path, address, address, "v4l2", options, stall_seconds, hint)


def stream(address: str, *, stall_seconds: float) -> DeviceOpener:
    """rtsp, rtmp, srt, udp and their kin.

    ``?udp`` behind an rtsp address takes pictures by UDP, which loses some where TCP waits.
    ``?tls_verify=0`` behind an rtsps or rtmps address does not look at who answers.
    """
    scheme = address.partition("://")[0].lower()
    options = {"protocol_whitelist": STREAMS[scheme]}
    shown = redact(address)
    notes: tuple[str, ...] = ()
    if scheme in SECURE:
        place, _, query = address.partition("?")
        asked = query.split("&")
        if UNCHECKED in asked:
            notes = ("the certificate is not checked: anybody may stand in for the camera",)
            query = "&".join(part for part in asked if part != UNCHECKED)
            address = f"{place}?{query}" if query else place
        # FFmpeg checks nothing unless it is told to.
        options |= {"tls_verify": "0" if notes else "1", **_trusted()}
    if scheme.startswith("rtsp"):
        options["rtsp_transport"] = "udp" if _asks_for_udp(address) else "tcp"
        # Twenty pictures would be read first, only to guess at a rate that nobody needs.
        options["fpsprobesize"] = "0"
    return DeviceOpener(
        address, shown, shown, None, options, stall_seconds,
        "check the address, user name and password, and that the camera can be reached", notes=notes,
    )  # fmt: skip


def _asks_for_udp(address: str) -> bool:
    """Whether ``?udp`` or ``&udp`` stands in the address, as FFmpeg has it."""
    return "udp" in address.partition("?")[2].split("&")


def _trusted() -> dict[str, str]:
    """The certificates that this machine trusts, or those of ``$SSL_CERT_FILE``."""
    import ssl  # only who needs it waits for it

    file = ssl.get_default_verify_paths().cafile
    return {"ca_file": file} if file is not None else {}


def _distrusted(address: str, seconds: float) -> str | None:
    """Why the certificate at an address is not trusted; None if it is, or if that is not what is wrong."""
    import ssl

    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    try:
        with socket.create_connection((host, port), timeout=seconds) as line:
            ssl.create_default_context().wrap_socket(line, server_hostname=host).close()
    except ssl.SSLCertVerificationError as reason:
        return reason.verify_message.rstrip(".")
    except OSError:
        pass
    return None


def _unknown_host(address: str) -> bool:
    """Whether the name of the server cannot be resolved; FFmpeg calls this an input/output error."""
    try:
        host = urlsplit(address).hostname
        if host and "://" in address:
            socket.getaddrinfo(host, None)
    except socket.gaierror as reason:
        return reason.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
    except (ValueError, OSError):
        pass
    return False


def _why(reason: Exception) -> str:
    """What FFmpeg's error means; its own text may repeat the address with the password in it."""
    if isinstance(reason, av.error.ProtocolNotFoundError):
        return "uses a protocol that this build of FFmpeg does not have"
    if isinstance(reason, av.error.HTTPUnauthorizedError):
        return "wants another user name or password (401)"
    if isinstance(reason, av.error.HTTPForbiddenError):
        return "does not let this user in (403)"
    if isinstance(reason, av.error.HTTPNotFoundError):
        return "has no such stream (404)"
    if isinstance(reason, (av.error.ExitError, av.error.TimeoutError)) or "timed out" in str(reason).lower():
        return "did not answer in time"
    if isinstance(reason, av.error.ConnectionRefusedError):
        return "refused the connection"
    if isinstance(reason, (av.error.FileNotFoundError, FileNotFoundError)):
        return "is not there"
    if isinstance(reason, av.error.PermissionError):
        return "may not be used"
    return "cannot be opened"
