"""One line about an attribution."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from lightning_trak import Attribution
from lightning_trak.influence import Extremes, Ranked, Spread
from lightning_trak.metrics import spearman
from lightning_trak.results.convergence import agreement_of_all
from lightning_trak.results.info import AttributionInfo
from lightning_trak.results.status import status_of

RULE = "from the training time"
INFO = AttributionInfo(
    30,
    4,
    tuple("abcdefgh"),
    "sparse",
    2048,
    "auto",
    True,
    (3.1,) * 8,
    (RULE,) * 8,
    runs=2,
    n_attributed=66,
    n_params=66,
)
GENERATOR = torch.Generator().manual_seed(0)
COMMON = torch.randn(30, 4, generator=GENERATOR)
NOISE = torch.randn(8, 30, 4, generator=GENERATOR)


def attribution(noise, info=INFO):
    sample = COMMON + noise * NOISE
    return Attribution(sample.mean(0), info, Spread(sample.std(0), sample))


def test_everything_in_one_line():
    found = attribution(0.3)
    assert repr(found) == str(found)
    start = (
        "Attribution of 30 training examples for 4 targets: 8 checkpoints of 2 runs, 66 of 66 parameters, damping 3.1"
    )
    assert repr(found).startswith(f"{start} from the training time, halves agree 0.9")
    assert "\n" not in repr(found)


def test_halves_agree_as_convergence_says():
    for noise in (0.3, 5.0):
        found = attribution(noise)
        assert f"halves agree {found.convergence().agreement[-1]:.2f}" in repr(found)


def test_agreement_of_halves_against_all_splits():
    """Twenty random splits of six checkpoints, against the mean over all ten."""
    sample = COMMON + NOISE[:6]
    splits = [half for half in combinations(range(6), 3) if 0 in half]
    every = [
        spearman(sample[list(half)].mean(0), sample[[i for i in range(6) if i not in half]].mean(0)).mean()
        for half in splits
    ]
    found = Attribution(sample.mean(0), INFO, Spread(sample.std(0), sample)).convergence(splits=200).agreement[-1]
    assert found == pytest.approx(torch.stack(every).mean().item(), abs=0.01)


def test_what_to_do_where_halves_do_not_agree():
    assert "with another seed" not in repr(attribution(0.3))
    line = repr(attribution(5.0))
    assert "only: the ranks of training examples are uncertain. Average over more checkpoints: fit again" in line


def test_it_is_cheap():
    """Nothing is read or computed for it."""

    class Kept:
        def spread(self):
            raise AssertionError("was computed")

    line = repr(Attribution(COMMON, INFO, kept=Kept()))
    assert line.endswith("damping 3.1 from the training time")


def test_many_targets_are_sampled():
    sample = COMMON[:, :1].expand(30, 5000) + 0.3 * torch.randn(4, 30, 5000, generator=GENERATOR)
    info = replace(INFO, n_targets=5000)
    found = Attribution(sample.mean(0), info, Spread(sample.std(0), sample))
    said = float(repr(found).rpartition(" ")[2])
    assert said == pytest.approx(found.convergence(splits=5).agreement[-1], abs=0.02)


@pytest.mark.parametrize("shape", [(1, 30, 4), (8, 1, 4), (3, 30, 4)])
def test_few_checkpoints_or_examples(shape):
    sample = COMMON[: shape[1]].expand(shape)
    found = Attribution(COMMON, INFO, Spread(COMMON, sample))
    assert ("halves agree 1.00" in repr(found)) == (shape == (3, 30, 4))


def test_what_is_not_known_is_left_out():
    ranked = Ranked(torch.tensor([[0]]), torch.tensor([[0.5]]))
    info = AttributionInfo(1, 1, ("a",), "sparse", 2048, 0.3, True)
    line = "Attribution of 1 training example for 1 target: 1 checkpoint"
    assert repr(Attribution(Extremes(ranked, ranked), info)) == line


def test_dampings():
    def line(values, rules):
        return status_of(2, 0, (0, 0), "", values, rules)

    assert line([0.3, 0.3], ["as given"] * 2) == "2 checkpoints, damping 0.3 as given"
    assert line([0.3, 0.1], ["as given", "by chance"]) == "2 checkpoints, damping 0.1 to 0.3 as given or by chance"
    assert line([0.3, 0.3], ["least, as at an optimum"] * 2).endswith("damping 0.3 (least, as at an optimum)")


@pytest.mark.parametrize(("checkpoints", "distinct"), [(2, 1), (4, 3)])
def test_each_split_of_few_checkpoints_is_compared_once(monkeypatch, checkpoints, distinct):
    compared = []

    def noting(*halves):
        compared.append(halves)
        return spearman(*halves)

    monkeypatch.setattr("lightning_trak.results.convergence.spearman", noting)
    agreement_of_all(torch.randn(checkpoints, 9, 3))
    assert len(compared) == distinct
