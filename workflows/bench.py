"""Time this project's code and a baseline in turn, in one process. A ratio above 1 means that this project is better.

python workflows/bench.py model [--device cuda] [--batch 128 1024] [--json FILE]

Each case is a function in workflows/benchmarks. The case `model` needs only torch and numpy; from a bare checkout, run
it with PYTHONPATH=. in front. On a shared CPU, OMP_WAIT_POLICY=PASSIVE keeps waiting threads from spinning, which makes
the ratios steadier.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
from benchmarks.measure import Row, machine

from lsemvae.errors import LsemvaeError
from lsemvae.memory import keep_freed_memory

# Case -> module (with its `add_arguments(parser)`), function, and what it measures. The module of a case is imported
# only when that case is run, because `model` must run without Ray and MLflow.
CASES = {
    "model": ("benchmarks.model", "bench_model", "training step and forward pass against the paper's loop over leads"),
    "features": (
        "benchmarks.features",
        "bench_features",
        "features and scores over time shifts, against explicit shifts",
    ),
    "finetune": (
        "benchmarks.finetune",
        "bench_finetune",
        "five folds on recordings embedded once, against the encoder in every epoch",
    ),
    "explain": ("benchmarks.explain", "bench_explain", "attributions of a batch against captum's loop over recordings"),
    "infer": ("benchmarks.infer", "bench_infer", "scoring with a 6-lead bundle against a bare torch loop"),
    "train": ("benchmarks.train", "bench_train", "training from shards against the bare step on a batch in memory"),
    "checkpoint": (
        "benchmarks.checkpoint",
        "bench_checkpoint",
        "how long training waits for a checkpoint, against writing it at once",
    ),
    "score": ("benchmarks.score", "bench_score", "a whole cohort against the bare model in a loop in one process"),
    "serve": ("benchmarks.serve", "bench_serve", "the endpoint against a bare loop, FastAPI and mlflow models serve"),
    "soak": ("benchmarks.soak", "bench_soak", "the endpoint for an hour while everything around it fails at random"),
    "beside": ("benchmarks.beside", "bench_beside", "scores with explanations beside them, against without"),
    "ingest": ("benchmarks.ingest", "bench_ingest", "recordings into shards and model input, against NeuroKit2"),
    "feed": ("benchmarks.ingest", "bench_feed", "shards into batches against reading and NeuroKit2 lead by lead"),
    "pace": ("benchmarks.pace", "bench_pace", "whether the cache keeps up with a GPU's rate, without the GPU"),
    "waves": ("benchmarks.waves", "bench_waves", "edges of P, QRS and T against LUDB's experts, beside NeuroKit2's"),
    "checks": (
        "benchmarks.checks",
        "bench_checks",
        "deletion, insertion and random weights on held-out recordings, against random order",
    ),
    "references": (
        "benchmarks.references",
        "bench_references",
        "how far explanations depend on what recordings are compared with, against no signal",
    ),
    "truth": ("benchmarks.truth", "bench_truth", "whether attributions find what simulated labels depend on"),
    "collapse": ("benchmarks.collapse", "bench_collapse", "how the reconstruction weight changes the posterior"),
}


def show(rows: list[Row]) -> None:
    """Print the table."""
    width = max(len(row.case) for row in rows)
    print(f"{'case':<{width}} {'ours':>10} {'baseline':>10} {'ratio':>7}  unit")
    for row in rows:
        print(f"{row.case:<{width}} {row.ours:>10.4g} {row.baseline:>10.4g} {row.ratio:>7.2f}  {row.unit}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the case, the options of all cases, and those of this case."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    common.add_argument("--json", type=Path, help="also write the rows to this file")
    common.add_argument("--rounds", type=int, help="how many times each side is timed")
    common.add_argument("--threads", type=int, help="number of torch threads on the CPU")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = parser.add_subparsers(dest="case", required=True, metavar="CASE")
    for name, (module, _, subject) in CASES.items():
        case = cases.add_parser(name, parents=[common], help=subject, description=subject)
        if name in arguments[:1]:
            import_module(module).add_arguments(case)
    return parser.parse_args(arguments)


def main() -> None:
    """Parse, measure, print, write."""
    args = parse(sys.argv[1:])
    module, function, _ = CASES[args.case]
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise LsemvaeError("torch finds no CUDA device: leave out --device cuda")
        if args.device == "cpu":
            keep_freed_memory()
        if args.threads:
            torch.set_num_threads(args.threads)
        rows = getattr(import_module(module), function)(args)
    except LsemvaeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not rows:  # the soak has shown its own tables
        return
    show(rows)
    if args.json:
        answer = {"machine": machine(args.device), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
