"""The trials of a grid search on Ray Tune: each pre-trains with Ray Train, and can be resumed."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsemvae.errors import LsemvaeError
from lsemvae.progress import Bar
from lsemvae.storage import Storage
from lsemvae.tracking import Run
from lsemvae.training.failures import root_cause
from lsemvae.training.grid import Trial
from lsemvae.training.launch import keep_bundle, make_trainer
from lsemvae.training.pretrain import PretrainJob
from lsemvae.training.trials import (
    HISTORY,
    Outcome,
    Select,
    describe_metrics,
    describe_settings,
    forget_checkpoints,
    read_history,
    read_outcome,
    score,
    write_outcome,
)

DRIVER_CPUS = 0.01  # what a trial reserves beside its workers, which do the work: a hundred of them take one CPU
TRIALS, STATE = "trials", "of_tune"


@dataclass(frozen=True)
class SearchSettings:
    """How trials run. `asha` stops trials that do worse than others after as many epochs."""

    select: Select
    asha: bool = False
    num_workers: int = 1
    use_gpu: bool = False
    max_failures: int = 3


def room(nodes: Sequence[Mapping[str, float]], workers: int, use_gpu: bool) -> int:
    """How many trials can run at the same time on nodes with these resources without a deadlock.

    A deadlock: trials hold their places while their workers, or the tasks that read for them, find no CPU. Drivers may
    take a part of a CPU on any node, which makes the rest of that CPU useless; one CPU is left to read and preprocess.
    """
    whole = sum(max(math.floor(node.get("CPU", 0)) - 1, 0) for node in nodes)
    if use_gpu:
        return min(int(sum(node.get("GPU", 0) for node in nodes)) // workers, round(1 / DRIVER_CPUS))
    return min((whole - 1) // workers, round(1 / DRIVER_CPUS))


def run_trial(
    config: dict[str, str],
    jobs: Mapping[str, PretrainJob],
    before: Mapping[str, list[dict[str, float]]],
    place: Storage,
    settings: SearchSettings,
) -> None:
    """What Tune runs: one pre-training with Ray Train, from its newest checkpoint if there is one.

    The epochs that earlier commands ran, `before`, are reported first, so that ASHA knows of them. This process writes
    the outcome, not the command, so the outcome is kept even if the command is killed.
    """
    import ray.train
    from ray import tune

    id = config["trial"]
    for row in before[id]:
        tune.report(row | {"score": score(row, settings.select)})
    if id not in jobs:
        return
    workers = (settings.num_workers, settings.num_workers)
    callbacks = [_hand_on_epochs(settings.select)]
    try:
        make_trainer(jobs[id], place, id, workers, settings.use_gpu, settings.max_failures, callbacks).fit()
    except ray.train.TrainingFailedError as error:
        raise LsemvaeError(root_cause(error)) from None
    digest, metrics = keep_bundle(place / id)
    write_outcome(place / id, Outcome("finished", metrics, digest))


def _hand_on_epochs(select: Select) -> Any:
    """A callback of Ray Train that gives Tune each epoch's validation; reports within an epoch have none."""
    from ray.tune.integration.ray_train import TuneReportCallback

    class HandOnEpochs(TuneReportCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            values = {name: value for name, value in metrics[0].items() if name.startswith("val.")}
            if len(values) > 1:
                epoch = metrics[0]["epoch"]
                told = {"epoch": epoch, "epochs": epoch + 1, "score": score(values, select), **values}
                super().after_report(run_context, [told], None)

    return HandOnEpochs()


class Ledger:
    """What is known of each trial while the search runs: its epochs, and how it ended.

    `before` are the epochs of earlier commands. Only trials in `left` can end here.
    """

    def __init__(
        self,
        left: Mapping[str, Trial],
        history: Mapping[str, list[dict[str, float]]],
        runs: Mapping[str, Run],
        place: Storage,
        say: Callable[[str, str], None],
    ) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._left, self._history, self._runs, self._place, self._say = left, history, runs, place, say

    def started(self, id: str) -> None:
        if id in self._left:
            self._runs[id].status("RUNNING")

    def epoch(self, id: str, result: Mapping[str, Any]) -> None:
        """Remember an epoch that is new."""
        rows = self._history[id]
        if result.get("epochs", 0) <= (rows[-1]["epochs"] if rows else 0):
            return
        rows.append({key: value for key, value in result.items() if key in ("epoch", "epochs") or key[:4] == "val."})
        (self._place / id).write_bytes(HISTORY, json.dumps(rows).encode())

    def ended(self, id: str) -> None:
        """A trial that wrote no outcome was stopped by ASHA."""
        if id not in self._left:
            return
        outcome = read_outcome(self._place / id)
        if outcome is None:
            outcome = Outcome("stopped", min(self._history[id], key=lambda row: row["val.loss"]))
            write_outcome(self._place / id, outcome)
        forget_checkpoints(self._place / id)
        self._close(id, outcome)

    def failed(self, id: str, reason: str) -> None:
        if id in self._left:
            self._close(id, Outcome("failed", reason=reason))

    def _close(self, id: str, outcome: Outcome) -> None:
        self.outcomes[id] = outcome
        self._runs[id].tags({"outcome": outcome.state})
        self._runs[id].end("FAILED" if outcome.state == "failed" else "FINISHED")
        settings = describe_settings(self._left[id].settings)
        self._say(id, f"{outcome.state}: {settings}: {outcome.reason or describe_metrics(outcome.metrics)}")


def _follow(ledger: Ledger, require: Callable[[], None]) -> Any:
    """A callback of Ray Tune that keeps the ledger, and calls `require` again and again."""
    from ray import tune

    class Follow(tune.Callback):
        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            require()

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ledger.started(trial.config["trial"])

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            ledger.epoch(trial.config["trial"], result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ledger.ended(trial.config["trial"])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            lines = [line for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
            ledger.failed(trial.config["trial"], lines[-1].removeprefix("lsemvae.errors.LsemvaeError: ").strip())

    return Follow()


def search(
    trials: Sequence[Trial],
    jobs: Mapping[str, PretrainJob],
    done: Mapping[str, Outcome],
    numbers: Mapping[str, int],
    place: Storage,
    settings: SearchSettings,
    max_concurrent: int,
    require: Callable[[], None] = lambda: None,
) -> dict[str, Outcome]:
    """Run the trials that are not `done`, at most `max_concurrent` at the same time -> how they ended.

    An error of `require`, which is called again and again, ends the search.
    """
    from ray import tune

    left = {trial.id: trial for trial in trials if trial.id not in done}
    # Only ASHA has to hear of the trials of earlier commands.
    asked = [trial.id for trial in trials if settings.asha or trial.id in left]
    history = {id: read_history(place / TRIALS / id) for id in asked}
    before = {id: list(rows) if settings.asha else [] for id, rows in history.items()}
    runs = {id: Run(run_id) for id in left if (run_id := jobs[id].tracking_run)}
    parameters = {"before": before, "place": place / TRIALS, "settings": settings}
    parameters["jobs"] = {id: job for id, job in jobs.items() if id in left}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the ledger reports each failure in one line
    with Bar(len(left), "search", "trials") as bar:

        def say(id: str, text: str) -> None:
            bar.write(f"trial {numbers[id]} of {len(numbers)} {text}")
            bar.update(1)

        ledger = Ledger(left, history, runs, place / TRIALS, say)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, **parameters), {"cpu": DRIVER_CPUS}),
            param_space={"trial": tune.grid_search(asked)},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=max_concurrent, scheduler=_scheduler(trials) if settings.asha else None
            ),
            run_config=tune.RunConfig(
                name=STATE,
                storage_path=place.base,
                storage_filesystem=place.filesystem,
                verbose=0,
                callbacks=[_follow(ledger, require)],
            ),
        ).fit()
    place.filesystem.delete_dir(place.path(STATE))  # Tune's own state; what is needed again is in `trials`
    return ledger.outcomes


def _scheduler(trials: Sequence[Trial]) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    epochs = max(trial.recipe.optim.epochs for trial in trials)
    first = max(1, min(epochs, math.ceil(max(trial.recipe.kl_warmup_epochs for trial in trials))))
    return ASHAScheduler(
        # Trials end by themselves: one that is stopped at its last epoch would leave no bundle.
        "epochs", "score", "max", max_t=epochs, grace_period=first, reduction_factor=3, stop_last_trials=False
    )  # fmt: skip
