"""Run all steps on one machine, from recordings to scores, with the commands that a user would type.

Without --data it simulates a cohort whose best achievable AUROC is known. It skips what an earlier run finished.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import yaml
from command import run_command
from servers import end, free_port, mlflow_server, wait_until_healthy

from lsemvae.bundle import describe
from lsemvae.cohorts.labels import NO_TASKS
from lsemvae.data.shards import ShardedDataset, unpack
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS

ROOT = Path(__file__).parents[1]
PREFERRED_TASKS = ("ph", "norm")
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


def main(args: Args) -> None:
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if args.ui:
        with mlflow_server(folder) as uri:
            print(f"MLflow UI: {uri}     (Ctrl-C ends it)")
            signal.pause()
    began = time.monotonic()
    with mlflow_server(folder) as uri:
        os.environ |= {"MLFLOW_TRACKING_URI": uri, "PYTHONWARNINGS": "ignore"}
        place = folder / ("simulated" if args.data is None else sha256(f"{args.data}".encode()).hexdigest()[:8])
        walk(args, folder, place)
    print(f"\nFinished in {time.monotonic() - began:.0f} s. Pictures, metrics and models: `make ui`")


def walk(args: Args, folder: Path, place: Path) -> None:
    source = args.data or str(place / "cohort")
    if args.data is None and not (place / "cohort").exists():
        step("1. Simulate a cohort in MIMIC-IV-ECG's layout")
        workflow("simulate", "--output", place / "cohort", "--subjects", args.subjects, "--seed", 0)

    step("2. Recordings -> shards")
    labels = ["--labels", args.labels] if args.labels else []
    workflow("ingest", "--source", source, "--output", place / "shards", *labels)
    data = ShardedDataset.open(str(place / "shards"))
    task = args.task or choose_task(data)

    step("3. Pre-train on all recordings, without labels (two workers)")
    workflow(
        "pretrain", args.pretrain_recipe, "--data", f"{place / 'shards'}:2", "--storage", place, "--name", "pretrain",
        "--cache", place / "cache",
    )  # fmt: skip
    encoder = place / "pretrain" / "bundle"

    step(f"4. Fine-tune for {task!r}, cross-validated: six limb leads, then twelve leads")
    names = {}
    for leads in ("6", "12"):
        output = place / f"{task}-{leads}L"
        names[leads] = f"{place.name}-{task}-{leads}L"
        if finished(output, encoder):
            print(f"{names[leads]} is already fine-tuned:\n")
            print(pd.read_csv(output / "results.csv").fillna("").to_string(index=False))
            continue
        workflow(
            "finetune", args.finetune_recipe, "--data", place / "shards", "--task", task, "--leads", leads,
            "--encoder", encoder, "--output", output, "--model-name", names[leads],
        )  # fmt: skip

    step("5. Promote both (the MLflow UI does the same)")
    for name in names.values():
        workflow("promote", "--name", name)

    step("6. Serve them, and score a 6-lead and a 12-lead recording online")
    answers = score_online(place, data, names)
    for leads, answer in answers.items():
        model = answer["model"]
        print(
            f"{len(leads):2d} leads -> {model['name']} version {model['version']}: score {answer['score']:.3f}, "
            f"decision {answer['decision']} (threshold {model['threshold']:.3f}), flags {answer['flags'] or 'none'}"
        )

    step("7. Score the whole cohort")
    scores = place / f"scores-{describe(place / f'{task}-12L' / 'bundle').digest}"
    workflow("score", "--model", f"models:/{names['12']}@champion", "--data", place / "shards", "--output", scores)

    step("Where to look")
    for leads in names:
        results = pd.read_csv(place / f"{task}-{leads}L" / "results.csv").fillna("")
        differences = pd.read_csv(place / f"{task}-{leads}L" / "differences.csv")
        print(f"{task}, {leads} leads, out of fold:\n{results.to_string(index=False)}\n")
        print(f"{differences.to_string(index=False)}\n")
    print(MEANING)
    if args.data is None:
        truth = json.loads((place / "cohort" / "truth.json").read_text())
        print(f"best AUROC that any reader of these simulated ECGs can expect: {truth['cohort_auroc']:.3f}\n")
    print(
        f"tables:            {place / f'{task}-6L'}, {place / f'{task}-12L'}   (results, differences, scores, curves)"
    )
    print(f"pre-training:      {json.loads((place / 'pretrain' / 'result.json').read_text())['run']}")
    print(f"scores:            {scores}   (scores-*.parquet, scores-*.csv, summary.json)")
    print("MLflow UI:         make ui" + ("" if folder.name == "demo" else f" DEMO={folder}"))


def step(text: str) -> None:
    print(f"\n=== {text} ===", flush=True)


def workflow(name: str, *arguments: object) -> None:
    """Print a command and run it as a user would; if it fails, end the demo with its exit status."""
    words = [f"workflows/{name}.py", *map(str, arguments)]
    print("$ python " + " ".join(word.replace(f"{Path.cwd()}/", "") for word in words), flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(status)


def score_online(place: Path, data: ShardedDataset, names: dict[str, str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Serve the champions with the settings of serve/config.yaml and score one recording with 6 and with 12 leads."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port = free_port(8000)
    application = config["applications"][0]
    application["args"] |= {
        "models": [f"models:/{name}@champion" for name in names.values()],
        "bundles": str(place / "served"),
        "allow_anonymous": True,  # on 127.0.0.1, while the demo runs
    }
    application["runtime_env"] = {"env_vars": {"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]}}
    path, log = place / "serve.yaml", place / "serve.log"
    path.write_text(yaml.safe_dump(config))
    serve = Path(sys.executable).with_name("serve")
    print(f"$ serve run {path}      (log: {log})", flush=True)
    with log.open("w") as stream:
        environment = {"RAY_ADDRESS": "local"} | os.environ  # start a new Ray unless the user names a cluster
        server = subprocess.Popen(
            [serve, "run", path], cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/readyz", server, log)
        shard = data.manifest.of_split("val")[0]
        row = pd.read_parquet(place / "shards" / shard.path, engine="pyarrow").iloc[0].to_dict()
        record = unpack(row)
        answers = {}
        for leads in (LIMB_LEADS, LEADS):
            named = {
                lead: [None if np.isnan(value_mv) else value_mv for value_mv in signal_mv_T.tolist()]
                for lead, signal_mv_T in zip(leads, record.signal_for(leads), strict=True)
            }
            body = {"records": [{"rate_hz": record.rate_hz, "leads": named}]}
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/score", json=body, timeout=60)
            reply.raise_for_status()
            answers[leads] = reply.json()["results"][0]
        return answers
    finally:
        end(server)


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
