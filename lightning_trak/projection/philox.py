"""The counter-based generator from which every projection is drawn."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import embedding

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BITS = 128  # drawn by one counter


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words that are a function of a counter and a key alone.

    So any entry of a projection can be drawn by itself: in any order, on any device, without state. Integer arithmetic
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
    """Return the high and low 32 bits of a product. It wraps around in int64, hence the mask after the shift."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def counters(start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the low and high 32-bit words of the integers from ``start`` to ``stop``, each (stop − start,)."""
    index = torch.arange(start, stop, device=device)
    return index & _MASK, index >> 32


def random_signs(
    start: int,
    stop: int,
    columns: int,
    key: int,
    stream: int,
    device: torch.device,
) -> Tensor:
    """Draw the rows ``start`` to ``stop`` of a matrix of independent signs ±1, (stop − start, columns), float32.

    Column j of row i is bit j mod 128 of Philox's four words at counter (i mod 2³², i div 2³², j div 128, stream).

    >>> random_signs(0, 2, columns=3, key=0, stream=0, device=torch.device("cpu")).abs()
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    return signs_of(random_words(start, stop, columns, key, stream, device), columns)


def random_words(start: int, stop: int, columns: int, key: int, stream: int, device: torch.device) -> Tensor:
    """Draw the bits for `signs_of`: for every counter 8 numbers of 16 bits, lowest first.

    Returns:
        (stop − start, ⌈columns / 128⌉, 8), int32.
    """
    low, high = counters(start, stop, device)
    block = torch.arange(-(-columns // _BITS), device=device)
    words = philox4x32((low[:, None], high[:, None], block, torch.full_like(block, stream)), key)
    halves = torch.empty(len(low), len(block), 8, dtype=torch.int32, device=device)
    for number, word in enumerate(words):
        halves[:, :, 2 * number] = word & 0xFFFF
        halves[:, :, 2 * number + 1] = word >> 16
    return halves


def signs_of(words: Tensor, columns: int) -> Tensor:
    """Turn the bits of `random_words` into signs ±1, (rows, columns), float32."""
    return embedding(words, _sign_table(words.device)).flatten(1)[:, :columns]


@functools.cache
def _sign_table(device: torch.device) -> Tensor:
    """Return the table for the fastest way from bits to floats: row w has the 16 bits of w as ±1, lowest first."""
    words = torch.arange(2**16, device=device, dtype=torch.int32)[:, None]
    bits = (words >> torch.arange(16, device=device, dtype=torch.int32)) & 1
    return (2 * bits - 1).float()
