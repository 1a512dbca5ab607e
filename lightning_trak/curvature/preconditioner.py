"""How gradients are whitened: from how many examples, and how many entries are stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Of training examples and of targets, how many entries are kept: so many times proj_dim.
_ENTRIES = (1 / 8, 1.0)
_ENTRIES_OF_REST = (1 / 2, 4.0)  # there the largest hold less of the whole
_EXAMPLES, _EXAMPLES_OF_REST = (256, 1000), (128, 512)  # for eigenvectors and for eigenvalues
VERSION = 4  # count it up when the same examples come to other whitened features


@dataclass(frozen=True)
class Preconditioner:
    """How gradients are whitened and stored.

    At each checkpoint, labels are drawn from the predictions for some training examples. A pass over 256 of them gives
    the Kronecker factors of each parameter's Fisher information, a pass over 1000 its eigenvalues Λ; if labels are
    drawn of what the model output leaves open, 128 and 512 do. Gradients are then divided by √(Λ + λ) along the
    eigenvectors, and each training example's largest entries are stored. Scores are inner products of whitened
    gradients, times q / n: the influence with the inverse of the damped Fisher information, as in Grosse et al.,
    "Studying large language model generalization with influence functions", arXiv 2308.03296, Section 2.

    If labels are drawn of what the model output leaves open, the output's own curvature is added when scores are
    computed, see `OutputCurvature`.

    Attributes:
        entries: how many entries of each training example are stored: its largest.
        target_entries: how many of a target.
        damping: λ of each parameter, relative to its mean eigenvalue; ``"auto"``: see `whitening_damping`.
        basis_examples: how many training examples the eigenvectors are estimated from.
        examples: how many training examples the eigenvalues are estimated from.
        rest: whether labels are drawn of what the model output leaves open.
    """

    entries: int
    target_entries: int
    damping: float | str = "auto"
    basis_examples: int = _EXAMPLES[0]
    examples: int = _EXAMPLES[1]
    rest: bool = False

    @classmethod
    def of(cls, proj_dim: int, *, rest: bool) -> Preconditioner:
        """Return the defaults, with numbers of entries in proportion to ``proj_dim``.

        >>> Preconditioner.of(2048, rest=False).entries, Preconditioner.of(2048, rest=True).entries
        (256, 1024)
        """
        parts = _ENTRIES_OF_REST if rest else _ENTRIES
        entries, target_entries = (max(1, int(proj_dim * part)) for part in parts)
        few, many = _EXAMPLES_OF_REST if rest else _EXAMPLES
        return cls(entries, target_entries, basis_examples=few, examples=many, rest=rest)

    @property
    def configuration(self) -> dict[str, Any]:
        """All that stored features depend on, but λ, which can be changed: part of the store's manifest."""
        own = {name: value for name, value in asdict(self).items() if name != "damping"}
        return {"name": "kronecker", "version": VERSION, **own}
