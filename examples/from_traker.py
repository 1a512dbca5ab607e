"""Coming from ``traker``: the same attribution, call by call.

Networks are trained in plain PyTorch and saved as state dicts, which is what users of ``traker`` have. lightning_trak
attributes these files: first with the estimator that ``traker`` uses, then with its own default. Under a minute on two
cores; nothing is downloaded, and ``traker`` is not needed.

    python examples/from_traker.py

What becomes of each call:

    =========================================================  ====================================================
    traker                                                     lightning_trak
    =========================================================  ====================================================
    task="image_classification", "text_classification"         ClassificationMixin
    task="clip", CLIPModelOutput.get_embeddings(...)           ContrastiveMixin; draws the contrast set itself
    AbstractModelOutput.get_output(model, weights, buffers,    model_output(self, batch): a whole batch, and self is
        x, y), of one example                                      the model
    AbstractModelOutput.get_out_to_loss_grad(...)              nothing: autograd finds it from output_to_loss; or
                                                                   define out_to_loss_grad(self, batch)
    TRAKer(model, task, train_set_size=n, save_dir=...,        L.Trainer(callbacks=[TRAKCallback(dirpath,
        proj_dim=2048, device=...)                                 proj_dim=2048)], accelerator=...)
    grad_wrt=[...]                                             TRAKCallback(parameters="*lora*")
    lambda_reg=, of gradients divided by √p                    damping=, relative to the mean diagonal of H:
                                                                   lambda_reg · p / mean diagonal
    load_checkpoint(state_dict, model_id), featurize(batch,    ckpt_path=[...]; or nothing, if the callback was there
        num_samples) for every batch, finalize_features()          when Lightning trained the model
    start_scoring_checkpoint(exp_name, state_dict, model_id,   trainer.attribute(..., name=exp_name)
        num_targets), score(batch, num_samples) for every
        batch, finalize_scores(exp_name)
    scores, (n, m)                                             attribution.scores, (n, m); Attribution.load(...)
    =========================================================  ====================================================

With ``estimator="trak"`` the estimator is that of ``traker``, up to one difference: every checkpoint counts the same
here, while ``traker`` divides each H⁻¹ by its mean absolute entry. Take ``proj_dim`` well below n, or give a damping.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Attribution, TRAKCallback, TRAKMixin

N_TRAIN = 1400


class Digits(L.LightningDataModule):
    """Flat images of digits, with labels; `attribute` takes the train set and the targets from here."""

    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images, labels = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
        self.train_set = TensorDataset(images[:N_TRAIN], labels[:N_TRAIN])
        self.test_set = TensorDataset(images[N_TRAIN:], labels[N_TRAIN:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=64, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=100)


def make_network() -> nn.Module:
    """Return a small network of 1210 parameters."""
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def train(data: Digits, epochs: int, seed: int) -> dict[str, torch.Tensor]:
    """Train a network without Lightning, and return its state dict."""
    torch.manual_seed(seed)
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.state_dict()


class Ported(TRAKMixin, L.LightningModule):  # traker: class Output(AbstractModelOutput)
    """The network with its model output, the log-odds of the label.

    `ClassificationMixin` has this very output; it is written out here to show how one of your own is ported. The loss
    needs no porting: that of log-odds is the default.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = make_network()

    def model_output(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        # traker: get_output(model, weights, buffers, image, label), of one example
        images, labels = batch
        logits = self.net(images)  # traker: functional_call(model, (weights, buffers), image.unsqueeze(0))
        right = logits.gather(1, labels[:, None])[:, 0]  # traker: logits[bindex, label.unsqueeze(0)]
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return right - others.logsumexp(1)  # (b,); traker: margins.sum(), of one example


def port(states: list[dict[str, torch.Tensor]], folder: Path) -> list[Path]:
    """Write state dicts with the names that they have in `Ported`, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"network{number}.pt" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        torch.save({f"net.{name}": value for name, value in state.items()}, path)
    return paths


def attribute(data: Digits, checkpoints: list[Path], store: Path, estimator: str) -> Attribution:
    """Score with one of the two estimators; the second call finds the features in the store."""
    # traker: TRAKer(model=network, task=Output, train_set_size=N_TRAIN, save_dir=store, lambda_reg=...)
    damping = 0.01 if estimator == "trak" else "auto"  # λ = 0, the default of traker, needs k well below n
    trak = TRAKCallback(store, estimator=estimator, damping=damping)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[trak])
    # traker: for each checkpoint load_checkpoint, featurize and score every batch; then finalize_scores
    return trainer.attribute(Ported(), datamodule=data, ckpt_path=checkpoints)


def same_digit(attribution: Attribution, data: Digits) -> float:
    """Return the share of the five most helpful training digits that show the target's own digit."""
    shown = data.train_set.tensors[1][attribution.top(5).indices]
    return (shown == data.test_set.tensors[1][:, None]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--networks", type=int, default=3, help="trained from different seeds; scores are averaged")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder to write into")
    arguments = parser.parse_args()

    folder = arguments.output / "from_traker" / f"epochs{arguments.epochs}"  # a store is for one setting
    data = Digits()
    states = [train(data, arguments.epochs, seed) for seed in range(arguments.networks)]
    checkpoints = port(states, folder)
    shares = {
        name: same_digit(attribute(data, checkpoints, folder / "attributions", estimator), data)
        for name, estimator in (("the estimator of traker", "trak"), ("the default", "gauss_newton"))
    }
    print("\nHow many of the five most helpful training digits show the target's own digit (chance: 10 %)?")
    for name, share in shares.items():
        print(f"  {name}: {100 * share:.1f} %")


if __name__ == "__main__":
    main()
