"""The weights of checkpoints: their digests and their files."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from lightning_trak.data.identity import bytes_of
from lightning_trak.store.files import Damaged, atomically
from lightning_trak.store.remote import AnyPath, reading

Weights = dict[str, Tensor]


def tensors_in(state_dict: Mapping[str, Any]) -> Weights:
    """Return the tensors of a state dict, detached; other entries are left out."""
    return {name: value.detach() for name, value in state_dict.items() if isinstance(value, Tensor)}


def copy_of_weights(module: nn.Module) -> Weights:
    """Return a copy of a module's weights. A forward pass may change the originals in place, as with ``max_norm=1``.

    >>> layer = nn.Linear(1, 1)
    >>> copy_of_weights(layer)["weight"].data_ptr() == layer.weight.data_ptr()
    False
    """
    return {name: value.clone() for name, value in tensors_in(module.state_dict()).items()}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the identity of a checkpoint: a digest of the names, types, shapes and bytes of its weights.

    >>> weights_digest({"a": torch.zeros(2)}) == weights_digest({"a": torch.zeros(2)})
    True
    >>> weights_digest({"a": torch.zeros(2)}) == weights_digest({"a": torch.zeros(2, 1)})
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights to a safetensors file, whole or not at all.

    Raises:
        TypeError: if a tensor is of a type that the file format does not have.
    """
    own = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    try:
        content = save(own)  # cloned: it refuses tensors that share memory
    except (KeyError, ValueError, SafetensorError) as error:
        types = sorted({str(value.dtype) for value in own.values()})
        raise TypeError(
            f"Weights of the types {', '.join(types)} cannot be stored as safetensors: {error}. Convert those that are"
            " unusual, or keep them out of the state dict."
        ) from error
    with atomically(path) as partial:
        partial.write_bytes(content)


def load_weights(path: AnyPath, digest: str) -> Weights:
    """Read the weights that `save_weights` wrote, and verify their digest.

    Raises:
        Damaged: if the file is damaged.
    """
    remedy = f"Delete the folder '{path.parent}' and featurize the checkpoint again with ckpt_path=..."

    def read(local: Path) -> Weights:
        weights: Weights = load(local.read_bytes())
        found = weights_digest(weights)
        if found != digest:
            raise Damaged(path, f"its digest is {found}, expected {digest}", remedy)
        return weights

    try:
        return reading(path, read)
    except Damaged:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Damaged(path, f"{type(error).__name__}: {error}", remedy) from error


def names_of_weights(path: AnyPath) -> set[str]:
    """Return the names of the weights that `save_weights` wrote.

    Raises:
        Damaged: if the file is damaged.
        FileNotFoundError: if it is gone, since a running ``fit`` has discarded it.
    """

    def read(local: Path) -> set[str]:
        with safe_open(local, "pt") as file:
            return set(file.keys())

    try:
        return reading(path, read)
    except (SafetensorError, RuntimeError) as error:
        if not path.exists():
            raise FileNotFoundError(f"There is no file '{path}'.") from error
        raise Damaged(path, str(error), f"Delete the folder '{path.parent}'.") from error


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a Lightning ``.ckpt`` file, or a state-dict file of torch or safetensors: ``{"state_dict": ...}``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds no weights.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"ckpt_path names '{path}', which is no file. Pass paths of .ckpt or state-dict files.")
    try:
        if os.fspath(path).endswith(".safetensors"):
            return {"state_dict": load(Path(path).read_bytes())}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' cannot be read with torch.load(weights_only=True): {error}\nIf you trust the file, save its"
            " weights alone and pass that file:"
            " torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises whatever its parts do
        raise ValueError(f"'{path}' is damaged or no checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict", content), Mapping):
        raise ValueError(f"'{path}' holds no weights; expected a Lightning checkpoint or a state dict.")
    return content if "state_dict" in content else {"state_dict": content}


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read the weights in a file that `read_checkpoint` reads.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds none.
    """
    return weights_in(read_checkpoint(path), path)


def weights_in(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> Weights:
    """Return the weights of a checkpoint that was read from ``path``.

    Raises:
        ValueError: if it holds none.
    """
    weights = tensors_in(checkpoint["state_dict"])
    if not weights:
        raise ValueError(f"'{path}' holds no weights; expected a Lightning checkpoint or a state dict.")
    return weights
