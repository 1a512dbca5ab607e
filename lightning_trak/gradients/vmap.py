"""Per-sample gradients of a whole batch at once, by `torch.func`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from lightning_trak.data.batch import check_rows, tensors_of, with_tensors
from lightning_trak.gradients.engine import EngineUnsuitable, Sink, check_same
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.gradient import DenseGradient


@contextmanager
def without_advice() -> Iterator[None]:
    """Suppress vmap's performance warning about an operation without a batching rule: users cannot act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


class VmapEngine:
    """``vmap(grad(f))`` over the batch, in chunks of at most 256 MiB of gradients.

    Every tensor of the batch must have one row for each example; ``model_output`` is called with batches of one.

    Args:
        chunk_bytes: of per-sample gradients that exist at once.
    """

    name = "vmap"
    batch_size: int | None = None

    def __init__(self, chunk_bytes: int = 2**28) -> None:
        self._chunk_bytes = chunk_bytes

    def prepare(self, function: ModelFunction, batch: Any, size: int) -> None:
        """Try it; see `Engine.prepare`."""
        self(function, batch, size, lambda *_: None)

    def __call__(self, function: ModelFunction, batch: Any, size: int, sink: Sink) -> Tensor:
        """Send the gradients chunk by chunk; see `Engine`."""
        tensors = tensors_of(batch)
        problem = check_rows(batch, size)
        if problem:
            raise EngineUnsuitable(problem)
        outputs = function.output(batch).detach()
        chunk = max(1, self._chunk_bytes // (4 * max(1, function.n_params)))
        for start in range(0, size, chunk):
            rows = slice(start, min(start + chunk, size))
            gradients, alone = self._gradients(function, batch, [tensor[rows] for tensor in tensors])
            check_same(alone, outputs[rows], function.tolerance)
            for name, gradient in gradients.items():
                sink(rows, name, DenseGradient(gradient.detach()))
        return outputs

    @staticmethod
    def _gradients(function: ModelFunction, batch: Any, tensors: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        def output_of_one(parameters: dict[str, Tensor], example: list[Tensor]) -> Tensor:
            one = with_tensors(batch, [tensor.unsqueeze(0) for tensor in example])
            return function.output(one, parameters).squeeze(0)

        try:
            # Randomness is allowed here: vmap supports it. It shows as a changed output, which is refused later.
            with without_advice():
                return vmap(grad_and_value(output_of_one), in_dims=(None, 0), randomness="different")(
                    function.parameters, tensors
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise EngineUnsuitable(f"vmap failed with {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return self.name
