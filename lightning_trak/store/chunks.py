"""Arrays of many rows, in one file for each range of rows. All work is to fill the missing ranges."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from time import sleep

import numpy as np
from filelock import FileLock, Timeout

from lightning_trak.store.arrays import Array, map_arrays, write_arrays
from lightning_trak.store.files import Damaged, check_own, explained_os_errors, to_disk
from lightning_trak.store.remote import AnyPath, fetch, reading, writable

_END = ".safetensors"
_BYTES, _SECONDS = 2**21, 60.0  # of a chunk, at most
_ROWS, _PARTS = 64, 128  # in a chunk at least, and chunks at most, if the seconds are unknown
_AHEAD = 16  # chunks in an object store that are copied at once
_SHORTEST, _WAIT = 0.01, 0.5  # seconds between two looks whether another process is done, at first and later
_REMEDY = "trainer.attribute(...) with a train set computes its rows again."


class Chunks:
    """Arrays of n rows, in files of ``size`` rows each: *chunks*. That a file is there says that its rows are done.

    A file is written whole or not at all, and never changed. So several processes may read and fill the same chunks.
    The folder is made with the first file. What it is in must be there: it is gone if a checkpoint was deleted.

    Args:
        folder: of the files.
        place: names what the rows belong to; see `write_arrays`.
        n: the number of rows.
        size: of a chunk; the last may be smaller.
        per_chunk: names of arrays that have no row for each row of a chunk, but any form.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     chunks = Chunks(Path(folder), "example", n=5, size=2)
    ...     chunks.write(2, {"x": np.array([2.0, 3.0])})
    ...     chunks.missing(), chunks.rows([3], ["x"])
    ([range(0, 2), range(4, 5)], {'x': array([3.])})
    """

    def __init__(self, folder: AnyPath, place: str, n: int, size: int, per_chunk: Collection[str] = ()) -> None:
        self.folder, self.n, self.size = folder, n, size
        self.place, self._per_chunk = place, per_chunk

    def all(self) -> list[range]:
        """Return the rows of every chunk."""
        return [self.of(start) for start in range(0, self.n, self.size)]

    def of(self, start: int) -> range:
        """Return the rows of the chunk that begins with the row ``start``."""
        return range(start, min(start + self.size, self.n))

    def missing(self) -> list[range]:
        """Return the rows of the chunks that are not there."""
        there = self._there()
        return [rows for rows in self.all() if rows.start not in there]

    def present(self) -> list[range]:
        """Return the rows of the chunks that are there."""
        return [self.of(start) for start in sorted(self._there())]

    @property
    def complete(self) -> bool:
        """Whether all rows are there."""
        return len(self._there()) == -(-self.n // self.size)

    def _there(self) -> set[int]:
        """Return the first rows of the chunks that are there."""
        if not self.folder.is_dir():
            return set()
        names = {path.name for path in self.folder.iterdir()}
        starts = {int(name.removesuffix(_END)) for name in names if name.removesuffix(_END).isdecimal()}
        return {row for row in starts if row < self.n and not row % self.size and self.path(row).name in names}

    def path(self, start: int) -> AnyPath:
        """Return the file of the chunk that begins with the row ``start``."""
        return self.folder / f"{start:010d}{_END}"

    def write(self, start: int, arrays: Mapping[str, Array]) -> None:
        """Write the rows of a chunk, by name (r, ...)."""
        path = writable(self.path(start))
        with self.there_still(), explained_os_errors(path.parent):
            path.parent.mkdir(exist_ok=True)
            write_arrays(path, arrays, self._place_of(start))

    def read(self, rows: range, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Return the arrays ``names`` of a chunk, or all: the file's memory, to be copied or used at once.

        Raises:
            Damaged: if it is missing or damaged.
        """
        path = self.path(rows.start)
        try:
            arrays = map_arrays(path, self._place_of(rows.start), names)[0]
        except FileNotFoundError as error:
            raise Damaged(path, "it is missing", _REMEDY) from error
        except Damaged as error:
            raise Damaged(path, error.why, _REMEDY) from error
        of_rows = {name: array for name, array in arrays.items() if name not in self._per_chunk}
        wrong = [name for name, array in of_rows.items() if array.shape[:1] != (len(rows),)]
        if wrong:
            raise Damaged(path, f"it has another number of rows than {len(rows)} in {', '.join(wrong)}", _REMEDY)
        return arrays

    def fetched(self, starts: Sequence[int]) -> Iterator[int]:
        """Yield the first rows of chunks to be read; those in an object store are copied before, 16 at a time."""
        for number, start in enumerate(starts):
            if number % _AHEAD == 0:
                fetch([self.path(one) for one in starts[number : number + _AHEAD]])
            yield start

    def rows(self, chosen: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Array]:
        """Return some rows, in any order, of chunks that are there."""
        found: dict[int, dict[str, Array]] = {}
        for start in self.fetched(sorted({row - row % self.size for row in chosen})):
            arrays = self.read(self.of(start), names)
            places = {row: row - start for row in chosen if row - row % self.size == start}
            found |= {row: {name: array[place] for name, array in arrays.items()} for row, place in places.items()}
        return {name: np.stack([found[row][name] for row in chosen]) for name in found[chosen[0]]}

    def column(self, name: str) -> Array:
        """Return an array of all rows."""
        return self.columns([name])[name]

    def columns(self, names: Sequence[str]) -> dict[str, Array]:
        """Return small arrays of all rows, by name; each file is opened once."""
        (whole,) = self.blocks(names, self.n)
        return whole

    def blocks(self, names: Sequence[str] | None, size: int) -> Iterator[dict[str, Array]]:
        """Yield all rows of the arrays ``names``, or of all arrays, in order, ``size`` at a time."""
        read = Reader(self, names)
        for start in range(0, self.n, size):
            yield read(range(start, min(start + size, self.n)))

    def copied(self, folder: Path) -> Chunks:
        """Return the same chunks in another folder: by hard links where the disk can, which take no space."""
        with explained_os_errors(folder):
            folder.mkdir(parents=True)
            for path in map(self.path, self.fetched(range(0, self.n, self.size))):
                reading(path, partial(_put, folder / path.name))
            to_disk(folder)
        return Chunks(folder, self.place, self.n, self.size)

    @staticmethod
    def delete(folder: Path) -> list[Path]:
        """Delete all chunks in a folder; return their files."""
        check_own(folder)
        deleted = sorted(folder.glob(f"*{_END}"))
        for path in deleted:
            path.unlink(missing_ok=True)
        return deleted

    @contextmanager
    def there_still(self) -> Iterator[None]:
        """Name the folder that was deleted, where a file cannot be written for want of it."""
        try:
            yield
        except FileNotFoundError as error:
            raise Damaged(self.folder.parent, "it was deleted in the meantime") from error

    def delete_damaged(self) -> list[Path]:
        """Delete damaged chunks, which makes them missing ones; return their files."""
        check_own(self.folder)
        deleted = []
        for rows in self.present():
            try:
                self.read(rows)
            except Damaged as error:
                path = writable(error.path)
                path.unlink(missing_ok=True)
                deleted.append(path)
        return deleted

    def _place_of(self, start: int) -> str:
        rows = self.of(start)
        return f"{self.place}|rows {rows.start} to {rows.stop}"


def _put(to: Path, path: Path) -> None:
    """Link or copy a file."""
    try:
        os.link(path, to)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, to)
        to_disk(to)


class Reader:
    """Reads ranges of rows, and keeps the last chunk that it has read: ranges in order read each chunk once.

    Args:
        chunks: to be read; those that are asked for are there.
        names: of the arrays; None for all.
    """

    def __init__(self, chunks: Chunks, names: Sequence[str] | None = None) -> None:
        self._chunks, self._names = chunks, names
        self._held: tuple[range, dict[str, Array]] = range(0), {}

    def __call__(self, rows: range) -> dict[str, Array]:
        """Return the arrays of some rows, in memory of their own."""
        size = self._chunks.size
        found: dict[str, Array] = {}
        for start in self._chunks.fetched(range(rows.start - rows.start % size, rows.stop, size)):
            own = self._chunks.of(start)
            if self._held[0] != own:
                self._held = own, self._chunks.read(own, self._names)
            here = range(max(rows.start, start), min(rows.stop, own.stop))
            for name, array in self._held[1].items():
                if name not in found:
                    found[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
                if (found[name].dtype, found[name].shape[1:]) != (array.dtype, array.shape[1:]):
                    raise Damaged(self._chunks.path(start), f"{name} differs in form from other chunks", _REMEDY)
                to = slice(here.start - rows.start, here.stop - rows.start)
                found[name][to] = array[here.start - start : here.stop - start]
        return found


class Claim:
    """Missing chunks that this process computes: each is one process's at a time, until it is written.

    Iterate over a claim for the rows to compute. A chunk is claimed when its first row is asked for, so that other
    processes can take those that follow. The lock dies with its process. A chunk that another process has is left out.

    Use it as a context manager, which gives back what is not written.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._locks: dict[int, FileLock] = {}
        self._rows: dict[int, list[tuple[Sequence[int], dict[str, Array]]]] = {}
        self._process = os.getpid()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() == self._process:  # else it is a fork, which has nothing to give back
            for start in list(self._locks):
                self._release(start)

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self.chunks())

    def chunks(self) -> Iterator[range]:
        """Yield the rows of one chunk after the other, each claimed when it is asked for."""
        for rows in self._chunks.missing():
            if self._take(rows.start):
                yield rows

    def write(self, rows: Sequence[int], arrays: Mapping[str, Array]) -> None:
        """Take the arrays of some rows; a chunk is written as soon as all of its rows are there.

        Raises:
            ValueError: if a row is not claimed, or comes twice.
        """
        size = self._chunks.size
        starts = np.asarray(rows) // size * size
        for start in np.unique(starts).tolist():
            places = np.flatnonzero(starts == start).tolist()
            own = [rows[place] for place in places]
            if start not in self._locks:
                raise ValueError(f"The rows {own} are written already, or are not claimed.")
            held = self._rows.setdefault(start, [])
            held.append((own, {name: array[places] for name, array in arrays.items()}))
            found = [row for part, _ in held for row in part]
            if len(found) == len(self._chunks.of(start)):
                if len({*found}) < len(found):
                    raise ValueError(f"Of the chunk that begins with row {start}, rows came twice: {found}.")
                parts = [([row - start for row in part], one) for part, one in held]
                del self._rows[start]
                self.write_whole(start, scattered(parts, len(found)))

    def write_whole(self, start: int, arrays: Mapping[str, Array]) -> None:
        """Write all rows of a claimed chunk, in order, without a copy of them."""
        self._chunks.write(start, arrays)
        self._release(start)

    def _take(self, start: int) -> bool:
        """Lock a chunk; say whether it is this process's to compute."""
        folder = writable(self._chunks.folder)
        with self._chunks.there_still(), explained_os_errors(folder):
            folder.mkdir(exist_ok=True)
            lock = FileLock(folder / f"{start:010d}.lock", thread_local=False)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                return False
        self._locks[start] = lock
        if self._chunks.path(start).exists():  # another process has computed it in the meantime
            self._release(start)
            return False
        return True

    def _release(self, start: int) -> None:
        """Give a chunk back. Its lock file goes first: whoever takes a new one looks whether the chunk is there."""
        lock = self._locks.pop(start)
        with suppress(OSError):  # Windows does not delete what is open
            Path(lock.lock_file).unlink()
        lock.release()


def rows_in_a_chunk(row_bytes: int, n: int, seconds: float | None = None) -> int:
    """Return how many rows a chunk of features has: at most 2 MiB, and a minute's work.

    If it is unknown how long they take, a chunk has a 128th of all rows, or 64 if that is more.

    Args:
        row_bytes: how much is stored of an example.
        n: the number of all rows.
        seconds: how long it takes to compute one; None if that is unknown.

    >>> rows_in_a_chunk(8200, 1000), rows_in_a_chunk(8200, 10**6), rows_in_a_chunk(8200, 1000, seconds=2.0)
    (64, 255, 30)
    """
    rows = int(_SECONDS / seconds) if seconds else max(_ROWS, n // _PARTS)
    return max(1, min(rows, _BYTES // row_bytes))


def shares(chunks: Chunks, waiting: Callable[[], object] = lambda: None) -> Iterator[tuple[Claim, Iterator[range]]]:
    """Yield claims, with their chunks, until none is missing.

    ``waiting`` is called again and again while other processes have all missing chunks.
    """
    wait = _SHORTEST
    while chunks.missing():
        with Claim(chunks) as claim:
            own = claim.chunks()
            first = next(own, None)
            if first is None:
                waiting()
                sleep(wait)
                wait = min(2 * wait, _WAIT)
            else:
                yield claim, chain([first], own)


def scattered(parts: Iterable[tuple[Sequence[int], Mapping[str, Array]]], n: int) -> dict[str, Array]:
    """Return arrays of n rows from parts (rows, arrays by name) that together have each row once."""
    whole: dict[str, Array] = {}
    for rows, arrays in parts:
        for name, array in arrays.items():
            if name not in whole:
                whole[name] = np.zeros((n, *array.shape[1:]), array.dtype)
            whole[name][rows] = array
    return whole
