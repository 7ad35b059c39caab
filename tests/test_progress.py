"""A long step shows a bar in a terminal and lines in a log."""

import copy
import logging
import re
import time

import pytest
from support.terminal import in_terminal

from lsemvae import progress
from lsemvae.progress import Bar, over


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the usual intervals."""
    for name in ("FIRST_S", "TERMINAL_S", "LOG_S"):
        monkeypatch.setattr(progress, name, getattr(progress, name) / 100)


def until_said(caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    while not re.search(pattern, caplog.text):
        time.sleep(0.01)


def test_a_log_gets_lines_with_the_time_left_also_while_a_step_waits(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    with Bar(200, "ingest", "records") as bar:
        until_said(caplog, r"ingest: 0 of 200 records, 00:00 so far")
        bar.update(50)
        until_said(caplog, r"ingest: 50 of 200 records \(25 %\), [\d.e+]+ records/s, 00:\d\d left")
        bar.set_total(100)
        until_said(caplog, r"ingest: 50 of 100 records \(50 %\)")
    with Bar(None, "train"):
        until_said(caplog, r"train: 00:00 so far")
    assert "\r" not in caplog.text
    said = len(caplog.messages)
    time.sleep(0.3)
    assert len(caplog.messages) == said  # its thread has ended


def test_a_step_that_goes_on_counts_the_time_of_its_own_work_alone(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    with Bar(100, "folds", "trainings", done=90) as bar:
        until_said(caplog, r"folds: 90 of 100 trainings, 00:00 so far")
        bar.update(5)
        until_said(caplog, r"folds: 95 of 100 trainings \(95 %\), .* 00:0\d left")


def test_a_terminal_gets_a_bar_with_the_time_left():
    program = """
from lsemvae.progress import Bar
import time
with Bar(4, "ingest", "records") as bar:
    for _ in range(4):
        time.sleep(0.25)
        bar.update()
"""
    status, shown = in_terminal("-c", program)
    assert status == 0
    assert re.search(r"\ringest: .*\d/4 \[00:0\d<00:0\d", shown), shown
    assert "ingest: 100%" in shown and shown.endswith("\r\n")


def test_a_copy_in_another_process_shows_nothing():
    with Bar(3, "folds", "trainings") as bar:
        elsewhere = copy.copy(bar)  # by what the bar gives for a copy, as Ray does
        elsewhere.update(2)
        elsewhere.write("text")
        elsewhere.close()
        assert bar.done == 0


def test_over_gives_each_item():
    assert list(over({"a": 1, "b": 2}.items(), "rows", "rows")) == [("a", 1), ("b", 2)]
