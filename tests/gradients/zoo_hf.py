"""Architectures of the transformers package from small configurations, with its default attention.

The package is imported when a model is built, so that the zoo's other entries do without it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from tests.gradients.zoo_small import N_CLASSES, make_images, make_tokens, margin, token_log_likelihood

VOCABULARY = 40
PAD, BOS, EOS, MASK, FIRST = 0, 1, 2, 3, 4
IGNORED = -100


def make_text(b, pad=PAD, seed=0):
    tokens, mask = make_tokens(b, vocabulary=VOCABULARY, first=FIRST, seed=seed)
    return {"input_ids": tokens.masked_fill(~mask, pad), "attention_mask": mask.long()}


def make_classified_text(b, pad=PAD, seed=0):
    labels = torch.randint(N_CLASSES, (b,), generator=torch.Generator().manual_seed(seed + 1))
    return make_text(b, pad, seed) | {"labels": labels}


def make_masked_text(b, seed=0):
    """A quarter of the real tokens are masked, the second of each row always; the others are no labels."""
    batch = make_text(b, seed=seed)
    tokens, generator = batch["input_ids"], torch.Generator().manual_seed(seed + 1)
    masked = (torch.rand(tokens.shape, generator=generator) < 0.25) & (batch["attention_mask"] == 1)
    masked[:, 1] = True
    batch["labels"] = tokens.masked_fill(~masked, IGNORED)
    return batch | {"input_ids": tokens.masked_fill(masked, MASK)}


def make_causal_text(b, seed=0):
    batch = make_text(b, seed=seed)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


def make_translations(b, seed=0):
    labels = make_causal_text(b, seed=seed + 1)["labels"][:, :8]
    return make_text(b, seed=seed) | {"labels": labels.contiguous()}


def make_replaced_text(b, seed=0):
    """Labels are 1 where a token was replaced by another."""
    batch = make_text(b, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return batch | {"labels": torch.randint(2, batch["input_ids"].shape, generator=generator)}


def make_pictures(b, size=16, seed=0):
    images, labels = make_images(b, size=size, seed=seed)
    return {"pixel_values": images, "labels": labels}


class Wrapper(nn.Module):
    """A transformers model under the zoo's interface."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def logits(self, batch):
        return self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits


class Classification(Wrapper):
    """The margin of the label's logit, for texts and images alike."""

    def model_output(self, batch):
        return margin(self.logits(batch), batch["labels"])


class MaskedLM(Wrapper):
    """The mean log-likelihood of the tokens that were masked."""

    def model_output(self, batch):
        return token_log_likelihood(self.logits(batch), batch["labels"])


class CausalLM(Wrapper):
    """The mean log-likelihood of each token after those before it."""

    def model_output(self, batch):
        return token_log_likelihood(self.logits(batch)[:, :-1], batch["labels"][:, 1:])


class Seq2SeqLM(Wrapper):
    """The mean log-likelihood of the labels, from which the model makes its decoder's inputs."""

    def model_output(self, batch):
        return token_log_likelihood(self.model(**batch).logits, batch["labels"])


class ReplacedTokenDetection(Wrapper):
    """ELECTRA's discriminator: the mean log-likelihood of what it says of each real token."""

    def model_output(self, batch):
        log_likelihood = F.logsigmoid(self.logits(batch) * (2 * batch["labels"] - 1))
        mask = batch["attention_mask"]
        return (log_likelihood * mask).sum(1) / mask.sum(1)


SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SMALL = SPECIAL | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.15,
}
TEXT = SMALL | {"max_position_embeddings": 16}
LABELLED = TEXT | {"num_labels": N_CLASSES}
PICTURES = {"num_labels": N_CLASSES, "num_channels": 3, "initializer_range": 0.15}


def make_model(wrapper, config, model, **settings):
    """The named model of the named configuration, in its wrapper."""
    import transformers

    return wrapper(getattr(transformers, model)(getattr(transformers, config)(**settings)))


def bert():
    return make_model(Classification, "BertConfig", "BertForSequenceClassification", **LABELLED)


def roberta():
    settings = LABELLED | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
    return make_model(Classification, "RobertaConfig", "RobertaForSequenceClassification", **settings)


def albert():
    settings = LABELLED | {"embedding_size": 16, "num_hidden_layers": 3}
    return make_model(Classification, "AlbertConfig", "AlbertForSequenceClassification", **settings)


def mobilebert():
    settings = LABELLED | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}
    return make_model(Classification, "MobileBertConfig", "MobileBertForSequenceClassification", **settings)


def electra():
    settings = TEXT | {"embedding_size": 16}
    return make_model(ReplacedTokenDetection, "ElectraConfig", "ElectraForPreTraining", **settings)


def distilbert():
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 16}
    settings = SPECIAL | sizes | {"initializer_range": 0.15}
    return make_model(MaskedLM, "DistilBertConfig", "DistilBertForMaskedLM", **settings)


def gpt2():
    settings = SPECIAL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "initializer_range": 0.15}
    return make_model(CausalLM, "GPT2Config", "GPT2LMHeadModel", **settings)


def llama():
    return make_model(CausalLM, "LlamaConfig", "LlamaForCausalLM", **TEXT, num_key_value_heads=2)


def gpt_neox():
    return make_model(CausalLM, "GPTNeoXConfig", "GPTNeoXForCausalLM", **TEXT)


def opt():
    settings = SPECIAL | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"word_embed_proj_dim": 16, "max_position_embeddings": 16, "init_std": 0.15}
    return make_model(CausalLM, "OPTConfig", "OPTForCausalLM", **settings, **sizes)


def t5():
    settings = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return make_model(
        Seq2SeqLM, "T5Config", "T5ForConditionalGeneration", **settings, pad_token_id=PAD, decoder_start_token_id=PAD
    )


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    settings = PICTURES | sizes | {"image_size": 16, "patch_size": 4}
    return make_model(Classification, "ViTConfig", "ViTForImageClassification", **settings)


def swin():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return make_model(Classification, "SwinConfig", "SwinForImageClassification", **PICTURES, **sizes, window_size=4)


def resnet():
    settings = {"num_labels": N_CLASSES, "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
    return make_model(Classification, "ResNetConfig", "ResNetForImageClassification", **settings)


def convnext():
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "patch_size": 2, "layer_scale_init_value": 0.5}
    return make_model(Classification, "ConvNextConfig", "ConvNextForImageClassification", **PICTURES, **sizes)


def mobilenet_v2():
    sizes = {"depth_multiplier": 0.1, "min_depth": 8, "finegrained_output": False}
    settings = PICTURES | sizes | {"initializer_range": 0.1}
    return make_model(Classification, "MobileNetV2Config", "MobileNetV2ForImageClassification", **settings)


HF_ZOO = {
    "hf_bert": (bert, make_classified_text),
    "hf_roberta": (roberta, partial(make_classified_text, pad=1)),
    "hf_albert": (albert, make_classified_text),
    "hf_mobilebert": (mobilebert, make_classified_text),
    "hf_electra": (electra, make_replaced_text),
    "hf_distilbert": (distilbert, make_masked_text),
    "hf_gpt2": (gpt2, make_causal_text),
    "hf_llama": (llama, make_causal_text),
    "hf_gpt_neox": (gpt_neox, make_causal_text),
    "hf_opt": (opt, make_causal_text),
    "hf_t5": (t5, make_translations),
    "hf_vit": (vit, make_pictures),
    "hf_swin": (swin, make_pictures),
    "hf_resnet": (resnet, partial(make_pictures, size=32)),
    "hf_convnext": (convnext, make_pictures),
    "hf_mobilenet_v2": (mobilenet_v2, partial(make_pictures, size=32)),
}
