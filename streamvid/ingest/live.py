"""Sources that come once and do not wait: cameras, streams, test pictures without an end."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from streamvid.errors import SourceError
from streamvid.ingest.convert import look_of
from streamvid.ingest.describe import colour_of, streams_of
from streamvid.ingest.film import Film, choose_stream, step_of
from streamvid.ingest.openers import Opener, hardware_notes
from streamvid.ingest.pictures import Picture, Pictures
from streamvid.ingest.pyav import PyavPicture, PyavPictures
from streamvid.ingest.reader import Reader, SourceInfo
from streamvid.ingest.recorder import Recorder
from streamvid.ingest.ring import RecordTo
from streamvid.ingest.sampling import Plan, Sampling


class LiveReader(Reader):
    """A source without an end: one connection, one pass, times counted from its first picture.

    Args:
        opener: what to connect to.
        record: where its packets are written down as they come; None: nowhere.

    Raises:
        SourceError: if it cannot be opened or sends no picture.
        UnsupportedError: if its packets cannot be recorded.
    """

    def __init__(self, opener: Opener, record: RecordTo | None = None) -> None:
        self._taken = False
        container = opener.open()
        recorder: Recorder | None = None
        try:
            stream = choose_stream(container, opener.name)
            film = Film(opener, stream.index, step_of(stream), False, stream.time_base or Fraction(0))
            if record is not None:
                recorder = Recorder(record, stream, step=film.step, name=opener.name, timeless=opener.timeless)
                film.tap = recorder.take
            pictures = PyavPictures(film, container=container)
            first = next(pictures, None)
            if first is None:
                raise SourceError(f"{opener.name} ended before it sent a picture; check the source")
            frame, codec = first.frame, stream.codec_context.codec.canonical_name
            film.look, seen = look_of(frame, stream.sample_aspect_ratio)
            height, width = film.look.shown
            self.info = SourceInfo(
                path=opener.where,
                name=opener.name,
                container=container.format.name,
                codec=codec,
                width=width,
                height=height,
                duration=None,
                start=Fraction(0),
                time_base=film.time_base,
                average_rate=stream.average_rate,
                rotation=film.look.upright.degrees,
                decoder="pyav",
                live=opener.live,
                streams=streams_of(container, stream),
                colour=colour_of(frame),
                notes=(*opener.notes, *seen, *hardware_notes(opener, stream)),
            )
            self._pass = OnePass(pictures, first, recorder)
        except BaseException:
            container.close()
            if recorder is not None:
                recorder.close()
            raise

    def pictures(self, *, keys_only: bool = False) -> Pictures:
        """The one pass, from the first picture."""
        if self._taken:
            raise SourceError(f"{self.info.name} is live and was read already; open it again")
        if keys_only:
            raise SourceError(f"{self.info.name} is live: its key frames cannot be read alone; sample by rate")
        self._taken = True
        return self._pass

    def close(self) -> None:
        """Leave the source."""
        self._pass.close()

    def state(self) -> bytes | None:
        """None: what comes once cannot be read elsewhere."""
        return None

    @property
    def end(self) -> Fraction:
        """Raises SourceError: there is none."""
        raise SourceError(
            f"{self.info.name} is live and has no end; say how long to watch, as in --to 30, "
            "and at what rate instead of how many frames"
        )

    def plan(self, sampling: Sampling) -> Plan:
        """The sampling as it stands; an end has to be named where one is needed."""
        if sampling.count is not None or (sampling.max_frames is not None and sampling.fps is None):
            return super().plan(sampling)
        if sampling.stop is None:
            plan = super().plan(replace(sampling, max_frames=None))
            return replace(plan, max_frames=sampling.max_frames)
        return super().plan(sampling)


class OnePass(Pictures):
    """A pass whose first picture was taken already, its times moved so that it appears at 0."""

    def __init__(self, pictures: PyavPictures, first: PyavPicture, recorder: Recorder | None = None) -> None:
        self._pictures, self._recorder = pictures, recorder
        self._first: PyavPicture | None = first
        self._origin = first.pts
        self.stats = pictures.stats

    def __next__(self) -> Picture:
        picture, self._first = self._first, None
        if picture is None:
            picture = next(self._pictures)
        picture.pts -= self._origin
        if self._recorder is not None:
            self._recorder.shown(picture.frame.pts, picture.pts)
        return picture

    def close(self) -> None:
        """Leave the source."""
        self._pictures.close()
        if self._recorder is not None:
            self._recorder.close()
