"""The examples run as a user runs them, in a smaller setting."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_digits(tmp_path):
    command = [sys.executable, EXAMPLES / "digits.py", "--epochs", "8", "--output", tmp_path]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (tmp_path / "digits.png").stat().st_size > 20_000
    assert len(re.findall(r"most helpful: #\d+ \(a \d", result.stdout)) == 4
    assert len(re.findall(r"most harmful: #\d+ \(a \d", result.stdout)) == 4
    found = re.search(r"(\d+) of the 40 planted mislabels .* \(AUROC (\d\.\d+)\)", result.stdout)
    assert int(found[1]) >= 15
    assert float(found[2]) > 0.9
    assert len(re.findall(r"#\d+ is labelled \d, it is a \d", result.stdout)) == int(found[1])
