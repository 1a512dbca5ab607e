"""attribute against slow references in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_trak as lt
from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.influence.damping import choose_damping
from lightning_trak.projection import make_projector, projection_key
from tests.conftest import Classifier, make_data, make_trainer
from tests.trainer.references import features_float64, fresh, projection_matrix, scores_float64
from tests.trainer.test_attribute_leaves_no_trace import assert_same, snapshot


class InAutocast(Classifier):
    """Computes in bfloat16 within, which its weights do not show."""

    def model_output(self, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().model_output(batch).float()


def test_a_model_that_computes_in_bfloat16_within(tmp_path, run):
    root, _, _, data = run
    path = min((root / "files").iterdir())
    attributing = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", preconditioner="none"))
    scores = attributing.attribute(InAutocast(), datamodule=data, ckpt_path=path).scores
    exact = make_trainer(tmp_path, TRAKCallback(tmp_path / "exact", preconditioner="none"))
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
        trak = TRAKCallback(tmp_path / store / "trak", preconditioner="none")
        trainer = make_trainer(tmp_path / store, trak)
        return trainer.attribute(Classifier(), datamodule=data, ckpt_path=files).info

    both, alone = dampings("both", files), [dampings(f"{number}", file) for number, file in enumerate(files)]
    assert alone[0].damping_rules == ("from the training time",)
    assert both.damping_rules == ("by cross-validation",) * 2  # one rule for all that is averaged
    assert both.dampings[1:] == alone[1].dampings


def test_a_training_time_that_comes_later_is_noted(tmp_path, run):
    root, _, _, data = run
    source = min((root / "files").iterdir())
    files = [saved_as(tmp_path / "bare.ckpt", source), saved_as(tmp_path / "whole.ckpt", source, lr=0.1)]
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", preconditioner="none"))
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
    trak = TRAKCallback(tmp_path / "store", projector="sparse", proj_dim=4, curvature=False, damping=0)
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
