"""workflows/pretrain.py, with a feed that writes down which records each step was given, and waits where a test says.

It is run as a program, so that Ray takes the feed's class along to the workers.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
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


if __name__ == "__main__":
    import pretrain
    import ray.train

    from lsemvae.recipes import PRETRAIN

    pretrain.Feed = Watched
    ray.train.ScalingConfig = partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1)
    pretrain.run_recipe_command(pretrain.main, pretrain.Args, PRETRAIN, storage=pretrain.tyro.MISSING)
