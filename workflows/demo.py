"""Run all steps on one machine, from recordings to scores, with the commands that a user would type.

Without --data it simulates a cohort whose best achievable AUROC is known. What an earlier run finished is used again.
"""

import gc
import json
import os
import runpy
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np
import pandas as pd
import yaml
from command import run_command
from servers import endpoint, free_port, mlflow_server, mlflow_starting

from lsemvae.bundle import describe
from lsemvae.cohorts.labels import NO_TASKS
from lsemvae.data.shards import ShardedDataset, unpack
from lsemvae.errors import LsemvaeError
from lsemvae.formats.plain import as_csv
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.record import Record
from lsemvae.storage import Storage

ROOT = Path(__file__).parents[1]
PREFERRED_TASKS = ("ph", "norm")
LAST = "last.json"
"""In the demo's folder: which models its last run made."""
MEANING = """\
What the figures mean: each row is scored on subjects that its training had not seen. The pre-trained encoder has seen
all recordings without labels, for about two minutes. A difference whose interval holds 0 shows no difference. With so
few recordings, expect classical features and an untrained encoder to do as well as the pre-trained one, or better:
whether longer pre-training on more recordings helps, these figures cannot show (docs/results.md).
"""


@dataclass(frozen=True)
class Args:
    folder: Path = Path("demo")
    """Folder for everything that the demo makes."""
    data: str | None = None
    """Real recordings, a folder or s3:// URI; by default the demo simulates a cohort."""
    labels: str | None = None
    """A CSV with labels for --data; workflows/ingest.py --help explains it."""
    task: str | None = None
    """Label to predict; by default ph, otherwise norm, otherwise the first label with two classes."""
    subjects: int = 160
    """Number of subjects to simulate."""
    pretrain_recipe: str = "cpu"
    finetune_recipe: str = "linear"
    ui: bool = False
    """Only open the MLflow UI of the last run; Ctrl-C ends it."""
    serve: bool = False
    """Only serve the models of the last run, with a page for people; Ctrl-C ends it."""


@dataclass(frozen=True)
class Models:
    """What a run makes: a model of six and one of twelve leads for one label, in one folder."""

    place: Path
    task: str

    @property
    def names(self) -> dict[str, str]:
        return {leads: f"{self.place.name}-{self.task}-{leads}L" for leads in ("6", "12")}

    def output(self, leads: str) -> Path:
        return self.place / f"{self.task}-{leads}L"

    @property
    def recording(self) -> Path:
        """A recording that the encoder was not trained on, in one file."""
        return self.place / "recording.csv"


def main(args: Args) -> None:
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers end, too
    if args.ui:
        with mlflow_starting(folder) as (uri, wait):
            wait()
            print(f"MLflow UI: {uri}     (Ctrl-C ends it)", flush=True)
            until_interrupted(wait)
    elif args.serve:
        serve(folder, read_last(folder))
    else:
        began = time.monotonic()
        with mlflow_starting(folder) as (uri, wait):
            os.environ |= {"MLFLOW_TRACKING_URI": uri, "PYTHONWARNINGS": "ignore"}
            place = folder / ("simulated" if args.data is None else sha256(f"{args.data}".encode()).hexdigest()[:8])
            walk(args, folder, place, wait)
        print(f"\nFinished in {time.monotonic() - began:.0f} s.")


def walk(args: Args, folder: Path, place: Path, mlflow_answers: Callable[[], None]) -> None:
    reused: dict[str, bool] = {}
    data = recordings(args, place, reused)
    models = Models(place, args.task or choose_task(data))
    mlflow_answers()

    step("3. Pre-train on all recordings, without labels (two workers)")
    reused["pre-training"] = (place / "pretrain" / "result.json").exists()
    workflow(
        "pretrain", args.pretrain_recipe, "--data", f"{place / 'shards'}:2", "--storage", place, "--name", "pretrain",
        "--cache", place / "cache",
    )  # fmt: skip
    finetune(args, models, place / "pretrain" / "bundle", reused)

    step("5. Promote both (the MLflow UI does the same)")
    for name in models.names.values():
        workflow("promote", "--name", name)

    step("6. Start the endpoint with both, and meanwhile score the whole cohort")
    scores = place / f"scores-{describe(models.output('12') / 'bundle').digest}"
    with endpoint(serving(models, allow_anonymous=True), place / "serve.yaml", **session()) as (url, wait):
        reused["scores of the cohort"] = (scores / "summary.json").exists()
        model = f"models:/{models.names['12']}@champion"
        workflow("score", "--model", model, "--data", place / "shards", "--output", scores)

        step("7. Score one recording online, with 6 and with 12 leads")
        wait()
        record = held_out(place, data)
        marked = "# simulated: nobody's heart\n" if args.data is None else ""  # so that the page says so, too
        models.recording.write_text(marked + as_csv(record.signal_for(LEADS), record.rate_hz, LEADS, decimals=4))
        for leads in (LIMB_LEADS, LEADS):
            say_answer(len(leads), ask(url, record, leads))
    (folder / LAST).write_text(json.dumps({"place": place.name, "task": models.task}))
    say_where(args, folder, models, scores, reused)


def recordings(args: Args, place: Path, reused: dict[str, bool]) -> ShardedDataset:
    """Shards of the user's recordings, or of simulated ones."""
    if args.data is None:
        reused["simulated recordings"] = (place / "cohort").exists()
        if not reused["simulated recordings"]:
            step("1. Simulate a cohort in MIMIC-IV-ECG's layout")
            workflow("simulate", "--output", place / "cohort", "--subjects", args.subjects, "--seed", 0)
    step("2. Recordings -> shards")
    reused["shards"] = (place / "shards" / "manifest.json").exists()
    labels = ["--labels", args.labels] if args.labels else []
    workflow("ingest", "--source", args.data or place / "cohort", "--output", place / "shards", *labels)
    return ShardedDataset.open(str(place / "shards"))


def finetune(args: Args, models: Models, encoder: Path, reused: dict[str, bool]) -> None:
    step(f"4. Fine-tune for {models.task!r}, cross-validated: six limb leads, then twelve leads")
    for leads, name in models.names.items():
        output = models.output(leads)
        reused[f"fine-tuning on {leads} leads"] = finished(output, encoder)
        if finished(output, encoder):
            print(f"{name} is already fine-tuned:\n")
            print(pd.read_csv(output / "results.csv").fillna("").to_string(index=False))
            continue
        workflow(
            "finetune", args.finetune_recipe, "--data", models.place / "shards", "--task", models.task,
            "--leads", leads, "--encoder", encoder, "--output", output, "--model-name", name,
        )  # fmt: skip


def say_where(args: Args, folder: Path, models: Models, scores: Path, reused: dict[str, bool]) -> None:
    """The last screen: the tables, what they mean, where the rest is, and how to see the page."""
    step("Where to look")
    for leads in models.names:
        print(f"{models.task}, {leads} leads, out of fold:\n{table(models.output(leads)).to_string(index=False)}\n")
    print(MEANING)
    if args.data is None:
        truth = json.loads((models.place / "cohort" / "truth.json").read_text())
        print(f"best AUROC that any reader of these simulated ECGs can expect: {truth['cohort_auroc']:.3f}\n")
    for what, again in (("reused from an earlier run", True), ("made anew", False)):
        named = [name for name, found in reused.items() if found == again]
        if named or not again:
            print(f"{what}: {', '.join([*named, *([] if again else ['the answers of the endpoint'])])}")
    where = "" if folder.name == "demo" else f" DEMO={folder}"
    print(f"\npicture:           {models.output('12') / 'curves.png'}")
    print(f"tables:            {models.output('6')}, {models.output('12')}   (results, differences, scores, curves)")
    print(f"scores:            {scores}   (scores-*.parquet, scores-*.csv, summary.json)")
    print(f"MLflow:            make ui{where}   (pictures, metrics, models)")
    print(f"an ECG on a page:  make serve-demo{where}")


def table(output: Path) -> pd.DataFrame:
    """Each row's figures, and the pre-trained encoder's AUROC minus its AUROC."""
    results, differences = (pd.read_csv(output / name).fillna("") for name in ("results.csv", "differences.csv"))
    difference, excludes = differences.columns[1:]
    title = results.iloc[0]["scored by"]
    names = {"compared with": "scored by", difference: f"AUROC of {title} minus its", excludes: "excludes 0"}
    beside = differences.rename(columns=names)
    return results.iloc[:, :6].merge(beside, on="scored by", how="left").fillna("")


def step(text: str) -> None:
    print(f"\n=== {text} ===", flush=True)


def workflow(name: str, *arguments: object) -> None:
    """Print a command and run it; if it fails, end the demo with its exit status.

    It runs in this process: one of its own would start Ray anew, and import again what this one has.
    """
    words = [f"workflows/{name}.py", *map(str, arguments)]
    print("$ python " + " ".join(word.replace(f"{Path.cwd()}/", "") for word in words), flush=True)
    before, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
        for number, handler in handlers.items():  # Ray takes them over
            signal.signal(number, handler)
    gc.collect()  # what the command has left would keep its actors, and they their CPUs


def session() -> dict[str, str]:
    """The environment in which another process joins the Ray that this one has started."""
    import ray

    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local") or not ray.is_initialized():
        return {}
    mode = os.environ.get("RAY_AUTH_MODE", "token")  # which a local Ray starts with
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": mode}


def serving(models: Models, **args: Any) -> dict[str, Any]:
    """The configuration of serve/config.yaml with the champions of the demo."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = free_port(8000)
    application = config["applications"][0]
    served = {
        "models": [f"models:/{name}@champion" for name in models.names.values()],
        "bundles": str(models.place / "served"),
    }
    application["args"] |= served | args
    application["runtime_env"] = {"env_vars": {"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]}}
    return config


def serve(folder: Path, models: Models) -> NoReturn:
    """Serve the models of the last run until Ctrl-C, with a token that is valid as long."""
    with mlflow_server(folder) as uri, token_file(folder) as (token, file):
        os.environ["MLFLOW_TRACKING_URI"] = uri
        config = serving(models)
        # Ray's dashboard shows what is passed: the name of the file, and not the token.
        config["applications"][0]["runtime_env"]["env_vars"]["LSEMVAE_TOKENS_FILE"] = str(file)
        with endpoint(config, folder / "serve-demo.yaml") as (url, wait):
            wait()
            print(f"\npage:    {url}/")
            print(f"token:   {token}     (the page asks for it)")
            print(f"an ECG:  {models.recording}     (choose it on the page)")
            print("Ctrl-C ends it", flush=True)
            until_interrupted(wait)


@contextmanager
def token_file(folder: Path) -> Iterator[tuple[str, Path]]:
    """A new token, and a file that holds it while the context lasts."""
    token, file = secrets.token_hex(16), folder / "token"
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_text(f"{token}\n")
    try:
        yield token, file
    finally:
        file.unlink()


def until_interrupted(check: Callable[[], None]) -> NoReturn:
    """Wait for Ctrl-C, then end this process after its servers; meanwhile check every few seconds."""
    try:
        while True:
            time.sleep(5)
            check()
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave servers behind
        raise SystemExit(0) from None


def read_last(folder: Path) -> Models:
    try:
        last = Storage.open(folder).read_json(LAST, "Run make demo again", ("place", "task"))
        return Models(folder / last["place"], last["task"])
    except FileNotFoundError:
        raise LsemvaeError(f"{folder} has no finished demo: run make demo first") from None


def held_out(place: Path, data: ShardedDataset) -> Record:
    """The first recording that pre-training has held out."""
    shard = data.manifest.of_split("val")[0]
    return unpack(pd.read_parquet(place / "shards" / shard.path, engine="pyarrow").iloc[0].to_dict())


def ask(url: str, record: Record, leads: tuple[str, ...]) -> dict[str, Any]:
    """The endpoint's answer to these leads of a recording."""
    named = {
        lead: [None if np.isnan(value_mv) else value_mv for value_mv in signal_mv_T.tolist()]
        for lead, signal_mv_T in zip(leads, record.signal_for(leads), strict=True)
    }
    body = {"records": [{"rate_hz": record.rate_hz, "leads": named}]}
    reply = httpx.post(f"{url}/v1/score", json=body, timeout=60)
    reply.raise_for_status()
    return reply.json()["results"][0]


def say_answer(leads: int, answer: dict[str, Any]) -> None:
    model = answer["model"]
    print(
        f"{leads:2d} leads -> {model['name']} version {model['version']}: score {answer['score']:.3f}, "
        f"decision {answer['decision']} (threshold {model['threshold']:.3f}), flags {answer['flags'] or 'none'}"
    )


def choose_task(data: ShardedDataset) -> str:
    """Choose the label to predict; raises LsemvaeError if no label has two classes."""
    counts = {name: n for name, n in data.manifest.labels.items() if name not in NO_TASKS}
    usable = [name for name, n in counts.items() if n["0"] and n["1"] and not n["other"]]
    if not usable:
        raise LsemvaeError("no label has both 0 and 1: give LABELS=<csv> with a key column and a 0/1 column")
    task = next((name for name in PREFERRED_TASKS if name in usable), usable[0])
    print(f"task: {task}   (TASK=… chooses another: {', '.join(usable)})")
    return task


def finished(output: Path, encoder: Path) -> bool:
    if not (output / "results.csv").exists():
        return False
    return describe(output / "bundle").provenance["encoder"]["digest"] == describe(encoder).digest


if __name__ == "__main__":
    run_command(main, Args)
