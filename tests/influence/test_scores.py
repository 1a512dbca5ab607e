"""Kernel and scores against NumPy loops, and against the `traker` package on identical gradients."""

from __future__ import annotations

import operator
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from lightning_trak import ClassificationMixin
from lightning_trak.features.featurizer import Featurizer
from lightning_trak.gradients import ModelFunction, VmapEngine
from lightning_trak.influence import Estimator, Options, TrainFeatures
from lightning_trak.influence.gauss_newton import accumulate, factor, solve
from lightning_trak.influence.scores import extreme_scores, scores, with_mean_loss_grad
from lightning_trak.influence.train_features import evenly_spaced
from lightning_trak.precision import full_precision
from lightning_trak.projection import IdentityProjector
from lightning_trak.tasks.loss_terms import LossTerms

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_train(n, k, seed=0):
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(n, k)), rng.uniform(size=n), rng.uniform(0.1, 1, size=n)
    return TrainFeatures(*(array.astype(np.float32) for array in arrays))


def scores_reference(trains, targets, damping, curvature):
    """τ[i, j], one pair and one checkpoint at a time, in float64."""
    n, m = len(trains[0].features), len(targets[0])
    total = np.zeros((n, m))
    for train, phi in zip(trains, targets, strict=True):
        features, q, w = (np.float64(array) for array in (train.features, train.loss_grad, train.curvature))
        k = features.shape[1]
        kernel = np.zeros((k, k))
        for i in range(n):
            kernel += (w[i] if curvature else 1.0) * np.outer(features[i], features[i])
        kernel += damping * np.trace(kernel) / k * np.eye(k)
        for j in range(m):
            x = np.linalg.solve(kernel, np.float64(phi[j]))
            for i in range(n):
                total[i, j] += features[i] @ x * q[i] / len(trains)
    return total


class OnDisk:
    """What is sliced like an array, and is none."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __getitem__(self, rows):
        return self.array[rows].copy()


def in_blocks(train, size):
    """The same train set, read in blocks of ``size`` rows, as from a disk."""
    return replace(train, features=OnDisk(train.features), block_rows=size)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([1, 2, 4, 512]), st.booleans(), st.integers(1, 41))
def test_sums_against_numpy_for_any_size_of_blocks(n, k, panel, weighted, size):
    train = random_train(n, k)
    sums, _ = accumulate(in_blocks(train, size), curvature=weighted, panel=panel)
    phi, q, w = (np.float64(array) for array in (train.features, train.loss_grad, train.curvature))
    np.testing.assert_allclose(
        sums.matrix.numpy(), phi.T @ ((w[:, None] if weighted else 1) * phi), rtol=1e-5, atol=1e-5
    )
    assert sums.matrix.dtype == torch.float64
    np.testing.assert_allclose(sums.gradient, phi.T @ q, rtol=1e-4, atol=1e-5)
    assert sums.squares == pytest.approx((q**2 * (phi**2).sum(1)).sum(), rel=1e-5)
    assert sums.curvature_scale == pytest.approx((w * (phi**2).sum(1)).sum() / k, rel=1e-5)


@pytest.mark.parametrize("cross_validated", [None, 0.7])
def test_sums_can_be_kept_as_arrays(cross_validated):
    sums, _ = accumulate(random_train(20, 5), curvature=True)
    sums.cross_validated = cross_validated
    again = type(sums).from_arrays(sums.arrays())
    assert torch.equal(again.matrix, sums.matrix)
    assert torch.equal(again.gradient, sums.gradient)
    numbers = [(one.squares, one.curvature_scale, one.n_train, one.cross_validated) for one in (again, sums)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3, 10.0])
def test_solve_against_numpy(damping):
    phi = np.random.default_rng(0).normal(size=(50, 8))
    kernel = phi.T @ phi
    vectors = torch.randn(5, 8)
    damped = kernel + damping * np.mean(np.diag(kernel)) * np.eye(8)
    got = solve(factor(torch.tensor(kernel), damping), vectors)
    np.testing.assert_allclose(got.numpy(), np.linalg.solve(damped, vectors.numpy().T).T, rtol=1e-4, atol=1e-6)


def test_kernels_that_cannot_be_solved():
    phi = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"singular.*damping=0.*damping='auto'"):
        factor(phi.T @ phi, 0)
    nearly = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"singular or nearly so .*condition number ≥ 1e\+09, effective rank 1.0"):
        factor(nearly, 0)
    four = torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"condition number ≥ inf, effective rank 4.0"):
        factor(four, 0)
    with pytest.raises(ValueError, match="mean diagonal of 0"):
        factor(torch.zeros(2, 2, dtype=torch.float64), 0.3)
    with pytest.raises(ValueError, match="mean diagonal of nan"):
        factor(torch.full((2, 2), float("nan"), dtype=torch.float64), 0.3)
    negative = TrainFeatures(*(np.array(array, "f4") for array in (np.ones((2, 2)), [1, 1], [1, -0.5])))
    with pytest.raises(ValueError, match="negative for 1 examples"):
        accumulate(negative, curvature=True)
    with pytest.raises(ValueError, match=r"damping=0.*n=4"):
        Estimator([random_train(4, 4)], Options(damping=0))([torch.zeros(1, 4)])


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("block", [4, 4096])
@pytest.mark.parametrize("checkpoints", [1, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_scores_against_numpy_loops(curvature, block, checkpoints, device):
    trains = [random_train(23, 5, seed) for seed in range(checkpoints)]
    whole, trains = trains, [in_blocks(train, block) for train in trains]
    targets = [np.random.default_rng(9 + seed).normal(size=(6, 5)) for seed in range(checkpoints)]
    estimator = Estimator(trains, Options(damping=0.2, curvature=curvature), torch.device(device))
    pairs = zip(trains, targets, strict=True)
    solved = [estimator.solve(train, torch.tensor(phi, dtype=torch.float32)) for train, phi in pairs]
    calls = []
    got = estimator.scores(solved, lambda: calls.append(1))
    expected = scores_reference(whole, targets, 0.2, curvature)
    np.testing.assert_allclose(got.mean.numpy(), expected, rtol=1e-4, atol=1e-6)
    check_spread(got.spread, whole, targets, curvature)
    assert len(calls) == -(-23 // block)
    extremes = estimator.extremes(solved, 7)
    for ranked, largest in ((extremes.top, True), (extremes.bottom, False)):
        values, indices = torch.tensor(expected).topk(7, dim=0, largest=largest)
        assert torch.equal(ranked.indices, indices.T)
        np.testing.assert_allclose(ranked.values.numpy(), values.T.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("block", [4, 4096])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_self_influence_is_q_times_the_diagonal(curvature, block, device):
    train = random_train(23, 5, 1)
    estimator = Estimator([in_blocks(train, block)], Options(damping=0.2, curvature=curvature), torch.device(device))
    got = estimator.self_influence(in_blocks(train, block))
    expected = scores_reference([train], [np.asarray(train.features, dtype=np.float64)], 0.2, curvature)
    np.testing.assert_allclose(got.numpy(), np.diag(expected) * np.asarray(train.loss_grad), rtol=1e-4, atol=1e-6)
    flipped = replace(train, features=-np.asarray(train.features), loss_grad=-np.asarray(train.loss_grad))
    other = estimator.self_influence(flipped)
    np.testing.assert_allclose(got.numpy(), other.numpy(), rtol=1e-5)  # of -f the same


def check_spread(spread, trains, targets, curvature):
    """Against each checkpoint's scores by themselves."""
    if len(trains) == 1:
        assert spread is None
        return
    alone = np.stack(
        [scores_reference([train], [phi], 0.2, curvature) for train, phi in zip(trains, targets, strict=True)]
    )
    expected = alone.std(0, ddof=1) / len(trains) ** 0.5
    np.testing.assert_allclose(spread.standard_error.numpy(), expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(spread.sample.numpy(), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, 64, 65, 2**24 + 4, 2**31 + 1])
def test_evenly_spaced_rows_are_there(n):
    rows = evenly_spaced(n, 64)
    assert (int(rows[0]), int(rows[-1])) == (0, n - 1)
    assert len(rows.unique()) == min(n, 64)


def test_sample_is_spread_over_the_train_set():
    """64 of 127 examples: every other one."""
    trains, solved = [random_train(127, 5, seed) for seed in range(2)], [torch.randn(6, 5) for _ in range(2)]
    sample = scores([in_blocks(train, 10) for train in trains], solved).spread.sample
    for number in range(2):
        whole = scores(trains[number : number + 1], solved[number : number + 1]).mean
        torch.testing.assert_close(sample[number], whole[::2])


def test_blocks_do_not_show_in_extremes():
    train, solved = random_train(23, 5), torch.randn(6, 5)
    whole = scores([train], [solved]).mean
    found = extreme_scores([in_blocks(train, 3)], [solved], 4).top.indices
    assert torch.equal(found, whole.topk(4, dim=0).indices.T)


@pytest.mark.parametrize(
    ("n", "m", "blocks"), [(2048, 1, 1), (2049, 1, 2), (2048, 2**15, 1), (2048, 2**16, 2), (9, 10**9, 9)]
)
def test_many_targets_make_small_blocks(n, m, blocks):
    """Of at most 2048 rows, and 2²⁶ scores."""
    features = np.broadcast_to(np.float32(0), (n, 1))
    slices = TrainFeatures(features, np.zeros(n), np.zeros(n)).slices(m)
    assert len(slices) == blocks
    assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(n))


class Small(ClassificationMixin, nn.Module):
    """Three classes, the first logit fixed at zero: no redundant parameters, so H is invertible with λ = 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        logits = self.last(torch.tanh(self.hidden(x)))
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_against_traker_on_identical_gradients(tmp_path, checkpoints):
    """The paper's estimator (no curvature, λ = 0) ranks as the reference implementation does, target by target.

    That divides H⁻¹ by the mean of its entries, to fit into float16: so each of several checkpoints has a weight there.
    """
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randn(200, 3, generator=generator), torch.randn(20, 3, generator=generator)
    y, target_y = torch.randint(0, 3, (200,), generator=generator), torch.randint(0, 3, (20,), generator=generator)
    model = Small().eval()
    states = [
        {name: value + 0.5 * number * torch.randn(value.shape, generator=generator) for name, value in state.items()}
        for number, state in enumerate([model.state_dict()] * checkpoints)
    ]
    theirs = traker_scores(tmp_path, model, states, (x, y), (z, target_y))
    trains, solved = [], []
    for state in states:
        function = ModelFunction(model, state, [name for name, _ in model.named_parameters()])
        featurizer = Featurizer(function, VmapEngine(), IdentityProjector(), key=0)
        result = featurizer((x, y), 200)
        loss_grad, curvature = LossTerms(model)(function.call, (x, y), result.outputs)
        trains.append(TrainFeatures(result.features.numpy(), loss_grad.numpy(), curvature.numpy()))
        targets = featurizer((z, target_y), 20).features
        inverse = (result.features.T @ result.features).inverse()
        estimator = Estimator(trains[-1:], Options(damping=0, curvature=False))
        solved.append(estimator.solve(trains[-1], targets).vectors / inverse.abs().mean())
    ours = scores(with_mean_loss_grad(trains), solved).mean
    assert theirs.shape == (200, 20)
    assert min(spearmanr(theirs[:, j], ours[:, j]).statistic for j in range(20)) > 0.999


def traker_scores(path, model, states, train, targets, lambda_reg=0.0):
    """The scores of the reference implementation, (n, m), averaged over checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trak import TRAKer
        from trak.projectors import NoOpProjector

        traker = TRAKer(
            model=model, task="image_classification", train_set_size=len(train[0]), save_dir=str(path), device="cpu",
            projector=NoOpProjector(device="cpu"), proj_dim=sum(p.numel() for p in model.parameters()),
            lambda_reg=lambda_reg, use_half_precision=False,
        )  # fmt: skip
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for rows in torch.arange(len(train[0])).split(50):
                traker.featurize(batch=tuple(tensor[rows] for tensor in train), num_samples=len(rows))
        traker.finalize_features()
        for number, state in enumerate(states):
            traker.start_scoring_checkpoint("test", state, model_id=number, num_targets=len(targets[0]))
            traker.score(batch=targets, num_samples=len(targets[0]))
        return np.asarray(traker.finalize_scores("test"))


SETTINGS = {
    "none": {},
    "products of CUDA": {"cuda.matmul": "tf32"},
    "products of oneDNN": {"mkldnn.matmul": "bf16"},
    "exact products of CUDA": {"cuda.matmul": "ieee"},
    "everything": {"": "tf32"},
    "everything but the products of CUDA": {"": "tf32", "cuda.matmul": "ieee"},
    "the former setting": {"former": "high"},
    "the former setting, of bfloat16": {"former": "medium"},
    "both": {"former": "high", "cuda.matmul": "ieee"},
    "both, against each other": {"cuda.matmul": "tf32", "former": "highest", "mkldnn.matmul": "bf16"},
}
PLACES = ("", "cuda.matmul", "mkldnn.matmul")


def set_precision(place, value):
    if place == "former":
        torch.set_float32_matmul_precision(value)
    else:
        operator.attrgetter(f"backends.{place}".rstrip("."))(torch).fp32_precision = value


def precisions():
    found = {place: operator.attrgetter(f"backends.{place}".rstrip("."))(torch).fp32_precision for place in PLACES}
    try:
        found["former"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        found["former"] = "mixed"
    return found


@pytest.fixture
def _own_precision():
    yield
    torch.set_float32_matmul_precision("highest")
    for place in PLACES:
        set_precision(place, "none")


@pytest.mark.usefixtures("_own_precision")
@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_exact_whatever_precision_is_set(setting):
    train, targets = random_train(300, 40), torch.randn(20, 40)
    expected = Estimator([train], Options(damping=0.1))([targets])
    for place, value in SETTINGS[setting].items():
        set_precision(place, value)
    before = precisions()
    with full_precision():
        assert precisions()["cuda.matmul"] == precisions()["mkldnn.matmul"] == "ieee"
    found = Estimator([train], Options(damping=0.1))([targets])
    assert torch.equal(found.mean, expected.mean)
    assert precisions() == before
    another = next(value for value in ("tf32", "ieee", "bf16") if value not in before.values())
    set_precision("", another)  # what followed it still does
    assert precisions() | {"former": ""} == {
        place: another if before[place] == before[""] else before[place] for place in PLACES
    } | {"former": ""}
