"""Gram, solve and scores over memory-mapped features, against the GEMM rate measured in the same run.

And products of sparse rows, as whitened gradients are, against the rate at which memory is copied.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lightning_trak.features.sparse_matrix import SparseMatrix
from lightning_trak.influence import Estimator, Options, Solved, TrainFeatures
from tests.benchmarks.measuring import print_table, seconds

N_TRAIN, N_TARGETS, PROJ_DIM = 50_000, 1_000, 2048
PARAMETERS, ENTRIES, TARGET_ENTRIES, SAMPLE = 1_000_000, 256, 2048, 4096  # of whitened gradients


def run(n: int = N_TRAIN, m: int = N_TARGETS, k: int = PROJ_DIM) -> None:
    """Print the table."""
    header = ["what", "% of the GEMM rate", "seconds"]
    note = "Counted are 2nk² operations for H and 2nmk for the scores; H is symmetric, so fewer are done."
    print_table(f"Scoring, n = {n}, m = {m}, k = {k}", header, _rows(n, m, k), note)
    header = ["products of sparse rows", "% of the memory rate", "seconds"]
    note = "Counted are 4 bytes for each entry and each row that it is multiplied with. A copy counts twice."
    title = (
        f"Whitened gradients, {ENTRIES} of {PARAMETERS} entries for each of {n} examples, {TARGET_ENTRIES} of a target"
    )
    print_table(title, header, _sparse_rows(n, m), note)


def _rows(n: int, m: int, k: int) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory() as root:
        train, targets = _mapped(Path(root) / "features.npy", n, k), torch.randn(m, k)
        gemm = _gemm_rate(k)
        estimator, solved = Estimator([train], Options(damping=0.3)), list[Solved]()
        solving = seconds(lambda: solved.append(estimator.solve(train, targets)))  # H, Cholesky, solve
        scoring = seconds(lambda: estimator.scores(solved))
        ranking = seconds(lambda: estimator.extremes(solved, k=10))
        gemm = (gemm + _gemm_rate(k)) / 2
        kernel, products = 2 * n * k * k, 2 * n * m * k
        for name, operations, time in (
            ("H and its solution", kernel, solving),
            ("scores", products, scoring),
            ("top 10 of the scores", products, ranking),
            ("H, its solution and scores", kernel + products, solving + scoring),
            ("H, its solution and top 10", kernel + products, solving + ranking),
        ):
            yield [name, f"{100 * operations / time / gemm:.0f}", f"{time:.2f}"]


def _sparse_rows(n: int, m: int) -> Iterator[list[str]]:
    generator = torch.Generator().manual_seed(0)
    train, targets = _sparse(n, ENTRIES, generator), _sparse(m, TARGET_ENTRIES, generator)
    sample, memory = train[torch.arange(min(n, SAMPLE))], _memory_rate()
    with_targets, among = seconds(lambda: train @ targets.T), seconds(sample.gram)
    memory = (memory + _memory_rate()) / 2
    products = {"of all examples with targets": (n * ENTRIES * m, with_targets)}
    products[f"of {len(sample)} examples with each other"] = (len(sample) ** 2 * ENTRIES, among)
    for name, (count, time) in products.items():
        yield [name, f"{100 * 4 * count / time / memory:.0f}", f"{time:.2f}"]


def _sparse(rows: int, entries: int, generator: torch.Generator) -> SparseMatrix:
    """Return random rows, with most entries among the first columns; a column may come twice."""
    uniform = torch.rand(rows, entries, generator=generator)
    columns = (PARAMETERS**uniform).long() - 1  # Zipf's law
    return SparseMatrix(columns, torch.randn(rows, entries, generator=generator))


def _memory_rate() -> float:
    """Return the bytes per second that are read and written in copying 256 MiB."""
    one, other = torch.ones(2**26), torch.empty(2**26)
    other.copy_(one)
    return 2 * 2**28 / min(seconds(lambda: other.copy_(one)) for _ in range(5))


def _mapped(path: Path, n: int, k: int) -> TrainFeatures:
    """Write random features, and map them as the store does."""
    rng = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (n, k))
    for start in range(0, n, 4096):
        array[start : start + 4096] = rng.standard_normal(array[start : start + 4096].shape, dtype=np.float32)
    array.flush()
    p = rng.uniform(size=n).astype(np.float32)
    return TrainFeatures(np.load(path, mmap_mode="c"), 1 - p, p * (1 - p))


def _gemm_rate(k: int) -> float:
    """Return the operations per second of torch's float32 GEMM, at its best shape here."""
    left, right = torch.randn(4096, k), torch.randn(k, k)
    left @ right
    return 2 * 4096 * k * k / min(seconds(lambda: left @ right) for _ in range(5))
