"""Faults of a recording are returned, faults of the storage are raised, and an overload is waited for."""

from pathlib import Path

import pytest

from lsemvae.data import reading
from lsemvae.data.reading import patiently, read_or_reason
from lsemvae.errors import StorageError, UnreadableRecording
from lsemvae.record import Record
from lsemvae.storage import Storage


@pytest.fixture
def pauses_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that are made, without making them."""
    made: list[float] = []
    monkeypatch.setattr(reading.time, "sleep", made.append)
    return made


def failing(times: int, error: StorageError) -> object:
    left = [times]

    def call() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "answer"

    return call


def test_an_overloaded_store_is_asked_again_with_growing_pauses(pauses_s: list[float]):
    overload = StorageError("slow down", overloaded=True)
    assert patiently(failing(8, overload), 300) == "answer"
    assert len(pauses_s) == 8 and pauses_s[0] < 2 and 15 <= pauses_s[-1] <= 45
    pauses_s.clear()
    with pytest.raises(StorageError, match="slow down"):
        patiently(failing(10**6, overload), 60)
    assert 60 <= sum(pauses_s) < 60 + 45


def test_other_faults_are_not_waited_for(pauses_s: list[float]):
    for error in (StorageError("access denied", passing=False), StorageError("no answer")):
        with pytest.raises(StorageError):
            patiently(failing(1, error), 300)
    assert not pauses_s


def test_what_is_wrong_with_a_recording_is_a_value(tmp_path: Path):
    (tmp_path / "cut.hea").write_text("cut 1 500 10\n")
    (tmp_path / "file").write_text("")
    storage = Storage.open(tmp_path)

    def broken(record: Record) -> None:
        raise ZeroDivisionError("in a reader")

    for path, code in (("cut.hea", "header"), ("absent.dcm", "missing_file"), ("file/x.dcm", "missing_file")):
        answer = read_or_reason(storage, path, lambda record: record)
        assert isinstance(answer, UnreadableRecording) and answer.code == code, path
    (tmp_path / "whole.csv").write_text("# rate_hz: 500\n# unit: mV\nI\n" + "0\n1\n" * 100)
    assert isinstance(read_or_reason(storage, "whole.csv", lambda record: record), Record)
    answer = read_or_reason(storage, "whole.csv", broken)
    assert answer.code == "reader_failed" and "ZeroDivisionError" in str(answer)
