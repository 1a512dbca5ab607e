"""The dense projection of the compiled extension fast_jl: optional, and tried before it is used."""

from __future__ import annotations

import hashlib
import importlib
import warnings

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_trak.projection.projector import Projector
from lightning_trak.projection.rademacher import RademacherProjector

_MULTIPLE = 512  # fast_jl takes multiples of it alone, for both dimensions
_ROWS = 32  # the most samples that one of its kernels takes
_COLUMNS = 2**31 // _ROWS - _MULTIPLE  # it indexes a call's gradients by 32 bits


class FastJLProjector(Projector):
    """P[i, j] = ±1/√k, drawn inside fast_jl's CUDA kernel, with one matrix for each block of parameters.

    fast_jl draws by the place within a block, and by the number of the GPU's multiprocessors. Features agree only if
    both are the same, so the number is part of the configuration. Within the kernel, gradients are float16. Each
    sample is first scaled to a largest entry of 1, so that none overflows. fast_jl was written for Park, Georgiev,
    Ilyas, Leclerc, Madry, "TRAK: Attributing Model Behavior at Scale", ICML 2023.

    Args:
        proj_dim: k, a multiple of 512.
        multiprocessors: of the GPU whose matrix is wanted; by default, of the current GPU. Pass it to go on with
            features that another model of GPU computed.

    >>> FastJLProjector(proj_dim=1024, multiprocessors=132).configuration
    {'projector': 'fast_jl', 'drawing': 1, 'arguments': {'multiprocessors': 132}}
    """

    name = "fast_jl"

    def __init__(self, proj_dim: int = 2048, multiprocessors: int | None = None) -> None:
        super().__init__(proj_dim)
        if multiprocessors is None:
            if not torch.cuda.is_available():
                raise RuntimeError("fast_jl needs a CUDA device and torch finds none. Use projector='rademacher'.")
            multiprocessors = torch.cuda.get_device_properties(torch.device("cuda")).multi_processor_count
        self.multiprocessors = multiprocessors

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
        for first in range(0, gradients.shape[1], _COLUMNS):
            digest = hashlib.blake2b(f"{key}:{start + first}".encode(), digest_size=4).digest()
            seed = int.from_bytes(digest, "little") >> 1  # fast_jl takes 31 bits
            for rows in range(0, len(gradients), _ROWS):
                block = gradients[rows : rows + _ROWS, first : first + _COLUMNS]
                features[rows : rows + _ROWS] += self._project(block, seed)

    def _project(self, gradients: Tensor, seed: int) -> Tensor:
        """Return (b, k) for (b, q) of at most 32 rows: padded, scaled to float16's range and back."""
        (b, q), size = gradients.shape, next(size for size in (8, 16, _ROWS) if len(gradients) <= size)
        scale = torch.linalg.vector_norm(gradients, torch.inf, dim=1, keepdim=True).float()
        scaled = gradients.float() / scale.where(scale > 0, 1.0)
        padded = pad(scaled, (0, -q % _MULTIPLE, 0, size - b)).contiguous()
        kernel = getattr(importlib.import_module("fast_jl"), f"project_rademacher_{size}")
        with torch.cuda.device_of(gradients):  # type: ignore[no-untyped-call]  # it launches on the current device
            signed: Tensor = kernel(padded, self.proj_dim, seed, self.multiprocessors)  # by ±1, with no 1/√k
        return signed[:b].mul_(scale * self.proj_dim**-0.5)


def fast_jl_or_rademacher(proj_dim: int, device: str = "cuda") -> Projector:
    """Return a `FastJLProjector` if fast_jl works here, else warn why not and return a `RademacherProjector`.

    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # e.g. that fast_jl is missing
    ...     fast_jl_or_rademacher(1024).proj_dim
    1024
    """
    FastJLProjector.check_proj_dim(proj_dim)
    try:
        projector = FastJLProjector(proj_dim)
        _check_norms(projector, device)
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            f"projector='fast_jl' cannot be used: {str(error).rstrip('.')}. It needs a CUDA device and"
            " pip install 'lightning-trak[fast_jl]'. projector='rademacher', of the same distribution, is used.",
            stacklevel=2,
        )
        return RademacherProjector(proj_dim)
    return projector


def _check_norms(projector: FastJLProjector, device: str) -> None:
    """Raise a RuntimeError unless norms are kept to 20 %: on other architectures, fast_jl has returned zeros."""
    vectors = torch.randn(8, 2**14, generator=torch.Generator().manual_seed(0)).to(device)
    features = torch.zeros(8, projector.proj_dim, device=device)
    projector.add_(features, vectors, start=0, key=0)
    ratios = features.norm(dim=1) / vectors.norm(dim=1)
    if not ((ratios - 1).abs() <= 0.2).all():  # written so that NaN fails
        raise RuntimeError(f"it does not keep norms: those of random vectors became {ratios.tolist()} times as large")
