"""Passages of subwords, learnt by a GPT-2 from Hugging Face with tied embeddings."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tests.benchmarks.quality.tasks import Data, LanguageModel, Task

VOCABULARY, N_PASSAGES, LENGTH, WIDTH = 600, 1200, 24, 64


class GPT2(nn.Module):
    """Two layers of GPT-2; the logits alone, which is what every method takes."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        # With the default initializer_range of 0.02, some seeds never leave the first plateau, and retraining is noise.
        without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=None,
            eos_token_id=None, use_cache=False, initializer_range=0.06, attn_implementation="eager", **without_dropout,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


class ScheduledLanguageModel(LanguageModel):
    """Trained by AdamW, whose learning rate rises linearly in the first tenth and then falls to zero as a cosine."""

    def configure_optimizers(self) -> Any:
        from transformers import get_cosine_schedule_with_warmup

        optimizer, steps = super().configure_optimizers(), int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@cache
def _passages() -> Tensor:
    """Passages of Python's language reference, one after the other, as byte pairs that are learnt from all of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    return torch.tensor(tokenizer.encode(text).ids[: N_PASSAGES * LENGTH]).reshape(N_PASSAGES, LENGTH)


def _data() -> Data:
    passages = _passages()
    return Data(passages, passages, n_train=N_PASSAGES - 200, n_targets=200, batch_size=20)


def _module() -> L.LightningModule:
    return ScheduledLanguageModel(GPT2(), lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))


TASKS = {"gpt2": Task("passages, GPT-2", _data, _module, epochs=8)}
