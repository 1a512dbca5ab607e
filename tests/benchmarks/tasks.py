"""Which engine differentiates the model outputs of every mixin, and what that costs against a plain pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_trak import ContrastiveMixin
from lightning_trak.gradients import ModelFunction, Selector
from tests.benchmarks.features import Case, measure
from tests.benchmarks.measuring import print_table
from tests.benchmarks.models import MODELS

CASES = (
    Case("resnet9", n_train=1024, n_targets=128),
    Case("bert"),
    Case("tagger", n_train=1024, n_targets=128),
    Case("regressor", n_train=8192, n_targets=512),
    Case("segmenter", n_train=512, n_targets=64),
    Case("gpt2", n_train=192),
    Case("clip", n_train=512, n_targets=64),
)


def run(cases: tuple[Case, ...] = CASES) -> None:
    """Print the table."""
    header = ["mixin", "model", "gradients by", "× plain forward + backward", "examples/s", "n + m"]
    print_table("trainer.attribute for every task, CPU", header, _rows(cases), "Batches are those of the plain pass.")


def _rows(cases: tuple[Case, ...]) -> Iterator[list[str]]:
    for case in cases:
        module = MODELS[case.model].build()
        mixin = next(
            kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("lightning_trak.tasks")
        )
        plain, ours = measure(case)
        n = case.n_train + case.n_targets
        speeds = [f"{ours / plain:.2f}", f"{n / ours:.1f}", f"{case.n_train} + {case.n_targets}"]
        yield [f"`{mixin}`", MODELS[case.model].name, _engine(case.model, module), *speeds]


def _engine(key: str, module: Any) -> str:
    """Return what ``gradients="auto"`` comes to."""
    if isinstance(module, ContrastiveMixin):
        module.prepare_checkpoint()
    batch = next(iter(MODELS[key].loader(4)))
    function = ModelFunction(module, module.state_dict(), [name for name, _ in module.named_parameters()])
    return str(Selector("auto").choose(function, batch, 4))
