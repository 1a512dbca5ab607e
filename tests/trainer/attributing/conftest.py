"""A finished store, for tests of what is computed from it."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def finished(tmp_path, run):
    """A copy of a finished store, which a test may damage."""
    root, *_ = run
    shutil.copytree(root / "store", tmp_path / "store", ignore=shutil.ignore_patterns("targets"))
    return tmp_path
