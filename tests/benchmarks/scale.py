"""Scores of many examples from a store on disk: memory, and time beside the limits of disk and GEMM in the same run."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lightning_trak.influence import Estimator, Options, Solved, TrainFeatures
from lightning_trak.store.chunks import Chunks
from lightning_trak.store.store import FeatureStore
from lightning_trak.trainer.attributing.scoring import Scoring
from lightning_trak.trainer.featurizing.train_features import StoredFeatures
from tests.benchmarks.measuring import print_table, seconds, trainer

LARGE = (  # n, m, k, checkpoints, top_k
    (1_000_000, 10_000, 512, 1, None),
    (200_000, 5_000, 2048, 1, 100),
)
BASE = (50_000, 1_000, 512, 1, None)
_ROWS = 1024  # in a chunk: 2 MiB of 512 features
_BLOCK = 2**23


def run(large: tuple[tuple[Any, ...], ...] = LARGE, base: tuple[Any, ...] = BASE, factor: int = 4) -> None:
    """Print both tables."""
    header = ["n", "m", "k", "checkpoints", "top_k", "H, s", "scores, s", "of the limits", "anonymous memory"]
    note = (
        "The limits: reading all features twice, all products, and writing all scores, at the rates of plain files and"
        " of torch's GEMM in the same run. Scores stay on disk, unless top_k is given; memory is the most above that of"
        " the start."
    )
    print_table("Large stores", header, map(_row, large), note)
    n, m, k, checkpoints, top_k = base
    grown = [base, (factor * n, m, k, checkpoints, top_k), (n, factor * m, k, checkpoints, top_k)]
    grown += [(n, m, factor * k, checkpoints, top_k), (n, m, k, factor * checkpoints, top_k)]
    print_table(f"Growth, each number times {factor} in turn", header, map(_row, grown))


def _row(case: tuple[Any, ...]) -> list[str]:
    """Measure a case."""
    found = measure(*case)
    n, m, k, checkpoints, top_k = case
    fraction = found["limit"] / (found["solving"] + found["scoring"])
    cells = [f"{n:,}", f"{m:,}", str(k), str(checkpoints), str(top_k or "all")]
    times = [f"{found['solving']:.1f}", f"{found['scoring']:.1f}", f"{100 * fraction:.0f} %"]
    return [*cells, *times, f"{found['memory'] / 1e6:.0f} MB"]


def measure(n: int, m: int, k: int, checkpoints: int, top_k: int | None) -> dict[str, float]:
    """Return seconds of H and of the scores, the seconds that limits allow, and the most memory in bytes."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as root:
        folder = Path(root)
        trains = [_written(folder / f"train{number}", n, k, number) for number in range(checkpoints)]
        targets = [torch.randn(m, k) for _ in trains]
        estimator, solved = Estimator(trains, Options(damping=0.3)), list[Solved]()
        limit = _limit(folder, n, m, k, checkpoints, written=top_k is None)
        with PeakMemory() as peak:
            pairs = list(zip(trains, targets, strict=True))
            solving = seconds(lambda: solved.extend(estimator.solve(train, phi) for train, phi in pairs))
            scoring = seconds(_scoring(folder, estimator, solved, n, top_k))
        return {"solving": solving, "scoring": scoring, "limit": limit, "memory": peak[0]}


def _written(folder: Path, n: int, k: int, seed: int) -> TrainFeatures:
    """Write random features in chunks."""
    chunks, rng = Chunks(folder, "benchmark", n, max(1, _ROWS * 512 // k)), np.random.default_rng(seed)
    for rows in chunks.all():
        chunks.write(rows.start, {"features": rng.standard_normal((len(rows), k), dtype=np.float32)})
    p = rng.uniform(size=n).astype(np.float32)
    return TrainFeatures(StoredFeatures(chunks), 1 - p, p * (1 - p))


def _scoring(
    folder: Path, estimator: Estimator, solved: list[Solved], n: int, top_k: int | None
) -> Callable[[], object]:
    """Return what computes all scores, on disk; or their extremes."""
    manifest = {"n_train": n, "parameters": {}, "projection": {}, "chunk_rows": 1}
    entries = [SimpleNamespace(place=str(number), created=1, derived=folder, meta={}) for number in range(len(solved))]
    store = FeatureStore.create(folder / "store", manifest)
    job: Any = SimpleNamespace(store=store, entries=entries, memory_limit=0, trainer=trainer(folder))
    targets: Any = SimpleNamespace(digest="0" * 32, kept=True, outputs=torch.zeros(len(solved[0].vectors)), reader=None)
    scoring = Scoring(job, estimator, targets, lambda: solved)
    return scoring.scores if top_k is None else lambda: scoring.extremes(top_k)


def _limit(folder: Path, n: int, m: int, k: int, checkpoints: int, *, written: bool) -> float:
    """Return the seconds that plain reading, writing and multiplying would take."""
    sample = [path for _, path in zip(range(64), sorted((folder / "train0").iterdir()), strict=False)]
    size = sum(path.stat().st_size for path in sample)
    reading = seconds(lambda: [path.read_bytes() for path in sample]) / size
    count = max(1, min(8, 4 * n * m // _BLOCK))
    writing = seconds(lambda: _write(folder / "written", count)) / (count * _BLOCK)
    left, right = torch.randn(4096, k), torch.randn(k, max(256, min(m, 2048)))
    left @ right
    product = min(seconds(lambda: left @ right) for _ in range(3)) / (4096 * right.shape[1])
    bytes_read, bytes_written = 2 * 4 * n * k * checkpoints, 4 * n * m * written
    return reading * bytes_read + writing * bytes_written + product * checkpoints * (n * k / 2 + n * m)


def _write(folder: Path, count: int) -> None:
    """Write as many blocks as plain files."""
    folder.mkdir()
    block = os.urandom(_BLOCK)
    for number in range(count):
        with open(folder / str(number), "wb") as file:
            file.write(block)
            os.fsync(file.fileno())
    shutil.rmtree(folder)


class PeakMemory:
    """Yields a list with the most anonymous memory above that of the start; mapped files do not count."""

    def __enter__(self) -> list[float]:
        self._peak, self._over, start = [0.0], threading.Event(), _anonymous()
        self._thread = threading.Thread(target=self._watch, args=(start,))
        self._thread.start()
        return self._peak

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self, start: int) -> None:
        while not self._over.wait(0.02):
            self._peak[0] = max(self._peak[0], _anonymous() - start)


def _anonymous() -> int:
    """Return the bytes in memory that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
