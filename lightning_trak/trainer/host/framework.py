"""The two packages of Lightning, ``lightning.pytorch`` and ``pytorch_lightning``.

They have one source but different classes, which ``isinstance`` tells apart. All that depends on the package is in this
file, and no other file imports Lightning. This one never imports ``pytorch_lightning``: a program that has an object of
it has imported it.

The ``rank_zero`` functions and the seeds work for both: they come from ``lightning_utilities`` or act on global state.
A `CheckpointIO` is called, never asked for its class, so that of ``lightning.pytorch`` works for both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins.io import CheckpointIO as CheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden as _is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info as rank_zero_info
from lightning.pytorch.utilities.rank_zero import rank_zero_warn as rank_zero_warn

if TYPE_CHECKING:
    import pytorch_lightning

    Trainer: TypeAlias = pl.Trainer | pytorch_lightning.Trainer
    LightningModule: TypeAlias = pl.LightningModule | pytorch_lightning.LightningModule
    LightningDataModule: TypeAlias = pl.LightningDataModule | pytorch_lightning.LightningDataModule
else:  # a command line, for example, reads annotations at run time
    Trainer = LightningModule = LightningDataModule = Any

_METHODS = ("attribute", "attribute_self", "suspects")


class Callback(pl.Callback):
    """A callback of both packages: `extend_loaded` adds the ``Callback`` of the second to its bases.

    A Trainer calls the hooks of any object. But a callback outside a list, or from a command line, must be of the
    Trainer's package.
    """


class Framework:
    """One of the two packages: its classes that are used here.

    Attributes:
        name: of the package.
    """

    def __init__(self, package: Any) -> None:
        self.name: str = package.__name__
        find = self._find
        self.Trainer: type[pl.Trainer] = package.Trainer
        self.Callback: type[pl.Callback] = package.Callback
        self.LightningModule: type[pl.LightningModule] = package.LightningModule
        self.LightningDataModule: type[pl.LightningDataModule] = package.LightningDataModule
        self.MisconfigurationException: type[Exception] = find("utilities.exceptions", "MisconfigurationException")
        self.SIGTERMException: type[BaseException] = find("utilities.exceptions", "SIGTERMException")
        self.BaseFinetuning: type[BaseFinetuning] = find("callbacks", "BaseFinetuning")
        self.DDPStrategy: type[Strategy] = find("strategies", "DDPStrategy")
        parts = ("DeepSpeedStrategy", "XLAStrategy")  # derived from DDPStrategy, and not like it
        self.of_parts: tuple[type[Strategy], ...] = tuple(find("strategies", name) for name in parts)
        self.SingleDeviceStrategy: type[Strategy] = find("strategies", "SingleDeviceStrategy")
        self.DataHookSelector: type[_DataHookSelector] = find("trainer.connectors.data_connector", "_DataHookSelector")
        self.TrainerFn: type[TrainerFn] = find("trainer.states", "TrainerFn")
        self.TrainerStatus: type[TrainerStatus] = find("trainer.states", "TrainerStatus")
        self.RunningStage: type[RunningStage] = find("trainer.states", "RunningStage")

    def _find(self, module: str, name: str) -> Any:
        return getattr(import_module(f"{self.name}.{module}"), name)

    def check_kind(self, argument: str, value: Any, kind: str) -> None:
        """Check that an argument is of a class of this package.

        Raises:
            TypeError: if it is not.
        """
        if isinstance(value, getattr(self, kind)):
            return
        got, remedy = _class_name(value), f"Derive it from {self.name}.{kind}."
        for other in _loaded():
            if isinstance(value, getattr(other, kind)):
                got, remedy = f"{got}, a {other.name}.{kind}", f"Use {self.name} or {other.name}, not both."
        raise TypeError(
            f"{argument} must be a {self.name}.{kind}, as the Trainer is of {self.name}, got {got}. {remedy}"
        )


def _loaded() -> list[Framework]:
    """Return the imported packages; only the first, if a program made the second its alias."""
    other = sys.modules.get("pytorch_lightning")
    packages = dict.fromkeys([pl, other] if hasattr(other, "Trainer") else [pl])
    return [_framework(package) for package in packages]


_framework = cache(Framework)


def framework_of(trainer: Any) -> Framework:
    """Return the package of a Trainer.

    Raises:
        TypeError: if it is no Trainer.

    >>> framework_of(pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")).name
    'lightning.pytorch'
    """
    for framework in _loaded():
        if isinstance(trainer, framework.Trainer):
            return framework
    raise TypeError(
        "lightning_trak works with a lightning.pytorch.Trainer or a pytorch_lightning.Trainer, got"
        f" {_class_name(trainer)}."
    )


def is_datamodule(value: Any) -> bool:
    """Tell whether something is a LightningDataModule of either package."""
    return any(isinstance(value, framework.LightningDataModule) for framework in _loaded())


def is_finetuning(callback: Any) -> bool:
    """Tell whether a callback, of either package, unfreezes parameters."""
    return any(isinstance(callback, framework.BaseFinetuning) for framework in _loaded())


def is_overridden(hook: str, owner: Any) -> bool:
    """Tell whether a module or datamodule defines a hook itself, beyond Lightning's default.

    >>> class Module(pl.LightningModule):
    ...     def train_dataloader(self):
    ...         return []
    >>> is_overridden("train_dataloader", Module()), is_overridden("test_dataloader", Module())
    (True, False)
    """
    for framework in _loaded():
        for parent in (framework.LightningModule, framework.LightningDataModule):
            if isinstance(owner, parent) and hasattr(parent, hook):
                return _is_overridden(hook, owner, parent)
    return hasattr(owner, hook)


def register(*functions: Callable[..., Any]) -> None:
    """Make `attribute`, `attribute_self` and `suspects`, in this order, methods of ``Trainer``."""
    for name, method in zip(_METHODS, functions, strict=True):
        setattr(pl.Trainer, name, method)
    extend_loaded()


def extend_loaded() -> None:
    """Derive `Callback` from the imported packages' ``Callback``, and give their Trainers the methods of `register`.

    ``pytorch_lightning`` may be imported after this package, so every callback calls this again.
    """
    frameworks = _loaded()
    bases = tuple(framework.Callback for framework in frameworks)
    if Callback.__bases__ != bases:
        Callback.__bases__ = bases
    for framework in frameworks:
        for name in _METHODS:
            setattr(framework.Trainer, name, getattr(pl.Trainer, name))


def stop_if_asked(trainer: Trainer) -> None:
    """Stop, as Lightning's own loops do, if the process was told to terminate during ``fit`` (SIGTERM)."""
    if trainer.received_sigterm:
        raise framework_of(trainer).SIGTERMException


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_supported(trainer: Trainer, module: Any) -> None:
    """Raise MisconfigurationException unless trainer and module can be featurized."""
    framework = framework_of(trainer)
    if not callable(getattr(module, "model_output", None)):
        raise framework.MisconfigurationException(
            f"{type(module).__name__} does not define model_output(self, batch), the number to attribute for every"
            " example of a batch. Mix in ClassificationMixin or RegressionMixin, or define it with TRAKMixin."
        )
    strategy = trainer.strategy
    whole = isinstance(strategy, (framework.SingleDeviceStrategy, framework.DDPStrategy))
    if not whole or isinstance(strategy, framework.of_parts):
        raise framework.MisconfigurationException(
            f"TRAKCallback needs the whole model in every process, got {type(strategy).__name__}. Train without the"
            " callback, then attribute the consolidated checkpoint files on one device or with strategy='ddp':"
            " Trainer(devices=1, callbacks=[TRAKCallback(...)]).attribute(model, datamodule=dm, ckpt_path=[...])."
        )
