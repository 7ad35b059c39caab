"""Ctrl-C ends a command with one line and status 130, leaves nothing half-written, and the same command goes on."""

from pathlib import Path

import command
from support.terminal import in_terminal


def test_in_a_terminal_every_process_gets_it(tmp_path: Path):
    """The processes that simulate are started meanwhile: none of them may print a traceback."""
    words = ("workflows/simulate.py", "--output", str(tmp_path / "cohort"), "--subjects", "600", "--processes", "2")
    status, shown = in_terminal(*words, interrupt_at="simulate:")
    assert status == 130 and "Traceback" not in shown, shown
    assert shown.rstrip().splitlines()[-1] == command.INTERRUPTED
    assert list(tmp_path.iterdir()) == []
