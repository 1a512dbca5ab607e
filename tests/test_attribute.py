"""`Trainer.attribute` as a whole: right, undisturbing, and clear about what it cannot do."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import lightning_trak as lt
from lightning_trak import Attribution, FeatureStore, TRAKCallback, attribute
from lightning_trak.influence.damping import choose_damping
from lightning_trak.projection import FactoredProjector, make_projector, projection_key
from lightning_trak.store.files import VerifiedRows
from tests.conftest import Blobs, Classifier, make_data, make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One trained run of three checkpoints, shared by the tests that only read it."""
    root = tmp_path_factory.mktemp("run")
    L.seed_everything(0, verbose=False)
    saving = ModelCheckpoint(root / "files", save_top_k=-1, monitor="val_loss", filename="{epoch}")
    trainer = make_trainer(root, TRAKCallback(root / "store"), saving)
    module, data = Classifier(), Blobs()
    trainer.fit(module, datamodule=data)
    return root, trainer, module, data


def fresh(root, **kwargs):
    """A trainer that knows nothing but the store."""
    return make_trainer(root, TRAKCallback(root / "store", **kwargs))


def features_float64(module, dataset, names, projection):
    """Slow and obvious: one example, one backward pass, one matrix product at a time. Returns Φ, p."""
    module = copy.deepcopy(module).double().eval()
    rows, probabilities = [], []
    for x, y in dataset:
        p = module(x[None].double()).softmax(1)[0, y]
        parameters = dict(module.named_parameters())
        gradients = torch.autograd.grad(torch.log(p / (1 - p)), [parameters[name] for name in names])
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).numpy() @ projection)
        probabilities.append(p.item())
    return np.array(rows), np.array(probabilities)


def scores_float64(train, targets, q, w, damping):
    """τ[i, j] = φ(z_j)ᵀ (H + λ·mean(diag H)·I)⁻¹ φ(z_i) q_i, by explicit loops and an explicit inverse."""
    k = train.shape[1]
    kernel = np.zeros((k, k))
    for phi, weight in zip(train, w, strict=True):
        kernel += weight * np.outer(phi, phi)
    inverse = np.linalg.inv(kernel + damping * np.mean(np.diag(kernel)) * np.eye(k))
    scores = np.zeros((len(train), len(targets)))
    for i in range(len(train)):
        for j in range(len(targets)):
            scores[i, j] = targets[j] @ inverse @ train[i] * q[i]
    return scores


def projection_matrix(projector, key, p):
    """Row by row: what the projector makes of each unit vector."""
    features = torch.zeros(p, projector.dimension(p))
    projector.add_(features, torch.eye(p), 0, key)
    return features.double().numpy()


class InAutocast(Classifier):
    """Computes in bfloat16 within, which its weights do not show."""

    def model_output(self, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().model_output(batch).float()


def test_a_model_that_computes_in_bfloat16_within(tmp_path, run):
    root, _, _, data = run
    path = min((root / "files").iterdir())
    attributing = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"))
    scores = attributing.attribute(InAutocast(), datamodule=data, ckpt_path=path).scores
    exact = make_trainer(tmp_path, TRAKCallback(tmp_path / "exact"))
    expected = exact.attribute(Classifier(), datamodule=data, ckpt_path=path).scores
    torch.testing.assert_close(scores, expected, rtol=0.1, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("projector", ["identity", "sparse", "rademacher"])
@pytest.mark.parametrize("gradients", ["vmap", "loop"])
def test_whole_attribution_against_a_float64_reference(tmp_path, run, projector, curvature, gradients):
    root, _, _, data = run
    paths = sorted((root / "files").iterdir())
    trak = TRAKCallback(
        tmp_path / "store", projector=projector, proj_dim=24, gradients=gradients, curvature=curvature, damping=0.2,
        seed=3, parameters=["net.0.*", "net.4.*"],
    )  # fmt: skip
    scores = make_trainer(tmp_path, trak).attribute(Classifier(), datamodule=data, ckpt_path=paths).scores
    names = ["net.0.weight", "net.0.bias", "net.4.weight", "net.4.bias"]
    expected = 0
    store = FeatureStore(tmp_path / "store")
    for path, digest in zip(paths, store.digests, strict=True):
        model = Classifier.load_from_checkpoint(path)
        p = sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)
        matrix = projection_matrix(make_projector(projector, 24, p), projection_key(3, digest), p)
        train, probabilities = features_float64(model, make_data(40), names, matrix)
        targets, _ = features_float64(model, make_data(7, 2), names, matrix)
        weights = probabilities * (1 - probabilities) if curvature else np.ones(40)
        expected = expected + scores_float64(train, targets, 1 - probabilities, weights, 0.2) / len(paths)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "unknown"])
def test_the_defaults_against_a_float64_reference(tmp_path, run, optimizer):
    """Outputs divided by 1.3 in Q and w; damped as long as SGD trained, else as cross-validation says."""
    root, _, _, data = run
    paths = sorted((root / "files").iterdir())
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        options = {"lr": 0.1, "momentum": 0.5, "dampening": 0, "nesterov": False, "weight_decay": 0.02}
        group = options if optimizer == "SGD" else {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0}
        steps = 7 - 2 * paths.index(path)
        states = {"optimizer_states": [{"param_groups": [group]}], "global_step": steps, "lr_schedulers": []}
        kept = {} if optimizer == "unknown" else states
        torch.save({"state_dict": checkpoint["state_dict"], **kept}, tmp_path / path.name)
    trak = TRAKCallback(tmp_path / "store", projector="sparse", proj_dim=24)
    files = [tmp_path / path.name for path in paths]
    attribution = make_trainer(tmp_path, trak).attribute(Classifier(), datamodule=data, ckpt_path=files)
    expected, dampings = 0, []
    for path, digest in zip(paths, FeatureStore(tmp_path / "store").digests, strict=True):
        model = Classifier.load_from_checkpoint(path)
        names = [name for name, _ in model.named_parameters()]
        p = sum(parameter.numel() for parameter in model.parameters())
        matrix = projection_matrix(make_projector("sparse", 24, p), projection_key(0, digest), p)
        train, probabilities = features_float64(model, make_data(40), names, matrix)
        targets, _ = features_float64(model, make_data(7, 2), names, matrix)
        odds = np.log(probabilities / (1 - probabilities)) / 1.3
        q, w = 1 / (1 + np.exp(odds)) / 1.3, 1 / (1 + np.exp(odds)) / (1 + np.exp(-odds)) / 1.3**2
        scale = np.mean(np.diag(train.T @ np.diag(w) @ train))
        if optimizer == "SGD":
            dampings.append(40 * (4 / (7 * 0.2) + 0.02) / scale)
        else:
            tensors = [torch.tensor(array, dtype=torch.float32) for array in (train, q, w)]
            dampings.append(choose_damping(*tensors, scale))
        expected = expected + scores_float64(train, targets, q, w, dampings[-1]) / len(paths)
    assert attribution.info.temperature == 1.3
    np.testing.assert_allclose(attribution.info.dampings, dampings, rtol=1e-3)
    np.testing.assert_allclose(attribution.scores.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def saved_as(path, source, **optimizer):
    """Copy a checkpoint's weights, with the state of an optimizer if its learning rate is given."""
    states = {"optimizer_states": [torch.optim.SGD([torch.zeros(1)], **optimizer).state_dict()], "lr_schedulers": []}
    kept = {**states, "global_step": 7} if optimizer else {}
    torch.save({"state_dict": torch.load(source, weights_only=True)["state_dict"], **kept}, path)
    return path


def test_a_training_time_beside_unknown_ones(tmp_path, run):
    root, _, _, data = run
    first, second, *_ = sorted((root / "files").iterdir())
    files = [saved_as(tmp_path / "0.ckpt", first, lr=0.1), saved_as(tmp_path / "1.ckpt", second)]

    def dampings(store, files):
        trainer = make_trainer(tmp_path / store, TRAKCallback(tmp_path / store / "trak"))
        return trainer.attribute(Classifier(), datamodule=data, ckpt_path=files).info

    both, alone = dampings("both", files), [dampings(f"{number}", file) for number, file in enumerate(files)]
    assert both.dampings == alone[0].dampings + alone[1].dampings
    assert both.damping_rules == ("from the training time", "by cross-validation")


def test_a_training_time_that_comes_later_is_noted(tmp_path, run):
    root, _, _, data = run
    source = min((root / "files").iterdir())
    files = [saved_as(tmp_path / "bare.ckpt", source), saved_as(tmp_path / "whole.ckpt", source, lr=0.1)]
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"))
    infos = [trainer.attribute(Classifier(), datamodule=data, ckpt_path=file).info for file in [*files, files[0]]]
    assert infos[0].damping_rules == ("by cross-validation",)
    assert infos[1].dampings == infos[2].dampings != infos[0].dampings


def test_a_temperature_of_ones_own(tmp_path, run):
    """As the model whose outputs are divided by it, at a damping of one's own too."""
    root, _, _, data = run
    path = min((root / "files").iterdir())

    class Divided(Classifier):
        def output_to_loss(self, output, batch):
            return super().output_to_loss(output / 2, batch)

    scores = []
    for module, temperature in ((Classifier(), 2), (Divided(), "auto"), (Classifier(), "auto")):
        trak = TRAKCallback(tmp_path / f"{len(scores)}", damping=0.5, temperature=temperature)
        scores.append(make_trainer(tmp_path, trak).attribute(module, datamodule=data, ckpt_path=path).scores)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-5)
    assert (scores[0] - scores[2]).abs().max() > 0.1 * scores[2].abs().max()


def test_a_temperature_needs_the_logistic_loss(tmp_path, run):
    root, _, _, data = run
    path = min((root / "files").iterdir())

    class Squared(Classifier):
        def output_to_loss(self, output, batch):
            return (output - 1).square()

    attributing = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", temperature=2))
    with pytest.raises(ValueError, match=r"temperature=2.*softplus"):
        attributing.attribute(Squared(), datamodule=data, ckpt_path=path)


def test_the_estimator_of_the_paper(tmp_path, run):
    """With estimator="trak", Q is averaged over checkpoints apart from φᵀ H⁻¹ φ: its Equation 17."""
    root, _, _, data = run
    paths = sorted((root / "files").iterdir())
    trak = TRAKCallback(tmp_path / "store", projector="rademacher", proj_dim=12, estimator="trak")
    trainer = make_trainer(tmp_path, trak)
    attribution = trainer.attribute(Classifier(), datamodule=data, ckpt_path=paths)
    scores = attribution.scores
    assert (attribution.info.estimator, attribution.info.damping, attribution.info.curvature) == ("trak", 0, False)
    inner, loss_grad = np.zeros((40, 7)), np.zeros(40)
    own = np.zeros(40)
    for path, digest in zip(paths, FeatureStore(tmp_path / "store").digests, strict=True):
        model = Classifier.load_from_checkpoint(path)
        names = [name for name, _ in model.named_parameters()]
        p = sum(parameter.numel() for parameter in model.parameters())
        matrix = projection_matrix(make_projector("rademacher", 12, p), projection_key(0, digest), p)
        train, probabilities = features_float64(model, make_data(40), names, matrix)
        targets, _ = features_float64(model, make_data(7, 2), names, matrix)
        inverse = np.linalg.inv(train.T @ train)
        inner += train @ inverse @ targets.T / len(paths)
        own += np.diag(train @ inverse @ train.T) / len(paths)
        loss_grad += (1 - probabilities) / len(paths)
    expected = inner * loss_grad[:, None]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    found = trainer.attribute_self(Classifier(), datamodule=data, ckpt_path=paths)
    np.testing.assert_allclose(found.numpy(), own * loss_grad**2, rtol=1e-3, atol=1e-5)


def test_without_curvature_and_damping_the_way_that_q_is_averaged_stays(tmp_path, run):
    """The choice of H and λ does not change the estimator: the mean of what each checkpoint gives by itself."""
    root, _, _, data = run
    paths = sorted((root / "files").iterdir())
    trak = TRAKCallback(tmp_path / "store", projector="sparse", proj_dim=12, curvature=False, damping=0)
    trainer = make_trainer(tmp_path, trak)
    together = trainer.attribute(Classifier(), datamodule=data, ckpt_path=paths).scores
    alone = [trainer.attribute(Classifier(), datamodule=data, ckpt_path=path).scores for path in paths]
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)


def test_self_influence_is_of_the_loss(tmp_path, run):
    """The mean over checkpoints of q times the diagonal of the scores, both of that checkpoint."""
    root, trainer, module, data = run
    before = snapshot(trainer, module)
    found = trainer.attribute_self()
    assert_same(before, snapshot(trainer, module))
    assert (found >= 0).all()
    paths, influences = sorted((root / "files").iterdir()), []
    for path in paths:
        one = fresh(root).attribute_self(Classifier(), datamodule=data, ckpt_path=path)
        alone = fresh(root).attribute(Classifier(), DataLoader(make_data(40), 8), data, path)
        entry = FeatureStore(root / "store")[alone.info.checkpoints[0]]
        q = torch.sigmoid(torch.logit(torch.from_numpy(np.array(entry.loss_grad)).double()) / alone.info.temperature)
        expected = q / alone.info.temperature * alone.scores.diagonal()
        torch.testing.assert_close(one, expected.float(), rtol=1e-3, atol=1e-6)
        influences.append(one)
    torch.testing.assert_close(found, torch.stack(influences).mean(0), rtol=1e-4, atol=1e-6)
    one = influences[0]
    torch.testing.assert_close(lt.attribute_self(trainer, ckpt_path=paths[0]), one)
    with pytest.raises(FileNotFoundError, match="no feature store"):
        fresh(tmp_path).attribute_self(Classifier(), datamodule=data)


def snapshot(trainer, module):
    """Everything of model, trainer and callbacks that a user could notice."""
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "data pointers": [parameter.data_ptr() for parameter in module.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "modes": [submodule.training for submodule in module.modules()],
        "module trainer": module._trainer,
        "device": module.device,
        "callbacks": list(trainer.callbacks),
        "lightning_module": trainer.lightning_module,
        "strategy model": trainer.strategy.model,
        "state": (trainer.state.fn, trainer.state.status, trainer.state.stage),
        "datamodule": trainer.datamodule,
        "train_dataloader": trainer.train_dataloader,
        "predict source": trainer.predict_loop._data_source.instance,
        "selector": trainer._data_connector._datahook_selector,
        "best": trainer.checkpoint_callback.best_model_path,
        "global_step": trainer.global_step,
        "metrics": dict(trainer.callback_metrics),
        "rng": (torch.get_rng_state(), np.random.get_state()[1].copy()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one is other or one == other


def prepared(run):
    """The run's model in an odd state: some gradients, mixed modes, a frozen parameter."""
    module = run[2]
    module.train()
    module.net[1].eval()
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    module.net[4].bias.requires_grad_(False)
    return module


def test_attribute_leaves_everything_as_it_was(run):
    _, trainer, _, _ = run
    module = prepared(run)
    before = snapshot(trainer, module)
    trainer.attribute()
    assert_same(before, snapshot(trainer, module))
    module.net[4].bias.requires_grad_(True)


def test_attribute_leaves_everything_as_it_was_after_an_error_too(run, monkeypatch):
    _, trainer, _, _ = run
    module = prepared(run)
    before = snapshot(trainer, module)

    def fails(*_, **__):
        torch.rand(3)
        raise RuntimeError("in the middle")

    monkeypatch.setattr("lightning_trak.trainer.featurization.Featurizer.__call__", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.attribute()
    assert_same(before, snapshot(trainer, module))
    module.net[4].bias.requires_grad_(True)


def test_another_model_or_datamodule_does_not_stay_attached(run):
    root, trainer, module, _ = run
    other, data = Classifier(), Blobs()
    before = snapshot(trainer, module)
    trainer.attribute(other, datamodule=data)
    assert_same(before, snapshot(trainer, module))
    assert other._trainer is None
    assert data.trainer is None
    untouched = fresh(root)
    untouched.attribute(other, datamodule=data)
    assert untouched.lightning_module is None
    assert untouched.datamodule is None


def test_training_goes_on_after_attribute_as_without(tmp_path):
    def train(attributes):
        L.seed_everything(0, verbose=False)
        root = tmp_path / str(attributes)
        trainer = make_trainer(root, TRAKCallback(root / "store"), max_epochs=1)
        module, data = Classifier(), Blobs()
        trainer.fit(module, datamodule=data)
        if attributes:
            trainer.attribute()
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, datamodule=data)
        return module.state_dict()

    for one, other in zip(train(False).values(), train(True).values(), strict=True):
        assert torch.equal(one, other)


def test_results_do_not_depend_on_how_data_are_read(tmp_path, run):
    root, trainer, _, _ = run
    expected = trainer.attribute().scores
    files = sorted((root / "files").iterdir())
    for number, (options, data) in enumerate(
        [
            ({"inference_mode": False}, Blobs()),
            ({}, Blobs(batch_size=40)),
            ({}, Blobs(batch_size=1)),
            ({}, Blobs(num_workers=2)),
        ]
    ):
        store = tmp_path / str(number)
        for batch_size in (None, 3):
            again = make_trainer(store, TRAKCallback(store / str(batch_size), batch_size=batch_size), **options)
            scores = again.attribute(Classifier(), datamodule=data, ckpt_path=files).scores
            torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)
    shuffled = DataLoader(make_data(7, 2), 2, shuffle=True)
    torch.testing.assert_close(trainer.attribute(dataloaders=shuffled).scores, expected, rtol=1e-3, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(trainer.attribute().scores, expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(trainer.attribute().scores, expected, rtol=1e-3, atol=1e-5)


def test_a_fresh_process_needs_the_store_alone(run):
    root, trainer, _, _ = run
    script = f"""
import warnings; warnings.filterwarnings("ignore")
import sys; sys.path.insert(0, {str(__file__.rsplit("/tests/", 1)[0])!r})
import torch, lightning as L
from lightning_trak import TRAKCallback
from tests.conftest import Blobs, Classifier
trainer = L.Trainer(callbacks=[TRAKCallback({str(root / "store")!r})], logger=False, accelerator="cpu")
torch.save(trainer.attribute(Classifier(), datamodule=Blobs()).scores, {str(root / "scores.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(root / "scores.pt"), trainer.attribute().scores)


def test_store_settings_hold_where_the_callback_says_nothing(tmp_path):
    L.seed_everything(0, verbose=False)
    settings = {"proj_dim": 16, "projector": "rademacher", "seed": 7, "parameters": "net.*.weight"}
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", **settings), max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    expected = trainer.attribute().scores
    torch.testing.assert_close(fresh(tmp_path).attribute(Classifier(), datamodule=Blobs()).scores, expected)
    for other in ({"seed": 8}, {"proj_dim": 17}, {"projector": "sparse"}, {"parameters": "net.0.weight"}):
        with pytest.raises(ValueError, match=r"was made with .*, but here"):
            fresh(tmp_path, **other).attribute(Classifier(), datamodule=Blobs())


def test_features_are_read_twice_at_most_and_sums_over_them_are_kept(tmp_path, run, monkeypatch):
    """Once to sum H, once to score; a second call sums nothing anew."""
    root, _, _, data = run
    read, blocks = [], VerifiedRows.blocks

    def noting(self, size):
        read.append(self.shape)
        return blocks(self, size)

    monkeypatch.setattr(VerifiedRows, "blocks", noting)
    shutil.copytree(root / "store", tmp_path / "store")
    for path in (tmp_path / "store").glob("checkpoints/*/sums-*"):
        path.unlink()
    copied = fresh(tmp_path)
    first = copied.attribute(Classifier(), datamodule=data)
    checkpoints = len(first.info.checkpoints)
    assert sum(len(shape) == 2 for shape in read) == 2 * checkpoints
    read.clear()
    second = copied.attribute(Classifier(), datamodule=data)
    assert sum(len(shape) == 2 for shape in read) == checkpoints
    assert torch.equal(first.scores, second.scores)
    assert first.info == second.info


def test_the_whole_projection_is_its_identity(tmp_path):
    """Another rank, or a rank that was forgotten, gave scores of two projections mixed."""
    L.seed_everything(0, verbose=False)
    trak = TRAKCallback(tmp_path / "store", projector=FactoredProjector(16, rank=2))
    trainer = make_trainer(tmp_path, trak, max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    expected = trainer.attribute().scores
    torch.testing.assert_close(fresh(tmp_path).attribute(Classifier(), datamodule=Blobs()).scores, expected)
    for other in ("factored", FactoredProjector(16, rank=3)):
        with pytest.raises(ValueError, match=r"made with projection.rank=2, but here projection.rank="):
            fresh(tmp_path, projector=other).attribute(Classifier(), datamodule=Blobs())
    drawn_anew = FactoredProjector(16, rank=2)
    drawn_anew.drawing = 2
    with pytest.raises(ValueError, match=r"made with projection.drawing=1, but here projection.drawing=2"):
        fresh(tmp_path, projector=drawn_anew).attribute(Classifier(), datamodule=Blobs())


class Passing(TRAKCallback):
    """A callback of the user's own, that passes on what it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def test_store_settings_hold_for_a_subclass_too(tmp_path):
    trainer = make_trainer(tmp_path, Passing(tmp_path / "store", proj_dim=20, seed=5), max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    expected = trainer.attribute()
    found = make_trainer(tmp_path, Passing(tmp_path / "store")).attribute(Classifier(), datamodule=Blobs())
    assert found.info.proj_dim == 20
    assert torch.equal(found.scores, expected.scores)


def test_checkpoints_brought_along(tmp_path, run):
    root, trainer, _, data = run
    files = sorted((root / "files").iterdir())
    plain = tmp_path / "plain.pt"
    torch.save(torch.load(files[0], weights_only=True)["state_dict"], plain)
    scores = fresh(tmp_path).attribute(Classifier(), datamodule=data, ckpt_path=[plain, *files[1:]]).scores
    torch.testing.assert_close(scores, trainer.attribute(ckpt_path=files).scores, rtol=1e-3, atol=1e-5)
    one = fresh(tmp_path).attribute(Classifier(), datamodule=data, ckpt_path=str(files[1]))
    assert len(one.info.checkpoints) == 1
    assert len(FeatureStore(tmp_path / "store")) == 3


def test_best_and_last(run):
    root, trainer, _, _ = run
    best = trainer.attribute(ckpt_path="best")
    expected = trainer.attribute(ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert best.info.checkpoints == expected.info.checkpoints
    store = FeatureStore(root / "store")
    assert trainer.attribute(ckpt_path="last").info.checkpoints == (store.digests[-1],)
    with pytest.raises(MisconfigurationException, match="no ModelCheckpoint that saved a best"):
        fresh(root).attribute(Classifier(), datamodule=Blobs(), ckpt_path="best")


def test_top_k_is_the_extremes_of_the_whole(run):
    _, trainer, _, _ = run
    whole, extremes = trainer.attribute(), trainer.attribute(top_k=4)
    for side in ("top", "bottom"):
        expected, got = getattr(whole, side)(3), getattr(extremes, side)(3)
        assert torch.equal(expected.values, got.values)
        assert torch.equal(whole.scores.T.gather(1, got.indices), got.values)  # two examples may tie
    with pytest.raises(AttributeError, match="without top_k"):
        extremes.scores  # noqa: B018
    assert trainer.attribute(top_k=1000).top(40).indices.shape == (7, 40)


def test_name_keeps_the_result_in_the_store(run):
    root, trainer, _, _ = run
    attribution = trainer.attribute(name="first")
    loaded = Attribution.load(root / "store" / "scores" / "first")
    assert torch.equal(loaded.scores, attribution.scores)
    assert repr(loaded) == repr(attribution)


def test_function_and_method_are_one(run):
    _, trainer, _, _ = run
    assert torch.equal(attribute(trainer).scores, trainer.attribute().scores)
    assert L.Trainer.attribute is attribute


def test_targets_are_looked_for_in_order(run):
    _, trainer, _, _ = run

    class Many(Blobs):
        def attribute_dataloader(self):
            return DataLoader(make_data(2), 2)

        def predict_dataloader(self):
            return DataLoader(make_data(3), 2)

    class Predict(Blobs):
        def predict_dataloader(self):
            return DataLoader(make_data(3), 2)

    assert trainer.attribute(datamodule=Many()).scores.shape == (40, 2)
    assert trainer.attribute(datamodule=Predict()).scores.shape == (40, 3)
    assert trainer.attribute(datamodule=Blobs()).scores.shape == (40, 7)
    assert trainer.attribute(dataloaders=DataLoader(make_data(5), 2)).scores.shape == (40, 5)
    assert trainer.attribute(dataloaders=DataLoader(make_data(5), 2), datamodule=Blobs()).scores.shape == (40, 5)
    assert trainer.attribute(dataloaders=Predict()).scores.shape == (40, 3)


def test_loaders_of_the_module_itself(tmp_path):
    class WithData(Classifier):
        def train_dataloader(self):
            return DataLoader(make_data(16), 8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(make_data(8), 8)

        def test_dataloader(self):
            return DataLoader(make_data(5, 2), 2)

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(WithData())
    expected = trainer.attribute().scores
    assert expected.shape == (16, 5)
    torch.testing.assert_close(fresh(tmp_path).attribute(WithData()).scores, expected)


class Late(lt.ClassificationMixin, L.LightningModule):
    """Makes its layers in hooks."""

    def setup(self, stage):
        if not hasattr(self, "first"):
            self.first = torch.nn.Linear(4, 4)

    def configure_model(self):
        if not hasattr(self, "last"):
            self.last = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x).tanh())

    training_step = Classifier.training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_layers_made_in_setup_or_configure_model(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Late(), DataLoader(make_data(16), 8))
    targets = DataLoader(make_data(5, 2), 5)
    expected = trainer.attribute(dataloaders=targets).scores
    torch.testing.assert_close(fresh(tmp_path).attribute(Late(), dataloaders=targets).scores, expected)


def test_layers_that_need_the_datamodule(tmp_path):
    class Sized(Late):
        def setup(self, stage):
            if not hasattr(self, "first"):
                self.first = torch.nn.Linear(len(self.trainer.datamodule.train_set[0][0]), 4)

    class Data(Blobs):
        val_dataloader = L.LightningDataModule.val_dataloader

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Sized(), datamodule=Data())
    torch.testing.assert_close(fresh(tmp_path).attribute(Sized(), datamodule=Data()).scores, trainer.attribute().scores)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_module_that_builds_its_layers_in_every_setup_keeps_its_weights(tmp_path, fitted):
    class Rebuilds(Late):
        def setup(self, stage):
            self.first = torch.nn.Linear(4, 4)

        def train_dataloader(self):
            return DataLoader(make_data(16), 8)

        def test_dataloader(self):
            return DataLoader(make_data(5, 2), 5)

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    module = Rebuilds()
    trainer.fit(module)
    if not fitted:
        weights, module = module.state_dict(), Rebuilds()
        module.first, module.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
        module.load_state_dict(weights)
        trainer = fresh(tmp_path)
    before = [(name, value, value.clone()) for name, value in module.named_parameters()]
    trainer.attribute(module)
    after = dict(module.named_parameters())
    assert list(after) == [name for name, _, _ in before]
    assert all(after[name] is value and torch.equal(value, copy) for name, value, copy in before)


def test_parameters_declared_in_another_order(run):
    root, trainer, module, data = run

    class Reordered(Classifier):
        def __init__(self):
            super().__init__()
            last = self.net.pop(4)
            self._modules = {"extra": torch.nn.Identity(), **self._modules}
            self.net.append(last)
            self.net._modules = dict(reversed(self.net._modules.items()))

        def forward(self, x):
            for name in map(str, range(5)):
                x = self.net._modules[name](x)
            return x

    assert [n for n, _ in Reordered().named_parameters()] != [n for n, _ in module.named_parameters()]
    torch.testing.assert_close(fresh(root).attribute(Reordered(), datamodule=data).scores, trainer.attribute().scores)


# -------------------------------------------------------------------------------------- do the scores mean anything?


class Logistic(lt.TRAKMixin, L.LightningModule):
    """Logistic regression without a bias: convex, f linear in θ, its loss softplus(−f)."""

    def __init__(self, d):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(d))

    def model_output(self, batch):
        x, sign = batch
        return sign * (x @ self.theta)


def fit_logistic(x, sign):
    """Newton's method in float64, to the optimum."""
    theta = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(sign * (x @ theta))
        gradient = -(x * (sign * (1 - p))[:, None]).sum(0)
        hessian = (x * (p * (1 - p))[:, None]).T @ x
        theta = theta - torch.linalg.solve(hessian, gradient)
    return theta


def logistic_data(n, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, torch.where(x.sum(1) + noise > 0, 1.0, -1.0).double()


@pytest.fixture
def logistic(tmp_path):
    """A convex model at its optimum, attributed without damping; data, targets and θ."""
    x, sign = logistic_data(400)
    targets, target_sign = logistic_data(6, seed=1)
    theta = fit_logistic(x, sign)
    torch.save({"theta": theta.float()}, tmp_path / "theta.pt")

    def loader(x, sign):
        return DataLoader(TensorDataset(x.float(), sign.float()), 64)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader(x, sign)

        def predict_dataloader(self):
            return loader(targets, target_sign)

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", damping=0))
    attribution = trainer.attribute(Logistic(4), datamodule=Data(), ckpt_path=tmp_path / "theta.pt")
    return attribution, x, sign, targets, target_sign, theta


def test_scores_of_a_convex_model_are_calibrated(logistic):
    """They predict what training on a random half gives: its order, and its size."""
    attribution, x, sign, targets, target_sign, _ = logistic
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([torch.randperm(400, generator=generator) < 200 for _ in range(60)])
    outputs = torch.stack([target_sign * (targets @ fit_logistic(x[mask], sign[mask])) for mask in masks])
    evaluation = lt.evaluate(attribution, lt.GroundTruth(masks, outputs[:, None].float()))
    assert evaluation.lds > 0.95
    assert 0.85 < evaluation.slope < 1.15


class TrainedLogistic(Logistic):
    """By gradient descent on the whole train set."""

    def training_step(self, batch, batch_idx):
        return self.output_to_loss(self.model_output(batch), batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=4.0)


@pytest.mark.parametrize(("n", "by"), [(400, "newton"), (3000, "newton"), (400, "sgd")])
def test_the_defaults_are_calibrated_too(tmp_path, n, by):
    """Of a model with fewer parameters than examples, at its optimum: little damping, and outputs as they are."""
    (x, sign), (targets, target_sign) = logistic_data(n), logistic_data(6, seed=1)
    loaders = [DataLoader(TensorDataset(a.float(), b.float()), n) for a, b in ((x, sign), (targets, target_sign))]

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loaders[0]

        def predict_dataloader(self):
            return loaders[1]

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", featurize_on="fit_end"), max_epochs=200)
    if by == "sgd":
        trainer.fit(TrainedLogistic(4), datamodule=Data())
        attribution = trainer.attribute(datamodule=Data())
    else:
        torch.save({"theta": fit_logistic(x, sign).float()}, tmp_path / "theta.pt")
        attribution = trainer.attribute(Logistic(4), datamodule=Data(), ckpt_path=tmp_path / "theta.pt")
    assert (attribution.info.dampings, attribution.info.damping_rules) == ((1e-3,), ("least, as at an optimum",))
    assert attribution.info.temperature == 1
    masks = torch.rand(60, n, generator=torch.Generator().manual_seed(0)) < 0.5
    outputs = torch.stack([target_sign * (targets @ fit_logistic(x[mask], sign[mask])) for mask in masks])
    evaluation = lt.evaluate(attribution, lt.GroundTruth(masks, outputs[:, None].float()))
    assert evaluation.lds > 0.95
    assert 0.85 < evaluation.slope < 1.15


def test_scores_are_the_change_that_leaving_an_example_out_makes(logistic):
    """For a convex model at its optimum a score is f(all) − f(without the example), sign and magnitude."""
    attribution, x, sign, targets, target_sign, theta = logistic
    chosen = {int(row) for row in torch.cat([attribution.top(2).indices, attribution.bottom(2).indices], 1).flatten()}
    predicted, actual = [], []
    for row in sorted(chosen):
        keep = torch.arange(len(x)) != row
        without = fit_logistic(x[keep], sign[keep])
        actual.append(target_sign * (targets @ (theta - without)))
        predicted.append(attribution.scores[row].double())
    predicted, actual = torch.stack(predicted), torch.stack(actual)
    slope = (predicted * actual).sum() / predicted.square().sum()
    assert torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1] > 0.995
    assert 0.9 < slope < 1.1
    for column in range(6):  # and the best proponent raises the output, the worst opponent lowers it
        keep = torch.arange(len(x)) != attribution.top(1).indices[column, 0]
        assert target_sign[column] * (targets[column] @ (theta - fit_logistic(x[keep], sign[keep]))) > 0
        keep = torch.arange(len(x)) != attribution.bottom(1).indices[column, 0]
        assert target_sign[column] * (targets[column] @ (theta - fit_logistic(x[keep], sign[keep]))) < 0


class DigitsCNN(lt.ClassificationMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(256, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_near_duplicates_of_training_digits_find_their_originals(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:800, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[:800])
    L.seed_everything(0, verbose=False)
    rows = torch.randperm(800)[:30]
    blurred = images[rows] + 0.05 * torch.randn_like(images[rows])
    trak = TRAKCallback(tmp_path / "store", proj_dim=512, damping=0.1)  # little, as the README says for duplicates
    trainer = make_trainer(tmp_path, trak, ModelCheckpoint(tmp_path / "files", save_top_k=-1), max_epochs=5)
    trainer.fit(DigitsCNN(), DataLoader(TensorDataset(images, labels), 32, shuffle=True))
    top = trainer.attribute(dataloaders=DataLoader(TensorDataset(blurred, labels[rows]), 32)).top(5)
    found = (top.indices == rows[:, None]).any(1).float().mean().item()
    assert found >= 0.9


# --------------------------------------------------------------------------------------------- models and batches


class DictSet(Dataset):
    """Examples as Hugging Face datasets give them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return {"inputs": x, "labels": y}


class NestedSet(DictSet):
    def __getitem__(self, index):
        x, y = self.dataset[index]
        return {"views": [x[:2], (x[2:], index)]}, y


class DictClassifier(Classifier):
    """Returns an object with logits, as Hugging Face models do."""

    def forward(self, inputs):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.net(inputs))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.get_logits(batch), self.get_labels(batch))


class NestedClassifier(DictClassifier):
    def forward(self, x):
        return self.net(x)

    def get_logits(self, batch):
        first, (second, _) = batch[0]["views"]
        return self(torch.cat([first, second], 1))


class Tied(Classifier):
    """The same weight used in two layers, and a layer called twice; a frozen layer in front."""

    def __init__(self):
        super().__init__()
        del self.net
        self.front = torch.nn.Linear(4, 4).requires_grad_(False)
        self.encode, self.decode = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight
        self.last = torch.nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.decode(self.encode(self.front(x)).tanh()).tanh()
        return self.last(self.encode(hidden))


class Regressor(lt.RegressionMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0])[:, 0], batch[1])

    configure_optimizers = DigitsCNN.configure_optimizers


def regression_data(n, seed=0):
    x, _ = make_data(n, seed).tensors
    return TensorDataset(x, x.sum(1))


CASES = {
    "dict": (DictClassifier, DictSet(make_data(24)), DictSet(make_data(5, 2))),
    "nested": (NestedClassifier, NestedSet(make_data(24)), NestedSet(make_data(5, 2))),
    "tied and frozen": (Tied, make_data(24), make_data(5, 2)),
    "regression": (Regressor, regression_data(24), regression_data(5, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_models_and_batches(tmp_path, case):
    make_module, train, targets = CASES[case]

    class Module(make_module):
        validation_step = None

    L.seed_everything(0, verbose=False)
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", damping=0.1), max_epochs=1)
    module = Module()
    trainer.fit(module, DataLoader(train, 8, shuffle=True))
    scores = trainer.attribute(dataloaders=DataLoader(targets, 2)).scores
    module = module.double().eval()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def double(batch):
        if isinstance(batch, torch.Tensor):
            return batch.double() if batch.is_floating_point() else batch
        if isinstance(batch, dict):
            return {key: double(value) for key, value in batch.items()}
        return [double(value) for value in batch]

    def reference(dataset):
        rows, q, w = [], [], []
        for batch in DataLoader(dataset, 1):
            batch = double(batch)
            output = module.model_output(batch)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(output.sum(), parameters)]).numpy())
            f = output.detach().requires_grad_()
            (slope,) = torch.autograd.grad(module.output_to_loss(f, batch).sum(), f, create_graph=True)
            q.append(-slope.item())
            w.append(torch.autograd.grad(slope.sum(), f)[0].item())
        return np.array(rows), np.array(q), np.array(w)

    phi, q, w = reference(train)
    expected = scores_float64(phi, reference(targets)[0], q, w, 0.1)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())


# ---------------------------------------------------------------------------------------------------- bad input


def test_no_callback(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"no TRAKCallback.*callbacks=\[TRAKCallback"):
        make_trainer(tmp_path).attribute(Classifier(), datamodule=Blobs())


def test_two_callbacks(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "a"))
    trainer.callbacks.append(TRAKCallback(tmp_path / "b"))
    with pytest.raises(MisconfigurationException, match="2 TRAKCallbacks"):
        trainer.attribute(Classifier(), datamodule=Blobs())


def test_no_model(tmp_path):
    with pytest.raises(TypeError, match="needs a model"):
        fresh(tmp_path).attribute(datamodule=Blobs())


def test_model_without_model_output(run):
    with pytest.raises(MisconfigurationException, match="does not define model_output"):
        run[1].attribute(L.LightningModule())


def test_no_store_or_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no feature store.*ckpt_path"):
        fresh(tmp_path).attribute(Classifier(), datamodule=Blobs())
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), enable_checkpointing=False)
    trainer.fit(Classifier(), datamodule=Blobs())
    store = FeatureStore(tmp_path / "store")
    store.discard(store.digests[0])
    with pytest.raises(MisconfigurationException, match="has no checkpoints.*ckpt_path"):
        trainer.attribute()


def test_no_targets(run):
    class NoTargets(Blobs):
        test_dataloader = L.LightningDataModule.test_dataloader

    with pytest.raises(
        MisconfigurationException, match=r"attribute_dataloader, predict_dataloader\s+nor test_dataloader"
    ):
        run[1].attribute(datamodule=NoTargets())


class Stream(IterableDataset):
    def __iter__(self):
        yield from make_data(4)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(Stream(), 2), TypeError, "iterable dataset"),
        (DataLoader(Subset(make_data(4), []), 2), ValueError, "empty dataset"),
        ([DataLoader(make_data(4)), DataLoader(make_data(4))], TypeError, "expected one"),
        (make_data(4), TypeError, "expected one torch.utils.data.DataLoader"),
    ],
)
def test_targets_without_rows(run, loader, error, message):
    with pytest.raises(error, match=message):
        run[1].attribute(dataloaders=loader)


@pytest.mark.parametrize("limit", [{"limit_predict_batches": 1}, {"limit_test_batches": 0.5}])
def test_limits_that_truncate(run, limit):
    root = run[0]
    trainer = make_trainer(root, TRAKCallback(root / "store"), **limit)
    kind = next(iter(limit))
    loaders = (
        {"dataloaders": DataLoader(make_data(5), 2)} if kind == "limit_predict_batches" else {"datamodule": Blobs()}
    )
    with pytest.raises(MisconfigurationException, match=f"{kind}=.* leaves examples out"):
        trainer.attribute(Classifier(), **loaders)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Blobs(n=41), r"another train set: 40 examples, here 41, .* 40 of 40 rows that were compared, .* row 0: "),
        (
            Blobs(seed=9),
            "another train set: as many examples as here, 40, with other content: .* first of them row 0: ",
        ),
    ],
)
def test_other_data_than_the_stores(run, data, message):
    with pytest.raises(ValueError, match=message):
        fresh(run[0]).attribute(Classifier(), datamodule=data)


def test_checkpoints_that_do_not_fit(tmp_path, run):
    root, trainer, _, _ = run
    torch.save(Classifier(hidden=9).state_dict(), tmp_path / "wide.pt")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    n = len(FeatureStore(root / "store"))
    with pytest.raises(ValueError, match=r"does not fit Classifier: net.0.weight: shape \(9, 4\).*\(6, 4\)"):
        trainer.attribute(ckpt_path=tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"does not fit Classifier: missing: net.0.weight"):
        trainer.attribute(ckpt_path=[tmp_path / "other.pt"])
    torch.save(Classifier().net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"those of its part 'net': load them into module\.net, and save module\."):
        trainer.attribute(ckpt_path=tmp_path / "net.pt")
    with pytest.raises(FileNotFoundError, match="which is no file"):
        trainer.attribute(ckpt_path=tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="empty list"):
        trainer.attribute(ckpt_path=[])
    assert len(FeatureStore(root / "store")) == n
    with pytest.raises(ValueError, match=r"parameters.net.0.weight=\[6, 4\], but here"):
        fresh(root).attribute(Classifier(hidden=9), datamodule=Blobs())


def test_damaged_store(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    entry = next(iter(FeatureStore(tmp_path / "store")))
    for name in ("features.npy", "loss_grad.npy", "weights.pt"):
        path = entry.path / name
        content = path.read_bytes()
        path.write_bytes(content[:-9])
        with pytest.raises(ValueError, match=f"{name}.* is damaged.*[Dd]elete"):
            trainer.attribute()
        flipped = bytearray(content)
        for place in range(len(flipped) // 3, 2 * len(flipped) // 3):
            flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{name}.* is damaged.*[Dd]elete"):
            trainer.attribute()
        path.write_bytes(content)
    trainer.attribute()


@pytest.mark.parametrize("row", [3, 33])  # among those tried first, and later
def test_targets_with_nan_are_named(run, row):
    x, y = make_data(40).tensors
    x = x.index_fill(0, torch.tensor([row]), float("nan"))
    with pytest.raises(ValueError, match=rf"infinite for target rows {row}\. Look at these targets") as raised:
        run[1].attribute(dataloaders=DataLoader(TensorDataset(x, y), 2))
    assert not {"delete", "diverge"} & set(str(raised.value).replace("?", " ").split())  # no checkpoint is to blame


@pytest.mark.parametrize("change", ["temperature", "loss", "output", "inputs"])
def test_a_model_that_has_changed_since(run, change):
    class Changed(Classifier):
        temperature = 2.0 if change == "temperature" else 1.0

        def model_output(self, batch):
            return super().model_output(batch) * (1.2 if change == "output" else 1)

        def output_to_loss(self, output, batch):
            return super().output_to_loss(output, batch) * (1.2 if change == "loss" else 1)

    class ChangedData(Blobs):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] * 1.3, batch[1]) if change == "inputs" else batch

    root, _, _, _ = run
    with pytest.raises(ValueError, match=r"stored \w+ of train rows .* are not those that .*another dirpath"):
        fresh(root).attribute(Changed(), datamodule=ChangedData())


def test_another_precision_than_the_trainings(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), precision="bf16-true", max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    expected = trainer.attribute().scores
    with pytest.raises(ValueError, match=r"is torch.bfloat16, the model's torch.float32 .*Use the precision"):
        fresh(tmp_path).attribute(Classifier(), datamodule=Blobs())
    again = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), precision="bf16-true")
    torch.testing.assert_close(again.attribute(Classifier(), datamodule=Blobs()).scores, expected)


@pytest.mark.parametrize("top_k", [0, -1, 2.5, True])
def test_top_k_is_checked(run, top_k):
    with pytest.raises(ValueError, match="top_k must be a positive integer"):
        run[1].attribute(top_k=top_k)


def test_without_damping_too_few_examples_are_an_error(run):
    root, _, _, _ = run
    with pytest.raises(ValueError, match=r"damping=0.*n=40.*meaningless"):
        fresh(root, damping=0).attribute(Classifier(), datamodule=Blobs())


@pytest.mark.parametrize("form", [lambda x: TensorDataset(x), lambda x: list(x), lambda x: [{"x": row} for row in x]])
def test_targets_without_labels_are_of_the_class_that_the_last_checkpoint_predicts(run, form):
    """At all checkpoints the same, though they predict others."""
    root, trainer, _, _ = run
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(5))
    store, predicted = FeatureStore(root / "store"), []
    for entry in store:
        model = Classifier().eval()
        model.load_state_dict(torch.load(entry.weights_path, weights_only=True))
        predicted.append(model(x).argmax(1).detach())
    assert (predicted[0] != predicted[-1]).any()
    expected = trainer.attribute(dataloaders=DataLoader(TensorDataset(x, predicted[-1]), 20)).scores
    scores = trainer.attribute(dataloaders=DataLoader(form(x), 20)).scores
    torch.testing.assert_close(scores, expected)


def test_a_datamodule_in_the_first_place_is_the_datamodule(run):
    _, trainer, _, data = run
    by_name = trainer.attribute(datamodule=data).scores
    assert torch.equal(trainer.attribute(data).scores, by_name)
    assert torch.equal(trainer.attribute(data, DataLoader(make_data(7, 2), 3)).scores, by_name)
    assert torch.equal(trainer.attribute_self(data), trainer.attribute_self(datamodule=data))
    with pytest.raises(TypeError, match="Two datamodules were passed"):
        trainer.attribute(data, datamodule=data)


def test_freezing_the_model_before_attribute_changes_no_score(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"))
    trainer.fit(Classifier(hidden=32), datamodule=Blobs())
    before = trainer.attribute()
    assert before.info.temperature == 1.3
    trainer.lightning_module.freeze()
    after = trainer.attribute()
    assert after.info == before.info
    assert torch.equal(after.scores, before.scores)
    assert torch.equal(trainer.attribute_self(), trainer.attribute_self())


@pytest.mark.parametrize(
    "options", [{"estimator": "paper"}, {"estimator": "trak", "temperature": 1.3}, {"overwrite": 1}]
)
def test_wrong_choices_of_the_estimator_are_refused(options):
    with pytest.raises((ValueError, TypeError), match=r"estimator|overwrite"):
        TRAKCallback(**options)


def test_weights_that_setup_draws_anew_are_told_of(tmp_path):
    class DrawsAnew(Classifier):
        def setup(self, stage):
            torch.nn.init.normal_(self.net[0].weight)

        def test_dataloader(self):
            return DataLoader(make_data(7, 2), 3)

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    module = DrawsAnew()
    trainer.fit(module, DataLoader(make_data(40), 8), DataLoader(make_data(12, 1), 6))
    with pytest.warns(
        UserWarning, match=r"DrawsAnew has other weights now than before: net\.0\.weight has other values"
    ):
        trainer.attribute()


class Bigram(lt.LanguageModelingMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(5, 5)

    def forward(self, input_ids):
        return self.table(input_ids)

    def training_step(self, batch, batch_idx):
        return self.output_to_loss(self.model_output(batch), batch).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_targets_that_nothing_is_left_of_are_told_of(tmp_path):
    tokens = torch.randint(0, 5, (20, 6), generator=torch.Generator().manual_seed(0))
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"))
    trainer.fit(Bigram(), DataLoader([{"input_ids": row} for row in tokens], 5))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1], mask[3, 1:] = False, False  # the first token is not predicted
    targets = [{"input_ids": row, "output_mask": keep} for row, keep in zip(tokens, mask, strict=False)]
    with pytest.warns(UserWarning, match=r"zero for 2 targets \(rows 1, 3\), so all of their scores are") as caught:
        scores = trainer.attribute(dataloaders=DataLoader(targets, 2)).scores
    assert sum("so all of their scores are" in str(warning.message) for warning in caught) == 1  # of three checkpoints
    assert (scores == 0).all(0).tolist() == [False, True, False, True]


def test_targets_without_a_gradient_of_some_parameters_are_no_matter_of_a_warning(tmp_path, said):
    class Dead(Classifier):
        def model_output(self, batch):
            return self.net[0].weight.sum() * (batch[0][:, 0] > 0) + super().model_output(batch).detach()

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", parameters="net.0.weight"), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "On the first batch Dead")  # it is not what is trained
        trainer.fit(Dead(), datamodule=Blobs())
    scores = trainer.attribute().scores
    zero = (scores == 0).all(0)
    assert 0 < zero.sum() < 7
    (line,) = [line for line in said() if "so all of their scores are" in line]
    assert f"is zero for {zero.sum()} targets" in line
