"""What is printed of targets, against sorting in Python."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lightning_trak.influence import Extremes, Ranked
from lightning_trak.results.attribution import Attribution
from lightning_trak.results.info import AttributionInfo
from lightning_trak.results.ranking import target_texts

N, M = 30, 4
INFO = AttributionInfo(N, M, ("a1b2",), "sparse", 2048, 0.3, True)
SCORES = torch.randn(N, M, generator=torch.Generator().manual_seed(0))


def sides(text):
    """The ids on both sides of a printed table without labels; no id is longer than its title."""
    _, titles, *lines = text.splitlines()
    place = titles.index("id") + 2
    parts = [(line[:place].split(), line[place:].split()) for line in lines]
    return tuple([int(part[side][1]) for part in parts if part[side]] for side in (0, 1))


def slow(scores, k):
    """The rows of the k highest scores above zero, and of the k lowest below, of one target."""
    ranked = sorted(range(N), key=lambda row: scores[row])
    return (
        [row for row in reversed(ranked) if scores[row] > 0][:k],
        [row for row in ranked if scores[row] < 0][:k],
    )


@pytest.mark.parametrize("k", [1, 5, N])
def test_both_sides_of_each_target(k):
    scores = SCORES.clone()
    scores[:, 2] = SCORES[:, 2].abs()
    scores[:5, 2] *= -1  # few are harmful
    texts = list(target_texts(Attribution(scores, INFO), [3, 0, 2], k))
    for column, text in zip((3, 0, 2), texts, strict=True):
        assert re.match(rf"Target {column}\n +helpful  id +harmful  id\n", text)
        assert sides(text) == slow(scores[:, column].tolist(), k)
        assert len(text.splitlines()) == 2 + max(map(len, slow(scores[:, column].tolist(), k)))


def test_extremes_alone():
    top, bottom = SCORES.T.topk(3), (-SCORES.T).topk(3)
    kept = Extremes(Ranked(top.indices, top.values), Ranked(bottom.indices, -bottom.values))
    few, all_of_them = (
        list(target_texts(one, range(M), 3)) for one in (Attribution(kept, INFO), Attribution(SCORES, INFO))
    )
    assert few == all_of_them
    assert list(target_texts(Attribution(kept, INFO), range(M), 9)) == few


def test_a_target_without_influence():
    scores = torch.cat([SCORES[:, :1], torch.zeros(N, 1), SCORES[:, 1:2]], 1)
    texts = list(target_texts(Attribution(scores, replace(INFO, n_targets=3)), range(3)))
    assert texts[1] == "Target 1\n  No training example has a score other than 0."
    assert sides(texts[2]) == slow(scores[:, 2].tolist(), 5)


def test_what_is_known_of_targets():
    attribution = Attribution(SCORES, INFO, outputs=torch.tensor([0.5, -1.25, 0.0, 3.0])).with_columns(
        train={"id": [f"{row}\x1b[2J" for row in range(N)]},
        targets={"id": ["a", "b", "c", "d"], "label": ["cat", None, "dog", 1], "prediction": [0.25, 1, 2, "x\ny"]},
    )
    first, second, _, last = target_texts(attribution, range(M), 1)
    assert first.startswith("Target a: label cat, prediction 0.250, output 0.500\n")
    assert second.startswith("Target b: prediction 1, output -1.25\n")
    assert last.startswith("Target d: label 1, prediction x y, output 3.00\n")
    assert "\x1b" not in first
    assert r"\x1b[2J" in first
