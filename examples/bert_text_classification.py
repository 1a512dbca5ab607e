"""Which sentence pairs taught BERT the answer for a pair? And which of them are labelled wrongly?

Trains a small BERT, and a tokenizer of words, to tell whether two sentences of a docstring of Python's library are in
their order (label 1) or exchanged (label 0). Some training labels are flipped on purpose; the scores of the examples
for themselves name far more of them than chance would. Under two minutes on two cores; nothing is downloaded. Another
model and data set are loaded from the Hugging Face hub, which needs the `datasets` package and should have a GPU.

    python examples/bert_text_classification.py
    python examples/bert_text_classification.py --model bert-base-cased --dataset qnli --epochs 3
    python examples/bert_text_classification.py --help
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional import auroc

from lightning_trak import Attribution, ClassificationMixin, TRAKCallback

try:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        PreTrainedTokenizerFast,
    )
except ImportError as error:
    raise SystemExit(f"This example needs transformers ({error}). Install it with: pip install transformers") from error

Pair = tuple[str, str, int]  # two sentences, and their label


def docstring_pairs(seed: int = 0) -> list[Pair]:
    """Return the first sentence of each docstring with a later one, in their order (label 1) or exchanged (label 0)."""
    draw = random.Random(seed)
    pairs = []
    for opening, *others in sorted(set(standard_library_docstrings())):
        later, label = draw.choice(others), draw.randrange(2)
        pairs.append((opening, later, 1) if label else (later, opening, 0))
    return draw.sample(pairs, len(pairs))


def standard_library_docstrings() -> Iterator[tuple[str, ...]]:
    """Yield the sentences, of five words at least, of the docstrings of functions that ship with Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if path.parent.name in ("site-packages", "test"):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                parts = re.split(r"(?<=[.:;!?])\s+|\n\s*\n", ast.get_docstring(node) or "")
                sentences = [" ".join(part.split()) for part in parts if len(re.findall("[A-Za-z]{2,}", part)) >= 5]
                if len(sentences) >= 2:
                    yield tuple(sentences)


def hub_pairs(name: str) -> list[Pair]:
    """Return the training pairs of a task of GLUE with a question and a sentence, or two sentences."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SystemExit("--dataset needs the datasets package. Install it with: pip install datasets") from error
    examples = load_dataset("nyu-mll/glue", name, split="train").shuffle(seed=0)
    first, second = (column for column in examples.column_names if column not in ("label", "idx"))
    return [(example[first], example[second], example["label"]) for example in examples]


def train_tokenizer(texts: list[str], vocabulary: int = 4000) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the most frequent words of ``texts``; a trained WordPiece would differ from run to run."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = (word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    frequent = [word for word, _ in Counter(words).most_common(vocabulary - len(special))]
    numbers = {word: number for number, word in enumerate(special + frequent)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class PairDataset(Dataset):
    """Tokenized pairs: mappings with ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``labels``."""

    def __init__(self, pairs: list[Pair], tokenizer: Any, max_length: int) -> None:
        first, second, labels = zip(*pairs, strict=True)
        options = {"truncation": True, "padding": "max_length", "max_length": max_length, "return_tensors": "pt"}
        self.fields = dict(tokenizer(list(first), list(second), **options)) | {"labels": torch.tensor(labels)}

    def __len__(self) -> int:
        return len(self.fields["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.fields.items()}


class PairData(L.LightningDataModule):
    """Pairs in train and test; the labels of some training pairs are flipped."""

    def __init__(self, pairs: list[Pair], tokenizer: Any, n_train: int, n_test: int, max_length: int) -> None:
        super().__init__()
        if n_train + n_test > len(pairs):
            raise SystemExit(
                f"There are {len(pairs)} pairs, {n_test} of them for the test:"
                f" --n-train must be at most {len(pairs) - n_test}, got {n_train}."
            )
        self.train_pairs, self.test_pairs = pairs[:n_train], pairs[n_train : n_train + n_test]
        self.flipped = torch.rand(n_train, generator=torch.Generator().manual_seed(0)) < 0.05  # to be found out
        for row in self.flipped.nonzero().flatten().tolist():
            first, second, label = self.train_pairs[row]
            self.train_pairs[row] = (first, second, 1 - label)
        self.train_set = PairDataset(self.train_pairs, tokenizer, max_length)
        self.test_set = PairDataset(self.test_pairs, tokenizer, max_length)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=32, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=32)


class PairClassifier(ClassificationMixin, L.LightningModule):
    """A BERT with a head for two classes."""

    def __init__(self, bert: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.bert = bert
        self.lr = lr

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.bert(**inputs)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(**batch).loss

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("test_accuracy", (self(**batch).logits.argmax(1) == batch["labels"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def small_bert(vocabulary: int, max_length: int) -> BertForSequenceClassification:
    """Return an untrained BERT with two layers of width 64, its first weights large enough to learn from few pairs."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=max_length,
        initializer_range=0.1,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return BertForSequenceClassification(config)


def print_examples(attribution: Attribution, data: PairData, targets: list[int]) -> None:
    """Print the most helpful training pairs of some test pairs."""
    top = attribution.top(3)
    for target in targets:
        print(f"\ntest pair {target}: {shown(data.test_pairs[target])}")
        for row, value in zip(top.indices[target].tolist(), top.values[target].tolist(), strict=True):
            flipped = ", flipped on purpose" if data.flipped[row] else ""
            print(f"  most helpful: #{row} ({value:+.2f}{flipped}): {shown(data.train_pairs[row])}")


def shown(pair: Pair, width: int = 60) -> str:
    """Return a pair in a line."""
    first, second = (text if len(text) <= width else f"{text[: width - 1]}…" for text in pair[:2])
    return f"“{first}” / “{second}”, labelled {pair[2]}"


def print_flipped(self_influence: torch.Tensor, data: PairData) -> None:
    """Say how many of the training pairs that the model memorised were flipped."""
    n, n_flipped = len(data.flipped), int(data.flipped.sum())
    suspects = self_influence.argsort(descending=True)[:n_flipped]
    found = int(data.flipped[suspects].sum())
    ranks = self_influence.argsort().argsort() / n  # torchmetrics takes numbers from 0 to 1
    area = auroc(ranks, data.flipped.long(), task="binary")
    print(
        f"\n{found} of the {n_flipped} flipped labels are among the first {n_flipped} of {n} suspects"
        f" (by chance: {n_flipped**2 / n:.1f}); AUROC {area:.3f} (by chance: 0.5)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="a checkpoint is featurized after each")
    parser.add_argument("--n-train", type=int, default=2400, help="training pairs")
    parser.add_argument("--model", help="a BERT of the Hugging Face hub, instead of a small untrained one")
    parser.add_argument("--dataset", choices=["qnli", "rte", "mrpc"], help="a task of GLUE, instead of docstrings")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder to write into")
    arguments = parser.parse_args()

    model_name = re.sub(r"\W+", "_", arguments.model or "small")
    setting = f"{arguments.dataset or 'docstrings'}-{model_name}-n_train{arguments.n_train}-epochs{arguments.epochs}"
    folder = arguments.output / "bert_text_classification" / setting  # a store is for one setting
    L.seed_everything(0)
    pairs = hub_pairs(arguments.dataset) if arguments.dataset else docstring_pairs()
    max_length = 128 if arguments.dataset else 48
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        bert = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2)
    else:
        tokenizer = train_tokenizer([text for first, second, _ in pairs for text in (first, second)])
        bert = small_bert(len(tokenizer), max_length)
    data = PairData(pairs, tokenizer, n_train=arguments.n_train, n_test=200, max_length=max_length)
    model = PairClassifier(bert, lr=2e-5 if arguments.model else 1e-3)

    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        accelerator="auto" if arguments.model else "cpu",
        devices=1,
        logger=False,
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", save_top_k=-1, save_weights_only=True),
            TRAKCallback(folder / "attributions", proj_dim=512),
        ],
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)

    attribution = trainer.attribute(datamodule=data)
    print_examples(attribution, data, targets=[0, 1, 2])
    print_flipped(trainer.attribute_self(), data)


if __name__ == "__main__":
    main()
