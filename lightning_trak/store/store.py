"""FeatureStore: a directory of checkpoints, their features, and scores."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock
from torch import Tensor

from lightning_trak.data.identity import ROW_CHARACTERS, difference, sampled_rows
from lightning_trak.store.checkpoint import META, WEIGHTS, CheckpointEntry, targets_folder
from lightning_trak.store.chunks import Chunks
from lightning_trak.store.files import PARTIAL, Damaged, atomically, explained_os_errors, read_json, to_disk, write_json
from lightning_trak.store.remote import AnyPath, RemotePath, path_of, writable
from lightning_trak.store.weights import save_weights

FORMAT_VERSION = 2
CHUNK_ROWS = 256  # unless the manifest says another number
_LONGEST_NAME = 200  # bytes; names of files that are being written are longer
_ANEW = "Use another dirpath, or start anew with TRAKCallback(overwrite=True)."
_FIELDS = {  # that every manifest has
    "format_version": int,
    "id": str,
    "n_train": int,
    "chunk_rows": int,
    "parameters": dict,
    "projection": dict,
}
_NESTED: dict[str, dict[str, type]] = {  # fields of what every manifest has that a trainer made
    "projection": {"projector": str, "proj_dim": int, "seed": int, "arguments": dict},
    "preconditioner": {"entries": int},
}
_NOT_COMPARED = ("data_rows", "chunk_rows")  # the first says where "data" differs, the other may be any
_GROWING = ("n_train", "data", "data_rows")  # fields that change if examples are added to the train set


class FeatureStore:
    """A directory with the weights of every checkpoint, and the features of all training examples at each.

    ::

        <dirpath>/manifest.json                             format version, id, n_train, projection, parameters, data
        <dirpath>/checkpoints/<digest>/weights.safetensors  the weights
                                       meta.json            where they come from
                                       train/<row>.safetensors  Φ, Q, w and f of a range of rows, see `Chunks`
                                       whitening.safetensors    the curvature, if gradients are whitened
                                       sums-*.safetensors       H and other sums over the train set
                                       former/<n>/<row>.safetensors  the last rows, when the train set had n
        <dirpath>/targets/<digest of the targets>/<checkpoint>/<row>.safetensors  φ and f of a range of targets
                                       examples.safetensors     digests of all targets, by which sets are compared
                                       scores-*/<row>.safetensors  τ of a range of rows, and other numbers of scores
        <dirpath>/scores/<name>/...

    A checkpoint is named by the digest of its weights, so the same weights twice are one entry. All entries share one
    manifest. What does not fit it is an error. Every file has a checksum, which depends on its place in the store. Any
    number of processes may work on a store at the same time.

    Args:
        dirpath: the directory of an existing store; `FeatureStore.create` makes a new one. A store may also be read
            from where its directory was copied to, by a URL such as ``"s3://bucket/store"``; see `RemotePath`.

    Attributes:
        manifest: what all entries share.
        n_train: the number of training examples.

    Raises:
        FileNotFoundError: if there is no store.
        ImportError: if the package is missing that reads such URLs.
        ValueError: if its manifest is damaged or of another format version.

    >>> import tempfile
    >>> import numpy as np
    >>> import torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.create(folder, {"n_train": 2, "parameters": {}, "projection": {}, "chunk_rows": 1})
    ...     entry = store.add("abc", {"epoch": 0}, {"weight": torch.zeros(3)})
    ...     entry.train.write(0, {"features": np.ones((1, 3)), "loss_grad": np.ones(1), "curvature": np.ones(1)})
    ...     store.digests, entry.train.missing(), entry.complete
    (['abc'], [range(1, 2)], False)
    """

    def __init__(self, dirpath: str | os.PathLike[str] | RemotePath) -> None:
        self.dirpath = path_of(dirpath)
        path = self.dirpath / "manifest.json"
        if not path.is_file():
            remedy = f"Train with TRAKCallback('{dirpath}') first, or pass checkpoints with ckpt_path=..."
            if isinstance(path, RemotePath):
                remedy = "Check the URL, or copy the folder of a finished store there."
            raise FileNotFoundError(f"There is no feature store in '{dirpath}' (no manifest.json). {remedy}")
        _check_version(path)
        self.manifest = read_json(path, _ANEW)
        for name, kind in _FIELDS.items():
            value = self.manifest.get(name)
            if type(value) is not kind or (isinstance(value, int) and not 1 <= value <= sys.maxsize):
                raise Damaged(path, f"its {name} is {_short(value)}", _ANEW)
        self.n_train: int = self.manifest["n_train"]
        self._folder = self.dirpath / "checkpoints"
        rows = self.manifest.get("data_rows", "")
        if type(rows) is not str or len(rows) not in (0, ROW_CHARACTERS * len(sampled_rows(self.n_train))):
            raise Damaged(path, f"its data_rows are {_short(rows)}", _ANEW)
        for name, kinds in _NESTED.items():
            value = self.manifest.get(name) or {}
            if not isinstance(value, dict) or any(
                type(value[field]) is not kind for field, kind in kinds.items() if field in value
            ):
                raise Damaged(path, f"its {name} is {_short(value)}", _ANEW)
        lasting = {name: value for name, value in self.manifest.items() if name not in _GROWING}
        text = json.dumps(lasting, sort_keys=True)
        self.identity = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @classmethod
    def create(cls, dirpath: str | os.PathLike[str] | RemotePath, manifest: Mapping[str, Any]) -> FeatureStore:
        """Open the store in ``dirpath``; create it with ``manifest`` if there is none.

        Raises:
            ValueError: if it was made with another manifest. The message names the field, both values and the remedy.
            OSError: if the directory cannot be written.
        """
        path = writable(path_of(dirpath))
        with explained_os_errors(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            with FileLock(path / "manifest.lock"):
                if not (path / "manifest.json").exists():
                    own = {"format_version": FORMAT_VERSION, "id": uuid4().hex, "chunk_rows": CHUNK_ROWS}
                    write_json(path / "manifest.json", {**own, **manifest})
        store = cls(path)
        store.check(manifest)
        return store

    def grown(self, manifest: Mapping[str, Any]) -> FeatureStore:
        """Return this store for a larger train set, of which its own is the beginning. What is computed stays.

        Args:
            manifest: with ``n_train``, ``data`` and ``data_rows`` of the larger train set.

        Raises:
            OSError: if the directory cannot be written.
        """
        path = self.root / "manifest.json"
        with explained_os_errors(self.root), FileLock(self.root / "manifest.lock"):
            current = FeatureStore(self.root)
            if current.n_train < manifest["n_train"]:  # else another process has done it
                for entry in current:
                    entry.set_aside()
                write_json(path, {**current.manifest, **{name: manifest[name] for name in _GROWING}})
        return FeatureStore(self.root)

    @staticmethod
    def remove(dirpath: str | os.PathLike[str] | RemotePath) -> None:
        """Delete the store in ``dirpath``, if there is one: its checkpoints and scores. Other files stay."""
        path = writable(path_of(dirpath))
        own = [folder for folder in path.glob("checkpoints/*") if (folder / META).is_file()]
        if not own and not _is_manifest(path / "manifest.json"):
            return
        removed = path / f"removed-{uuid4().hex}"
        removed.mkdir()
        own += [folder for folder in path.glob("scores/*") if (folder / "attribution.json").is_file()]
        for one in [*own, path / "targets", path / "manifest.json"]:  # moved first: no new store has them
            if one.exists() and not one.is_symlink():
                os.replace(one, removed / f"{one.parent.name}-{one.name}")
        for name in ("checkpoints", "scores"):
            with suppress(OSError):  # others have put something there
                (path / name).rmdir()
        shutil.rmtree(removed, ignore_errors=True)

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise a ValueError that names the first field in which ``manifest`` differs from the store's own."""
        for name, value in json.loads(json.dumps(manifest)).items():
            if name in _NOT_COMPARED:
                continue
            given, stored = _flat({name: value}), _flat({name: self.manifest.get(name)})
            for field in [*stored, *(field for field in given if field not in stored)]:
                if stored.get(field) != given.get(field):
                    what, former = self._difference(field, stored.get(field), given.get(field), manifest)
                    raise ValueError(
                        f"The store '{self.dirpath}' was made with {what}: features of the two cannot be mixed. Use"
                        f" another dirpath for TRAKCallback, restore the former {former}, or start"
                        " anew with TRAKCallback(overwrite=True)."
                    )

            own = self.manifest.get(name)
            if isinstance(own, dict) and isinstance(value, dict) and list(_flat(own)) != list(_flat(value)):
                raise ValueError(
                    f"The store '{self.dirpath}' was made with the {name} in another order than here:"
                    f" {_short(list(own))} against {_short(list(value))}. Use another dirpath."
                )

    def _difference(self, field: str, own: Any, here: Any, manifest: Mapping[str, Any]) -> tuple[str, str]:
        """Return how a field of the store differs from that of another manifest, and the name of what differs."""
        if field in ("n_train", "data"):
            return f"another train set: {difference(self.manifest, manifest)}", "train set"
        if field == "preconditioner.name":
            whitened = "gradients that are whitened, but here they are not"
            plain = "gradients that are not whitened, but here they are"
            return whitened if own else plain, "preconditioner, projector, curvature and estimator"
        former = "proj_dim" if field in ("preconditioner.entries", "preconditioner.target_entries") else field
        return f"{field}={_short(own)}, but here {field}={_short(here)}", former

    @property
    def root(self) -> Path:
        """The local folder of the store; an OSError is raised if it is in an object store."""
        return writable(self.dirpath)

    @property
    def digests(self) -> list[str]:
        """The digests of the checkpoints, in the order in which they were added."""
        return [entry.digest for entry in self.entries()]

    def entries(self, digests: Iterable[str] | None = None) -> list[CheckpointEntry]:
        """Return the checkpoints with these digests, as far as they are there; or all, in the order of their adding."""
        if digests is None:
            return sorted(self, key=lambda entry: (entry.created, entry.digest))
        return [entry for digest in digests if (entry := self._entry_if_there(digest))]

    def __iter__(self) -> Iterator[CheckpointEntry]:
        for name in sorted(path.name for path in (self._folder.iterdir() if self._folder.is_dir() else [])):
            own = [(self._folder / name / file).exists() for file in (META, WEIGHTS, "train")]
            if not name.endswith(PARTIAL) and any(own) and (entry := self._entry_if_there(name)):
                yield entry

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, digest: str) -> bool:
        return (self._folder / digest).is_dir()

    def __getitem__(self, digest: str) -> CheckpointEntry:
        if digest not in self:
            raise KeyError(f"The store '{self.dirpath}' has no checkpoint {digest}; it has {self.digests}.")
        return self._entry(digest)

    def add(self, digest: str, meta: Mapping[str, Any], weights: Mapping[str, Tensor]) -> CheckpointEntry:
        """Add a checkpoint without features, whole or not at all; of one that is there, ``meta`` is supplemented."""
        if FeatureStore(self.dirpath).identity != self.identity:
            raise ValueError(
                f"Another program has started the store '{self.dirpath}' anew (overwrite=True). Give each its own"
                " dirpath."
            )
        if digest not in self:
            known = {"digest": digest, "store": self.identity, "created": time.time_ns(), **meta}
            folder = writable(self._folder)
            try:
                with explained_os_errors(folder), atomically(folder / digest) as partial:
                    partial.mkdir(parents=True)
                    save_weights(weights, partial / WEIGHTS)
                    write_json(partial / META, known)
            except OSError:
                if digest not in self:  # else another process has added it at the same time
                    raise
        entry = self[digest]
        entry.supplement(meta)
        return entry

    def discard(self, digest: str) -> None:
        """Delete a checkpoint and its features. It is renamed first: one that is half deleted would be damaged."""
        folder = self.root / "checkpoints"
        removed = folder / f"{digest}.{uuid4().hex}{PARTIAL}"
        with suppress(FileNotFoundError):
            os.replace(folder / digest, removed)
            to_disk(folder)
        shutil.rmtree(removed, ignore_errors=True)
        for folder in self.root.glob("targets/*"):
            shutil.rmtree(folder / digest, ignore_errors=True)

    def targets_folder(self, digest: str) -> Path:
        """Return the folder of all that is kept of some targets, of whose content this is the digest."""
        return targets_folder(self.dirpath, digest)

    def score_chunks(self, digest: str, key: str, size: int, per_chunk: Collection[str] = ()) -> Chunks:
        """Return the chunks of numbers of scores; ``key`` is what they depend on besides the targets. See `Chunks`."""
        name = f"scores-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"
        return Chunks(self.targets_folder(digest) / name, f"{digest}|{name}", self.n_train, size, per_chunk)

    def _entry(self, digest: str) -> CheckpointEntry:
        return CheckpointEntry(self._folder / digest, self.identity, self.n_train, self.manifest["chunk_rows"])

    def _entry_if_there(self, digest: str) -> CheckpointEntry | None:
        """Return a checkpoint; None if it was deleted, perhaps just now by another process."""
        try:
            return self._entry(digest)
        except Damaged:
            if (self._folder / digest).is_dir():
                raise
            return None

    def scores_dir(self, name: str) -> AnyPath:
        """Return the directory of the scores saved under ``name``."""
        return self.dirpath / "scores" / folder_name(name)

    def __repr__(self) -> str:
        found = [entry.complete for entry in self]
        return (
            f"FeatureStore('{self.dirpath}', n_train={self.n_train}, checkpoints={len(found)}, featurized={sum(found)},"
            f" projection={_short(self.manifest.get('projection'))})"
        )


def _is_manifest(path: Path) -> bool:
    """Say whether a file is the manifest of a store, of any format version, and maybe damaged."""
    if path.with_suffix(".lock").exists():
        return path.is_file()
    try:
        return type(json.loads(path.read_bytes())["format_version"]) is int
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return False


def _check_version(path: AnyPath) -> None:
    """Raise a ValueError if a manifest is of another format version; what has no version is damaged."""
    try:
        version = json.loads(path.read_bytes()).get("format_version")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # damaged; read_json says how
    if type(version) is int and version != FORMAT_VERSION:
        raise ValueError(
            f"The store '{path.parent}' has format_version={version!r}; this version of lightning_trak reads"
            f" {FORMAT_VERSION}. Use another dirpath, or start anew with TRAKCallback(overwrite=True)."
        )


def folder_name(name: str) -> str:
    """Return ``name`` if a folder can have it.

    Raises:
        ValueError: if none can.
    """
    try:
        usable = 0 < len(os.fsencode(name)) <= _LONGEST_NAME and name == Path(name).name and "\0" not in name
    except (TypeError, UnicodeError):
        usable = False
    if not usable or name in (".", ".."):
        raise ValueError(f"name must be usable as a folder name, got {name!r}.")
    return name


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested objects by their path, e.g. ``projection.seed``."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {prefix + name: item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:100]} ... {text[-50:]}"
