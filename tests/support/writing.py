"""Write checkpoints of a small model with `lsemvae.training.writer`; run as a program, it can be killed while it does.

    python tests/support/writing.py FOLDER LIMIT

writes a first checkpoint, then, with files limited to LIMIT bytes (0 for no limit), a second one.
"""

import resource
import sys
from pathlib import Path

import torch

from lsemvae.bundle import Bundle
from lsemvae.config import PretrainRecipe, with_settings
from lsemvae.data.order import Order
from lsemvae.errors import LsemvaeError
from lsemvae.models import build
from lsemvae.recipes import PRETRAIN
from lsemvae.storage import Storage
from lsemvae.training.checkpoints import Progress
from lsemvae.training.fit import make_optimizer
from lsemvae.training.writer import Writer

ORDER = Order((64,), 16, streams=4, buffer=64)


def small() -> PretrainRecipe:
    """A recipe whose model has 3 MB."""
    settings = {"leads": ("I", "II"), "model.samples": 2000, "model.latent": 64, "preprocess.samples": 2000}
    return with_settings(PRETRAIN["smoke"], settings | {"model.channels": (4, 8, 16)})


class Training:
    """A model, its optimiser, and steps that change every weight."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        self.recipe = recipe
        self.model = build(recipe.model, recipe.leads)
        self.optimizer = make_optimizer(self.model, recipe.optim)

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def write(self, writer: Writer, epoch: int, best: bool = True) -> str:
        bundle = Bundle.of(self.model, self.recipe.preprocess, provenance={"metrics": {"epoch": epoch}})
        return writer.write(bundle, self.model, self.optimizer, Progress(epoch), ORDER, 1, best)[0]


def main(folder: Path, limit: int) -> None:
    training = Training(small())
    try:
        with Writer(Storage.open(folder)) as writer:
            for epoch in (1, 2):
                training.step()
                training.write(writer, epoch)
                writer.wait()
                if limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            while True:
                training.write(writer, 3)
    except LsemvaeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
