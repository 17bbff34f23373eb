"""How feature vectors become bytes: fixed-size rows behind a header, so that any first rows decode alone.

A codec may learn from the first tokens of a model; what it learned is a codebook, which spans name.
Knows nothing of spans, files or scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamvid import defaults
from streamvid.errors import BankError, MissingExtra, SettingsError, near
from streamvid.memory.codebooks import Array, Codebook, Codebooks
from streamvid.memory.faiss_index import load_faiss

Bytes2D = NDArray[np.uint8]

DEFAULT_CODEC = defaults.CODEC
"""How features and layers are stored when nothing is said."""

FP16_MAX = 65504.0

RANGES_TOKENS = 1024
"""Tokens from which shared ranges are learned."""

PQ_TOKENS = 4096
"""Tokens from which a product quantizer is learned: 16 for each of its 256 entries."""


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
    """Why another codec than the one asked for was used, or a slower way; empty if nothing is to be said."""

    book: str = ""
    """Digest of the codebook that decoding needs; empty if it needs none."""


class Codec(ABC):
    """Turns (N, D) vectors into a header and N rows of equal size, and back.

    Decoding the first k rows needs the header, these rows, and the codebook where the rows name one.

    Args:
        book: what was learned before; None encodes without, as far as that goes.
    """

    name: str

    learns: ClassVar[str] = ""
    """Kind of codebook this codec learns; empty if it learns nothing."""

    learns_from: ClassVar[int] = 0
    """How many tokens it learns from."""

    def __init__(self, book: Codebook | None = None) -> None:
        self.book = book

    @property
    def digest(self) -> str:
        """Of the codebook; empty without."""
        return "" if self.book is None else self.book.digest

    def with_book(self, book: Codebook) -> Self:
        """The same codec with what was learned.

        Raises:
            ValueError: if the codebook is of another kind.
        """
        if book.kind != self.learns:
            raise ValueError(f"{self.name} learns {self.learns or 'nothing'}, got a codebook of {book.kind}")
        return type(self)(book)

    def learn(self, x: Tensor) -> Mapping[str, Array]:
        """Learn the arrays of a codebook from (N, D) finite vectors, the same each time."""
        raise TypeError(f"{self.name} learns nothing")

    @abstractmethod
    def header_bytes(self, width: int) -> int:
        """Usual size of the header for vectors of ``width`` numbers: without outliers, see the codec."""

    def takes_header(self, size: int, width: int) -> bool:
        """Whether a header of ``size`` bytes can be one of this codec's."""
        return size == self.header_bytes(width)

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

        Raises:
            ValueError: if sizes do not fit.
            MissingExtra: if only faiss can decode them and it is not installed.
        """
        if rows.ndim != 2 or rows.shape[1] != self.row_bytes(width) or not self.takes_header(len(header), width):
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


_EXCEPTION = np.dtype([("dim", "<u2"), ("low", "<f2"), ("range", "<f2")])
"""A dimension in which a block leaves the shared ranges, with its own."""


class Sq(Codec):
    """A fixed number of equal steps between each dimension's lowest and highest value.

    FAISS's scalar quantizer, whose ranges are always checked to hold the very vectors that are encoded:
    nothing clips, and an error is at most half a step.  A range per dimension, because visual tokens have
    a few dimensions hundreds of times larger than the rest.  The header says the ranges in one of three ways:

    ============== ===================== =============================================================
    with codebook  6 bytes an exception  shared ranges, and the dimensions in which this block leaves them
    without        4 bytes a dimension   lowest value and range of the block as float16, rounded outwards
    without        8 bytes a dimension   the same as float32, for values beyond float16; format 1 wrote this
    ============== ===================== =============================================================

    The smallest is taken.  A block that fp16 stores in no more bytes is stored as fp16: with ranges of its
    own that is one of up to 4 vectors in eight bits, 2 in four.  Without faiss, numpy does the same arithmetic.
    """

    bits: ClassVar[int]
    learns = "ranges"
    learns_from = RANGES_TOKENS

    MARGIN: ClassVar[float] = 0.125
    """How far learned ranges reach beyond what was seen, on each side, as a share of it.  Larger means fewer
    exceptions and larger steps."""

    def learn(self, x: Tensor) -> Mapping[str, Array]:
        """Lowest value and range of each dimension, with a margin."""
        data = x.double().numpy()
        low, high = data.min(0), data.max(0)
        margin = self.MARGIN * (high - low)
        return {"low": (low - margin).astype(np.float32), "range": (high - low + 2 * margin).astype(np.float32)}

    def header_bytes(self, width: int) -> int:
        """Nothing with a codebook, else four bytes a dimension."""
        return 0 if self.book is not None else 4 * width

    def takes_header(self, size: int, width: int) -> bool:
        """Exceptions with a codebook, else ranges as float16 or float32."""
        return size % _EXCEPTION.itemsize == 0 if self.book is not None else size in (4 * width, 8 * width)

    def row_bytes(self, width: int) -> int:
        """``bits`` a number, in whole bytes a row."""
        return (width * self.bits + 7) // 8

    def _encode(self, x: NDArray[np.float32]) -> Encoded:
        count, width = x.shape
        if not x.size:
            return Fp16()._encode(x)
        low, high = x.min(0), x.max(0)
        with np.errstate(over="ignore"):
            span = high - low
        if not np.isfinite(span).all():
            wide = Fp32()._encode(x)
            return Encoded(wide.codec, wide.header, wide.rows, "features span more than float32: stored as fp32")
        header, book, trained = self._ranges(low, high, span)
        size = self.row_bytes(width)
        if len(header) + count * size >= 2 * count * width and max(abs(low).max(), abs(high).max()) <= FP16_MAX:
            return Fp16()._encode(x)
        note = ""
        try:
            rows = self._quantizer(load_faiss(), width, trained).compute_codes(x).reshape(count, size)
        except MissingExtra as missing:
            rows = self._pack(self._codes(x, trained))
            note = f"memory is packed without faiss, which is as exact and about 7 times slower: {missing}"
        return Encoded(self.name, header, rows, note, book)

    def _decode(self, header: bytes, rows: Bytes2D, width: int) -> NDArray[np.float32]:
        if not len(rows) or not width:
            return np.empty((len(rows), width), np.float32)
        trained = self._trained(header, width)
        try:
            faiss = load_faiss()
        except MissingExtra:
            codes = self._unpack(rows, width) + np.float32(0.5)
            return codes / np.float32(self._steps - 1) * trained[width:] + trained[:width]
        decoded: NDArray[np.float32] = self._quantizer(faiss, width, trained).decode(rows)
        return decoded

    def _ranges(
        self, low: NDArray[np.float32], high: NDArray[np.float32], span: NDArray[np.float32]
    ) -> tuple[bytes, str, NDArray[np.float32]]:
        """The header that says ranges holding ``[low, high]``, the codebook it needs, and FAISS's form of them."""
        width = len(low)
        low16, span16 = _outwards(low, high)
        fits16 = np.isfinite(low16) & np.isfinite(span16)
        if self.book is not None and width <= 1 << 16:
            shared, reach = self.book.arrays["low"].astype(np.float64), self.book.arrays["range"].astype(np.float64)
            outside = np.flatnonzero((low < shared) | (high > shared + reach))
            if fits16[outside].all() and len(outside) * _EXCEPTION.itemsize <= 4 * width:
                table = np.empty(len(outside), _EXCEPTION)
                table["dim"], table["low"], table["range"] = outside, low16[outside], span16[outside]
                header = table.tobytes()
                return header, self.digest, self._trained(header, width)
        plain = type(self)()
        if fits16.all():
            header = np.concatenate([low16, span16]).tobytes()
        else:
            header = np.concatenate([low, span]).astype("<f4").tobytes()
        return header, "", plain._trained(header, width)

    def _trained(self, header: bytes, width: int) -> NDArray[np.float32]:
        """(2 D,) lowest value of each dimension, then what FAISS takes for its range."""
        if self.book is None and len(header) == 8 * width:
            return np.frombuffer(header, "<f4").astype(np.float32)
        if self.book is None:
            ranges = np.frombuffer(header, "<f2").astype(np.float32)
            low, span = ranges[:width], ranges[width:]
        else:
            low = self.book.arrays["low"].astype(np.float32)
            span = self.book.arrays["range"].astype(np.float32)
            table = np.frombuffer(header, _EXCEPTION)
            low[table["dim"]], span[table["dim"]] = table["low"], table["range"]
        # FAISS cuts a range into one step less than it has codes and clips to the last code: told a
        # range shorter by a step it makes as many equal steps as there are codes.
        return np.concatenate([low, span * np.float32((self._steps - 1) / self._steps)])

    @property
    def _steps(self) -> int:
        return 1 << self.bits

    def _codes(self, x: NDArray[np.float32], trained: NDArray[np.float32]) -> Bytes2D:
        """(N, D) uint8, by FAISS's arithmetic."""
        width = x.shape[1]
        span = trained[width:]
        share = np.divide(x - trained[:width], span, out=np.zeros_like(x), where=span != 0)
        codes: Bytes2D = (share.clip(0, 1) * np.float32(self._steps - 1)).astype(np.uint8)
        return codes

    @abstractmethod
    def _quantizer(self, faiss: Any, width: int, trained: NDArray[np.float32]) -> Any:
        """FAISS's quantizer with these ranges."""

    @abstractmethod
    def _pack(self, codes: Bytes2D) -> Bytes2D:
        """(N, D) codes to rows."""

    @abstractmethod
    def _unpack(self, rows: Bytes2D, width: int) -> Bytes2D:
        """Rows to (N, D) codes."""


class Sq8(Sq):
    """One byte a number: 256 steps a dimension."""

    name = "sq8"
    bits = 8

    def _quantizer(self, faiss: Any, width: int, trained: NDArray[np.float32]) -> Any:
        return _with_ranges(faiss, faiss.ScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit), trained)

    def _pack(self, codes: Bytes2D) -> Bytes2D:
        return codes

    def _unpack(self, rows: Bytes2D, width: int) -> Bytes2D:
        return rows


class Sq4(Sq):
    """Half a byte a number: 16 steps a dimension."""

    name = "sq4"
    bits = 4

    def _quantizer(self, faiss: Any, width: int, trained: NDArray[np.float32]) -> Any:
        return _with_ranges(faiss, faiss.ScalarQuantizer(width, faiss.ScalarQuantizer.QT_4bit), trained)

    def _pack(self, codes: Bytes2D) -> Bytes2D:
        even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        packed: Bytes2D = even[:, 0::2] + even[:, 1::2] * np.uint8(16)
        return packed

    def _unpack(self, rows: Bytes2D, width: int) -> Bytes2D:
        return np.stack([rows & 15, rows >> 4], axis=2).reshape(len(rows), -1)[:, :width]


class Pq(Codec):
    """A byte for every four numbers: which of 256 learned groups of four is nearest.

    FAISS's product quantizer, learned once per model, width and layer from the first 4,096 tokens, each
    dimension brought to mean 0 and deviation 1 before, so that outlier channels do not take all entries.
    Until it has learned, sq8 is used and a note says so.  Unlike the other codecs it promises no bound on the
    error of a token unlike those it learned from.  A width that four does not divide uses its next larger
    divisor.

    Raises:
        MissingExtra: on use, if faiss is not installed.
    """

    name = "pq"
    learns = "pq"
    learns_from = PQ_TOKENS

    ITERATIONS: ClassVar[int] = 8
    """Of k-means; more cost seconds of learning and gain little."""

    def learn(self, x: Tensor) -> Mapping[str, Array]:
        """Mean and deviation of each dimension, and the entries."""
        data = np.ascontiguousarray(x.float().numpy())
        mean, deviation = data.mean(0), data.std(0)
        deviation[deviation == 0] = 1
        faiss = load_faiss()
        width = data.shape[1]
        quantizer = faiss.ProductQuantizer(width, self.row_bytes(width), 8)
        quantizer.cp.niter, quantizer.cp.seed, quantizer.cp.min_points_per_centroid = self.ITERATIONS, 1234, 1
        quantizer.train(np.ascontiguousarray((data - mean) / deviation))
        entries = faiss.vector_to_array(quantizer.centroids).reshape(self.row_bytes(width), 256, -1)
        return {"mean": mean, "deviation": deviation, "entries": entries.astype(np.float16)}

    def header_bytes(self, width: int) -> int:
        """Nothing: the codebook says it all."""
        return 0

    def row_bytes(self, width: int) -> int:
        """A byte for every four numbers."""
        return width // next((size for size in range(4, width) if width % size == 0), width)

    def _encode(self, x: NDArray[np.float32]) -> Encoded:
        if not x.size:
            return Fp16()._encode(x)
        if self.book is None:
            plain = Sq8()._encode(x)
            note = f"pq learns from {PQ_TOKENS} tokens of a model; what comes before is stored as sq8, 4 times the size"
            return Encoded(plain.codec, plain.header, plain.rows, note, plain.book)
        mean, deviation = self.book.arrays["mean"], self.book.arrays["deviation"]
        codes = self._quantizer.compute_codes(np.ascontiguousarray((x - mean) / deviation, np.float32))
        return Encoded(self.name, b"", codes.reshape(len(x), -1), book=self.digest)

    def _decode(self, header: bytes, rows: Bytes2D, width: int) -> NDArray[np.float32]:
        if not len(rows):
            return np.empty((0, width), np.float32)
        if self.book is None:
            raise ValueError("pq rows need the codebook they were encoded with")
        decoded: NDArray[np.float32] = self._quantizer.decode(rows)
        return decoded * self.book.arrays["deviation"] + self.book.arrays["mean"]

    @cached_property
    def _quantizer(self) -> Any:
        assert self.book is not None
        faiss = load_faiss()
        entries = self.book.arrays["entries"]
        quantizer = faiss.ProductQuantizer(self.book.width, len(entries), 8)
        faiss.copy_array_to_vector(np.ascontiguousarray(entries, np.float32).reshape(-1), quantizer.centroids)
        return quantizer


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp16(), Fp32(), Pq(), Sq4(), Sq8())}
"""Every codec by name, none of them having learned anything."""


@dataclass(frozen=True, slots=True)
class CodecSetting:
    """Which codecs are asked for."""

    features: str
    layers: str
    """Of all further layers."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """``sq8`` for everything, or FEATURES+LAYERS as in ``sq8+sq4``.

        Raises:
            SettingsError: if it is neither, or names no codec; the message suggests near names.
        """
        parts = text.split("+")
        if len(parts) > 2:
            raise SettingsError(
                f"a codec is one name, or FEATURES+LAYERS as in sq8+sq4, got {text!r} with {len(parts)} names; "
                "all further layers share one codec"
            )
        names = [codec_by_name(part.strip()).name for part in parts]
        return cls(names[0], names[-1])

    def __str__(self) -> str:
        return self.features if self.features == self.layers else f"{self.features}+{self.layers}"

    def of(self, layer: int) -> Codec:
        """The codec of a layer, 0 being the features."""
        return CODECS[self.features if layer == 0 else self.layers]


class FolderCodecs:
    """The codecs of one memory folder: those asked for, with what was learned from the tokens in it.

    Args:
        setting: which codecs.
        books: where what they learn is kept.
    """

    def __init__(self, setting: CodecSetting, books: Codebooks) -> None:
        self.setting = setting
        self.books = books
        self._digests: dict[tuple[str, str, int, int], str] = {}
        self._codecs: dict[tuple[str, str], Codec] = {}

    def wanted(self, model: str, *, width: int, num_layers: int) -> int:
        """How many tokens must be there to learn what is still to be learned; 0 if nothing is."""
        return max(
            (
                codec.learns_from
                for layer, codec in enumerate(self._asked(num_layers))
                if codec.learns and self._digest(codec.learns, model, width, layer) is None
            ),
            default=0,
        )

    def learn(self, model: str, blocks: Sequence[Tensor]) -> list[Codebook]:
        """Learn what is still to be learned; nothing is saved until `keep`.

        Args:
            model: fingerprint of the model the tokens are of.
            blocks: features, then each layer, (N, D) each; of the first `wanted` tokens in the folder.
        """
        width = blocks[0].shape[1]
        books = []
        for layer, (codec, block) in enumerate(zip(self._asked(len(blocks) - 1), blocks, strict=True)):
            if codec.learns and self._digest(codec.learns, model, width, layer) is None:
                used = block[: codec.learns_from]
                books.append(Codebook(codec.learns, model, width, layer, len(used), codec.learn(used.float())))
        return books

    def keep(self, books: Sequence[Codebook]) -> None:
        """Save codebooks and use them from now on.

        Raises:
            OSError: if the disk does not take them.
        """
        for book in books:
            self._digests[book.kind, book.model, book.width, book.layer] = self.books.save(book)

    def of(self, model: str, *, width: int, num_layers: int) -> tuple[Codec, ...]:
        """The codecs of the features and of each layer, each with its codebook where there is one."""
        codecs = []
        for layer, codec in enumerate(self._asked(num_layers)):
            digest = self._digest(codec.learns, model, width, layer) if codec.learns else None
            codecs.append(codec if digest is None else self.codec(codec.name, digest))
        return tuple(codecs)

    def codec(self, name: str, digest: str) -> Codec:
        """The codec that decodes what ``name`` encoded with this codebook; an empty digest means without one.

        Raises:
            BankError: if the codebook is missing or damaged.
        """
        if not digest:
            return CODECS[name]
        if (name, digest) not in self._codecs:
            self._codecs[name, digest] = CODECS[name].with_book(self.books.load(digest))
        return self._codecs[name, digest]

    def _asked(self, num_layers: int) -> list[Codec]:
        return [self.setting.of(layer) for layer in range(num_layers + 1)]

    def _digest(self, kind: str, model: str, width: int, layer: int) -> str | None:
        place = (kind, model, width, layer)
        if place not in self._digests:
            found = self.books.find(kind, model=model, width=width, layer=layer)
            if found is None:
                return None
            self._digests[place] = found
        return self._digests[place]


def codec_by_name(name: str) -> Codec:
    """The codec called ``name``.

    Raises:
        SettingsError: if there is none; the message suggests near names.
    """
    if name not in CODECS:
        raise SettingsError(f"there is no codec {name!r}; {near(name, CODECS)}")
    return CODECS[name]


def _outwards(low: NDArray[np.float32], high: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Lowest values and ranges as float16 so that they hold ``[low, high]``; not finite where float16 ends."""
    with np.errstate(over="ignore", invalid="ignore"):
        low16 = low.astype("<f2")
        low16 = np.where(low16 > low, np.nextafter(low16, np.float16(-np.inf)), low16)
        need = high.astype(np.float64) - low16.astype(np.float64)
        span16 = need.astype("<f2")
        span16 = np.where(span16 < need, np.nextafter(span16, np.float16(np.inf)), span16)
    return low16.astype("<f2"), span16.astype("<f2")


def _with_ranges(faiss: Any, quantizer: Any, trained: NDArray[np.float32]) -> Any:
    faiss.copy_array_to_vector(np.ascontiguousarray(trained, np.float32), quantizer.trained)
    return quantizer
