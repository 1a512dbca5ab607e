"""Kronecker factors, eigenvalues and whitening, against float64 loops over examples and their labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_trak import LanguageModelingMixin
from lightning_trak.curvature import Curvature, EigenBasis, Eigenvalues, SecondMoments, Whitening
from lightning_trak.gradients import DenseGradient, HooksEngine, LoopEngine, ModelFunction, OuterGradient, VmapEngine
from lightning_trak.gradients.gradient import ConvGradient, RowsGradient

WORDS, LENGTH, N = 11, 6, 7


class Small(LanguageModelingMixin, nn.Module):
    """One table of words for both ends, a bias, a norm, and a layer between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.middle, self.norm = nn.Embedding(WORDS, 5), nn.Linear(5, 5), nn.LayerNorm(5)
        self.bias = nn.Parameter(torch.randn(WORDS))
        self.head = nn.Linear(5, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.norm(self.words(tokens) + self.middle(self.words(tokens)).tanh())) + self.bias


def outer():
    return OuterGradient(torch.randn(3, 4, 2), torch.randn(3, 4, 5))


def convolution(groups=1):
    options = {"stride": (2,), "padding": (1,), "dilation": (1,), "groups": groups}
    shape = torch.Size((4, 6 // groups, 3))
    return ConvGradient(torch.randn(3, 6, 9), torch.randn(3, 4, 5), shape, **options)


@pytest.mark.parametrize("gradient", [outer(), convolution()], ids=["outer", "convolution"])
def test_factors_of_one_example_give_its_gradient(gradient):
    left, right = gradient[1:2].left_factor(), gradient[1:2].right_factor()
    torch.testing.assert_close(left.T @ right, gradient.dense()[1].flatten(1))


def test_factors_of_groups_are_those_of_every_group():
    gradient = convolution(groups=2)
    left, right = gradient.left_factor(), gradient.right_factor()
    assert left.shape == (3 * 5, 4)
    assert right.shape == (3 * 2 * 5, 9)
    whole = ConvGradient(
        gradient.inputs, gradient.grads, torch.Size((4, 6, 3)), stride=(2,), padding=(1,), dilation=(1,)
    )
    columns = whole.right_factor().unflatten(1, (2, 9))
    expected = torch.einsum("tgi,tgj->ij", columns, columns)
    torch.testing.assert_close(right.T @ right, expected)


def test_factors_of_dense_gradients_are_their_rows_and_columns():
    values = torch.randn(3, 4, 2, 2)
    left, right = DenseGradient(values).left_factor(), DenseGradient(values).right_factor()
    matrices = values.flatten(2)
    torch.testing.assert_close(left.T @ left, sum(g @ g.T for g in matrices))
    torch.testing.assert_close(right.T @ right, sum(g.T @ g for g in matrices))


def test_factors_of_looked_up_rows():
    gradient = RowsGradient(torch.tensor([[0, 2]]), torch.randn(1, 2, 3), rows=4)
    left, right = gradient.left_factor(), gradient.right_factor()
    assert left is None
    torch.testing.assert_close(right, gradient.values[0])
    folded = convolution().fold(1)
    assert folded.left_factor().shape == (15, 4)


def test_bases_are_eigenvectors_of_the_second_moments():
    gradient = outer()
    moments = SecondMoments()
    for rows in (slice(0, 2), slice(2, 3)):
        with moments.batch() as sink:
            sink(rows, "weight", gradient[rows])
    basis = moments.bases()["weight"]
    for q, factor in ((basis.left, gradient.left), (basis.right, gradient.right)):
        moment = sum(np.outer(vector, vector) for vector in factor.double().flatten(0, 1).numpy())
        rotated = q.double().numpy().T @ moment @ q.double().numpy()
        np.testing.assert_allclose(rotated, np.diag(np.linalg.eigvalsh(moment)), atol=1e-4)


def test_of_many_positions_some_are_enough():
    """Every third of 200: eigenvectors of very different eigenvalues are found all the same."""
    scales = torch.tensor([1.0, 10.0, 100.0])
    moments = SecondMoments()
    with moments.batch() as sink:
        sink(slice(0, 9), "weight", OuterGradient(torch.randn(9, 200, 3) * scales, torch.randn(9, 200, 2)))
    basis = moments.bases()["weight"]
    torch.testing.assert_close(basis.left.abs(), torch.eye(3), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "gradient", [outer(), convolution(), OuterGradient(torch.randn(3, 90, 2), torch.randn(3, 90, 5))]
)
def test_rotations_are_products_with_the_bases(gradient):
    rows, columns = gradient.shape[0], gradient.shape[1:].numel()
    left, right = torch.linalg.qr(torch.randn(rows, rows))[0], torch.linalg.qr(torch.randn(columns, columns))[0]
    expected = [(left.T @ g.flatten(1) @ right).flatten() for g in gradient.dense()]
    torch.testing.assert_close(EigenBasis(left, right).rotate(gradient), torch.stack(expected), rtol=1e-3, atol=1e-4)
    expected = [(g.flatten(1) @ right).flatten() for g in gradient.dense()]
    torch.testing.assert_close(EigenBasis(None, right).rotate(gradient), torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_gradients_are_rotated_a_few_at_a_time(monkeypatch):
    gradient = OuterGradient(torch.randn(7, 4, 2), torch.randn(7, 4, 5))
    basis = EigenBasis(torch.linalg.qr(torch.randn(2, 2))[0], torch.linalg.qr(torch.randn(5, 5))[0])
    whole = basis.rotate(gradient)
    eigenvalues, features = Eigenvalues({"weight": basis}), torch.zeros(7, 10)
    monkeypatch.setattr("lightning_trak.curvature.kronecker.CHUNK_BYTES", 3 * 4 * 10)
    assert [rows for rows, _ in basis.rotated(gradient)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    with eigenvalues.batch(7) as sink:
        sink(slice(0, 7), "weight", gradient)
    found = eigenvalues.curvature()
    torch.testing.assert_close(found.eigenvalues["weight"], whole.square().mean(0))
    Whitening(found, {"weight": 10}, {"weight": 1.0}).add_gradient_(features, gradient, 0, 0)
    torch.testing.assert_close(features, whole / (found.eigenvalues["weight"] + 1).sqrt())


@pytest.mark.parametrize(
    ("shape", "has"),
    [
        ((3,), (True, False)),
        ((), (True, False)),
        ((2000,), (False, False)),
        ((6, 4), (True, True)),
        ((40, 5), (False, True)),
        ((39, 5), (True, True)),
        ((2, 2000), (True, False)),
        ((4, 3, 2, 2), (True, True)),
    ],
)
def test_which_axes_get_a_basis(shape, has):
    moments = SecondMoments()
    with moments.batch() as sink:
        sink(slice(0, 1), "weight", DenseGradient(torch.randn(1, *shape)))
    basis = moments.bases()["weight"]
    assert (basis.left is not None, basis.right is not None) == has


def test_nothing_of_a_failed_batch_is_kept():
    gradient = DenseGradient(torch.ones(2, 3))
    moments, eigenvalues = SecondMoments(), Eigenvalues({"bias": EigenBasis(None, None)})

    def fails(batch):
        with batch as sink:
            sink(slice(0, 2), "bias", gradient)
            raise torch.OutOfMemoryError

    for batch in (moments.batch(), eigenvalues.batch(2)):
        with pytest.raises(torch.OutOfMemoryError):
            fails(batch)
    with eigenvalues.batch(2) as sink:
        sink(slice(0, 2), "bias", gradient)
    assert eigenvalues.curvature().eigenvalues["bias"].tolist() == [1, 1, 1]
    assert not moments.bases()


@pytest.mark.parametrize("engine", [HooksEngine(), VmapEngine(), LoopEngine()], ids=lambda engine: engine.name)
def test_eigenvalues_are_those_of_whole_examples(engine):
    """Also of a table that is used at both ends: its two gradients are added before they are squared."""
    module = Small().eval()
    names = [name for name, _ in module.named_parameters()]
    function = ModelFunction(module, module.state_dict(), names)
    batch = torch.randint(0, WORDS, (N, LENGTH), generator=torch.Generator().manual_seed(1))
    engine.prepare(function, batch, N)
    drawn, loss = (batch, module.draw_labels(batch, range(N))), function.of("drawn_loss")
    moments = SecondMoments()
    with moments.batch() as sink:
        engine(loss, drawn, N, sink)
    bases = moments.bases()
    eigenvalues = Eigenvalues(bases)
    for rows in (slice(0, 4), slice(4, N)):
        with eigenvalues.batch(len(batch[rows])) as sink:
            engine(loss, (batch[rows], drawn[1][rows]), len(batch[rows]), sink)
    found = eigenvalues.curvature().eigenvalues
    slow = module.double()
    sums: dict = dict.fromkeys(names, 0.0)
    for row in range(N):
        gradients = torch.autograd.grad(
            slow.drawn_loss((batch[row : row + 1], drawn[1][row : row + 1])), slow.parameters()
        )
        for name, gradient in zip(names, gradients, strict=True):
            sums[name] = sums[name] + bases[name].rotate(DenseGradient(gradient[None].float())).double().square() / N
    for name in names:
        torch.testing.assert_close(found[name].double(), sums[name][0], rtol=1e-4, atol=1e-7)


def curvature_of(gradients):
    moments = SecondMoments()
    with moments.batch() as sink:
        for name, gradient in gradients.items():
            sink(slice(0, gradient.size), name, gradient)
    eigenvalues = Eigenvalues(moments.bases())
    with eigenvalues.batch(next(iter(gradients.values())).size) as sink:
        for name, gradient in gradients.items():
            sink(slice(0, gradient.size), name, gradient)
    return eigenvalues.curvature()


def whitened(curvature, gradients, damping):
    sizes = {name: gradient.shape.numel() for name, gradient in gradients.items()}
    whitening, size = (
        Whitening(curvature, sizes, {name: damping * mean for name, mean in curvature.means.items()}),
        next(iter(gradients.values())).size,
    )
    features = torch.zeros(size, sum(sizes.values()))
    for name, start in zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False):
        whitening.add_gradient_(features, gradients[name], start, key=0)
    assert whitening.dimension(features.shape[1]) == features.shape[1]
    return features


def test_inner_products_are_those_with_the_inverse_of_the_damped_curvature():
    gradients = {"weight": outer(), "bias": DenseGradient(torch.randn(3, 2))}
    curvature, damping = curvature_of(gradients), 0.3
    features = whitened(curvature, gradients, damping).double()
    expected = np.zeros((3, 3))
    for name, gradient in gradients.items():
        basis, values = curvature.bases[name], curvature.eigenvalues[name].double().numpy()
        sides = [np.eye(1) if q is None else q.double().numpy() for q in (basis.left, basis.right)]
        q = np.kron(*sides)
        matrix = q @ np.diag(values) @ q.T + damping * values.mean() * np.eye(len(q))
        g = gradient.dense().flatten(1).double().numpy()
        expected += g @ np.linalg.solve(matrix, g.T)
    np.testing.assert_allclose(features @ features.T, expected, rtol=1e-4)


def test_vectors_are_whitened_exactly():
    gradients = {"bias": DenseGradient(torch.randn(50, 6) @ torch.randn(6, 6))}
    features = whitened(curvature_of(gradients), gradients, damping=0.0)
    torch.testing.assert_close(features.T @ features / 50, torch.eye(6), rtol=1e-3, atol=1e-3)


def test_a_parameter_without_curvature_counts_nothing():
    gradients = {"weight": outer(), "bias": DenseGradient(torch.zeros(3, 2))}
    features = whitened(curvature_of(gradients), {**gradients, "bias": DenseGradient(torch.ones(3, 2))}, damping=1.0)
    assert not features[:, -2:].any()
    assert features.isfinite().all()
    never_reached = curvature_of({"weight": outer()})
    assert not whitened(never_reached, {**gradients, "bias": DenseGradient(torch.ones(3, 2))}, 1.0)[:, -2:].any()


def test_a_parameter_that_only_the_second_pass_reaches_has_no_basis():
    eigenvalues = Eigenvalues({})
    with eigenvalues.batch(1) as sink:
        sink(slice(0, 1), "bias", DenseGradient(torch.tensor([[2.0, 3.0]])))
    curvature = eigenvalues.curvature()
    assert curvature.eigenvalues["bias"].tolist() == [4, 9]
    assert curvature.bases["bias"].left is None


def test_a_curvature_is_what_its_tensors_say():
    gradients = {"a.weight": outer(), "bias": DenseGradient(torch.randn(3, 2))}
    curvature = curvature_of(gradients)
    again = Curvature.from_tensors(curvature.tensors()).to(torch.device("cpu"))
    assert torch.equal(whitened(again, gradients, 1.0), whitened(curvature, gradients, 1.0))
    assert {*curvature.tensors()} == {
        *("eigenvalues/a.weight", "left/a.weight", "right/a.weight"),
        *("eigenvalues/bias", "left/bias"),
    }


def test_a_block_of_entries_cannot_be_whitened():
    whitening = Whitening(curvature_of({"weight": outer()}), {"weight": 10}, {"weight": 1.0})
    with pytest.raises(NotImplementedError, match="add_gradient_"):
        whitening.add_(torch.zeros(1, 10), torch.zeros(1, 10), 0, 0)


@pytest.mark.parametrize("silent", [True, False])
def test_eigenvectors_that_float32_does_not_find(monkeypatch, silent):
    """Of moments of low rank LAPACK may return NaN and no error, or an error."""
    eigh, gradients = torch.linalg.eigh, torch.randn(4, 3, 9)

    def coarse(moment):
        if moment.dtype == torch.float64:
            return eigh(moment)
        if silent:
            return torch.full_like(moment[0], torch.nan), torch.full_like(moment, torch.nan)
        raise torch.linalg.LinAlgError("failed to converge")

    moments = SecondMoments()
    with moments.batch() as sink:
        sink(slice(0, 4), "weight", DenseGradient(gradients))
    monkeypatch.setattr(torch.linalg, "eigh", coarse)
    basis = moments.bases()["weight"]
    for vectors, subscripts in ((basis.left, "nij,nkj->ik"), (basis.right, "nji,njk->ik")):
        moment = torch.einsum(subscripts, gradients, gradients)
        rotated = vectors.T @ moment @ vectors
        torch.testing.assert_close(rotated, rotated.diag().diag(), atol=1e-4, rtol=0)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors)), atol=1e-5, rtol=0)
