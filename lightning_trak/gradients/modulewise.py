"""Gradients for modules without a rule: the module's own forward is run again and differentiated per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from lightning_trak.data.batch import tensors_of, with_tensors
from lightning_trak.gradients.engine import EngineUnsuitable
from lightning_trak.gradients.substitution import places_of_tensors, with_values
from lightning_trak.gradients.vmap import without_advice


def module_gradients(
    module: nn.Module,
    parameters: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grads: Sequence[Tensor | None],
    size: int,
    batched: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """Run a module again on each example of its batch, by `vmap`; if that fails, one after the other.

    Args:
        module: any module whose outputs have the batch axis first. Arguments without one are shared by all examples.
        parameters: names of the parameters to differentiate with respect to.
        args: its positional arguments.
        kwargs: its keyword arguments.
        grads: ∂f/∂output, each (b, ...), of all its outputs that are floating-point tensors; None where not used.
        size: b.
        batched: which tensors among the arguments have the batch axis first; None for those of b rows.

    Returns:
        The gradients, (b, *shape) for each parameter.

    Raises:
        EngineUnsuitable: if an output does not have the batch axis first, or the module cannot be run again.

    >>> layer = nn.Linear(3, 2)
    >>> module_gradients(layer, ["bias"], (torch.ones(4, 3),), {}, [torch.ones(4, 2)], size=4)["bias"].shape
    torch.Size([4, 2])
    """
    used = [grad for grad in grads if grad is not None]
    if any(grad.ndim == 0 or len(grad) != size for grad in used):
        raise EngineUnsuitable(f"an output of {type(module).__name__} has no batch axis in front")
    tensors = tensors_of((args, kwargs))
    batched = rows_of_examples(tensors, size) if batched is None else batched
    others = [tensor for own, tensor in zip(batched, tensors, strict=False) if own and not _has_rows(tensor, size)]
    if others or len(batched) != len(tensors):
        raise EngineUnsuitable(f"{type(module).__name__} is called with other arguments than on the first examples")
    values = dict(module.named_parameters())
    chosen = {name: values[name].detach() for name in parameters}
    places = places_of_tensors(module)

    def outputs(chosen: dict[str, Tensor], *examples: Tensor) -> list[Tensor]:
        rows = iter(examples)
        mine = [next(rows).unsqueeze(0) if own else whole for own, whole in zip(batched, tensors, strict=True)]
        own_args, own_kwargs = with_tensors((args, kwargs), mine)
        found = tensors_of(with_values(module, chosen, places, own_args, own_kwargs))
        found = [tensor for tensor in found if tensor.is_floating_point()]
        return [out for out, grad in zip(found, grads, strict=True) if grad is not None]

    def gradients(examples: list[Tensor], sent_back: list[Tensor]) -> dict[str, Tensor]:
        pull_back = vjp(lambda chosen: outputs(chosen, *examples), chosen)[1]
        return pull_back([grad.unsqueeze(0) for grad in sent_back])[0]  # type: ignore[no-any-return]

    examples = [tensor for tensor, own in zip(tensors, batched, strict=True) if own]
    with torch.enable_grad():
        try:
            with without_advice():
                return vmap(gradients)(examples, used) if size else {}
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return _one_by_one(gradients, examples, used, size)


def rows_of_examples(tensors: Sequence[Tensor], size: int) -> list[bool]:
    """Tell which tensors have one row for each of ``size`` examples."""
    return [_has_rows(tensor, size) for tensor in tensors]


def _has_rows(tensor: Tensor, size: int) -> bool:
    return tensor.ndim > 0 and len(tensor) == size


def _one_by_one(gradients: Any, examples: list[Tensor], used: list[Tensor], size: int) -> dict[str, Tensor]:
    """Loop over the examples, for what `vmap` does not support: custom autograd functions, data-dependent branches."""
    try:
        rows = [gradients([tensor[row] for tensor in examples], [grad[row] for grad in used]) for row in range(size)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise EngineUnsuitable(f"a module could not be run again: {type(error).__name__}: {error}") from error
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
