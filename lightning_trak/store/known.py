"""Rows that are stored already: of the same targets in another set, or of the train set when it was smaller."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property

import numpy as np

from lightning_trak.store.arrays import Array, read_arrays, write_arrays
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.chunks import Chunks
from lightning_trak.store.files import Damaged, explained_os_errors
from lightning_trak.store.store import FeatureStore

EXAMPLES = "examples.safetensors"
TargetChunks = Callable[[CheckpointEntry, str, int], Chunks]  # of a checkpoint, a set's digest and its size


class KnownRows:
    """Rows of chunks that are stored elsewhere.

    Args:
        places: by row, the chunks that have it, and its row there.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     chunks = Chunks(Path(folder), "example", n=4, size=2)
    ...     chunks.write(2, {"x": np.array([2.0, 3.0])})
    ...     list(KnownRows({7: (chunks, 3), 8: (chunks, 0)}).among([6, 7, 8]))
    [([7], {'x': array([3.])})]
    """

    def __init__(self, places: Mapping[int, tuple[Chunks, int]]) -> None:
        self._places = {}
        there = {chunks: {rows.start for rows in chunks.present()} for chunks in {one for one, _ in places.values()}}
        for row, (chunks, source) in places.items():
            if source - source % chunks.size in there[chunks]:
                self._places[row] = chunks, source

    def among(self, rows: Iterable[int]) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """Yield those of some rows that are known, with their arrays by name (r, ...). Damaged ones are left out."""
        of: dict[Chunks, list[int]] = {}
        for row in rows:
            if row in self._places:
                of.setdefault(self._places[row][0], []).append(row)
        for chunks, own in of.items():
            with suppress(Damaged):  # then they are computed
                yield own, chunks.rows([self._places[row][1] for row in own])


def known_of_train(entry: CheckpointEntry) -> KnownRows:
    """Return the rows at the end of a train set that was smaller than it is now."""
    return KnownRows({row: (chunks, row) for chunks in entry.former() for row in chunks.all()[-1]})


class OtherSets:
    """The sets of targets that are stored beside a set; their digests are read when rows are first asked for.

    Args:
        store: the store.
        digests: of the targets of the set.
        chunks_of: returns the chunks of a set of targets at a checkpoint.
    """

    def __init__(self, store: FeatureStore, digests: Sequence[bytes], chunks_of: TargetChunks) -> None:
        self._store, self._digests, self._chunks_of = store, digests, chunks_of

    def known(self, entry: CheckpointEntry) -> KnownRows:
        """Return which targets are stored in other sets, at a checkpoint."""
        places: dict[int, tuple[Chunks, int]] = {}
        for digest, (size, pairs) in self._shared.items():
            chunks = self._chunks_of(entry, digest, size)
            places |= {row: (chunks, source) for row, source in pairs}
        return KnownRows(places)

    @cached_property
    def _shared(self) -> dict[str, tuple[int, list[tuple[int, int]]]]:
        """The size of each other set by its digest, and the rows that both have: (here, there)."""
        rows: dict[bytes, list[int]] = {}
        for row, digest in enumerate(self._digests):
            rows.setdefault(digest, []).append(row)
        own, shared = digest_of_set(self._digests), {}
        for name in sorted(path.name for path in self._store.targets_folder(own).parent.glob("*")):
            if name != own:
                with suppress(FileNotFoundError, Damaged):  # a set of random targets, or one that is being deleted
                    there = read_examples(self._store, name)
                    pairs = [(row, source) for source, one in enumerate(there) for row in rows.get(one, ())]
                    shared[name] = len(there), pairs
        return shared


def digest_of_set(digests: Iterable[bytes]) -> str:
    """Return the digest of a set of targets, from those of its examples in order."""
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def write_examples(store: FeatureStore, digests: Sequence[bytes]) -> None:
    """Store the digests of a set of targets, so that other sets find its rows."""
    own = digest_of_set(digests)
    folder = store.targets_folder(own)
    if not (folder / EXAMPLES).exists():
        with explained_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            array = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
            write_arrays(folder / EXAMPLES, {"digests": array}, _place(store, own))


def read_examples(store: FeatureStore, digest: str) -> list[bytes]:
    """Return the digests of a set of targets.

    Raises:
        FileNotFoundError: if there are none.
        Damaged: if they are damaged, or of another set.
    """
    path = store.targets_folder(digest) / EXAMPLES
    array = read_arrays(path, _place(store, digest))["digests"]
    digests = [row.tobytes() for row in array]
    if digest_of_set(digests) != digest:
        raise Damaged(path, "it is of other targets")
    return digests


def _place(store: FeatureStore, digest: str) -> str:
    return f"{store.identity}|targets {digest}|examples"
