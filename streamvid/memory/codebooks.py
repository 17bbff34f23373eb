"""Codebooks: what trained codecs learned, in ``FOLDER/codebooks/``, one small file each.

::

    file    magic, version, bytes of JSON | JSON: what it is and its arrays | the arrays, one after another

The name of a file is the sha256 of its bytes, so a codebook is never changed, a span that names one can
only ever be decoded by that very one, and damage shows.  Knows arrays and files; what is learned, and how,
is the codecs' to say.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamvid.errors import BankError

VERSION = 1

_HEAD = struct.Struct("<8sHHI")
"""magic, version, 0, bytes of JSON"""

_MAGIC = b"SVIDBOOK"

Array = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Codebook:
    """What a codec learned from tokens of one model."""

    kind: str
    """What the arrays are; codecs that learn the same share it."""

    model: str
    """Fingerprint of the model whose tokens were learned from."""

    width: int
    """D"""

    layer: int
    """0 for the features, n for the n-th of the further layers."""

    tokens: int
    """How many tokens were learned from."""

    arrays: Mapping[str, Array]
    """float32 or float16."""

    def to_bytes(self) -> bytes:
        """The file; equal codebooks give equal bytes."""
        names = sorted(self.arrays)
        arrays = {n: np.ascontiguousarray(self.arrays[n]) for n in names}
        text = json.dumps(
            {
                "kind": self.kind,
                "model": self.model,
                "width": self.width,
                "layer": self.layer,
                "tokens": self.tokens,
                "arrays": [[n, a.dtype.newbyteorder("<").str, list(a.shape)] for n, a in arrays.items()],
            },
            sort_keys=True,
            separators=(",", ":"),
        ).encode("ascii")
        payload = b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in arrays.values())
        return _HEAD.pack(_MAGIC, VERSION, 0, len(text)) + text + payload

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The codebook that `to_bytes` wrote; the bytes are known to be whole."""
        _, _, _, size = _HEAD.unpack_from(data)
        told: dict[str, Any] = json.loads(data[_HEAD.size : _HEAD.size + size])
        place = _HEAD.size + size
        arrays: dict[str, Array] = {}
        for name, dtype, shape in told.pop("arrays"):
            flat = np.frombuffer(data, np.dtype(dtype), math.prod(shape), place)
            arrays[name] = flat.astype(flat.dtype.newbyteorder("=")).reshape(shape)
            place += flat.nbytes
        return cls(arrays=arrays, **told)

    @cached_property
    def digest(self) -> str:
        """sha256 of the file, 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class Codebooks:
    """The codebooks of one memory folder; read when first needed and then kept.

    Args:
        folder: ``FOLDER/codebooks``; made when the first one is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Codebook] = {}

    def load(self, digest: str) -> Codebook:
        """The codebook with this digest.

        Raises:
            BankError: if its file is missing, damaged or from a newer version.
        """
        if digest not in self._known:
            self._known[digest] = self._read(digest)
        return self._known[digest]

    def find(self, kind: str, *, model: str, width: int, layer: int) -> str | None:
        """Digest of the codebook for these tokens; None if there is none yet.

        Two processes may have learned at the same time: both codebooks stay, and the lower digest is used.

        Raises:
            BankError: if a codebook of this folder is damaged.
        """
        for digest in sorted(path.stem for path in self.folder.glob("*.book")):
            book = self.load(digest)
            if (book.kind, book.model, book.width, book.layer) == (kind, model, width, layer):
                return digest
        return None

    def save(self, book: Codebook) -> str:
        """Write a codebook, wholly or not at all, and return its digest; it is on the disk on return.

        Raises:
            OSError: if the disk does not take it.
        """
        data = book.to_bytes()
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        fresh = not self.folder.is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{digest}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent)[: 2 if fresh else 1]:
            _sync(folder)
        self._known[digest] = book
        return digest

    def num_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.book"))

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.book"

    def _read(self, digest: str) -> Codebook:
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BankError(
                f"cannot read codebook {path}: {error.strerror}; spans that name it cannot be decoded without it: "
                "restore the file from a copy, or remove these sources and ask again"
            ) from error
        if hashlib.sha256(data).hexdigest() != digest or data[: len(_MAGIC)] != _MAGIC:
            raise BankError(
                f"codebook {path} is damaged: its bytes do not give its name; restore it from a copy, "
                "or remove the sources that use it, delete it and ask again"
            )
        version = _HEAD.unpack_from(data)[1]
        if version > VERSION:
            raise BankError(
                f"codebook {path} has format {version} and this streamvid reads up to {VERSION}; update streamvid"
            )
        return Codebook.from_bytes(data)


def _sync(folder: Path) -> None:
    """Make the names in a folder as durable as the files they name."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
