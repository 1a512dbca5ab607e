"""Images as PNG, against Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as Pillow

from lightning_trak.results.kinds import Image
from lightning_trak.results.report.png import PALETTE, png, thumbnail

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (6, 4, 3), (3, 9, 4), (40, 1, 3)])
@pytest.mark.parametrize("content", ["noise", "smooth"])
def test_pillow_reads_the_same_pixels(shape, content):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    if content == "smooth":
        pixels = np.cumsum(pixels // 64, axis=0).astype(np.uint8)
    with Pillow.open(io.BytesIO(png(pixels))) as image:
        image.verify()
    with Pillow.open(io.BytesIO(png(pixels))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_smooth_images_are_smaller_by_a_filter():
    pixels = np.add.outer(np.arange(64), 3 * np.arange(64)).astype(np.uint8)
    assert len(png(pixels)) < len(png(RNG.integers(0, 256, (64, 64), dtype=np.uint8))) / 5


def test_thumbnails_are_means_of_areas():
    pixels = RNG.random((8, 12, 3))
    expected = np.array(
        [[pixels[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for j in range(6)] for i in range(4)]
    )
    found = thumbnail(Image(pixels), 6)
    assert found.shape == (4, 6, 3)
    np.testing.assert_allclose(found / 255, expected, atol=0.5 / 255 + 1e-9)


def test_small_images_and_bytes_stay_as_they_are():
    pixels = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    assert np.array_equal(thumbnail(Image(pixels), 12), pixels)
    assert thumbnail(Image(np.zeros((300, 2))), 10).shape == (10, 1)


def test_unknown_pixels_are_transparent():
    pixels = np.full((4, 4), 0.5)
    pixels[1, 2] = np.nan
    found = thumbnail(Image(pixels), 4)
    assert found.shape == (4, 4, 4)
    assert found[1, 2, 3] == 0
    assert (found[:, :, 3] == 255).sum() == 15
    assert found[0, 0].tolist() == [128, 128, 128, 255]


def test_classes_are_the_only_colours():
    classes = np.array([[0, 1, 1], [255, 2, 9], [-1, 0, 3]])
    found = thumbnail(Image(RNG.random((3, 3, 3)), classes), 3).astype(int)
    for number, pixel in zip(classes.flat, found.reshape(-1, 3), strict=True):
        if number in (0, -1, 255):
            assert len(set(pixel.tolist())) == 1  # gray
        else:
            colour = [int(PALETTE[(number - 1) % 8][start : start + 2], 16) for start in (1, 3, 5)]
            shades = (pixel - 0.55 * np.array(colour)) / 0.45
            assert np.ptp(shades) < 3  # the same gray in each channel, up to rounding


def test_a_class_map_is_taken_in_the_middle_of_areas():
    classes = np.zeros((10, 10), dtype=int)
    classes[2::5, 2::5] = [[1, 2], [3, 4]]
    found = thumbnail(Image(np.zeros((10, 10)), classes), 2)
    for number, pixel in zip((1, 2, 3, 4), found.reshape(-1, 3), strict=True):
        colour = [int(PALETTE[number - 1][start : start + 2], 16) for start in (1, 3, 5)]
        np.testing.assert_allclose(pixel, 0.55 * np.array(colour), atol=1)
