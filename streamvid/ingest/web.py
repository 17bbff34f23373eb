"""Connections to web servers: redirects, logins, patience, and no way into a private network.

Knows HTTP and nothing of files or video.
"""

from __future__ import annotations

import base64
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import httpx2

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest.files import label
from streamvid.ingest.pulse import PULSE

_REDIRECTS = 10
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 10.0


class Web:
    """Connections to servers, kept open between requests, through the proxies that the environment names.

    There are no cookies, and a login goes to the server (scheme, name, port) it was given for.
    Servers inside a private network or this machine are spoken to only if the first one is such
    a server: an address from outside cannot make this program ask for things inside.  What counts
    is where a connection leads, not its name.

    Args:
        stall_seconds: no byte for so long is an error; > 0.  Larger waits longer.
        attempts: how often in a row something may fail that may work the next time; >= 1.
        private: whether private networks are allowed; None decides by the first server.

    Raises:
        SettingsError: for settings out of range.
    """

    def __init__(self, *, stall_seconds: float = 30.0, attempts: int = 4, private: bool | None = None) -> None:
        if not stall_seconds > 0:
            raise SettingsError(f"stall_seconds must be above 0, got {stall_seconds}; 30 suits most lines")
        if attempts < 1:
            raise SettingsError(f"attempts must be 1 or more, got {attempts}; 4 suits most servers")
        self.stall_seconds = stall_seconds
        self.attempts = attempts
        self.private = private
        self.requests = 0
        self.bytes_received = 0
        self._logins: dict[tuple[str, str, int | None], str] = {}
        self._transports: dict[str | None, httpx2.HTTPTransport] = {}
        try:
            self._agent = f"streamvid/{version('streamvid')}"
        except PackageNotFoundError:
            self._agent = "streamvid"

    def trust(self, address: str) -> None:
        """Use the ``user:password@`` of an address that the user gave, for its server."""
        url = _url(address)
        if url.userinfo:
            pair = base64.b64encode(unquote_to_bytes(url.userinfo)).decode("ascii")
            self._logins[_server(url)] = f"Basic {pair}"

    def get(self, address: str, headers: Mapping[str, str]) -> tuple[httpx2.Response, str]:
        """The answer, its body unread, and the address it came from after redirects.

        Raises:
            SourceError: if no answer came; an answer may still be a refusal.
        """
        failed, reason, wish = 0, "", ""
        while failed < self.attempts:
            self.pause(failed, wish)
            try:
                response, final = self._follow(address, headers)
            except BrokenConnection:
                reason = "breaks the connection"
            else:
                if response.status_code not in _BUSY:
                    return response, final
                response.close()
                reason = f"answers {response.status_code} ({response.reason_phrase or 'busy'})"
                wish = response.headers.get("retry-after", "")
            failed += 1
        raise SourceError(f"{label(address)} {reason}, {failed} times in a row; try again later")

    def pause(self, failed: int, wish: str = "") -> None:
        """Wait after failures in a row, longer after each, or as long as the server wants within reason."""
        seconds = _PAUSE_SECONDS * 2 ** (failed - 1) if failed else 0.0
        time.sleep(min(_LONGEST_PAUSE_SECONDS, max(seconds, float(wish) if wish.isdecimal() else 0.0)))

    def chunks(self, response: httpx2.Response, where: str) -> Generator[bytes]:
        """The body as it comes; closing the generator lets the connection go."""
        length = response.headers.get("content-length", "")
        left = int(length) if length.isdecimal() else -1
        raw = response.iter_raw()
        try:
            for chunk in raw:
                self.bytes_received += len(chunk)
                PULSE.beat()
                left -= len(chunk)
                if left == 0:
                    next(raw, None)  # it is known to be over: the connection is free for the next request
                yield chunk
        except httpx2.TimeoutException:
            raise SourceError(_stalled(where, self.stall_seconds)) from None
        except httpx2.TransportError as reason:
            raise BrokenConnection(cut=isinstance(reason, httpx2.RemoteProtocolError)) from None
        finally:
            response.close()

    def close(self) -> None:
        """Close all connections; a later request opens new ones."""
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    def _follow(self, address: str, headers: Mapping[str, str]) -> tuple[httpx2.Response, str]:
        where = label(address)
        for _ in range(_REDIRECTS + 1):
            response = self._send(address, headers, where)
            target = response.headers.get("location")
            if response.status_code not in (301, 302, 303, 307, 308) or target is None:
                return response, address
            response.close()
            address = urljoin(address, target)
            if urlsplit(address).scheme not in ("http", "https"):
                raise SourceError(f"{where} redirects to something other than http or https, which is not followed")
        raise SourceError(f"{where} redirects more than {_REDIRECTS} times; give the address where the video really is")

    def _send(self, address: str, headers: Mapping[str, str], where: str) -> httpx2.Response:
        url = _url(address)
        proxy = _proxy(url)
        wait = dict.fromkeys(("connect", "read", "write", "pool"), self.stall_seconds)
        extensions: dict[str, Any] = {"timeout": wait}
        if proxy is None:
            extensions["trace"] = self._watch(where)
        else:
            self._admit(_addresses(url.host), where)
        login = self._logins.get(_server(url))
        own = {"User-Agent": self._agent, "Accept": "*/*", "Accept-Encoding": "identity"}
        own |= {"Authorization": login} if login else {}
        request = httpx2.Request("GET", url, headers={**own, **headers}, extensions=extensions)
        self.requests += 1
        try:
            if proxy not in self._transports:
                self._transports[proxy] = httpx2.HTTPTransport(proxy=proxy, verify=_trusted())
            response = self._transports[proxy].handle_request(request)
        except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
            raise BrokenConnection(cut=False) from None
        except (httpx2.TransportError, ImportError, ValueError) as reason:
            raise SourceError(_unreachable(reason, where, self.stall_seconds, proxy)) from None
        response.request = request
        return response

    def _watch(self, where: str) -> Callable[[str, dict[str, Any]], None]:
        """Called while a connection is made: sees where it leads before anything is sent."""

        def watch(event: str, info: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                stream = info["return_value"]
                try:
                    self._admit([stream.get_extra_info("server_addr")[0]], where)
                except SourceError:
                    stream.close()
                    raise

        return watch

    def _admit(self, addresses: list[str], where: str) -> None:
        inside = [address for address in addresses if _is_private(address)]
        if self.private is None:
            self.private = bool(inside)
        if inside and not self.private:
            raise SourceError(
                f"{where} leads into a private network ({inside[0]}) from outside, which is refused; "
                "give the inner address itself if that is meant"
            )


class BrokenConnection(Exception):
    """A connection ended before the body did; ``cut`` if the other side ended it in good order."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__(cut)
        self.cut = cut


def _url(address: str) -> httpx2.URL:
    try:
        url = httpx2.URL(address)
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host or "%" in url.host:
        raise SourceError(f"{label(address)} is no http or https address; check how it is written")
    return url


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates of this machine, which take 50 ms to read."""
    return httpx2.create_ssl_context()


def _server(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _proxy(url: httpx2.URL) -> str | None:
    """The proxy that the environment names for an address."""
    if urllib.request.proxy_bypass(f"{url.host}:{url.port}" if url.port else url.host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _addresses(host: str) -> list[str]:
    """Where a name leads, as far as this machine can tell: behind a proxy it may not know."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
    except OSError:
        return []


def _is_private(address: str) -> bool:
    """Whether an address is not one of the public internet."""
    place = ipaddress.ip_address(address)
    if isinstance(place, ipaddress.IPv6Address) and place.ipv4_mapped is not None:
        place = place.ipv4_mapped
    return not place.is_global


def _stalled(where: str, seconds: float) -> str:
    return f"{where} sent nothing for {seconds:g} s; check the connection, or raise stall_seconds"


def _unreachable(reason: BaseException, where: str, seconds: float, proxy: str | None) -> str:
    """One line for a server that cannot be spoken to."""
    if isinstance(reason, httpx2.TimeoutException):
        return _stalled(where, seconds)
    chain = [reason]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    through = f" through the proxy {label(proxy)}" if proxy is not None else ""
    if any(isinstance(link, ssl.SSLError) for link in chain):
        return f"{where} has no TLS connection that can be trusted{through}; check the address and this machine's clock"
    if any(isinstance(link, socket.gaierror) for link in chain):
        return f"{where} names a server that is not known{through}; check its spelling and the network"
    if any(isinstance(link, ConnectionRefusedError) for link in chain):
        return f"{where} refuses connections{through}; check that the server runs and the port is right"
    return f"{where} cannot be reached{through}; check the address and the network"
