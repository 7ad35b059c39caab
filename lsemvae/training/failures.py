"""Failures of a training run: transient ones are retried, a user's mistake ends the run with one line."""

import logging
from collections.abc import Iterable
from typing import Any

from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.memory import is_out_of_memory
from lsemvae.training.out_of_memory import OutOfMemory

log = logging.getLogger(__name__)


def end_at_once() -> Any:
    """A callback for Ray Train that ends a run when its workers would fail in the same way again."""
    import ray.train

    class EndAtOnce(ray.train.UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            try:
                raise_lasting(worker_exceptions.values())
            except LsemvaeError as lasting:
                raise ray.train.ControllerError(lasting) from lasting  # Ray does not retry after this one
            for rank, error in worker_exceptions.items():
                log.warning(f"training worker {rank} failed: {root_cause(error)}")

    return EndAtOnce()


def raise_lasting(errors: Iterable[BaseException]) -> None:
    """Raises the first error that a retry would not change. The loss of a machine is not one, too little memory is."""
    for error in errors:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{' '.join(str(error).split())[:200]}: give a smaller --optim.batch-size") from error
        if isinstance(error, LsemvaeError) and not (isinstance(error, StorageError) and error.passing):
            raise error


def root_cause(error: BaseException) -> str:
    """One line: a worker's LsemvaeError, which the user can mend, otherwise the message of the first that failed."""
    while True:
        inner = getattr(error, "controller_failure", None) or error.__cause__
        if failures := list(getattr(error, "worker_failures", {}).values()):
            inner = next((failure for failure in failures if isinstance(failure, LsemvaeError)), failures[0])
        if inner is None:
            break
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
