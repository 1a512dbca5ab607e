"""Plain text for a terminal: aligned tables, sizes, and names, of which control characters are escaped."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_trak.results.numbers import terminal_number

_WIDTH = 28  # characters of an id or a label in a table


def printable(text: str) -> str:
    r"""Return text on one line, in which whatever a terminal would obey, or hide, is an escape like those of Python.

    >>> printable("a\x1b[2Jb"), printable("two\nlines"), printable("Größe")
    ('a\\x1b[2Jb', 'two\\nlines', 'Größe')
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def table(rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Return rows of cells as lines with aligned columns; cells are made `printable`.

    Args:
        rows: the first has the titles.
        right: the titles of the columns that are aligned to the right.

    >>> print(table([("name", "size"), ("a", "12 B"), ("bcdefg", "1.5 MB")], right="size"))
    name      size
    a         12 B
    bcdefg  1.5 MB
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, rows[0], strict=True)
        lines.append("  ".join(cell.rjust(n) if title in right.split() else cell.ljust(n) for cell, n, title in cells))
    return "\n".join(line.rstrip() for line in lines)


def cell_text(value: str | float | bool | None) -> str:
    r"""Return an id or another value of an example as a cell of a table: on one line, and not long.

    >>> cell_text(0.123456), cell_text("of a\n" + "very " * 9), cell_text(None)
    ('0.123', 'of a very very very very ve…', '')
    """
    if value is None:
        return ""
    text = terminal_number(value) if isinstance(value, float) else printable(" ".join(str(value).split()))
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def size_text(size: float) -> str:
    """Return a number of bytes with three digits and a unit.

    >>> size_text(999), size_text(1234), size_text(56_700_000), size_text(2e15)
    ('999 B', '1.23 kB', '56.7 MB', '2000 TB')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 99.95 else f"{size:.3g} {units[0]}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> count(1, "file"), count(2500, "file")
    ('1 file', '2500 files')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def short(name: str, most: int) -> str:
    """Return a name without its middle, if it is longer than ``most``.

    >>> short("epoch=12-val_loss=0.123.ckpt", 20)
    'epoch=12-...123.ckpt'
    """
    tail = (most - 3) // 2
    return name if len(name) <= most else f"{name[: most - 3 - tail]}...{name[-tail:]}"
