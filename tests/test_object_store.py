"""A production object store with faults between it and us: what passes is waited for, the rest is said at once.

The server is OpenStack Swift. `Between` is a proxy of the test's own, which answers 503, resets or cuts connections,
falls silent, or sends less than there is.
"""

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from support.faults import Between, Fault
from support.session import ROOT, workflow
from support.swift_server import BUCKET, LISTING_PAGE, ObjectStore

from lsemvae import storage
from lsemvae.cohorts import select
from lsemvae.data.ingest import Job, make_plan, make_shard
from lsemvae.data.shards import MANIFEST, UNREADABLE, Manifest, Shard, ShardedDataset, pack, shard_bytes
from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.leads import LEADS
from lsemvae.record import Record
from lsemvae.storage import Storage

ATTEMPTS = 3
MULTIPART = 12 * 2**20  # two parts


@pytest.fixture
def between(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", ATTEMPTS)
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1)
    proxy = Between(object_store.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def place(object_store: ObjectStore, tmp_path: Path) -> Storage:
    """Straight to the server."""
    return Storage.open(f"s3://{BUCKET}/{quote(tmp_path.name)}?endpoint={object_store.endpoint}")


def through(between: Between, place: Storage) -> Storage:
    return Storage.open(between.uri(place.base))


def test_files_of_one_part_and_of_several(between, place):
    content = {"small": os.urandom(1000), "large": os.urandom(MULTIPART), "empty": b""}
    for name, whole in content.items():
        through(between, place).write_bytes(f"a/{name}", whole)
    assert list(place.list()) == [f"a/{name}" for name in sorted(content)]
    for name, whole in content.items():
        assert through(between, place).read_bytes(f"a/{name}") == whole
    place.write_bytes("a/small", b"another")
    assert place.read_bytes("a/small") == b"another"


def test_a_listing_of_more_than_one_page(object_store, place):
    client, prefix, many = object_store.client(), place.base.partition("/")[2], LISTING_PAGE + 3
    assert client.list_objects_v2(Bucket=BUCKET)["MaxKeys"] == LISTING_PAGE
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.put_object(Bucket=BUCKET, Key=f"{prefix}/{i:04d}.hea", Body=b""), range(many)))
    assert list(place.list(suffix=".hea")) == [f"{i:04d}.hea" for i in range(many)]


WORKS = {
    "read": ("GET", lambda there, content: there.read_bytes("x") == content),
    "ask": ("HEAD", lambda there, content: there.exists("x")),
    "list": ("GET", lambda there, content: list(there.list()) == ["x"]),
    "write": ("PUT", lambda there, content: there.write_bytes("y", content) is None),
    "write parts": ("PUT", lambda there, content: there.write_bytes("y", content * 40) is None),
}
FAULTS = [("503", work) for work in WORKS] + [("reset", "read"), ("reset", "write parts"), ("silence", "read")]
FAULTS += [("cut", "read"), ("cut", "list"), ("reset in mid-body", "read")]


@pytest.mark.parametrize(("kind", "work"), FAULTS)
def test_what_may_pass_is_tried_again(between, place, kind, work):
    content = os.urandom(300_000)
    place.write_bytes("x", content)
    method, do = WORKS[work]
    between.faults = [Fault(kind, times=ATTEMPTS - 1 if kind != "silence" else 1, method=method)]
    assert do(through(between, place), content)
    assert between.faults[0].times == 0
    if "write" in work:
        assert place.read_bytes("y")[: len(content)] == content


@pytest.mark.parametrize(
    ("kind", "says"), [("503", "overloaded"), ("reset", "does not answer, or breaks off"), ("cut", "breaks off")]
)
def test_what_does_not_pass_ends_in_one_line(between, place, kind, says):
    place.write_bytes("x", os.urandom(300_000))
    between.faults = [Fault(kind, method="GET")]
    with pytest.raises(StorageError, match=says) as raised:
        through(between, place).read_bytes("x")
    assert str(raised.value).startswith(f"s3://{place.base}/x: ")
    # The connection that a reset broke had been used before, and curl opens another by itself.
    assert ATTEMPTS <= sum(method == "GET" for method, _, _ in between.requests) <= ATTEMPTS + 1


READS = """
from lsemvae import storage
storage.MAX_ATTEMPTS = 4
try:
    storage.Storage.open({uri!r}).read_bytes("x")
except storage.StorageError:
    pass
"""


def test_pauses_between_attempts_are_random_and_differ_from_process_to_process():
    """Workers that meet the same fault at the same moment do not come back together. Nothing is behind the proxy."""
    pauses = []
    environment = os.environ | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for _ in range(2):
        between = Between("http://127.0.0.1:9")
        between.faults = [Fault("503")]
        subprocess.run(
            [sys.executable, "-c", READS.format(uri=between.uri("ecg/x"))], check=True, env=environment, cwd=ROOT
        )
        between.close()
        assert len(between.at_s) == 4
        pauses.append(np.diff(between.at_s))
    # Each is random up to a limit that doubles. Two sequences without jitter would be equal to within milliseconds.
    assert np.abs(pauses[0] - pauses[1]).max() > 0.1


def test_a_shard_that_is_not_what_was_written_is_noticed(between, place):
    """By its pages' checksums and its digest: pyarrow itself fills up what a lying server leaves out, with zeros."""
    rng = np.random.default_rng(0)
    signal_mv = {lead: rng.integers(-500, 500, 5000) / 200 for lead in LEADS}
    rows = [pack(Record.from_leads(signal_mv, 500, record_id=f"r{i}")) for i in range(8)]
    content = shard_bytes(rows, [], {"plan": "x"})
    shard = Shard("train-0.parquet", "train", 8, len(content), hashlib.sha256(content).hexdigest())
    place.write_bytes(MANIFEST, Manifest("here", "folder", "x", 8, 8, 0, {}, [shard]).to_json().encode())
    place.write_bytes(shard.path, content)
    data = ShardedDataset.open(through(between, place).uri)
    data.verify()
    assert data.read(["record_id", "signal"])["record_id"].to_pylist() == [f"r{i}" for i in range(8)]
    between.faults = [Fault("less", method="GET", part=".parquet")]
    for look in (data.verify, lambda: data.read(["record_id", "signal"])):
        with pytest.raises(LsemvaeError, match=r"train-0.parquet .* ingest again"):
            look()


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        (1000, Fault("503", method="PUT")),
        (1000, Fault("503", method="POST", part="uploadId")),
        (MULTIPART, Fault("503", method="POST", part="?uploads")),
        (MULTIPART, Fault("reset", method="PUT", part="partNumber=2")),
        (MULTIPART, Fault("503", method="POST", part="uploadId")),
    ],
    ids=["small", "complete small", "begin", "second part", "complete"],
)
def test_an_upload_that_fails_leaves_nothing_to_read(between, place, size, fault):
    place.write_bytes("old", b"old")
    for name in ("new", "old"):
        between.faults = [Fault(**vars(fault))]
        with pytest.raises(StorageError):
            through(between, place).write_bytes(name, os.urandom(size))
    assert list(place.list()) == ["old"]
    assert place.read_bytes("old") == b"old"


def test_wrong_credentials_and_absent_buckets_fail_at_the_first_answer(between, place, monkeypatch):
    place.write_bytes("x", b"x")
    absent = Storage.open(between.uri("no-such-bucket/x"))
    with pytest.raises(StorageError, match="there is no such bucket"):
        absent.write_bytes("x", b"x")
    with pytest.raises(LsemvaeError, match="does not exist"):
        absent.require()
    between.heal()
    anonymous = Storage.open(f"{through(between, place).uri}&anonymous=true")
    with pytest.raises(StorageError, match="access denied"):  # Swift wants every S3 request signed
        anonymous.read_bytes("x")
    assert len(between.requests) == 1 and "authorization" not in between.requests[0][2]

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage._s3_filesystem.cache_clear()
    wrong = through(between, place)
    for work in (lambda: wrong.read_bytes("x"), lambda: wrong.write_bytes("y", b""), lambda: wrong.exists("x"),
                 lambda: list(wrong.list()), wrong.require):  # fmt: skip
        between.requests.clear()
        with pytest.raises(StorageError, match="access denied: check the credentials"):
            work()
        assert len(between.requests) == 1 and "authorization" in between.requests[0][2]
    between.requests.clear()
    done = workflow("ingest", "--source", wrong.uri, "--output", wrong.uri, check=False)
    assert done.returncode == 2 and len(between.requests) == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: s3://") and "access denied" in line
    storage._s3_filesystem.cache_clear()


def test_a_store_that_says_slow_down_for_longer_than_its_client_waits_is_outlasted(between, place):
    """The task waits and goes on; nothing is lost, and nothing counts as unreadable."""
    for number in range(4):
        samples = "0.0\n0.1\n" * 2500
        place.write_bytes(f"in/{number}.csv", f"# rate_hz: 500\n# unit: mV\nI\n{samples}".encode())
    there = through(between, place)
    table = select(there / "in").table
    ordered, tasks, plan = make_plan(table, "folder", "x", shard_records=4, val_share=0, seed=0)
    job = Job(plan, there / "in", there / "out", [], None, threads=2, patience_s=0.0)
    between.faults = [Fault("503", method="GET", part=".csv")]
    with pytest.raises(StorageError, match="overloaded") as caught:
        make_shard(tasks[0], ordered.to_dict("records"), job)
    assert caught.value.overloaded and not list(place.list("out"))
    between.faults = [Fault("503", method="GET", part=".csv", times=3 * ATTEMPTS), Fault("503", times=4, method="PUT")]
    made = make_shard(tasks[0], ordered.to_dict("records"), replace(job, patience_s=60))
    assert [fault.times for fault in between.faults] == [0, 0]
    assert (made["shard"]["rows"], made["unreadable"]) == (4, [])


# --- ingest ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recordings(cohort: Path, place: Storage, tmp_path: Path) -> pd.DataFrame:
    """The first 48 recordings of the cohort in the object store."""
    listed = pd.read_csv(cohort / "record_list.csv", dtype=str).head(48)
    listed.to_csv(tmp_path / "record_list.csv", index=False)
    place.write_bytes("source/record_list.csv", (tmp_path / "record_list.csv").read_bytes())
    files = [path + suffix for path in listed["path"] for suffix in (".hea", ".dat")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: place.write_bytes(f"source/{name}", (cohort / name).read_bytes()), files))
    return listed


def arguments(between: Between, place: Storage, output: str) -> list[str]:
    there = through(between, place)
    return ["--source", (there / "source").uri, "--output", (there / output).uri, "--shard-records", "8",
            "--val-share", "0.2", "--threads", "2"]  # fmt: skip


def fetched(between: Between) -> Counter[str]:
    """How often each signal file was asked for."""
    asked = (path.partition("/source/")[2].split("?")[0] for method, path, _ in between.requests if method == "GET")
    return Counter(name for name in asked if name.endswith(".dat"))


@pytest.mark.ray
def test_a_killed_ingest_goes_on_and_reads_nothing_twice(ray_cluster, between, place, recordings):
    """SIGKILL while reads hang; then the same command, through bursts of 503 and broken connections."""
    between.faults = [Fault("silence", method="GET", part=".dat", spared=40)]
    command = [sys.executable, str(ROOT / "workflows" / "ingest.py"), *arguments(between, place, "shards")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    between.silent.wait()
    while not (finished := list(place.list("shards", ".parquet"))):  # four tasks at most have not all they need
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not place.exists(f"shards/{MANIFEST}")
    whole = {name: place.read_bytes(name) for name in finished}

    between.heal()
    between.faults = [
        Fault("503", times=6, method="GET", part=".dat"),
        Fault("reset in mid-body", times=2, method="GET", part=".hea"),
    ]
    workflow("ingest", *arguments(between, place, "shards"), alone=True)
    assert [fault.times for fault in between.faults] == [0, 0]
    assert {name: place.read_bytes(name) for name in finished} == whole
    data = ShardedDataset.open((place / "shards").uri)
    data.verify()
    table = data.read(["record_id", "path"])
    assert sorted(table["record_id"].to_pylist()) == sorted(recordings["study_id"])
    again = fetched(between)
    assert again
    for shard in data.manifest.shards:
        if f"shards/{shard.path}" in finished:
            rows = ShardedDataset(data.storage, replace(data.manifest, shards=[shard])).read(["path"])
            assert not {f"{path}.dat" for path in rows["path"].to_pylist()} & again.keys()


@pytest.mark.ray
def test_a_store_that_fails_in_mid_run_is_not_an_unreadable_recording(
    ray_cluster, object_store, between, place, recordings
):
    missing = recordings["path"][7]
    object_store.client().delete_object(Bucket=BUCKET, Key=f"{place.base.partition('/')[2]}/source/{missing}.dat")
    between.faults = [Fault("503", method="GET", part=".dat", spared=20)]
    failed = workflow("ingest", *arguments(between, place, "out"), "--patience-s", 1, check=False, AWS_MAX_ATTEMPTS="2")
    assert failed.returncode == 2, failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: s3://") and "overloaded" in last
    assert last.endswith("give the same command again to continue")
    assert not place.exists(f"out/{UNREADABLE}") and not place.exists(f"out/{MANIFEST}")
    between.heal()
    assert "47 recordings" in workflow("ingest", *arguments(between, place, "out"), alone=True).stdout
    listed = list(csv.DictReader(place.read_bytes(f"out/{UNREADABLE}").decode().splitlines()))
    assert [(row["path"], row["code"]) for row in listed] == [(missing, "missing_file")]
