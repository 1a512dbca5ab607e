"""``python -m lightning_trak``, as a user runs it: a process with an exit status, and errors of one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_trak import FeatureStore
from lightning_trak.__main__ import main
from tests.commands.conftest import chunk, flip
from tests.store.test_store import MANIFEST

ROOT = Path(__file__).parents[2]
COMMANDS = ("info", "top", "report", "verify", "clean")


def command_line(*arguments, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "lightning_trak", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", ["kronecker"])
def test_the_exit_status_of_damage(store, tmp_path):
    flip(chunk(store))
    done = command_line("verify", store, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "\nDamaged: " in done.stdout


@pytest.mark.parametrize("kind", ["kronecker"])
def test_nothing_is_deleted_by_a_process_without_a_terminal(store, tmp_path):
    flip(chunk(store))
    done = command_line("clean", store, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "Nothing was deleted: there is no terminal to ask at. Pass --yes to delete.\n"
    assert chunk(store).exists()
    assert command_line("clean", store, "--yes", cwd=tmp_path).returncode == 0
    assert not chunk(store).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of {info,top,report,verify,clean}"),
        (["inform", "x"], "invalid choice: 'inform'"),
        (["info"], "required: store. "),
        (["top"], "required: store. "),
        (["top", "x", "report.html"], "nrecognized arguments: report.html. "),
        (["top", "x", "--k", "few"], '"k"'),
        (["verify", "x", "--yes"], "nrecognized arguments: --yes. "),
        (["clean", "x", "--yes=1"], "--yes"),
    ],
)
def test_wrong_arguments(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.endswith("'python -m lightning_trak --help' shows what is expected.\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_no_store(run, tmp_path, name):
    status, out, err = run(name, tmp_path / "none")
    assert (status, out) == (2, "")
    assert err == f"error: '{tmp_path}/none' is no directory. Pass the dirpath of TRAKCallback.\n"
    status, _, err = run(name, tmp_path)
    assert status == 2
    assert err.endswith("has no manifest.json, so it is no feature store. Pass the dirpath of TRAKCallback.\n")
    FeatureStore.create(tmp_path / "trak", MANIFEST)
    assert run(name, tmp_path)[2].endswith(f" Did you mean '{tmp_path}/trak'?\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_url(run, name):
    error = "error: 's3://bucket/store' is a URL. Copy the store to a local folder, and pass that.\n"
    assert run(name, "s3://bucket/store") == (2, "", error)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_of_another_version(run, tmp_path, name):
    FeatureStore.create(tmp_path, MANIFEST)
    (tmp_path / "manifest.json").write_text('{"format_version": 3}')
    status, _, err = run(name, tmp_path)
    assert status == 2
    assert err.startswith(f"error: The store '{tmp_path}' has format_version=3; ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["info", "clean"])
def test_a_damaged_manifest(run, tmp_path, name):
    FeatureStore.create(tmp_path, MANIFEST)
    flip(tmp_path / "manifest.json")
    status, _, err = run(name, tmp_path)
    assert status == 2
    assert "manifest.json' is damaged: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_a_directory_of_retrained_subsets(run, tmp_path, name):
    (tmp_path / "runs").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    status, _, err = run(name, tmp_path)
    assert status == 2
    assert "has the runs of retrain_subsets" in err


def test_help(tmp_path):
    done = command_line("--help", cwd=tmp_path, COLUMNS="100")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m lightning_trak ")
    assert all(f"\n    {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "")
    assert out.startswith("usage: python -m lightning_trak ")
    assert f" {name} " in out.partition("\n\n")[0]
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("kind", ["kronecker"])
def test_a_reader_that_has_seen_enough(store, tmp_path):
    command = f"{sys.executable} -m lightning_trak info {store} | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stderr == ""
