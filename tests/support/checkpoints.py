"""Looks at the checkpoints of a run that may be going on, which writes new ones and deletes old ones."""

from pathlib import Path

import torch

from lsemvae import bundle as bundles
from lsemvae.errors import LsemvaeError
from lsemvae.models import build
from lsemvae.training.checkpoints import Progress, read_state, save_checkpoint
from lsemvae.training.fit import make_optimizer


def checkpoints(place: Path) -> list[Path]:
    """The folders of a run's checkpoints, the oldest first. Some may be incomplete, or gone when they are opened."""
    return sorted(path for path in place.glob("checkpoint_*") if path.is_dir())


def saved(checkpoint: Path, steps: int) -> int:
    """The step at which a run resumes from it, over all epochs of `steps`; 0 if it is incomplete or being deleted.

    A run that goes on may delete the checkpoint at any moment. Where the file is gone between two looks at it, torch
    raises RuntimeError rather than OSError.
    """
    try:
        state = read_state(checkpoint)
        assert bundles.load(checkpoint / "bundle")[0].digest == state["bundle"]
    except (OSError, LsemvaeError, RuntimeError):
        return 0
    return state["epoch"] * steps + state["step"]


def newest(place: Path, steps: int) -> int:
    """The step at which a run resumes from its newest whole checkpoint; 0 where there is none."""
    return max((saved(checkpoint, steps) for checkpoint in checkpoints(place)), default=0)


def write_checkpoint(run: Path, epoch: int, step: int = 0, name: str | None = None) -> Path:
    """A checkpoint of the golden recipe in a run's folder, with the name that Ray Train gives it now."""
    from golden import make
    from ray.train.v2._internal.execution.storage import StorageContext

    torch.manual_seed(epoch)
    model = build(make.RECIPE.model, make.RECIPE.leads)
    optimizer = make_optimizer(model, make.RECIPE.optim)
    make.steps(model, optimizer, 1, make.records()[:4])
    folder = run / (name or StorageContext.make_default_checkpoint_dir_name())
    folder.mkdir(parents=True)
    bundle = bundles.Bundle.of(model, make.SMALL, provenance={"metrics": {"epoch": epoch - 1}})
    save_checkpoint(folder, bundle, model, optimizer, Progress(epoch, step), make.ORDER, 1)
    return folder
