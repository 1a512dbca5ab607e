"""The dense projection as one GPU kernel that draws its signs in registers; optional: Triton need not be installed."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # at run time `_compiled` puts the names here, on first use: importing triton is slow
    import triton.language as tl  # type: ignore[import-not-found,import-untyped]
    from triton.language import constexpr  # under this very name: older interpreters compare it

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined
_BITS = 128  # columns drawn by one Philox counter
_ROWS = 128  # of the batch in one program, at most
_WAVES = 4  # programs for each multiprocessor: enough that an incomplete last round costs little
_AMPERE = (8, 0)  # the first generation with bfloat16 matrix units


def available(device: torch.device) -> bool:
    """Whether `rademacher_add_` can run on a device: Triton installed, and a GPU that multiplies bfloat16.

    If ``TRITON_INTERPRET=1`` was set before this module was imported, any device will do: Triton then interprets the
    kernel on the CPU, slowly.

    >>> _INTERPRETED or not available(torch.device("cpu"))
    True
    """
    if not _installed():
        return False
    return _INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def rademacher_add_(features: Tensor, gradients: Tensor, start: int, key: int, proj_dim: int) -> None:
    """Add ``gradients @ P[start:start + q]`` to ``features``, in place, with P drawn inside the matrix product.

    P is the matrix of `RademacherProjector`, to the bit. Column j of row i is bit j mod 128 of Philox's words at
    counter (i mod 2³², i div 2³², j div 128, 0). Signs are exact in bfloat16. Each gradient entry is split into two
    bfloat16 numbers, its rounded value and the remainder, and both are multiplied. Sums are float32. At most 2⁻¹⁶ of an
    entry is lost. The same call on the same device gives the same bits: the sum over parameters is computed in parts,
    which are stored and added in a fixed order.

    Args:
        features: (b, k), float32.
        gradients: (b, q), float32, bfloat16 or float16.
        start: index of the block's first parameter among all p.
        key: chooses P; below 2⁶⁴.
        proj_dim: k.

    >>> device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    >>> features = torch.zeros(1, 4, device=device)
    >>> if available(device):
    ...     rademacher_add_(features, torch.full((1, 1), 2.0, device=device), start=7, key=0, proj_dim=4)
    ... else:
    ...     features += 1
    >>> features.abs().tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    (b, q), k = gradients.shape, proj_dim
    if b == 0 or q == 0:
        return
    gradients = gradients if gradients.stride(1) == 1 else gradients.contiguous()
    processors, wide = _device(gradients.device)
    block_b, block_q, block_k = _tile(b, k, wide)
    grid_b, grid_k = -(-b // block_b), -(-k // block_k)
    splits, length = _split(-(-q // block_q), grid_b * grid_k, processors)
    partial = torch.empty(splits, b, k, dtype=torch.float32, device=features.device)
    with torch.cuda.device_of(gradients):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _compiled()[(grid_k, grid_b, splits)](
            *(gradients, partial, *_words(start), *_words(key), b, k, q, gradients.stride(0), length),
            BLOCK_B=block_b,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            FAR=block_b * gradients.stride(0) >= 2**31,
            SPLIT=gradients.dtype != torch.bfloat16,
            INTERPRETED=_INTERPRETED,
            num_warps=8 if block_b == _ROWS else 4,
            num_stages=2,
        )
    features.add_(partial.sum(0), alpha=k**-0.5)


def _device(device: torch.device) -> tuple[int, bool]:
    """Return the number of multiprocessors, and whether they take wide tiles.

    These need asynchronous units, and 227 KB of shared memory.
    """
    if device.type == "cuda":
        wide = torch.cuda.get_device_capability(device)[0] in (9, 10)  # 12 has less memory, though it is newer
        return int(torch.cuda.get_device_properties(device).multi_processor_count), wide
    return 2, True  # interpreted: programs run in turn, and 2 are enough to split the sum


def _tile(b: int, k: int, wide: bool) -> tuple[int, int, int]:
    """Choose the size of a program's tile: rows of the batch, parameters at a time, and columns.

    Drawing a sign costs more than multiplying with it, and all rows of a tile share it. So a tile takes as many rows as
    there are, up to `_ROWS`. It takes as many columns as registers then hold sums for, so that gradients are read
    rarely.

    >>> _tile(256, 2048, wide=True), _tile(8, 2048, wide=False)
    ((128, 64, 256), (16, 32, 128))
    """
    block_b = min(_ROWS, max(16, 1 << (b - 1).bit_length()))
    block_q = 64 if wide and block_b == _ROWS else 32
    return block_b, block_q, 2 * _BITS if wide and k > _BITS else _BITS


def _split(blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """Cut the sum over ``blocks`` of parameters so that the programs of all ``tiles`` fill the GPU.

    Returns:
        The number of parts, none empty, and the blocks in each. All parts together take at most `_WAVES` tiles of
        128 KB for each processor, which is 70 MB on a GPU with 132. If the features alone are more tiles than that,
        they take as much as the features.

    >>> _split(1000, tiles=16, processors=132)
    (33, 31)
    >>> _split(2, tiles=16, processors=132)
    (2, 1)
    """
    wanted = min(blocks, max(1, _WAVES * processors // tiles))
    length = -(-blocks // wanted)
    return -(-blocks // length), length


def _words(value: int) -> tuple[int, int]:
    """Return the low and high words as signed 32-bit integers: Triton would compile anew for other sizes and signs."""
    return tuple(word - (word >> 31 << 32) for word in (value & 0xFFFFFFFF, value >> 32))  # type: ignore[return-value]


@functools.cache
def _compiled() -> Any:
    """Import Triton and hand it the kernel; it compiles on the first launch."""
    import triton  # type: ignore[import-not-found,import-untyped]
    import triton.language  # type: ignore[import-not-found,import-untyped]

    globals().update(tl=triton.language, constexpr=triton.language.constexpr)
    return triton.jit(_project, do_not_specialize=["start_low", "start_high", "key_low", "key_high", "length"])


def _project(  # type: ignore[no-untyped-def]
    gradients, partial, start_low, start_high, key_low, key_high, n_rows, n_columns, n_params, stride, length,
    BLOCK_B: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr,  # noqa: N803
    FAR: constexpr, SPLIT: constexpr, INTERPRETED: constexpr,  # noqa: N803
):  # fmt: skip
    """Write one tile of one part of the sum: (BLOCK_B, BLOCK_K) of ``partial``, over ``length`` blocks of BLOCK_Q."""
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = (start_high.to(tl.int64) << 32) | (start_low.to(tl.int64) & 0xFFFFFFFF)
    key = ((key_high.to(tl.int64) << 32) | (key_low.to(tl.int64) & 0xFFFFFFFF)).to(tl.uint64, bitcast=True)
    counter = (tl.program_id(0) * (BLOCK_K // 128) + tl.arange(0, BLOCK_K // 128)[None, :]).to(tl.uint32)
    bit = tl.arange(0, 16)[None, None, :].to(tl.uint32)
    # scalars have 64 bits, which p and b·q need; offsets in a tile have 32 bits where possible, to save registers
    offsets = tl.arange(0, BLOCK_B)[:, None].to(tl.int64 if FAR else tl.int32) * stride + tl.arange(0, BLOCK_Q)[None, :]
    sums = tl.zeros((BLOCK_B, BLOCK_K), dtype=tl.float32)
    first = tl.program_id(2).to(tl.int64) * length * BLOCK_Q
    tile = gradients + tl.program_id(1).to(tl.int64) * BLOCK_B * stride + first
    for _ in range(length):
        params = first + tl.arange(0, BLOCK_Q)
        mask = (rows[:, None] < n_rows) & (params[None, :] < n_params)
        values = tl.load(tile + offsets, mask=mask, other=0.0)

        index = (start + params)[:, None]
        low, high, zero = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32), counter * 0
        w0, w1, w2, w3 = tl.philox(key, low + zero, high + zero, counter + low * 0, zero + low * 0)
        # join puts its two tensors side by side in a new last axis: in memory order, words 0 to 3 and their low and
        # high halves follow one another, lowest column first
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_Q, BLOCK_K // 16, 1))
        # the bit is moved to where bfloat16 has its sign; there it turns −1 = BF80₁₆ into +1
        signs = ((halves << (15 - bit)) & 0x8000) ^ 0xBF80
        signs = tl.reshape(signs.to(tl.uint16), (BLOCK_Q, BLOCK_K)).to(tl.bfloat16, bitcast=True)
        rounded = values.to(tl.bfloat16)
        rest = (values - rounded.to(tl.float32)).to(tl.bfloat16)
        if INTERPRETED:  # the interpreter would multiply bfloat16's bits as integers
            rounded, rest, signs = rounded.to(tl.float32), rest.to(tl.float32), signs.to(tl.float32)
        sums = tl.dot(rounded, signs, sums)
        if SPLIT:
            sums = tl.dot(rest, signs, sums)
        first += BLOCK_Q
        tile += BLOCK_Q
    target = partial + (tl.program_id(2).to(tl.int64) * n_rows + rows[:, None]) * n_columns + columns[None, :]
    tl.store(target, sums, mask=(rows[:, None] < n_rows) & (columns[None, :] < n_columns))
