"""How much memory a computation takes, and how much there is; `selector` halves batches where it is short."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SHARE = 0.5  # of the free memory: other processes, and the workspaces of operations, need some too


def fitting_batch_size(run: Callable[[int], object], largest: int, device: torch.device, tried: int = 4) -> int:
    """Return the largest batch size, up to ``largest``, for which the free memory is enough.

    Args:
        run: does the work for a batch of 1 or of ``tried`` examples.
        largest: the upper bound.
        device: where the work is done.
        tried: how many examples are tried.

    >>> fitting_batch_size(lambda size: torch.ones(size, 10), largest=32, device=torch.device("cpu"))
    32
    """
    if largest <= tried or free_bytes(device) is None:
        return largest
    try:
        run(tried)  # allocates what is kept from batch to batch, so that it is not measured
        one, more = (peak_bytes(lambda size=size: run(size), device) for size in (1, tried))  # type: ignore[misc]
    except torch.OutOfMemoryError:
        return max(1, tried // 2)
    per_example, free = max(1.0, (more - one) / (tried - 1)), free_bytes(device) or 0
    return int(min(largest, max(1, (_SHARE * free - max(0, one - per_example)) // per_example)))


def surely_fits(n_bytes: float, device: torch.device) -> bool:
    """Say whether ``n_bytes`` fit into the free memory; True if that is not known.

    >>> surely_fits(1, torch.device("cpu"))
    True
    """
    free = free_bytes(device)
    return free is None or n_bytes <= _SHARE * free


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a device ran out of memory, by its type or its text.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB"))
    True
    """
    words = ("out of memory", "can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Run something, and return the largest growth of its tensors' memory meanwhile.

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
    if device.type != "cpu":
        return None
    available = _number("/proc/meminfo", "MemAvailable:")
    limits = [*([] if available is None else [1024 * available]), *_left_in_cgroups()]
    return min(limits) if limits else None


def _left_in_cgroups() -> Iterator[int]:
    """Yield what is left within each limit of a container or a batch system; file caches count as free."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, cached = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cached = "/sys/fs/cgroup/memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = path.strip("/").split("/")
        for depth in range(len(parts) + 1):  # a limit holds for all groups below; a container sees itself as the root
            folder = "/".join([root, *parts[:depth]]).rstrip("/")
            most, taken = (_number(f"{folder}/{name}") for name in (limit, used))
            if most is not None and taken is not None:
                yield most - taken + (_number(f"{folder}/memory.stat", cached) or 0)


def _number(path: str, name: str = "") -> int | None:
    """Return the number in a file, or that after a name in one of its lines; None if there is none."""
    for line in _read(path).splitlines():
        words = [name, *line.split()] if name == "" else line.split()
        if len(words) > 1 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make or enlarge, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # by storage, without the bytes that it had before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {key: storage.nbytes() for key, storage in _storages((args, kwargs)).items()}
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(result).items():
            self._count(storage, before.get(key, 0))
        return result

    def _count(self, storage: torch.UntypedStorage, before: int) -> None:
        key, grown = storage._cdata, storage.nbytes() - before
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._freed, key)
        self._sizes[key] += grown
        self.live += grown
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """Return the storages, by address, of tensors in nested lists, tuples and dictionaries."""
    found: dict[int, torch.UntypedStorage] = {}
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                storage = value.untyped_storage()
                found[storage._cdata] = storage
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
    return found
