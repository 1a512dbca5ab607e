"""fast_jl behind the common interface, with a stand-in for the extension that keeps its contract on the CPU."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from lightning_trak.projection import RademacherProjector
from lightning_trak.projection.fast_jl import FastJLProjector, fast_jl_or_rademacher


class FakeFastJL(types.ModuleType):
    """What is known of fast_jl: unscaled signs drawn from seed, columns and parts; gradients cut to float16."""

    def __init__(self):
        super().__init__("fast_jl")
        self.calls = []
        for rows in (8, 16, 32):
            setattr(self, f"project_rademacher_{rows}", lambda *args, rows=rows: self.project(rows, *args))

    def project(self, rows, gradients, proj_dim, seed, parts):
        assert gradients.is_contiguous()
        assert gradients.dtype in (torch.float32, torch.float16)
        assert gradients.shape[0] == rows
        assert gradients.shape[1] % 512 == 0
        assert proj_dim % 512 == 0
        assert 0 <= seed < 2**32
        self.calls.append((tuple(gradients.shape), proj_dim, seed, parts))
        return self.multiply(gradients.half().float(), self.signs(gradients.shape[1], proj_dim, seed, parts))

    def signs(self, q, proj_dim, seed, parts):
        generator = torch.Generator().manual_seed(seed * 1009 + parts)
        return torch.randint(0, 2, (q, proj_dim), generator=generator).float() * 2 - 1

    def multiply(self, gradients, signs):
        return gradients @ signs


@pytest.fixture
def fake(monkeypatch):
    """Installs the stand-in, and a GPU of four multiprocessors."""
    module = FakeFastJL()
    monkeypatch.setitem(sys.modules, "fast_jl", module)
    gpu = types.SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return module


def project(projector, gradients, start=0, key=3):
    features = torch.zeros(len(gradients), projector.proj_dim)
    projector.add_(features, gradients, start, key)
    return features


@pytest.mark.parametrize(("b", "rows"), [(1, [8]), (8, [8]), (9, [16]), (17, [32]), (33, [32, 8]), (70, [32, 32, 8])])
def test_calls_are_padded_as_fast_jl_wants(fake, b, rows):
    gradients = torch.randn(b, 700)
    features = project(FastJLProjector(512), gradients)
    assert [call[0] for call in fake.calls] == [(size, 1024) for size in rows]
    assert len({call[1:] for call in fake.calls}) == 1
    expected = gradients @ fake.signs(1024, *fake.calls[0][1:])[:700] / 512**0.5
    assert (features - expected).norm() < 1e-3 * expected.norm()


def test_features_are_added_to(fake):
    gradients, features = torch.randn(3, 20), torch.ones(3, 512)
    projector = FastJLProjector(512)
    projector.add_(features, gradients, 0, 3)
    torch.testing.assert_close(features, 1 + project(projector, gradients))


def test_empty(fake):
    assert project(FastJLProjector(512), torch.zeros(0, 10)).shape == (0, 512)
    assert not project(FastJLProjector(512), torch.zeros(2, 0)).any()
    assert not fake.calls


def test_key_block_and_processors_choose_the_matrix(fake):
    eye = torch.eye(5)
    one = project(FastJLProjector(512), eye, start=1, key=2)
    assert torch.equal(one, project(FastJLProjector(512), eye, start=1, key=2))
    assert not torch.equal(one, project(FastJLProjector(512), eye, start=2, key=2))
    assert not torch.equal(one, project(FastJLProjector(512), eye, start=1, key=3))
    other = FastJLProjector(512, multiprocessors=5)
    assert not torch.equal(one, project(other, eye, start=1, key=2))
    assert [p.configuration["arguments"]["multiprocessors"] for p in (FastJLProjector(512), other)] == [4, 5]


def test_seeds_do_not_change(fake):
    project(FastJLProjector(512), torch.ones(1, 1), start=0, key=0)
    assert fake.calls[0][2] == 803885222  # wherever and whenever it is drawn


def test_float16_neither_overflows_nor_underflows(fake):
    gradients = torch.randn(3, 512)
    scales = torch.tensor([[1e-20], [1.0], [1e20]])
    features = project(FastJLProjector(512), gradients * scales)
    torch.testing.assert_close(features / scales, project(FastJLProjector(512), gradients), rtol=1e-2, atol=1e-2)
    assert not project(FastJLProjector(512), torch.zeros(2, 512)).any()
    assert project(FastJLProjector(512), torch.full((1, 512), torch.nan)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients(fake, dtype):
    gradients = torch.randn(2, 512).to(dtype)
    got, expected = (project(FastJLProjector(512), g) for g in (gradients, gradients.float()))
    torch.testing.assert_close(got, expected)


def test_inner_products_are_kept_on_average(fake):
    x, y = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    both, products = torch.stack([x, y]), []
    for key in range(300):
        features = project(FastJLProjector(512), both, key=key)
        products.append((features @ features.T)[[0, 0, 1], [0, 1, 1]])
    products = torch.stack(products)
    error = products.std(0) / len(products) ** 0.5
    assert ((products.mean(0) - torch.stack([x @ x, x @ y, y @ y])).abs() < 5 * error).all()


@pytest.mark.parametrize(("proj_dim", "message"), [(1000, "multiple of 512.*got 1000"), (0, "positive integer, got 0")])
def test_proj_dim(fake, proj_dim, message):
    for make in (FastJLProjector, fast_jl_or_rademacher):
        with pytest.raises(ValueError, match=message):
            make(proj_dim)


def test_a_good_one_is_used(fake):
    with warnings.catch_warnings(record=True) as caught:
        projector = fast_jl_or_rademacher(1024, "cpu")
    assert isinstance(projector, FastJLProjector)
    assert projector.proj_dim == 1024
    assert not caught


def failing(gradients, signs):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("multiply", "message"),
    [
        (lambda gradients, signs: torch.zeros(len(gradients), signs.shape[1]), "does not keep norms"),
        (lambda gradients, signs: gradients @ signs * 1.5, "does not keep norms"),
        (lambda gradients, signs: gradients @ signs * torch.nan, "does not keep norms"),
        (failing, "no kernel image is available"),
    ],
)
def test_a_bad_one_is_replaced(fake, multiply, message):
    fake.multiply = multiply
    with pytest.warns(UserWarning, match=f"'fast_jl' cannot be used: .*{message}.*'rademacher', of the same"):
        projector = fast_jl_or_rademacher(1024, "cpu")
    assert isinstance(projector, RademacherProjector)
    assert projector.proj_dim == 1024


def test_a_missing_one_is_replaced(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_jl", None)
    with pytest.warns(UserWarning, match=r"fast_jl.*pip install 'lightning-trak\[fast_jl\]'"):
        assert isinstance(fast_jl_or_rademacher(512, "cpu"), RademacherProjector)


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_jl", FakeFastJL())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device and torch finds none"):
        FastJLProjector(512)
    with pytest.warns(UserWarning, match="It needs a CUDA device"):
        assert isinstance(fast_jl_or_rademacher(512), RademacherProjector)
