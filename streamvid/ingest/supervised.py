"""A live source that is watched over: connected to again and again, on one clock, with its gaps on record.

Knows how a source is lost and found again.  When pictures were is the business of ``wall``, how
a connection is read that of ``line``.
"""

from __future__ import annotations

import os
import random as chance
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fractions import Fraction
from functools import partial
from math import isfinite
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from streamvid.errors import SettingsError, SourceError, StreamvidError
from streamvid.frames import Frame
from streamvid.ingest.buffer import Ahead, Policy
from streamvid.ingest.devices import SECURE, STREAMS, UNCHECKED, Hopeless
from streamvid.ingest.files import label
from streamvid.ingest.line import Came, Connect, Line, ThreadLine
from streamvid.ingest.named import Kind, Named, find
from streamvid.ingest.ring import Logbook, RecordTo
from streamvid.ingest.sampling import Sampling, Seconds
from streamvid.ingest.source import open_source
from streamvid.ingest.still_life import Dull, StillLife
from streamvid.ingest.wall import TOLERANCE_SECONDS, Placed, Wall, steady

_SOON = 0.001
"""Seconds that nobody waits for; less than a clock may be able to tell."""

_DAMAGE_SECONDS = 60
"""Damage that goes on is said so often."""

KINDS = ("connected", "lost", "retry", "size", "clock", "damage", "frozen", "black", "record", "alive")
"""What a ``Notice`` may be about."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a source is waited for, and how often it is tried.

    Raises:
        SettingsError: if a value is out of range.
    """

    stall_seconds: float = 10.0
    """No picture for so long and the connection is given up and made anew, > 0; larger suits slow
    cameras and lines, smaller notices a hang earlier."""

    first_delay: float = 0.5
    """Seconds before the first new attempt, > 0; each later one waits twice as long.  Smaller loses
    less of a short break."""

    longest_delay: float = 60.0
    """Seconds between attempts at most, >= ``first_delay``; smaller finds a camera sooner and
    knocks at its door more often."""

    jitter: float = 0.25
    """Share of each delay, in [0, 1], that chance may take off; larger spreads many cameras better
    that were lost together."""

    give_up_after: float | None = None
    """Seconds without any picture after which the source fails for good, > 0; None: never."""

    insist: bool = False
    """Whether a wrong password, a missing stream or a bad address is tried again even before
    there was any picture; False fails at once."""

    def __post_init__(self) -> None:
        for name in ("stall_seconds", "first_delay"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise SettingsError(f"{name} must be above 0, got {getattr(self, name)}; it is in seconds")
        if not (isfinite(self.longest_delay) and self.longest_delay >= self.first_delay):
            raise SettingsError(
                f"longest_delay must be at least first_delay, got {self.longest_delay} and {self.first_delay}"
            )
        if not 0 <= self.jitter <= 1:
            raise SettingsError(f"jitter must be in [0, 1], got {self.jitter}; it is a share of the delay")
        if self.give_up_after is not None and not self.give_up_after > 0:
            raise SettingsError(
                f"give_up_after must be above 0, got {self.give_up_after}; to try for ever leave it out"
            )

    def delay(self, failed: int, draw: float) -> float:
        """Seconds to wait after so many failures in a row, >= 1; ``draw`` is chance, in [0, 1)."""
        # 2.0 ** 1024 does not exist; after 64 doublings any delay is the longest.
        return min(self.first_delay * 2.0 ** min(failed - 1, 64), self.longest_delay) * (1 - self.jitter * draw)


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch ``[start, stop)`` without any picture."""

    start: Fraction
    """In stream seconds."""

    stop: Fraction
    reason: str
    """Why, in one line without credentials."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a watcher should know."""

    at: Fraction
    """When, in stream seconds."""

    kind: str
    """One of ``KINDS``; "alive" says nothing but that the program runs and nothing came."""

    text: str
    """One line without credentials."""

    over: bool = False
    """Whether "frozen" or "black" ends here instead of beginning."""


class Supervised(Iterator[Frame | Gap | Notice]):
    """Frames of a live source for as long as anybody wants them; a context manager.

    The source is connected to, watched, left when no picture comes, and connected to again, for ever
    or as ``patience`` says.  Frames carry seconds since ``origin``, which rise over all connections.
    What lies between the last picture of a connection and the first of the next one is given as a
    ``Gap`` before that first picture::

        frames    0.4 0.5 0.6 |                           | 14.1 14.2 ...
        notices               | lost  retry  retry        | connected
        gap                   [0.7 ..................14.1)

    The wall clock is asked once, for ``origin``; from then on a clock counts that nobody sets and that, on
    Linux and macOS, goes on while the machine sleeps.  If the wall clock is set by more than 2 s later (by
    NTP, by hand, by a sleep that is not counted), the notice "clock" and ``clock_set_seconds`` say so, and
    the times on record go on as they were: they neither jump nor repeat.  A new run with the same ``origin``
    starts by the wall clock as it is then.

    While nothing comes, ``alive`` is said every ``tick`` seconds, so that the caller never waits long.

    Frames keep the size of the first one, or ``size``; a source that changes is scaled, with a notice.
    A file or ``lavfi:`` graph may stand in for a camera: it is read as fast as it is taken, its times
    are its own, and its end ends the iteration unless ``loop``.

    Args:
        source: what ``open_source`` takes.  ``$STREAMVID_USER`` and ``$STREAMVID_PASSWORD`` are used
            for network addresses that name no user.  The certificates of rtsps and rtmps servers are
            checked unless ``$STREAMVID_TLS_VERIFY`` is 0, which the notice "connected" then says.
        sampling: pictures a second, > 0; None takes all.
        patience: how long the source is waited for.
        origin: wall clock at second 0, with a time zone, to go on with the clock of an earlier run;
            None: now.
        size: (height, width) of frames; None: as the first connection has it.
        decoder: see ``open_source``; so are ``threads`` and ``hwaccel``.
        threads: see there.
        hwaccel: see there.
        dull: when pictures count as frozen or black.
        tick: seconds of silence before ``alive`` is said, > 0.
        ahead: how many pictures wait for the caller; None: 32, of which the oldest is dropped when
            there are more, and 32 that wait where the source is a file.
        loop: whether a file begins again at its end.
        live: whether pictures come in real time; None: cameras, streams and playlists without an end do.
        record: where its packets are written down as they come, without encoding anew; None: nowhere.
            ``origin`` is then by default that of the recording, which goes on.
        connect: opens a source, called as ``open_source`` is.
        line: makes and reads one connection.
        sleep: waits for seconds.
        now: a clock that is never set, in seconds.
        random: chance in [0, 1).
        today: the wall clock, with a time zone.

    Raises:
        SettingsError: if a setting makes no sense.
        SourceError: while iterating: if the first connection fails for a reason that time does not
            mend, after ``give_up_after``, or if a file cannot be read.
    """

    def __init__(
        self,
        source: Any,
        *,
        sampling: Seconds | None = None,
        patience: Patience | None = None,
        origin: datetime | None = None,
        size: tuple[int, int] | None = None,
        decoder: str = "auto",
        threads: int | None = None,
        hwaccel: str | None = None,
        dull: Dull | None = None,
        tick: float = 1.0,
        ahead: Ahead | None = None,
        loop: bool = False,
        live: bool | None = None,
        record: RecordTo | None = None,
        connect: Callable[..., Any] = open_source,
        line: Callable[[Connect, Ahead, Callable[[], float]], Line] = ThreadLine,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] | None = None,
        random: Callable[[], float] = chance.random,
        today: Callable[[], datetime] | None = None,
    ) -> None:
        if not (isfinite(tick) and tick > 0):
            raise SettingsError(f"tick must be above 0, got {tick}; 1 says once a second that nothing came")
        if origin is not None and origin.tzinfo is None:
            raise SettingsError(f"origin needs a time zone, got {origin}; use datetime.now().astimezone()")
        self._patience = patience if patience is not None else Patience()
        self._sampling = Sampling(fps=sampling)
        self._now = now if now is not None else steady
        self._sleep, self._random, self._tick = sleep, random, tick
        self._connect, self._make_line, self._loop, self._size = connect, line, loop, size
        self._how = {"decoder": decoder, "threads": threads, "hwaccel": hwaccel}
        self._login = Login.of(source, os.environ)
        self._source = source = self._login.address if self._login is not None else source
        self.name = label(source) if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "the source")
        """What to call it in messages; never holds credentials."""

        kind = _kind(self._source)
        self.live = live if live is not None else kind in (Kind.STREAM, Kind.CAMERA, Kind.HTTP, Kind.PLAYLIST)
        """Whether pictures come in real time; of an address of the web a guess until it has been opened."""

        # What lies at an address of the web is known when it has been opened.
        self._guessed = live is None and kind in (Kind.HTTP, Kind.PLAYLIST)
        self._ahead = ahead if ahead is not None else Ahead(32, policy=Policy.DROP_OLDEST if self.live else Policy.WAIT)
        self._today = today if today is not None else _today
        wall_now = self._today()
        self._log = Logbook(record, origin=origin, today=wall_now) if record is not None else None
        if self._log is not None:
            origin = self._log.origin
        self.origin = origin if origin is not None else wall_now
        """Wall clock at second 0 of the stream, with its time zone."""

        self._began = _fraction((wall_now - self.origin).total_seconds()) - _fraction(self._now())
        self._wall = Wall(received=self.live)
        if self.live:
            self._wall.end = self._here()
        self._still = StillLife(dull if dull is not None else Dull())
        self.clock_set_seconds = 0.0
        """How far the clock of this machine was set since the beginning, above 0 forward; ``wall`` does not follow."""

        self.connects = 0
        """Connections that gave a picture."""

        self.losses = 0
        """Connections that were lost after they had given one."""

        self.frames = 0
        """Frames given."""

        self.damaged = 0
        """Pictures that came damaged and are not given, and packets nothing could be made of, as far as can be told."""

        self._left_out = self._lost_before = self._lost_now = 0
        self._damage_said: float | None = None
        self._damage_told = 0
        self._said = self._wall.end
        self._gap: str | None = None
        self._why = ""
        self._last_picture = self._now()
        self._closed = self._other_size = False
        self._known: tuple[int, int] | None = None
        self._line: Line | None = None
        self._lines: list[Line] = []
        self._steps = self._run()

    @property
    def dropped(self) -> int:
        """Frames nobody took in time, and those left out because the source's clock fell or ran ahead."""
        return self._lost_before + self._lost_now + self._left_out

    @property
    def accuracy_seconds(self) -> float:
        """How far ``wall`` of a frame of the present connection may be from when it was taken, as far as can be told.

        A second for what nobody can see, the way through camera and network, and what the first
        picture of the connection was late by, compared with later ones.
        """
        return self._wall.accuracy_seconds

    @property
    def open_gap(self) -> Gap | None:
        """The gap that lasts now, up to now; None while connected."""
        if self._gap is None:
            return None
        return Gap(self._wall.end, max(self._here(), self._wall.end), self._gap)

    @property
    def frozen(self) -> bool:
        """Whether the picture stands still."""
        return self._still.frozen

    @property
    def black(self) -> bool:
        """Whether the picture is black."""
        return self._still.black

    def wall(self, seconds: Fraction) -> datetime:
        """The wall clock at a moment of the stream, to the microsecond."""
        return self.origin + timedelta(microseconds=round(seconds * 1_000_000))

    def describe(self, gap: Gap) -> str:
        """A gap in words: ``no video 14:02:10-14:05:31: connection refused``; with dates if it passes midnight."""
        start, stop = self.wall(gap.start), self.wall(gap.stop)
        form = "%H:%M:%S" if start.date() == stop.date() else "%Y-%m-%d %H:%M:%S"
        return f"no video {start:{form}}-{stop:{form}}: {gap.reason}"

    def close(self) -> None:
        """Leave the source; from any thread.  The iteration ends within a tick."""
        self._closed = True
        if (line := self._line) is not None:
            line.cut()
        if self._log is not None:
            self._log.close()

    def join(self, seconds: float) -> bool:
        """Whether everything that reads has ended, within so many seconds of a ``close``.

        A program that ends while a thread of its own still handles pictures may be ended by the system instead.
        """
        until = time.monotonic() + seconds
        return all([line.join(max(0.0, until - time.monotonic())) for line in self._lines])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Frame | Gap | Notice:
        if self._closed:
            raise StopIteration
        return next(self._steps)

    def _here(self) -> Fraction:
        """Now, in stream seconds."""
        return self._began + _fraction(self._now())

    def _machine(self) -> Iterator[Notice]:
        """What is to be said of the clock of this machine, which somebody may have set."""
        if not self.live:
            return
        ahead = _fraction((self._today() - self.origin).total_seconds()) - self._here()
        step = float(ahead) - self.clock_set_seconds
        if abs(step) > TOLERANCE_SECONDS:
            self.clock_set_seconds = float(ahead)
            way = "forward" if step > 0 else "back"
            yield self._notice(
                "clock",
                f"the clock of this machine was set {way} by {abs(step):.0f} s; times on record go on as they were",
            )

    def _notice(self, kind: str, text: str, at: Fraction | None = None, *, over: bool = False) -> Notice:
        """About a picture, or about now, which for a file is where it is; times of notices never fall."""
        if at is None:
            at = max(self._here(), self._wall.end) if self.live else self._wall.end
        self._said = max(self._said, at)
        return Notice(self._said, kind, text, over)

    def _open(self, how: Mapping[str, Any]) -> tuple[Any, Any]:
        source = self._connect(self._source, stall_seconds=self._patience.stall_seconds, ahead=self._ahead, **how)
        try:
            return source, source.frames(self._sampling, size=self._size)
        except BaseException:
            source.close()
            raise

    def _run(self) -> Generator[Frame | Gap | Notice, None, None]:
        failed = 0
        self._last_picture = self._now()
        while not self._closed:
            begun, connects = self._now(), self.connects
            how = self._how if self._log is None else {**self._how, "record": self._log.connection()}
            self._line = line = self._make_line(partial(self._open, how), self._ahead, self._now)
            self._lines = [*(other for other in self._lines if not other.join(0)), line]
            try:
                reason = yield from self._read(line)
            finally:
                line.cut()
                self._lost_before, self._lost_now = self.dropped - self._left_out, 0
            if reason is None or self._closed:
                if self._closed or not self._loop:
                    return
                continue
            delivered = self.connects > connects
            self._gap = self._gap if self._gap is not None and not delivered else None
            self._gap = reason if self._gap is None else _both(self._gap, reason)
            if delivered:
                self.losses += 1
                yield self._notice("lost", f"{self.name} is lost: {reason}")
            # A camera that comes and goes at once is not knocked at ever faster.
            steady = delivered and self._now() - begun > self._patience.delay(max(failed, 1), 0)
            failed = 1 if steady else failed + 1
            delay = self._patience.delay(failed, self._random())
            yield self._notice("retry", f"{self.name}: {reason}; trying again in {delay:.2g} s")
            yield from self._rest(delay, reason)

    def _rest(self, seconds: float, reason: str) -> Iterator[Notice]:
        until = self._now() + seconds
        while not self._closed and (left := until - self._now()) > _SOON:
            self._check_patience(reason)
            self._sleep(min(left, self._tick))
            yield from self._machine()
            if until - self._now() > _SOON:
                yield self._notice("alive", f"{self.name} is away: {reason}")
        self._check_patience(reason)

    def _check_patience(self, reason: str) -> None:
        limit = self._patience.give_up_after
        if limit is not None and self._now() - self._last_picture >= limit:
            raise SourceError(
                f"{self.name} gave no picture for {limit:g} s and is given up: {reason}; "
                "check the camera and the network (a longer wait: --give-up-after)"
            )

    def _read(self, line: Line) -> Generator[Frame | Gap | Notice, None, str | None]:
        """What one connection gives; returns why it was lost, None at the end of a file or when closed."""
        came: Came | None = None
        heard = self._now()
        self._wall.connected()
        while not self._closed:
            yield from self._machine()
            waited = self._patience.stall_seconds - (self._now() - heard)
            if waited <= _SOON:
                return f"no picture for {self._patience.stall_seconds:g} s"
            try:
                before, came = came, line.take(min(self._tick, waited))
            except TimeoutError:
                # An answer may take its time: what was asked before is no reason to give up.
                self._check_patience("no picture")
                yield self._notice("alive", f"{self.name} is silent")
                continue
            except StopIteration:
                return None if self._closed or not self.live else "the connection ended"
            except StreamvidError as reason:
                if self._closed:
                    return None
                if not self._mends(reason):
                    raise SourceError(self._clean(str(reason))) from None
                return self._clean(short(str(reason), self.name))
            heard = self._last_picture = self._now()
            self._lost_now = came.lost
            yield from self._give(came, before)
        return None

    def _mends(self, reason: StreamvidError) -> bool:
        """Whether trying again may help."""
        if not (self.live and isinstance(reason, SourceError)):
            return False
        return self.connects > 0 or self._patience.insist or not (self._guessed or isinstance(reason, Hopeless))

    def _give(self, came: Came, before: Came | None) -> Iterator[Frame | Gap | Notice]:
        """A picture, and what is to be said before it."""
        if self._guessed:
            self._guessed, self.live = False, came.info.live
            if not self.live:
                self._wall = Wall(received=False)
        frame, end, waited = came.frame, self._wall.end, self._wall.waits
        placed = self._wall.place(frame.pts, frame.duration, self._began + _fraction(came.received))
        if self._wall.waits and not waited:
            yield self._notice("clock", f"the clock of {self.name} runs ahead; pictures are left out until it is time")
        if placed is None:
            self._left_out += 1
            return
        if before is None:
            yield from self._connected(came, placed, end)
        elif placed.leap is not None or waited:
            yield self._notice(
                "clock", f"the clock of {self.name} jumped{_by(placed.leap)}; times go on as they were", placed.pts
            )
            if placed.pts > end:
                yield Gap(end, placed.pts, "the source's clock jumped")
        if before is not None and came.jumps > before.jumps:
            yield self._notice("clock", f"the clock of {self.name} jumped; times go on as they were", placed.pts)
        self.damaged += came.damaged - (before.damaged if before is not None else 0)
        if said := self._damage():
            yield self._notice("damage", said, placed.pts)
        if (came.rescaled > 0) if before is None else (came.rescaled > before.rescaled) != self._other_size:
            self._other_size = not self._other_size
            yield self._notice(
                "size", f"{self.name} changed the size of its pictures; all are scaled to one", placed.pts
            )
        if self._log is not None:
            self._log.placed(frame.pts, placed.pts, self._why)
            yield from self._recorded()
        self.frames += 1
        given = replace(frame, pts=placed.pts)
        yield given
        for change in self._still.look(frame.pixels, placed.pts):
            since = f"since {self.wall(change.since):%H:%M:%S}"
            said = _SAID[change.kind, change.over]
            yield self._notice(change.kind, f"{self.name}: {said} {since}", placed.pts, over=change.over)

    def _connected(self, came: Came, placed: Placed, end: Fraction) -> Iterator[Gap | Notice]:
        self.connects += 1
        self._other_size = False
        info = came.info
        told = "; ".join((f"{self.name}: {info.codec} {info.width}x{info.height}", *info.notes))
        yield self._notice("connected", told, placed.pts)
        known, self._known = self._known, (info.height, info.width)
        if self._size is None:
            self._size = came.frame.pixels.shape[0], came.frame.pixels.shape[1]
        if known is not None and known != self._known:
            yield self._notice(
                "size",
                f"{self.name} gives {info.width}x{info.height} instead of {known[1]}x{known[0]}; "
                f"scaled to {self._size[1]}x{self._size[0]}",
                placed.pts,
            )
        if self._gap is not None and placed.pts > end:
            yield Gap(end, placed.pts, self._gap)
        self._why, self._gap = self._gap or "", None

    def _recorded(self) -> Iterator[Notice]:
        """Whether it can still be written down, where that has changed."""
        change = self._log.look(self._now()) if self._log is not None else None
        if change is not None:
            yield self._notice("record", f"{self.name}: {change}")

    def _damage(self) -> str | None:
        """What is to be said of it, if it is time."""
        count, now = self.damaged - self._damage_told, self._now()
        if not count or (self._damage_said is not None and now - self._damage_said < _DAMAGE_SECONDS):
            return None
        self._damage_said, self._damage_told = now, self.damaged
        return (
            f"{self.name}: damaged pictures left out: {count}; those up to the next key frame may be smeared; "
            "the network loses packets (TCP loses none: no ?udp in the address)"
        )

    def _clean(self, text: str) -> str:
        return self._login.hide(text) if self._login is not None else text


_SAID = {
    ("frozen", False): "the picture stands still",
    ("frozen", True): "the picture moves again; it stood still",
    ("black", False): "the picture is black",
    ("black", True): "the picture is no longer black; it was",
}


@dataclass(frozen=True, slots=True)
class Login:
    """An address with its user and password, and what of it must never be said."""

    address: str
    secrets: tuple[str, ...]

    @classmethod
    def of(cls, source: Any, environ: Mapping[str, str]) -> Login | None:
        """The address with what the environment adds; None if the source is no address of the network.

        Raises:
            SettingsError: if the environment names a password and no user.
        """
        if not isinstance(source, str) or source.partition("://")[0].lower() not in (*STREAMS, "http", "https"):
            return None
        try:
            parts = urlsplit(source)
        except ValueError:
            return None
        if parts.scheme.lower() in SECURE and not _checks(environ):
            parts = parts._replace(query="&".join(filter(None, (parts.query, UNCHECKED))))
            source = urlunsplit(parts)
        user, password = environ.get("STREAMVID_USER", ""), environ.get("STREAMVID_PASSWORD", "")
        info, at, host = parts.netloc.rpartition("@")
        if password and not user:
            raise SettingsError(
                "STREAMVID_PASSWORD is set and STREAMVID_USER is not; set both, or write the user in the address"
            )
        if not at and user:
            info = f"{quote(user, safe='')}:{quote(password, safe='')}"
            source = urlunsplit(parts._replace(netloc=f"{info}@{host}"))
        name, _, secret = info.partition(":")
        asked = [part for part in parts.query.split("&") if part not in ("udp", "tcp", UNCHECKED)]
        found = {info, secret, unquote(secret), *asked, "&".join(asked)}
        found |= {name, unquote(name)} if not secret else set()
        return cls(source, tuple(sorted((text for text in found if text), key=len, reverse=True)))

    def __repr__(self) -> str:
        return "Login(...)"

    def hide(self, text: str) -> str:
        """The text without anything secret."""
        for secret in self.secrets:
            text = text.replace(secret, "...")
        return text


def _checks(environ: Mapping[str, str]) -> bool:
    """Whether the environment leaves certificates to be checked."""
    said = environ.get("STREAMVID_TLS_VERIFY", "1")
    if said not in ("", "0", "1"):
        raise SettingsError(f"STREAMVID_TLS_VERIFY must be 0 or 1, got {said!r}; 0 trusts every certificate")
    return said != "0"


def short(message: str, name: str) -> str:
    """Why, without the name of the source before it and the advice behind it."""
    return message.removeprefix(name).strip().partition("; ")[0]


def _both(first: str, last: str) -> str:
    """Why it was lost and why it stays away; the reasons between are in the notices."""
    return first if last == first.partition(", then ")[0] else f"{first.partition(', then ')[0]}, then {last}"


def _by(leap: Fraction | None) -> str:
    return "" if leap is None else f" by {abs(float(leap)):.3g} s"


def _kind(source: Any) -> Kind | None:
    """What sort of thing was named; None for arrays."""
    if isinstance(source, (str, os.PathLike)):
        source = find(source)
    return source.kind if isinstance(source, Named) else None


def _fraction(seconds: float) -> Fraction:
    """Clock readings are good to the microsecond."""
    return Fraction(round(seconds * 1_000_000), 1_000_000)


def _today() -> datetime:
    return datetime.now().astimezone()
