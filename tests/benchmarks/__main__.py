"""``python -m tests.benchmarks [name ...]``: prints the tables of all benchmarks, or of those named."""

from __future__ import annotations

import argparse
import platform

import torch

from tests.benchmarks import (
    diffusion,
    factors,
    features,
    fit,
    gpu,
    memory,
    quality,
    remote,
    scale,
    scoring,
    sizes,
    suspects,
    tasks,
    zoo,
)
from tests.benchmarks.measuring import silence

BENCHMARKS = {
    "features": features.run,
    "memory": memory.run,
    "scoring": scoring.run,
    "scale": scale.run,
    "remote": remote.run,
    "fit": fit.run,
    "tasks": tasks.run,
    "zoo": zoo.run,
    "factors": factors.run,
    "quality": quality.run,
    "sizes": sizes.run,
    "diffusion": diffusion.run,
    "suspects": suspects.run,
    "gpu": gpu.run,
}
LONG = ("quality", "sizes", "diffusion", "scale", "suspects")  # they retrain, or fill the disk


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Print the benchmarks' tables.")
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; by default all but {', '.join(LONG)}"
    )
    names = parser.parse_args().names or [name for name in BENCHMARKS if name not in LONG]
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    with silence():
        for name in names:
            BENCHMARKS[name]()


if __name__ == "__main__":
    main()
