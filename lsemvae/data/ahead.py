"""Make items in a thread, ahead of the loop that uses them."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """The same items in the same order; up to `count` of them are made before the loop asks for them.

    If making an item raises an error, the error is raised here in the item's place. Closing this iterator, or leaving
    the loop over it, ends the thread as soon as it has made its current item.
    """
    ready: queue.Queue[Any] = queue.Queue(count)
    stopped, end = threading.Event(), object()
    failure: list[BaseException] = []

    def put(item: Any) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            failure.append(error)
        put(end)

    thread = threading.Thread(target=work, daemon=True, name="ahead")
    thread.start()
    try:
        while (item := ready.get()) is not end:
            yield item
        if failure:
            raise failure[0]
    finally:
        stopped.set()
        thread.join()
