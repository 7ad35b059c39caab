"""Pre-training in the test's own process: Ray Train's local mode, with the real worker and the real feed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lsemvae.config import PretrainRecipe
from lsemvae.data.feed import Feed, Rows, read_here
from lsemvae.data.shards import ShardedDataset
from lsemvae.storage import Storage
from lsemvae.training.launch import Source, make_feeds, make_job
from lsemvae.training.pretrain import pretrain_worker
from support.session import kept_signals


class Here(Feed):
    """Reads in this process."""

    def batches(self, epoch: int, worker: int = 0, workers: int = 1, start_step: int = 0, read=None) -> Iterator[Rows]:
        return Feed.batches(self, epoch, worker, workers, start_step, read_here)


def pretrain_here(recipe: PretrainRecipe, data: Path, place: Path) -> Path:
    """Run the recipe on the shards, without a cluster -> its bundle."""
    import ray.train
    from ray.train.torch import TorchTrainer

    sources = [Source(ShardedDataset.open(str(data)))]
    job = make_job(sources, recipe, make_feeds(sources, recipe), None)
    job = replace(job, place=Storage.open(place), train=Here(**vars(job.train)), val=Here(**vars(job.val)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with kept_signals():
            scaling = ray.train.ScalingConfig(num_workers=0)
            TorchTrainer(pretrain_worker, train_loop_config={"job": job}, scaling_config=scaling).fit()
    finally:
        torch.set_num_threads(threads)
    return place / "bundle"
