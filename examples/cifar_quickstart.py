r"""The quickstart of TRAK: cats and dogs of CIFAR-10, a ResNet-9, several runs, scores, and how well they predict.

Trains the ResNet-9 a few times into one store, draws the training images that helped and harmed some test images, and
trains on random halves of the train set to compare the scores with what happens. Without ``--cifar`` the images are
generated, shapes of curved edges against straight ones, and the network is narrow: under two minutes on two cores;
nothing is downloaded.

    python examples/cifar_quickstart.py       # writes examples/output/cifar_quickstart.png
    python examples/cifar_quickstart.py --cifar cifar-10-batches-py --n-train 10000 --n-test 2000 --width 64 \
        --epochs 100 --batch-size 512 --lr 0.4 --accelerator gpu
    python examples/cifar_quickstart.py --help

Data and network are those of the tutorial; its random flips, shifts and cut-outs of the images are left out. What was
trained on halves is kept: a call that is repeated, also with more ``--subsets``, goes on with what is missing.
"""

from __future__ import annotations

import argparse
import logging
import pickle
from pathlib import Path

import lightning as L
import matplotlib as mpl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Attribution, ClassificationMixin, TRAKCallback, evaluate, retrain_subsets

KINDS = ("disc", "ring", "flower", "square", "triangle", "cross")  # three with curved edges, three with straight ones


class Images(L.LightningDataModule):
    """Colour images of 32 × 32 pixels in two classes, in train and test.

    Args:
        train: images (n, 3, 32, 32), from 0 to 1, and labels (n,), 0 or 1.
        test: images (m, 3, 32, 32) and labels (m,).
        names: of the classes.
        batch_size: of training.
    """

    def __init__(
        self,
        train: tuple[torch.Tensor, torch.Tensor],
        test: tuple[torch.Tensor, torch.Tensor],
        names: tuple[str, str],
        batch_size: int,
    ) -> None:
        super().__init__()
        self.names, self.batch_size = names, batch_size
        mean, std = (moment(train[0], (0, 2, 3), keepdim=True) for moment in (torch.mean, torch.std))
        self.train_set, self.test_set = (
            TensorDataset((images - mean) / std, labels) for images, labels in (train, test)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=self.batch_size)


def read_cifar(files: list[Path], classes: tuple[int, int], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the first n images of two classes from CIFAR-10's files for Python; the labels become 0 and 1."""
    images, labels = [], []
    for path in files:
        with open(path, "rb") as file:
            content = pickle.load(file, encoding="bytes")
        images.append(content[b"data"].reshape(-1, 3, 32, 32))
        labels.append(np.array(content[b"labels"]))
    pixels, numbers = np.concatenate(images), np.concatenate(labels)
    chosen = np.isin(numbers, classes).nonzero()[0][:n]
    return torch.tensor(pixels[chosen]) / 255, torch.tensor((numbers[chosen] == classes[1]).astype(np.int64))


def cats_and_dogs(folder: Path, n_train: int, n_test: int, batch_size: int) -> Images:
    """Take the cats and dogs out of a folder with ``data_batch_1`` to ``data_batch_5`` and ``test_batch``."""
    cat_and_dog = (3, 5)
    files = [*(folder / f"data_batch_{i}" for i in range(1, 6)), folder / "test_batch"]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise SystemExit(
            f"--cifar must be CIFAR-10's folder cifar-10-batches-py: '{folder}' is without {', '.join(missing)}."
        )
    train = read_cifar(files[:5], cat_and_dog, n_train)
    test = read_cifar(files[5:], cat_and_dog, n_test)
    return Images(train, test, ("cat", "dog"), batch_size)


def draw_shape(kind: str, generator: torch.Generator) -> torch.Tensor:
    """Draw a striped shape, one in four dark on a light ground; all but its kind is random: (3, 32, 32)."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    axis = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2)
    turn, size = uniform(0, 2 * torch.pi), uniform(0.55, 0.8)
    x, y = (x * turn.cos() - y * turn.sin()) / size, (x * turn.sin() + y * turn.cos()) / size
    radius, largest = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
    inside = {
        "disc": radius < 0.9,
        "ring": (radius < 1) & (radius > 0.55),
        "flower": radius < 0.75 + 0.25 * (5 * torch.atan2(y, x)).cos(),
        "square": largest < 0.8,
        "triangle": (y > -0.6) & (y + 1.73 * x.abs() < 1.1),
        "cross": (largest < 1) & (torch.minimum(x.abs(), y.abs()) < 0.35),
    }[kind]
    stripes = 0.85 + 0.15 * (uniform(4, 12) * x).sin()
    dark, light = uniform(0, 0.5, 3, 1, 1), uniform(0.4, 1, 3, 1, 1)
    ground, colour = (dark, light) if uniform(0, 1) < 0.75 else (light, dark)
    image = torch.where(inside, colour * stripes, ground) + 0.05 * torch.randn(3, 32, 32, generator=generator)
    return image.clamp(0, 1)


def generate_shapes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw n shapes: images (n, 3, 32, 32), labels (n,), 0 for curved edges and 1 for straight ones, and kinds (n,)."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(len(KINDS), (n,), generator=generator)
    images = torch.stack([draw_shape(KINDS[kind], generator) for kind in kinds])
    return images, kinds // 3, kinds


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def convolution(n_in: int, n_out: int, size: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    """Make a convolution without bias, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, size, stride, padding, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)
    )


class ResNet9(ClassificationMixin, L.LightningModule):
    """The ResNet-9 of the tutorial, whose width is 64, trained by SGD whose learning rate rises and falls."""

    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            convolution(3, width),
            convolution(width, 2 * width, 5, 2, 2),
            Residual(convolution(2 * width, 2 * width), convolution(2 * width, 2 * width)),
            convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),
            Residual(convolution(4 * width, 4 * width), convolution(4 * width, 4 * width)),
            convolution(4 * width, 2 * width, padding=0),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 2, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.2 * self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: float(np.interp(step, [0, 0.2 * steps, steps], [0.2, 1, 0]))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_trainer(arguments: argparse.Namespace, callbacks: list[L.Callback] | None = None) -> L.Trainer:
    """Make a silent Trainer; it saves checkpoints if ``callbacks`` has a ModelCheckpoint."""
    return L.Trainer(
        max_epochs=arguments.epochs,
        accelerator=arguments.accelerator,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train_runs(arguments: argparse.Namespace, data: Images, folder: Path) -> L.Trainer:
    """Train several times into one store of features; return the last run's Trainer."""
    for run in range(arguments.runs):
        L.seed_everything(run, verbose=False)
        checkpoints = ModelCheckpoint(
            folder / f"run{run}",
            filename="{epoch}",
            every_n_epochs=max(1, arguments.epochs // 4),
            save_top_k=-1,
            enable_version_counter=False,
        )
        callback = TRAKCallback(folder / "attributions", proj_dim=arguments.proj_dim)
        trainer = make_trainer(arguments, [checkpoints, callback])
        model = ResNet9(arguments.width, arguments.lr)
        trainer.fit(model, datamodule=data)
        accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test_accuracy"]
        print(f"run {run}: test accuracy {accuracy:.3f}")
    return trainer


def save_picture(attribution: Attribution, data: Images, path: Path) -> None:
    """Draw some test images beside the training images that helped and harmed them most."""
    named = [[(image, data.names[label]) for image, label in examples] for examples in (data.train_set, data.test_set)]
    figure, _ = attribution.plot(*named, columns=range(min(5, attribution.info.n_targets)), k=5)
    figure.savefig(path, dpi=150)
    print(f"The picture is in {path}.")


def print_kinds(attribution: Attribution, train_kinds: torch.Tensor, test_kinds: torch.Tensor, k: int = 5) -> None:
    """Say how many of the most helpful training images show the very shape of the target."""
    same = (train_kinds[attribution.top(k).indices] == test_kinds[:, None]).float().mean()
    chance = (train_kinds[:, None] == test_kinds).float().mean()
    print(f"Of the {k} most helpful images {same:.1%} show the target's own shape (chance {chance:.1%}).")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 with data_batch_1 to 5 and test_batch")
    parser.add_argument("--n-train", type=int, default=300, help="number of training images")
    parser.add_argument("--n-test", type=int, default=100, help="number of test images, the targets")
    parser.add_argument("--width", type=int, default=8, help="channels of the first layer; 64 in the tutorial")
    parser.add_argument("--epochs", type=int, default=12, help="a checkpoint is featurized each quarter")
    parser.add_argument("--batch-size", type=int, default=25, help="of training")
    parser.add_argument("--lr", type=float, default=0.1, help="the highest learning rate")
    parser.add_argument("--runs", type=int, default=3, help="trainings whose checkpoints are attributed")
    parser.add_argument("--subsets", type=int, default=16, help="random halves of the train set to train on")
    parser.add_argument("--repeats", type=int, default=2, help="trainings on each half")
    parser.add_argument("--proj-dim", type=int, default=1024, help="number of features")
    parser.add_argument("--accelerator", default="cpu", help="of Lightning's Trainer, such as gpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder to write into")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    mpl.use("Agg")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # every retraining would announce itself
    sizes = arguments.n_train, arguments.n_test
    if arguments.cifar:
        data = cats_and_dogs(arguments.cifar, *sizes, arguments.batch_size)
    else:
        train, test = (generate_shapes(size, seed) for seed, size in enumerate(sizes))
        data = Images(train[:2], test[:2], ("curved", "straight"), arguments.batch_size)

    names = ("n_train", "n_test", "width", "epochs", "batch_size", "lr", "proj_dim")
    setting = "-".join(f"{name}{getattr(arguments, name)}" for name in names)
    folder = arguments.output / "cifar_quickstart" / f"{'-'.join(data.names)}-{setting}"
    trainer = train_runs(arguments, data, folder / f"runs{arguments.runs}")
    attribution = trainer.attribute(datamodule=data)
    print(attribution)
    save_picture(attribution, data, arguments.output / "cifar_quickstart.png")
    if not arguments.cifar:
        print_kinds(attribution, train[2], test[2])

    truth = retrain_subsets(
        lambda: ResNet9(arguments.width, arguments.lr),
        data,
        lambda: make_trainer(arguments),
        n_subsets=arguments.subsets,
        repeats=arguments.repeats,
        dirpath=folder / "retraining",
    )
    print(f"\nScores against {arguments.subsets} × {arguments.repeats} trainings on random halves of the train set:")
    print(evaluate(attribution, truth))


if __name__ == "__main__":
    main()
