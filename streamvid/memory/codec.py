"""How feature vectors become bytes: fixed-size rows behind a header, so that any first rows decode alone.

Knows nothing of spans, files or scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamvid.errors import BankError, SettingsError, near
from streamvid.memory.faiss_index import load_faiss

Bytes2D = NDArray[np.uint8]

FP16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors as bytes."""

    codec: str
    """Name of the codec that decodes them; not always the one that was asked."""

    header: bytes
    """What decoding needs besides rows: trained state, or nothing."""

    rows: Bytes2D
    """(N, row bytes) uint8, one fixed-size row per vector."""

    note: str = ""
    """Why another codec than the one asked for was used; empty if it was not."""


class Codec(ABC):
    """Turns (N, D) vectors into a header and N rows of equal size, and back.

    Decoding the first k rows needs the header and these rows only.
    """

    name: ClassVar[str]

    @abstractmethod
    def header_bytes(self, width: int) -> int:
        """Size of the header for vectors of ``width`` numbers."""

    @abstractmethod
    def row_bytes(self, width: int) -> int:
        """Size of one row for vectors of ``width`` numbers."""

    @abstractmethod
    def _encode(self, x: NDArray[np.float32]) -> Encoded:
        """Encode finite vectors."""

    @abstractmethod
    def _decode(self, header: bytes, rows: Bytes2D, width: int) -> NDArray[np.float32]:
        """Decode contiguous rows into a fresh array."""

    def encode(self, x: Tensor) -> Encoded:
        """Encode vectors.

        Args:
            x: (N, D) float of any dtype; read as float32.

        Raises:
            BankError: if a value is not finite, which no codec here can promise to give back.
        """
        if x.ndim != 2:
            raise ValueError(f"vectors must be (N, D), got {x.shape = }")
        x = x.detach().to("cpu", torch.float32)
        broken = int((~torch.isfinite(x)).sum())
        if broken:
            raise BankError(
                f"features hold {broken} values that are not finite and would be remembered for good; "
                "run the model in float32 or bfloat16"
            )
        return self._encode(np.ascontiguousarray(x.numpy()))

    def decode(self, header: bytes, rows: Bytes2D, *, width: int) -> Tensor:
        """Decode rows.

        Args:
            header: as encoded.
            rows: (k, row bytes) any of the encoded rows.
            width: D.

        Returns:
            (k, D) float32.
        """
        if rows.ndim != 2 or rows.shape[1] != self.row_bytes(width) or len(header) != self.header_bytes(width):
            raise ValueError(
                f"{self.name} rows of {width} numbers are {self.row_bytes(width)} bytes behind a header of "
                f"{self.header_bytes(width)}, got {rows.shape = } and a header of {len(header)}"
            )
        return torch.from_numpy(self._decode(header, np.ascontiguousarray(rows), width))


class Fp32(Codec):
    """Four bytes a number, nothing lost."""

    name = "fp32"

    def header_bytes(self, width: int) -> int:
        """Nothing."""
        return 0

    def row_bytes(self, width: int) -> int:
        """Four bytes a number."""
        return 4 * width

    def _encode(self, x: NDArray[np.float32]) -> Encoded:
        return Encoded(self.name, b"", x.astype("<f4").view(np.uint8).reshape(len(x), 4 * x.shape[1]))

    def _decode(self, header: bytes, rows: Bytes2D, width: int) -> NDArray[np.float32]:
        return rows.view("<f4").astype(np.float32)


class Fp16(Codec):
    """Two bytes a number, 11 significant bits: loses nothing of a float16 model.

    A bfloat16 model loses nothing either between 6.1e-5 and 65504; smaller numbers are rounded to steps
    of 6e-8.  Where any number is beyond 65504 the whole block is stored as fp32, and a note says so:
    clamping would change the outlier channels that language models rely on.
    """

    name = "fp16"

    def header_bytes(self, width: int) -> int:
        """Nothing."""
        return 0

    def row_bytes(self, width: int) -> int:
        """Two bytes a number."""
        return 2 * width

    def _encode(self, x: NDArray[np.float32]) -> Encoded:
        largest = float(np.abs(x).max(initial=0.0))
        if largest > FP16_MAX:
            wide = Fp32()._encode(x)
            note = f"features reach {largest:.3g}, beyond fp16's {FP16_MAX:.0f}: stored as fp32, twice the size"
            return Encoded(wide.codec, wide.header, wide.rows, note)
        return Encoded(self.name, b"", x.astype("<f2").view(np.uint8).reshape(len(x), 2 * x.shape[1]))

    def _decode(self, header: bytes, rows: Bytes2D, width: int) -> NDArray[np.float32]:
        return rows.view("<f2").astype(np.float32)


class Sq8(Codec):
    """One byte a number, 256 steps between each dimension's lowest and highest value in the block.

    FAISS's scalar quantizer with its ranges trained on the very vectors it encodes, so nothing is ever
    out of range and an error is at most half a step.  A range per dimension, because visual tokens have
    a few dimensions hundreds of times larger than the rest.  The header holds the ranges: 8 bytes a
    dimension, which is 1/8 of the rows at 64 vectors a block and less for more.

    Raises:
        MissingExtra: on use, if faiss is not installed.
    """

    name = "sq8"

    def header_bytes(self, width: int) -> int:
        """Lowest value and range of each dimension, float32."""
        return 8 * width

    def row_bytes(self, width: int) -> int:
        """One byte a number."""
        return width

    def _encode(self, x: NDArray[np.float32]) -> Encoded:
        width = x.shape[1]
        if not len(x):
            return Encoded(self.name, bytes(8 * width), np.empty((0, width), np.uint8))
        faiss = load_faiss()
        quantizer = self._quantizer(faiss, width)
        quantizer.rangestat_arg = 0.0
        quantizer.train(x)
        header = faiss.vector_to_array(quantizer.trained).astype("<f4").tobytes()
        return Encoded(self.name, header, quantizer.compute_codes(x).reshape(len(x), width))

    def _decode(self, header: bytes, rows: Bytes2D, width: int) -> NDArray[np.float32]:
        if not len(rows):
            return np.empty((0, width), np.float32)
        faiss = load_faiss()
        quantizer = self._quantizer(faiss, width)
        faiss.copy_array_to_vector(np.frombuffer(header, "<f4").astype(np.float32), quantizer.trained)
        decoded: NDArray[np.float32] = quantizer.decode(rows)
        return decoded

    @staticmethod
    def _quantizer(faiss: Any, width: int) -> Any:
        return faiss.ScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp16(), Fp32(), Sq8())}


def codec_by_name(name: str) -> Codec:
    """The codec called ``name``.

    Raises:
        SettingsError: if there is none; the message suggests near names.
    """
    if name not in CODECS:
        raise SettingsError(f"there is no codec {name!r}; {near(name, CODECS)}")
    return CODECS[name]
