"""Search a grid of pre-training settings with Ray Tune: a table, a plot, and the best recipe as a file.

Each trial pre-trains on the training subjects of the shards and is judged on the held-out ones, the same for every
trial (ingest's --val-share, 90:10 by default). Which trial is best is decided by --select, never by the loss: it
weighs its terms with the very settings that are searched. Collapsed trials come last.

The same command again continues: finished trials are not run again, an unfinished one goes on from its checkpoint, a
failed one is tried again. Another grid with the same recipe and data adds its trials to those that are there.
"""

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from command import run_recipe_command, start_ray
from tqdm import tqdm

from lsemvae.config import PretrainRecipe, with_settings
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.plots import curves as plots
from lsemvae.recipes import PRETRAIN, recipe_json
from lsemvae.storage import Storage
from lsemvae.tracking import Run
from lsemvae.training.failures import root_cause
from lsemvae.training.grid import Trial, digest, make_trials, parse_grid, require_comparable, searched
from lsemvae.training.launch import keep_bundle, make_feeds, make_job, make_trainer, require_resources, require_writable
from lsemvae.training.pretrain import PretrainJob
from lsemvae.training.trials import (
    BEST,
    LABEL,
    PLOT,
    RESULT,
    SIGN,
    TABLE,
    Outcome,
    Select,
    best_of,
    forget_checkpoints,
    make_table,
    read_history,
    read_outcome,
    say_metrics,
    say_settings,
    score,
    write_outcome,
)

PLAN = "tune.json"
DRIVER_CPUS = 0.01  # what a trial holds beside its workers, which do the work: a hundred of them hold one CPU


@dataclass(frozen=True)
class Args:
    """Search a grid of pre-training settings."""

    recipe: Annotated[PretrainRecipe, tyro.conf.arg(name="")]
    data: str
    """Shards: the --output of workflows/ingest.py (folder or s3:// URI)."""
    storage: str
    """Where trials, table, plot and best recipe go (folder or s3:// URI that every worker can reach)."""
    grid: tuple[str, ...]
    """What to try: fields of the recipe with values, such as beta=0.5,1 optim.learning_rate=1e-4,1e-3; every
    combination is a trial. Values of a field that holds several are joined by +: channels=4+8+8,8+16+16."""
    select: Select = "pearson_r"
    """What decides. pearson_r: the highest mean Pearson r of held-out recordings and their reconstructions;
    reconstruction: the lowest squared error, unweighted."""
    asha: bool = False
    """Stop trials that do worse than others after as many epochs (ASHA: of three, one goes on), once the KL term has
    its full weight. What was stopped is not run again."""
    num_workers: int = 1
    """Training workers of each trial."""
    use_gpu: bool = False
    """One GPU for each worker."""
    max_concurrent: int | None = None
    """Trials at a time; by default, and at most, as many as the cluster has room for."""
    name: str | None = None
    """The search's name; by default it follows from recipe and data, so that the same command resumes."""
    max_failures: int = 3
    """How often lost workers are replaced before a trial fails."""
    cache: str | None = None
    """A folder on the local disk of each training machine for prepared recordings, 240 kB each, which the trials share:
    only the first epoch of the first decodes and preprocesses."""
    wait_s: float = 600
    """How long to wait for a cluster that has too few free processors or GPUs for one trial."""


def main(args: Args) -> None:
    data = ShardedDataset.open(args.data)
    grid = parse_grid(args.recipe, args.grid)
    trials = make_trials(args.recipe, grid, data.manifest.digest)
    name = args.name or f"tune-{digest(asdict(args.recipe), data.manifest.digest)}"
    storage = Storage.open(args.storage)
    place = storage / name
    plan = read_plan(place, args.recipe, data.manifest.digest)
    for trial in trials:
        plan["trials"].setdefault(trial.id, {"settings": trial.settings})
    if args.select == "reconstruction":
        require_comparable(plan["trials"], place.uri)
    if min(args.num_workers, args.max_concurrent or 1) < 1:
        raise LsemvaeError("--num-workers and --max-concurrent take 1 or more")
    feeds = {trial.id: make_feeds(data, trial.recipe, cache=args.cache) for trial in trials}
    for of_trial in feeds.values():
        of_trial["train"].order.streams_of(0, args.num_workers)

    outcomes = {id: outcome for id in plan["trials"] if (outcome := read_outcome(place / "trials" / id))}
    left = [trial for trial in trials if trial.id not in outcomes]
    told = json.loads(place.read_bytes(RESULT)) if place.exists(RESULT) else {"trials": [], "select": None}
    if not left and {trial.id for trial in trials} <= set(told["trials"]) and told["select"] == args.select:
        print(f"{name} is finished: nothing to do. Give other values to try more, or another --name to start anew.")
        table = make_table(plan["trials"], args.recipe, outcomes, args.select)
        say_results(table, place, args.select, plan["url"])
        return

    require_writable(place)
    if left:
        start_ray()
        require_resources(args.num_workers, args.use_gpu, args.wait_s, drivers=1)
    run = Run.start("tune", name, asdict(args.recipe), resume=plan.get("run"))
    run.tags({"data": data.storage.uri, "data_digest": data.manifest.digest, "storage": place.uri})
    plan |= {"run": run.run_id, "url": run.url}
    numbers = {id: number for number, id in enumerate(plan["trials"], start=1)}
    jobs = {}
    for trial in trials:
        entry = plan["trials"][trial.id]
        if "run" not in entry:
            child = Run.start("tune", f"{name}-{numbers[trial.id]}", asdict(trial.recipe), parent=run.run_id)
            child.tags({"trial": str(numbers[trial.id]), "settings": say_settings(trial.settings)})
            child.status("SCHEDULED")
            entry["run"] = child.run_id
        jobs[trial.id] = make_job(data, trial.recipe, feeds[trial.id], entry["run"])
    place.write_bytes(PLAN, json.dumps(plan, indent=2).encode())
    rows = next(iter(jobs.values())).provenance["data"]["rows"]
    print(
        f"{name}: {len(trials)} trials, {len(left)} to run; {rows['train']} recordings to train on, {rows['val']} to "
        f"validate, held out by subject\nMLflow: {plan['url']}",
        flush=True,
    )
    try:
        if left:
            outcomes |= search(trials, jobs, outcomes, numbers, place, args)
        finish(plan, outcomes, trials, place, run, args)
    except BaseException:
        run.end("FAILED")
        raise


def read_plan(place: Storage, recipe: PretrainRecipe, data_digest: str) -> dict[str, Any]:
    """What the place's `tune.json` says, or an empty plan. Raises LsemvaeError where it is about something else."""
    wanted = {"recipe": json.loads(recipe_json(recipe)), "data_digest": data_digest}
    if not place.exists(PLAN):
        return wanted | {"trials": {}}
    plan = json.loads(place.read_bytes(PLAN))
    for key, what in (("recipe", "another recipe"), ("data_digest", "other data")):
        if plan[key] != wanted[key]:
            raise LsemvaeError(f"{place.uri} holds a search over {what}: give another --name")
    return plan


# --- the trials ------------------------------------------------------------------------------------------------


def room(nodes: Sequence[Mapping[str, float]], workers: int, use_gpu: bool) -> int:
    """How many trials can run at a time on nodes with these resources, such that none waits for ever.

    A trial that holds its place while its workers, or the tasks that read for them, find none would do so. Drivers
    may take a part of a CPU on any node, so that the rest of it is no use; one CPU is left to read and preprocess.
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
    args: Args,
) -> None:
    """What Tune runs: one pre-training with Ray Train, from its newest checkpoint if there is one.

    The epochs that it had `before` are reported first, so that ASHA knows of them. The outcome is written to the
    place by this process: it stands even when the command is killed before it hears of it.
    """
    import ray.train
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    class Report(TuneReportCallback):
        """Hands on what each epoch's validation gave; reports within an epoch have none."""

        # In quotes: a class within a function that travels as its code does not find the module's names.
        def after_report(self, run_context: "Any", metrics: "list[dict[str, Any]]", checkpoint: "Any") -> None:
            values = {name: value for name, value in metrics[0].items() if name.startswith("val.")}
            if len(values) > 1:
                epoch = metrics[0]["epoch"]
                told = {"epoch": epoch, "epochs": epoch + 1, "score": score(values, args.select), **values}
                super().after_report(run_context, [told], None)

    id = config["trial"]
    for row in before[id]:
        tune.report(row | {"score": score(row, args.select)})
    if id not in jobs:
        return
    callbacks = [Report()]
    workers = (args.num_workers, args.num_workers)
    try:
        make_trainer(jobs[id], place, id, workers, args.use_gpu, args.max_failures, callbacks).fit()
    except ray.train.TrainingFailedError as error:
        raise LsemvaeError(root_cause(error)) from None
    digest, metrics = keep_bundle(place / id)
    write_outcome(place / id, Outcome("finished", metrics, digest))


def search(
    trials: Sequence[Trial],
    jobs: Mapping[str, PretrainJob],
    done: Mapping[str, Outcome],
    numbers: Mapping[str, int],
    place: Storage,
    args: Args,
) -> dict[str, Outcome]:
    """Run the trials that are not done -> how they ended."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    left = {trial.id: trial for trial in trials if trial.id not in done}
    # Only ASHA has to hear of what earlier commands did.
    asked = [trial.id for trial in trials if args.asha or trial.id in left]
    history = {id: read_history(place / "trials" / id) for id in asked}
    before = {id: list(rows) if args.asha else [] for id, rows in history.items()}
    runs = {id: Run(jobs[id].tracking_run) for id in left}
    outcomes: dict[str, Outcome] = {}

    class Follow(tune.Callback):
        """Remembers every epoch, and says how each trial ended."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if (id := trial.config["trial"]) in left:
                runs[id].status("RUNNING")

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            id = trial.config["trial"]
            known = history[id][-1]["epochs"] if history[id] else 0
            if result.get("epochs", 0) <= known:
                return
            row = {key: value for key, value in result.items() if key in ("epoch", "epochs") or key[:4] == "val."}
            history[id].append(row)
            (place / "trials" / id).write_bytes("epochs.json", json.dumps(history[id]).encode())

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if (id := trial.config["trial"]) not in left:
                return
            outcome = read_outcome(place / "trials" / id)
            if outcome is None:
                outcome = Outcome("stopped", min(history[id], key=lambda row: row["val.loss"]))
                write_outcome(place / "trials" / id, outcome)
            forget_checkpoints(place / "trials" / id)
            self.ended(id, outcome)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if (id := trial.config["trial"]) not in left:
                return
            lines = [line for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
            self.ended(id, Outcome("failed", reason=lines[-1].removeprefix("lsemvae.errors.LsemvaeError: ").strip()))

        def ended(self, id: str, outcome: Outcome) -> None:
            outcomes[id] = outcome
            runs[id].tags({"outcome": outcome.state})
            runs[id].end("FAILED" if outcome.state == "failed" else "FINISHED")
            tqdm.write(
                f"trial {numbers[id]} of {len(numbers)} {outcome.state}: {say_settings(left[id].settings)}: "
                + (outcome.reason or say_metrics(outcome.metrics))
            )
            bar.update(1)

    most = room([node["Resources"] for node in ray.nodes() if node["Alive"]], args.num_workers, args.use_gpu)
    if most < 1:
        raise LsemvaeError("no trial fits the machines that are there: ask for fewer --num-workers, or larger machines")
    scheduler = None
    if args.asha:
        epochs = max(trial.recipe.optim.epochs for trial in trials)
        first = max(1, min(epochs, math.ceil(max(trial.recipe.kl_warmup_epochs for trial in trials))))
        scheduler = ASHAScheduler(
            # Trials end by themselves: one that is stopped at its last epoch would leave no bundle.
            "epochs", "score", "max", max_t=epochs, grace_period=first, reduction_factor=3, stop_last_trials=False
        )  # fmt: skip
    parameters = {"before": before, "place": place / "trials", "args": args}
    parameters["jobs"] = {id: job for id, job in jobs.items() if id in left}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what failed is said in a line
    with tqdm(total=len(left), desc="trials", unit="trial") as bar:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, **parameters), {"cpu": DRIVER_CPUS}),
            param_space={"trial": tune.grid_search(asked)},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=min(most, args.max_concurrent or most), scheduler=scheduler
            ),
            run_config=tune.RunConfig(
                name="of_tune",
                storage_path=place.base,
                storage_filesystem=place.filesystem,
                verbose=0,
                callbacks=[Follow()],
            ),
        ).fit()
    place.filesystem.delete_dir(place.path("of_tune"))  # Tune's own state; what is needed again is in `trials`
    return outcomes


# --- the results -----------------------------------------------------------------------------------------------


def finish(
    plan: Mapping[str, Any],
    outcomes: Mapping[str, Outcome],
    trials: Sequence[Trial],
    place: Storage,
    run: Run,
    args: Args,
) -> None:
    """Write table, plot and best recipe, to the place and to the parent run, and say what was found."""
    table = make_table(plan["trials"], args.recipe, outcomes, args.select)
    best = best_of(table)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table.to_csv(folder / TABLE, index=False)
        measured = table[table["state"] != "failed"]
        if not measured.empty:
            plots.grid_search(
                {name: list(measured[name]) for name in searched(plan["trials"])},
                measured[args.select].tolist(),
                measured["collapsed"].tolist(),
                LABEL[args.select],
                folder / PLOT,
                best=0 if best else None,
            )
        if best:
            recipe = with_settings(args.recipe, plan["trials"][best]["settings"])
            (folder / BEST).write_text(recipe_json(recipe))
        for file in sorted(folder.iterdir()):
            place.write_bytes(file.name, file.read_bytes())
            run.file(file)
    failed = [outcomes[trial.id] for trial in trials if outcomes[trial.id].state == "failed"]
    run.tags({"grid": " ".join(args.grid), "select": args.select, "best": str(table.iloc[0]["trial"]) if best else ""})
    if best:
        run.metrics({f"best.{name}": value for name, value in outcomes[best].metrics.items() if name[:4] == "val."})
    run.end("FAILED" if len(failed) == len(trials) else "FINISHED")
    done = sorted(id for id, outcome in outcomes.items() if outcome.state != "failed")
    place.write_bytes(RESULT, json.dumps({"trials": done, "select": args.select}, indent=2).encode())
    say_results(table, place, args.select, plan["url"])
    if len(failed) == len(trials):
        raise LsemvaeError(f"all trials failed: {failed[0].reason}")


def say_results(table: pd.DataFrame, place: Storage, select: Select, url: str) -> None:
    better = "highest" if SIGN[select] > 0 else "lowest"
    print(f"\nOf each trial the epoch with the lowest validation loss; best: {better} {select}, collapsed ones last\n")
    shown = table.drop(columns=["id", "reason"]).rename(columns=lambda name: name.removeprefix("model."))
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep=""))
    for row in table[table["state"] == "failed"].itertuples():
        print(f"\ntrial {row.trial} failed: {row.reason}")
    print(f"\ntable, plot: {place.uri}   ({TABLE}, {PLOT})")
    if best := best_of(table):
        print(f"bundle:      {(place / 'trials' / best / 'bundle').uri}")
        print(f"pre-train:   python workflows/pretrain.py {(place / BEST).uri} --data …   (--all: on every subject)")
    else:
        print("warning: no trial finished without collapse, so there is no best recipe:")
        print("         raise reconstruction_weight, lower beta, or train longer")
    print(f"MLflow:      {url}")


if __name__ == "__main__":
    run_recipe_command(main, Args, PRETRAIN, storage=tyro.MISSING, grid=tyro.MISSING)
