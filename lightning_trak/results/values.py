"""Values as text: labels, predictions, values of tables."""

from __future__ import annotations

from lightning_trak.results.kinds import Scalar
from lightning_trak.results.numbers import number_text

_OF_A_WORD = 200  # characters of a token, a name or a value


def value_text(value: Scalar) -> str:
    """Return a value of a table, a label or a prediction as text.

    >>> value_text(True), value_text(3), value_text(0.25), value_text("cat"), value_text(None)
    ('yes', '3', '0.250', 'cat', '')
    """
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return cut(value) if isinstance(value, str) else number_text(value)


def label_text(label: Scalar) -> str:
    """Return a label or a prediction as text: a class by its name, also where it is stored as a real number.

    >>> label_text(1.0), label_text(True), label_text(0.25)
    ('1', 'yes', '0.250')
    """
    name = class_of(label)
    return value_text(label if name is None else name)


def class_of(value: Scalar) -> str | int | None:
    """Return a label or a prediction as the name of a class; None for what is a real number.

    >>> class_of(1.0), class_of("cat"), class_of(0.5)
    (1, 'cat', None)
    """
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value


def cut(text: object, length: int = _OF_A_WORD) -> str:
    """Return a word that is not too long.

    >>> cut("attribution", 4)
    'attr…'
    """
    word = str(text)
    return word if len(word) <= length else f"{word[:length]}…"
