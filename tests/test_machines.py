"""The same numbers on every machine: each kind is forced in a process of its own, whatever this one is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

# What oneDNN, MKL and ATEN are held to; an instruction set that is missing falls back to what is there. TF32 and
# bfloat16 in place of float32 are what torch.set_float32_matmul_precision("medium") asks for on CPUs with AMX.
MACHINES = {
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX-512 with bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "one thread, another locale and time zone": {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "LC_ALL": "C",
        "LANG": "tr_TR.UTF-8",
        "TZ": "Pacific/Chatham",
    },
    "eight threads, other hashes": {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8", "PYTHONHASHSEED": "123"},
}

PROGRAM = """if True:
    import json, sys, warnings
    warnings.simplefilter("ignore")
    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from lightning_trak import ClassificationMixin, TRAKCallback
    from lightning_trak.gradients import DenseGradient
    from lightning_trak.projection import FactoredProjector, RademacherProjector, SparseProjector

    class Classifier(ClassificationMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 18, 40), nn.ReLU(),
                                     nn.Linear(40, 3))
        def forward(self, x):
            return self.net(x)
        def train_dataloader(self):
            return DataLoader(TensorDataset(given["x"], given["x"][:, 0, :3].argmax(1)), batch_size=12)

    def projected():
        gradients = given["gradients"]
        start, key, k = 2**32 - 100, 5, 64
        signs = RademacherProjector(k).signs(start, start + 5400, key).double() / k**0.5
        exact = gradients.double().flatten(1) @ signs
        for projector in (RademacherProjector(k), SparseProjector(k), FactoredProjector(k, rank=8)):
            features = torch.zeros(3, k)
            projector.add_gradient_(features, DenseGradient(gradients), start, key)
            if isinstance(projector, RademacherProjector):
                yield ((features - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
            yield features.tolist()

    def scores(projector):
        model, folder = Classifier(), f"{sys.argv[2]}/{projector}"
        model.load_state_dict(given["weights"])  # not trained: what it rounds otherwise would choose another P
        torch.save(given["weights"], f"{sys.argv[2]}.pt")
        trak = TRAKCallback(folder, projector=projector, proj_dim=256)
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[trak], **quiet)
        return trainer.attribute(model, model.train_dataloader(), ckpt_path=f"{sys.argv[2]}.pt").scores.tolist()

    given = torch.load(sys.argv[1])
    error, *features = projected()
    found = {"error": error, "features": features,
             "scores": {name: scores(name) for name in ("factored", "sparse", "rademacher")}}
    print(json.dumps(found))"""


def run_on(machine, folder):
    environment = {**os.environ, **MACHINES.get(machine, {})}
    arguments = [str(folder / "given.pt"), str(folder / machine)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("machines"), torch.Generator().manual_seed(0)
    shapes = {"net.0.weight": (8, 1, 3), "net.0.bias": (8,), "net.3.weight": (40, 144), "net.3.bias": (40,)}
    shapes |= {"net.5.weight": (3, 40), "net.5.bias": (3,)}
    given = {
        "weights": {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()},
        "gradients": torch.randn(3, 60, 90, generator=generator),
        "x": torch.randn(60, 1, 20, generator=generator),
    }
    torch.save(given, folder / "given.pt")  # drawn once: without vector instructions torch draws other numbers
    with ThreadPoolExecutor(2) as pool:
        machines = ["this one", *MACHINES]
        return dict(zip(machines, pool.map(lambda machine: run_on(machine, folder), machines), strict=True))


@pytest.mark.parametrize("machine", ["this one", *MACHINES])
def test_features_and_scores_are_the_same(found, machine):
    here, there = found["this one"], found[machine]
    assert there["error"] < 1e-5  # of the dense projection, from the exact one in float64
    for kind in ("features", "scores"):
        one, other = (flat(numbers[kind]) for numbers in (here, there))
        largest = max(map(abs, one))
        assert len(one) == len(other)
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-3 * largest, kind


def flat(numbers):
    if isinstance(numbers, float):
        return [numbers]
    held = numbers.values() if isinstance(numbers, dict) else numbers
    return [number for part in held for number in flat(part)]
