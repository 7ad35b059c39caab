"""`checks`: deletion, insertion and model randomisation of a classifier's attributions, on recordings held out of it.

It is trained on four of five folds by subject, and checked on recordings of the fifth, half of them positive.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import trained
from benchmarks.measure import Row, more_is_better
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.training.finetune import Inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    trained.add_arguments(parser)
    parser.add_argument("--data", required=True, help="labelled shards, made by workflows/ingest.py")
    parser.add_argument("--task", required=True, help="the label")
    parser.add_argument("--shuffle", type=int, help="shuffle the labels of training with this seed")
    parser.add_argument("--checked", type=int, default=24, help="recordings that are checked")
    parser.add_argument("--cell-s", type=float, default=0.25, help="length of what is taken away at once, in s")
    parser.add_argument("--plot", type=Path, help="also draw the curves into this PNG file")


def bench_checks(args: argparse.Namespace) -> list[Row]:
    """How far the logit moves in the orders of attribution and of occlusion, against the random order."""
    from lsemvae.evaluation.folds import make_folds
    from lsemvae.explain.attribution import Settings
    from lsemvae.explain.checks import Effort, run_checks
    from lsemvae.reports.explanation_checks import curves_picture

    encoder, config = trained.encoder_of(args)
    data, subject_B = labelled(args.data, args.task, config)
    rows, held_out = make_folds(data.y_B, subject_B, 5, 0)[0]
    train = data.of(rows)
    model = trained.classifier(args, encoder, train if args.shuffle is None else trained.shuffled(train, args.shuffle))
    print(f"{args.task}: AUROC {trained.auroc(model, data.of(held_out), args.device):.3f}, {len(held_out)} held out")
    chosen = _half_positive(held_out, data.y_B, args.checked)
    x_BLT, mask_BL = (torch.from_numpy(of[chosen]).to(args.device) for of in (data.x_BLT, data.lead_mask_BL))
    found = run_checks(
        model, x_BLT, mask_BL, config.rate_hz, Settings(), subject_B=subject_B[chosen].tolist(),
        effort=Effort(cell_s=args.cell_s),
    )  # fmt: skip
    for table in (found.randomisation, found.areas):
        print(table.round(3).to_string(index=False))
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_bytes(curves_picture(found.curves).png())
    rows = []
    for kind in ("deletion", "insertion"):
        random = _moved(found.areas, kind, "random")
        for order in ("attribution", "occlusion"):
            rows.append(
                more_is_better(f"{args.task}: {kind}, {order}", _moved(found.areas, kind, order), random, "area")
            )
    return rows


def _moved(areas: pd.DataFrame, kind: str, order: str) -> float:
    """How far the logit has moved to the other end on average, by the area of its curve; more is better."""
    area = float(areas.set_index(["kind", "order"]).loc[(kind, order), "area"])
    return 1 - area if kind == "deletion" else area


def labelled(uri: str, task: str, config: PreprocessConfig) -> tuple[Inputs, np.ndarray]:
    """The recordings that have the label and are not refused, and their subjects."""
    from lsemvae.data.shards import SIGNAL_COLUMNS, ShardedDataset, signals_mv
    from lsemvae.preprocess import preprocess_signals

    data = ShardedDataset.open(uri)
    column = data.require_label(task)
    table = data.read([*SIGNAL_COLUMNS, "subject_id", column])
    table = table.filter(table[column].is_valid())
    columns = table.to_pydict()
    prepared = preprocess_signals(signals_mv(columns, LEADS), columns["rate_hz"], LEADS, config)
    kept = prepared.accepted_B
    y_B = np.array(columns[column], dtype=np.int64)[kept]
    return Inputs(prepared.x_BLT[kept], prepared.lead_mask_BL[kept], y_B), np.array(columns["subject_id"])[kept]


def _half_positive(rows: np.ndarray, y_B: np.ndarray, count: int) -> np.ndarray:
    """So many of these rows, half of them positive where there are enough of both, by a fixed seed."""
    rng = np.random.default_rng(0)
    halves = [rng.permutation(rows[y_B[rows] == label]) for label in (0, 1)]
    return np.concatenate([half[: count // 2] for half in halves])
