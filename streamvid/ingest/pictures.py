"""What a decoder yields before sampling: pictures that know their time and are not yet RGB.

This is the seam between decoders and everything else.  A decoder implements ``Pictures``;
sampling, clips and the pipelines know no decoder.  Pixels are numpy arrays here, so that the
process that decodes need not load torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class DecodeStats:
    """What happened while decoding; every count starts at zero and only grows."""

    decoded: int = 0
    """Pictures that came out of the decoder, shown or not."""

    skipped: int = 0
    """Packets that could not be read or decoded."""

    damaged: int = 0
    """Pictures the decoder itself calls broken; they are not shown."""

    misplaced: int = 0
    """Pictures whose time does not come after the picture before; they are not shown."""

    untimed: int = 0
    """Pictures without any time of their own, placed one frame after the picture before."""

    jumps: int = 0
    """Times the clock fell back by more than a second, or that of a live source leapt ahead; later times go on as
    before."""

    rescaled: int = 0
    """Delivered pictures that were scaled because their size differs from the first one's."""

    seeks: int = 0
    """Jumps to a key frame instead of decoding everything between."""

    restarts: int = 0
    """Jumps that could not be trusted, so that the file was read again in order."""

    dropped: int = 0
    """Sampled frames that a full buffer threw away because nobody took them in time."""

    def warnings(self) -> tuple[str, ...]:
        """What a user should know of it, one sentence each."""
        told = (
            (self.skipped, "packets could not be read or decoded and were skipped"),
            (self.damaged, "pictures were damaged and are not shown"),
            (self.misplaced, "pictures had times out of order and are not shown"),
            (self.untimed, "pictures had no time of their own and were placed after those before"),
            (self.jumps, "times the clock jumped; later times go on as before"),
            (self.rescaled, "pictures had another size and were scaled to the first one's"),
            (self.dropped, "frames found the buffer full and were dropped"),
        )
        return tuple(f"{count} {what}" for count, what in told if count)

    def as_dict(self) -> dict[str, int]:
        """All counts by name."""
        return asdict(self)


class Picture(ABC):
    """One decoded picture that has not been converted yet, so that skipping it costs nothing."""

    __slots__ = ("duration", "pts")

    pts: Fraction
    """When it appears, in seconds, as the container says."""

    duration: Fraction
    """How long it stays if nothing comes after it, in seconds; always positive."""

    @abstractmethod
    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The picture, upright, as ``(H, W, 3)`` RGB; ``size`` is (H, W), None for the full one."""

    @abstractmethod
    def grey(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """A small ``(h, w)`` picture of its brightness, each pixel the mean of what it covers; cheap."""


class Pictures(Iterator[Picture], ABC):
    """One pass over a source: pictures with strictly rising times.  A context manager."""

    stats: DecodeStats

    def skip_to(self, seconds: Fraction) -> None:  # noqa: B027 - going on in order is right for every decoder
        """Allow a jump: only the picture shown at ``seconds`` and those after it are still wanted.

        What follows is the same as without the call, less some pictures that are gone by
        ``seconds``.  A decoder that cannot jump safely goes on in order.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
