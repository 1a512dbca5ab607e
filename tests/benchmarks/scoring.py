"""Gram, solve and scores over memory-mapped features, against the GEMM rate measured in the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lightning_trak.influence import Estimator, Options, Solved, TrainFeatures
from tests.benchmarks.measuring import print_table, seconds

N_TRAIN, N_TARGETS, PROJ_DIM = 50_000, 1_000, 2048


def run(n: int = N_TRAIN, m: int = N_TARGETS, k: int = PROJ_DIM) -> None:
    """Print the table."""
    header = ["what", "% of the GEMM rate", "seconds"]
    note = "Counted are 2nk² operations for H and 2nmk for the scores; H is symmetric, so fewer are done."
    print_table(f"Scoring, n = {n}, m = {m}, k = {k}", header, _rows(n, m, k), note)


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
