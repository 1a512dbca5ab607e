"""The counter-based generator from which every projection is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words that are a function of a counter and a key alone.

    Any entry of a projection can so be drawn anywhere, in any order, on any device, with no state; integer arithmetic
    makes it the same to the bit. Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: four int64 tensors of values below 2³², of shapes that broadcast together.
        key: below 2⁶⁴.

    Returns:
        Four int64 tensors of values below 2³².

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [f"{word.item():08x}" for word in philox4x32((zero, zero, zero, zero), key=0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of a product; it wraps in int64, hence the mask after the shift."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def counters(start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the low and high 32-bit words of the integers from ``start`` to ``stop``, each (stop − start,)."""
    index = torch.arange(start, stop, device=device)
    return index & _MASK, index >> 32
