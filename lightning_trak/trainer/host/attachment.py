"""Runs a module on its device, during ``fit`` or outside it, and restores everything afterwards."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from lightning_trak.isolation.module_state import ModuleState, others_frozen, unchanged
from lightning_trak.isolation.random_states import kept_generators, kept_random_states
from lightning_trak.trainer.host.framework import (
    LightningDataModule,
    LightningModule,
    Trainer,
    framework_of,
    rank_zero_warn,
)

T = TypeVar("T")


@contextmanager
def undisturbed(trainer: Trainer, module: LightningModule, *sources: Any) -> Iterator[None]:
    """Evaluate ``module`` as in ``predict``, but with gradients and without autocast, and leave no trace.

    Restored are the module (see `ModuleState`), the trainer's state and all random states, also those of generators
    that the module, the datamodule or one of the ``sources`` of examples holds. Nothing is logged.

    Raises:
        ModuleChanged: if the evaluation changed the module; see `unchanged`.
    """
    with (
        torch.inference_mode(False),
        kept_generators(module, trainer.datamodule, *sources),
        unchanged(module, trainer.optimizers),
        others_frozen(module, trainer.optimizers),
        _as_in_predict(trainer, module),
    ):
        yield


@contextmanager
def _as_in_predict(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Set modes and states; the caller restores those of the module.

    Hooks that augment ``if self.trainer.training`` do not augment here, even during ``fit``.
    """
    state, framework = trainer.state, framework_of(trainer)
    before = (state.fn, state.status, state.stage)
    state.fn, state.status = framework.TrainerFn.PREDICTING, framework.TrainerStatus.RUNNING
    state.stage = framework.RunningStage.PREDICTING
    try:
        with (
            kept_random_states(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(module.device.type, enabled=False),
            _uncompiled(),
        ):
            module.eval()
            vars(module).update(log=_log_nothing, log_dict=_log_nothing)  # model_output may log, as training_step does
            yield
    finally:
        state.fn, state.status, state.stage = before


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled parts uncompiled.

    Featurization would recompile them. Beyond torch's limit of recompilations, training goes on uncompiled.
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # before torch 2.6
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _log_nothing(*_: Any, **__: Any) -> None:
    """Replace ``self.log``: featurization logs nothing."""


def launched(trainer: Trainer, function: Callable[..., T], *args: Any) -> T:
    """Call a function in every process of the trainer; return the first process's result where they end with it."""
    framework_of(trainer)  # an error if it is no Trainer
    launcher = trainer.strategy.launcher
    if trainer.world_size == 1 or launcher is None or trainer.state.status == "running":
        return function(*args)
    found = launcher.launch(_sendable, os.getpid(), function, *args)
    return pickle.loads(found) if isinstance(found, bytes) else found


def _sendable(caller: int, function: Callable[..., T], *args: Any) -> T | bytes:
    """Call a function; in another process than the caller's, pickle the result: shared memory ends with its process."""
    result = function(*args)
    return result if os.getpid() == caller else pickle.dumps(result)


@contextmanager
def attached(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None) -> Iterator[None]:
    """Set a trainer up to run ``module`` on its device outside ``fit``; restore trainer, module and datamodule."""
    strategy, connector = trainer.strategy, trainer._data_connector
    connected, model, device = strategy.lightning_module, strategy.model, module.device
    before = (connector._datahook_selector, trainer.datamodule)
    state, own_trainer = ModuleState(module), None if datamodule is None else datamodule.trainer
    try:
        strategy.connect(module)
        strategy.setup_environment()
        module.trainer = trainer
        connector._datahook_selector = framework_of(trainer).DataHookSelector(module, datamodule)
        if datamodule is not None:
            trainer.datamodule, datamodule.trainer = datamodule, trainer
        with _as_in_predict(trainer, module):
            strategy.model_to_device()
            yield
    finally:
        state.restore()  # setup() may have built the layers again
        module.to(device)
        if datamodule is not None:
            datamodule.trainer = own_trainer
        connector._datahook_selector, trainer.datamodule = before
        strategy._lightning_module, strategy.model = connected, model
        if state.lost:
            rank_zero_warn(
                f"{type(module).__name__} has other weights now than before: {'; '.join(state.lost)}. Its setup() or"
                " configure_model() changed them in place. Load the weights again."
            )
