"""Progress in a notebook: one line of a cell, however many bars there are."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from lightning_trak.trainer.host.progress import progress


class Shell:
    """Stands for the shell of a notebook, and keeps what its cells display."""

    def __init__(self):
        self.execution_count, self.cells, self.kernel = 1, {}, object()

    def display(self, content, *, raw, display_id):
        assert raw
        assert display_id
        shown = self.cells.setdefault(self.execution_count, [])
        shown.append(content["text/plain"])
        place = len(shown) - 1
        return SimpleNamespace(update=lambda new, raw: shown.__setitem__(place, new["text/plain"]))


@pytest.fixture
def shell(monkeypatch):
    shell = Shell()
    shell.execution_count = id(shell)  # no cell of another test
    module = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=shell.display))
    monkeypatch.setitem(sys.modules, "IPython", module)
    return shell


TRAINER = SimpleNamespace(progress_bar_callback=SimpleNamespace(), is_global_zero=True)
QUIET = SimpleNamespace(progress_bar_callback=None, is_global_zero=True)


def bars(trainer, number):
    for checkpoint in range(1, number + 1):
        with progress(trainer, f"Checkpoint {checkpoint}", 3) as advance:
            for _ in range(3):
                advance(1)


def test_many_bars_leave_one_line_in_each_cell(shell, capsys):
    bars(TRAINER, 32)
    first = shell.execution_count
    shell.execution_count += 1
    bars(TRAINER, 2)
    assert [len(lines) for lines in shell.cells.values()] == [1, 1]
    assert shell.cells[first][0].startswith("Checkpoint 32: done. ")
    assert capsys.readouterr() == ("", "")


def test_a_bar_says_how_far_it_is(shell):
    with progress(TRAINER, "Scoring", 8):
        (lines,) = shell.cells.values()
        assert lines == ["Scoring: 0 of 8"]


def test_no_line_where_the_trainer_shows_no_bars(shell, capsys):
    bars(QUIET, 2)
    assert not shell.cells
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_bars(shell, capsys):
    del shell.kernel  # as in IPython
    bars(TRAINER, 2)
    assert not shell.cells
    assert "Checkpoint 2" in capsys.readouterr().err
