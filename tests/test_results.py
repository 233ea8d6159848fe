"""Saving beside the computation: one at a time, in order, and every failure told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from organfast.errors import InputError
from organfast.results import saving, too_large


def test_a_write_goes_on_beside_and_is_told_where_it_was_asked_for() -> None:
    may_end, told, threads = threading.Event(), [], []

    def write() -> None:
        threads.append(threading.get_ident())
        assert may_end.wait(10)

    def done(failure: InputError | None) -> None:
        told.append((threading.get_ident(), failure))

    with saving() as save:
        save(write, done)  # comes back though the write has not ended
        assert told == []
        may_end.set()
    assert told == [(threading.get_ident(), None)]
    assert threads != [threading.get_ident()]


def test_one_is_written_and_one_waits() -> None:
    may_end = [threading.Event() for _ in range(3)]
    begun: list[int] = []
    told: list[int] = []

    def write(n: int) -> None:
        begun.append(n)
        assert may_end[n].wait(10)

    def release_first_later() -> None:
        assert begun == [0]
        may_end[0].set()

    with saving() as save:
        save(partial(write, 0), lambda failure: told.append(0))
        timer = threading.Timer(0.2, release_first_later)
        timer.start()
        save(partial(write, 1), lambda failure: told.append(1))  # waits for the first
        assert told == [0]
        may_end[1].set()
        may_end[2].set()
        save(partial(write, 2), lambda failure: told.append(2))
        assert told == [0, 1]
    assert begun == told == [0, 1, 2]
    timer.join()


def failing(error: Exception) -> Callable[[], None]:
    def write() -> None:
        raise error

    return write


def test_a_failed_write_is_told_and_the_next_goes_on() -> None:
    told: list[str | None] = []

    def done(failure: InputError | None) -> None:
        told.append(None if failure is None else failure.path)

    with saving() as save:
        save(failing(InputError("a", "is full", "make room")), done)
        save(lambda: None, done)
        save(failing(too_large("c")), done)
    assert told == ["a", None, "c"]


def test_the_last_write_ends_and_is_told_when_the_block_fails() -> None:
    told: list[InputError | None] = []
    written: list[str] = []

    def interrupted() -> None:
        with saving() as save:
            save(lambda: written.append("all"), told.append)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert written == ["all"]
    assert told == [None]


def test_what_is_no_bad_input_is_not_swallowed() -> None:
    told: list[InputError | None] = []
    with pytest.raises(ZeroDivisionError), saving() as save:
        save(failing(ZeroDivisionError()), told.append)
    assert told == []


def test_nothing_to_save_is_no_trouble() -> None:
    n_threads = threading.active_count()
    with saving():
        pass
    assert threading.active_count() == n_threads
