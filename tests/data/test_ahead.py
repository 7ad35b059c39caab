"""Items that a thread makes ahead arrive as if they were made on request."""

import threading
from collections.abc import Iterator

import pytest

from lsemvae.data.ahead import ahead


def test_the_same_items_in_the_same_order():
    assert list(ahead(iter(range(100)), 3)) == list(range(100))
    assert list(ahead(iter([]), 1)) == []
    assert list(ahead(iter([None, None]), 2)) == [None, None]


def test_so_many_are_made_before_they_are_asked_for():
    made, third = [], threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 3:
                third.set()
            yield number

    items = ahead(numbers(), 2)
    assert next(items) == 0
    assert third.wait(60)  # two wait for us, and the one after them is made
    assert made == [0, 1, 2, 3]
    items.close()
    assert made == [0, 1, 2, 3]


def test_what_fails_there_is_raised_here_after_what_came_before():
    def numbers() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    items = ahead(numbers(), 5)
    assert next(items) == 1
    with pytest.raises(KeyError, match="two"):
        next(items)


def test_leaving_ends_the_thread_and_what_it_reads():
    closed = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            yield from range(1_000_000)
        finally:
            closed.set()

    before = threading.active_count()
    for number in ahead(numbers(), 2):
        if number == 5:
            break
    assert closed.wait(60)
    assert threading.active_count() == before
