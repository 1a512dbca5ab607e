"""How exactly matrices are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply in float32 whatever the user asked for in training: a matrix of 10 bits cannot be solved with.

    Afterwards the settings are theirs again. Those of `torch.set_float32_matmul_precision` are not even read where
    there are others: torch refuses that where a program used both.
    """
    settings = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn) if _has_own(backend)]
    if not settings:  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(_exact(setting))
        yield


def _has_own(backend: Any) -> bool:
    """Whether a backend has a precision of its own for products."""
    try:
        return isinstance(backend.matmul.fp32_precision, str)
    except AttributeError:
        return False


@contextmanager
def _exact(setting: Any) -> Iterator[None]:
    """Set one precision to that of IEEE, and back: to what it was, or to following a more general one if it did."""
    before = setting.fp32_precision
    setting.fp32_precision = "none"
    inherited = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = "none" if before == inherited else before
