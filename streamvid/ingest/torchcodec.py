"""Pictures that an optional decoder draws by their number, while times come from the container; and torchcodec.

The container's packets say when each picture is shown (``choice.Shown``).  A library is asked for
the n-th one and nothing else, when somebody wants to see it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from streamvid.errors import MissingExtra, SettingsError, SourceError
from streamvid.ingest.choice import Facts, Shown
from streamvid.ingest.convert import Converter, Look
from streamvid.ingest.pictures import DecodeStats, Picture, Pictures
from streamvid.ingest.pulse import PULSE
from streamvid.ingest.reader import Reader, SourceInfo


class Library(ABC):
    """One file opened by an optional decoder; pictures come by number, counted as they are shown.

    Args:
        facts: what PyAV has found out about the file.
        threads: threads to decode with; 0 lets FFmpeg decide.

    Raises:
        SourceError: if it cannot open the file, or sees other pictures in it than the container shows.
    """

    decoder: ClassVar[str]

    def __init__(self, facts: Facts, threads: int) -> None:
        self._facts = facts
        try:
            self._open(threads)
            seen = self._count()
        except Exception as reason:  # whatever the library throws, the file is not for it
            raise SourceError(
                f"{facts.name}: {self.decoder} cannot open it ({gist(reason)}); read it with --decoder pyav"
            ) from reason
        if seen != len(facts.shown):
            raise self._disagrees(f"sees {seen} pictures where the container shows {len(facts.shown)}")

    @classmethod
    @abstractmethod
    def load(cls) -> Any:
        """The package; raises MissingExtra if it is not installed, SettingsError if it does not work here."""

    def picture(self, number: int) -> NDArray[np.uint8]:
        """``(H, W, 3)`` RGB, upright.

        Raises:
            SourceError: if it fails, or gives something else than what was asked for.
        """
        shown = self._facts.shown
        try:
            image, stamp = self._draw(number)
        except Exception as reason:
            raise SourceError(
                f"{self._facts.name}: {self.decoder} fails at the picture of {float(shown.pts(number)):.6g} s "
                f"({gist(reason)}); --decoder pyav passes over damage"
            ) from reason
        PULSE.beat()
        if stamp is not None and round(Fraction(stamp) / shown.base) != shown.stamps[number]:
            raise self._disagrees(f"gives the picture of {stamp:.6g} s for that of {float(shown.pts(number)):.6g} s")
        if image.shape != (*self._facts.size, 3):
            expected = (*self._facts.size, 3)
            raise self._disagrees(f"gives an array of shape {image.shape} where {expected} was expected")
        return image

    def _disagrees(self, how: str) -> SourceError:
        return SourceError(f"{self._facts.name}: {self.decoder} {how}; read it with --decoder pyav")

    @abstractmethod
    def _open(self, threads: int) -> None: ...

    @abstractmethod
    def _count(self) -> int: ...

    @abstractmethod
    def _draw(self, number: int) -> tuple[NDArray[np.uint8], float | None]:
        """A picture, and its time in seconds if the library knows it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; closing twice is allowed."""


class NumberedReader(Reader):
    """A source whose pictures are drawn by number; made by ``choice.reader``.

    Args:
        info: what PyAV says of it.
        facts: what else it has found out.
        library: who draws.
        why: why this one, as half a sentence.
        threads: threads to decode with; 0 lets FFmpeg decide.

    Raises:
        SourceError: if the library cannot read it or sees other pictures in it.
    """

    def __init__(self, info: SourceInfo, facts: Facts, library: type[Library], *, why: str, threads: int) -> None:
        self._facts = facts
        self._open: Callable[[], Library] = partial(library, facts, threads)
        self.info = replace(
            info,
            decoder=library.decoder,
            chosen=why,
            notes=(
                *info.notes,
                f"{library.decoder} tells of no damage: damaged pictures are shown as they come",
                "smaller frames are scaled from RGB, so edges of colours differ a little from pyav's",
            ),
        )
        with self.pictures() as pictures:
            pictures.draw(0)

    def pictures(self, *, keys_only: bool = False) -> NumberedPictures:
        """A new pass over all pictures, or over the key frames."""
        keys = self._facts.shown.keys
        numbers = [number for number, key in enumerate(keys) if key] if keys_only else range(len(keys))
        return NumberedPictures(self._facts, numbers, self._open)

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """Pictures that appear in ``[start, stop)``; nothing is decoded."""
        return self._facts.shown.between(start, stop)

    def _measured_end(self) -> Fraction:
        last = len(self._facts.shown) - 1
        return self._facts.shown.pts(last) + self._facts.shown.stay(last)


class NumberedPicture(Picture):
    """A number that becomes a picture when somebody wants to see it."""

    __slots__ = ("_number", "_owner")

    def __init__(self, number: int, pts: Fraction, duration: Fraction, owner: NumberedPictures) -> None:
        self._number = number
        self.pts = pts
        self.duration = duration
        self._owner = owner

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """``(H, W, 3)`` RGB, upright; another size is scaled from the full one."""
        return self._owner.convert(self._number, size)

    def grey(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """``(h, w)`` brightness, upright, from RGB by the weights of BT.601."""
        return self._owner.grey(self._number, size)


class NumberedPictures(Pictures):
    """One pass; the file is opened when the first picture is wanted.

    ``stats.decoded`` counts pictures that were asked for: how many more the library decodes on its
    way to them, it does not say.

    Args:
        facts: what PyAV has found out about the file.
        numbers: those of this pass, rising.
        library: opens the file.
    """

    def __init__(self, facts: Facts, numbers: Sequence[int], library: Callable[[], Library]) -> None:
        self.stats = DecodeStats()
        self._shown: Shown = facts.shown
        self._numbers = numbers
        self._place = 0
        self._open = library
        self._library: Library | None = None
        self._closed = False
        self._converter = Converter(Look(facts.size, facts.size), facts.name)
        self._keys = [number for number, key in enumerate(self._shown.keys) if key]
        self._latest: tuple[int, NDArray[np.uint8]] | None = None

    def skip_to(self, seconds: Fraction) -> None:
        """Go on with the picture shown at ``seconds``; those between are not decoded."""
        self._place = max(self._place, bisect_right(self._numbers, self._shown.at(seconds)) - 1)

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        self._latest = None
        if self._library is not None:
            self._library.close()
            self._library = None

    def __next__(self) -> NumberedPicture:
        if self._closed or self._place >= len(self._numbers):
            raise StopIteration
        number = self._numbers[self._place]
        self._place += 1
        return NumberedPicture(number, self._shown.pts(number), self._shown.stay(number), self)

    def convert(self, number: int, size: tuple[int, int] | None) -> NDArray[np.uint8]:
        """RGB of the full size, or scaled from it."""
        image = self.draw(number)
        if size is None or size == image.shape[:2]:
            return image.copy()
        return self._converter.convert(VideoFrame.from_ndarray(image, format="rgb24"), size)

    def grey(self, number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Brightness only, averaged down to ``size``."""
        return self._converter.grey(VideoFrame.from_ndarray(self.draw(number), format="rgb24"), size)

    def draw(self, number: int) -> NDArray[np.uint8]:
        """``(H, W, 3)`` RGB, upright; not to be written to, as the next call may give the same array."""
        if self._latest is not None and self._latest[0] == number:
            return self._latest[1]
        if self._closed:
            raise ValueError("the pass this picture belongs to is closed")
        if self._library is None:
            self._library = self._open()
        image = self._library.picture(number)
        self.stats.decoded += 1
        before = self._latest[0] if self._latest is not None else 0
        if bisect_right(self._keys, number) > bisect_right(self._keys, before) and number != before + 1:
            self.stats.seeks += 1
        self._latest = number, image
        return image


class Torchcodec(Library):
    """torchcodec: scans the file when it is opened, and knows the exact time of what it draws."""

    decoder = "torchcodec"

    @classmethod
    def load(cls) -> Any:
        """``torchcodec.decoders``."""
        try:
            return import_module("torchcodec.decoders")
        except ModuleNotFoundError as reason:
            raise MissingExtra("torchcodec", extra="torchcodec") from reason
        except (ImportError, RuntimeError, OSError) as reason:  # a page about every FFmpeg version it has tried
            raise SettingsError(
                "torchcodec is installed and does not load: it needs FFmpeg's shared libraries (Debian: apt install "
                "ffmpeg) and the release made for this torch; see constraints.txt, or use --decoder pyav"
            ) from reason

    def _open(self, threads: int) -> None:
        self._video: Any = self.load().VideoDecoder(
            str(self._facts.path),
            stream_index=self._facts.stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=threads,
            seek_mode="exact",
            device="cpu",
        )
        # The first packet of H.264 may name the encoder, whose 4:4:4 pictures are read in its own way.
        self._video.get_frame_at(0)

    def _count(self) -> int:
        return len(self._video)

    def _draw(self, number: int) -> tuple[NDArray[np.uint8], float | None]:
        frame = self._video.get_frame_at(number)
        return frame.data.numpy(), float(frame.pts_seconds)

    def close(self) -> None:
        """Let go of the file."""
        self._video = None


def gist(reason: BaseException) -> str:
    """What a library says, without the places in its own code and the traceback."""
    text = re.sub(r".*\.(?:cpp|cc|h):\d+[:,]\s*", "", str(reason), flags=re.DOTALL).strip()
    line = text.splitlines()[0].rstrip(" .") if text else type(reason).__name__
    return line if len(line) <= 120 else f"{line[:117]}..."
