"""The dense projection of the compiled extension fast_jl: optional, and tested before it is used."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_trak.projection.projector import Projector
from lightning_trak.projection.rademacher import RademacherProjector

_MULTIPLE = 512  # fast_jl takes multiples of it alone, for both dimensions
_ROWS = 32  # the most samples that one of its kernels takes
_MAX_ENTRIES = 2**31  # it indexes a call's gradients by 32 bits
_MAX_COLUMNS = (_MAX_ENTRIES - 1) // _ROWS // _MULTIPLE * _MULTIPLE
_TRIAL = 2**14  # parameters in the test: a right projection keeps norms to a few per cent
_TOLERANCE = 0.2

_Kernel: TypeAlias = Callable[[Tensor, int, int, int], Tensor]


class FastJLProjector(Projector):
    """P[i, j] = ±1/√k, drawn inside fast_jl's CUDA kernel, with one matrix for each block of parameters.

    Unlike other projections, this one depends on how gradients are cut into blocks. fast_jl draws by the place within a
    block, so each block has its own matrix, chosen by key and ``start``. Features agree only if the blocks are the
    same.

    The matrix also depends on the GPU: fast_jl cuts a block into one part for each multiprocessor, and draws by the
    number of parts. That number is therefore part of the configuration. Pass it to go on with features that another
    model of GPU computed.

    Within the kernel, gradients are float16. Each sample is first scaled to a largest entry of 1, so that none
    overflows. fast_jl was written for Park, Georgiev, Ilyas, Leclerc, Madry, "TRAK: Attributing Model Behavior at
    Scale", ICML 2023.

    Args:
        proj_dim: k, a multiple of 512.
        multiprocessors: the number on the GPU whose matrix is wanted; by default, that of the current GPU.

    >>> FastJLProjector(proj_dim=1024, multiprocessors=132).configuration
    {'projector': 'fast_jl', 'drawing': 1, 'arguments': {'multiprocessors': 132}}
    """

    name = "fast_jl"

    def __init__(self, proj_dim: int = 2048, multiprocessors: int | None = None) -> None:
        super().__init__(proj_dim)
        self.multiprocessors = _count_multiprocessors() if multiprocessors is None else multiprocessors

    @staticmethod
    def check_proj_dim(proj_dim: int) -> None:
        """Raise a ValueError unless ``proj_dim`` is a positive multiple of 512."""
        Projector.check_proj_dim(proj_dim)
        if proj_dim % _MULTIPLE:
            raise ValueError(
                f"proj_dim must be a multiple of {_MULTIPLE} for fast_jl, got {proj_dim}. Round it, or use"
                " projector='rademacher', which takes any."
            )

    def add_(self, features: Tensor, gradients: Tensor, start: int, key: int) -> None:
        """Add a whole block's projection, at most 32 samples a kernel call; see `Projector.add_`.

        Columns are cut at a fixed number, so that the matrix does not depend on the batch size.
        """
        _require_cuda(gradients.device)
        for first in range(0, gradients.shape[1], _MAX_COLUMNS):
            seed = _seed(key, start + first)
            for row in range(0, len(gradients), _ROWS):
                block = gradients[row : row + _ROWS, first : first + _MAX_COLUMNS]
                features[row : row + _ROWS] += self._project(block, seed)

    def _project(self, gradients: Tensor, seed: int) -> Tensor:
        """Return (b, k) for (b, q) of at most 32 rows: padded, scaled to float16's range and back."""
        (b, q), size = gradients.shape, next(size for size in (8, 16, _ROWS) if len(gradients) <= size)
        scale = torch.linalg.vector_norm(gradients, torch.inf, dim=1, keepdim=True).float()
        scaled = gradients.float() / scale.where(scale > 0, 1.0)
        padded = pad(scaled, (0, -q % _MULTIPLE, 0, size - b)).contiguous()
        kernel: _Kernel = getattr(importlib.import_module("fast_jl"), f"project_rademacher_{size}")
        with torch.cuda.device_of(gradients):  # type: ignore[no-untyped-call]  # it launches on the current device
            signed: Tensor = kernel(padded, self.proj_dim, seed, self.multiprocessors)  # by ±1, with no 1/√k
        return signed[:b].mul_(scale * self.proj_dim**-0.5)


def check_fast_jl(device: torch.device) -> None:
    """Test fast_jl on random vectors; raise a RuntimeError that says what is wrong, if anything is.

    Norms must be kept to 20 %, which random signs practically always do. The same call must give the same result twice.
    The matrix must not depend on the number of samples. Built for another architecture, fast_jl has been seen to return
    zeros without an error.

    Args:
        device: a CUDA device.

    >>> check_fast_jl(torch.device("cpu"))
    Traceback (most recent call last):
        ...
    RuntimeError: fast_jl works only on CUDA devices, got device 'cpu'. Use projector='rademacher' there.
    """
    _require_cuda(device)
    projector = FastJLProjector(2048, _count_multiprocessors(device))
    vectors = torch.randn(_ROWS, _TRIAL, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        features = _trial(projector, vectors)
    except RuntimeError as error:
        raise RuntimeError(f"fast_jl fails: {error}.") from error
    if not features.any():
        raise RuntimeError("fast_jl returns zeros: it was probably built for another GPU architecture.")
    low, high = (features.norm(dim=1) / vectors.norm(dim=1)).aminmax()
    if not (low >= 1 - _TOLERANCE and high <= 1 + _TOLERANCE):  # written so that NaN fails
        raise RuntimeError(
            f"fast_jl does not keep norms: those of random vectors became {low:.3g} to {high:.3g} times as large."
        )
    if not torch.allclose(features, _trial(projector, vectors), rtol=1e-3, atol=1e-3):
        raise RuntimeError("fast_jl is not deterministic: the same call with the same seed gave another result.")
    if not torch.allclose(features[:8], _trial(projector, vectors[:8]), rtol=1e-3, atol=1e-1):
        raise RuntimeError("fast_jl's matrix depends on the batch: 8 samples and 32 gave different projections.")


def fast_jl_or_rademacher(proj_dim: int) -> Projector:
    """Return a `FastJLProjector` if fast_jl works here, else warn why not and return a `RademacherProjector`.

    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # e.g. that fast_jl is missing
    ...     fast_jl_or_rademacher(1024).proj_dim
    1024
    """
    FastJLProjector.check_proj_dim(proj_dim)
    problem = _problem()
    if problem is None:
        return FastJLProjector(proj_dim)
    warnings.warn(
        f"projector='fast_jl' cannot be used: {problem} projector='rademacher', of the same distribution, is used"
        " instead.",
        stacklevel=2,
    )
    return RademacherProjector(proj_dim)


def _problem() -> str | None:
    """Return why fast_jl cannot be used here, as a sentence; None if it can."""
    try:
        importlib.import_module("fast_jl")
    except ImportError as error:
        return f"fast_jl cannot be imported ({error}); it is installed by pip install 'lightning-trak[fast_jl]'."
    device = _current_device()
    if device is None:
        return "torch finds no CUDA device."
    try:
        check_fast_jl(device)
    except RuntimeError as error:
        return str(error)
    return None


def _trial(projector: FastJLProjector, vectors: Tensor) -> Tensor:
    features = torch.zeros(len(vectors), projector.proj_dim, device=vectors.device)
    projector.add_(features, vectors, start=0, key=0)
    return features


def _seed(key: int, start: int) -> int:
    """Hash key and block to the 31 bits that fast_jl takes: the same in every process, unlike Python's own hash."""
    digest = hashlib.blake2b(f"{key}:{start}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError(
            f"fast_jl works only on CUDA devices, got device '{device}'. Use projector='rademacher' there."
        )


def _current_device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _count_multiprocessors(device: torch.device | None = None) -> int:
    device = device or _current_device()
    if device is None:
        raise RuntimeError("fast_jl needs a CUDA device and torch finds none. Use projector='rademacher' instead.")
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
