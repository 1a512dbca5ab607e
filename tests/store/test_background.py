"""Calls in another thread: in order, all done at the end, errors raised."""

from __future__ import annotations

import threading

import pytest

from lightning_trak.store.background import in_background


def test_calls_are_in_order_and_done_at_the_end():
    found = []
    with in_background(lambda value, *, twice: found.append((value * (1 + twice), threading.get_ident()))) as call:
        for value in range(20):
            call(value, twice=value == 3)
    assert [value for value, _ in found] == [0, 1, 2, 6, *range(4, 20)]
    assert {thread for _, thread in found}.isdisjoint({threading.get_ident()})


def test_the_caller_goes_on_in_the_meantime():
    may_end, ended = threading.Event(), []
    with in_background(lambda value: ended.append(may_end.wait(60) and value)) as call:
        call(1)
        assert not ended
        may_end.set()
        call(2)  # waits for the first
        assert ended[0] == 1
    assert ended == [1, 2]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_is_raised_by_the_next_call_or_at_the_end(failing):
    tried = []

    def work(value):
        tried.append(value)
        if value == failing:
            raise OSError("no room")

    def run():
        with in_background(work) as call:
            call(1)
            call(2)
            assert failing == 2

    with pytest.raises(OSError, match="no room"):
        run()
    assert tried == list(range(1, failing + 1))


def test_what_was_called_is_done_when_the_caller_fails():
    found = []

    def run():
        with in_background(found.append) as call:
            call(1)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert found == [1]
