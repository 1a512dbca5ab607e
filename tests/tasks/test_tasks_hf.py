"""The mixins with models of Hugging Face, as they come: batches are mappings, losses those of the models themselves."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import ClassificationMixin, ContrastiveMixin, FeatureStore, LanguageModelingMixin, TRAKCallback

N, M, LENGTH, WORDS = 24, 4, 12, 50


class Wrapped(L.LightningModule):
    """A model that tells its own loss, as Hugging Face's do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, **inputs):
        return self.net(**inputs)

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class LanguageModel(LanguageModelingMixin, Wrapped): ...


class PairClassifier(ClassificationMixin, Wrapped): ...


class Clip(ContrastiveMixin, Wrapped):
    contrast_size = 10

    def get_logit_scale(self):
        return self.net.logit_scale.exp()

    def training_step(self, batch, batch_idx):
        return self.net(**batch, return_loss=True).loss


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1,
        loss_type="ForCausalLM",
    )  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=2, problem_type="single_label_classification",
    )  # fmt: skip
    return PairClassifier(BertForSequenceClassification(config))


def clip():
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": WORDS, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**size, **tokens, "pad_token_id": 2}, vision_config={**size, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip
    return Clip(CLIPModel(config))


def example(kind, number):
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(3, WORDS, (LENGTH,), generator=generator)
    mask = (torch.arange(LENGTH) < 6 + number % 6).long()
    if kind is gpt2:
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    if kind is bert:
        half = (torch.arange(LENGTH) > 4).long()
        return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": half, "labels": torch.tensor(number % 2)}
    tokens[-1] = 1
    pixels = torch.randn(3, 8, 8, generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(mask), "pixel_values": pixels}


def lora():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    return PairClassifier(get_peft_model(bert().net, config))


def attribute(root, module, kind, **options):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader([example(kind, number) for number in range(N)], 8)

        def test_dataloader(self):
            return DataLoader([example(kind, number) for number in range(M)], M)

    torch.manual_seed(0)
    trainer = L.Trainer(
        default_root_dir=root, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[TRAKCallback(root / "trak", damping=0.1, **options)],
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    return trainer.attribute(datamodule=Data())


@pytest.mark.parametrize("kind", [gpt2, bert, clip])
def test_training_examples_are_what_taught_themselves(tmp_path, kind, said):
    """The loss is the model's, as a warning would be an error; targets find themselves; and hooks do for all of it."""
    attribution = attribute(tmp_path, kind(), kind)
    assert attribution.top(1).indices.flatten().tolist() == list(range(M))
    assert {line for line in said() if "gradients by" in line} == {"TRAKCallback: gradients by hooks."}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft
def test_lora_of_peft(tmp_path, said):
    """The adapters alone, by hooks, in a model whose layers they wrap."""
    attribution = attribute(tmp_path, lora(), bert, parameters="*lora*")
    assert attribution.top(1).indices.flatten().tolist() == list(range(M))
    names = FeatureStore(tmp_path / "trak").manifest["parameters"]
    assert len(names) == 4
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert "TRAKCallback: gradients by hooks." in said()
