"""The featurization loop when memory runs out, an engine gives up, or a rule is wrong: nothing lost, and said so."""

from __future__ import annotations

import re

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.gradients import ENGINES, EngineUnsuitable, HooksEngine, layer_rule
from lightning_trak.store.chunks import Claim
from tests.conftest import Blobs, Classifier, Shift, make_trainer

N, M = 40, 7


def fit(root, *, module=Classifier, data=None, max_epochs=2, **options):
    """Train, featurizing into ``root / "store"`` each epoch's checkpoint."""
    L.seed_everything(0, verbose=False)
    trak, saving = (
        TRAKCallback(root / "store", preconditioner="none", **options),
        ModelCheckpoint(root / "files", save_top_k=-1),
    )
    trainer, model = make_trainer(root, trak, saving, max_epochs=max_epochs), module()
    trainer.fit(model, datamodule=data or Blobs())
    return trainer


def featurize(run, root, *, module=Classifier, data=None, **options):
    """Attribute the run's checkpoint files with a new store; returns the scores and the store."""
    files = sorted((run / "files").iterdir())
    trainer = make_trainer(root, TRAKCallback(root / "store", preconditioner="none", **options))
    scores = trainer.attribute(module(), datamodule=data or Blobs(), ckpt_path=files).scores
    return scores, FeatureStore(root / "store")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One trained run of two checkpoints, and its scores."""
    root = tmp_path_factory.mktemp("run")
    trainer = fit(root)
    return root, trainer.attribute().scores


@pytest.fixture
def written(monkeypatch):
    """The rows of each batch of the train set that went into a store."""
    batches = []
    write = Claim.write

    def noting(self, rows, arrays):
        if self._chunks.folder.name == "train":
            batches.append(list(rows))
        assert {len(rows)} == {len(array) for array in arrays.values()}
        write(self, rows, arrays)

    monkeypatch.setattr(Claim, "write", noting)
    return batches


def assert_each_row_once(batches, checkpoints=2):
    assert [row for rows in batches for row in rows] == [*range(N)] * checkpoints


def assert_same_store(one, other):
    assert one.digests == other.digests
    for digest in one.digests:
        for name in ("features", "loss_grad", "curvature"):
            expected = getattr(other[digest], name)
            np.testing.assert_allclose(
                getattr(one[digest], name), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max()
            )


def assert_same_scores(scores, expected):
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


class Wrapped:
    """An engine with which something happens before a batch is computed; prepared like the one within."""

    def __init__(self, engine, before):
        self.engine, self.before = engine, before
        self.name, self.batch_size = engine.name, engine.batch_size
        self.prepare = engine.prepare

    def __call__(self, function, batch, size, sink):
        self.before(size)
        return self.engine(function, batch, size, sink)

    def __str__(self):
        return str(self.engine)


@pytest.fixture
def wrap(monkeypatch):
    """Make something happen before every batch that an engine computes."""

    def register(name, before):
        kind = ENGINES[name]
        monkeypatch.setitem(ENGINES, name, lambda: Wrapped(kind(), before))

    return register


@pytest.fixture
def memory(monkeypatch):
    """Set how much memory is free; returns how often it was asked for."""
    asked = []

    def set_free(free):
        monkeypatch.setattr("lightning_trak.gradients.memory.free_bytes", lambda device: asked.append(device) or free)
        return asked

    return set_free


# ------------------------------------------------------------------------------------------- out of memory


def full_above(limit):
    def check(size):
        if size > limit:
            raise torch.OutOfMemoryError(f"{size} examples do not fit")

    return check


def messages_of_halving(*sizes):
    return [f"TRAKCallback: out of memory; going on with batches of {size} examples." for size in sizes]


@pytest.mark.parametrize(
    ("engine", "limit", "batch_size", "halved"),
    [
        ("hooks", 7, 8, [4]),
        ("hooks", 3, 8, [4, 2]),
        ("vmap", 2, 9, [2]),  # three examples are tried first
        ("hooks", 1, 9, [2, 1]),
        ("vmap", 8, 8, []),
        ("hooks", 5, 100, [20, 10, 5]),  # never more than there are
    ],
)
def test_batches_are_halved_until_they_fit(tmp_path, run, wrap, said, written, engine, limit, batch_size, halved):
    root, expected = run
    wrap(engine, full_above(limit))
    scores, store = featurize(root, tmp_path, gradients=engine, batch_size=batch_size)
    assert_each_row_once(written)
    assert max(len(rows) for rows in written) == (halved or [batch_size])[-1] <= limit
    assert_same_store(store, FeatureStore(root / "store"))
    assert_same_scores(scores, expected)
    # found out once, not at every checkpoint, and for train set and targets together
    assert [message for message in said() if "memory" in message] == messages_of_halving(*halved)


def test_batches_are_halved_in_fit(tmp_path, run, wrap, said, written):
    root, _ = run
    wrap("hooks", full_above(3))
    fit(tmp_path, batch_size=8)
    assert_each_row_once(written)
    assert {len(rows) for rows in written} == {2}
    assert_same_store(FeatureStore(tmp_path / "store"), FeatureStore(root / "store"))
    assert [message for message in said() if "memory" in message] == messages_of_halving(4, 2)


def test_what_is_done_when_memory_runs_out_is_kept(tmp_path, run, wrap, written):
    root, expected = run
    sizes = []

    def fails_once(size):
        sizes.append(size)
        if sizes == [3, 8, 8, 8]:  # three examples are tried first
            raise torch.OutOfMemoryError("for once")

    wrap("hooks", fails_once)
    scores, store = featurize(root, tmp_path, batch_size=8)
    assert [len(rows) for rows in written] == [8, 8] + [4] * 6 + [4] * 10
    assert sizes == [3, 8, 8, 8] + [4] * 6 + [3] + [4] * 10 + [4, 3] * 2  # nothing is computed again
    assert_each_row_once(written)
    assert_same_store(store, FeatureStore(root / "store"))
    assert_same_scores(scores, expected)


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_one_example_that_does_not_fit(tmp_path, run, wrap, said, engine):
    wrap(engine, full_above(0))
    with pytest.raises(torch.OutOfMemoryError, match="1 examples do not fit"):
        featurize(run[0], tmp_path, gradients=engine, batch_size=4)
    halvings = [] if engine == "loop" else [2]
    assert [message for message in said() if "memory" in message] == messages_of_halving(*halvings)
    assert not any(entry.complete for entry in FeatureStore(tmp_path / "store"))


def test_a_run_that_ran_out_of_memory_is_continued(tmp_path, run, monkeypatch, wrap, written):
    root, expected = run
    sizes = []
    monkeypatch.setattr("lightning_trak.trainer.featurizing.plan.rows_in_a_chunk", lambda *_: 3)

    def full_after_a_while(size):
        sizes.append(size)
        if len(sizes) > 10:
            raise torch.OutOfMemoryError("no end of it")

    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "hooks", lambda: Wrapped(HooksEngine(), full_after_a_while))
        with pytest.raises(torch.OutOfMemoryError):
            featurize(root, tmp_path, batch_size=3)
    assert 0 < sum(len(rows) for rows in written) < N
    scores, store = featurize(root, tmp_path)
    assert_each_row_once(written)
    assert_same_store(store, FeatureStore(root / "store"))
    assert_same_scores(scores, expected)


@pytest.mark.parametrize("limit", [1, 3])
def test_batches_that_fit_are_found_when_four_examples_do_not(tmp_path, run, wrap, memory, written, limit):
    root, expected = run
    memory(2**40)
    wrap("hooks", full_above(limit))
    scores, store = featurize(root, tmp_path)
    assert_each_row_once(written)
    assert max(len(rows) for rows in written) <= limit
    assert_same_store(store, FeatureStore(root / "store"))
    assert_same_scores(scores, expected)


# ---------------------------------------------------------------------------------------- automatic batch size


def test_batches_are_as_large_as_the_memory_allows(tmp_path, run, memory, said, written):
    root, expected = run
    largest = []
    for power in (8, 12, 13, 20):
        asked = memory(2**power)
        before = len(said())
        scores, store = featurize(root, tmp_path / str(power))
        assert_each_row_once(written)
        largest.append(max(len(rows) for rows in written))
        limited = [message for message in said()[before:] if "free memory" in message]
        what = f"TRAKCallback: batches of {largest[-1]} examples, as many as the free memory allows."
        assert limited == ([] if largest[-1] == 8 else [what])
        assert_same_store(store, FeatureStore(root / "store"))
        assert_same_scores(scores, expected)
        assert 1 <= len(asked) <= 4  # once for train set and targets together, whatever the number of checkpoints
        asked.clear()
        written.clear()
    assert largest == sorted(largest)
    assert largest[0] == 1
    assert largest[-1] == 8
    assert len(set(largest)) > 2


def test_the_batch_size_is_measured_in_fit(tmp_path, run, memory, said, written):
    memory(0)
    fit(tmp_path)
    assert_each_row_once(written)
    assert {len(rows) for rows in written} == {1}
    assert_same_store(FeatureStore(tmp_path / "store"), FeatureStore(run[0] / "store"))
    assert sum("free memory" in message for message in said()) == 1


@pytest.mark.parametrize("free", [2**60, None])
def test_never_larger_than_the_loaders(tmp_path, run, memory, said, written, free):
    memory(free)
    featurize(run[0], tmp_path, data=Blobs(batch_size=6))
    assert max(len(rows) for rows in written) == 6
    assert not any("free memory" in message for message in said())


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_users_batch_size_is_taken_as_it_is(tmp_path, run, memory, said, written, batch_size):
    asked = memory(0)
    featurize(run[0], tmp_path, batch_size=batch_size)
    assert max(len(rows) for rows in written) == batch_size
    assert asked == []
    assert not any("free memory" in message for message in said())


def test_one_example_at_a_time_needs_no_measuring(tmp_path, run, memory, written):
    asked = memory(0)
    featurize(run[0], tmp_path, gradients="loop")
    assert {len(rows) for rows in written} == {1}
    assert asked == []


# ------------------------------------------------------------------------------------------------- which engine


class OwnShift(Classifier):
    """Has a parameter that is used outside every module."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(4))

    def model_output(self, batch):
        x, y = batch
        return super().model_output((x @ torch.diag(self.shift), y))


class Branches(OwnShift):
    """Looks at values too, which vmap cannot."""

    def model_output(self, batch):
        x, y = batch
        return super().model_output((x if x.sum().item() < 1e9 else -x, y))


class Bare(Classifier):
    """Has nothing but such a parameter."""

    def __init__(self):
        super().__init__()
        self.net = nn.Identity()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))

    def forward(self, x):
        return x @ self.weight

    def model_output(self, batch):
        x, y = batch
        return (x @ self.weight).log_softmax(1)[range(len(x)), y]


class BareBranches(Bare):
    def model_output(self, batch):
        x, y = batch
        return super().model_output((x if x.sum().item() < 1e9 else -x, y))


CHOSEN = {
    "hooks": (Classifier, {}, r"gradients by hooks"),
    "only vmap": (Classifier, {"gradients": "vmap"}, r"gradients by vmap"),
    "only the loop": (Classifier, {"gradients": "loop"}, r"gradients by loop"),
    "vmap for a part": (
        OwnShift,
        {},
        r"gradients by hooks, vmap for 1 of 7 parameters \(shift: used outside its module\)",
    ),
    "the loop for a part": (
        Branches,
        {},
        r"gradients by hooks, loop for 1 of 7 parameters \(shift: used outside its module\)",
    ),
    "vmap": (Bare, {}, r"gradients by vmap; not hooks, as no parameter is left to hooks; e\.g\. weight: used .*"),
    "the loop": (
        BareBranches,
        {},
        r"gradients by loop; not hooks, as .*weight.*; not vmap, as vmap failed with RuntimeError: .*\.item\(\).*",
    ),
}


@pytest.mark.filterwarnings("ignore:On the first batch Bare")  # its loss is not that of its output
@pytest.mark.parametrize("case", CHOSEN)
def test_the_engine_is_reported_once_a_fit_with_reasons(tmp_path, said, case):
    module, options, message = CHOSEN[case]
    trainer = fit(tmp_path, module=module, **options)
    for _ in range(2):
        trainer.attribute()
    trainer.attribute_self()
    (engine,) = [line for line in said() if "gradients by" in line]
    assert re.fullmatch(rf"TRAKCallback: {message}\.", engine)
    fit(tmp_path / "again", module=module, **options)
    assert [line for line in said() if "gradients by" in line] == [engine] * 2


@pytest.mark.parametrize(
    ("module", "projector"), [(Classifier, "identity"), (OwnShift, "sparse"), (Branches, "identity")]
)
def test_all_engines_give_the_same(tmp_path, said, module, projector):
    options = {"module": module, "projector": projector, "proj_dim": 24}
    trainer = fit(tmp_path, max_epochs=1, **options)
    expected, store = trainer.attribute().scores, FeatureStore(tmp_path / "store")
    for gradients in ("hooks", "vmap", "loop"):
        if module is Branches and gradients == "vmap":
            continue
        before = len(said())
        scores, other = featurize(tmp_path, tmp_path / gradients, gradients=gradients, **options)
        assert f"gradients by {gradients}" in said()[before]
        assert_same_store(other, store)
        assert_same_scores(scores, expected)


# -------------------------------------------------------------------------------- an engine that gives up later


def gives_up_at(number):
    """Refuse one call of the engine."""
    calls = []

    def check(size):
        calls.append(size)
        if len(calls) == number:
            raise EngineUnsuitable("it is tired")

    return check


@pytest.mark.parametrize("number", [2, 4, 6])
def test_the_next_engine_goes_on(tmp_path, run, wrap, said, written, number):
    root, expected = run
    wrap("hooks", gives_up_at(number))
    scores, store = featurize(root, tmp_path, batch_size=8)
    assert_each_row_once(written)
    assert [len(rows) for rows in written] == [8] * 10
    assert_same_store(store, FeatureStore(root / "store"))
    assert_same_scores(scores, expected)
    assert [line for line in said() if "gradients by" in line] == [
        "TRAKCallback: gradients by hooks.",
        "TRAKCallback: gradients by vmap; not hooks, as it is tired.",
    ]


def test_down_to_the_loop_in_fit(tmp_path, run, wrap, said, written):
    wrap(
        "hooks", gives_up_at(5)
    )  # in the first batch that is featurized: after a trial, a whole batch, and two to measure
    wrap("vmap", gives_up_at(6))  # it is tried on the way, and so is the loop
    fit(tmp_path, batch_size=8)
    assert_each_row_once(written)
    assert [len(rows) for rows in written] == [8] * 4 + [1] * 48
    assert_same_store(FeatureStore(tmp_path / "store"), FeatureStore(run[0] / "store"))
    assert [line for line in said() if "gradients by" in line] == [
        "TRAKCallback: gradients by hooks.",
        "TRAKCallback: gradients by vmap; not hooks, as it is tired.",
        "TRAKCallback: gradients by loop; not hooks, as it is tired; not vmap, as it is tired.",
    ]


def test_for_the_targets_too(tmp_path, run, wrap, said):
    root, expected = run
    wrap("hooks", gives_up_at(13))  # two trials, ten batches of the train set, and then the targets
    scores, _ = featurize(root, tmp_path, batch_size=8)
    assert_same_scores(scores, expected)
    assert [line for line in said() if "gradients by" in line] == [
        "TRAKCallback: gradients by hooks.",
        "TRAKCallback: gradients by vmap; not hooks, as it is tired.",
    ]


@pytest.mark.parametrize("gradients", ["hooks", "vmap"])
def test_the_only_engine_that_may_be_taken_gives_up(tmp_path, run, wrap, written, gradients):
    wrap(gradients, gives_up_at(4))
    message = rf"At checkpoint .*gradients='{gradients}' cannot differentiate this model: it is tired.*'auto'"
    with pytest.raises(ValueError, match=message):
        featurize(run[0], tmp_path, gradients=gradients, batch_size=8)
    assert [len(rows) for rows in written] == [8, 8]


def test_memory_and_engine_fail_in_turn(tmp_path, run, wrap, written):
    root, expected = run
    tired = gives_up_at(6)

    def both(size):
        full_above(5)(size)
        tired(size)

    wrap("hooks", both)
    wrap("vmap", full_above(3))
    scores, store = featurize(root, tmp_path, gradients="auto", batch_size=8)
    assert_each_row_once(written)
    assert_same_store(store, FeatureStore(root / "store"))
    assert_same_scores(scores, expected)


def test_an_engine_that_gives_up_when_it_is_measured(tmp_path, run, wrap, memory, written):
    root, expected = run
    memory(2**40)

    def not_alone(size):
        if size == 1:
            raise EngineUnsuitable("it does not like to be alone")

    wrap("hooks", not_alone)
    scores, store = featurize(root, tmp_path)
    assert_each_row_once(written)
    assert_same_store(store, FeatureStore(root / "store"))
    assert_same_scores(scores, expected)


# ------------------------------------------------------------------------------------ the check of the first batch


class Shifted(Classifier):
    def __init__(self):
        super().__init__()
        self.net.append(Shift())


RULES = {
    "nothing": lambda grad: 0 * grad,
    "twice": lambda grad: 2 * grad,
    "the wrong examples": lambda grad: grad.roll(1, 0),  # their sum is right
    "the mean": lambda grad: grad.mean(0, keepdim=True).expand_as(grad),  # likewise
    "the wrong entries": lambda grad: grad.flip(1),
}


def fit_shifted(root, rule, **options):
    layer_rule(Shift)(lambda layer, call: {"shift": rule(call.grad)})
    return fit(root, module=Shifted, **options)


@pytest.mark.usefixtures("_restored_rules")
@pytest.mark.parametrize(
    ("rule", "featurize_on"), [*((rule, "save") for rule in RULES), ("the wrong examples", "fit_end")]
)
def test_a_wrong_rule_is_noticed_in_fit(tmp_path, written, rule, featurize_on):
    with pytest.raises(ValueError, match=r"gradients of net\.5\.shift do not add up.*layer_rule.*'vmap' or 'loop'"):
        fit_shifted(tmp_path, RULES[rule], featurize_on=featurize_on)
    assert written == []


@pytest.mark.usefixtures("_restored_rules")
@pytest.mark.parametrize("projector", ["identity", "sparse"])
def test_a_wrong_rule_is_noticed_in_attribute(tmp_path, written, projector):
    options = {"projector": projector, "proj_dim": 24}
    fit_shifted(tmp_path, lambda grad: grad, **options)
    layer_rule(Shift)(lambda layer, call: {"shift": RULES["the wrong examples"](call.grad)})
    written.clear()
    with pytest.raises(ValueError, match=r"gradients of net\.5\.shift do not add up"):
        featurize(tmp_path, tmp_path / "wrong", module=Shifted, **options)
    assert written == []
    _, store = featurize(tmp_path, tmp_path / "wrong", module=Shifted, gradients="vmap", **options)  # as is advised
    assert_same_store(FeatureStore(tmp_path / "store"), store)  # and the right rule was not refused


@pytest.mark.usefixtures("_restored_rules")
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_rule_that_is_wrong_for_batches_of_one_size_is_noticed(tmp_path, size):
    """Tried are three examples, and a whole batch."""
    with pytest.raises(ValueError, match=r"gradients of net\.5\.shift do not add up"):
        fit_shifted(tmp_path, lambda grad: grad + 1 if len(grad) == size else grad, batch_size=1 if size == 1 else 8)


@pytest.mark.usefixtures("_restored_rules")
def test_every_checkpoint_is_checked(tmp_path, written):
    def wrong_later(grad):
        return -grad if len(written) >= 5 else grad

    with pytest.warns(UserWarning, match=r"At checkpoint .*step 10\): .*gradients of net\.5\.shift do not add up"):
        fit_shifted(tmp_path, wrong_later, batch_size=8)
    assert [row for rows in written for row in rows] == [*range(N)]
    store = FeatureStore(tmp_path / "store")
    assert [store[digest].complete for digest in store.digests] == [True, False]


@pytest.mark.usefixtures("_restored_rules")
def test_gradients_are_checked_where_memory_runs_out(tmp_path, wrap, written):
    wrap("hooks", full_above(1))
    with pytest.raises(ValueError, match=r"gradients of net\.5\.shift do not add up"):
        fit_shifted(tmp_path, lambda grad: -grad, batch_size=8)
    assert written == []


def test_a_module_may_use_the_same_memory_for_each_batch(run, tmp_path, monkeypatch):
    """What is written in the background is not changed by the next batch."""
    shared, held = torch.empty(N), []

    class Reusing(Classifier):
        def out_to_loss_grad(self, batch):
            own = super().out_to_loss_grad(batch)
            return shared[: len(own)].copy_(own)

    def hold(self, rows, arrays):
        held.append((rows, arrays))
        write(self, rows, arrays)

    write = Claim.write
    monkeypatch.setattr(Claim, "write", hold)
    featurize(run[0], tmp_path, module=Reusing, batch_size=8)
    expected = [entry.loss_grad for entry in FeatureStore(run[0] / "store").entries()]
    found = [np.empty(N), np.empty(N)]
    of_train = [(rows, arrays["loss_grad"]) for rows, arrays in held if arrays["loss_grad"].any()]
    for number, (rows, loss_grad) in enumerate(of_train):
        found[number // (N // 8)][rows] = loss_grad
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
