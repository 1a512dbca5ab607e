"""The attributed parameters and their projection, fixed for one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

from torch.utils.data import DataLoader

from lightning_trak.curvature import Preconditioner
from lightning_trak.data.identity import fingerprint
from lightning_trak.features.stored import StoredForm
from lightning_trak.gradients import Selector
from lightning_trak.gradients.parameters import select_parameters
from lightning_trak.projection import IdentityProjector, Projector, make_projector, restore_projector
from lightning_trak.store.chunks import rows_in_a_chunk
from lightning_trak.tasks.base import draws_labels, of_drawing_class
from lightning_trak.trainer.featurizing.curvature import draws_anything, whitened_at_once
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.featurizing.reading import ExampleReader
from lightning_trak.trainer.host.framework import is_finetuning, rank_zero_warn
from lightning_trak.trainer.host.reports import Reports

PROJ_DIM, SEED, DTYPE = 2048, 0, "float32"  # the callback's defaults; a store that exists replaces them by its own


_OF_THE_PLAN = ("proj_dim", "seed", "dtype")  # in the store's projection, and no part of the projector


@dataclass(frozen=True)
class Settings:
    """What features depend on: arguments of `TRAKCallback`, and whether some are left at their defaults."""

    proj_dim: int
    projector: str | Projector
    gradients: str
    parameters: str | Sequence[str] | None
    seed: int
    feature_dtype: str
    batch_size: int | None
    preconditioner: str
    damping: float | str
    projects_by_default: bool  # whether projector, curvature and estimator are left at their defaults


def parameters_to_be(settings: Settings, trainer: Any, module: Any) -> str | None:
    """Return the pattern of all parameters if none are named and a callback may unfreeze some; else None."""
    finetuning = [callback for callback in trainer.callbacks if is_finetuning(callback)]
    frozen = [name for name, value in module.named_parameters() if not value.requires_grad]
    if settings.parameters is not None or not finetuning or not frozen:
        return None
    rank_zero_warn(
        f"{len(frozen)} of {len(list(module.parameters()))} parameters are frozen now, and"
        f" {type(finetuning[0]).__name__} may unfreeze them: all are attributed, at all checkpoints. To attribute"
        " fewer, name them: TRAKCallback(parameters=[...])."
    )
    return "*"


def _preconditioner(settings: Settings, module: Any, manifest: dict[str, Any] | None) -> Preconditioner | None:
    """Return how gradients are whitened; None if they are not: see ``TRAKCallback(preconditioner=...)``."""
    stored = None if manifest is None else manifest.get("preconditioner")
    if settings.preconditioner == "none" or (settings.preconditioner == "auto" and not settings.projects_by_default):
        return None
    if settings.preconditioner == "auto":
        own = draws_labels(module) and of_drawing_class(module, "whitens_by_default") and settings.damping == "auto"
        if not (own if manifest is None else stored):
            return None
    if not draws_labels(module):
        name = type(module).__name__
        if stored:
            raise ValueError(
                f"The store holds gradients that are whitened by labels drawn from the predictions, but {name} draws"
                " none for its own model_output and loss: one of them has changed since. Restore it, or use another"
                " dirpath for TRAKCallback."
            )
        raise ValueError(
            f"preconditioner='kronecker' needs labels drawn from the predictions, which {name} does not define. Use"
            " ClassificationMixin or a mixin of many parts, with their own model_output and loss, define"
            " draw_labels(self, batch, seeds) and drawn_loss(self, drawn), or leave preconditioner out."
        )
    chosen = Preconditioner.of(settings.proj_dim, rest=of_drawing_class(module, "draws_rest"))
    if stored is not None and settings.proj_dim == PROJ_DIM:
        chosen = replace(chosen, entries=stored["entries"], target_entries=stored.get("target_entries", 0))
    return replace(chosen, damping=settings.damping)


class Plan:
    """The attributed parameters and their projection, fixed for one model.

    Args:
        settings: what the user asked for.
        reports: takes messages to the user.
        module: the model.
        manifest: of an existing store; settings that the user left at their defaults are taken from it.
        parameters: which to attribute, by name or pattern, if the settings name none.

    Attributes:
        dimension: the number of features of an example; of whitened ones, the largest are stored.
        proj_dim: k, the number of stored features of a training example.
    """

    def __init__(
        self,
        settings: Settings,
        reports: Reports,
        module: Any,
        manifest: dict[str, Any] | None = None,
        parameters: str | Sequence[str] | None = None,
    ) -> None:
        self._reports = reports
        parameters, projector = settings.parameters or parameters, settings.projector
        proj_dim, seed, dtype = settings.proj_dim, settings.seed, settings.feature_dtype
        if manifest is not None:
            stored = manifest["projection"]
            parameters = list(manifest["parameters"]) if parameters is None else parameters
            proj_dim = stored["proj_dim"] if proj_dim == PROJ_DIM else proj_dim
            if projector == "auto" and not manifest.get("preconditioner"):
                configuration = {name: value for name, value in stored.items() if name not in _OF_THE_PLAN}
                projector = restore_projector(configuration, proj_dim)
            seed = stored["seed"] if seed == SEED else seed
            dtype = stored.get("dtype", DTYPE) if dtype == DTYPE else dtype
        own = dict(module.named_parameters())
        self.parameters = select_parameters(module, parameters)
        if manifest is not None:  # projections depend on the order of parameters: keep the store's
            places = {name: place for place, name in enumerate(manifest["parameters"])}
            self.parameters.sort(key=lambda name: places.get(name, len(places)))
        self.shapes = {name: list(own[name].shape) for name in self.parameters}
        self.n_params = sum(own[name].numel() for name in self.parameters)
        self.preconditioner = _preconditioner(settings, module, manifest)
        if self.preconditioner is None:
            self.projector = make_projector(projector, proj_dim, self.n_params)
            self.proj_dim = self.dimension = self.projector.dimension(self.n_params)
        else:
            self.projector = IdentityProjector(proj_dim)  # of whitened gradients, p entries
            self.proj_dim, self.dimension = min(self.preconditioner.entries, self.n_params), self.n_params
        self.seed, self.dtype = seed, dtype
        self._selector = Selector(settings.gradients, settings.batch_size, reports.tell_once)

    @classmethod
    def choose(
        cls,
        settings: Settings,
        reports: Reports,
        trainer: Any,
        module: Any,
        loader: DataLoader[Any],
        parameters: str | Sequence[str] | None = None,
        manifest: dict[str, Any] | None = None,
    ) -> Plan:
        """Return the plan for a train set, which ``loader`` reads.

        ``preconditioner="auto"`` is that of the store, if ``manifest`` is one's, or follows from the data: of two
        classes, no label is left to draw, so there is nothing to whiten.
        """

        def plan_with(preconditioner: str) -> Plan:
            return cls(replace(settings, preconditioner=preconditioner), reports, module, parameters=parameters)

        if settings.preconditioner != "auto" or not settings.projects_by_default:
            return plan_with(settings.preconditioner)
        if manifest is not None:
            return plan_with("kronecker" if manifest.get("preconditioner") else "none")
        plan = plan_with("auto")
        rest = plan.preconditioner is not None and plan.preconditioner.rest
        if not rest or draws_anything(plan.loop(trainer, module, loader, lambda: loader, "train").reader):
            return plan
        return plan_with("none")

    @property
    def engine(self) -> str:
        """What computes per-sample gradients; empty before any were computed."""
        return self._selector.engine

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the store's manifest that does not depend on the data."""
        own = self.preconditioner
        largest = {"projector": "largest", "drawing": 1, "arguments": {}}
        configuration = {**self.projector.configuration, "dtype": self.dtype} if own is None else largest
        projection = {**configuration, "proj_dim": self.proj_dim, "seed": self.seed}
        preconditioner = None if own is None else own.configuration
        return {"parameters": self.shapes, "preconditioner": preconditioner, "projection": projection}

    @property
    def layers(self) -> dict[str, slice]:
        """The layers by name, with the columns that each has in whitened features."""
        layers, start = {}, 0
        for layer, shapes in groupby(self.shapes.items(), key=lambda item: layer_of(item[0])):
            stop = start + sum(prod(shape) for _, shape in shapes)
            layers[layer] = slice(start, stop)
            start = stop
        return layers

    def manifest(self, loader: DataLoader[Any], seconds: float | None = None) -> dict[str, Any]:
        """Return the store's manifest for a train set."""
        data = fingerprint(loader.dataset)
        entries = None if self.preconditioner is None else self.proj_dim
        row_bytes = StoredForm(self.dimension, self.dtype, entries).row_bytes
        return {
            "n_train": data["n_train"],
            "chunk_rows": rows_in_a_chunk(row_bytes, data["n_train"], seconds),
            **self.identity,
            **data,
        }

    def loop(
        self,
        trainer: Any,
        module: Any,
        loader: DataLoader[Any],
        find_train_loader: Callable[[], DataLoader[Any]],
        examples: str,
    ) -> FeaturizationLoop:
        """Return the loop that featurizes the examples of a loader; see `ExampleReader`."""
        whitened = self.preconditioner is not None
        reader = ExampleReader(
            trainer,
            module,
            loader,
            find_train_loader,
            parameters=self.parameters,
            selector=self._selector,
            largest=whitened_at_once(self.dimension, trainer.strategy.root_device) if whitened else None,
            examples=examples,
            reports=self._reports,
        )
        return FeaturizationLoop(reader, self.projector, self.preconditioner, self.dtype, self.seed)


def layer_of(parameter: str) -> str:
    """Return the name of the layer that a parameter belongs to: its module, or itself.

    >>> layer_of("net.0.weight"), layer_of("scale")
    ('net.0', 'scale')
    """
    return parameter.rpartition(".")[0] or parameter
