"""Read a dataset in order, and know the row of every example: pure torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from warnings import warn

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_trak.data.sampling import never_read


class _Numbered(Dataset[Any]):
    """Yields (index, example), so that the row of an example is known whatever sampler or worker reads it."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)


class _Collate:
    """Collates examples as the user's loader does, and returns their indices with the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        return [index for index, _ in items], self._collate([example for _, example in items])


def check_loader(loader: Any, what: str, remedy: str) -> DataLoader[Any]:
    """Return ``loader`` if it is one DataLoader over a map-style dataset, and its sampler reads every row.

    Args:
        loader: what the user supplied.
        what: its name in an error, e.g. ``"train_dataloader"``.
        remedy: what the user can do without changing the loader, in whole sentences; may be empty.

    Raises:
        TypeError: if it is not one DataLoader over a map-style dataset.
        ValueError: if the dataset is empty, or the sampler reads only a part of it.
    """
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    error = _wrong_kind(loader)
    if error is not None:
        raise TypeError(f"{what} {error} {remedy}".rstrip())
    if len(loader.dataset) == 0:
        raise ValueError(f"{what} reads an empty dataset; there is nothing to attribute. {remedy}".rstrip())
    _check_sampler(loader, what, remedy)
    return loader  # type: ignore[no-any-return]


def _wrong_kind(loader: Any) -> str | None:
    """Return None for a DataLoader over a map-style dataset; else say what is wrong, and what to do."""
    if not isinstance(loader, DataLoader):
        join = " Join several datasets with torch.utils.data.ConcatDataset."
        several = join * isinstance(loader, (list, tuple, dict))
        return f"is {type(loader).__name__}; expected one torch.utils.data.DataLoader.{several}"
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return (
            f"reads {type(dataset).__name__}, an iterable dataset, whose examples have no index. Scores need to name"
            " examples: use a map-style dataset with __getitem__ and __len__."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        return (
            f"is {type(loader).__name__}, which overrides DataLoader.__iter__. That code would not run: move it to the"
            " dataset, the collate function or on_after_batch_transfer."
        )
    if loader.batch_sampler is None:
        return (
            "has batch_size=None: its dataset yields whole batches, whose rows are unknown. Let it yield single"
            " examples, and set batch_size."
        )
    if getattr(dataset, "__len__", None) is None:
        return f"reads {type(dataset).__name__}, which has no length. Define __len__."
    return None


def _check_sampler(loader: DataLoader[Any], what: str, remedy: str) -> None:
    batches: Any = loader.batch_sampler
    kind = type(batches.sampler if type(batches) is BatchSampler else batches).__name__
    try:
        missing = never_read(loader)
    except Exception as error:  # e.g. a user's own sampler that cannot be copied
        warn(
            f"Whether {what} reads every example cannot be told from its {kind}:"
            f" {type(error).__name__}: {str(error).rstrip('.')}. If it leaves some out in every epoch, use"
            " torch.utils.data.Subset(dataset, indices).",
            stacklevel=2,
        )
        return
    if missing:
        n = len(loader.dataset)  # type: ignore[arg-type]
        raise ValueError(
            f"{what} has a {kind} that reads {n - len(missing)} of the dataset's {n} examples, and never row"
            f" {missing[0]}: examples that are never read must not be attributed. Give the loader"
            f" torch.utils.data.Subset(dataset, indices), and let it read every row of that. {remedy}".rstrip()
        )


def numbered_loader(
    loader: DataLoader[Any], rows: Iterable[int], batch_size: int | None = None, num_workers: int | None = None
) -> DataLoader[tuple[list[int], Any]]:
    """Return a loader that reads chosen rows of a loader's dataset, in the order given instead of its sampler's.

    Args:
        loader: supplies dataset, collate function and worker settings.
        rows: indices into its dataset; each is asked for when its batch is put together.
        batch_size: None for the loader's own.
        num_workers: None for the loader's own.

    Returns:
        A loader of ``(rows, batch)``.

    >>> import torch
    >>> loader = DataLoader(torch.arange(10) * 1.5, batch_size=4, shuffle=True, drop_last=True)
    >>> list(numbered_loader(loader, [7, 8, 9], batch_size=2))
    [([7, 8], tensor([10.5000, 12.0000])), ([9], tensor([13.5000]))]
    """
    workers = loader.num_workers if num_workers is None else num_workers
    return DataLoader(
        _Numbered(loader.dataset),
        batch_size=batch_size or loader_batch_size(loader),
        sampler=rows,
        num_workers=workers,
        collate_fn=_Collate(loader.collate_fn),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout if workers else 0,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        prefetch_factor=loader.prefetch_factor if workers and loader.num_workers else None,
    )


def subset_loader(loader: DataLoader[Any], rows: Sequence[int], n: int) -> DataLoader[Any]:
    """Return a loader with the same settings that reads only some rows of the dataset.

    Args:
        loader: with or without shuffling.
        rows: which examples to read.
        n: how many the dataset should have.

    Raises:
        ValueError: if the dataset has another size, or the loader has a sampler that cannot be cut to a subset.

    >>> import torch
    >>> loader = DataLoader(torch.arange(10), batch_size=4, drop_last=True)
    >>> list(subset_loader(loader, [7, 8, 9, 1, 0], n=10))
    [tensor([7, 8, 9, 1])]
    """
    if len(loader.dataset) != n:  # type: ignore[arg-type]
        raise ValueError(
            f"The train set has {len(loader.dataset)} examples now, and had {n}."  # type: ignore[arg-type]
            " Let setup('fit') split it in the same way every time."
        )
    sampler: Any = loader.sampler
    whole = isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == n
    if loader.batch_size is None or not (whole or isinstance(sampler, SequentialSampler)):
        raise ValueError(
            f"train_dataloader has a {type(sampler).__name__} or a batch sampler of its own, which cannot be cut to a"
            " subset of the train set. Use DataLoader(batch_size=..., shuffle=...)."
        )
    workers = loader.num_workers
    return DataLoader(
        Subset(loader.dataset, rows),
        batch_size=loader.batch_size,
        shuffle=whole,
        drop_last=loader.drop_last,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def loader_batch_size(loader: DataLoader[Any]) -> int:
    """Return the batch size of a loader, even if it has its own batch sampler."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
