"""decord: an older reader with an FFmpeg of its own.  Not looked at unless somebody asks for it by name.

It knows no exact times, so its table of them is only compared with the container's when a file is opened.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamvid.errors import MissingExtra, SettingsError
from streamvid.ingest.torchcodec import Library, gist

_NO_RECOVERED = 1e-9
"""Share of pictures that may be others in place of broken ones; decord takes 0 for "any number"."""


class Decord(Library):
    """decord, on the processor, one picture at a time."""

    decoder = "decord"

    @classmethod
    def load(cls) -> Any:
        """The package, told to be quiet."""
        try:
            package = import_module("decord")
        except ModuleNotFoundError as reason:
            raise MissingExtra("decord", extra="decord") from reason
        except (ImportError, RuntimeError, OSError) as reason:
            raise SettingsError(
                f"decord is installed and does not load here ({gist(reason)}); use --decoder pyav"
            ) from reason
        package.logging.set_level(package.logging.QUIET)
        return package

    def _open(self, threads: int) -> None:
        package = self.load()
        self._video: Any = package.VideoReader(
            str(self._facts.path), ctx=package.cpu(0), num_threads=threads, fault_tol=_NO_RECOVERED
        )
        # The first packet of H.264 may name the encoder, whose 4:4:4 pictures are read in its own way.
        self._video[0]

    def _count(self) -> int:
        count = len(self._video)
        shown = self._facts.shown
        if count == len(shown):
            self._compare_times(self._video.get_frame_timestamp(list(range(count)))[:, 0])
        return count

    def _compare_times(self, seconds: NDArray[np.float32]) -> None:
        """Times since the first picture must be the container's, as far as float32 tells."""
        shown = self._facts.shown
        ticks = np.asarray(shown.stamps, dtype=np.float64)
        expected = (ticks - ticks[0]) * float(shown.base)
        off = np.abs(seconds.astype(np.float64) - float(seconds[0]) - expected)
        if (off > 1e-6 + 4 * np.finfo(np.float32).eps * (np.abs(ticks) * float(shown.base))).any():
            raise ValueError("its times are not the container's")

    def _draw(self, number: int) -> tuple[NDArray[np.uint8], float | None]:
        return np.asarray(self._video[number].asnumpy(), dtype=np.uint8), None

    def close(self) -> None:
        """Let go of the file."""
        self._video = None
