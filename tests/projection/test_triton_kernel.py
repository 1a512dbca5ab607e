"""The fused kernel against a float64 product with the signs that the torch projection draws."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lightning_trak.projection import RademacherProjector
from lightning_trak.projection.triton_kernel import _split, _tile, _words, available, rademacher_add_

KEY = 0xF23456789ABCDEF0
SHAPES = [  # batch, parameters, columns, start: ragged all, on both sides of every tile's edge
    (1, 1, 1, 7),
    (3, 70, 8, 0),
    (1, 200, 128, 2**32 - 100),
    (20, 129, 200, 2**32 - 1),
    (130, 65, 300, 5),
    (2, 400, 512, 2**33 + 1),
]


def projected(b, q, k, start, dtype=torch.float32, device="cpu", key=KEY):
    """Return what the kernel adds, what it should add, and what it should add to the last bit of the gradients."""
    gradients = torch.randn(b, q, generator=torch.Generator().manual_seed(b * q)).to(dtype)
    before = torch.full((b, k), 3.0)
    features = before.clone().to(device)
    rademacher_add_(features, gradients.to(device), start, key, k)
    matrix = RademacherProjector(k).signs(start, start + q, key).double() / k**0.5
    return (features.cpu() - before).double(), gradients.double() @ matrix


def difference(features, expected):
    return ((features - expected).norm() / expected.norm()).item()


def check_interpreted():
    """All that the interpreter can say. It cuts bfloat16 off where a GPU rounds: 2⁻¹⁴ of an entry is lost at most."""
    assert available(torch.device("cpu"))
    for shape in SHAPES:
        assert difference(*projected(*shape, dtype=torch.bfloat16)) < 1e-5, shape  # nothing to round
        assert difference(*projected(*shape)) < 2**-14, shape
    assert difference(*projected(3, 70, 130, 2, dtype=torch.float16)) < 2**-14
    for key in (0, 2**31, 2**64 - 1):
        assert difference(*projected(2, 70, 130, 2, dtype=torch.bfloat16, key=key)) < 1e-5, key
    check_columns_and_cuts()
    check_empty()


def check_columns_and_cuts():
    gradients = torch.randn(150, 6, generator=torch.Generator().manual_seed(1)).bfloat16().float().T
    whole, parts = torch.zeros(6, 40), torch.zeros(6, 40)
    rademacher_add_(whole, gradients, 9, KEY, 40)  # columns of a transposed tensor are apart
    for first, last in ((0, 1), (1, 80), (80, 150)):
        rademacher_add_(parts, gradients[:, first:last], 9 + first, KEY, 40)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, gradients @ RademacherProjector(40).signs(9, 159, KEY) / 40**0.5)


def check_empty():
    features = torch.ones(2, 8)
    rademacher_add_(features, torch.zeros(2, 0), 0, KEY, 8)
    rademacher_add_(features[:0], torch.zeros(0, 5), 0, KEY, 8)
    assert torch.equal(features, torch.ones(2, 8))


@pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton but on Linux")
def test_interpreted():
    """In a process of its own: Triton chooses between compiler and interpreter when it is imported."""
    program = (
        "from tests.projection.test_triton_kernel import check_interpreted; check_interpreted(); print('all agree')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "all agree\n"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton but on Linux")
@pytest.mark.parametrize(("capability", "wide", "rows"), [(80, False, 128), (90, True, 128)])
def test_compiles_without_a_gpu(capability, wide, rows):
    """To machine code, within the 227 KB of shared memory that a block may have (99 KB where tiles are not wide)."""
    program = f"""if True:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from lightning_trak.projection import triton_kernel
        kernel = triton_kernel._compiled()
        tile = dict(zip(("BLOCK_B", "BLOCK_Q", "BLOCK_K"), triton_kernel._tile({rows}, 2048, {wide})))
        constants = {{**tile, "FAR": False, "INTERPRETED": False}}
        names = kernel.arg_names
        types = {{name: "constexpr" if name in constants else "i32" for name in names}}
        types.update(gradients="*fp32", partial="*fp32")
        places = {{(names.index(name),): value for name, value in constants.items()}}
        source = ASTSource(fn=kernel, signature=types, constexprs=places)
        warps = 8 if tile["BLOCK_B"] == 128 else 4
        options = {{"num_warps": warps, "num_stages": 2}}
        compiled = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=options)
        assert compiled.asm["cubin"]
        print(compiled.metadata.shared)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= (227 if wide else 99) * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [*SHAPES, (256, 100_003, 2048, 2**32 - 5000)])
def test_compiled(shape):
    assert available(torch.device("cuda"))
    assert difference(*projected(*shape, dtype=torch.bfloat16, device="cuda")) < 1e-5
    assert difference(*projected(*shape, device="cuda")) < 2**-14
    once, _ = projected(*shape, device="cuda")
    again, _ = projected(*shape, device="cuda")
    assert torch.equal(once, again)


@pytest.mark.parametrize(
    ("triton", "expected"),
    [
        ("None", "[False, False, False, False]"),  # importing it fails
        ("SimpleNamespace(__spec__=True)", "[False, False, True, True]"),  # importing anything of it fails
    ],
)
def test_available_asks_for_triton_and_the_gpu_and_imports_nothing(triton, expected):
    program = f"""if True:
        import sys
        from types import SimpleNamespace
        import torch
        sys.modules["triton"] = None  # importing it would now fail
        from lightning_trak.projection.triton_kernel import available
        sys.modules["triton"] = {triton}
        found = [available(torch.device("cpu"))]
        for capability in ((7, 5), (8, 0), (9, 0)):
            torch.cuda.get_device_capability = lambda device: capability
            found.append(available(torch.device("cuda")))
        print(found)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


@pytest.mark.parametrize("blocks", [1, 2, 31, 1000, 35_469])
@pytest.mark.parametrize("tiles", [1, 16, 131, 528, 5000])
@pytest.mark.parametrize("processors", [2, 132])
def test_parts_cover_the_sum_and_stay_small(blocks, tiles, processors):
    splits, length = _split(blocks, tiles, processors)
    assert (splits - 1) * length < blocks <= splits * length
    assert splits == 1 or splits * tiles <= 4 * processors


@pytest.mark.parametrize("wide", [True, False])
def test_tiles_are_what_the_matrix_units_take(wide):
    for b in (1, 2, 15, 16, 17, 100, 128, 129, 5000):
        for k in (1, 128, 129, 2048):
            tile = _tile(b, k, wide)
            assert all(16 <= side <= 256 and side & (side - 1) == 0 for side in tile)
            assert min(b, 128) <= tile[0] <= 128
            assert tile[2] % 128 == 0


def test_words_are_signed_and_whole():
    for value in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        low, high = _words(value)
        assert all(-(2**31) <= word < 2**31 for word in (low, high))
        assert (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 == value
