"""One format for all numbers that are shown: scores, standard errors, outputs, values of tables."""

from __future__ import annotations

import math

MINUS = "\u2212"  # screen readers say "minus" for it, and nothing for a hyphen


def terminal_number(value: float, *, signed: bool = False) -> str:
    """Return `number_text` with a hyphen for the minus sign, which every terminal can show.

    >>> terminal_number(-0.5), terminal_number(2.0, signed=True)
    ('-0.500', '+2.00')
    """
    return number_text(value, signed=signed).replace(MINUS, "-")


def number_text(value: float, *, signed: bool = False) -> str:
    """Return a number with three significant digits; whole numbers as they are.

    Args:
        value: the number.
        signed: whether positive numbers have a plus sign.

    >>> number_text(0.12345), number_text(-1234.5), number_text(7), number_text(0.5, signed=True)
    ('0.123', '−1234', '7', '+0.500')
    >>> number_text(1.5e-7), number_text(0.0, signed=True), number_text(float("nan"))
    ('1.50e−07', '0', 'nan')
    """
    if value == 0:
        return "0"
    if isinstance(value, int):
        text = f"{value:+d}" if signed else str(int(value))
    elif not math.isfinite(value):
        text = f"{value:+}" if signed else str(value)
    elif 999.5 <= abs(value) < 1e6:
        text = f"{value:+.0f}" if signed else f"{value:.0f}"
    else:
        text = (f"{value:+#.3g}" if signed else f"{value:#.3g}").rstrip(".")
    return text.replace("-", MINUS)
