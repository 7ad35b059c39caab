"""Work that is done in a thread while whoever waits for it works on what came before."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """The same items in the same order; up to `count` are made before they are asked for.

    What making one raises is raised where it would have come. Closing this, or leaving the loop over it, ends the
    thread once the item that it is at is made.
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
