"""``report``: the HTML file that ``Attribution.report`` writes without data."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_trak import Attribution, FeatureStore
from tests.store.test_store import MANIFEST


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_report_of_the_library(store, run):
    Attribution.load(store / "scores" / "blobs").report("expected.html", k=3)
    status, out, err = run("report", store, "--k", 3, "--output", "new/one.html")
    assert (status, err) == (0, "")
    assert Path("new/one.html").read_bytes() == Path("expected.html").read_bytes()
    assert out.startswith(f"The report is in '{Path.cwd()}/new/one.html' (")
    assert "attribution.report(path, train=..., targets=...)" in out


def test_the_default_file(store, run):
    Path("report.html").write_text("former")
    assert run("report", store / "scores" / "blobs")[0] == 0
    assert len(Path("report.html").read_text()) > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "report.txt"], "--output must end in .html, so that browsers open it; got 'report.txt'."),
        (["--k", 0], "k must be a positive integer, got 0."),
        (["--name", "none"], "has no scores named 'none'. Choose one with --name: blobs."),
    ],
)
def test_wrong_arguments(store, run, arguments, message):
    status, out, err = run("report", store, *arguments)
    assert (status, out) == (2, "")
    assert err.endswith(f"{message}\n")
    assert not list(Path.cwd().glob("*.html"))


def test_a_folder_that_cannot_be_written(store, run):
    Path("file").touch()
    status, _, err = run("report", store, "--output", "file/report.html")
    assert status == 2
    assert err.count("\n") == 1


def test_no_scores(tmp_path, run):
    FeatureStore.create(tmp_path / "empty", MANIFEST)
    assert "has no saved scores" in run("report", tmp_path / "empty")[2]
