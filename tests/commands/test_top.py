"""``top``: saved scores as a table, chosen by name, path and target."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lightning_trak import Attribution, FeatureStore
from lightning_trak.results.ranking import target_texts
from tests.commands.conftest import flip, tree
from tests.commands.test_main import ROOT, command_line
from tests.store.test_store import MANIFEST

HOSTILE = "evil\x1b[31m"


def expected(attribution, columns, k=5):
    return "".join(
        f"{text}\n" for text in [attribution, *(f"\n{one}" for one in target_texts(attribution, columns, k))]
    )


def test_the_only_scores_are_chosen(store, run):
    before, attribution = tree(store), Attribution.load(store / "scores" / "blobs")
    whole = (0, expected(attribution, range(7)), "")
    assert run("top", store) == run("top", store, "--name", "blobs") == run("top", store / "scores" / "blobs") == whole
    row = int(attribution.scores[:, 0].argmax())
    assert f" {row} " in whole[1].split("Target 0", 1)[1].splitlines()[2]
    assert tree(store) == before


def test_some_targets_and_ranks(store, run):
    attribution = Attribution.load(store / "scores" / "blobs")
    names = ["3", 3, HOSTILE, "two words", "x" * 99, "f", "g"]
    attribution.with_columns(targets={"id": names}).save(store / "scores" / "named")
    named = Attribution.load(store / "scores" / "named")

    def ask(*targets):
        options = [part for one in targets for part in ("--target", one)]
        return run("top", store, "--name", "named", "--k", 2, *options)

    assert ask("g", "two words") == (0, expected(named, [6, 3], 2), "")
    assert ask("3") == (0, expected(named, [0, 1], 2), "")
    assert ask(HOSTILE) == ask(r"evil\x1b[31m") == (0, expected(named, [2], 2), "")
    assert ask("x" * 27 + "…")[1] == expected(named, [4], 2)
    status, out, err = ask("h")
    assert (status, out) == (2, "")
    assert err == r"error: No target has the id 'h'. Ids of the 7 targets are 3, 3, evil\x1b[31m, ...." + "\n"


def test_one_of_several_names(store, run):
    attribution = Attribution.load(store / "scores" / "blobs")
    for name in (HOSTILE, "third"):
        attribution.save(store / "scores" / name)
    for arguments, problem in (([], "has 3 saved scores"), (["--name", "x"], "has no scores named 'x'")):
        status, out, err = run("top", store, *arguments)
        assert (status, out) == (2, "")
        assert err == (
            rf"error: The store '{store}' {problem}. Choose one with --name: blobs, evil\x1b[31m, third." + "\n"
        )
    assert run("top", store, "--name", HOSTILE)[0] == 0
    assert run("top", store, "--name", "../scores/third")[0] == 2
    assert "Leave --name out" in run("top", store / "scores" / "third", "--name", "third")[2]


def test_many_names_are_not_all_listed(store, run):
    for number in range(30):
        (store / "scores" / f"n{number}" / "other").mkdir(parents=True)
    assert run("top", store)[2].endswith(", n14, n15, n16, ....\n")


def test_no_scores(tmp_path, run):
    FeatureStore.create(tmp_path, MANIFEST)
    status, out, err = run("top", tmp_path)
    assert (status, out) == (2, "")
    assert "has no saved scores. trainer.attribute(..., name='NAME') saves them there" in err


def test_damaged_scores(store, run):
    flip(next((store / "scores" / "blobs").glob("scores-*.npy")))
    status, out, err = run("top", store)
    assert (status, out) == (2, "")
    assert "is damaged: the checksum of" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("k", [0, -3])
def test_k_is_positive(store, run, k):
    assert run("top", store, "--k", k)[::2] == (2, f"error: k must be a positive integer, got {k}.\n")


@pytest.mark.parametrize("kind", ["kronecker"])
def test_pipes(store, tmp_path):
    command = f"{sys.executable} -m lightning_trak top {store} --k 100 | head -n 3"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("kind", ["kronecker"])
def test_a_terminal_without_unicode(store, tmp_path):
    attribution = Attribution.load(store / "scores" / "blobs")
    attribution.with_columns(targets={"id": ["größe", *"abcdef"]}).save(store / "scores" / "blobs")
    done = command_line("top", store, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"Target gr\xf6\xdfe: " in done.stdout
