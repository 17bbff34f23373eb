"""Images as a source: a still, a folder, a pattern, an animated WebP; decoded when somebody looks.

Knows names, times and order; ``stills`` knows what is in a file.  FFmpeg reads animated GIF,
APNG and AVIF, so those are films and no images here.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile

from streamvid.errors import SettingsError, SourceError
from streamvid.ingest.files import check_file, label
from streamvid.ingest.order import Order, count, number, order_of
from streamvid.ingest.pictures import Picture, Pictures
from streamvid.ingest.reader import Reader, SourceInfo
from streamvid.ingest.sampling import Seconds, exact
from streamvid.ingest.stills import (
    Still,
    Unusable,
    blaming,
    brands,
    check,
    format_of,
    load,
    opened,
    png_chunks,
    render,
    transparent,
    turn_of,
)

_HEAD_BYTES = 4096
_ENDINGS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .avif .jp2 .j2k .jpx .ppm .pgm .pbm .pnm".split()
)
_FILMS = frozenset(".mp4 .mkv .webm .mov .avi .ts .m4v .gif .apng .mpg .mpeg .flv .wmv".split())
_PROBE = (16, 16)
"""Size at which an image is decoded only to see whether it decodes."""


def image_kind(head: bytes) -> str | None:
    """What the first 4096 bytes of a file say: "still", "animated" (a WebP) or None for no image.

    Animations that FFmpeg reads (GIF, APNG, AVIF sequences) give None.
    """
    kind = format_of(head)
    if kind == "webp" and head[12:16] == b"VP8X" and head[20] & 2:
        return "animated"
    if kind == "avif" and b"avis" in brands(head):
        return None
    if kind == "png" and b"acTL" in png_chunks(head):
        return None
    return None if kind is None else "still"


def is_image_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds images, by the endings of their names, and more of them than videos."""
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries]
    except OSError:
        return False
    return sum(map(_is_image, names)) > sum(map(_is_film, names))


def expand(pattern: str) -> list[Path]:
    """The files a pattern of ``*``, ``?``, ``[...]`` and ``**`` matches, absolute, frame2 before frame10.

    Raises:
        SourceError: if there are none.
    """
    whole = os.path.abspath(os.path.expanduser(pattern))
    found = sorted({path for path in glob.iglob(whole, recursive=True) if os.path.isfile(path)}, key=_natural)
    if not found:
        raise SourceError(f"{label(pattern)} matches no file; check its folder, and write [[] where a name holds a [")
    return [Path(path) for path in found]


@dataclass(frozen=True)
class ImageFiles:
    """Images that were found and not yet opened; can be pickled.

    Made by ``find``, ``file``, ``folder`` or ``pattern``.
    """

    name: str
    """What to call them in messages."""

    where: str
    """Absolute path or pattern."""

    root: Path
    """The folder that ``names`` are relative to."""

    names: tuple[str, ...]
    """In natural order: frame2 before frame10."""

    animated: bool = False
    """Whether it is one animated WebP."""

    notes: tuple[str, ...] = ()
    """What was found and is not shown."""

    @classmethod
    def find(cls, address: str | os.PathLike[str]) -> Self:
        """The image folder or file of that name, else what it matches as a pattern; raises SourceError."""
        text = os.path.expanduser(os.fspath(address))
        if is_image_folder(text):
            return cls.folder(address)
        if any(sign in text for sign in "*?[") and not os.path.exists(text):
            return cls.pattern(os.fspath(address))
        return cls.file(check_file(address), name=label(address))

    @classmethod
    def file(cls, path: Path, *, name: str) -> Self:
        """One still image or animated WebP, whatever the ending of its name; raises SourceError."""
        path = Path(os.path.abspath(path))
        try:
            with path.open("rb") as file:
                kind = image_kind(file.read(_HEAD_BYTES))
        except OSError as reason:
            raise SourceError(f"{name} cannot be read: {reason.strerror}") from None
        if kind is None:
            raise SourceError(f"{name} is neither a still image nor an animated WebP; open it as a video")
        return cls(name, str(path), path.parent, (path.name,), kind == "animated")

    @classmethod
    def folder(cls, path: str | os.PathLike[str]) -> Self:
        """The images right inside of a folder, by the endings of their names; raises SourceError if there is none."""
        root = Path(os.path.abspath(os.path.expanduser(path)))
        name = label(path)
        try:
            with os.scandir(root) as entries:
                found = {entry.name: entry.is_file() for entry in entries}
        except OSError as reason:
            raise SourceError(f"{name} cannot be read: {reason.strerror}") from None
        files = [inside for inside, regular in found.items() if regular]
        images = sorted(filter(_is_image, files), key=_natural)
        if not images:
            raise SourceError(f"{name} is a folder without images; name one video in it, or a folder of JPEG or PNG")
        notes = _left_out(files)
        if folders := len(found) - len(files):
            several = os.path.join(name, "**", f"*{Path(images[0]).suffix}")
            notes += (f"{number(folders, 'folder')} in it not looked into; to take in all folders give {several}",)
        return cls(name, str(root), root, tuple(images), notes=notes)

    @classmethod
    def pattern(cls, pattern: str) -> Self:
        """The images a pattern matches, by the endings of their names; raises SourceError if there is none."""
        paths = [str(path) for path in expand(pattern)]
        images = [path for path in paths if _is_image(os.path.basename(path))]
        name = label(pattern)
        if not images:
            matched = number(len(paths), "file")
            raise SourceError(f"{name} matches {matched} and no image; open a video by its own name")
        root = os.path.commonpath([os.path.dirname(path) for path in images])
        names = tuple(os.path.relpath(path, root) for path in images)
        where = os.path.abspath(os.path.expanduser(pattern))
        return cls(name, where, Path(root), names, notes=_left_out(map(os.path.basename, paths)))


class ImagesReader(Reader):
    """Images shown one after the other, each decoded only when somebody looks at it.

    Times, by the first of these that applies:

    - an animation has its own; a frame of 0 ms stays for 100 ms;
    - with ``rate``, picture k appears at ``k / rate``, in natural order of the names;
    - a single image stays for 1 s;
    - if all images say when they were taken (EXIF) and no two say the same, those times, from 0;
    - else picture k appears at k seconds.

    An image that is missing, cut off or no image is passed over and counted; the times of the
    others stay.  Where only decoding shows that one is broken, the picture before it stays on
    screen.  Images of another size are scaled to the first one's.  As FFmpeg does,
    transparency is dropped, 16 bits become 8 and colour profiles are not applied.  Of a file
    with many pages, or an animation among other images, the first picture is shown.

    Args:
        files: what to show.
        rate: images a second, above 0; higher makes them go by faster.

    Raises:
        SourceError: if none of them can be shown.
        SettingsError: if the rate is not above 0.
    """

    def __init__(self, files: ImageFiles, *, rate: Seconds | None = None) -> None:
        if rate is not None and exact(rate) <= 0:
            raise SettingsError(f"the rate must be above 0 images a second, got {rate}; for slower than one give 0.1")
        self.files = files
        speed = None if rate is None else exact(rate)
        try:
            self._order = order = order_of(files.root, files.names, animated=files.animated, rate=speed)
        except Unusable as reason:
            raise SourceError(f"{files.name} {reason}") from None
        self._first, probe = self._find_first()
        self._stop = self._find_stop()
        self._size = height, width = probe.size
        self.info = SourceInfo(
            path=files.where,
            name=files.name,
            container="webp" if files.animated else "images",
            codec=probe.format,
            width=width,
            height=height,
            duration=order.times.at(self._stop) - order.times.at(self._first),
            start=order.times.at(self._first),
            time_base=order.tick,
            average_rate=order.times.count / order.times.at(order.times.count),
            rotation=probe.upright.degrees,
            decoder="pillow",
            chosen="FFmpeg has no animated WebP" if files.animated else "images are decoded one by one, on demand",
            streams=(f"* {number(order.times.count, 'picture')}, the first {probe.format} {width}x{height}",),
            colour=probe.mode,
            notes=files.notes + order.notes + _notes_of(probe),
        )

    def pictures(self, *, keys_only: bool = False) -> ImagesPictures:
        """A new pass; every image stands for itself, so ``keys_only`` matters to animations only."""
        keys = self._order.keys if keys_only else None
        return ImagesPictures(self._roll(), self._order, range(self._first, self._stop), self._size, keys)

    def count_pictures(self, start: Fraction, stop: Fraction) -> int:
        """How many have a time in ``[start, stop)``, without opening them."""
        return sum(start <= self._order.times.at(k) < stop for k in range(self._first, self._stop))

    def identity(self) -> str:
        """A hash of names, contents, order and times; reads every file. Raises SourceError if one is gone."""
        times = self._order.times
        whole = hashlib.sha256(f"{times.rate} {times.marks}\n".encode())
        for name in self._order.names:
            try:
                with (self.files.root / name).open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                    size = file.tell()
            except OSError as reason:
                found = f"{label(name)} of {self.files.name}"
                raise SourceError(f"{found} cannot be read any more: {reason.strerror}; open them again") from None
            whole.update(os.fsencode(Path(name).as_posix()) + f"\0{size} {content}\n".encode())
        return whole.hexdigest()

    def _roll(self) -> Roll:
        root, names = self.files.root, self._order.names
        return _Animation(root / names[0]) if self.files.animated else _Stills(root, names)

    def _find_first(self) -> tuple[int, Still]:
        """The first picture that decodes; those before it are counted as lost."""
        roll = self._roll()
        reasons: list[str] = []
        for k in range(self._order.times.count):
            try:
                return k, roll.load(k, _PROBE)
            except Unusable as reason:
                count(self._order.lost, reason)
                reasons = reasons or [str(reason)]
        if len(self._order.names) == 1:
            raise SourceError(f"{self.files.name} {reasons[0]}")
        first = label(self._order.names[0])
        raise SourceError(f"{self.files.name} holds no image that can be shown; the first, {first}, {reasons[0]}")

    def _find_stop(self) -> int:
        """One past the last picture that seems whole; those after it are counted as lost."""
        roll = self._roll()
        for k in range(self._order.times.count - 1, self._first, -1):
            try:
                roll.check(k)
                return k + 1
            except Unusable as reason:
                count(self._order.lost, reason)
        return self._first + 1


class ImagePicture(Picture):
    """A picture whose file is opened when somebody wants to see it."""

    __slots__ = ("_k", "_owner")

    def __init__(self, owner: ImagesPictures, k: int, pts: Fraction, duration: Fraction) -> None:
        self._owner = owner
        self._k = k
        self.pts = pts
        self.duration = duration

    def pixels(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """``(H, W, 3)`` RGB, upright."""
        return self._owner.show(self._k, size)

    def grey(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """``(h, w)`` brightness, upright."""
        return self._owner.show(self._k, size, grey=True)


class Roll(Protocol):
    """Pictures by number."""

    def check(self, k: int) -> None:
        """Raise Unusable if picture k is not there or not whole; decodes nothing."""

    def load(self, k: int, size: tuple[int, int], *, grey: bool = False) -> Still:
        """Picture k at ``size``, (H, W); raises Unusable."""


class ImagesPictures(Pictures):
    """One pass over images; the pictures it gave may be looked at after its end."""

    def __init__(
        self, roll: Roll, order: Order, span: range, size: tuple[int, int], keys: frozenset[int] | None
    ) -> None:
        self.stats = replace(order.lost)
        self._roll = roll
        self._times = order.times
        self._span = span
        self._size = size
        self._keys = keys
        self._next = span.start
        self._goal: Fraction | None = None
        self._fine = span.start
        self._bad: set[int] = set()

    def skip_to(self, seconds: Fraction) -> None:
        """Jump to the picture on screen at ``seconds``; what lies between is not even opened."""
        self._goal = seconds

    def close(self) -> None:
        """End the pass."""
        self._next = self._span.stop

    def __next__(self) -> ImagePicture:
        if self._goal is not None:
            goal, self._goal = self._goal, None
            self._jump(min(self._times.shown(goal), self._span.stop - 1))
        for k in range(self._next, self._span.stop):
            if self._usable(k):
                self._next = k + 1
                pts = self._times.at(k)
                return ImagePicture(self, k, pts, self._times.at(k + 1) - pts)
        self.close()
        raise StopIteration

    def show(self, k: int, size: tuple[int, int] | None, *, grey: bool = False) -> NDArray[np.uint8]:
        """Picture k at ``size``, or at the source's one; if it does not decode, the nearest before it that does."""
        while True:
            if k not in self._bad:
                try:
                    still = self._roll.load(k, size or self._size, grey=grey)
                except Unusable as reason:
                    if k == self._span.start:
                        raise SourceError(f"the first image {reason}; when opened it was whole") from None
                    self._blame(k, reason)
                else:
                    self.stats.decoded += 1
                    self.stats.rescaled += not grey and still.size != self._size
                    return still.pixels
            k -= 1

    def _jump(self, k: int) -> None:
        """To picture k, or the nearest before it that is usable, but never back."""
        while k > self._next and not self._usable(k):
            k -= 1
        if k > self._next:
            self.stats.seeks += 1
            self._next = k

    def _usable(self, k: int) -> bool:
        if k == self._fine:
            return True
        if k in self._bad or (self._keys is not None and k not in self._keys):
            return False
        try:
            self._roll.check(k)
        except Unusable as reason:
            self._blame(k, reason)
            return False
        self._fine = k
        return True

    def _blame(self, k: int, reason: Unusable) -> None:
        self._bad.add(k)
        count(self.stats, reason)


class _Stills:
    """One file a picture."""

    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        self._root = root
        self._names = names

    def check(self, k: int) -> None:
        check(self._root / self._names[k])

    def load(self, k: int, size: tuple[int, int], *, grey: bool = False) -> Still:
        return load(self._root / self._names[k], size, grey=grey)


class _Animation:
    """One animated WebP; going back decodes it from its start again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._image: ImageFile | None = None
        self._broken: int | None = None

    def check(self, k: int) -> None:
        """Nothing to see from outside: the file was parsed as a whole when it was opened."""

    def load(self, k: int, size: tuple[int, int], *, grey: bool = False) -> Still:
        if self._broken is not None and k >= self._broken:
            raise Unusable("comes after a damaged frame")
        if self._image is None:
            with opened(self._path) as (_, self._image):
                pass  # the decoder holds the file's bytes
        try:
            with blaming():
                self._image.seek(k)
                self._image.load()
        except Unusable:
            self._broken = k
            raise
        image = self._image
        upright = turn_of(image)
        pixels = render(image, size, upright, grey=grey)
        return Still(pixels, upright.size(image.size[::-1]), "webp", image.mode, upright, transparent(image))


def _notes_of(still: Still) -> tuple[str, ...]:
    notes: tuple[str, ...] = ()
    if still.upright.mirrored:
        notes += ("the picture is mirrored, as the file asks",)
    if still.transparent:
        notes += ("parts are transparent and shown in the colours stored there",)
    return notes


def _natural(path: str) -> tuple[list[list[str | int]], str]:
    """Sorts numbers in names by value, folder by folder; names that differ in case only by their code points."""
    parts = path.split(os.sep)
    return [[int(p) if p.isdigit() else p for p in re.split("([0-9]+)", part.casefold())] for part in parts], path


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _ENDINGS and not name.startswith(".")


def _is_film(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _FILMS and not name.startswith(".")


def _left_out(names: Iterable[str]) -> tuple[str, ...]:
    """A note on what among the names is no image."""
    others = [name for name in names if not _is_image(name)]
    films = sum(map(_is_film, others))
    if not others:
        return ()
    which = f", {films} of them videos" if films else ""
    return (f"{number(len(others), 'file')} left out, not named like an image that is read here{which}",)
