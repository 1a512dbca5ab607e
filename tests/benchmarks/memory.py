"""Peak memory of ``trainer.attribute`` against that of training steps at the same batch, each in its own process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.benchmarks.measuring import attribute, print_table, silence, trainer
from tests.benchmarks.models import MODELS

KEYS = ("digits", "resnet9", "vit", "bert", "gpt2")
STEPS = 3
_MIB = 2**20


def run(keys: tuple[str, ...] = KEYS) -> None:
    """Print the table."""
    header = ["model", "× a training step", "attribute, MiB", "training step, MiB"]
    note = "Resident memory at its peak, less what Python and its imports take; plain SGD, no optimizer state."
    print_table("Peak memory, default settings", header, (_row(key) for key in keys), note)


def _row(key: str) -> list[str]:
    step, ours = (_peak(what, key) for what in ("train", "attribute"))
    return [MODELS[key].name, f"{ours / step:.2f}", f"{ours / _MIB:.0f}", f"{step / _MIB:.0f}"]


def _peak(what: str, key: str) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.memory", what, key]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _measure(what: str, key: str) -> Iterator[str]:
    """In the process of its own: do it, and say by how much memory grew."""
    model = MODELS[key]
    if key in ("vit", "bert", "bert_lora", "gpt2"):
        import transformers.models.auto  # noqa: F401
    with silence(), tempfile.TemporaryDirectory() as root:
        small = MODELS["digits"]
        trainer(root, accelerator="cpu", fast_dev_run=1).fit(small.build().train(), small.loader(2))  # lazy imports
        before = _resident("VmRSS")
        if what == "train":
            loader = model.loader(STEPS * model.batch_size)
            own = trainer(root, accelerator="cpu", max_epochs=1, enable_checkpointing=False)
            own.fit(model.build().train(), loader)
        else:
            checkpoint = Path(root) / "weights.pt"
            torch.save(model.build().state_dict(), checkpoint)
            train, targets = model.loader(STEPS * model.batch_size), model.loader(model.batch_size)
            attribute(model.build(), train, targets, root, checkpoint)
        yield str(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Return the resident memory now (VmRSS) or at its peak (VmHWM); getrusage would count the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    print(*_measure(*sys.argv[1:]))
