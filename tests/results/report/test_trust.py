"""Settings in words, curves and bars."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest

from lightning_trak.results.info import AttributionInfo
from lightning_trak.results.report.trust import bars, cautions, checkpoints, curve, facts, headline

INFO = AttributionInfo(30, 7, ("aa", "bb"), "sparse", 64, 0.3, True, (0.3, 0.5), ("as given",) * 2, runs=1)
IN_TABLES = {"checkpoints", "dampings", "damping_rules", "loss_explained", "warnings"}


def test_every_field_is_shown_by_name_or_in_a_table():
    found = facts(asdict(INFO))
    assert len(found) == len({field.name for field in fields(AttributionInfo)} - IN_TABLES)
    assert all(fact.name[0].isupper() for fact in found), "a new field needs words: see _facts"
    assert all(fact.value for fact in found)


@pytest.mark.parametrize(
    "change",
    [
        {"curvature": False},
        {"preconditioner": "kronecker"},
        {"calibrated_on": 12},
        {"runs": 3},
        {"damping": "auto"},
        {"estimator": "trak"},
    ],
)
def test_settings_change_what_is_said(change):
    before, after = (facts(asdict(info)) for info in (INFO, replace(INFO, **change)))
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


def test_checkpoints():
    titles, rows = checkpoints(asdict(replace(INFO, loss_explained=(0.9, 1.0))))
    assert titles == ["Number", "Checkpoint", "Damping λ", "Chosen by", "Loss explained"]
    assert rows[1] == ["2", "bb", "0.500", "as given", "1.00"]
    titles, _ = checkpoints(asdict(replace(INFO, dampings=())))
    assert titles == ["Number", "Checkpoint", "Chosen by"]


def test_curve():
    found = curve(([2, 4, 6], [0.2, 0.6, 1.0]))
    xs, ys = [dot[0] for dot in found.dots], [dot[1] for dot in found.dots]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[2] == found.levels[-1][0]  # 1
    assert [text for _, text in found.ticks] == ["2", "4", "6"]
    assert len(curve((list(range(2, 200, 2)), [0.5] * 99)).ticks) == 6
    low = curve(([2], [-0.4]))
    assert 0 < low.dots[0][0] < low.width
    assert low.dots[0][1] == pytest.approx(low.bottom, abs=1)


def test_bars():
    measured = SimpleNamespace(lds=0.4, interval=(0.3, 0.5), ceiling=None, random=-0.01, slope=1.0)
    assert [(bar.name, bar.length, bar.interval) for bar in bars(measured)] == [
        ("These scores", 40.0, (30.0, 50.0)),
        ("Random scores", 0.0, None),
    ]


def test_cautions():
    info = asdict(replace(INFO, warnings=("first",)))
    poor = SimpleNamespace(interval=(-0.1, 0.3))
    good = SimpleNamespace(interval=(0.1, 0.3))
    assert cautions(info, ([2], [0.9]), good, partial=False) == ["first"]
    assert "not shown" in cautions(info, None, poor, partial=False)[1]
    assert "agree by 0.300 only" in cautions(info, ([2], [0.3]), good, partial=False)[1]
    assert "highest and lowest" in cautions(info, None, good, partial=True)[1]


def test_headline():
    assert headline(asdict(INFO)) == "7 targets, 30 training examples, 2 checkpoints of 1 run"
    assert headline(asdict(replace(INFO, runs=0))).endswith("2 checkpoints")
