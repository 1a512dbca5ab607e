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


def test_custom_task(tmp_path):
    found, of, _, area = numbers(
        "custom_task.py", r"(\d+) of the (\d+) wrong .* first (\d+) .*AUROC (\d\.\d+)", tmp_path
    )
    assert found >= of / 2
    assert area > 0.9


def test_tabular_regression(tmp_path):
    pattern = r"AUROC of (\d\.\d+).*scores +(\d\.\d+) .*random scores +(-?\d\.\d+)"
    area, lds, random = numbers("tabular_regression.py", pattern, tmp_path, "--subsets", "8")
    assert area > 0.6
    assert lds > 0.5 > random
    assert (tmp_path / "tabular_regression.png").stat().st_size > 10_000


def test_tabular_regression_of_a_table(tmp_path):
    rows = ["a,b,price", *(f"{i % 7},{i % 5},{2 * (i % 7) - i % 5}" for i in range(80))]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    options = ["--csv", tmp_path / "table.csv", "--target", "price", "--subsets", "2", "--epochs", "2"]
    numbers("tabular_regression.py", r"(8|6) of (60) train labels", tmp_path, *options)


def numbers(script, pattern, output, *options):
    """Run an example, and return the numbers that it printed."""
    command = [sys.executable, EXAMPLES / script, "--output", output, *options]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in re.search(pattern, result.stdout, re.DOTALL).groups()]
