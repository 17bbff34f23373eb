"""What decides whether remembered tokens may be used: the ingredients of a memory key.

Knows how to name an ingredient set; does not know where memory lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from streamvid.errors import SourceError

FORMAT = 1
"""Meaning of stored tokens; raised when tokens stored before may no longer be used as they are."""

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class MemoryKey:
    """Everything that shapes remembered tokens; memory is used only where all of it is equal.

    Values are copied when the key is made, so what the caller changes later does not reach it.  A whole
    number is one value whether written ``1`` or ``1.0``; a ``Fraction`` is kept exactly.

    Raises:
        ValueError: if a value is not plain (None, bool, number, str, list, dict) or not finite.
    """

    content: str
    """Digest of the bytes of the video: see `content_digest`.  A live source has a name of its own."""

    sampling: Mapping[str, Any]
    """Which frames were taken: fps, max_frames, from, to."""

    model: str
    """Fingerprint of the model that made the tokens."""

    processor: str
    """Fingerprint of how pixels were prepared."""

    methods: Sequence[Mapping[str, Any]]
    """The reductions that ran before storing, in order, each with its settings."""

    embedder: str
    """Fingerprint of what made the retrieval keys."""

    format: int = FORMAT
    """Meaning of stored tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampling", _plain(self.sampling, "sampling"))
        object.__setattr__(self, "methods", _plain(self.methods, "methods"))

    def to_json(self) -> str:
        """Canonical JSON: sorted names, no spaces, ASCII; equal keys give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The key that `to_json` wrote."""
        return cls(**json.loads(text))

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.to_json().encode("ascii")).hexdigest()

    @property
    def short(self) -> str:
        """The first 12 digits of the digest, for people."""
        return self.digest[:12]


def content_digest(path: Path) -> str:
    """sha256 over the whole file, 64 hex digits; reads it in blocks of 1 MiB.

    `streamvid.memory.bank.Bank.content_digest` remembers the answer.

    Raises:
        SourceError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    return digest.hexdigest()


def _plain(value: Any, name: str) -> Any:
    """A copy made of JSON values only, with one spelling per value."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{name} must be finite to be part of a key, got {value}")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
    raise ValueError(f"{name} must be a plain value to be part of a key, got {type(value).__name__}")
