"""What the user gets back: rankings, files, pictures."""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np
import pytest
import torch

from lightning_trak import Attribution
from lightning_trak.influence import Extremes, Ranked, Spread
from lightning_trak.results.info import AttributionInfo

SCORES = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
INFO = AttributionInfo(12, 6, ("aa", "bb"), "sparse", 2048, 0.3, True, (0.3, 0.3), ("as given", "as given"), 1.3)


@pytest.fixture
def full():
    return Attribution(SCORES, INFO)


@pytest.fixture
def extremes():
    top, bottom = (SCORES.topk(4, dim=0, largest=largest) for largest in (True, False))
    return Attribution(Extremes(Ranked(top[1].T, top[0].T), Ranked(bottom[1].T, bottom[0].T)), INFO)


@pytest.fixture(params=["full", "extremes"])
def either(request):
    return request.getfixturevalue(request.param)


def test_top_and_bottom_against_sorting(either):
    for column in range(6):
        order = np.argsort(-SCORES[:, column].numpy())
        indices, values = either.top(3)
        assert indices[column].tolist() == order[:3].tolist()
        assert torch.equal(values[column], SCORES[indices[column], column])
        assert either.bottom(3).indices[column].tolist() == order[::-1][:3].tolist()


def test_limits_of_k(full, extremes):
    assert full.top(12).indices.shape == (6, 12)
    for attribution, k, limit in ((full, 0, 12), (full, 13, 12), (extremes, 5, 4)):
        with pytest.raises(ValueError, match=f"between 1 and {limit}.*got {k}"):
            attribution.bottom(k)


def test_scores_of_extremes(extremes):
    with pytest.raises(AttributeError, match="Only the 4 highest and lowest"):
        extremes.scores  # noqa: B018


def test_save_and_load(tmp_path, either):
    either.save(tmp_path / "deep" / "place")
    either.save(tmp_path / "deep" / "place")  # replaces
    loaded = Attribution.load(tmp_path / "deep" / "place")
    assert loaded.info == INFO
    for side in ("top", "bottom"):
        assert torch.equal(getattr(loaded, side)(4).indices, getattr(either, side)(4).indices)
        assert torch.equal(getattr(loaded, side)(4).values, getattr(either, side)(4).values)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["place"]


def test_save_does_not_replace_what_is_not_its_own(tmp_path, full):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no saved attribution"):
        full.save(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_other_files_stay(tmp_path, full):
    full.save(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("years of work")
    full.save(tmp_path / "a")
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "a").iterdir())
    assert names == ["attribution.json", "notes.txt", "scores"]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_save_that_is_interrupted_leaves_the_earlier_attribution(tmp_path, either, monkeypatch):
    """Whichever step is the last: the old scores or the new ones are there, whole."""
    later = Attribution(SCORES + 1, INFO, outputs=torch.zeros(INFO.n_targets))
    steps, replace_file = 0, os.replace
    for allowed in range(4):
        either.save(tmp_path / "a")
        steps = 0

        def replace_some(source, target, allowed=allowed):
            nonlocal steps
            steps += 1
            if steps > allowed:
                raise OSError("interrupted")
            replace_file(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_some)
            with suppress(OSError):
                later.save(tmp_path / "a")
        found = Attribution.load(tmp_path / "a")
        assert torch.equal(found.top(1).values, (later if allowed == 3 else either).top(1).values)
    assert len(files_of(tmp_path / "a")) == 3  # the index, scores and outputs of the last: nothing else is left


def test_a_first_save_that_fails_can_be_tried_again(tmp_path, full, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", no_space)
        with pytest.raises(OSError, match="no space"):
            full.save(tmp_path / "a")
    assert not files_of(tmp_path / "a")
    (tmp_path / "a" / "scores-0123abcd.npy").write_bytes(b"of a process that was killed")
    full.save(tmp_path / "a")
    assert torch.equal(Attribution.load(tmp_path / "a").scores, full.scores)


def test_every_damage_is_noticed(tmp_path, full):
    full.save(tmp_path / "a")
    rng = np.random.default_rng(0)
    for name, content in files_of(tmp_path / "a").items():
        path = tmp_path / "a" / name
        for _ in range(30):
            changed = bytearray(content)
            changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with pytest.raises(ValueError, match="is damaged.*Compute it again"):
                Attribution.load(tmp_path / "a")
        for rest in (content[:-30], b""):
            path.write_bytes(rest)
            with pytest.raises(ValueError, match="is damaged"):
                Attribution.load(tmp_path / "a")
        path.write_bytes(content)
    assert torch.equal(Attribution.load(tmp_path / "a").scores, full.scores)
    with pytest.raises(FileNotFoundError, match="no saved attribution"):
        Attribution.load(tmp_path / "nowhere")


def ensemble(checkpoints, noise, n=60, m=4):
    """Every checkpoint's scores are the same but for noise of its own."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(n, m, generator=generator) + noise * torch.randn(checkpoints, n, m, generator=generator)
    info = AttributionInfo(n, m, tuple(map(str, range(checkpoints))), "sparse", 8, 0.3, True)
    return Attribution(sample.mean(0), info, Spread(sample.std(0) / checkpoints**0.5, sample))


def test_convergence_of_independent_checkpoints():
    """Halves of c checkpoints with noise σ correlate as 1 / (1 + σ² / (c/2)), in ranks a little less."""
    found = ensemble(12, noise=1.5).convergence()
    assert found.checkpoints == [2, 4, 6, 8, 10, 12]
    expected = [1 / (1 + 1.5**2 / (c / 2)) for c in found.checkpoints]
    assert found.agreement == pytest.approx(expected, abs=0.06)
    assert ensemble(5, noise=0.0).convergence().agreement == pytest.approx([1, 1])


def test_spread_is_saved(tmp_path):
    attribution = ensemble(3, noise=1.0)
    attribution.save(tmp_path / "saved")
    loaded = Attribution.load(tmp_path / "saved")
    assert torch.equal(loaded.standard_error, attribution.standard_error)
    assert loaded.convergence() == attribution.convergence()


def test_spread_that_is_not_known():
    attribution = Attribution(torch.zeros(3, 2), AttributionInfo(3, 2, ("a",), "sparse", 8, 0.3, True))
    for ask in (lambda: attribution.standard_error, attribution.convergence):
        with pytest.raises(AttributeError, match="two checkpoints or more, without top_k and calibrate; here are 1"):
            ask()
