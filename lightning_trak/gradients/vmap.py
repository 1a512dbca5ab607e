"""Per-sample gradients of a whole batch at once, by `torch.func`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from lightning_trak.gradients.batch import describe, tensors_of, with_tensors
from lightning_trak.gradients.engine import EngineUnsuitable, Sink
from lightning_trak.gradients.function import ModelFunction

_CHUNK_BYTES = 2**28  # per-sample gradients that exist at once


class VmapEngine:
    """``vmap(grad(f))`` over the batch, in chunks of at most 256 MiB of gradients.

    Every tensor of the batch must have one row for each example; ``model_output`` is called with batches of one.
    """

    name = "vmap"
    batch_size: int | None = None

    def __call__(self, function: ModelFunction, batch: Any, size: int, sink: Sink) -> Tensor:
        """Send the gradients chunk by chunk; see `Engine`."""
        tensors = tensors_of(batch)
        if not tensors or any(tensor.ndim == 0 or len(tensor) != size for tensor in tensors):
            raise EngineUnsuitable(f"not every tensor of the batch has {size} rows: {describe(batch)}")
        outputs = function.output(batch).detach()
        chunk = max(1, _CHUNK_BYTES // (4 * max(1, function.n_params)))
        for start in range(0, size, chunk):
            rows = slice(start, min(start + chunk, size))
            gradients, alone = self._gradients(function, batch, [tensor[rows] for tensor in tensors])
            _check_same(alone, outputs[rows])
            for name, gradient in gradients.items():
                sink(rows, name, gradient.detach())
        return outputs

    @staticmethod
    def _gradients(function: ModelFunction, batch: Any, tensors: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        def output_of_one(parameters: dict[str, Tensor], example: list[Tensor]) -> Tensor:
            one = with_tensors(batch, [tensor.unsqueeze(0) for tensor in example])
            return function.output(one, parameters).squeeze(0)

        try:
            # Randomness is let through here, to be told apart from what vmap cannot do: it shows as a changed output.
            return vmap(grad_and_value(output_of_one), in_dims=(None, 0), randomness="different")(
                function.parameters, tensors
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise EngineUnsuitable(f"vmap failed with {type(error).__name__}: {error}") from error


def _check_same(alone: Tensor, together: Tensor) -> None:
    """Refuse a batch whose examples vmap did not see as the model sees them, e.g. for a tensor shared by all."""
    tolerance = 1e-3 if together.dtype in (torch.float32, torch.float64) else 0.05
    if alone.shape != together.shape or not torch.allclose(alone, together, tolerance, tolerance, equal_nan=True):
        raise EngineUnsuitable("model_output of an example alone differs from its output within the batch")
