"""Every transition of the selector, with engines whose fate is written down beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_trak.gradients import ENGINES, EngineUnsuitable, LoopEngine, ModelFunction, NotPrepared, Selector, Trial
from lightning_trak.gradients.check import GradientsDiffer

N = 20


class Scripted:
    """An engine that computes as the loop does, and does what its script says, call by call."""

    batch_size = None

    def __init__(self, name, script, log):
        self.name, self.script, self.log, self.engine = name, script, log, LoopEngine()

    def step(self, what, size):
        self.log.append(f"{self.name[0]}{what[0]}{size}")
        event = self.script.pop(0) if self.script else None
        if isinstance(event, Exception):
            raise event
        return event

    def prepare(self, function, batch, size):
        self.step("prepares", size)

    def __call__(self, function, batch, size, sink):
        factor = self.step("computes", size) or 1
        function.model_output  # noqa: B018 - as all engines do
        return self.engine(
            function, batch, size, lambda rows, name, gradient: sink(rows, name, Scaled(gradient, factor))
        )

    def __str__(self):
        return self.name


class Scaled:
    """Gradients times a number: wrong, unless that is 1."""

    def __init__(self, gradient, factor):
        self.gradient, self.factor, self.size = gradient, factor, gradient.size

    def __getitem__(self, rows):
        return Scaled(self.gradient[rows], self.factor)

    def weighted_sum(self, weights):
        return self.factor * self.gradient.weighted_sum(weights)


UNSUITABLE, UNPREPARED, FULL = (
    EngineUnsuitable("it is tired"),
    NotPrepared("a new layer"),
    torch.OutOfMemoryError("full"),
)
OK = None

# What engines do call by call, and what is then called: (h)ooks or (v)map (p)repares or (c)omputes so many examples.
# Three are tried first; then the rows come by eights.
CASES = {
    "all is well": (
        {"hooks": []},
        "hp3 hc3 hc8 hc8 hc4",
    ),
    "the first engine cannot be prepared": (
        {"hooks": [UNSUITABLE], "vmap": []},
        "hp3 vp3 vc3 vc8 vc8 vc4",
    ),
    "the first engine fails in the trial": (
        {"hooks": [OK, UNSUITABLE], "vmap": []},
        "hp3 hc3 vp3 vc3 vc8 vc8 vc4",
    ),
    "the trial shows what was not prepared": (
        {"hooks": [OK, UNPREPARED]},
        "hp3 hc3 hp3 hc3 hc8 hc8 hc4",
    ),
    "a batch shows what was not prepared": (
        {"hooks": [OK, OK, OK, UNPREPARED]},
        "hp3 hc3 hc8 hc8 hp8 hc8 hc8 hc4",
    ),
    "what was not prepared cannot be": (
        {"hooks": [OK, OK, UNPREPARED, UNSUITABLE], "vmap": []},
        "hp3 hc3 hc8 hp8 vp3 vc3 vc8 vc8 vc4",
    ),
    "an engine fails at a batch": (
        {"hooks": [OK, OK, OK, UNSUITABLE], "vmap": []},
        "hp3 hc3 hc8 hc8 vp3 vc3 vc8 vc4",
    ),
    "memory runs out at a batch": (
        {"hooks": [OK, OK, OK, FULL]},
        "hp3 hc3 hc8 hc8 hc4 hc4 hc4",
    ),
    "memory runs out in the trial": (
        {"hooks": [OK, FULL]},
        "hp3 hc3 hc1 hc2 hc2 hc2 hc2 hc2 hc2 hc2 hc2 hc2 hc2",
    ),
}


@pytest.fixture
def scripted(monkeypatch):
    """Put scripted engines in the place of all; returns what is called."""

    def install(scripts):
        log = []
        for name in list(ENGINES):
            script = list(scripts.get(name, [EngineUnsuitable("it has no part in this")]))
            monkeypatch.setitem(ENGINES, name, lambda name=name, script=script: Scripted(name, script, log))
        return log

    return install


def model():
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    net.model_output = lambda x: net(x).squeeze(1)
    return ModelFunction(net, net.state_dict(), ["weight", "bias"])


def run(selector, function, checkpoint="a", given=True):
    """Work on all rows; returns them in the order in which they were done."""
    data, done = torch.randn(N, 2), []

    def prepare():
        return selector.prepare(function, checkpoint, lambda: Trial(function, data[:3], 3, data[:1]), 8)

    def read(rows, size):
        for part in torch.tensor(list(rows)).split(size):
            yield part.tolist(), data[part]

    def work(engine, rows, batch):
        engine(function, batch, len(rows), lambda *_: None)
        done.extend(rows)

    selector.run(list(range(N)), 8, read, prepare, work, function)
    return done


@pytest.mark.parametrize("case", CASES)
def test_transitions(scripted, case):
    scripts, expected = CASES[case]
    log = scripted(scripts)
    assert run(Selector("auto", batch_size=8), model()) == list(range(N))
    assert log == expected.split()


def test_what_was_chosen_holds_at_the_next_checkpoint_and_is_checked_there(scripted):
    log, selector = scripted({"hooks": []}), Selector("auto", batch_size=8)
    for checkpoint in ("a", "b", "b"):
        run(selector, model(), checkpoint)
    assert log.count("hp3") == 1
    assert log.count("hc3") == 2


def test_wrong_gradients_at_a_later_checkpoint_are_prepared_for_anew(scripted):
    script = [OK, OK, *[OK] * 3, 2.0]
    log, selector = scripted({"hooks": script}), Selector("auto", batch_size=8)
    run(selector, model(), "a")
    run(selector, model(), "b")
    assert log[5:8] == ["hc3", "hp3", "hc3"]


def test_wrong_gradients_of_a_fresh_engine_are_an_error(scripted):
    scripted({"hooks": [OK, 2.0]})
    with pytest.raises(GradientsDiffer, match="gradients of weight do not add up"):
        run(Selector("auto", batch_size=8), model())


@pytest.mark.parametrize(("gradients", "others"), [("auto", ""), ("hooks", r" Use gradients='auto' or 'loop'\.")])
def test_no_engine_is_left(scripted, gradients, others):
    scripted({name: [UNSUITABLE] for name in ENGINES})
    with pytest.raises(ValueError, match=rf"gradients='{gradients}' cannot .* this model: it is tired\.{others}$"):
        run(Selector(gradients, batch_size=8), model())


def test_an_engine_that_takes_one_example_at_a_time_is_tried_on_one(scripted, monkeypatch):
    monkeypatch.setattr(Scripted, "batch_size", 1)
    log = scripted({"loop": []})
    assert run(Selector("loop"), model()) == list(range(N))
    assert log == ["lp3", *["lc1"] * (1 + N)]


def test_one_example_that_does_not_fit_is_an_error(scripted):
    scripted({"hooks": [OK, FULL, FULL, FULL]})
    with pytest.raises(torch.OutOfMemoryError):
        run(Selector("auto", batch_size=8), model())


def test_it_says_what_it_chose_and_why_once(scripted):
    said = []
    scripted({"hooks": [OK, OK, OK, UNSUITABLE], "vmap": []})
    run(Selector("auto", 8, said.append), model())
    assert said == ["gradients by hooks.", "gradients by vmap; not hooks, as it is tired."]


def test_what_comes_up_late_is_checked_too(scripted):
    """A layer that no example of the trial reaches, with a wrong rule."""
    scripted({"hooks": [OK, OK, OK, UNPREPARED, OK, 2.0]})
    with pytest.raises(GradientsDiffer, match="gradients of weight do not add up"):
        run(Selector("auto", batch_size=8), model())


def test_examples_that_can_never_be_prepared_for_end_in_another_engine(scripted):
    log = scripted({"hooks": [OK, UNPREPARED, OK, UNPREPARED], "vmap": []})
    assert run(Selector("auto", batch_size=8), model()) == list(range(N))
    assert log[:5] == ["hp3", "hc3", "hp3", "hc3", "vp3"]
