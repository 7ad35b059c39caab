"""What `fit` says of each step, kept for tests."""

from lsemvae.training.fit import Step, Watcher


class Losses(Watcher):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step(self, step: Step) -> None:
        self.found.append(step.terms["loss"])
