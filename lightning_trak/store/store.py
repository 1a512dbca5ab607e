"""FeatureStore: a directory of checkpoints, their features, and scores. NumPy only."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning_trak.data.identity import difference
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.files import explained_os_errors, read_json, write_json

FORMAT_VERSION = 1


class FeatureStore:
    """A directory with the weights of every checkpoint, and the features of all training examples at each.

    ::

        <dirpath>/manifest.json                     format version, n_train, projection, parameters, data fingerprint
        <dirpath>/checkpoints/<digest>/weights.pt   the weights
                                       features.npy, loss_grad.npy: Φ and Q
                                       curvature.npy: w, the curvature ∂²L/∂f² of each example's loss
                                       curvature.pt: that of the parameters, if gradients are whitened
                                       sums-*.npz: H and other sums over the train set
                                       written.npy, meta.json
        <dirpath>/scores/<name>/...

    A checkpoint is named by the digest of its weights, so the same weights twice are one entry. All entries share one
    manifest. What does not fit it is an error.

    Args:
        dirpath: the directory of an existing store; `FeatureStore.create` makes a new one.

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if its manifest is damaged or of another format version.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.create(folder, {"n_train": 2})
    ...     entry = store.add("abc", {"epoch": 0})
    ...     entry.allocate(k=3)
    ...     entry.write([1], np.ones((1, 3)), np.ones(1), np.ones(1))
    ...     store.digests, entry.missing_rows().tolist(), entry.complete
    (['abc'], [0], False)
    """

    def __init__(self, dirpath: str | os.PathLike[str]) -> None:
        self.dirpath = Path(dirpath)
        path = self.dirpath / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no feature store in '{dirpath}' (no manifest.json). Train with TRAKCallback('{dirpath}')"
                " first, or pass checkpoints with ckpt_path=..."
            )
        self.manifest = read_json(path)
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"The store '{dirpath}' has format_version={version!r}; this version of lightning_trak reads"
                f" {FORMAT_VERSION}. Use another dirpath."
            )

    @classmethod
    def create(cls, dirpath: str | os.PathLike[str], manifest: Mapping[str, Any]) -> FeatureStore:
        """Open the store in ``dirpath``; create it with ``manifest`` if there is none.

        Raises:
            ValueError: if it was made with another manifest. The message names the field, both values and the remedy.
            OSError: if the directory cannot be written.
        """
        path = Path(dirpath)
        with explained_os_errors(path):
            if not (path / "manifest.json").exists():
                (path / "checkpoints").mkdir(parents=True, exist_ok=True)
                write_json(path / "manifest.json", {"format_version": FORMAT_VERSION, **manifest})
        store = cls(path)
        store.check(manifest)
        return store

    @staticmethod
    def remove(dirpath: str | os.PathLike[str]) -> None:
        """Delete the store in ``dirpath``, if there is one: its checkpoints and scores. Other files stay."""
        path = Path(dirpath)
        if not (path / "manifest.json").is_file():
            return
        removed = path / f"removed-{uuid4().hex}"
        removed.mkdir()
        for name in ("checkpoints", "scores", "manifest.json"):  # moved first: a new store must not take them over
            if (path / name).exists():
                os.replace(path / name, removed / name)
        shutil.rmtree(removed, ignore_errors=True)

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise a ValueError that names the first field in which ``manifest`` differs from the store's own."""
        for name, value in json.loads(json.dumps(manifest)).items():
            if name == "data_rows":  # it only says where "data" differs
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

            if list(_flat({name: value})) != list(_flat({name: self.manifest.get(name)})):
                raise ValueError(
                    f"The store '{self.dirpath}' was made with the {name} in another order than here:"
                    f" {_short(list(self.manifest[name]))} against {_short(list(value))}. Use another dirpath."
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
    def n_train(self) -> int:
        """The number of training examples."""
        return int(self.manifest["n_train"])

    @property
    def digests(self) -> list[str]:
        """The digests of the checkpoints, in the order in which they were added."""
        found = [(entry.meta.get("created", 0), entry.digest) for entry in self]
        return [digest for _, digest in sorted(found)]

    def __iter__(self) -> Iterator[CheckpointEntry]:
        folder = self.dirpath / "checkpoints"
        for path in sorted(folder.iterdir() if folder.is_dir() else []):
            if (path / "meta.json").is_file():
                yield CheckpointEntry(path, self.n_train)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, digest: str) -> bool:
        return (self.dirpath / "checkpoints" / digest / "meta.json").is_file()

    def __getitem__(self, digest: str) -> CheckpointEntry:
        if digest not in self:
            raise KeyError(f"The store '{self.dirpath}' has no checkpoint {digest}; it has {self.digests}.")
        return CheckpointEntry(self.dirpath / "checkpoints" / digest, self.n_train)

    def folder(self, digest: str) -> Path:
        """Return the folder of a checkpoint, created if needed. Weights are written there before the entry is added."""
        path = self.dirpath / "checkpoints" / digest
        with explained_os_errors(self.dirpath):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, digest: str, meta: Mapping[str, Any]) -> CheckpointEntry:
        """Add a checkpoint without features; one that is there already is returned unchanged."""
        if digest not in self:
            path = self.folder(digest)
            with explained_os_errors(self.dirpath):
                write_json(path / "meta.json", {"digest": digest, "created": time.time_ns(), **meta})
        return self[digest]

    def discard(self, digest: str) -> None:
        """Delete a checkpoint and its features."""
        shutil.rmtree(self.dirpath / "checkpoints" / digest, ignore_errors=True)

    def scores_dir(self, name: str) -> Path:
        """Return the directory of the scores saved under ``name``."""
        return self.dirpath / "scores" / folder_name(name)

    def __repr__(self) -> str:
        complete = sum(entry.complete for entry in self)
        return (
            f"FeatureStore('{self.dirpath}', n_train={self.n_train}, checkpoints={len(self)}, featurized={complete},"
            f" projection={_short(self.manifest.get('projection'))})"
        )


def folder_name(name: str) -> str:
    """Return ``name`` if a folder can have it.

    Raises:
        ValueError: if none can.
    """
    if not isinstance(name, str) or not name or name != Path(name).name or name in (".", "..") or "\0" in name:
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
