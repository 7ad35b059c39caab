"""A bounded load on the endpoint from a process of its own: asks until its input ends, then says what came back.

    python tests/support/load.py URL CLIENTS < expected.json

The first line of the input is `{"token": …, "cases": [{"query", "body", "score"}, …]}`, a body being base64 of an NPY
array. It writes `ready` after the first right answer, and at the end a line of JSON: right and wrong answers, other
statuses, connection errors, and the longest time without a right answer.
"""

import asyncio
import base64
import itertools
import json
import sys
import time
from collections import Counter

import httpx


async def main(url: str, clients: int) -> None:
    loop = asyncio.get_running_loop()
    given = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    cases = [case | {"body": base64.b64decode(case["body"])} for case in given["cases"]]
    counts: Counter[str] = Counter()
    last_right, longest_gap_s, stopping = time.monotonic(), 0.0, False
    headers = {"Authorization": f"Bearer {given['token']}", "Content-Type": "application/x-npy"}

    async def ask(client: httpx.AsyncClient, turn: int) -> None:
        nonlocal last_right, longest_gap_s
        for case in itertools.islice(itertools.cycle(cases), turn, None):
            if stopping:
                return
            try:
                answer = await client.post(f"{url}/v1/score/npy", params=case["query"], content=case["body"])
            except httpx.HTTPError as error:
                counts[type(error).__name__] += 1
                await asyncio.sleep(0.1)
                continue
            if answer.status_code != 200:
                counts[str(answer.status_code)] += 1
                await asyncio.sleep(0.05)
                continue
            (result,) = answer.json()["results"]
            counts["right" if abs(result["score"] - case["score"]) < 1e-5 else "wrong"] += 1
            if counts["right"] == 1:
                say("ready")
            now = time.monotonic()
            longest_gap_s, last_right = max(longest_gap_s, now - last_right), now

    async with httpx.AsyncClient(timeout=60, headers=headers) as client:
        tasks = [asyncio.create_task(ask(client, turn)) for turn in range(clients)]
        await loop.run_in_executor(None, sys.stdin.read)
        stopping = True
        await asyncio.gather(*tasks)
    say(json.dumps(counts | {"longest_gap_s": longest_gap_s}))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
