"""The process that explains for a replica: `python -m serve.explain_process THREADS`; see `explaining.py`.

It reads questions from its input and writes answers to its output, as `messages.py` says. It ends when its input ends,
and when the replica is killed.
"""

import ctypes
import os
import queue
import signal
import sys
import threading
from typing import IO, Any

from serve.messages import receive, send

Message = tuple[dict[str, Any], bytes]
_PR_SET_PDEATHSIG = 1
"""From sys/prctl.h."""


def main(threads: int) -> None:
    """Answers one question after the other. What explains is imported once the input is watched."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    questions: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, questions), daemon=True).start()

    import torch

    from serve.explanation import Answers

    torch.set_num_threads(threads)
    answer = Answers()
    while True:
        send(answers, *answer(*questions.get()))


def _end_with_parent() -> None:
    """On Linux, also while this process is stopped. Elsewhere a stopped one would outlive a replica that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(stream: IO[bytes], questions: "queue.SimpleQueue[Message]") -> None:
    """Reads also while an explanation is made, so that the process ends at once when the replica does."""
    while (message := receive(stream)) is not None:
        questions.put(message)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
