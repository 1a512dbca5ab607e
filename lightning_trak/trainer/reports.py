"""What the user is told, each thing once."""

from __future__ import annotations

from lightning_trak.trainer.framework import (
    rank_zero_info,
    rank_zero_warn,
)


class Reports:
    """What the user is told while a model is trained and attributed: each thing once, in one line."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, what: str, about: str | None = None) -> None:
        """Tell something; if it is ``about`` a thing that something was told about, do not."""
        if self._is_new(about):
            rank_zero_info(f"TRAKCallback: {' '.join(what.split())}")

    def tell_once(self, what: str) -> None:
        """Tell something, unless just that was told."""
        self.tell(what, about=what)

    def warn(self, what: str, about: str) -> None:
        """Warn of something, once."""
        if self._is_new(about):
            rank_zero_warn(what)

    def _is_new(self, about: str | None) -> bool:
        new = about is None or about not in self._told
        self._told |= set() if about is None else {about}
        return new
