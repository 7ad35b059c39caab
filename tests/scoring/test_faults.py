"""Commands killed or stopped at each of their writes, and full disks: each participant once, the same bytes."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.bundles import save
from support.cardiosoft_files import document, strip
from support.faults import Between, Fault
from support.full_disk import PAGE, resize, small_disk
from support.killing import PART_RECORDS, Forks, Run
from support.session import ROOT, workflow

from lsemvae.data import cache
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.leads import LEADS
from lsemvae.scoring import inputs
from lsemvae.scoring.output import JOB, SUMMARY, claim
from lsemvae.scoring.parts import Failure
from lsemvae.scoring.progress import PROGRESS
from lsemvae.simulate import EcgParameters, simulate_ecg
from lsemvae.storage import Storage
from lsemvae.tracking import fetched

WITHDRAWN, UNREADABLE = 1, 3
PEOPLE = [str(1000000 + number) for number in range(6) if number != WITHDRAWN]


@pytest.fixture(scope="module")
def ukb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five participants in parts of two, one of them with an unreadable recording; a sixth has withdrawn."""
    folder = tmp_path_factory.mktemp("ukb")
    for number in range(6):
        signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=number / 5), np.random.default_rng(number))
        counts_LT = np.rint(signal_mv_LT * 200).astype(int).tolist()
        content = document(strip(dict(zip(LEADS, counts_LT, strict=True))))
        name = f"{1000000 + number}_20205_2_0.xml"
        (folder / name).write_bytes(content[:5000] if number == UNREADABLE else content)
    (folder / "withdrawn.csv").write_text(f"{1000000 + WITHDRAWN}\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for count in (6, 12):
        save(folder / f"ph-{count}L", leads=LEADS[:count])
    return {"6": folder / "ph-6L", "12": folder / "ph-12L"}


@pytest.fixture(scope="module")
def forks(ukb: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """With all imports done, also those of the first recording."""
    folder = tmp_path_factory.mktemp("forks")
    with contextlib.closing(Forks(folder)) as found:
        found.warm(*score(ukb, models["6"], folder / "warm"))
        yield found


def score(source: Path, model: Path, output: str | Path) -> list[object]:
    return [
        "score", "--model", model, "--source", source, "--output", output, "--max-unreadable", 0.2, "--threads", 1,
    ]  # fmt: skip


def ingest(source: Path, output: str | Path) -> list[object]:
    return [
        "ingest", "--source", source, "--output", output, "--max-unreadable", 0.2, "--shard-records", 2,
    ]  # fmt: skip


def results(place: Storage) -> dict[str, bytes]:
    """Everything that can be seen but progress.json, which has times in it."""
    names = [name for name in place.list() if not name.rpartition("/")[2].startswith(".")]
    return {name: place.read_bytes(name) for name in names if name != PROGRESS}


def require_whole(place: Storage) -> int:
    """Every file that can be seen is whole -> how many are Parquet."""
    found = results(place)
    tables = [content for name, content in found.items() if name.endswith(".parquet")]
    for content in tables:
        pq.read_table(io.BytesIO(content), page_checksum_verification=True)
    for name, content in found.items():
        if name.endswith(".json"):
            json.loads(content)
    return len(tables)


def require_each_once(found: dict[str, bytes]) -> None:
    (table,) = [content for name, content in found.items() if name.startswith("scores-") and name.endswith(".parquet")]
    rows = pq.read_table(io.BytesIO(table)).to_pylist()
    assert [row["subject_id"] for row in rows] == PEOPLE
    assert [row["subject_id"] for row in rows if row["score"] is None] == [str(1000000 + UNREADABLE)]


@pytest.fixture(scope="module")
def whole(forks: Forks, ukb: Path, models: dict[str, Path], tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What a command writes that nothing disturbs, for each model; somebody lists and reads its files meanwhile."""
    found = {}
    for name, model in models.items():
        place = Storage.open(tmp_path_factory.mktemp("whole") / "out")
        run = forks.start(*score(ukb, model, place.uri))
        with watched(place) as seen:
            assert run.wait() == 0, run.said
        assert max(seen) >= 1
        found[name] = results(place)
        require_each_once(found[name])
    return found


@contextlib.contextmanager
def watched(place: Storage) -> Iterator[list[int]]:
    """Lists a place and reads its files until the block ends -> how many Parquet files were there each time."""
    seen: list[int] = []
    failed: list[BaseException] = []
    ended = threading.Event()

    def watch() -> None:
        try:
            while not ended.is_set():
                seen.append(require_whole(place))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
    assert not failed, failed


def require_goes_on(forks: Forks, words: list[object], place: Storage, expected: dict[str, bytes]) -> None:
    """What a killed command left is whole; the same command ends with the bytes of one that was not killed."""
    require_whole(place)
    kept = {name: content for name, content in results(place).items() if name in expected}
    assert all(content == expected[name] for name, content in kept.items())
    again = forks.run(*words)
    assert again.status == 0, again.said
    assert results(place) == expected


# --- killed --------------------------------------------------------------------------------------------------


def test_killed_at_any_write_to_a_folder_scoring_goes_on(forks, whole, ukb, models, tmp_path: Path):
    other = {"plan": "another", "model": "ph-12L", "digest": "d", "input": "x"}
    for at in range(1, 100):
        place = Storage.open(tmp_path / str(at))
        words = score(ukb, models["6"], place.uri)
        killed = forks.run(*words, at=at, below=Path(place.uri))
        if killed.status == 0:
            break
        assert killed.status == -signal.SIGKILL, killed.said
        if place.exists(JOB):  # from its first file on, the output is taken
            with pytest.raises(LsemvaeError, match=r"holds scores of ph-6L .*choose another --output"):
                claim(place, other)
        require_goes_on(forks, words, place, whole["6"])
    assert at > 16  # each of nine files is written and renamed
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / str(at)).rglob("*")}
    done = forks.run(*words)
    assert done.status == 0 and "is complete: nothing to do" in done.said
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_killed_at_any_write_ingest_goes_on(forks, ukb, tmp_path: Path):
    place = Storage.open(tmp_path / "shards")
    assert forks.run(*ingest(ukb, place.uri)).status == 0
    expected = results(place)
    assert sum(pq.read_table(io.BytesIO(expected[name])).num_rows for name in expected if ".parquet" in name) == 4
    for at in range(2, 100, 3):  # in a write, before a rename, and so on: each run draws a report
        shutil.rmtree(place.uri)
        killed = forks.run(*ingest(ukb, place.uri), at=at, below=Path(place.uri))
        if killed.status == 0:
            break
        assert killed.status == -signal.SIGKILL, killed.said
        require_goes_on(forks, ingest(ukb, place.uri), place, expected)
    assert at > 14  # shards of two splits, manifest, two tables, report


@pytest.fixture
def between(s3: str) -> Iterator[Between]:
    with contextlib.closing(Between(s3)) as proxy:
        yield proxy


@pytest.mark.parametrize(("kind", "method", "part"), [("killed", "PUT", ""), ("killed after", "POST", "uploadId")])
def test_killed_at_any_write_to_s3_scoring_goes_on(
    forks, whole, ukb, models, between, tmp_path: Path, kind: str, method: str, part: str
):
    """In the middle of each upload, and when an upload is complete but its answer has not come."""
    for spared in range(100):
        place = Storage.open(f"s3://ecg/{tmp_path.name}/{spared}")
        between.faults = [Fault(kind, times=1, method=method, part=part, spared=spared)]
        killed = forks.start(*score(ukb, models["6"], between.uri(place.base)))
        between.victims.put(killed.pid)
        if killed.wait() == 0:
            break
        assert killed.status == -signal.SIGKILL, killed.said
        require_goes_on(forks, score(ukb, models["6"], place.uri), place, whole["6"])
    assert spared >= 8  # job, progress, three parts, two tables, summary


@pytest.mark.ray
def test_an_actor_and_the_driver_killed_on_ray(ray_cluster, whole, ukb, models, tmp_path: Path, monkeypatch):
    """Each in the middle of a file; the bytes are those of a run without Ray."""
    place, noted = Storage.open(tmp_path / "out"), tmp_path / "killed"
    _, *words = map(str, score(ukb, models["6"], place.uri))
    command = [sys.executable, str(ROOT / "tests" / "support" / "killing.py"), *words]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"KILLED": str(noted)}, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert noted.exists()
    assert len(list(place.list("parts", ".parquet"))) == require_whole(place) == 3  # the killed actor's part, too
    assert not place.exists(SUMMARY)
    monkeypatch.setattr(inputs, "PART_RECORDS", PART_RECORDS)
    workflow("score", *words)
    assert results(place) == whole["6"]


# --- two at once ---------------------------------------------------------------------------------------------


def require_one_winner(first: Run, second: Run, place: Storage, whole: dict[str, dict[str, bytes]]) -> None:
    """Of `first` (6 leads) and `second` (12 leads), which have both ended."""
    assert sorted((first.status or 0, second.status or 0)) == [0, 2], (first.said, second.said)
    winner, loser = ("6", second) if first.status == 0 else ("12", first)
    assert "choose another --output" in loser.error
    found = results(place)  # among them may be parts of the loser, and its job.json: summary.json is what counts
    assert {name: found[name] for name in whole[winner] if name != JOB} == {
        name: content for name, content in whole[winner].items() if name != JOB
    }


def test_of_two_models_on_one_folder_one_wins_wherever_the_other_is_stopped(forks, whole, ukb, models, tmp_path: Path):
    for at in range(1, 100, 2):  # before each rename
        place = Storage.open(tmp_path / str(at))
        first = forks.start(*score(ukb, models["6"], place.uri), at=at, how=signal.SIGSTOP, below=Path(place.uri))
        if first.wait() is not None:
            break
        second = forks.run(*score(ukb, models["12"], place.uri))
        first.go_on()
        require_one_winner(first, second, place, whole)
    assert at > 16


@pytest.mark.parametrize("part", [JOB, PROGRESS, "parts/000001", SUMMARY])
def test_of_two_models_on_s3_one_wins_wherever_a_write_of_the_other_is_held(
    forks, whole, ukb, models, between, tmp_path: Path, part: str
):
    place = Storage.open(f"s3://ecg/{tmp_path.name}")
    between.faults = [Fault("held", times=1, method="POST", part=part)]
    first = forks.start(*score(ukb, models["6"], between.uri(place.base)))
    between.silent.wait()
    second = forks.run(*score(ukb, models["12"], place.uri))
    between.heal()
    first.wait()
    require_one_winner(first, second, place, whole)


@pytest.mark.parametrize("what", ["folder", pytest.param("s3", marks=pytest.mark.server)])
def test_of_two_models_started_together_one_wins(request, forks, whole, ukb, models, tmp_path: Path, what: str):
    if what == "s3":
        request.getfixturevalue("s3")
    place = Storage.open(f"s3://ecg/{tmp_path.name}" if what == "s3" else tmp_path / "out")
    first, second = (forks.start(*score(ukb, models[name], place.uri)) for name in ("6", "12"))
    with watched(place):
        first.wait(), second.wait()
    require_one_winner(first, second, place, whole)


# --- withdrawn between two commands ----------------------------------------------------------------------------


def test_who_withdraws_after_ingest_and_scoring_is_in_nothing_that_is_made_then(forks, ukb, models, tmp_path: Path):
    """The old output is refused, not continued, and stays as it is; a new one is made without them."""
    source, gone = tmp_path / "in", PEOPLE[2]
    shutil.copytree(ukb, source)
    for words, says in (
        (lambda output: score(source, models["6"], output), "whose recordings were others"),
        (lambda output: ingest(source, output), "already holds another data set"),
    ):
        (source / "withdrawn.csv").write_text(f"{1000000 + WITHDRAWN}\n")
        name = words("")[0]
        old, new = Storage.open(tmp_path / name / "old"), Storage.open(tmp_path / name / "new")
        assert forks.run(*words(old.uri)).status == 0
        before = results(old)
        (source / "withdrawn.csv").write_text(f"{1000000 + WITHDRAWN}\n{gone}\n")
        again, afresh = forks.run(*words(old.uri)), forks.run(*words(new.uri), "--max-unreadable", 0.3)
        assert again.status == 2 and says in again.error and results(old) == before
        assert afresh.status == 0, afresh.said
        held = [row["subject_id"] for path in new.list(suffix=".parquet") for row in _rows(new, path)]
        assert held and gone not in held and set(held) < set(PEOPLE)
        assert gone not in again.said + afresh.said


def _rows(place: Storage, path: str) -> list[dict]:
    return pq.read_table(io.BytesIO(place.read_bytes(path))).to_pylist()


# --- on a full disk ------------------------------------------------------------------------------------------


def require_full(run: Run, place: Storage) -> None:
    """It ended in one line, and left only whole files."""
    assert run.status == 2, run.said
    assert "No space left on device: make room" in run.error
    require_whole(place)
    assert not [path for path in Path(place.uri).rglob("*.partial") if path.is_file()]


def test_a_full_disk_ends_scoring_in_one_line_and_it_goes_on_when_there_is_room(forks, whole, ukb, models, tmp_path):
    """Page by page: full at job.json, at progress.json, in each part, in the tables, at the summary."""
    left = set()
    for pages in range(1, 100):
        with small_disk(tmp_path / str(pages), pages) as folder:
            place = Storage.open(folder / "out")
            words = score(ukb, models["6"], place.uri)
            ended = forks.run(*words)
            if ended.status == 0:
                break
            require_full(ended, place)
            left.add(len(results(place)))
            resize(folder, 1000)
            require_goes_on(forks, words, place, whole["6"])
    assert left >= {1, 2, 3, 4, 5, 6}  # job.json, three parts and two tables are there


def test_a_full_disk_ends_ingest_in_one_line_and_it_goes_on_when_there_is_room(forks, ukb, tmp_path: Path):
    output = tmp_path / "disk"
    with small_disk(output, 1000):
        place = Storage.open(output / "shards")
        assert forks.run(*ingest(ukb, place.uri)).status == 0
        expected = results(place)
    needed = sum(-(-len(content) // PAGE) for content in expected.values())
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95):
        with small_disk(output, int(1 + share * needed)):
            require_full(forks.run(*ingest(ukb, place.uri)), place)
            resize(output, 1000)
            require_goes_on(forks, ingest(ukb, place.uri), place, expected)


def test_a_full_temporary_folder_ends_scoring_in_one_line_that_names_it(
    forks, whole, ukb, models, tmp_path, monkeypatch
):
    """The tables are spooled there."""
    place = Storage.open(tmp_path / "out")
    with small_disk(tmp_path / "temporary", 1) as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        ended = forks.run(*score(ukb, models["6"], place.uri))
        assert ended.status == 2 and f"error: {folder}: make room in this temporary folder" in ended.error
        assert not list(folder.iterdir()) and not place.exists(SUMMARY)
        resize(folder, 1000)
        require_goes_on(forks, score(ukb, models["6"], place.uri), place, whole["6"])


def test_a_bundle_that_does_not_fit_into_the_temporary_folder(s3: str, models, tmp_path: Path, monkeypatch):
    """In the process that scores, too: the line names the folder, and not the bucket."""
    place = Storage.open(f"s3://ecg/{tmp_path.name}")
    for path in models["6"].iterdir():
        place.write_bytes(path.name, path.read_bytes())
    with small_disk(tmp_path / "temporary", 2) as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with (
            pytest.raises(StorageError, match=f"^{folder}: make room in this temporary folder") as caught,
            fetched(place.uri),
        ):
            pass
        assert not caught.value.passing and not list(folder.iterdir())
        assert "the same command fails until this is mended" in str(Failure.of(caught.value).error())
        resize(folder, 1000)
        with fetched(place.uri) as found:
            assert (found.folder / "model.safetensors").is_file()


def test_a_full_disk_stops_the_cache_and_nothing_else(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(cache, "SPARE_BYTES", 0)
    monkeypatch.setattr(cache, "_given_up", set())
    rows = {"x_BLT": np.ones((8, 12, 100), np.float32)}
    with small_disk(tmp_path / "disk", 1000, files=3) as folder:  # room for bytes, but only for one file
        kept = cache.Cache(folder, "meaning")
        kept.put("shard", 0, rows)
        kept.put("shard", 1, rows)
        (said,) = [record.getMessage() for record in caplog.records]
        assert "takes no more (No space left on device): going on without" in said
        assert kept.get("shard", 0) is not None and kept.get("shard", 1) is None
        assert not list(folder.rglob("*.partial"))
        resize(folder, 1000, files=1000)
        monkeypatch.setattr(cache, "_given_up", set())  # as in a new process
        kept.put("shard", 1, rows)
        found = kept.get("shard", 1)
        assert found is not None and (found["x_BLT"] == rows["x_BLT"]).all()
