"""Run a program in a pseudo-terminal, as a person would."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress

from support.session import ROOT


def in_terminal(*words: str, interrupt_at: str | None = None) -> tuple[int, str]:
    """`python WORDS…` in a terminal of 100 columns -> its exit status, and what it wrote.

    After the text `interrupt_at` the terminal's Ctrl-C is pressed once: every process of the terminal gets SIGINT.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'workflows'}"}
    process = subprocess.Popen(
        [sys.executable, *words], stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT,
        preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(slave)
    shown, interrupted = b"", False
    with suppress(OSError):  # the terminal is gone when the program ends
        while part := os.read(master, 65536):
            shown += part
            if interrupt_at and not interrupted and interrupt_at in shown.decode(errors="replace"):
                os.write(master, b"\x03")
                interrupted = True
    os.close(master)
    return process.wait(), shown.decode(errors="replace")


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
