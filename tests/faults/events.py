"""Sees every change of files below a folder: each is an *event*, before which the process may be killed."""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

_WRITING = frozenset("wax+")


class Event(NamedTuple):
    """A change that is about to happen.

    Attributes:
        kind: the name of the call, or "write", seen when half of the content is written.
        path: of what it changes.
        target: where ``path`` is moved to.
    """

    kind: str
    path: str
    target: str = ""


class Watch:
    """Calls ``see`` before each change below a folder, from now on in this process.

    Args:
        folder: whose changes count.
        see: is called with each event.
    """

    def __init__(self, folder: Path, see: Callable[[Event], None]) -> None:
        self._folder, self._see, self._busy = f"{folder}{os.sep}", see, False
        for name in ("unlink", "remove", "rmdir", "mkdir"):
            self._replace(os, name, self._one_path)
        for name in ("replace", "rename"):
            self._replace(os, name, self._two_paths)
        self._replace(os, "fsync", self._descriptor)
        self._replace(os, "open", self._os_open)
        builtins.open = io.open = self._opening(io.open)

    def tell(self, event: Event) -> None:
        """Call ``see``, whose own changes do not count."""
        if not self._busy:
            self._busy = True
            try:
                self._see(event)
            finally:
                self._busy = False

    def _replace(self, module: Any, name: str, saw: Callable[..., Event | None]) -> None:
        original = getattr(module, name)

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            event = saw(name, *args, **kwargs)
            if event is not None:
                self.tell(event)
            return original(*args, **kwargs)

        setattr(module, name, call)

    def _counts(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self._folder)

    def _one_path(self, name: str, path: Any, *_: Any, dir_fd: int | None = None, **__: Any) -> Event | None:
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        return Event(name, os.path.abspath(path)) if self._counts(path) else None

    def _two_paths(self, name: str, source: Any, target: Any, **_: Any) -> Event | None:
        return Event(name, os.path.abspath(source), os.path.abspath(target)) if self._counts(target) else None

    def _descriptor(self, name: str, descriptor: int) -> Event | None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return Event(name, path) if self._counts(path) else None

    def _os_open(self, name: str, path: Any, flags: int, *_: Any, dir_fd: int | None = None, **__: Any) -> Event | None:
        creates = flags & os.O_CREAT and dir_fd is None and self._counts(path) and not os.path.exists(path)
        return Event("create", os.path.abspath(path)) if creates else None

    def _opening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not (_WRITING & set(mode) and self._counts(file)):
                return original(file, mode, *args, **kwargs)
            path = os.path.abspath(file)
            self.tell(Event("create", path))
            return Writing(original(file, mode, *args, **kwargs), path, self)

        return call


class Writing:
    """A file that is open for writing, of which every write is an event in the middle of it."""

    def __init__(self, file: Any, path: str, watch: Watch) -> None:
        self._file, self._path, self._watch = file, path, watch

    def write(self, content: Any) -> int:
        """Write half of the content, tell, and write the rest."""
        content = content if isinstance(content, str) else memoryview(content).cast("B") if len(content) else b""
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._watch.tell(Event("write", self._path))
        return half + self._file.write(content[half:])

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Counter:
    """Counts events, and kills the process before one of them.

    Args:
        at: the number of that event, from 1 on; 0 for none.
    """

    def __init__(self, at: int = 0) -> None:
        self.at, self.seen = at, 0

    def __call__(self, event: Event) -> None:
        """Count an event."""
        self.seen += 1
        if self.seen == self.at:
            os.write(2, f"\nkilled before event {self.at}, {event.kind} {event.path} {event.target}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
