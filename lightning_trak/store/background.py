"""Writing in the background, while what is to be written next is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec

P = ParamSpec("P")


@contextmanager
def in_background(function: Callable[P, object]) -> Iterator[Callable[P, None]]:
    """Yield a function that calls ``function`` in another thread: in order, and all calls are done at the end.

    A call waits for the one before it. So no more is held than one call's arguments, which must not be changed
    afterwards. It raises what the one before it raised; the end raises what the last one did.

    >>> found = []
    >>> with in_background(found.append) as append:
    ...     append(1), append(2)
    (None, None)
    >>> found
    [1, 2]
    """
    last: Future[object] | None = None
    with ThreadPoolExecutor(1) as thread:

        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            nonlocal last
            if last is not None:
                last.result()
            last = thread.submit(function, *args, **kwargs)

        yield call
        if last is not None:
            last.result()
