"""Per-sample gradients of one parameter, in the form that a layer yields: often two factors, not yet multiplied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

Matrix = Tensor | None
"""A matrix to multiply with; None for the identity."""


_DENSE_BYTES = 2**24  # of per-sample gradients that are added up at once
_VOCABULARY = 8  # a matrix with so many times more rows than columns is taken for a table of words
_SUMMED = 8  # examples of a convolution whose gradients are added up at once


class Gradient(ABC):
    """The gradients of one parameter for b examples, in a form from which they can be computed.

    A parameter of shape (O, ...) is also read as a matrix of O rows and I columns, where I is the product of the other
    axes.

    Attributes:
        size: b, the number of examples.
        shape: the parameter's shape.
        positions: the number of terms of which each gradient is the sum; 0 where that says nothing of the cost.
    """

    size: int
    shape: torch.Size
    positions: int = 0

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the gradients themselves, (b, *shape)."""

    @abstractmethod
    def sketch(self, left: Matrix, right: Matrix) -> Tensor:
        """Return LᵀGᵢR for every example's gradient Gᵢ read as (O, I): (O, r), (I, s) → (b, r, s)."""

    @abstractmethod
    def left_factor(self) -> Tensor | None:
        """Return l, (N, O), whose second moment is that of the columns of G read as (O, I).

        For Gᵢ = Σₜ lᵢₜ rᵢₜᵀ these are the factors themselves, as in K-FAC (Martens and Grosse, "Optimizing neural
        networks with Kronecker-factored approximate curvature", arXiv 1503.05671). For other forms these are the
        columns of G. None stands for unit vectors, whose second moment is diagonal.
        """

    @abstractmethod
    def right_factor(self) -> Tensor:
        """Return r, (M, I), whose second moment is that of the rows of G; see `left_factor`."""

    @abstractmethod
    def __getitem__(self, rows: slice) -> Gradient:
        """Return the gradients of some of the examples."""

    def fold(self, size: int) -> Gradient:
        """Sum the gradients of consecutive rows that belong to one example: b rows → ``size`` examples."""
        return _Folded(self, size)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return Σᵢ vᵢ Gᵢ, of the parameter's shape, for weights v, (b,)."""
        total = weights.new_zeros(self.shape)
        for rows, part in self.split(_DENSE_BYTES):
            total += torch.tensordot(weights[rows], part.dense().to(weights), 1)
        return total

    def split(self, max_bytes: int) -> Iterator[tuple[slice, Gradient]]:
        """Yield (rows, their gradients) in parts that take at most ``max_bytes`` when dense; one example at least."""
        rows = max(1, max_bytes // (4 * max(1, prod(self.shape))))
        if rows >= self.size:
            yield slice(0, self.size), self
            return
        for start in range(0, self.size, rows):
            part = slice(start, min(start + rows, self.size))
            yield part, self[part]


def as_rows(values: Tensor) -> Tensor:
    """Return (b, *shape) as (b, entries); a parameter may be a single number.

    >>> as_rows(torch.ones(3)).shape, as_rows(torch.ones(3, 2, 2)).shape
    (torch.Size([3, 1]), torch.Size([3, 4]))
    """
    return values.reshape(len(values), prod(values.shape[1:]))


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return (O, I) for a parameter of this shape, read as a matrix.

    >>> matrix_shape(torch.Size((4, 3, 2))), matrix_shape(torch.Size((5,))), matrix_shape(torch.Size(()))
    ((4, 6), (5, 1), (1, 1))
    """
    return (shape[0] if shape else 1), prod(shape[1:])


def is_word_table(shape: torch.Size) -> bool:
    """Say whether a parameter with O ≥ 8 I is taken for a table of words, or an output layer over them."""
    rows, columns = matrix_shape(shape)
    return rows >= _VOCABULARY * columns


class DenseGradient(Gradient):
    """Gradients as one tensor, (b, *shape).

    >>> DenseGradient(torch.ones(2, 3, 4)).sketch(None, torch.ones(4, 1)).shape
    torch.Size([2, 3, 1])
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.size, self.shape = len(values), values.shape[1:]

    def dense(self) -> Tensor:
        """Return the gradients."""
        return self.values

    def sketch(self, left: Matrix, right: Matrix) -> Tensor:
        """See `Gradient.sketch`."""
        return _sketch(self.values, left, right)

    def left_factor(self) -> Tensor:
        """Return the columns of all G; see `Gradient.left_factor`."""
        return self.values.reshape(self.size, *matrix_shape(self.shape)).mT.flatten(0, 1)

    def right_factor(self) -> Tensor:
        """Return the rows of all G; see `Gradient.right_factor`."""
        return self.values.reshape(self.size, *matrix_shape(self.shape)).flatten(0, 1)

    def __getitem__(self, rows: slice) -> DenseGradient:
        return DenseGradient(self.values[rows])

    def fold(self, size: int) -> DenseGradient:
        """See `Gradient.fold`."""
        return DenseGradient(self.values.unflatten(0, (size, -1)).sum(1))


class OuterGradient(Gradient):
    """Gᵢ = Σₜ lᵢₜ rᵢₜᵀ, e.g. of a linear layer: l is the gradient of its output, r its input, t a position.

    Args:
        left: l, (b, ..., O), with any number of axes for positions.
        right: r, (b, ..., I), at the same positions.

    >>> gradient = OuterGradient(torch.ones(2, 5, 3), torch.ones(2, 5, 4))
    >>> gradient.dense()[0, 0]
    tensor([5., 5., 5., 5.])
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        left, right = _same_dtype(left, right)
        self.left = left.reshape(len(left), prod(left.shape[1:-1]), left.shape[-1])
        self.right = right.reshape(self.left.shape[:2] + right.shape[-1:])
        self.size, self.shape = len(left), torch.Size((left.shape[-1], right.shape[-1]))
        self.positions = self.left.shape[1]

    def dense(self) -> Tensor:
        """Multiply, sum over positions."""
        return self.left.mT @ self.right

    def sketch(self, left: Matrix, right: Matrix) -> Tensor:
        """Project the factors before they are multiplied; see `Gradient.sketch`."""
        return _times(self.left, left).mT @ _times(self.right, right)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Treat the examples as positions; see `Gradient.weighted_sum`."""
        left = self.left.to(weights) * weights[:, None, None]
        return left.flatten(0, 1).T @ self.right.to(weights).flatten(0, 1)

    def left_factor(self) -> Tensor:
        """Return l at all positions; see `Gradient.left_factor`."""
        return self.left.flatten(0, 1)

    def right_factor(self) -> Tensor:
        """Return r at all positions; see `Gradient.right_factor`."""
        return self.right.flatten(0, 1)

    def __getitem__(self, rows: slice) -> OuterGradient:
        return OuterGradient(self.left[rows], self.right[rows])

    def fold(self, size: int) -> OuterGradient:
        """Treat the rows of an example as positions."""
        return OuterGradient(*(factor.reshape(size, -1, factor.shape[-1]) for factor in (self.left, self.right)))


class RowsGradient(Gradient):
    """Gᵢ = Σₜ e(indexᵢₜ) valueᵢₜᵀ, e.g. of an embedding: a few rows of a table are not zero; e(j) is unit vector j.

    Args:
        indices: (b, ...), rows of the table.
        values: (b, ..., I), what is added to these rows.
        rows: O, the number of rows of the table.

    >>> RowsGradient(torch.tensor([[2, 2]]), torch.ones(1, 2, 1), rows=3).dense()
    tensor([[[0.],
             [0.],
             [2.]]])
    """

    def __init__(self, indices: Tensor, values: Tensor, rows: int) -> None:
        self.indices = indices.reshape(len(values), prod(indices.shape[1:]))
        self.values = values.reshape(*self.indices.shape, values.shape[-1])
        self.size, self.shape = len(values), torch.Size((rows, values.shape[-1]))

    def dense(self) -> Tensor:
        """Add the values into tables of zeros."""
        tables = self.values.new_zeros(self.size, *self.shape)
        return tables.scatter_add_(1, self.indices[:, :, None].expand_as(self.values), self.values)

    def sketch(self, left: Matrix, right: Matrix) -> Tensor:
        """Look up the rows of ``left`` instead of multiplying by it; see `Gradient.sketch`."""
        if left is None:
            return RowsGradient(self.indices, _times(self.values, right), self.shape[0]).dense()
        return left.to(self.values.dtype)[self.indices].mT @ _times(self.values, right)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Add all values into one table; see `Gradient.weighted_sum`."""
        values = self.values.to(weights) * weights[:, None, None]
        return weights.new_zeros(self.shape).index_add_(0, self.indices.flatten(), values.flatten(0, 1))

    def left_factor(self) -> None:
        """Return None: the factors are unit vectors; see `Gradient.left_factor`."""

    def right_factor(self) -> Tensor:
        """Return the values; see `Gradient.right_factor`."""
        return self.values.flatten(0, 1)

    def __getitem__(self, rows: slice) -> RowsGradient:
        return RowsGradient(self.indices[rows], self.values[rows], self.shape[0])

    def fold(self, size: int) -> RowsGradient:
        """Treat the rows of an example as positions."""
        indices, values = self.indices.reshape(size, -1), self.values.reshape(size, -1, self.shape[1])
        return RowsGradient(indices, values, self.shape[0])


class ConvGradient(Gradient):
    """Gᵢ[o, c, κ] = Σₛ gᵢ[o, s] aᵢ[c, stride·s + dilation·κ − padding]: the gradients of a convolution's weight.

    ``sketch`` convolves the input with R instead of unfolding it. So no per-sample gradient is formed, and no unfolded
    input, which would be larger than the input by the size of the kernel.

    Args:
        inputs: a, (b, C, *spatial), already padded, unless with equally many zeros on both sides.
        grads: g, (b, O, *positions).
        shape: of the weight, (O, C / groups, *kernel).
        stride: one number for each axis; so are ``padding`` and ``dilation``.
        padding: zeros on both sides.
        dilation: distance of the kernel's taps.
        groups: number of independent groups of channels.
    """

    def __init__(
        self,
        inputs: Tensor,
        grads: Tensor,
        shape: torch.Size,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
    ) -> None:
        self.inputs, self.grads = _same_dtype(inputs, grads)
        self.shape, self.groups = shape, groups
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.size, self.positions = len(inputs), prod(grads.shape[2:])

    def dense(self) -> Tensor:
        """Unfold the input, and multiply."""
        columns = self._columns()
        grads = self.grads.reshape(self.size, self.groups, self.shape[0] // self.groups, columns.shape[-1])
        return (grads @ columns.mT).reshape(self.size, *self.shape)

    def sketch(self, left: Matrix, right: Matrix) -> Tensor:
        """Convolve the input with ``right``; see `Gradient.sketch`."""
        if self.groups > 1:
            return _sketch(self.dense(), left, right)
        grads = self.grads.flatten(2)
        projected = grads if left is None else left.to(grads.dtype).T @ grads
        return projected @ self._inputs_times(right).mT

    def _inputs_times(self, right: Matrix) -> Tensor:
        """Return the unfolded inputs times ``right``, (b, s, positions)."""
        if right is None or prod(self.shape[2:]) == 1 == max(self.stride):
            columns = self._columns()[:, 0]
            return columns if right is None else right.to(columns.dtype).T @ columns
        return self._convolve(self.inputs, right.T.reshape(-1, *self.shape[1:])).flatten(2)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Add up in a convolution's own backward pass, a few examples at a time; see `Gradient.weighted_sum`."""
        kernel = weights.new_zeros(self.shape).requires_grad_()
        total, scaled = weights.new_zeros(self.shape), weights.view(-1, *[1] * (self.grads.ndim - 1))
        for start in range(0, self.size, _SUMMED):
            part = slice(start, start + _SUMMED)
            with torch.enable_grad():
                outputs = self._convolve(self.inputs[part].to(weights), kernel)
            total += torch.autograd.grad(outputs, kernel, (self.grads[part] * scaled[part]).to(outputs))[0]
        return total

    def _convolve(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """Convolve, and return the positions that have an output gradient."""
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.stride) - 1]
        outputs = convolve(inputs, kernel.to(inputs), None, self.stride, self.padding, self.dilation, self.groups)
        for axis, length in enumerate(self.grads.shape[2:], 2):
            outputs = outputs.narrow(axis, 0, length)
        return outputs

    def _columns(self) -> Tensor:
        """Return the unfolded inputs, (b, groups, C / groups · kernel, positions)."""
        zeros = [n for padding in reversed(self.padding) for n in (padding, padding)]
        columns = torch.nn.functional.pad(self.inputs, zeros) if any(zeros) else self.inputs
        axes = len(self.stride)
        for axis in range(axes):
            taps = self.dilation[axis] * (self.shape[2 + axis] - 1) + 1
            windows = columns.unfold(2 + axis, taps, self.stride[axis])[..., :: self.dilation[axis]]
            columns = windows.narrow(2 + axis, 0, self.grads.shape[2 + axis])
        order = [0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes)]
        per_group = self.inputs.shape[1] // self.groups * prod(self.shape[2:])
        return columns.permute(order).reshape(self.size, self.groups, per_group, prod(self.grads.shape[2:]))

    def left_factor(self) -> Tensor:
        """Return output gradients at all positions; see `Gradient.left_factor`."""
        return self.grads.flatten(2).mT.flatten(0, 1)

    def right_factor(self) -> Tensor:
        """Return unfolded inputs at all positions; see `Gradient.right_factor`."""
        return self._columns().mT.flatten(0, 2)

    def __getitem__(self, rows: slice) -> ConvGradient:
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return ConvGradient(self.inputs[rows], self.grads[rows], self.shape, groups=self.groups, **options)


class _Folded(Gradient):
    """Sums over consecutive rows, for gradients that must be computed before their rows can be added."""

    def __init__(self, rows: Gradient, size: int) -> None:
        self._rows, self.size, self.shape = rows, size, rows.shape
        self.positions = rows.positions * rows.size // size if size else 0

    def dense(self) -> Tensor:
        return self._rows.dense().unflatten(0, (self.size, -1)).sum(1)

    def sketch(self, left: Matrix, right: Matrix) -> Tensor:
        return self._rows.sketch(left, right).unflatten(0, (self.size, -1)).sum(1)

    def left_factor(self) -> Tensor | None:
        return self._rows.left_factor()

    def right_factor(self) -> Tensor:
        return self._rows.right_factor()

    def __getitem__(self, rows: slice) -> Gradient:
        count = self._rows.size // self.size
        part = range(self.size)[rows]
        return _Folded(self._rows[part.start * count : part.stop * count], len(part))

    def fold(self, size: int) -> Gradient:
        return _Folded(self._rows, size)


def _same_dtype(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Convert to a common dtype: under autocast, a layer's input and output gradient may differ in precision."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.to(dtype), other.to(dtype)


def _times(factor: Tensor, matrix: Matrix) -> Tensor:
    return factor if matrix is None else factor @ matrix.to(factor.dtype)


def _sketch(values: Tensor, left: Matrix, right: Matrix) -> Tensor:
    """Multiply dense gradients, (b, O, ...), from both sides."""
    rows = values.flatten(2)
    sketched = rows if left is None else left.to(rows.dtype).T @ rows
    return _times(sketched, right)
