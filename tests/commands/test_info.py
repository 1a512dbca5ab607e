"""``info``: what is in a store, in a few lines."""

from __future__ import annotations

import re

import pytest

from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.commands.info import info
from tests.commands.conftest import N, checkpoints, chunk, data, empty, flip, tree
from tests.conftest import Classifier, make_trainer
from tests.store.processes import held
from tests.store.test_store import MANIFEST, WEIGHTS, fill


def test_a_store_of_checkpoint_files(store, kind, run):
    before = tree(store)
    status, out, err = run("info", store)
    assert (status, err) == (0, "")
    assert f"{store}: 2 checkpoints of 0 runs, 2 of them with all rows, " in out
    assert re.search(r"^train set +150 examples, 64 rows in a chunk$", out, re.M)
    assert re.search(r"^parameters +63 in 6 tensors$", out, re.M)
    assert re.search(rf"^preconditioner +{kind}$", out, re.M)
    assert re.search(r"^projection +\w+, proj_dim=\d+, seed=0", out, re.M)
    assert re.search(r"^format +2$", out, re.M)
    for path, epoch in zip(FeatureStore(store).digests, (0, 1), strict=True):
        assert re.search(rf"^{path[:12]} .* 150 of 150 .* epoch={epoch}-step=\d+\.ckpt$", out, re.M)
    assert re.search(r"^blobs +7 +2 +[\d.]+ kB$", out, re.M)
    assert "Damaged" not in out
    assert "Left by" not in out
    assert "At work" not in out
    assert tree(store) == before, "info has changed something"


def test_a_store_of_two_runs(tmp_path, run):
    for _ in range(2):
        trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", preconditioner="none"), max_epochs=1)
        trainer.fit(Classifier(), data())
    out = run("info", tmp_path / "store")[1]
    assert "2 checkpoints of 2 runs, 2 of them with all rows" in out
    metas = [entry.meta for entry in FeatureStore(tmp_path / "store")]
    for meta in metas:
        line = rf"^{meta['digest'][:12]}  {meta['run'][:8]} +0 +18  150 of 150 .* {meta['file']}$"
        assert re.search(line, out, re.M), out


def test_what_is_missing_is_counted(store, run):
    chunk(store, 0, 64).unlink()
    out = run("info", store)[1]
    assert "1 of them with all rows" in out
    assert re.search(rf"^{checkpoints(store)[0].name[:12]} .* 86 of {N} ", out, re.M)


def test_who_works_at_what(store, run):
    first, second = checkpoints(store)
    (second / "train" / "0000000064.lock").touch()  # of a process that was killed
    locks = [first / "train" / f"{start:010d}.lock" for start in (0, 128)]
    with held(*locks, second / "whitening.lock"):
        out = run("info", store)[1]
    assert f"checkpoint {first.name[:12]}: 2 chunks of rows that begin with row 0, 128." in out
    assert f"checkpoint {second.name[:12]}: the curvature." in out
    assert out.count("At work now") == 2
    assert "Left by processes that ended: 1 item" in out
    assert "Left by processes that ended: 3 items" in run("info", store)[1]


@pytest.mark.parametrize("damaged", ["meta.json", "whitening.safetensors", "weights.safetensors"])
def test_a_damaged_checkpoint_does_not_hide_the_others(store, run, damaged):
    first, second = checkpoints(store)
    if damaged == "weights.safetensors":
        (first / damaged).unlink()
    elif (first / damaged).exists():
        flip(first / damaged)
    status, out, _ = run("info", store)
    assert status == 0
    assert re.search(rf"^{second.name[:12]} .* 150 of 150 ", out, re.M)
    known = damaged == "whitening.safetensors"  # arrays are not read
    assert bool(re.search(rf"^{first.name[:12]} .* damaged ", out, re.M)) != known
    assert ("verify" in out) != known


def test_damaged_scores(store, run):
    empty(store / "scores" / "blobs" / "attribution.json")
    assert re.search(r"^blobs +damaged ", run("info", store)[1], re.M)


def test_many_checkpoints_with_long_names_are_readable_at_100_columns(tmp_path, capsys):
    store = FeatureStore.create(tmp_path, {**MANIFEST, "n_train": 1_281_167})
    for number in range(300):
        file = f"epoch={number}-validation_accuracy_of_the_first_split=0.1234.ckpt"
        meta = {"epoch": number, "global_step": 1000 * number, "run": "0123456789abcdef" * 2, "file": file}
        store.add(f"{number:032x}", meta, WEIGHTS)
    info(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 320
    assert max(map(len, lines[1:])) <= 100
    assert sum("0 of 1281167" in line and "epoch=" in line for line in lines) == 300


def test_an_empty_store(tmp_path, capsys):
    store = FeatureStore.create(tmp_path, MANIFEST)
    assert info(tmp_path) == 0
    assert ": 0 checkpoints of 0 runs, 0 of them with all rows" in capsys.readouterr().out
    fill(store.add("d1", {}, WEIGHTS))
    assert info(tmp_path) == 0
    assert re.search(r"^d1 +- +- +-  6 of 6 ", capsys.readouterr().out, re.M)
