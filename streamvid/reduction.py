"""A decision about tokens, as data: which inputs make up each output, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reduction:
    """A sparse (M, N) matrix from N input tokens to M outputs; built by the constructors below.

    A selection stores only the kept indices and never builds the matrix: applying it is one gather.
    Everything else is stored as coordinate triples.  Rows may have any weights (a mean has rows that
    sum to one, a fused token may not); ``apply`` uses them as given, ``locate`` normalises them.
    """

    num_inputs: int
    """N"""

    keep: Tensor | None = None
    """(M,) int64 indices of a selection, else None."""

    rows: Tensor | None = None
    """(K,) int64 output of each entry, ascending."""

    columns: Tensor | None = None
    """(K,) int64 input of each entry."""

    weights: Tensor | None = None
    """(K,) float32 weight of each entry, > 0."""

    num_outputs: int = 0
    """M"""

    features: Tensor | None = None
    """(M, D) outputs computed afresh by the method; None when they follow from the matrix."""

    @classmethod
    def keep_all(cls, num_inputs: int) -> Self:
        """Every input stays as it is."""
        return cls(num_inputs, keep=torch.arange(num_inputs), num_outputs=num_inputs)

    @classmethod
    def select(cls, keep: Tensor, num_inputs: int) -> Self:
        """Keep some inputs, in the order given.

        Args:
            keep: (M,) int64 indices, or an (N,) bool mask (kept order).
            num_inputs: N.

        Raises:
            ValueError: if an index is out of range or occurs twice.
        """
        if keep.dtype == torch.bool:
            if keep.shape != (num_inputs,):
                raise ValueError(f"a mask must have one entry per input ({num_inputs}), got {keep.shape = }")
            keep = keep.nonzero().squeeze(1)
        keep = keep.to(torch.int64)
        if keep.ndim != 1:
            raise ValueError(f"keep must be one-dimensional, got {keep.shape = }")
        if len(keep) and (int(keep.min()) < 0 or int(keep.max()) >= num_inputs):
            raise ValueError(f"indices must be in [0, {num_inputs}), got {int(keep.min())} to {int(keep.max())}")
        if len(torch.unique(keep)) != len(keep):
            raise ValueError("an input may be selected only once; use mix to repeat one")
        return cls(num_inputs, keep=keep, num_outputs=len(keep))

    @classmethod
    def merge(cls, group: Tensor, size: Tensor | None = None) -> Self:
        """Fold inputs into the group they carry; a group's output is the mean of its members.

        Args:
            group: (N,) int64 group of each input: 0..M-1 with no gaps, or -1 to drop the input.
            size: (N,) weight of each input in its mean (how many originals it stands for); None for equal.
        """
        num_inputs = len(group)
        inside = group >= 0
        columns = inside.nonzero().squeeze(1)
        rows = group[inside].to(torch.int64)
        count = int(rows.max()) + 1 if len(rows) else 0
        if len(torch.unique(rows)) != count:
            raise ValueError("groups must be numbered 0..M-1 without gaps")
        weight = torch.ones(len(rows)) if size is None else size[inside].float().to("cpu")
        rows, columns = rows.cpu(), columns.cpu()
        total = torch.zeros(count).index_add_(0, rows, weight)
        order = torch.argsort(rows, stable=True)
        return cls(
            num_inputs,
            rows=rows[order],
            columns=columns[order],
            weights=(weight / total[rows])[order],
            num_outputs=count,
        )

    @classmethod
    def mix(
        cls,
        rows: Tensor,
        columns: Tensor,
        weights: Tensor,
        *,
        num_inputs: int,
        num_outputs: int,
        features: Tensor | None = None,
    ) -> Self:
        """Any sparse matrix, as coordinate triples; every output needs at least one entry, weights are positive.

        Args:
            rows: (K,) int64 output of each entry.
            columns: (K,) int64 input of each entry.
            weights: (K,) float, > 0.
            num_inputs: N.
            num_outputs: M.
            features: (M, D) outputs computed afresh (by a learned module); the matrix then only says
                where they came from.
        """
        if not rows.shape == columns.shape == weights.shape or rows.ndim != 1:
            raise ValueError(f"entries must be of one length: {rows.shape = } {columns.shape = } {weights.shape = }")
        if len(torch.unique(rows)) != num_outputs or (len(rows) and int(rows.max()) >= num_outputs):
            raise ValueError(f"each of the {num_outputs} outputs needs an entry, got {len(torch.unique(rows))} rows")
        if len(columns) and (int(columns.min()) < 0 or int(columns.max()) >= num_inputs):
            raise ValueError(f"columns must be in [0, {num_inputs})")
        if bool((weights <= 0).any()):
            raise ValueError("weights must be positive; leave an entry out instead of giving it zero")
        if features is not None and len(features) != num_outputs:
            raise ValueError(f"fresh features must have {num_outputs} rows, got {features.shape = }")
        order = torch.argsort(rows, stable=True).cpu()
        return cls(
            num_inputs,
            rows=rows.to("cpu", torch.int64)[order],
            columns=columns.to("cpu", torch.int64)[order],
            weights=weights.to("cpu", torch.float32)[order],
            num_outputs=num_outputs,
            features=features,
        )

    @property
    def is_selection(self) -> bool:
        """Whether every output is one untouched input."""
        return self.keep is not None

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes at all."""
        return (
            self.keep is not None
            and self.num_outputs == self.num_inputs
            and bool((self.keep == torch.arange(self.num_inputs, device=self.keep.device)).all())
        )

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """The matrix as (rows, columns, weights), ordered by row."""
        if self.keep is not None:
            keep = self.keep.cpu()
            return torch.arange(len(keep)), keep, torch.ones(len(keep))
        assert self.rows is not None and self.columns is not None and self.weights is not None
        return self.rows, self.columns, self.weights

    def apply(self, x: Tensor) -> Tensor:
        """Outputs from inputs with the weights as given.

        Args:
            x: (N, ...) one row per input.

        Returns:
            (M, ...) in the dtype and on the device of ``x``; sums run in float32 or wider.
        """
        self._check(x)
        if self.keep is not None:
            return x[self.keep.to(x.device)]
        if self.features is not None and self.features.shape[1:] == x.shape[1:]:
            return self.features.to(x.device, x.dtype)
        return self._product(x, *self.entries()[:2], self.entries()[2], self.num_outputs)

    def locate(self, x: Tensor) -> Tensor:
        """Weighted means of the inputs (rows normalised to one): for positions and times.

        Returns:
            (M, ...) floating; stays inside the range of the inputs each output is made of.
        """
        self._check(x)
        if self.keep is not None:
            return x[self.keep.to(x.device)]
        rows, columns, weights = self.entries()
        total = torch.zeros(self.num_outputs, dtype=torch.float64).index_add_(0, rows, weights.double())
        wide = x.double() if not x.is_floating_point() else x
        return self._product(wide, rows, columns, weights.double() / total[rows], self.num_outputs)

    def total(self, size: Tensor) -> Tensor:
        """Sizes of the outputs: each input's size is shared out among the outputs that use it.

        The sum over outputs equals the sum over the inputs that are used at all.
        """
        self._check(size)
        if self.keep is not None:
            return size[self.keep.to(size.device)]
        rows, columns, weights = self.entries()
        used = torch.zeros(self.num_inputs, dtype=torch.float64).index_add_(0, columns, weights.double())
        return self._product(size, rows, columns, weights.double() / used[columns], self.num_outputs)

    def spread(self, y: Tensor) -> Tensor:
        """Send outputs back to where they came from.

        Args:
            y: (M, ...) one row per output.

        Returns:
            (N, ...): each input gets the weighted mean of the outputs it went into, zero if it was dropped.
        """
        if len(y) != self.num_outputs:
            raise ValueError(f"spread expects {self.num_outputs} outputs, got {y.shape = }")
        if self.keep is not None:
            out = y.new_zeros(self.num_inputs, *y.shape[1:])
            return out.index_copy(0, self.keep.to(y.device), y)
        rows, columns, weights = self.entries()
        used = torch.zeros(self.num_inputs, dtype=torch.float64).index_add_(0, columns, weights.double())
        return self._product(y, columns, rows, weights.double() / used[columns], self.num_inputs)

    def leader(self) -> Tensor:
        """(M,) int64: the heaviest source of each output, the earliest where weights tie."""
        if self.keep is not None:
            return self.keep
        rows, columns, weights = self.entries()
        order = torch.argsort(columns, stable=True)
        order = order[torch.argsort(weights[order], descending=True, stable=True)]
        order = order[torch.argsort(rows[order], stable=True)]
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = rows[order][1:] != rows[order][:-1]
        return columns[order][first]

    def then(self, second: Reduction) -> Reduction:
        """This reduction followed by another, as one.

        Raises:
            ValueError: if the second does not take as many inputs as this one gives.
        """
        if second.num_inputs != self.num_outputs:
            raise ValueError(f"cannot chain: {self.num_outputs} outputs into {second.num_inputs} inputs")
        if self.keep is not None and second.keep is not None:
            return Reduction(
                self.num_inputs, keep=self.keep[second.keep.to(self.keep.device)], num_outputs=len(second.keep)
            )
        features = second.features
        if features is None and self.features is not None:
            features = second.apply(self.features)
        if self.keep is not None:
            rows, columns, weights = second.entries()
            return Reduction.mix(
                rows,
                self.keep.cpu()[columns],
                weights,
                num_inputs=self.num_inputs,
                num_outputs=second.num_outputs,
                features=features,
            )
        # A join by hand: torch's sparse product warns that it is in beta, and warnings are errors in our tests.
        outer, middle, outer_weights = second.entries()
        inner, source, inner_weights = self.entries()
        count = torch.bincount(inner, minlength=self.num_outputs)
        each = count[middle]
        entry = torch.repeat_interleave(torch.arange(len(middle)), each)
        nth = torch.arange(len(entry)) - (each.cumsum(0) - each)[entry]
        match = (count.cumsum(0) - count)[middle][entry] + nth
        place, where = torch.unique(outer[entry] * self.num_inputs + source[match], return_inverse=True)
        weights = torch.zeros(len(place)).index_add_(0, where, outer_weights[entry] * inner_weights[match])
        rows, columns = place // self.num_inputs, place % self.num_inputs
        return Reduction.mix(
            rows,
            columns,
            weights,
            num_inputs=self.num_inputs,
            num_outputs=second.num_outputs,
            features=features,
        )

    def sorted(self) -> Reduction:
        """The same outputs in the order of their leaders: raster and time order."""
        order = torch.argsort(self.leader(), stable=True)
        if bool((order == torch.arange(len(order), device=order.device)).all()):
            return self
        return self.then(Reduction.select(order, self.num_outputs))

    def _check(self, x: Tensor) -> None:
        if len(x) != self.num_inputs:
            raise ValueError(f"this reduction takes {self.num_inputs} inputs, got {x.shape = }")

    @staticmethod
    def _product(x: Tensor, rows: Tensor, columns: Tensor, weights: Tensor, count: int) -> Tensor:
        """Sum of ``weights * x[columns]`` into ``rows``; float32 inside unless ``x`` is wider."""
        inside = torch.float64 if x.dtype == torch.float64 else torch.float32
        dtype = x.dtype if x.is_floating_point() else inside
        rows, columns, weights = (t.to(x.device) for t in (rows, columns, weights))
        scaled = x[columns].to(inside) * weights.to(inside).reshape(-1, *(1,) * (x.ndim - 1))
        return x.new_zeros(count, *x.shape[1:], dtype=inside).index_add_(0, rows, scaled).to(dtype)
