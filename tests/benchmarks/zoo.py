"""Which engine differentiates each architecture of the zoo, and how far its gradients are from the slow loop's."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.measuring import print_table
from tests.gradients.test_zoo import compare
from tests.gradients.zoo import ZOO


def run() -> None:
    """Print the table."""
    header = ["architecture", "parameters", "by hooks", "the others by", "largest difference"]
    note = "The largest difference of a parameter's gradients from the loop's, relative to all gradients, in float32."
    print_table("Per-sample gradients of published architectures, built small", header, _rows(), note)


def _rows() -> Iterator[list[str]]:
    for name in ZOO:
        engine, worst = compare(name)
        by_hooks, left = len(engine._handled), len(engine._other_names)
        others = f"{engine._others.name}: {left}" if engine._others else "–"
        yield [name, str(by_hooks + left), str(by_hooks), others, f"{worst:.0e}"]
