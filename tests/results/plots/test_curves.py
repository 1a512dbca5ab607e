"""Curves of convergence, self-influence and the LDS."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lightning_trak.evaluation.ground_truth import Evaluation
from lightning_trak.influence import Findings
from lightning_trak.metrics import Interval
from lightning_trak.results.convergence import Convergence
from lightning_trak.results.examples import Examples
from lightning_trak.results.suspects import Suspects

N = 9
SELF_INFLUENCE = torch.tensor([0.1, 5.0, 0.3, 0.2, 2.0, 0.0, 0.7, 0.6, 0.5])
NONE = torch.full((N,), -1)
FINDINGS = Findings(
    loss=torch.linspace(0, 1, N),
    self_influence=SELF_INFLUENCE,
    mislabelled=torch.isin(torch.arange(N), torch.tensor([1, 8])),
    duplicate_of=NONE,
    similarity=NONE.float(),
    leaks=NONE,
    leak_similarity=NONE.float(),
    harmful=torch.arange(N) == 3,
    harm=torch.zeros(N),
)
SUSPECTS = Suspects(FINDINGS, Examples([f"{row}.png" for row in range(N)]))
CONVERGENCE = Convergence([2, 4, 6], [-0.2, 0.5, 0.75])


def evaluation(ceiling=0.875):
    interval = Interval(torch.tensor(0.25), torch.tensor(0.625))
    return Evaluation(0.5, interval, ceiling, 0.0625, torch.tensor([0.5, 0.9, 0.1]), 1.0)


def dots(axis):
    """What is drawn as dots, {x: y}."""
    return {x: y for line in axis.lines if line.get_marker() == "o" for x, y in line.get_xydata().tolist()}


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_convergence():
    figure, axis = CONVERGENCE.plot()
    assert axis.figure is figure
    assert axis.lines[0].get_xydata().tolist() == [[2, -0.2], [4, 0.5], [6, 0.75]]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("checkpoints", "rank correlation of two halves")
    assert axis.get_ylim()[0] < -0.2
    assert axis.get_ylim()[1] > 1
    assert axis.get_xticks().tolist() == [2, 4, 6]
    _, axis = Convergence([2], [0.5]).plot()
    assert axis.get_ylim()[0] < 0


def test_self_influence_is_sorted_and_those_with_something_wrong_are_dots():
    _, axis = SUSPECTS.plot()
    assert axis.lines[0].get_ydata().tolist() == sorted(SELF_INFLUENCE.tolist(), reverse=True)
    assert axis.lines[0].get_xdata().tolist() == list(range(1, N + 1))
    order = sorted(range(N), key=lambda row: -SELF_INFLUENCE[row].item())
    assert dots(axis) == {order.index(row) + 1: SELF_INFLUENCE[row].item() for row in (1, 3, 8)}
    assert legend(axis) == ["all training examples", "something wrong (3)"]
    assert axis.get_xlabel() == "training examples, by rank"
    assert axis.get_ylabel() == "self-influence (in units of the loss)"
    _, axis = SUSPECTS.mislabelled.plot()
    assert len(dots(axis)) == 2
    axis.figure.canvas.draw()
    assert "1" in [label.get_text() for label in axis.get_xticklabels()]


@pytest.mark.parametrize("marked", [[0, 4], torch.isin(torch.arange(N), torch.tensor([0, 4])), ["0.png", "4.png"]])
def test_marked_self_influences(marked):
    _, axis = SUSPECTS.plot(marked)
    assert dots(axis) == {8: SELF_INFLUENCE[0].item(), 2: 2.0}
    assert legend(axis)[1] == "marked (2)"


def test_no_marks_and_marks_that_are_not_there():
    _, axis = SUSPECTS.plot([])
    assert len(axis.lines) == 1
    plt.close("all")
    with pytest.raises(ValueError, match="marked must be rows of the train set, 0 to 8"):
        SUSPECTS.plot([N])
    assert not plt.get_fignums()


def test_lds_with_interval_and_ceiling():
    _, axis = evaluation().plot()
    assert dots(axis) == dict(zip((1, 2, 3), torch.tensor([0.9, 0.5, 0.1]).tolist(), strict=True))
    levels = [line.get_ydata()[0] for line in axis.lines if line.get_marker() != "o"]
    assert levels == [0.5, 0.875, 0.0625]
    box = axis.patches[0].get_bbox()
    assert sorted((box.y0, box.y1)) == [0.25, 0.625]
    told = ["each target", "mean 0.500 (95 %: 0.250 to 0.625)", "noise ceiling 0.875", "random scores 0.0625"]
    assert legend(axis) == told
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("targets, by rank", "LDS (rank correlation)")
    _, axis = evaluation(None).plot()
    assert not any("ceiling" in text for text in legend(axis))


@pytest.mark.parametrize("what", [CONVERGENCE, SUSPECTS, evaluation()], ids=lambda what: type(what).__name__)
def test_axes_that_are_passed(what, monkeypatch):
    figure, axs = plt.subplots(1, 2)
    assert what.plot(ax=axs[1]) == (figure, axs[1])
    assert axs[1].lines
    assert not axs[0].lines
    for ax in (axs, figure, "axes"):
        with pytest.raises(TypeError, match=r"ax must be an Axes of matplotlib, got .*figure, ax = plt.subplots\(\)"):
            what.plot(ax=ax)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        what.plot()


def test_the_whole_figure_is_returned_for_axes_in_a_part_of_it():
    whole = plt.figure()
    figure, axis = CONVERGENCE.plot(ax=whole.subfigures(1, 2)[0].subfigures(2, 1)[1].subplots())
    assert figure is whole
    assert np.allclose(axis.lines[0].get_ydata(), CONVERGENCE.agreement)
