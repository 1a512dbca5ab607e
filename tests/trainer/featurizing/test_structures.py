"""Random modules, built from what real ones are made of: training and module are untouched, features are right."""

from __future__ import annotations

import random
import warnings
import weakref
from collections import deque
from dataclasses import dataclass, replace

import lightning as L
import numpy as np
import torch
import torchmetrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import ClassificationMixin, FeatureStore, TRAKCallback
from lightning_trak.store.weights import load_weights
from tests.conftest import make_data, make_trainer

WIDTH = 3

# --- What modules are made of. Each part takes and returns (b, WIDTH); what it counts shows in training mode alone. ---


class Tied(nn.Module):
    """Shares the weight of another layer, as it is or transposed, and maybe under a second name."""

    def __init__(self, other, transposed, twice):
        super().__init__()
        self.weight, self.bias, self.transposed = other.weight, nn.Parameter(torch.rand(WIDTH)), transposed
        if twice:
            self.again = other.weight

    def forward(self, x):
        return F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)


class Counting(nn.Module):
    """Its forward pass leaves traces in attributes, containers, buffers and objects."""

    class Meter:
        def __init__(self):
            self.total, self.seen = 0, []

        def update(self):
            self.total += 1
            self.seen.append(self.total)

    def __init__(self):
        super().__init__()
        self.calls, self.recent, self.nested = 0, deque(maxlen=2), {"sums": [torch.zeros(()), []]}
        self.meter, self.mean = self.Meter(), torchmetrics.MeanMetric()
        self.register_buffer("kept", torch.zeros(()))
        self.register_buffer("passing", torch.zeros(()), persistent=False)
        self.alias = self.kept

    def forward(self, x):
        self.calls += 1
        self.recent.append(self.calls)
        self.nested["sums"][0] += 1
        self.nested["sums"][1].append(self.calls)
        self.meter.update()
        self.mean.update(float(self.calls))
        self.kept += 1
        self.passing = self.passing + 1
        if not self.training:
            return x
        traces = [self.calls, sum(self.recent), self.nested["sums"][0], len(self.nested["sums"][1]), self.meter.total]
        traces += [len(self.meter.seen), self.mean.compute(), self.kept, self.passing]
        return x * (1 + sum(1e-4 * (place + 1) * float(trace) for place, trace in enumerate(traces)))


class SharedBuffer(nn.Module):
    """Has the buffer of another layer, and updates it."""

    def __init__(self, buffer):
        super().__init__()
        self.register_buffer("shared", buffer)

    def forward(self, x):
        if self.training:
            self.shared.mul_(0.9)
        return x * (1 + self.shared.clone())


class Drawing(nn.Module):
    """Draws from a generator of its own, and in training from the global one."""

    def __init__(self):
        super().__init__()
        self.own = {"rng": [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)]}

    def forward(self, x):
        first, second, third = self.own["rng"]
        noise = torch.rand((), generator=first) + second.random() + third.random()
        return x + 0.1 * float(noise) * torch.rand(WIDTH) if self.training else x


class Lookup(nn.Module):
    """An embedding, whose weight is perhaps changed in place by the forward pass."""

    def __init__(self, max_norm):
        super().__init__()
        self.table = nn.Embedding(4, WIDTH, max_norm=max_norm)

    def forward(self, x):
        return x + self.table(x[:, 0].detach().abs().mul(2).long().clamp(max=3))


class Scales(nn.Module):
    """Parameters in a list and a dictionary."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterList([nn.Parameter(torch.rand(WIDTH) + 0.5) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.rand(WIDTH)), "b": self.factors[0]})

    def forward(self, x):
        return x * self.factors[0] * self.factors[1] + self.shifts["a"] - self.shifts["b"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.cell(x[:, None].expand(-1, 2, -1))[0][:, -1]


class Cached(nn.Module):
    """Uses a parametrized weight twice, computed once."""

    def __init__(self):
        super().__init__()
        self.inner = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        with parametrize.cached():
            return self.inner(torch.tanh(self.inner(x)))


class Doubled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * (1 + self.scale)


class Remembering(nn.Module):
    """Keeps what it computed last, with the graph that it hangs on."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(WIDTH, WIDTH), None

    def forward(self, x):
        self.last = self.inner(x)
        return self.last.tanh()


def linear():
    return nn.Linear(WIDTH, WIDTH)


def doubled(shared=[]):  # noqa: B006 - emptied by `build`: layers share one parametrization
    shared or shared.append(Doubled())
    layer = linear()
    parametrize.register_parametrization(layer, "weight", shared[0])
    return layer


def materialised():
    layer = nn.LazyLinear(WIDTH)
    layer(torch.zeros(1, WIDTH))
    return layer


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(linear())


PARTS = {
    "linear": linear,
    "frozen": lambda: linear().requires_grad_(False),
    "half frozen": lambda: nn.Sequential(linear(), linear().requires_grad_(False)),
    "weight_norm": lambda: parametrizations.weight_norm(linear()),
    "spectral_norm": lambda: parametrizations.spectral_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "twice parametrized": lambda: parametrizations.spectral_norm(parametrizations.weight_norm(linear())),
    "shared parametrization": doubled,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": lambda: nn.utils.spectral_norm(linear()),
    "cached parametrization": Cached,
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
    "lazy": materialised,
    "counting": Counting,
    "drawing": Drawing,
    "lookup": lambda: Lookup(None),
    "renormalised lookup": lambda: Lookup(0.5),
    "scales": Scales,
    "recurrent": Recurrent,
    "remembering": Remembering,
    # those that share something with a layer before
    "tied": None,
    "tied, transposed": None,
    "tied twice": None,
    "shared buffer": None,
    "the same module": None,
}
PLACES = ["attribute", "Sequential", "ModuleList", "ModuleDict", "deep", "two names", "hidden", "hidden deep", "object"]
HOOKS = {
    "none": lambda layer: None,
    "forward": lambda layer: layer.register_forward_hook(_count_forward),
    "forward, changing": lambda layer: layer.register_forward_hook(lambda module, args, out: out * 1.5),
    "pre": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,)),
    "pre, with keywords": lambda layer: layer.register_forward_pre_hook(_keep, with_kwargs=True),
    "full backward": lambda layer: layer.register_full_backward_hook(_count_backward),
    "full backward, changing": lambda layer: layer.register_full_backward_hook(_halve),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(lambda module, grads: None),
    "tensor": lambda layer: [p.register_hook(lambda grad: grad * 0.5) for p in layer.parameters() if p.requires_grad],
    "post-accumulate": lambda layer: [
        p.register_post_accumulate_grad_hook(_halve_grad) for p in layer.parameters() if p.requires_grad
    ],
}
OF_TENSORS = ("tensor", "post-accumulate")
ENGINES = ["auto", "hooks", "vmap", "loop"]


def _count_forward(module, args, out):
    module.forwards = getattr(module, "forwards", 0) + 1
    return out * (1 + 1e-3 * module.forwards) if module.training else out


def _count_backward(module, grad_input, grad_output):
    module.backwards = getattr(module, "backwards", 0) + 1


def _halve(module, grad_input, grad_output):
    return tuple(None if grad is None else grad * 0.5 for grad in grad_input)


def _halve_grad(value):
    value.grad.mul_(0.5)


def _keep(module, args, kwargs):
    return args, kwargs


@dataclass(frozen=True)
class Spec:
    """What a module is built from."""

    layers: tuple[tuple[str, str, str], ...]  # part, place, hooks
    optimizer: str
    with_grads: bool

    def __repr__(self):
        return f"Spec({self.layers!r}, {self.optimizer!r}, {self.with_grads})"


SPECS = st.builds(
    Spec,
    layers=st.lists(
        st.tuples(st.sampled_from(list(PARTS)), st.sampled_from(PLACES), st.sampled_from(list(HOOKS))),
        min_size=1,
        max_size=4,
    ).map(tuple),
    optimizer=st.sampled_from(["SGD", "Adam", "with hidden"]),
    with_grads=st.booleans(),
)


class Holder:
    """An object that is no module."""


class Built(ClassificationMixin, L.LightningModule):
    def __init__(self, spec):
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.paths, self.optimizer_name = [], spec.optimizer
        before = [self.first, linear()]
        self.other = before[1]
        for number, (part, place, hooks) in enumerate(spec.layers):
            layer = self._make(part, before)
            HOOKS[hooks](layer)
            before.append(layer)
            self._put(f"layer{number}", place, layer)
        self.last = nn.Linear(WIDTH, 3)
        if spec.with_grads:
            for value in self.parameters():
                value.grad = torch.ones_like(value)

    @staticmethod
    def _make(part, before):
        linears = [layer for layer in before[1:] if type(layer) is nn.Linear and isinstance(layer.weight, nn.Parameter)]
        if part.startswith("tied"):
            return Tied(linears[-1], "transposed" in part, "twice" in part)
        if part == "shared buffer":
            found = [layer.shared for layer in before if isinstance(layer, SharedBuffer)]
            return SharedBuffer(found[-1] if found else torch.rand(WIDTH))
        return before[-1] if part == "the same module" else PARTS[part]()

    def _put(self, name, place, layer):
        """Hold a layer somewhere; what is noted is the way to it."""
        held = {
            "attribute": lambda: (layer, ()),
            "Sequential": lambda: (nn.Sequential(nn.Identity(), layer), (1,)),
            "ModuleList": lambda: (nn.ModuleList([layer]), (0,)),
            "ModuleDict": lambda: (nn.ModuleDict({"a": layer}), ("a",)),
            "deep": lambda: (nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(layer)])}), ("a", 0, 0)),
            "two names": lambda: (nn.ModuleList([nn.Sequential(layer), layer]), (0,)),
            "hidden": lambda: ([layer], (0,)),
            "hidden deep": lambda: ({"a": [{"b": (layer,)}]}, ("a", 0, "b", 0)),
            "object": lambda: (Holder(), ()),
        }[place]()
        if place == "object":
            held[0].layer = layer
        setattr(self, name, held[0])
        self.paths.append((name, held[1], place == "object"))

    def layers(self):
        for name, keys, is_object in self.paths:
            found = getattr(self, name)
            for key in keys:
                found = found[key]
            yield found.layer if is_object else found

    def train(self, mode=True):
        """Hidden layers change their mode with the others: else dropout would make outputs random."""
        for layer in self.layers():
            layer.train(mode)
        return super().train(mode)

    def forward(self, x):
        x = self.other(self.first(x))
        for layer in self.layers():
            x = layer(x)
        return self.last(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        """With the hidden layers' parameters, or without: then their gradients grow from step to step."""
        own = list(self.parameters())
        if self.optimizer_name == "SGD":
            return torch.optim.SGD(own, lr=0.05, momentum=0.9)
        if self.optimizer_name == "with hidden":
            own += [value for layer in self.layers() for value in layer.parameters()]
            own = list({id(value): value for value in own}.values())
        return torch.optim.Adam(own, lr=0.02)

    def on_train_batch_end(self, *_):
        """Let the gradients of hidden layers take part in training."""
        with torch.no_grad():
            for layer in self.layers():
                for value in layer.parameters():
                    if value.grad is not None:
                        self.last.bias.add_(1e-3 * value.grad.sum())


def build(spec):
    doubled.__defaults__[0].clear()
    L.seed_everything(0, verbose=False)
    return Built(spec)


def without_tensor_hooks(spec):
    """What they do to a gradient is for the optimizer, and no part of the model."""
    layers = tuple((part, place, "none" if hooks in OF_TENSORS else hooks) for part, place, hooks in spec.layers)
    return replace(spec, layers=layers)


# --- What must be the same, found in a slow and obvious way: everything that is reached from a module. ---


def everything(root):
    """Return (objects, value) by path. Objects are held, so that their identities stay theirs."""
    found, seen = {}, {}
    registered = {id(value) for value in root.parameters()}

    def note(path, owner, value):
        found[path] = (owner, value)

    def hooks_of(tensor):
        return [*(tensor._backward_hooks or {}).values(), *(tensor._post_accumulate_grad_hooks or {}).values()]

    def visit(path, value):
        if isinstance(value, (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)):
            note(path, None, value)
            return
        if id(value) in seen:
            note(path, value, seen[id(value)])
            return
        seen[id(value)] = path
        if isinstance(value, Tensor):
            version = value._version if id(value) in registered else None
            note(path, value, (value.tolist(), value.requires_grad, type(value), version))
            note(f"{path}:hooks", hooks_of(value), None)
            if value.is_leaf:
                visit(f"{path}:grad", value.grad)
        elif isinstance(value, torch.Generator):
            note(path, value, value.get_state().tolist())
        elif isinstance(value, np.random.Generator):
            note(path, value, value.bit_generator.state)
        elif isinstance(value, random.Random):
            note(path, value, value.getstate())
        elif isinstance(value, dict):
            note(path, [value, *value], len(value))
            for place, (key, held) in enumerate(value.items()):  # hooks are counted on from module to module
                visit(f"{path}[{key if isinstance(key, str) else place}]", held)
        elif isinstance(value, (list, tuple, deque, set)):
            note(path, value, len(value))
            for place, held in enumerate(value):
                visit(f"{path}[{place}]", held)
        elif isinstance(value, weakref.ref):
            visit(f"{path}()", value())
        elif callable(value) and not isinstance(value, nn.Module):
            note(path, value if not hasattr(value, "__self__") else None, None)
        else:
            note(path, value, type(value))
            for key, held in getattr(value, "__dict__", {}).items():
                if key not in ("_trainer", "_fabric"):
                    visit(f"{path}.{key}", held)

    visit("module", root)
    return found


def random_states():
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), state[1].tolist(), state[2], random.getstate()


def optimizers_of(trainer):
    found = []
    for optimizer in trainer.optimizers:
        held = [id(value) for group in optimizer.param_groups for value in group["params"]]
        state = [
            (id(owner), key, id(value), value.tolist(), value._version)
            for owner, entries in optimizer.state.items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        ]
        found.append((id(optimizer), held, state))
    return found


class untouched:  # noqa: N801 - read as a word
    """Asserts that what is done within leaves no trace, also where it raises."""

    def __init__(self, module, trainer):
        self.module, self.trainer = module, trainer

    def __enter__(self):
        self.before = everything(self.module)
        self.others = random_states(), optimizers_of(self.trainer)

    def __exit__(self, *_):
        after = everything(self.module)
        assert_same_paths(after, self.before)
        differ = [path for path, (owner, value) in self.before.items() if not same(after[path], owner, value)]
        assert not differ, [(path, self.before[path], after[path]) for path in differ[:4]]
        assert (random_states(), optimizers_of(self.trainer)) == self.others


def assert_same_paths(found, expected):
    more, fewer = [path for path in found if path not in expected], [path for path in expected if path not in found]
    assert not more, more[:9]
    assert not fewer, fewer[:9]
    assert list(found) == list(expected)


def same(entry, owner, value):
    is_same = entry[0] is owner
    if type(owner) is list and entry[0] is not owner:  # of several objects
        is_same = len(entry[0]) == len(owner) and all(one is other for one, other in zip(entry[0], owner, strict=True))
    return is_same and repr(entry[1]) == repr(value)  # repr, as NaN is itself


class Watched(TRAKCallback):
    """Sees to it that the callback leaves no trace, hook by hook."""

    def on_train_start(self, trainer, pl_module):
        with untouched(pl_module, trainer):
            super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with untouched(pl_module, trainer):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, *args):
        with untouched(pl_module, trainer):
            super().on_train_batch_end(trainer, pl_module, *args)

    def on_fit_end(self, trainer, pl_module):
        with untouched(pl_module, trainer):
            super().on_fit_end(trainer, pl_module)


# --- The three properties. ---


def fit(root, module, *callbacks):
    """Train two steps, a checkpoint saved after each; return what training comes to, in values."""
    L.seed_everything(1, verbose=False)
    saving = ModelCheckpoint(root, every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(root, saving, *callbacks, max_epochs=1)
    trainer.fit(module, DataLoader(DATA, 4, shuffle=True))
    optimizers = [value for optimizer in trainer.optimizers for value in optimizer.state_dict()["state"].items()]
    values = {path: repr(value) for path, (_, value) in everything(module).items()}
    return trainer, (values, repr(optimizers), random_states())


DATA = make_data(8)
TARGETS = TensorDataset(*make_data(3, seed=1).tensors)

# Of modules that count in training mode the loss is another each time; this is not what is tested.
OF_LOSSES = ["In evaluation mode the loss of", "On the first batch Built.training_step returned"]


def check(tmp, spec, gradients):
    _, expected = fit(tmp / "without", build(spec))
    module, trak = build(spec), Watched(tmp / "store", projector="identity", gradients=gradients)
    result, refusal = attempt(lambda: fit(tmp / "with", module, trak))
    if refusal is not None:
        assert gradients in ("hooks", "vmap"), refusal  # the others can differentiate them all
        assert f"gradients={gradients!r} cannot differentiate this model" in str(refusal)
        assert_same(fit(tmp / "after", module)[1], expected)
        return
    trainer, found = result
    assert_same(found, expected)
    for attribute in (lambda: trainer.attribute(dataloaders=DataLoader(TARGETS, 2)), trainer.attribute_self):
        with untouched(module, trainer):
            _, refusal = attempt(attribute)
        if refusal is not None:  # the first checkpoint does not hold what hidden layers were then
            assert "The stored " in str(refusal)
            assert hidden_values(module) != hidden_values(build(spec))
    store = FeatureStore(tmp / "store")
    assert len(store.digests) == 2
    entry = store[store.digests[-1]]
    weights = load_weights(entry.weights_path, entry.digest)
    expected = reference(spec, module, weights, list(store.manifest["parameters"]))
    torch.testing.assert_close(torch.from_numpy(np.array(entry.features)).double(), expected, rtol=2e-3, atol=2e-4)


def attempt(call):
    """Return what a call gives, or its refusal."""
    try:
        return call(), None
    except ValueError as error:
        return None, error


def assert_same(found, expected):
    values, others = found[0], expected[0]
    assert_same_paths(values, others)
    differ = [path for path in values if values[path] != others[path]]
    assert not differ, [(path, values[path], others[path]) for path in differ[:4]]
    assert found[1:] == expected[1:]


def reference(spec, trained, weights, names):
    """Differentiate every example by itself, in float64, with a module built anew."""
    module = build(without_tensor_hooks(spec))
    module.load_state_dict(weights)
    module.double().eval()
    for layer, same_layer in zip(module.layers(), trained.layers(), strict=True):
        if not registered(module, layer):
            layer.load_state_dict(same_layer.state_dict())
        layer.double()
    own = dict(module.named_parameters())
    rows = []
    for x, y in DATA:
        output = module.model_output((x[None].double(), y[None]))
        grads = torch.autograd.grad(output.sum(), [own[name] for name in names], allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(own[name]) if grad is None else grad.detach()).flatten()
                    for name, grad in zip(names, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def hidden_values(module):
    hidden = [layer for layer in module.layers() if not registered(module, layer)]
    return [value.tolist() for layer in hidden for value in (*layer.parameters(), *layer.buffers())]


def registered(module, layer):
    return any(part is layer for part in module.modules())


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(spec=SPECS, gradients=st.sampled_from(ENGINES))
def test_any_structure(tmp_path_factory, spec, gradients):
    with warnings.catch_warnings():
        for message in OF_LOSSES:
            warnings.filterwarnings("ignore", message=message)
        check(tmp_path_factory.mktemp("structure"), spec, gradients)
