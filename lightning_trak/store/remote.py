"""Files in an object store, such as ``s3://bucket/store``: read through local copies, never written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import filter as matching
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote
from uuid import uuid4

from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

T = TypeVar("T")
CACHE = "LIGHTNING_TRAK_CACHE"  # names the folder of copies
_FREE = 2**30  # bytes that copies leave free on their disk
_DIGEST = 32  # characters
_OWN = f"*-{'[0-9a-f]' * _DIGEST}/{'[0-9a-f]' * _DIGEST}"  # copies: the folder may have other files
_NO_VERSION = {"name", "size", "type"}  # what a listing says of a file without telling one content from another


class ReadOnly(OSError):
    """A file or folder in an object store was to be written."""


class Version(NamedTuple):
    """What an object store lists of a file."""

    known: str
    size: int


class NotFetched(Exception):
    """Files could not be listed or copied. It is no OSError: where a file is read, that would mean damage."""


class RemotePath:
    """A file or folder that has a URL, with what reading needs of `pathlib.Path`.

    A file is copied into the cache when it is read, and the copy is used as long as the file stays the same: its name
    is a digest of the URL and of all that the object store lists of the file, such as time and ETag. The cache is the
    folder that the environment variable ``LIGHTNING_TRAK_CACHE`` names, by default ``~/.cache/lightning_trak``. When
    less than 1 GiB of its disk is free, the oldest copies are deleted. What is computed from the files is kept there
    too. The folder may be deleted when no program uses it.

    Folders are listed once, when they are first looked into. `path_of` returns a path that has not been listed.

    Args:
        source: has the URL that the path begins with.
        parts: the names that follow.

    Attributes:
        url: the whole URL.
        name: the last part of it.

    >>> path = path_of("s3://bucket/store") / "manifest.json"
    >>> path, path.name, path.parent
    (RemotePath('s3://bucket/store/manifest.json'), 'manifest.json', RemotePath('s3://bucket/store'))
    """

    def __init__(self, source: Source, parts: tuple[str, ...] = ()) -> None:
        self._source, self._parts = source, parts
        self.url = "/".join((source.url, *parts))
        self.name = self.url.rpartition("/")[2]

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._source, (*self._parts, *name.split("/")))

    @property
    def parent(self) -> RemotePath:
        """The folder that has this file or folder; of the URL that was given, itself."""
        return RemotePath(self._source, self._parts[:-1])

    def exists(self) -> bool:
        """Whether there is such a file or folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether it is a file."""
        return bool(self._parts) and self._source.listed(self._parts[:-1]).get(self.name) is not None

    def is_dir(self) -> bool:
        """Whether it is a folder: there are files in it."""
        if not self._parts:
            return bool(self._source.listed(()))
        return self._source.listed(self._parts[:-1]).get(self.name, "") is None

    def is_symlink(self) -> bool:
        """Return False: object stores have no links."""
        return False

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the files and folders in a folder."""
        for name in self._source.listed(self._parts):
            yield self / name

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield what matches a pattern such as ``*/name``."""
        first, _, rest = pattern.partition("/")
        for name in matching(self._source.listed(self._parts), first):
            yield from (self / name).glob(rest) if rest else [self / name]

    def read_bytes(self) -> bytes:
        """Return the content of a file."""
        return self.read(Path.read_bytes)

    def read(self, read: Callable[[Path], T]) -> T:
        """Return what a function reads from a copy. If it fails, this is tried once more with a new copy.

        Raises:
            FileNotFoundError: if there is no such file.
            NotFetched: if it could not be copied.
        """
        for first in (True, False):
            copy = self._source.copy(self._parts)
            self._source.fetch([self._parts])
            try:
                return read(copy)
            except Exception:
                with suppress(OSError):
                    copy.unlink()
                if not first:
                    raise
        raise AssertionError

    @property
    def derived(self) -> Path:
        """The local folder for what is computed from the files in this folder, as they are now."""
        return self._source.folder / _digest([*self._parts, *sorted(self._source.listed(self._parts).items())])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"


AnyPath = Path | RemotePath


class Source:
    """What paths under one URL share: the connection, the listings of folders, and the copies."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._listings: dict[tuple[str, ...], dict[str, Version | None]] = {}

    def __reduce__(self) -> tuple[type[Source], tuple[str]]:
        """Pickle the URL alone: connections belong to their process."""
        return Source, (self.url,)

    @cached_property
    def folder(self) -> Path:
        """The folder of the copies."""
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_trak"
        return Path(os.environ.get(CACHE) or default) / f"{quote(self.url, safe='')[:100]}-{_digest([self.url])}"

    @cached_property
    def _connection(self) -> tuple[Any, str]:
        """Return the file system of ``fsspec``, and the path there."""
        try:
            system, path = url_to_fs(self.url)
        except ImportError as error:
            module = known_implementations[split_protocol(self.url)[0]]["class"].partition(".")[0]
            raise ImportError(f"'{self.url}' cannot be read: {error}. Run: pip install {module}") from error
        except ValueError as error:
            raise ValueError(f"'{self.url}' cannot be read: {error}. Expected s3://..., gs://... or alike.") from error
        system.invalidate_cache()  # it keeps listings from before
        return system, path.rstrip("/")

    def listed(self, parts: tuple[str, ...]) -> dict[str, Version | None]:
        """Return what is in a folder: of each file its version, of each folder None."""
        if parts not in self._listings:
            system, _ = self._connection
            path = self._path(parts)
            try:
                with self._explained():
                    found = system.ls(path, detail=True)
            except FileNotFoundError:
                found = []
            names = {entry["name"].strip("/").removeprefix(path.strip("/")).lstrip("/"): entry for entry in found}
            names.pop("", None)  # the folder itself, where it is an object too
            self._listings[parts] = {name: self._version(entry) for name, entry in names.items()}
        return self._listings[parts]

    def _version(self, entry: dict[str, Any]) -> Version | None:
        """Return all that is known of a file; None of a folder."""
        if entry["type"] == "directory":
            return None
        if not set(entry) - _NO_VERSION:
            raise ValueError(
                f"'{self.url}' cannot be read: nothing says whether a file there has changed, neither time nor ETag."
                " Copy the folder to a local disk."
            )
        return Version(repr(sorted(entry.items())), entry["size"] or 0)

    def version(self, parts: tuple[str, ...]) -> Version:
        """Return the version of a file.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        version = self.listed(parts[:-1]).get(parts[-1]) if parts else None
        if version is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/".join((self.url, *parts)))
        return version

    def copy(self, parts: tuple[str, ...]) -> Path:
        """Return where the copy of a file is."""
        return self.folder / _digest([*parts, self.version(parts).known])

    def fetch(self, files: Sequence[tuple[str, ...]]) -> None:
        """Copy files that have no copy, at the same time."""
        copies = {parts: self.copy(parts) for parts in files}
        missing = {parts: copy for parts, copy in copies.items() if not copy.exists()}
        if not missing:
            return
        partial = {parts: copy.with_name(f"{copy.name}.{uuid4().hex}") for parts, copy in missing.items()}
        try:
            with self._explained():
                self.folder.mkdir(parents=True, exist_ok=True)
                _make_room(self.folder.parent, sum(self.version(parts).size for parts in missing))
                remote, local = [self._path(parts) for parts in missing], [str(path) for path in partial.values()]
                self._connection[0].get(remote, local)
                for parts, copy in missing.items():
                    os.replace(partial[parts], copy)
        finally:
            for path in partial.values():
                with suppress(OSError):
                    path.unlink()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Let a missing file be one; turn all other errors into one that names the URL, the cache and the remedy."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # each object store has its own
            raise NotFetched(
                f"'{self.url}' cannot be read: {type(error).__name__}: {error}. Check the connection and your"
                f" permissions there, and whether '{self.folder}' can be written and has space. The environment"
                f" variable {CACHE} names another folder for copies."
            ) from error

    def _path(self, parts: tuple[str, ...]) -> str:
        return "/".join((self._connection[1], *parts))


def path_of(path: str | os.PathLike[str] | RemotePath) -> AnyPath:
    """Return a path from what a user gives; a URL has not been listed yet.

    Raises:
        ValueError: for a URL that went through `pathlib`, which makes one slash of two.

    >>> path_of("attributions").name, path_of("gs://bucket/attributions")
    ('attributions', RemotePath('gs://bucket/attributions'))
    """
    text = path.url if isinstance(path, RemotePath) else os.fspath(path)
    if text.startswith(("file://", "local://")):
        return Path(LocalFileSystem._strip_protocol(text))
    if "://" in text:
        return RemotePath(Source(text.rstrip("/")))
    if re.match(r"[a-z][a-z0-9+.-]+:[\\/]", text):
        raise ValueError(f"'{text}' is a URL with one slash in place of two, as pathlib makes it. Pass it as a string.")
    return Path(text)


def local_folder(path: AnyPath) -> Path:
    """Return a local folder, or the one in the cache for what is computed from a remote one."""
    return path.derived if isinstance(path, RemotePath) else path


def reading(path: AnyPath, read: Callable[[Path], T]) -> T:
    """Return what a function reads from a local file, or from the copy of a remote one."""
    return path.read(read) if isinstance(path, RemotePath) else read(path)


def fetch(paths: Sequence[AnyPath]) -> None:
    """Copy the remote ones of some files of a folder, at the same time: each alone takes a round trip."""
    remote = [path for path in paths if isinstance(path, RemotePath)]
    if remote:
        with suppress(FileNotFoundError):  # said when the file is read
            remote[0]._source.fetch([path._parts for path in remote])


def writable(path: AnyPath) -> Path:
    """Return a path that may be written to.

    Raises:
        ReadOnly: if it is a URL.
    """
    if isinstance(path, RemotePath):
        raise ReadOnly(
            errno.EROFS,
            f"'{path}' can be read, but not written. Work on a local folder, TRAKCallback('attributions'), and copy it"
            " there when all checkpoints are featurized, for example with 'aws s3 sync'",
        )
    return path


def _make_room(cache: Path, size: int) -> None:
    """Delete the oldest copies if the disk would be nearly full with ``size`` bytes more, until it is well below.

    Files that are open stay readable where systems allow.
    """
    free = shutil.disk_usage(cache).free - size
    if free >= _FREE:
        return
    with suppress(FileNotFoundError):  # another process deletes some too
        for path in sorted(cache.glob(_OWN), key=lambda path: path.stat().st_mtime):
            if free < 2 * _FREE and path.is_file():  # a folder holds what is derived
                free += path.stat().st_size
                with suppress(OSError):  # Windows does not delete what is open
                    path.unlink()


def _digest(parts: Sequence[object]) -> str:
    return blake2b(repr(parts).encode(), digest_size=_DIGEST // 2).hexdigest()
