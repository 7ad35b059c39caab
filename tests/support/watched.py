"""Commands that write down what they do and wait where a test says: `python tests/support/watched.py NAME …`.

    pretrain, tune   each step's records; before the step that the limit names they wait
    score, explain   wait after the first finished part
    finetune         waits after so many finished trainings as the limit says

It is run as a program, so that Ray takes the feed's class along to the workers. A test decides how far a run gets by
`Attempt.until`; it can then kill the run at that place, however busy the machine is.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from lsemvae.data.feed import Feed, Rows


class Watched(Feed):
    """Writes down each step's records in `folder`, and waits before the step that `folder/limit` names."""

    folder = os.environ.get("WATCHED", "")
    read_with: Callable | None = None

    def batches(self, epoch: int, worker: int = 0, workers: int = 1, start_step: int = 0, read=None) -> Iterator[Rows]:
        parts = Feed.batches(self, epoch, worker, workers, start_step, read or type(self).read_with)
        if not self.order.shuffle:
            yield from parts
            return
        folder = Path(self.folder)
        with (folder / f"{os.getpid()}-{time.time_ns()}.jsonl").open("w") as log:
            for step, rows in enumerate(parts, start_step):
                while epoch * self.order.steps + step >= int((folder / "limit").read_text() or 0):
                    time.sleep(0.02)
                line = {"at": time.time(), "step": epoch * self.order.steps + step, "worker": worker}
                print(json.dumps(line | {"workers": workers, "rows": rows["row_B"].tolist()}), file=log, flush=True)
                yield rows


@dataclass
class Attempt:
    """A folder in which a run's feeds write; a test learns the run's progress from it."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.until(10**9)

    @property
    def environment(self) -> dict[str, str]:
        """What a watched command needs in its environment."""
        root = Path(__file__).parents[2]
        return {"WATCHED": str(self.folder), "PYTHONPATH": f"{root}{os.pathsep}{root / 'workflows'}"}

    def until(self, step: int) -> None:
        """Let the run go on to this step, counted over all epochs."""
        written = self.folder / "partial"
        written.write_text(str(step))
        written.replace(self.folder / "limit")

    def lines(self) -> list[dict]:
        """All lines by time, without a line that is still being written."""
        lines = [
            json.loads(line) | {"process": path.name.split("-")[0]}
            for path in self.folder.glob("*.jsonl")
            for line in path.read_text().splitlines()
            if line.endswith("}")
        ]
        return sorted(lines, key=lambda line: line["at"])

    def processes(self) -> set[str]:
        """The worker processes so far."""
        return {path.name.split("-")[0] for path in self.folder.glob("*.jsonl")}

    def steps(self, after: Iterable[str] = ()) -> list[int]:
        """The steps that workers received, except the workers named in `after`."""
        return [line["step"] for line in self.lines() if line["process"] not in after]

    def workers(self, after: Iterable[str] = ()) -> set[int]:
        """The numbers of workers that shared a step, without the steps of the workers named in `after`."""
        return {line["workers"] for line in self.lines() if line["process"] not in after}


def _pretrain() -> None:
    import pretrain
    import ray.train

    from lsemvae.recipes import PRETRAIN
    from lsemvae.training import launch

    launch.Feed = Watched
    ray.train.ScalingConfig = partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1)
    pretrain.run_recipe_command(pretrain.main, pretrain.Args, PRETRAIN, storage=pretrain.tyro.MISSING)


def _tune() -> None:
    import tune

    from lsemvae.recipes import PRETRAIN
    from lsemvae.training import launch

    launch.Feed = Watched
    missing = tune.tyro.MISSING
    tune.run_recipe_command(tune.main, tune.Args, PRETRAIN, storage=missing, grid=missing)


def _finetune() -> None:
    import finetune

    from lsemvae.evaluation.cells import _Kept
    from lsemvae.recipes import FINETUNE

    write, finished = _Kept.write, count(1)

    def write_and_wait(kept: _Kept, *what: object) -> None:
        write(kept, *what)
        number = next(finished)
        while number >= int((Path(Watched.folder) / "limit").read_text() or 0):
            time.sleep(0.05)

    _Kept.write = write_and_wait
    missing = finetune.tyro.MISSING
    finetune.run_recipe_command(finetune.main, finetune.Args, FINETUNE, task=missing, encoder=missing)


def _on_a_cohort(name: str) -> None:
    command = importlib.import_module(name)

    from lsemvae.scoring.progress import Progress

    add = Progress.add

    def add_and_wait(progress: Progress, part: dict) -> None:
        add(progress, part)
        while True:
            time.sleep(1)

    Progress.add = add_and_wait
    command.run_command(command.main, command.Args)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "workflows")]
    name = sys.argv.pop(1)
    {"pretrain": _pretrain, "tune": _tune, "finetune": _finetune}.get(name, partial(_on_a_cohort, name))()
