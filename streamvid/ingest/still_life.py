"""Pictures that say nothing: a camera that gives the same picture again and again, or a black one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor
from torch.nn.functional import interpolate

from streamvid.errors import SettingsError

_THUMBNAIL = (36, 64)
_LOOK_SECONDS = Fraction(1, 2)
"""Pictures closer to the one looked at before are not looked at."""


@dataclass(frozen=True, slots=True)
class Dull:
    """When pictures count as frozen or black; levels are those of RGB, 0 to 255.

    Raises:
        SettingsError: if a value is out of range.
    """

    frozen_seconds: float = 10.0
    """A picture that does not change for so long is frozen, > 0; smaller says it sooner, and of still scenes too."""

    frozen_level: float = 0.05
    """Largest change of any of 64 x 36 cells that counts as none, >= 0; larger takes noise for stillness."""

    black_level: float = 24.0
    """Largest mean of a black picture, >= 0; larger takes nights for black."""

    black_spread: float = 4.0
    """Largest standard deviation over the cells of a black picture, >= 0; larger takes a lamp at night for black."""

    def __post_init__(self) -> None:
        if not self.frozen_seconds > 0:
            raise SettingsError(f"frozen_seconds must be above 0, got {self.frozen_seconds}; 10 suits most cameras")
        for name in ("frozen_level", "black_level", "black_spread"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"{name} must be 0 or more, got {getattr(self, name)}; levels go from 0 to 255")


@dataclass(frozen=True, slots=True)
class Change:
    """Something began, or is over."""

    kind: str
    """"frozen" or "black"."""

    since: Fraction
    """When the first of the pictures appeared, in stream seconds."""

    over: bool


class StillLife:
    """Watches pictures go by and says each thing once when it begins and once when it ends; holds one thumbnail."""

    def __init__(self, dull: Dull) -> None:
        self._dull = dull
        self._last: Tensor | None = None
        self._looked: Fraction | None = None
        self._still = Fraction(0)
        self._dark: Fraction | None = None
        self.frozen = False
        """Whether the picture stands still."""

        self.black = False
        """Whether the picture is black."""

    def look(self, pixels: Tensor, pts: Fraction) -> Iterator[Change]:
        """What begins or ends with this picture; ``pixels`` are (H, W, 3) uint8."""
        if self._looked is not None and pts - self._looked < _LOOK_SECONDS:
            return
        self._looked = pts
        small = interpolate(pixels.permute(2, 0, 1)[None].float(), size=_THUMBNAIL, mode="area")[0]
        last = self._last
        moved = last is None or float((small - last).abs().max()) > self._dull.frozen_level
        if moved:
            # Only what moves is kept to compare with: a slow change adds up until it is one.
            if self.frozen:
                self.frozen = False
                yield Change("frozen", self._still, True)
            self._last, self._still = small, pts
        elif not self.frozen and pts - self._still >= self._dull.frozen_seconds:
            self.frozen = True
            yield Change("frozen", self._still, False)
        grey = small.mean(dim=0)
        dark = float(grey.mean()) <= self._dull.black_level and float(grey.std()) <= self._dull.black_spread
        if dark and not self.black:
            self.black, self._dark = True, pts
            yield Change("black", pts, False)
        elif self.black and not dark:
            self.black = False
            yield Change("black", self._dark if self._dark is not None else pts, True)
