"""The outputs of a model at its own weights, as in ``predict``: no gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.data.batch import with_numbers_told
from lightning_trak.isolation.module_state import unchanged
from lightning_trak.tasks.base import numbered, prepared
from lightning_trak.tasks.batch import read_batches
from lightning_trak.tasks.checks import check_size
from lightning_trak.trainer.host.attachment import attached
from lightning_trak.trainer.host.loaders import Loaders


def model_outputs(
    trainer: Any,
    module: Any,
    datamodule: Any,
    dataloaders: DataLoader[Any] | None,
) -> Tensor:
    """Return the model output of every target, (m,), as in ``predict``: in eval mode, without gradients."""

    def call(method: Callable[..., Any], *args: Any) -> Any:
        """Call a method of the module at its own weights."""
        with with_numbers_told(module, args) as plain:
            return method(*plain)

    with attached(trainer, module, datamodule), ExitStack() as stack:
        loaders = Loaders(trainer, module, datamodule, dataloaders, None)
        loader = loaders.targets()  # this may call setup of the module
        for context in (unchanged(module), prepared(module, call, loaders.train), torch.no_grad()):
            stack.enter_context(context)
        rows = range(len(loader.dataset))  # type: ignore[arg-type]
        outputs = torch.zeros(len(rows))
        for batch_rows, batch in read_batches(trainer, module, loader, rows):
            values = call(module.model_output, numbered(module, batch, batch_rows, loader.dataset))
            check_size(module, values, len(batch_rows))
            outputs[batch_rows] = values.float().cpu()
    return outputs
