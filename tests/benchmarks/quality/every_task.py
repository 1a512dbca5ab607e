"""All tasks of the benchmark, and the code that each comes from."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from tests.benchmarks import models
from tests.benchmarks.quality import subwords, tags, tasks

TASKS = {**tasks.TASKS, **subwords.TASKS, **tags.TASKS}


def digest_of_code(key: str) -> str:
    """Return a digest of the code of a task: a new module with more tasks does not change it."""
    own = sys.modules[TASKS[key].data.__module__]
    modules = dict.fromkeys([tasks, models, own])
    return hashlib.sha256(b"".join(Path(module.__file__ or "").read_bytes() for module in modules)).hexdigest()


def packages(key: str) -> list[str]:
    """Return the packages on whose versions a training depends."""
    more = ["transformers", "tokenizers"] if key in subwords.TASKS else []
    return ["torch", "lightning", "scikit-learn", *more]
