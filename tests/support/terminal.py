"""Run a program in a pseudo-terminal, as a person would."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress

from support.session import ROOT


def in_terminal(program: str, meanwhile: Callable[[subprocess.Popen, str], None] | None = None) -> str:
    """What the Python program writes to a terminal of 100 columns. `meanwhile` gets the process after each output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'workflows'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    with suppress(OSError):  # the terminal is gone when the program ends
        while part := os.read(master, 65536):
            shown += part
            if meanwhile:
                meanwhile(process, shown.decode(errors="replace"))
    os.close(master)
    process.wait()
    return shown.decode(errors="replace")
