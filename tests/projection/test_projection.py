"""Projections against references written from their definitions, one integer at a time."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trak.gradients import ConvGradient, DenseGradient, OuterGradient
from lightning_trak.projection import (
    FactoredProjector,
    IdentityProjector,
    Projector,
    RademacherProjector,
    SparseProjector,
    check_projector,
    make_projector,
    projection_key,
    restore_projector,
)
from lightning_trak.projection.philox import philox4x32

RANDOM = [RademacherProjector, SparseProjector]
ALL = [*RANDOM, IdentityProjector]


def philox_reference(counter, key):
    """Philox4x32-10 with Python's integers (Salmon et al., 2011)."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        one, other = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (other >> 32) ^ c[1] ^ k[0],
            other & 0xFFFFFFFF,
            (one >> 32) ^ c[3] ^ k[1],
            one & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The known-answer tests published with Random123."""
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    got = [f"{word.item():08x}" for word in philox4x32(tuple(words), low | high << 32)]
    assert got == expected.split()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), st.integers(0, 2**64 - 1))
def test_philox_against_python_integers(counter, key):
    got = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert [word.item() for word in got] == philox_reference(counter, key)


def rademacher_reference(start, rows, k, key, stream=0):
    matrix = np.zeros((rows, k))
    for i in range(rows):
        for j in range(k):
            row = start + i
            words = philox_reference((row & 0xFFFFFFFF, row >> 32, j // 128, stream), key)
            bit = words[j % 128 // 32] >> (j % 32) & 1
            matrix[i, j] = (2 * bit - 1) / np.sqrt(k)
    return matrix


def sparse_reference(start, rows, k, key):
    matrix = np.zeros((rows, k))
    for i in range(rows):
        row = start + i
        bucket, sign, _, _ = philox_reference((row & 0xFFFFFFFF, row >> 32, 0, 1), key)
        matrix[i, bucket * k >> 32] = -1 if sign & 1 else 1
    return matrix


REFERENCES = {RademacherProjector: rademacher_reference, SparseProjector: sparse_reference}


@pytest.mark.parametrize("projector", RANDOM)
@pytest.mark.parametrize("k", [1, 7, 128, 200])
@pytest.mark.parametrize("start", [0, 5, 2**32 - 3, 2**33 + 1])
def test_matrix_is_the_documented_one(projector, k, start):
    key = 0x123456789ABCDEF0
    features = torch.zeros(6, k)
    projector(k).add_(features, torch.eye(6), start, key)
    np.testing.assert_allclose(features.numpy(), REFERENCES[projector](start, 6, k, key), rtol=1e-6)


def project(projector, gradients, key=3, cuts=()):
    features = torch.zeros(len(gradients), projector.dimension(gradients.shape[1]))
    edges = [0, *sorted(cuts), gradients.shape[1]]
    for start, stop in itertools.pairwise(edges):
        projector.add_(features, gradients[:, start:stop], start, key)
    return features


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(ALL),
    st.integers(0, 5),
    st.integers(1, 60),
    st.sampled_from([1, 8, 130]),
    st.data(),
)
def test_any_cut_split_and_order_gives_the_same_features(projector, b, p, k, data):
    projector = projector(k)
    gradients = torch.randn(b, p, generator=torch.Generator().manual_seed(p))
    whole = project(projector, gradients)
    cuts = data.draw(st.lists(st.integers(0, p), max_size=4))
    order = torch.tensor(data.draw(st.permutations(range(b))), dtype=torch.int64)
    torch.testing.assert_close(project(projector, gradients, cuts=cuts), whole)
    torch.testing.assert_close(project(projector, gradients[order]), whole[order])
    split = data.draw(st.integers(0, b))
    parts = torch.cat([project(projector, gradients[:split]), project(projector, gradients[split:])])
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("projector", "p"),
    [
        (RademacherProjector(2048), 2**24 // 2048 + 3),  # bits are drawn for 8192 rows at once, signs exist for 512
        (SparseProjector(96), 2**18 + 3),  # buckets are drawn for 2¹⁸ entries at once
    ],
)
def test_blocks_do_not_show(projector, p):
    gradients = torch.randn(2, p)
    whole = project(projector, gradients)
    torch.testing.assert_close(project(projector, gradients, cuts=[5, p - 2]), whole, rtol=1e-4, atol=1e-2)
    last = torch.zeros(1, p)
    last[0, -1] = 1.0
    torch.testing.assert_close(project(projector, last), project(projector, last, cuts=[p - 1]))


@pytest.mark.parametrize("projector", RANDOM)
@pytest.mark.parametrize("k", [16, 130])
def test_inner_products_are_kept_on_average(projector, k):
    """E[⟨Px, Py⟩] = ⟨x, y⟩: the mean over 2000 keys is within five standard errors."""
    x, y = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    both = torch.stack([x, y])
    products = []
    for key in range(2000):
        features = project(projector(k), both, key=key * 7919)
        products.append((features @ features.T)[[0, 0, 1], [0, 1, 1]])
    products = torch.stack(products).double()
    error = products.std(0) / len(products) ** 0.5
    expected = torch.stack([x @ x, x @ y, y @ y]).double()
    assert ((products.mean(0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("projector", RANDOM)
def test_key_and_position_choose_the_matrix(projector):
    eye = torch.eye(50)
    one = project(projector(32), eye, key=1)
    assert torch.equal(one, project(projector(32), eye, key=1))
    assert not torch.equal(one, project(projector(32), eye, key=2))
    kept = projector(32)
    project(kept, eye, key=1)
    assert torch.equal(project(kept, eye, key=2), project(projector(32), eye, key=2))
    assert torch.equal(project(kept, eye, key=1), one)


def exact_rows(gradients, k, key=3):
    """The dense projection in float64, with the signs of the NumPy reference."""
    return gradients.double().numpy() @ rademacher_reference(0, gradients.shape[1], k, key, 0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_dense_is_exact_to_float32_whatever_the_precision_of_products(precision):
    """On CPUs with AMX "medium" multiplies bfloat16, on GPUs "high" takes TF32: neither is for the projection."""
    gradients = torch.randn(4, 700, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        found = project(RademacherProjector(256), gradients)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    expected = exact_rows(gradients, 256)
    assert (np.linalg.norm(found.numpy() - expected, axis=1) < 1e-5 * np.linalg.norm(expected, axis=1)).all()


def outer(b, positions, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return OuterGradient(
        torch.randn(b, positions, rows, generator=generator), torch.randn(b, positions, columns, generator=generator)
    )


def add(projector, gradient, start=0, key=3):
    features = torch.zeros(gradient.size, projector.proj_dim)
    projector.add_gradient_(features, gradient, start, key)
    return features


@pytest.mark.parametrize("start", [0, 2**32 - 3])
@pytest.mark.parametrize(("rows", "columns"), [(9, 11), (4, 40), (40, 3), (39, 5), (40, 5)])
def test_factored_is_the_documented_matrix(rows, columns, start):
    key, rank, k = 0x123456789ABCDEF0, 4, 16
    gradient = outer(2, 5, rows, columns)
    more = 8 if rows >= 8 * columns else 1  # the table of a vocabulary
    matrices = [
        np.eye(size) if size <= rank else rademacher_reference(start, size, rank, key, stream)
        for size, rank, stream in ((rows, more * rank, 2), (columns, rank, 3))
    ]
    small = np.einsum("bij,il,jr->blr", gradient.dense().double().numpy(), *matrices).reshape(2, -1)
    expected = small @ sparse_reference(start, small.shape[1], k, key)
    for form in (gradient, DenseGradient(gradient.dense())):
        got = add(FactoredProjector(k, rank=rank), form, start, key)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_factored_leaves_small_and_flat_parameters_to_the_sparse_projection():
    for gradient in (outer(3, 2, 4, 4), DenseGradient(torch.randn(3, 100)), outer(3, 2, 3, 40)):
        dense = DenseGradient(gradient.dense())
        got = add(FactoredProjector(8, rank=4), gradient, start=5)
        torch.testing.assert_close(got, add(SparseProjector(8), dense, start=5))


def test_factored_keeps_inner_products_on_average():
    """Of whole gradients: two layers, one of them a convolution with groups, and a bias."""
    generator = torch.Generator().manual_seed(0)
    convolution = ConvGradient(
        torch.randn(2, 4, 5, 5, generator=generator),
        torch.randn(2, 6, 5, 5, generator=generator),
        torch.Size((6, 2, 3, 3)),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=2,
    )
    gradients = [outer(2, 3, 7, 12), convolution, DenseGradient(torch.randn(2, 9, generator=generator))]
    starts = np.cumsum([0, *(gradient.dense()[0].numel() for gradient in gradients)])
    flat = torch.cat([gradient.dense().flatten(1) for gradient in gradients], 1).double()
    products = []
    for key in range(500):
        projector, features = FactoredProjector(24, rank=4), torch.zeros(2, 24)
        for start, gradient in zip(starts, gradients, strict=False):
            projector.add_gradient_(features, gradient, int(start), key * 7919)
        products.append((features @ features.T)[[0, 0, 1], [0, 1, 1]])
    products = torch.stack(products).double()
    error = products.std(0) / len(products) ** 0.5
    assert ((products.mean(0) - (flat @ flat.T)[[0, 0, 1], [0, 1, 1]]).abs() < 5 * error).all()


def test_factored_key_and_batch():
    projector, gradient = FactoredProjector(16, rank=4), outer(5, 3, 9, 9)
    whole = add(projector, gradient, key=1)
    assert not torch.equal(whole, add(projector, gradient, key=2))
    torch.testing.assert_close(add(projector, gradient, key=1), whole)
    torch.testing.assert_close(add(projector, gradient[1:3], key=1), whole[1:3])
    assert add(projector, gradient[:0]).shape == (0, 16)


def test_identity_is_exact():
    gradients = torch.randn(3, 10)
    assert torch.equal(project(IdentityProjector(), gradients, cuts=[4]), gradients)
    assert IdentityProjector(4).dimension(10) == 10


def test_projection_key():
    keys = {projection_key(seed, digest) for seed in range(5) for digest in ("a", "b", "1:a")}
    assert len(keys) == 15
    assert all(0 <= key < 2**64 for key in keys)


def test_make_projector():
    assert isinstance(make_projector("auto", 10, 10), IdentityProjector)
    assert isinstance(make_projector("auto", 10, 11), FactoredProjector)
    assert make_projector("rademacher", 10, 11).proj_dim == 10
    own = SparseProjector(5)
    assert make_projector(own, 10, 11) is own
    with pytest.raises(
        ValueError,
        match="'auto', 'factored', 'fast_jl', 'identity', 'rademacher', 'sparse' or a Projector, got 'gauss'",
    ):
        check_projector("gauss", 8)
    with pytest.raises(TypeError, match="got 3"):
        check_projector(3, 8)
    with pytest.raises(ValueError, match="positive integer, got 0"):
        SparseProjector(0)


@pytest.mark.parametrize(
    ("projector", "expected"),
    [
        (FactoredProjector(8, rank=4), [-141.0, -209.0, 0.0, 0.0]),
        (SparseProjector(64), [-15.0, -181.0, 54.0, 33.0]),
        (RademacherProjector(64), [52.25, -6.25, 29.5, 146.75]),
    ],
    ids=repr,
)
def test_the_drawing_is_that_of_its_version(projector, expected):
    """If these numbers change, features of stores would be mixed with others: count ``drawing`` up with them."""
    features = add(projector, DenseGradient(torch.arange(128.0).reshape(1, 8, 16)), start=2**32 - 5, key=11)
    assert projector.drawing == 1
    assert features[0, :4].tolist() == expected


def test_the_configuration_has_all_arguments():
    assert SparseProjector(8).configuration == {"projector": "sparse", "drawing": 1, "arguments": {}}
    assert FactoredProjector(8, 4).configuration == {"projector": "factored", "drawing": 1, "arguments": {"rank": 4}}
    for projector in (FactoredProjector(8, rank=3), SparseProjector(8), IdentityProjector(8)):
        for other in (projector, copy.deepcopy(projector), pickle.loads(pickle.dumps(projector))):
            assert restore_projector(other.configuration, 8).configuration == projector.configuration

    class Own(Projector):
        drawing = 2

        def __init__(self, proj_dim=4, *names, scale=1.0, **options):
            super().__init__(proj_dim)
            self._hidden = scale

        def add_(self, features, gradients, start, key):
            raise NotImplementedError

    own = Own(4, "a", scale=2.0, deep=True)
    arguments = {"names": ("a",), "scale": 2.0, "options": {"deep": True}}
    assert own.configuration == {"projector": "Own", "drawing": 2, "arguments": arguments}

    class Narrow(FactoredProjector):
        def __init__(self, seed=3):
            super().__init__(16, rank=2)
            self.seed = seed

    assert Narrow().configuration["arguments"] == {"rank": 2, "seed": 3}
    with pytest.raises(ValueError, match=r"projector 'Own' and its arguments .*Pass the same one with"):
        restore_projector(own.configuration, 4)
    with pytest.raises(TypeError, match="argument scale of Own is Tensor, which the feature store cannot write"):
        Own(4, scale=torch.ones(1)).configuration  # noqa: B018


def test_a_projector_of_ones_own():
    class First(Projector):
        name = "first"

        def dimension(self, n_params):
            return 1

        def add_(self, features, gradients, start, key):
            if start == 0:
                features[:, 0] += gradients[:, 0]

    assert project(First(), torch.tensor([[2.0, 3.0]]), cuts=[1]).item() == 2.0
