"""Which passages taught a language model to complete a text?

Trains a small transformer on passages of Python's language reference. The targets are copies of some of these passages
with half of their words replaced by others; the output is the log-odds of a copy's second half, the completion, given
its first (`output_mask`). As it is known which training passage each completion came from, the example counts how often
that passage is found. Under two minutes on two cores; nothing is downloaded.

    python examples/language_model.py
    python examples/language_model.py --text FILE    # trains on a text of your own
    python examples/language_model.py --help
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_trak import Attribution, LanguageModelingMixin, TRAKCallback

Batch = dict[str, torch.Tensor]
UNKNOWN = "…"


def read(path: Path) -> str:
    """Return the text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--text must be a text file in UTF-8: '{path}' cannot be read ({error}).") from error


class Passages(Dataset):
    """Passages as mappings, (length,) each: ``input_ids`` and, if given, ``output_mask``."""

    def __init__(self, tokens: torch.Tensor, output_mask: torch.Tensor | None = None) -> None:
        self.tokens, self.output_mask = tokens, output_mask

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        if self.output_mask is None:
            return {"input_ids": self.tokens[index]}
        return {"input_ids": self.tokens[index], "output_mask": self.output_mask}


class TextData(L.LightningDataModule):
    """Passages of a text, of ``length`` words each; the targets are copies of some with replaced words."""

    def __init__(self, text: str, n_train: int, n_targets: int, length: int = 48, n_replaced: int = 24) -> None:
        super().__init__()
        words = [match[0] for match in re.finditer(r"\w+|([^\w\s])\1*", text)]
        self.vocabulary = [UNKNOWN, *(word for word, count in Counter(words).items() if count > 1)]
        numbers = {word: number for number, word in enumerate(self.vocabulary)}
        passages = torch.tensor([numbers.get(word, 0) for word in words[: len(words) // length * length]])
        passages = passages.reshape(-1, length).unique(dim=0)
        generator = torch.Generator().manual_seed(0)
        passages = passages[torch.randperm(len(passages), generator=generator)[:n_train]]
        if len(passages) < n_targets:
            raise SystemExit(
                f"There are {len(passages)} training passages of {length} words; at least {n_targets} are needed."
            )

        self.source = torch.randperm(len(passages), generator=generator)[:n_targets]  # to be found out
        copies = passages[self.source]
        replaced = torch.rand(copies.shape, generator=generator).argsort(1) < n_replaced
        copies[replaced] = passages.flatten()[
            torch.randint(passages.numel(), (int(replaced.sum()),), generator=generator)
        ]
        self.train_set = Passages(passages)
        self.target_set = Passages(copies, output_mask=torch.arange(length) >= length // 2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=16, shuffle=True)

    def attribute_dataloader(self) -> DataLoader:
        return DataLoader(self.target_set, batch_size=16)

    def shown(self, tokens: torch.Tensor) -> str:
        """Return the text of tokens, a space after every word."""
        return " ".join(self.vocabulary[token] for token in tokens.tolist())


class Block(nn.Module):
    """A pre-norm transformer block that sees the words before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        query, key, value = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(LanguageModelingMixin, L.LightningModule):
    """A transformer that predicts the next word."""

    def __init__(self, vocabulary: int, length: int, width: int = 64, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.head(self.norm(self.blocks(self.words(input_ids) + self.positions(positions))))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        tokens = batch["input_ids"]
        loss = F.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def print_examples(attribution: Attribution, data: TextData, targets: list[int]) -> None:
    """Print the passages that helped most with some completions."""
    top = attribution.top(3)
    for target in targets:
        half = data.target_set.tokens.shape[1] // 2
        prompt, completion = data.target_set.tokens[target].split(half)
        print(f"\ntarget {target}: {data.shown(prompt)}\n  completion: {data.shown(completion)}")
        for row, value in zip(top.indices[target].tolist(), top.values[target].tolist(), strict=True):
            mark = ", where it came from" if row == data.source[target] else ""
            print(f"  #{row} ({value:+.2f}{mark}): {data.shown(data.train_set.tokens[row])}")


def print_words(attribution: Attribution, data: TextData, target: int) -> None:
    """Print which words of the most helpful passage speak for which words of a completion."""
    row = int(attribution.top(1).indices[target, 0])
    parts = attribution.parts(row, target).parts
    passage, copy = data.train_set.tokens[row], data.target_set.tokens[target]
    print(f"\nOf the score of #{row} for target {target}, {parts.sum():.2f}, these pairs of words add most:")
    for value, place in zip(*(found.tolist() for found in parts.flatten().topk(5)), strict=True):
        s, t = divmod(place, parts.shape[1])  # part t is the prediction of word t + 1
        one, other = (f"'{data.shown(tokens[at : at + 2])}'" for tokens, at in ((passage, s), (copy, t)))
        print(f"  {value:+.2f}: {one} in the passage, {other} in the target")


def print_found(attribution: Attribution, data: TextData) -> None:
    """Say how often the passage that a completion came from is among the most helpful."""
    n, n_targets = len(data.train_set), len(data.source)
    print(f"\nThe passage that a completion came from, among {n} passages, is")
    for k, place in ((1, "the first"), (5, "among the first 5")):
        found = (attribution.top(k).indices == data.source[:, None]).any(1).sum()
        print(f"  {place} for {found} of {n_targets} targets (by chance: {k * n_targets / n:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="a checkpoint is featurized after each")
    parser.add_argument("--n-train", type=int, default=1000, help="training passages")
    parser.add_argument("--text", type=Path, help="a text file to train on, instead of Python's language reference")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder to write into")
    arguments = parser.parse_args()

    name = arguments.text.stem if arguments.text else "python"
    setting = f"{name}-n_train{arguments.n_train}-epochs{arguments.epochs}"
    folder = arguments.output / "language_model" / setting  # a store is for one setting
    L.seed_everything(0)
    text = read(arguments.text) if arguments.text else "\n".join(topics.values())
    data = TextData(text, n_train=arguments.n_train, n_targets=40)
    model = LanguageModel(len(data.vocabulary), data.train_set.tokens.shape[1])
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", save_top_k=-1, save_weights_only=True),
            TRAKCallback(folder / "attributions"),
        ],
    )
    trainer.fit(model, datamodule=data)

    attribution = trainer.attribute(datamodule=data)
    print_examples(attribution, data, targets=[0, 1, 2])
    print_words(attribution, data, target=0)
    print_found(attribution, data)


if __name__ == "__main__":
    main()
