"""A small version of ``python -m tests.faults``, in a process of its own: forks want a single thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.faults.trials import Found, stories

NUMBERS = {"kills": 8, "damages": 16, "processes": 4, "power": 6}
OPTIONS = {"kills": "--kills", "damages": "--damages", "processes": "--trials", "power": "--cuts"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the trials found, by part."""
    file = tmp_path_factory.mktemp("faults") / "found.jsonl"
    asked = [word for part, number in NUMBERS.items() for word in (OPTIONS[part], str(number))]
    command = [sys.executable, "-m", "tests.faults", *asked, "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    every = [Found(**json.loads(line)) for line in file.read_text().splitlines()]
    return {part: [one for one in every if one.part == part] for part in NUMBERS}


@pytest.mark.parametrize("part", list(NUMBERS))
def test_nothing_goes_wrong(found, part):
    assert len(found[part]) >= NUMBERS[part]
    assert all(one.good for one in found[part]), stories(found[part])
