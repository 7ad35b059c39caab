"""Looks at the checkpoints of a run that may be going on, which writes new ones and deletes old ones."""

from pathlib import Path

from lsemvae import bundle as bundles
from lsemvae.errors import LsemvaeError
from lsemvae.training.checkpoints import read_state


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
