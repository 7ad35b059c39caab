"""A replica's own faults: a model's thread that hangs, a model that fails for good, and too little memory."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.serving import as_json, score
from support.session import ROOT

from lsemvae.bundle import Scorer
from lsemvae.memory import is_out_of_memory
from lsemvae.record import Record
from serve.api import make_api
from serve.app import Config
from serve.model_thread import TORCH, NotWorking, require_working
from serve.registry import Served
from serve.service import Service


@pytest.fixture
def served(service: Service, models: Path) -> Served:
    """A model of its own, which a test may break."""
    return replace(service.registry.served["ph-12L"], scorer=Scorer(models / "ph-12L"))


def api_of(service: Service, served: Served) -> object:
    registry = SimpleNamespace(served={"ph-12L": served}, ready=True, problems={})
    return make_api(replace(service, registry=registry))


@pytest.fixture(autouse=True)
def a_thread_that_works() -> Iterator[None]:
    yield
    asyncio.run(TORCH.run(int))
    assert not TORCH.failed and TORCH.busy_s == 0


def check(served: Served, limit_s: float = 60) -> None:
    asyncio.run(require_working([served], limit_s))


async def fails_until(told: threading.Event, waiting: asyncio.Task, served: Served) -> None:
    """The health check fails while this call waits, and passes when it has ended."""
    try:
        await asyncio.wait_for(require_working([served], 60), 30)  # work in progress is no fault
        await asyncio.sleep(0.05)
        with pytest.raises(NotWorking, match="has worked on one batch"):
            await require_working([served], 0.02)
    finally:
        told.set()
    await waiting
    await require_working([served], 0.02)


def test_a_thread_that_hangs_fails_the_health_check(served: Served):
    begun, told = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        told.wait()

    async def main() -> None:
        hanging = asyncio.create_task(TORCH.run(hang))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        await fails_until(told, hanging, served)

    asyncio.run(main())
    assert Config.model_fields["model_timeout_s"].default == 60  # as long as Serve lets a request wait


def test_a_call_that_the_thread_does_not_begin_fails_the_health_check(served: Served):
    """A thread that stands still between two calls works on none."""
    told = threading.Event()

    async def main() -> None:
        TORCH._pool.submit(told.wait)
        waiting = asyncio.create_task(TORCH.run(int))
        await asyncio.sleep(0)  # so that the call is given
        await fails_until(told, waiting, served)

    asyncio.run(main())


def test_a_model_that_fails_for_good_fails_the_health_check_and_a_bad_recording_does_not(
    service: Service, served: Served, record: Record
):
    api = api_of(service, served)
    good, weight = served.scorer.model.head.fc2, served.scorer.model.head.fc2.weight
    score_one = served.scorer.score
    served.scorer.score = lambda records: [][0] if len(records[0].signal_mv_LT[0]) == 4000 else score_one(records)
    short = replace(record, signal_mv_LT=record.signal_mv_LT[:, :4000])
    assert score(api, as_json(short)).status_code == 500 and TORCH.failed
    check(served)
    assert not TORCH.failed  # the example was scored
    good.weight = torch.nn.Parameter(weight[:, :-1])  # as if the device had lost it: torch itself raises
    assert score(api, as_json(record)).status_code == 500
    with pytest.raises(NotWorking, match="ph-12L cannot score its example: RuntimeError"):
        check(served)
    with pytest.raises(NotWorking):
        check(served)
    good.weight = weight
    check(served)
    assert score(api, as_json(record)).status_code == 200


@pytest.mark.parametrize(
    "exhaust",
    [lambda: torch.empty(2**46), lambda: np.empty(2**46), lambda: bytearray(2**46)],
    ids=["torch", "numpy", "python"],
)
def test_a_recording_that_takes_too_much_memory_is_503_and_the_next_is_scored(
    service: Service, served: Served, record: Record, exhaust: Callable[[], object]
):
    api, score_all = api_of(service, served), served.scorer.score
    served.scorer.score = lambda records: exhaust()
    answer = score(api, as_json(record))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "not enough memory" in answer.json()["detail"]
    served.scorer.score = score_all
    assert score(api, as_json(record)).status_code == 200
    check(served)


def test_no_other_error_is_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(
        ValueError("can't allocate memory")
    )


LITTLE_MEMORY = """
import json, re, resource, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, "tests")
from support.bundles import records, save
from support.serving import npy, score_npy
from lsemvae.leads import LEADS
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAEConfig
from serve.api import make_api
from serve.model_thread import TORCH
from serve.observed import Metrics
from serve.registry import Registry
from serve.security import Tokens
from serve.service import Service

folder = Path(sys.argv[1])
save(folder / "ph-12L", ClassifierConfig(encoder=LSEMVAEConfig(latent=8, channels=(8, 16, 24)), hidden=8), LEADS)
registry = Registry([str(folder / "ph-12L")], folder / "kept", 0)
api = make_api(Service(registry, Metrics(), tokens=Tokens({"the-tests-own-token"})))
scorer, failed = registry.served["ph-12L"].scorer, []
score_all = scorer.score
def watched(given):
    try:
        return score_all(given)
    except Exception as error:
        failed.append((len(given), type(error).__name__))
        raise
scorer.score = watched
given = records(24)
stack = np.stack([np.rint(r.signal_mv_LT * 1000).astype(np.int16) for r in given])
whole, first = npy(stack), npy(stack[0])
body = lambda: score_npy(api, whole, uv_per_lsb=1)
def limit(more_mb):
    size = 1024 * int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1])
    resource.setrlimit(resource.RLIMIT_AS, (size + more_mb * 2**20 if more_mb else -1, -1))
one = lambda: score_npy(api, first, uv_per_lsb=1)
expected = [result["score"] for result in one().json()["results"]]
outcomes = []
for more_mb in (4, 16, 32, 64):
    limit(more_mb)
    answer = body()
    limit(0)
    if answer.status_code == 200:
        assert abs(answer.json()["results"][0]["score"] - expected[0]) < 1e-5
        assert len({result["score"] for result in answer.json()["results"]}) == 24
    else:
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1"), answer.text
    outcomes.append((answer.status_code, [n for n, _ in failed]))
    failed.clear()
    assert one().status_code == 200
assert body().status_code == 200 and not failed
print(json.dumps(outcomes))
"""
"""24 recordings in one request, each time with so many MB more than the process has, which the system enforces."""


def test_with_too_little_memory_the_answer_is_503_and_the_replica_goes_on(tmp_path: Path):
    """The body cannot be read, or the batch not be scored: then its recordings are tried one by one."""
    # Freed blocks go back to the system, so that each request has to ask for its memory.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path)],
        cwd=ROOT, env=os.environ | malloc | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert {status for status, _ in outcomes} == {200, 503}
    assert [24] in [failed[:1] for _, failed in outcomes]  # the model itself had too little
