"""Threads of a replica that look again and again at what may change outside: aliases, and the file of tokens."""

import logging
import random
import threading
import time
from collections.abc import Callable

log = logging.getLogger("ray.serve")


def every(poll_s: float, look: Callable[[], object], name: str) -> None:
    """Call `look` in a thread of this name after each `poll_s` seconds, randomly up to 30 % less; never where it is 0.

    So replicas that started together do not all ask at once. The thread goes on whatever `look` raises.
    """

    def poll() -> None:
        while True:
            time.sleep(poll_s * random.uniform(0.7, 1))
            try:
                look()
            except Exception as error:
                log.error(f"{type(error).__name__} in the thread {name}")

    if poll_s:
        threading.Thread(target=poll, daemon=True, name=name).start()
