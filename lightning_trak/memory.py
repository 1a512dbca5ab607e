"""How much memory a computation takes, and how much there is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SHARE = 0.5  # of what is free: other processes, and what operations need inside, want some too


def fitting_batch_size(run: Callable[[int], object], largest: int, device: torch.device) -> int:
    """Return the largest batch size, up to ``largest``, for which the free memory is enough.

    Args:
        run: does the work for a small batch of the given size, at most 4.
        largest: the upper bound.
        device: where the work is done.

    >>> fitting_batch_size(lambda size: torch.ones(size, 10), largest=32, device=torch.device("cpu"))
    32
    """
    free = free_bytes(device)
    if free is None or largest <= 4:
        return largest
    run(4)  # what is kept from batch to batch is there from now on
    one, four = (peak_bytes(lambda size=size: run(size), device) for size in (1, 4))  # type: ignore[misc]
    per_example = max(1.0, (four - one) / 3)
    return int(min(largest, max(1, (_SHARE * free - max(0, one - per_example)) // per_example)))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Run something, and return by how much the memory of its tensors grew at most.

    >>> peak_bytes(lambda: torch.ones(1000).sum(), torch.device("cpu")) >= 4000
    True
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as counter:
        run()
    return counter.peak


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, within the limits set for this process; None if that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_available(), _left_in_cgroup("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known and device.type == "cpu" else None


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _left_in_cgroup(limit: str, used: str) -> int | None:
    try:
        return int(Path(limit).read_text()) - int(Path(used).read_text())
    except (OSError, ValueError):  # none, or "max"
        return None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
