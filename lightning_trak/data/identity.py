"""Whether two datasets are the same, and where they differ."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_trak.data.batch import check_rows, map_tensors, tensors_of
from lightning_trak.isolation.random_states import seed_all

_READ_TWICE = 32


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Describe a dataset, so that another dataset or another order is recognised.

    Up to 1024 examples are read, evenly spaced. Some are read twice with the same seed. If a part of an example differs
    between the two readings, that part is random; it is left out for all examples.

    The global random state is overwritten: call it where that is restored.

    Returns:
        ``n_train``, the size; ``data``, a digest of the examples; and ``data_rows``, the first characters of each
        example's digest, from which `difference` finds the first example that differs.

    >>> fingerprint([1.0, 2.0]) == fingerprint([2.0, 1.0])
    False
    """
    n = len(dataset)
    rows = sampled_rows(n)
    first = [_digests(dataset, row) for row in rows]
    twice = zip(first, (_digests(dataset, row) for row in rows[:_READ_TWICE]), strict=False)
    random_parts = {
        place for one, other in twice for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]
    }
    kept = [b"".join(b"random" if place in random_parts else part for place, part in enumerate(one)) for one in first]
    beginnings = [hashlib.blake2b(one, digest_size=16).hexdigest()[:ROW_CHARACTERS] for one in kept]
    digest = hashlib.blake2b(b"".join(kept), digest_size=16).hexdigest()
    return {"n_train": n, "data": digest, "data_rows": "".join(beginnings)}


def digest_of(dataset: Any, row: int) -> bytes | None:
    """Return a digest of an example, read with a fixed seed; None if it holds an object that cannot be compared.

    The global random state is overwritten, as by `fingerprint`.

    >>> digest_of([(1.0, "a"), (1.0, "b")], 0) == digest_of([(1.0, "a")], 0)
    True
    """
    seed_all(0)
    return _comparable_digest(dataset[row])


def digests_of_rows(batch: Any, size: int) -> list[bytes] | None:
    """Return a digest of each example of a batch; None if the batch holds an object that cannot be compared.

    Where every tensor has a row for each example, and there is nothing else, a digest depends on the example alone.
    Else it depends on the whole batch and the example's place in it.

    >>> one, other = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [3.0]])
    >>> digests_of_rows({"x": one}, 2)[1] == digests_of_rows({"x": other}, 2)[0]
    True
    """
    if check_rows(batch, size) is not None or not _only_tensors(batch):
        whole = _comparable_digest(batch)
        return None if whole is None else [_digest([whole, str(place).encode()]) for place in range(size)]
    tensors = tensors_of(batch)
    form = [*_parts(map_tensors(batch, lambda _: None))]
    form += [f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode() for tensor in tensors]
    common, own = _digest(form), [tensor.cpu() for tensor in tensors]
    return [_digest([common, *(bytes_of(tensor[row]) for tensor in own)]) for row in range(size)]


def _comparable_digest(value: Any) -> bytes | None:
    """Return a digest of an example or a batch; None if it holds an object that cannot be compared."""
    parts = list(_parts(value))
    return None if any(isinstance(part, _Opaque) for part in parts) else _digest(parts)


def _only_tensors(batch: Any) -> bool:
    """Say whether a batch holds nothing but dense tensors, and None."""
    if isinstance(batch, Mapping):
        return all(map(_only_tensors, batch.values()))
    if isinstance(batch, (list, tuple)):
        return all(map(_only_tensors, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return all(_only_tensors(getattr(batch, field.name, None)) for field in dataclasses.fields(batch))
    return batch is None or (isinstance(batch, Tensor) and batch.layout == torch.strided)


def _digest(parts: Iterable[bytes | memoryview]) -> bytes:
    """Return a digest of some values; it tells where one ends and the next begins."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _digests(dataset: Any, row: int) -> list[bytes]:
    seed_all(0)
    return [hashlib.blake2b(part, digest_size=16).digest() for part in _parts(dataset[row])]


class _Opaque(bytes):
    """The name of a type, in place of a value that cannot be compared."""


def _parts(example: Any) -> Iterator[bytes]:
    """Yield the bytes of every value in an example."""
    if isinstance(example, torch.Tensor) and example.layout != torch.strided:
        yield _Opaque(str(example.layout).encode())
    elif isinstance(example, torch.Tensor):
        yield f"{example.dtype}{tuple(example.shape)}".encode()
        yield bytes_of(example).tobytes()
    elif isinstance(example, Mapping):
        for key in example:
            yield str(key).encode()
            yield from _parts(example[key])
    elif isinstance(example, (list, tuple)):
        for value in example:
            yield from _parts(value)
    elif dataclasses.is_dataclass(example) and not isinstance(example, type):
        for field in dataclasses.fields(example):
            yield from _parts(getattr(example, field.name, None))
    elif isinstance(example, (str, int, float, complex, bool, bytes, type(None))):
        yield repr(example).encode()
    elif hasattr(example, "__array__") or hasattr(example, "__array_interface__"):  # NumPy, PIL
        array = np.asarray(example)
        yield f"{array.dtype}{array.shape}".encode()
        yield array.tobytes() if array.dtype != object else repr(array.tolist()).encode()
    else:
        yield _Opaque(type(example).__name__.encode())


_SAMPLED = 1024
ROW_CHARACTERS = 4  # of a row's hexadecimal digest: enough to find the row that differs; ``data`` decides equality


def sampled_rows(n: int, most: int = _SAMPLED) -> list[int]:
    """Return some of n rows, evenly spaced, with first and last: by default those by which datasets are compared.

    >>> sampled_rows(3), len(sampled_rows(5000)), sampled_rows(5000)[-1], sampled_rows(9, most=3)
    ([0, 1, 2], 1024, 4999, [0, 4, 8])
    """
    return sorted({round(row) for row in np.linspace(0, n - 1, min(n, most))})


def difference(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say how two datasets differ: in length, in content, and which row is the first that differs.

    Args:
        former: the `fingerprint` of one. In old stores it lacks ``"data_rows"``, which has `ROW_CHARACTERS` for each of
            the `sampled_rows`.
        now: the `fingerprint` of the other.

    >>> difference({"n_train": 3, "data_rows": "000011112222"}, {"n_train": 3, "data_rows": "0000aaaa2222"})
    'as many examples as here, 3, with other content: 1 of 3 compared rows differ, the first of them row 1'
    """
    sizes = former["n_train"], now["n_train"]
    equal = sizes[0] == sizes[1]
    length = f"as many examples as here, {sizes[0]}" if equal else f"{sizes[0]} examples, here {sizes[1]}"
    one, other = _by_row(former), _by_row(now)
    common = [row for row in one if row in other]
    places = [place for place, row in enumerate(common) if one[row] != other[row]]
    if not common or (equal and not places):
        return f"{length}, with other content" if equal else length
    if not places:
        return f"{length}; all {len(common)} compared rows are the same"
    first = common[places[0]]
    least = common[places[0] - 1] + 1 if places[0] else 0
    where = f"row {first}" if least == first else f"one of the rows {least} to {first}"
    return (
        f"{length}, with other content: {len(places)} of {len(common)} compared rows differ, the first of them {where}"
    )


def _by_row(data: Mapping[str, Any]) -> dict[int, str]:
    digits = data.get("data_rows", "")
    found = [digits[first : first + ROW_CHARACTERS] for first in range(0, len(digits), ROW_CHARACTERS)]
    return dict(zip(sampled_rows(data["n_train"]), found, strict=bool(found)))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values in row-major order, whatever its strides.

    >>> bytes_of(torch.arange(6, dtype=torch.uint8).view(2, 3)[:, 1]).tolist()
    [1, 4]
    """
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape(-1): a column of one entry counts as contiguous but keeps its stride, which view(dtype) refuses.
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data  # type: ignore[no-any-return]
