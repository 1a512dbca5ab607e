"""Eigenvalue-corrected Kronecker factors of the Fisher information matrix, a pair for each parameter (EK-FAC)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.gradients import DenseGradient, Gradient, Sink
from lightning_trak.gradients.gradient import as_rows, is_word_table, matrix_shape

_VECTORS = 64  # of an example, at most, from which second moments are summed
CHUNK_BYTES = 2**24  # of gradients that are rotated at once: much larger arrays cost time to allocate
_LARGEST = 1024  # entries of an axis: a larger one gets no basis, since that takes the cube of them


class EigenBasis:
    """Two eigenbases of a parameter's gradients G, read as a matrix (O, I): Q_S of its rows, Q_A of its columns.

    An axis without a basis stays as it is: its second moment is taken for diagonal.

    Args:
        left: Q_S, (O, O), or None.
        right: Q_A, (I, I), or None.

    >>> from lightning_trak.gradients import DenseGradient
    >>> flip = torch.eye(2).flip(0)
    >>> EigenBasis(flip, None).rotate(DenseGradient(torch.tensor([[[1.0], [2.0]]])))
    tensor([[2., 1.]])
    """

    def __init__(self, left: Tensor | None, right: Tensor | None) -> None:
        self.left, self.right = left, right

    def rotate(self, gradient: Gradient) -> Tensor:
        """Return Q_Sᵀ G Q_A for every example, (b, O·I)."""
        if len(gradient.shape) < 2 or (self.left is None and self.right is None):
            rows = as_rows(gradient.dense())
            return rows if self.left is None else rows @ self.left.to(rows)
        if gradient.positions > max(matrix_shape(gradient.shape)):
            gradient = DenseGradient(gradient.dense())  # cheaper than to rotate what is summed at every position
        return gradient.sketch(self.left, self.right).flatten(1)

    def rotated(self, gradient: Gradient) -> Iterator[tuple[slice, Tensor]]:
        """Yield what `rotate` returns, in float32, a few examples at a time, with their rows."""
        for rows, part in gradient.split(CHUNK_BYTES):
            yield rows, self.rotate(part).float()


@dataclass(frozen=True)
class Curvature:
    """The Fisher information matrix of a loss, approximately: Q diag(Λ) Qᵀ for each parameter.

    Attributes:
        bases: Q = Q_S ⊗ Q_A of each parameter.
        eigenvalues: Λ of each parameter, (O·I,).
    """

    bases: Mapping[str, EigenBasis]
    eigenvalues: Mapping[str, Tensor]

    @property
    def means(self) -> dict[str, float]:
        """The mean of Λ of each parameter."""
        return {name: values.mean().item() for name, values in self.eigenvalues.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, to be stored."""
        found = {f"eigenvalues/{name}": value for name, value in self.eigenvalues.items()}
        for name, basis in self.bases.items():
            sides = {f"left/{name}": basis.left, f"right/{name}": basis.right}
            found |= {side: q for side, q in sides.items() if q is not None}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Curvature:
        """Return the curvature from what `tensors` returned."""
        start = "eigenvalues/"
        names = [name.removeprefix(start) for name in tensors if name.startswith(start)]
        bases = {name: EigenBasis(tensors.get(f"left/{name}"), tensors.get(f"right/{name}")) for name in names}
        return cls(bases, {name: tensors[start + name] for name in names})

    def to(self, device: torch.device) -> Curvature:
        """Return the curvature on a device."""
        return self.from_tensors({name: value.to(device) for name, value in self.tensors().items()})


class SecondMoments:
    """Adds up S = Σ l lᵀ and A = Σ r rᵀ of each parameter's gradients; see `Gradient.left_factor`.

    Takes per-sample gradients of a loss whose labels are drawn from the predictions: their outer products are, on
    average, the Fisher information. S ⊗ A is then the approximation of Martens and Grosse, "Optimizing neural networks
    with Kronecker-factored approximate curvature", arXiv 1503.05671.

    A parameter that is a vector has S alone, which is exact. Word tables and output layers over a vocabulary get no
    basis along the vocabulary: there S is close to diagonal.

    >>> from lightning_trak.gradients import OuterGradient
    >>> moments = SecondMoments()
    >>> with moments.batch() as sink:
    ...     sink(slice(0, 1), "weight", OuterGradient(torch.ones(1, 5, 2), torch.ones(1, 5, 3)))
    >>> moments.bases()["weight"].right.shape
    torch.Size([3, 3])
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    @contextmanager
    def batch(self, _: int = 1) -> Iterator[Sink]:
        """Yield a sink for the gradients of a batch. After an error nothing of the batch is kept."""
        parts: list[tuple[str, tuple[Tensor | None, Tensor | None]]] = []
        yield lambda _, name, gradient: parts.append((name, _moments(gradient)))
        for name, pair in parts:
            known = self._sums.get(name, (None, None))
            self._sums[name] = (_plus(known[0], pair[0]), _plus(known[1], pair[1]))

    def bases(self) -> dict[str, EigenBasis]:
        """Return the eigenbases of S and A of each parameter."""
        return {name: EigenBasis(*(_eigenvectors(one) for one in pair)) for name, pair in self._sums.items()}


def _moments(gradient: Gradient) -> tuple[Tensor | None, Tensor | None]:
    """Return the second moments of rows and columns; None along an axis that gets no basis."""
    rows, columns = _axes(gradient.shape)
    left, right = gradient.left_factor() if rows else None, gradient.right_factor() if columns else None
    return _second_moment(left, gradient.size), _second_moment(right, gradient.size)


def _axes(shape: torch.Size) -> tuple[bool, bool]:
    """Say of both axes of a parameter whether they get a basis."""
    rows, columns = matrix_shape(shape)
    vector = len(shape) < 2
    return (vector or not is_word_table(shape)) and rows <= _LARGEST, not vector and columns <= _LARGEST


def _second_moment(vectors: Tensor | None, size: int) -> Tensor | None:
    """Return Σ v vᵀ of vectors, (N, d) → (d, d), of at most 64 evenly spaced ones of each example."""
    if vectors is None:
        return None
    step = max(1, len(vectors) // max(1, _VECTORS * size)) | 1  # odd, so that all columns of an image have their turn
    some = vectors[::step].float()
    return step * some.mT @ some


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _eigenvectors(moment: Tensor | None) -> Tensor | None:
    """Return the eigenvectors of a second moment, (d, d); in float64 where float32 is too coarse for it."""
    if moment is None:
        return None
    with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined] # of low rank, with many equal eigenvalues
        vectors = torch.linalg.eigh(moment)[1]
        if bool(vectors.isfinite().all()):  # for want of that, LAPACK may say nothing
            return vectors
    return torch.linalg.eigh(moment.double().cpu())[1].to(moment)


class Eigenvalues:
    """Adds up Λ = E[(Q_Sᵀ G Q_A)²], the second moments of whole examples' gradients along the eigenvectors of S ⊗ A.

    George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", NeurIPS 2018, arXiv 1806.03884, Eq. 9.

    Args:
        bases: of each parameter.

    >>> from lightning_trak.gradients import DenseGradient
    >>> eigenvalues = Eigenvalues({"bias": EigenBasis(None, None)})
    >>> with eigenvalues.batch(2) as sink:
    ...     sink(slice(0, 2), "bias", DenseGradient(torch.tensor([[1.0], [3.0]])))
    >>> eigenvalues.curvature().eigenvalues
    {'bias': tensor([5.])}
    """

    def __init__(self, bases: Mapping[str, EigenBasis]) -> None:
        self._bases = bases
        self._sums: dict[str, Tensor] = {}
        self._examples = 0

    @contextmanager
    def batch(self, size: int) -> Iterator[Sink]:
        """Yield a sink for the gradients of ``size`` examples. After an error nothing of the batch is kept."""
        rotated: dict[str, Tensor] = {}

        def add(rows: slice, name: str, gradient: Gradient) -> None:
            """Add a part of a parameter's gradients: one that is used twice has two."""
            for some, part in self._bases.get(name, EigenBasis(None, None)).rotated(gradient):
                if name not in rotated:
                    rotated[name] = part.new_zeros(size, part.shape[1])
                rotated[name][rows][some] += part

        yield add
        for name, values in rotated.items():
            squares = values.square_().sum(0)
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares
        self._examples += size

    def curvature(self) -> Curvature:
        """Return the curvature, with Λ the mean over examples."""
        means = {name: total / self._examples for name, total in self._sums.items()}
        return Curvature({name: self._bases.get(name, EigenBasis(None, None)) for name in means}, means)
