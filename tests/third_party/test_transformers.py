"""A classifier of Hugging Face, trained as in Lightning's text classification example, padded batch by batch."""

from __future__ import annotations

import random

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from lightning_trak import ClassificationMixin, TRAKCallback
from tests.third_party.training import Data, assert_same_training, auroc, fit

N, M = 96, 6
WRONG = range(0, N, 8)
GOOD, BAD, PLAIN = ["fine", "warm", "clever"], ["dull", "cold", "loud"], ["the", "film", "was", "a", "and", "very"]
SPECIAL = ["[PAD]", "[UNK]"]


def sentences(n, seed, wrong=()):
    """Sentences of several lengths with good or bad words; in some the label is flipped."""
    draw, found = random.Random(seed), []
    for row in range(n):
        words = draw.choices(PLAIN, k=draw.randint(3, 7)) + draw.choices((BAD, GOOD)[row % 2], k=3)
        draw.shuffle(words)
        found.append((" ".join(words), (row + (row in wrong)) % 2))
    return found


@pytest.fixture(scope="module")
def data():
    words = {word: number for number, word in enumerate(SPECIAL + GOOD + BAD + PLAIN)}
    model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")

    def loader(found, batch_size, **options):
        examples = [{**tokenizer(text), "label": label} for text, label in found]
        return DataLoader(examples, batch_size, collate_fn=DataCollatorWithPadding(tokenizer), **options)

    return Data(loader(sentences(N, 0, WRONG), 12, shuffle=True), loader(sentences(M, 1), 4))


class Classifier(ClassificationMixin, L.LightningModule):
    """Keeps what it predicts until the end of an epoch; decays some parameters and warms up."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        config = BertConfig(
            vocab_size=len(SPECIAL + GOOD + BAD + PLAIN), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16, num_labels=2, problem_type="single_label_classification",
        )  # fmt: skip
        self.model = AutoModelForSequenceClassification.from_config(config)
        self.outputs = []

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        loss = self(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        result = self(**batch)
        self.outputs.append({"logits": result.logits, "labels": batch["labels"]})
        self.log("val_loss", result.loss)

    def on_validation_epoch_end(self):
        logits, labels = (torch.cat([output[key] for output in self.outputs]) for key in ("logits", "labels"))
        self.log("val_accuracy", multiclass_accuracy(logits, labels, num_classes=2))
        self.outputs.clear()

    def configure_optimizers(self):
        whole = {
            name: value for name, value in self.named_parameters() if "bias" not in name and "LayerNorm" not in name
        }
        others = [value for name, value in self.named_parameters() if name not in whole]
        groups = [{"params": list(whole.values()), "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        schedule = get_linear_schedule_with_warmup(optimizer, 4, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize("gradients", ["hooks", "loop"])
def test_training_is_the_same(tmp_path, data, gradients):
    assert_same_training(tmp_path, Classifier, data, gradients, max_epochs=2)


def test_vmap_refuses_before_training(tmp_path, data):
    """The model asks whether any token is masked."""
    with pytest.raises(
        ValueError, match="gradients='vmap' cannot .*data-dependent control flow.* Use gradients='auto'"
    ):
        fit(tmp_path, Classifier, data, TRAKCallback(gradients="vmap"), max_epochs=1)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_wrong_labels_are_found(tmp_path, data):
    trainer = fit(tmp_path, Classifier, data, TRAKCallback(featurize_on="fit_end"), max_epochs=10)
    assert auroc(trainer.attribute_self(), WRONG) > 0.9
    assert trainer.attribute(data).scores.shape == (N, M)
