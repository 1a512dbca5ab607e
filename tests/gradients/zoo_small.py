"""Published architectures written out small: what the zoo holds that needs nothing but torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

N_CLASSES = 3
VOCABULARY = 20
PAD = 0


def margin(logits, labels):
    """The label's logit less the log-sum-exp of the others; classes are the last dimension."""
    label = labels.unsqueeze(-1)
    others = torch.zeros_like(logits).scatter(-1, label, float("-inf"))
    return logits.gather(-1, label).squeeze(-1) - (logits + others).logsumexp(-1)


def token_log_likelihood(logits, labels):
    """The mean log-likelihood of each row's labels, of those that are not -100."""
    kept = labels != -100
    log_likelihood = logits.log_softmax(-1).gather(-1, labels.masked_fill(~kept, 0).unsqueeze(-1)).squeeze(-1)
    return (log_likelihood * kept).sum(-1) / kept.sum(-1)


def masked_mean(hidden, mask):
    """The mean over the real tokens of a (b, tokens, width) tensor."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def perturb(module):
    """Moves a fresh module off its symmetries: its constant parameters get noise."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(0.1 * torch.randn_like(parameter))


def set_running_statistics(module, batch):
    """Gives batch normalisation about the statistics of a batch, as training would."""
    norms = [child for child in module.modules() if getattr(child, "running_mean", None) is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        module.train().model_output(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_var.clamp_(min=0.05).mul_(0.8 + 0.4 * torch.rand_like(norm.running_var))
            norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))


def build(make, make_batch, seed=0):
    """``make()``'s module under a seed of its own, off its symmetries and in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        perturb(module)
        set_running_statistics(module, make_batch(16))
    return module.eval()


def make_images(b, size=16, channels=3, dims=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, channels, *[size] * dims, generator=generator)
    return images, torch.randint(N_CLASSES, (b,), generator=generator)


def make_segmentation(b, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, 3, 16, 16, generator=generator)
    return images, torch.randint(N_CLASSES, (b, 16, 16), generator=generator)


def make_image_pairs(b, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, 3, 16, 16, generator=generator), torch.randn(b, 3, 16, 16, generator=generator)


def make_tokens(b, length=12, vocabulary=VOCABULARY, first=1, seed=0):
    """Token ids from ``first`` on, and the mask of each row's real tokens, which are all of the first row's."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(first, vocabulary, (b, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (b, 1), generator=generator)
    lengths[0] = length
    return tokens, torch.arange(length) < lengths


def make_sentences(b, seed=0):
    tokens, mask = make_tokens(b, seed=seed)
    labels = torch.randint(N_CLASSES, (b,), generator=torch.Generator().manual_seed(seed + 1))
    return tokens.masked_fill(~mask, PAD), mask, labels


def make_waves(b, seed=0):
    return (torch.randint(VOCABULARY, (b, 24), generator=torch.Generator().manual_seed(seed)),)


def make_clicks(b, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(b, 4, generator=generator)
    sparse = torch.randint(VOCABULARY, (b, 3), generator=generator)
    return dense, sparse, torch.randint(2, (b,), generator=generator)


class Classifier(nn.Module):
    """Images in, the margin of the label's logit out."""

    def model_output(self, batch):
        images, labels = batch
        return margin(self(images), labels)


class SentenceClassifier(nn.Module):
    """Padded tokens and their mask in, the margin of the label's logit out."""

    def model_output(self, batch):
        tokens, mask, labels = batch
        return margin(self(tokens, mask), labels)


class Mul(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x * self.weight


class Residual(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return x + self.module(x)


def conv_bn(c_in, c_out, kernel_size=3, stride=1, padding=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


class ResNet9(Classifier):
    """The CIFAR-10 net of TRAK's experiments, narrow."""

    def __init__(self, c=8):
        super().__init__()
        self.net = nn.Sequential(
            conv_bn(3, c),
            conv_bn(c, 2 * c, kernel_size=5, stride=2, padding=2),
            Residual(nn.Sequential(conv_bn(2 * c, 2 * c), conv_bn(2 * c, 2 * c))),
            conv_bn(2 * c, 4 * c),
            nn.MaxPool2d(2),
            Residual(nn.Sequential(conv_bn(4 * c, 4 * c), conv_bn(4 * c, 4 * c))),
            conv_bn(4 * c, 2 * c, padding=0),
            nn.AdaptiveMaxPool2d((1, 1)),
            nn.Flatten(),
            nn.Linear(2 * c, N_CLASSES, bias=False),
            Mul(0.2),
        )

    def forward(self, images):
        return self.net(images)


class MobileNet(Classifier):
    """Depthwise separable convolutions: MobileNet of 2017."""

    def __init__(self, c=8):
        super().__init__()
        layers = [conv_bn(3, c, stride=2)]
        for c_in, c_out, stride in ((c, 2 * c, 1), (2 * c, 4 * c, 2), (4 * c, 4 * c, 1)):
            layers += [conv_bn(c_in, c_in, stride=stride, groups=c_in), conv_bn(c_in, c_out, 1, padding=0)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * c, N_CLASSES))

    def forward(self, images):
        return self.classifier(self.features(images))


def double_conv(c_in, c_out):
    layers = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1), nn.GroupNorm(4, c_out), nn.SiLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two levels down and up again, each joined across by concatenation; the output is a mean over pixels."""

    def __init__(self, c=8):
        super().__init__()
        self.down = nn.ModuleList([double_conv(3, c), double_conv(c, 2 * c)])
        self.middle = double_conv(2 * c, 4 * c)
        self.up = nn.ModuleList([nn.ConvTranspose2d(4 * c, 2 * c, 2, 2), nn.ConvTranspose2d(2 * c, c, 2, 2)])
        self.merge = nn.ModuleList([double_conv(4 * c, 2 * c), double_conv(2 * c, c)])
        self.head = nn.Conv2d(c, N_CLASSES, 1)

    def forward(self, x):
        skips = []
        for down in self.down:
            skips.append(down(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)

    def model_output(self, batch):
        images, labels = batch
        return margin(self(images).movedim(1, -1), labels).mean((1, 2))


def conv_in(c_in, c_out, kernel_size=3, stride=1):
    convolution = nn.Conv2d(c_in, c_out, kernel_size, stride, kernel_size // 2, padding_mode="reflect")
    return nn.Sequential(convolution, nn.InstanceNorm2d(c_out, affine=True), nn.ReLU())


class StyleTransfer(nn.Module):
    """The image transformation net of fast style transfer, with instance normalisation; the output is minus the MSE."""

    def __init__(self, c=8):
        super().__init__()
        self.encode = nn.Sequential(conv_in(3, c, kernel_size=5), conv_in(c, 2 * c, stride=2))
        self.residual = Residual(nn.Sequential(conv_in(2 * c, 2 * c), conv_in(2 * c, 2 * c)))
        self.decode = nn.Sequential(nn.Upsample(scale_factor=2), conv_in(2 * c, c), nn.Conv2d(c, 3, 5, padding=2))

    def forward(self, images):
        return self.decode(self.residual(self.encode(images)))

    def model_output(self, batch):
        images, targets = batch
        return -F.mse_loss(self(images), targets, reduction="none").mean((1, 2, 3))


class VideoNet(Classifier):
    """Three-dimensional convolutions over time and space."""

    def __init__(self, c=6):
        super().__init__()
        self.conv1 = nn.Conv3d(1, c, (1, 3, 3), padding=(0, 1, 1))
        self.norm1 = nn.BatchNorm3d(c)
        self.conv2 = nn.Conv3d(c, 2 * c, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm3d(2 * c)
        self.head = nn.Linear(2 * c * 8, N_CLASSES)

    def forward(self, x):
        x = F.elu(self.norm1(self.conv1(x)))
        x = F.avg_pool3d(F.elu(self.norm2(self.conv2(x))), 2)
        return self.head(x.flatten(1))


def mlp(*widths):
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class MixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norm1, self.token_mixing = nn.LayerNorm(width), mlp(tokens, 2 * tokens, tokens)
        self.norm2, self.channel_mixing = nn.LayerNorm(width), mlp(width, 2 * width, width)

    def forward(self, x):
        x = x + self.token_mixing(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mixing(self.norm2(x))


class MLPMixer(Classifier):
    """MLPs over the patches, then over the channels."""

    def __init__(self, width=24):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, width), MixerBlock(16, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class ViTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, 2 * width, width)

    def attention(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(Classifier):
    """The class token and the position embedding are parameters of the top module itself."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(ViTBlock(width, heads), ViTBlock(width, heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])
