"""The README keeps its word: its Python blocks run, in their order, as one program; its commands are as promised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.filterwarnings("ignore:.*val_dataloader.*", "ignore:.*`test_step`.*")
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["attribution"].top(10).indices.shape == (50, 10)


def test_there_are_exactly_two_commands():
    commands = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert [command.strip() for command in commands] == [
        'pip install -e ".[examples]" && python examples/digits.py',
        'pip install -e ".[dev]" && pytest',
    ]
