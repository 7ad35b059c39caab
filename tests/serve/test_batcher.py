"""The batcher prepares each job once, before its batch where there is time, and a job that fails, fails alone."""

import asyncio
import threading
import time

import pytest

from lsemvae.preprocess import PART
from serve.model_thread import TORCH
from serve.scoring import Batcher


def test_jobs_are_prepared_while_others_are_still_awaited():
    """Eight clients ask again and again, and the eighth always comes late: by then the first ones are prepared."""
    prepared: list[list[int]] = []
    ran: list[list[int]] = []

    def prepare(jobs: list[int]) -> list[int]:
        prepared.append(list(jobs))
        return [100 + job for job in jobs]

    def run(jobs: list[int]) -> list[int]:
        ran.append(list(jobs))
        time.sleep(0.6)  # half of this is waited for others
        return [2 * job for job in jobs]

    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(run, max_size=8, prepare=prepare)
        assert await asyncio.gather(*(batcher(job) for job in range(8))) == [200 + 2 * job for job in range(8)]
        ran.clear()
        prepared.clear()
        asked = [asyncio.create_task(batcher(job)) for job in range(7)]
        while not prepared:
            await asyncio.sleep(0.001)
        asked.append(asyncio.create_task(batcher(7)))
        assert await asyncio.gather(*asked) == [200 + 2 * job for job in range(8)]

    asyncio.run(main())
    assert prepared[0] == list(range(PART))
    assert ran == [[100 + job for job in range(8)]]
    assert sorted(job for jobs in prepared for job in jobs) == list(range(8))  # each once


def test_a_job_that_cannot_be_prepared_fails_alone():
    """Also one that was tried beside others before its batch."""
    tried: list[list[int]] = []

    def prepare(jobs: list[int]) -> list[int]:
        tried.append(list(jobs))
        if 2 in jobs:
            raise RuntimeError("no")
        return [10 * job for job in jobs]

    def run(jobs: list[int]) -> list[int]:
        assert all(job % 10 == 0 for job in jobs)  # nothing runs unprepared
        time.sleep(0.6)
        return jobs

    async def main() -> list:
        batcher: Batcher[int, int] = Batcher(run, max_size=8, prepare=prepare)
        await asyncio.gather(*(batcher(job) for job in (3, 4, 5, 6, 7, 8)))
        return await asyncio.gather(*(batcher(job) for job in range(5)), return_exceptions=True)

    answers = asyncio.run(main())
    assert type(answers[2]) is RuntimeError
    assert [answer for answer in answers if isinstance(answer, int)] == [0, 10, 30, 40]
    assert [0, 1, 2, 3] in tried


@pytest.mark.parametrize("size", [1, 3])
def test_few_jobs_are_prepared_with_their_batch_in_one_turn_of_the_thread(size: int):
    threads: list[tuple[str, int]] = []

    def noted(stage: str, jobs: list[int]) -> list[int]:
        threads.append((stage, threading.get_ident()))
        return jobs

    async def main() -> list[int]:
        batcher: Batcher[int, int] = Batcher(
            lambda jobs: noted("run", jobs), prepare=lambda jobs: noted("prepare", jobs)
        )
        return await asyncio.gather(*(batcher(job) for job in range(size)))

    assert asyncio.run(main()) == list(range(size))
    assert [stage for stage, _ in threads] == ["prepare", "run"]
    assert len({thread for _, thread in threads}) == 1


def test_preparing_others_does_not_hide_that_the_model_failed():
    """The replica's health check looks at `failed`: it would believe in a model that fails batch after batch."""

    def run(jobs: list[int]) -> list[int]:
        raise RuntimeError("no device")

    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(run, max_size=PART + 2, prepare=list)
        assert isinstance((await asyncio.gather(batcher(0), batcher(1), return_exceptions=True))[0], RuntimeError)
        assert TORCH.failed
        await TORCH.run_without_model(len, [])
        assert TORCH.failed

    asyncio.run(main())
    asyncio.run(TORCH.run(len, []))
    assert not TORCH.failed
