"""Scores on disk against the same scores in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trak import Attribution, evaluate
from lightning_trak.evaluation.ground_truth import GroundTruth
from lightning_trak.influence import Spread
from lightning_trak.metrics import LinearDatamodelingScore, predicted_outputs
from lightning_trak.results.info import AttributionInfo
from lightning_trak.results.stored_scores import StoredScores
from lightning_trak.store.chunks import Chunks
from lightning_trak.store.files import Damaged

N, M = 11, 5
WHOLE = torch.randn(N, M, generator=torch.Generator().manual_seed(0))
INFO = AttributionInfo(N, M, ("aa", "bb"), "sparse", 2048, 0.3, True, (0.3, 0.3), ("as given", "as given"), 1.3)


def stored(folder, size=3, whole=WHOLE):
    chunks = Chunks(folder, "example", len(whole), size)
    for rows in chunks.all():
        chunks.write(rows.start, {"scores": whole[rows.start : rows.stop].numpy()})
    return StoredScores(chunks, whole.shape[1])


INDEX = st.one_of(
    st.integers(-4, 4),
    st.slices(5),
    st.lists(st.integers(-5, 4), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=5, max_size=5).map(torch.tensor),
).filter(lambda key: not isinstance(key, slice) or (key.step or 1) > 0)


@settings(max_examples=150, deadline=None)
@given(rows=INDEX, columns=INDEX, size=st.integers(1, 6))
def test_parts_are_those_of_the_tensor(tmp_path_factory, rows, columns, size):
    whole = WHOLE[:5]
    scores = stored(tmp_path_factory.mktemp("scores"), size, whole)
    assert torch.equal(scores[rows], whole[rows])
    assert torch.equal(scores[:, columns], whole[:, columns])
    if isinstance(rows, int | slice) or isinstance(columns, int | slice):
        assert torch.equal(scores[rows, columns], whole[rows, columns])
    else:
        with pytest.raises(IndexError, match="cannot both be lists"):
            scores[rows, columns]


def test_products_and_multiples(tmp_path):
    scores, masks = stored(tmp_path), torch.rand(4, N) < 0.5
    torch.testing.assert_close(masks.float() @ scores, masks.float() @ WHOLE)
    torch.testing.assert_close(predicted_outputs(scores * 2.0, masks), masks.float() @ (2 * WHOLE))
    torch.testing.assert_close((scores * 2.0 * 3.0)[:], 6 * WHOLE)
    assert (len(scores), scores.shape, scores.ndim) == (N, (N, M), 2)


@pytest.mark.parametrize("k", [1, 4, N])
def test_rankings(tmp_path, k):
    one, other = Attribution(stored(tmp_path), INFO), Attribution(WHOLE, INFO)
    for mine, theirs in ((one.top(k), other.top(k)), (one.bottom(k), other.bottom(k))):
        assert torch.equal(mine.indices, theirs.indices)
        assert torch.equal(mine.values, theirs.values)


def test_evaluation(tmp_path):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(30, N, generator=generator) < 0.5
    noise = torch.randn(30, M, generator=generator)
    truth = GroundTruth(masks, (masks.float() @ WHOLE + noise)[:, None])
    one, other = evaluate(Attribution(stored(tmp_path), INFO), truth), evaluate(WHOLE, truth)
    assert one.lds == pytest.approx(other.lds)
    assert one.slope == pytest.approx(other.slope)
    metric = LinearDatamodelingScore()
    metric.update(masks.float() @ stored(tmp_path / "again"), truth.outputs)
    assert metric.compute().item() == pytest.approx(one.lds)


def saved(tmp_path):
    spread = Spread(stored(tmp_path / "errors", 4, WHOLE.abs()), torch.randn(2, 3, M))
    attribution = Attribution(stored(tmp_path / "own") * 2.0, INFO, spread, outputs=torch.arange(5.0))
    attribution.save(tmp_path / "saved")
    return attribution


def test_saved_and_loaded(tmp_path):
    attribution = saved(tmp_path)
    loaded = Attribution.load(tmp_path / "saved")
    assert isinstance(loaded.scores, StoredScores)
    assert torch.equal(loaded.scores[:], 2 * WHOLE)
    assert torch.equal(loaded.standard_error[:], WHOLE.abs())
    assert torch.equal(loaded.outputs, attribution.outputs)
    assert loaded.convergence() == attribution.convergence()
    loaded.save(tmp_path / "saved")  # onto itself
    assert torch.equal(Attribution.load(tmp_path / "saved").scores[:], 2 * WHOLE)
    assert len(list((tmp_path / "saved").iterdir())) == 5  # the index, two folders, outputs and sample
    Attribution(WHOLE, INFO).save(tmp_path / "saved")
    assert torch.equal(Attribution.load(tmp_path / "saved").scores, WHOLE)
    assert len(list((tmp_path / "saved").iterdir())) == 2
    assert torch.equal(attribution.scores[:], 2 * WHOLE)  # their own files stay


def test_saving_works_where_the_disk_has_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("os.link", refuse)
    saved(tmp_path)
    assert torch.equal(Attribution.load(tmp_path / "saved").scores[:], 2 * WHOLE)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "swapped"])
def test_damage_is_named(tmp_path, damage):
    saved(tmp_path)
    first, second, *_ = sorted((tmp_path / "saved").glob("scores-*/*.safetensors"))
    content = bytearray(first.read_bytes())
    first.unlink()  # it shares its content with the file that it was saved from
    if damage == "flipped":
        content[-3] ^= 1
        first.write_bytes(content)
    elif damage == "cut":
        first.write_bytes(content[:-7])
    elif damage == "swapped":
        other = second.read_bytes()
        second.unlink()
        first.write_bytes(other)
        second.write_bytes(content)
    if damage == "gone":
        with pytest.raises(ValueError, match=r"some are missing. Compute it again"):
            Attribution.load(tmp_path / "saved")
        return
    with pytest.raises(Damaged, match="0000000000.safetensors' is damaged"):
        Attribution.load(tmp_path / "saved").top(2)


@pytest.mark.parametrize("array", [np.zeros((2, 4), "f4"), np.zeros((2, 5), "f8"), np.zeros((3, 5), "f4")])
def test_chunks_of_another_form_are_refused(tmp_path, array):
    chunks = Chunks(tmp_path, "example", 2, 2)
    chunks.write(0, {"scores": array})
    with pytest.raises(Damaged, match="in place of scores|another number of rows"):
        StoredScores(chunks, 5)[0]
