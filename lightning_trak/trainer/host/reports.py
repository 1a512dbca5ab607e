"""Messages to the user, each once."""

from __future__ import annotations

from lightning_trak.trainer.host.framework import rank_zero_info, rank_zero_warn


class Reports:
    """Prints messages during training and attribution, each once.

    Attributes:
        warned: the warnings so far.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self.warned: list[str] = []

    def tell(self, what: str, about: str | None = None) -> None:
        """Print a message in one line, unless an earlier one was ``about`` the same."""
        if self._is_new(about):
            rank_zero_info(f"TRAKCallback: {' '.join(what.split())}")

    def tell_once(self, what: str) -> None:
        """Print a message, unless the same was printed."""
        self.tell(what, about=what)

    def warn(self, what: str, about: str) -> None:
        """Warn, unless an earlier message was ``about`` the same."""
        if self._is_new(about):
            self.warned.append(what)
            rank_zero_warn(what)

    def _is_new(self, about: str | None) -> bool:
        new = about is None or about not in self._told
        self._told |= set() if about is None else {about}
        return new


def time_text(seconds: float) -> str:
    """Return a time as people say it.

    >>> time_text(0.25), time_text(90.0), time_text(5400.0)
    ('0.25 s', '1.5 min', '1.5 h')
    """
    unit, size = next(one for one in (("h", 3600.0), ("min", 60.0), ("s", 0.0)) if seconds >= one[1])
    return f"{seconds / (size or 1):.2g} {unit}"
