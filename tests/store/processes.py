"""Processes that import the store alone: they start at once, and have one thread."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).parents[2] / "lightning_trak"
_HEAD = f"""
import json, os, random, resource, signal, sys, types
from pathlib import Path
root = types.ModuleType("lightning_trak")
root.__path__ = [{str(_PACKAGE)!r}]
sys.modules["lightning_trak"] = root
import numpy as np
from lightning_trak.store.arrays import read_arrays
from lightning_trak.store.chunks import Chunks, Claim
from lightning_trak.store.files import Damaged
"""


def command(script: str, *args: object) -> list[str]:
    """Return what runs a script, which finds ``args`` in ``sys.argv[1:]``."""
    return [sys.executable, "-c", _HEAD + textwrap.dedent(script), *map(str, args)]


def start(script: str, *args: object) -> subprocess.Popen[str]:
    """Start a script; what it prints can be read, and what it reads be written."""
    return subprocess.Popen(command(script, *args), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def output_of(script: str, *args: object) -> str:
    """Run a script to its end, and return what it printed."""
    done = subprocess.run(command(script, *args), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


_HOLD = """
    from filelock import FileLock
    with FileLock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
    """


@contextmanager
def held(*locks: object) -> Iterator[None]:
    """Let processes hold locks, until they are killed at the end."""
    processes = [start(_HOLD, lock) for lock in locks]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()
