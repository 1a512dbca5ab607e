"""Which pairs taught a CLIP that this caption goes with this image? And which captions were swapped?

Writes captions for scikit-learn's digits, swaps some of them on purpose, trains two small encoders with CLIP's
contrastive loss, featurizes the training pairs as checkpoints are saved, and attributes the matches of test pairs.
Under a minute on two cores; nothing is downloaded.

    python examples/clip.py                   # writes examples/output/clip.png
    python examples/clip.py --help
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import matplotlib as mpl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import auroc

from lightning_trak import Attribution, ContrastiveMixin, TRAKCallback

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin", "plain", "bold")
TEMPLATES = ("a photo of a {stroke} {digit}", "the number {digit} in {stroke} strokes", "{stroke} handwriting: {digit}")
WORDS = sorted({word for text in (*TEMPLATES, *STROKES, *DIGITS) for word in text.split() if "{" not in word})


def tokenize(captions: list[str]) -> torch.Tensor:
    """Number the words of every caption from 1, and fill up with 0: (captions, words)."""
    rows = [torch.tensor([1 + WORDS.index(word) for word in caption.split()]) for caption in captions]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def write_captions(images: torch.Tensor, digits: list[int]) -> list[str]:
    """Describe every image by its digit, and by how much ink there is in it, as one of the templates has it."""
    ink = images.mean((1, 2, 3))
    strokes = torch.bucketize(ink, ink.quantile(torch.tensor([1 / 3, 2 / 3]))).tolist()
    templates = torch.randint(len(TEMPLATES), (len(digits),), generator=torch.Generator().manual_seed(2)).tolist()
    return [
        TEMPLATES[template].format(stroke=STROKES[stroke], digit=DIGITS[digit])
        for template, stroke, digit in zip(templates, strokes, digits, strict=True)
    ]


class CaptionedDigits(L.LightningDataModule):
    """1797 images of 8 × 8 pixels with captions, in train and test; some training captions name another digit."""

    def __init__(self, n_train: int = 1400, swapped: int = 40) -> None:
        super().__init__()
        source = load_digits()
        order = torch.randperm(len(source.target), generator=torch.Generator().manual_seed(0))
        self.images = torch.tensor(source.images[:, None] / 16, dtype=torch.float32)[order]
        self.digits = torch.tensor(source.target)[order].tolist()
        self.captions = write_captions(self.images, self.digits)
        self.swapped = self._swap_captions(n_train, swapped)
        tokens = tokenize(self.captions)
        self.train_set = TensorDataset(self.images[:n_train], tokens[:n_train])
        self.test_set = TensorDataset(self.images[n_train:], tokens[n_train:])

    def _swap_captions(self, n_train: int, n_swapped: int) -> torch.Tensor:
        """Exchange captions of some training pairs, so that each names another digit; say which, (n_train,)."""
        chosen = torch.randperm(n_train, generator=torch.Generator().manual_seed(1))[:n_swapped].tolist()
        chosen.sort(key=lambda row: self.digits[row])  # half the way round there is another digit
        others = chosen[n_swapped // 2 :] + chosen[: n_swapped // 2]
        captions = [self.captions[row] for row in others]
        for row, caption in zip(chosen, captions, strict=True):
            self.captions[row] = caption
        swapped = torch.zeros(n_train, dtype=torch.bool)
        swapped[chosen] = True
        return swapped

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=64, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=64)


class TextEncoder(nn.Module):
    """The mean of the words' embeddings, and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(1 + len(WORDS), 32, padding_idx=0)
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        lengths = (tokens > 0).sum(1, keepdim=True)
        return self.layers(self.words(tokens).sum(1) / lengths)


class DigitsCLIP(ContrastiveMixin, L.LightningModule):
    """A small CNN for images and a bag of words for captions, brought together."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.image_encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, width),
        )
        self.text_encoder = TextEncoder(width)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())

    def get_embeddings(self, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, tokens = batch
        return self.image_encoder(images), self.text_encoder(tokens)

    def compare(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the scaled cosines of all images, the rows, with all texts."""
        images, texts = (F.normalize(half, dim=1) for half in self.get_embeddings(batch))
        return self.logit_scale.exp() * images @ texts.T

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.compare(batch)
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


@torch.no_grad()
def zero_shot_accuracy(model: DigitsCLIP, data: CaptionedDigits) -> float:
    """Let the model name the digit of every test image, with a prompt for each."""
    prompts = tokenize([f"a photo of a plain {digit}" for digit in DIGITS])
    images, digits = data.test_set.tensors[0], torch.tensor(data.digits[len(data.train_set) :])
    named = model.eval().compare([images, prompts]).argmax(1)
    return (named == digits).float().mean().item()


def print_pairs(attribution: Attribution, data: CaptionedDigits, targets: list[int]) -> None:
    """Print the pairs that taught the model the match of some test pairs most, and those that spoke against it."""
    top, bottom = attribution.top(4), attribution.bottom(4)
    for target in targets:
        print(f"\ntest pair {target}, “{data.captions[len(data.train_set) + target]}”")
        for name, ranked in (("helpful", top), ("harmful", bottom)):
            print(f"  most {name}:")
            for row, value in zip(ranked.indices[target].tolist(), ranked.values[target].tolist(), strict=True):
                remark = f", swapped: the image is of {DIGITS[data.digits[row]]}" if data.swapped[row] else ""
                print(f"    {value:+.2f}  #{row} “{data.captions[row]}”{remark}")


def print_agreement(attribution: Attribution, data: CaptionedDigits, k: int = 10) -> None:
    """Say how many of the most helpful pairs show the digit of the target."""
    n = len(data.train_set)
    train, test = torch.tensor(data.digits[:n]), torch.tensor(data.digits[n:])
    same = (train[attribution.top(k).indices] == test[:, None]).float().mean()
    chance = (train[:, None] == test).float().mean()
    print(f"\nOf the {k} most helpful pairs {same:.1%} show the target's own digit (chance {chance:.1%}).")


def print_swapped(self_influence: torch.Tensor, data: CaptionedDigits) -> None:
    """Name the training pairs that the model memorised, and say which were swapped."""
    n, n_swapped = len(data.swapped), int(data.swapped.sum())
    suspects = self_influence.argsort(descending=True)[:n_swapped].tolist()
    found = [row for row in suspects if data.swapped[row]]
    ranks = self_influence.argsort().argsort() / n  # torchmetrics takes numbers from 0 to 1
    area = auroc(ranks, data.swapped.long(), task="binary")
    print(
        f"\n{len(found)} of the {n_swapped} swapped captions are among the first {n_swapped} suspects"
        f" (by chance {n_swapped**2 / n:.1f}; AUROC {area:.3f}, by chance 0.5):"
    )
    for row in found:
        print(f"  #{row} “{data.captions[row]}”: the image is of {DIGITS[data.digits[row]]}")


def save_picture(attribution: Attribution, data: CaptionedDigits, targets: list[int], path: Path) -> None:
    """Draw test pairs beside the training pairs that helped and harmed them most; swapped ones get a frame."""
    pairs = [{"image": image, "caption": text} for image, text in zip(data.images, data.captions, strict=True)]
    n = len(data.train_set)
    figure, _ = attribution.plot(pairs[:n], pairs[n:], columns=targets, k=5, marked=data.swapped)
    figure.savefig(path, dpi=100)
    print(f"\nThe picture is in {path}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="a checkpoint is featurized after each")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder to write into")
    arguments = parser.parse_args()
    mpl.use("Agg")

    folder = arguments.output / "clip" / f"epochs{arguments.epochs}"  # a store is for one setting
    L.seed_everything(0)
    data, model = CaptionedDigits(), DigitsCLIP()
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", save_top_k=-1),
            TRAKCallback(folder / "attributions", proj_dim=512),
        ],
    )
    trainer.fit(model, datamodule=data)
    print(f"The model names {zero_shot_accuracy(model, data):.1%} of the test digits rightly.")

    attribution = trainer.attribute(datamodule=data)
    targets = [0, 1, 2, 3]
    print_pairs(attribution, data, targets)
    print_agreement(attribution, data)
    save_picture(attribution, data, targets, arguments.output / "clip.png")

    print_swapped(trainer.attribute_self(), data)


if __name__ == "__main__":
    main()
