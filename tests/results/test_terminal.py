"""Text for a terminal: whatever names say, no terminal obeys it."""

from __future__ import annotations

import pytest

from lightning_trak.results.terminal import cell_text, printable, table

HOSTILE = [*map(chr, range(32)), "\x7f", "\x9b31m", "\u202e", "\u2028", "\ud800"]


@pytest.mark.parametrize("bad", HOSTILE, ids=ascii)
def test_nothing_that_a_terminal_obeys(bad):
    for text in (printable(f"a{bad}b"), cell_text(f"a{bad}b"), table([("name",), (f"a{bad}b",)])):
        assert all(one.isprintable() for one in text.replace("\n", "", 1))
        text.encode()
    assert bad not in table([("name",), (f"a{bad}b",)]).split("\n", 1)[1]


def test_other_text_stays():
    for text in ("Größe", "図 1", "a\\b", "epoch=1.ckpt"):
        assert printable(text) == text


def test_cells_are_short_and_on_one_line():
    assert cell_text("two\nlines") == "two lines"
    assert len(cell_text("x" * 1000)) == 28
    assert [cell_text(one) for one in (3, 0.123456789, True, None)] == ["3", "0.123", "True", ""]
