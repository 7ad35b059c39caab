"""The one thread in which a replica's models run, and whether it still works."""

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from serve.registry import Served

Given = TypeVarTuple("Given")
Done = TypeVar("Done")


class ModelThread:
    """OpenMP keeps a team of threads for each thread that calls it. With more of them than cores, they sleep between
    two steps of a model, and waking them takes longer than the step. So all models run in this one thread.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "torch")
        self._given: dict[object, float] = {}  # when each call was given that has not ended
        self._ended = 0.0  # when the last call ended
        self.failed = False
        """Whether the last call of `run` raised an exception."""

    @property
    def busy_s(self) -> float:
        """For how long the thread has worked on one call, or has not begun a call that waits; 0 where nothing waits."""
        given = list(self._given.values())
        return time.monotonic() - max(self._ended, min(given)) if given else 0.0

    async def run(self, call: Callable[[*Given], Done], *args: *Given) -> Done:
        return await self._result(self._watched, call, *args)

    async def run_without_model(self, call: Callable[[*Given], Done], *args: *Given) -> Done:
        """The same for a call that runs no model, whose success says nothing about the models."""
        return await self._result(call, *args)

    async def _result(self, call: Callable[[*Given], Done], *args: *Given) -> Done:
        key = object()

        def ended(_: object) -> None:
            self._ended = time.monotonic()
            del self._given[key]

        self._given[key] = time.monotonic()
        future = self._pool.submit(call, *args)
        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    def _watched(self, call: Callable[[*Given], Done], *args: *Given) -> Done:
        try:
            done = call(*args)
        except Exception:
            self.failed = True
            raise
        self.failed = False
        return done


TORCH = ModelThread()


class NotWorking(Exception):
    """The models of this replica cannot score any more."""


async def require_working(models: Iterable[Served], limit_s: float) -> None:
    """Raises when one call has taken longer than `limit_s`, or when after a failure a model's own example fails too.

    A recording that the model cannot score is no reason to replace a replica; a broken device is.
    """
    if (busy_s := TORCH.busy_s) > limit_s:
        raise NotWorking(f"the models' thread has worked on one batch for {busy_s:.0f} s")
    if not TORCH.failed:
        return
    for model in models:
        try:
            await TORCH.run(model.scorer.check_example)
        except Exception as error:
            raise NotWorking(f"{model.described.name} cannot score its example: {type(error).__name__}") from None
