"""Two commands want one folder: one works, the other waits; one that was silent for too long ends."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lsemvae import lease as leasing
from lsemvae.errors import LsemvaeError
from lsemvae.lease import RUNNING, Lease, is_dead, new_owner
from lsemvae.storage import Storage

HOLDS = """
import sys, time
from lsemvae import lease
from lsemvae.storage import Storage
lease.BEAT_S, lease.SILENT_S = 0.1, 600
with lease.Lease(Storage.open(sys.argv[1])) as held:
    print("held", flush=True)
    while True:
        time.sleep(0.02)
        try:
            held.require()
        except ValueError as error:
            raise SystemExit(f"error: {error}")
"""


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage.open(tmp_path)
    request.getfixturevalue("s3")
    return Storage.open(f"s3://ecg/lease/{tmp_path.name}")


@contextmanager
def holder(place: Storage) -> Iterator[subprocess.Popen]:
    """Another process that holds the place."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, place.uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_command_waits_for_another_and_goes_on_when_that_is_killed(place: Storage):
    entered = threading.Event()

    def work() -> None:
        with Lease(place):
            entered.set()

    with holder(place) as other:
        waiting = threading.Thread(target=work)
        waiting.start()
        assert not entered.wait(2)
        other.send_signal(signal.SIGKILL)
        other.wait()
        waiting.join()
    assert entered.is_set() and not place.exists(RUNNING)


def test_a_stopped_command_is_taken_over_and_ends_when_it_wakes(place: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leasing, "SILENT_S", 1.0)
    with holder(place) as other:
        other.send_signal(signal.SIGSTOP)
        with Lease(place) as mine:
            other.send_signal(signal.SIGCONT)
            assert other.wait() == 1
            assert "another command works in" in (said := other.stderr.read()) and "this one ends" in said
            mine.require()
            assert place.exists(RUNNING)
    assert not place.exists(RUNNING)


def test_of_commands_that_begin_at_one_moment_one_works_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leasing, "BEAT_S", 0.1)
    inside, most, finished = [], [], []
    begin = threading.Barrier(4)

    def work() -> None:
        begin.wait()
        with Lease(Storage.open(tmp_path)) as held:
            inside.append(held)
            most.append(len(inside))
            time.sleep(0.3)
            held.require()
            inside.remove(held)
        finished.append(held)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == 4 and max(most) == 1


def test_ray_tune_can_write_it_down(tmp_path: Path):
    with Lease(Storage.open(tmp_path)) as held:
        copy.deepcopy(held).require()  # which copies what would be written, and nothing that holds a lock can be


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"owner": "x"}', b'{"owner": "x", "beat": "y"}'])
def test_a_damaged_lease_holds_nobody(content: bytes, tmp_path: Path):
    (tmp_path / RUNNING).write_bytes(content)
    with Lease(Storage.open(tmp_path)):
        pass


def test_owners_are_dead_only_where_that_is_known():
    mine = new_owner()
    assert not is_dead(mine)
    child = subprocess.Popen(["true"])
    child.wait()
    assert is_dead(mine.replace(f":{os.getpid()}:", f":{child.pid}:"))
    for other in ("elsewhere:1:a", "x", "", "a:b:c", mine.replace(f":{os.getpid()}:", ":no:")):
        assert not is_dead(other)


def test_a_lost_lease_is_not_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leasing, "BEAT_S", 0.05)
    with Lease(Storage.open(tmp_path)) as held:
        held.require()
        (tmp_path / RUNNING).write_text('{"owner": "elsewhere:1:a", "beat": 3}')
        held._thread.join()
        with pytest.raises(LsemvaeError, match="it goes on, this one ends"):
            held.require()
    assert "elsewhere" in (tmp_path / RUNNING).read_text()
