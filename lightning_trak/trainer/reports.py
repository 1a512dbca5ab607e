"""Messages to the user, each once."""

from __future__ import annotations

from lightning_trak.trainer.framework import rank_zero_info, rank_zero_warn


class Reports:
    """Prints messages during training and attribution, each once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

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
            rank_zero_warn(what)

    def _is_new(self, about: str | None) -> bool:
        new = about is None or about not in self._told
        self._told |= set() if about is None else {about}
        return new
