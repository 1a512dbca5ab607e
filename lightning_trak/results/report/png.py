"""Images as PNG, small enough to be shown in numbers."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import torch
from torch.nn import functional as F

from lightning_trak.results.kinds import Array, Image

# Colours that colour-blind people can tell apart: Okabe and Ito, "Color Universal Design", 2008, and a gray.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
_IGNORED = 255  # in bytes, the usual mark of pixels without a class
_LUMA = 0.299, 0.587, 0.114  # of red, green and blue: ITU-R BT.601
_OPACITY = 0.55  # of classes over their image


def thumbnail(image: Image, edge: int) -> Array:
    """Return an image whose longer side has at most ``edge`` pixels, with its classes as colours.

    Returns:
        Bytes, (H, W), (H, W, 3) or (H, W, 4). Pixels that are not finite are transparent.
    """
    pixels = image.pixels.astype(np.float64) / (255 if image.pixels.dtype == np.uint8 else 1)
    height, width = (max(1, round(side * min(1.0, edge / max(pixels.shape[:2])))) for side in pixels.shape[:2])
    if np.isnan(pixels).any():
        gaps = np.isnan(pixels).reshape(*pixels.shape[:2], -1).any(2)
        coloured = np.where(np.isnan(pixels), 0.0, pixels)
        coloured = np.stack([coloured] * 3, 2) if pixels.ndim == 2 else coloured[:, :, :3]
        pixels = np.dstack([coloured, ~gaps])
    pixels = _shrunk(pixels, height, width)
    if image.classes is not None:
        pixels = _overlaid(pixels, _nearest(image.classes, height, width))
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def colour_of(number: int) -> int | None:
    """Return the place in the palette of a class; None for class 0 and for pixels without a class.

    >>> colour_of(1), colour_of(9), colour_of(0), colour_of(255), colour_of(-100)
    (0, 0, None, None, None)
    """
    return None if number <= 0 or number == _IGNORED else (number - 1) % len(PALETTE)


def png(pixels: Array) -> bytes:
    r"""Encode bytes, (H, W), (H, W, 3) or (H, W, 4), as a PNG file (W3C, "Portable Network Graphics", third edition).

    >>> png(np.zeros((2, 3), np.uint8))[:8]
    b'\x89PNG\r\n\x1a\n'
    """
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    rows = np.ascontiguousarray(pixels).reshape(height, width * channels)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = min((zlib.compress(filtered, 9) for filtered in _filtered(rows, channels)), key=len)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def data_uri(file: bytes) -> str:
    """Return a PNG file as a URI that holds it."""
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _filtered(rows: Array, channels: int) -> list[bytes]:
    """Return the rows with each of three filters: none, difference to the left, difference to the row above."""
    left, above = np.zeros_like(rows), np.zeros_like(rows)
    left[:, channels:], above[1:] = rows[:, :-channels], rows[:-1]
    forms = rows, rows - left, rows - above
    return [np.insert(form, 0, number, axis=1).tobytes() for number, form in enumerate(forms)]


def _shrunk(pixels: Array, height: int, width: int) -> Array:
    """Return the means of areas."""
    if pixels.shape[:2] == (height, width):
        return pixels
    channels = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(pixels))).permute(2, 0, 1)
    means = F.adaptive_avg_pool2d(channels, (height, width)).permute(1, 2, 0).numpy()
    return means.reshape(height, width, *pixels.shape[2:])


def _nearest(classes: Array, height: int, width: int) -> Array:
    """Return the classes in the middle of areas: a mean of two classes would be a third."""
    rows, columns = (
        ((np.arange(size) + 0.5) * whole / size).astype(int)
        for size, whole in zip((height, width), classes.shape, strict=True)
    )
    return classes[np.ix_(rows, columns)]


def _overlaid(pixels: Array, classes: Array) -> Array:
    """Return an image, floats, as shades of gray, with classes as colours over it: no other colour is in it."""
    shades = pixels if pixels.ndim == 2 else pixels[:, :, :3] @ np.array(_LUMA)
    pixels = np.dstack(
        [shades, shades, shades, *([pixels[:, :, 3]] if pixels.ndim == 3 and pixels.shape[2] == 4 else [])]
    )
    for number in np.unique(classes).tolist():
        place = colour_of(number)
        if place is not None:
            colour = np.array([int(PALETTE[place][start : start + 2], 16) / 255 for start in (1, 3, 5)])
            own = classes == number
            pixels[own, :3] = (1 - _OPACITY) * pixels[own, :3] + _OPACITY * colour
    return pixels
