"""Search a grid of pre-training settings with Ray Tune: a table, a plot, and the best recipe as a file.

Each trial pre-trains on the training subjects of the shards and is ranked on the held-out subjects, which are the same
for every trial (ingest's --val-share, 90:10 by default). --select ranks the trials by a metric that the loss weights do
not affect; the loss itself cannot rank them, since its weights are searched. Collapsed trials come last.

The same command again resumes: finished trials are not run again, an unfinished one continues from its checkpoint, a
failed one is tried again. Another grid with the same recipe and data adds its trials to those that are there.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from command import run_recipe_command, start_ray
from options import RARE

from lsemvae.config import PretrainRecipe, recipe_from, with_settings
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.fields import as_json
from lsemvae.lease import Lease
from lsemvae.recipes import PRETRAIN, recipe_json
from lsemvae.storage import Storage
from lsemvae.tracking import Run
from lsemvae.training.grid import Trial, digest, make_trials, parse_grid, require_comparable, searched
from lsemvae.training.launch import Feeds, Source, make_feeds, make_job, require_resources, require_writable
from lsemvae.training.pretrain import PretrainJob
from lsemvae.training.search import TRIALS, SearchSettings, room, search
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
    describe_settings,
    make_table,
    read_outcome,
)

PLAN = "tune.json"
AGAIN = "Delete it and give the same command again"


@dataclass(frozen=True)
class Args:
    """Search a grid of pre-training settings."""

    recipe: Annotated[PretrainRecipe, tyro.conf.arg(name=""), RARE]
    data: str
    """Shards: the --output of workflows/ingest.py (folder or s3:// URI)."""
    storage: str
    """Where trials, table, plot and best recipe go (folder or s3:// URI that every worker can reach)."""
    grid: tuple[str, ...]
    """Fields of the recipe with their values, such as beta=0.5,1 optim.learning_rate=1e-4,1e-3; every combination is a
    trial. Join the values of a field that holds several by +: channels=4+8+8,8+16+16."""
    select: Select = "pearson_r"
    """How trials are ranked. pearson_r: highest mean Pearson r of held-out recordings and their reconstructions;
    reconstruction: lowest squared error, unweighted."""
    asha: bool = False
    """Stop trials that do worse than others after the same number of epochs (ASHA: one of three continues), once the KL
    term has its full weight. A stopped trial is not run again."""
    num_workers: int = 1
    """Training workers of each trial."""
    use_gpu: bool = False
    """One GPU for each worker."""
    max_concurrent: int | None = None
    """Trials at the same time; by default, and at most, as many as the cluster has room for."""
    name: str | None = None
    """The search's name; by default derived from recipe and data, so that the same command resumes."""
    max_failures: Annotated[int, RARE] = 3
    """How often lost workers are replaced before a trial fails."""
    cache: Annotated[str | None, RARE] = None
    """A folder on the local disk of each training machine for prepared recordings, 120 kB each. All trials share it:
    only the first epoch of the first trial decodes and preprocesses."""
    wait_s: Annotated[float, RARE] = 600
    """How long to wait for machines when the cluster has too few CPUs or GPUs for one trial."""


def main(args: Args) -> None:
    data = ShardedDataset.open(args.data)
    trials = make_trials(args.recipe, parse_grid(args.recipe, args.grid), data.manifest.digest)
    name = args.name or f"tune-{digest(as_json(args.recipe), data.manifest.digest)}"
    place = Storage.open(args.storage) / name
    plan = read_plan(place, args.recipe, data.manifest.digest)
    for trial in trials:
        plan["trials"].setdefault(trial.id, {"settings": trial.settings})
    if args.select == "reconstruction":
        require_comparable(plan["trials"], place.uri)
    if min(args.num_workers, args.max_concurrent or 1) < 1:
        raise LsemvaeError("--num-workers and --max-concurrent take 1 or more")
    feeds = {trial.id: make_feeds([Source(data)], trial.recipe, cache=args.cache) for trial in trials}
    for of_trial in feeds.values():
        of_trial.train.order.streams_of(0, args.num_workers)
    if is_finished(args, data, trials, place, name):
        return
    require_writable(place)
    with Lease(place) as lease:
        if not is_finished(args, data, trials, place, name):  # by now, by another command
            run_search(args, data, trials, feeds, name, place, lease)


def is_finished(args: Args, data: ShardedDataset, trials: Sequence[Trial], place: Storage, name: str) -> bool:
    """Whether the search has its result; then shows it."""
    told = {"trials": [], "select": None}
    if place.exists(RESULT):
        told = place.read_json(RESULT, f"{AGAIN}: it is made from the trials' results", ("trials", "select"))
    plan = read_plan(place, args.recipe, data.manifest.digest)
    outcomes = outcomes_of(plan, place)
    ids = {trial.id for trial in trials}
    if not (ids <= outcomes.keys() and ids <= set(told["trials"]) and told["select"] == args.select):
        return False
    print(f"{name} is finished: nothing to do. Give other values to try more, or another --name to start anew.")
    say_results(make_table(plan["trials"], args.recipe, outcomes, args.select), place, args.select, plan["url"])
    return True


def outcomes_of(plan: Mapping[str, Any], place: Storage) -> dict[str, Outcome]:
    """How the trials of the plan ended, of those that have."""
    return {id: outcome for id in plan["trials"] if (outcome := read_outcome(place / TRIALS / id))}


def run_search(
    args: Args,
    data: ShardedDataset,
    trials: Sequence[Trial],
    feeds: Mapping[str, Feeds],
    name: str,
    place: Storage,
    lease: Lease,
) -> None:
    """Run the trials that are left, and write the results."""
    plan = read_plan(place, args.recipe, data.manifest.digest)
    for trial in trials:
        plan["trials"].setdefault(trial.id, {"settings": trial.settings})
    outcomes = outcomes_of(plan, place)
    left = [trial for trial in trials if trial.id not in outcomes]
    if left:
        start_ray()
        most = trials_at_once(args, len(left))
    run = Run.start("tune", name, as_json(args.recipe), resume=plan.get("run"), place=place.uri)
    run.tags({"data": data.storage.uri, "data_digest": data.manifest.digest, "storage": place.uri})
    run.reads(data)
    plan |= {"run": run.run_id, "url": run.url}
    jobs = make_jobs(plan, trials, data, feeds, name)
    place.write_bytes(PLAN, json.dumps(plan, indent=2).encode())
    rows = next(iter(jobs.values())).provenance["data"]["rows"]
    print(
        f"{name}: {len(trials)} trials, {len(left)} to run; {rows['train']} recordings to train on, {rows['val']} to "
        f"validate, held out by subject\nMLflow: {plan['url']}",
        flush=True,
    )
    settings = SearchSettings(args.select, args.asha, args.num_workers, args.use_gpu, args.max_failures)
    try:
        if left:
            outcomes |= search(trials, jobs, outcomes, numbers_of(plan), place, settings, most, lease.require)
        finish(plan, outcomes, trials, place, run, args)
    except BaseException:
        lease.require()  # otherwise the command that has taken over goes on with this MLflow run
        run.end("FAILED")
        raise


def read_plan(place: Storage, recipe: PretrainRecipe, data_digest: str) -> dict[str, Any]:
    """The place's `tune.json`, or an empty plan. Raises LsemvaeError where it is of another search."""
    wanted = {"recipe": json.loads(recipe_json(recipe)), "data_digest": data_digest}
    if not place.exists(PLAN):
        return wanted | {"trials": {}}
    plan = place.read_json(
        PLAN, f"{AGAIN}: finished trials are kept, and get new MLflow runs", ("recipe", "data_digest", "trials")
    )
    for same, what in (
        (recipe_from(PretrainRecipe, plan["recipe"]) == recipe, "another recipe"),
        (plan["data_digest"] == data_digest, "other data"),
    ):
        if not same:
            raise LsemvaeError(f"{place.uri} holds a search over {what}: give another --name")
    return plan


def numbers_of(plan: Mapping[str, Any]) -> dict[str, int]:
    """The number of each trial, from 1, in the order in which they were asked for."""
    return {id: number for number, id in enumerate(plan["trials"], start=1)}


def make_jobs(
    plan: dict[str, Any], trials: Sequence[Trial], data: ShardedDataset, feeds: Mapping[str, Feeds], name: str
) -> dict[str, PretrainJob]:
    """The trials' jobs; each trial that has none yet gets an MLflow run below the search's, noted in the plan."""
    jobs, numbers = {}, numbers_of(plan)
    for trial in trials:
        entry = plan["trials"][trial.id]
        if "run" not in entry:
            child = Run.start("tune", f"{name}-{numbers[trial.id]}", as_json(trial.recipe), parent=plan["run"])
            child.tags({"trial": str(numbers[trial.id]), "settings": describe_settings(trial.settings)})
            child.status("SCHEDULED")
            entry["run"] = child.run_id
        jobs[trial.id] = make_job([Source(data)], trial.recipe, feeds[trial.id], entry["run"])
    return jobs


def trials_at_once(args: Args, left: int) -> int:
    """How many trials run at the same time on the machines that can be had. Raises LsemvaeError where none fits."""
    import ray

    wanted = min(left, args.max_concurrent or left)
    require_resources(args.num_workers, args.use_gpu, args.wait_s, drivers=1, wanted=wanted)
    most = room([node["Resources"] for node in ray.nodes() if node["Alive"]], args.num_workers, args.use_gpu)
    if most < 1:
        raise LsemvaeError("no trial fits the machines that are there: ask for fewer --num-workers, or larger machines")
    return min(most, wanted)


def finish(
    plan: Mapping[str, Any],
    outcomes: Mapping[str, Outcome],
    trials: Sequence[Trial],
    place: Storage,
    run: Run,
    args: Args,
) -> None:
    """Write table, plot and best recipe to the place and to the parent run, and print the results."""
    table = make_table(plan["trials"], args.recipe, outcomes, args.select)
    best = best_of(table)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table.to_csv(folder / TABLE, index=False)
        measured = table[table["state"] != "failed"]
        if not measured.empty:
            from lsemvae.plots import curves  # imports matplotlib

            curves.grid_search(
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
