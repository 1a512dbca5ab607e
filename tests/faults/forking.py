"""Runs work in forks of this process, which has imported everything already, and may kill them."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LIMIT = 120.0  # seconds until work is taken to hang


@dataclass(frozen=True)
class Ended:
    """How a fork ended.

    Attributes:
        value: what the work returned.
        said: its output, and the traceback of an error.
        status: 0, or 1 after an error, or minus the number of the signal that ended it.
    """

    value: Any
    said: str
    status: int

    @property
    def killed(self) -> bool:
        """Whether it was killed."""
        return self.status == -signal.SIGKILL

    @property
    def end(self) -> str:
        """The end of what it said, in one line; of one that was killed, the last line."""
        lines = [line.strip() for line in self.said.strip().splitlines() if "litlogger" not in line]
        return " ⏎ ".join(lines[-1:] if self.killed else lines[-7:])[-900:]

    def succeeded(self) -> Any:
        """Return the value; raise a RuntimeError if there is none."""
        if self.status:
            raise RuntimeError(f"A fork ended with {self.status}: {self.said}")
        return self.value


class Fork:
    """Work in a fork of this process.

    Args:
        work: is called without arguments; what it returns can be pickled.
        folder: for its output.
    """

    def __init__(self, work: Callable[[], Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(".fork", dir=folder)
        os.close(descriptor)
        self._output, self._value = Path(name), Path(f"{name}.value")
        self._start, self._status = time.monotonic(), None
        self.pid = os.fork()
        if not self.pid:
            self._work(work)

    def _work(self, work: Callable[[], Any]) -> NoReturn:
        status = 1
        try:
            descriptor = os.open(self._output, os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            value = pickle.dumps(work())
            self._value.write_bytes(value)
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is None

    def kill(self) -> None:
        """Kill it, if it runs."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, kill_after: float = LIMIT) -> Ended:
        """Wait until it ends; kill it after some seconds."""
        while self.running:
            if time.monotonic() - self._start > kill_after:
                self.kill()
            time.sleep(0.005)
        said = self._output.read_text(errors="replace")
        if self._status == -signal.SIGKILL and kill_after >= LIMIT and time.monotonic() - self._start > LIMIT:
            said += f"\nIt hung for {LIMIT:g} seconds."
        value = pickle.loads(self._value.read_bytes()) if self._status == 0 else None
        for path in (self._output, self._value):
            path.unlink(missing_ok=True)
        return Ended(value, said, self._status)


def in_a_fork(work: Callable[[], Any], folder: Path, kill_after: float = LIMIT) -> Ended:
    """Run work in a fork until it ends."""
    return Fork(work, folder).wait(kill_after)


@contextmanager
def folder_for(what: str) -> Iterator[Path]:
    """Make a folder for a trial, in memory if that can be, and delete it at the end."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{what}-", dir=memory if os.access(memory, os.W_OK) else None))
    former, tempfile.tempdir = tempfile.tempdir, str(folder)  # Lightning writes there, and moves
    try:
        yield folder
    finally:
        tempfile.tempdir = former
        shutil.rmtree(folder, ignore_errors=True)
