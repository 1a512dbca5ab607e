"""The models that are measured, each with a batch size and inputs of its shape; weights and inputs are random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_trak import (
    ClassificationMixin,
    ContrastiveMixin,
    LanguageModelingMixin,
    MultilabelMixin,
    RegressionMixin,
    SegmentationMixin,
)
from tests.gradients.zoo_small import N_CLASSES, ResNet9, UNet

SEQUENCE = 128


class Classifier(ClassificationMixin, L.LightningModule):
    """Any network that gives logits, or, from Hugging Face, returns them; trained by SGD."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.get_logits(batch), self.get_labels(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class LanguageModel(LanguageModelingMixin, Classifier):
    """A causal language model."""


class Tagger(MultilabelMixin, Classifier):
    """Any network, for several labels at once."""


class Regressor(RegressionMixin, Classifier):
    """Any network, for one number or several."""


class Segmenter(SegmentationMixin, Classifier):
    """Any network that gives logits for every pixel."""


class Clip(ContrastiveMixin, Classifier):
    """A CLIP of Hugging Face, its contrast set random like its inputs."""

    def get_logit_scale(self) -> Tensor:
        return self.network.logit_scale.exp()

    def get_contrast_batch(self) -> Any:
        examples = Examples(_pair, self.contrast_size)
        return default_collate([examples[index] for index in range(len(examples))])


class Examples(Dataset[Any]):
    """``n`` examples, the first of them as far as attribution can see those that any larger ``n`` would have."""

    def __init__(self, make: Callable[[torch.Generator], Any], n: int) -> None:
        self._make, self._n = make, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._n:
            raise IndexError(index)
        return self._make(torch.Generator().manual_seed(index))


@dataclass(frozen=True)
class Model:
    """What is measured.

    Attributes:
        name: in the tables.
        make: builds the module, in eval mode.
        example: draws an example.
        batch_size: of featurization, of the plain pass, and of the training step.
    """

    name: str
    make: Callable[[], L.LightningModule]
    example: Callable[[torch.Generator], Any]
    batch_size: int

    def build(self) -> L.LightningModule:
        """Return the module, the same every time."""
        torch.manual_seed(0)
        return self.make().eval()

    def drawn_loader(self, n: int) -> DataLoader[Any]:
        """Return a loader of ``n`` pictures that are drawn beforehand, so that drawing them takes no time."""
        examples = Examples(self.example, n)
        columns = zip(*(examples[index] for index in range(n)), strict=True)
        return DataLoader(TensorDataset(*map(torch.stack, columns)), self.batch_size)

    def loader(self, n: int) -> DataLoader[Any]:
        """Return a loader of ``n`` examples."""
        return DataLoader(Examples(self.example, n), self.batch_size)


def digits_cnn() -> L.LightningModule:
    """The network of ``examples/digits.py``."""
    return Classifier(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )
    )  # fmt: skip


def resnet9() -> L.LightningModule:
    """The ResNet-9 of the TRAK quickstart, for pictures of 32×32: 2.3 million parameters."""
    return Classifier(ResNet9(64))


def vit(layers: int = 12) -> L.LightningModule:
    """ViT-S/16 for pictures of 224×224."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=384, num_hidden_layers=layers, num_attention_heads=6, intermediate_size=1536)
    return Classifier(ViTForImageClassification(config))


def bert(layers: int = 12) -> L.LightningModule:
    """BERT-base."""
    from transformers import BertConfig, BertForSequenceClassification

    return Classifier(BertForSequenceClassification(BertConfig(num_hidden_layers=layers)))


class LowRank(nn.Module):
    """LoRA: a frozen linear layer and a product of two thin ones beside it."""

    def __init__(self, frozen: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def bert_lora(layers: int = 12) -> L.LightningModule:
    """BERT-base, frozen, with LoRA of rank 8 on its queries and values."""
    module = bert(layers)
    module.requires_grad_(False)
    for block in module.network.bert.encoder.layer:
        attention = block.attention.self
        attention.query, attention.value = LowRank(attention.query), LowRank(attention.value)
    return module


def gpt2(layers: int = 12, vocabulary: int = 50257) -> L.LightningModule:
    """GPT-2 small."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return LanguageModel(GPT2LMHeadModel(GPT2Config(n_layer=layers, vocab_size=vocabulary)))


def tagger() -> L.LightningModule:
    """The ResNet-9, with labels that are each there or not."""
    return Tagger(ResNet9(64))


def regressor() -> L.LightningModule:
    """A table of 100 columns, from which four numbers are predicted."""
    layers = [nn.Linear(100, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4)]
    return Regressor(nn.Sequential(*layers))


def segmenter() -> L.LightningModule:
    """A U-Net."""
    return Segmenter(UNet(32))


def clip() -> L.LightningModule:
    """A CLIP of four layers for either half, 112×112 pixels and 32 tokens."""
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {**size, "vocab_size": 1000, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**size, "image_size": 112, "patch_size": 16}
    return Clip(CLIPModel(CLIPConfig(text_config={**text, "pad_token_id": 2}, vision_config=vision)))


def _picture(channels: int, size: int, classes: int) -> Callable[[torch.Generator], Any]:
    def draw(generator: torch.Generator) -> Any:
        image = torch.randn(channels, size, size, generator=generator)
        return image, torch.randint(0, classes, (), generator=generator)

    return draw


def _named_picture(generator: torch.Generator) -> Any:
    image, label = _picture(3, 224, 2)(generator)
    return {"pixel_values": image, "labels": label}


def _sentence(generator: torch.Generator) -> Any:
    tokens = torch.randint(1000, 30000, (SEQUENCE,), generator=generator)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.randint(0, 2, (), generator=generator),
    }


def _tagged_picture(generator: torch.Generator) -> Any:
    return torch.randn(3, 32, 32, generator=generator), torch.randint(0, 2, (N_CLASSES,), generator=generator)


def _row(generator: torch.Generator) -> Any:
    return torch.randn(100, generator=generator), torch.randn(4, generator=generator)


def _segmented_picture(generator: torch.Generator) -> Any:
    image = torch.randn(3, 64, 64, generator=generator)
    return image, torch.randint(0, N_CLASSES, (64, 64), generator=generator)


def _pair(generator: torch.Generator) -> Any:
    tokens = torch.randint(3, 1000, (32,), generator=generator)
    tokens[-1] = 1
    image = torch.randn(3, 112, 112, generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": image}


def _text(generator: torch.Generator) -> Any:
    return {"input_ids": torch.randint(0, 50257, (SEQUENCE,), generator=generator)}


MODELS = {
    "digits": Model("digits CNN", digits_cnn, _picture(1, 8, 10), 64),
    "resnet9": Model("ResNet-9, 32×32", resnet9, _picture(3, 32, 2), 32),
    "vit": Model("ViT-S/16, 224×224", vit, _named_picture, 16),
    "bert": Model(f"BERT-base, {SEQUENCE} tokens", bert, _sentence, 16),
    "bert_lora": Model(f"LoRA on BERT-base, {SEQUENCE} tokens", bert_lora, _sentence, 16),
    "gpt2": Model(f"GPT-2 small, {SEQUENCE} tokens", gpt2, _text, 16),
    "tagger": Model("ResNet-9, 32×32", tagger, _tagged_picture, 32),
    "regressor": Model("MLP, 100-1024-1024-4", regressor, _row, 64),
    "segmenter": Model("U-Net, 64×64", segmenter, _segmented_picture, 16),
    "clip": Model("CLIP, 4 + 4 layers, 112×112", clip, _pair, 32),
}
