"""The README keeps its word: its Python blocks run, in their order, as one program; its commands are as promised."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_trak.gradients import HooksEngine, ModelFunction, VmapEngine

README = Path(__file__).parent.parent / "README.md"


def check_rule(scale):
    """The README's rule against vmap, with positions and without."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = scale(3)

        def model_output(self, x):
            return self.scale(x).flatten(1).cos().sum(1)

    model = Model()
    for shape in ((4, 3), (4, 5, 3)):
        batch, found = torch.randn(shape), {}
        function = ModelFunction(model, model.state_dict(), ["scale.factor"])
        for kind in (HooksEngine, VmapEngine):
            engine = kind()
            engine.prepare(function, batch, 4)
            assert "modules" not in str(engine)
            engine(function, batch, 4, partial(_note, found, kind))
        torch.testing.assert_close(found[HooksEngine], found[VmapEngine])


def _note(found, kind, rows, name, gradient):
    found[kind] = gradient.dense()


@pytest.mark.filterwarnings("ignore:.*val_dataloader.*", "ignore:.*`test_step`.*")
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    check_rule(names["Scale"])
    assert names["attribution"].top(10).indices.shape == (50, 10)


def test_there_are_exactly_two_commands():
    commands = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert [command.strip() for command in commands] == [
        'pip install -e ".[examples]" && python examples/digits.py',
        'pip install -e ".[dev]" && pytest',
    ]
