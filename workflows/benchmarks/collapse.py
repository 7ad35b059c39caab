"""`collapse`: how the reconstruction weight changes the posterior, on real or simulated recordings."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Row, more_is_better
from lsemvae.leads import LEADS
from lsemvae.models.lsemvae import LSEMVAE
from lsemvae.preprocess import preprocess_signals
from lsemvae.training.fit import fit, make_optimizer
from lsemvae.training.pretrain import kl_scale
from lsemvae.training.validation import validate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--data", nargs="+", required=True, help="shards, made by workflows/ingest.py")
    parser.add_argument("--weights", type=float, nargs="+", default=[1, 10, 100, 1000, 10000])
    parser.add_argument("--epochs", type=int, help="epochs of each training run (default: the recipe's)")
    parser.add_argument("--plot", type=Path, help="also draw the curves into this PNG file")


def bench_collapse(args: argparse.Namespace) -> list[Row]:
    """Train the `small` recipe with several reconstruction weights; the baseline is the recipe's own weight.

    It trains on the training subjects of `--data` and measures on the validation subjects.
    """
    from matplotlib.figure import Figure

    from lsemvae.data.shards import SIGNAL_COLUMNS, ShardedDataset, signals_mv
    from lsemvae.recipes import PRETRAIN

    recipe = PRETRAIN["small"]
    parts: dict[str, list[dict[str, Tensor]]] = {"train": [], "val": []}
    for uri in args.data:
        for split, batches in parts.items():
            table = ShardedDataset.open(uri).read(SIGNAL_COLUMNS, split).to_pydict()
            prepared = preprocess_signals(signals_mv(table, LEADS), table["rate_hz"], LEADS, recipe.preprocess)
            tensors = {
                "x_BLT": torch.from_numpy(prepared.x_BLT),
                "lead_mask_BL": torch.from_numpy(prepared.lead_mask_BL),
            }
            batches.append({name: tensor[prepared.accepted_B] for name, tensor in tensors.items()})
    data = {split: {n: torch.cat([b[n] for b in batches]) for n in batches[0]} for split, batches in parts.items()}
    train, held_out = data["train"], data["val"]
    print(f"{len(train['x_BLT'])} recordings to train on, {len(held_out['x_BLT'])} to measure", flush=True)

    found: dict[float, dict[str, float]] = {}
    default = recipe.model.reconstruction_weight
    args.weights = sorted({*args.weights, default})
    for weight in args.weights:
        torch.manual_seed(0)
        model = LSEMVAE(replace(recipe.model, reconstruction_weight=weight)).to(args.device)
        size = recipe.optim.batch_size
        steps = -(-len(train["x_BLT"]) // size)

        def batches_of(epoch: int, size: int = size, steps: int = steps) -> Iterator[dict[str, Tensor]]:
            order = torch.randperm(len(train["x_BLT"]), generator=torch.Generator().manual_seed(epoch))
            for step, rows in enumerate(order.split(size)):
                scale = torch.tensor(kl_scale(recipe, epoch, step, steps), device=args.device)
                yield {name: values[rows].to(args.device) for name, values in train.items()} | {"kl_scale": scale}

        optim = replace(recipe.optim, epochs=args.epochs or recipe.optim.epochs)
        fit(model, make_optimizer(model, optim), optim, batches_of)
        pieces = zip(*(values.to(args.device).split(size) for values in held_out.values()), strict=True)
        found[weight], _ = validate(model, [dict(zip(held_out, piece, strict=True)) for piece in pieces])
        shown = {name: found[weight][name] for name in ("active_units", "kl", "pearson_r", "collapsed")}
        print(f"weight {weight:g}: " + ", ".join(f"{name} {value:.3g}" for name, value in shown.items()), flush=True)

    if args.plot:
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        for axis, (name, label) in zip(
            figure.subplots(1, 3),
            (("active_units", "active units"), ("kl", "KL, nats a record"), ("pearson_r", "mean Pearson r")),
            strict=True,
        ):
            axis.plot(args.weights, [found[weight][name] for weight in args.weights], marker="o", color="#c0392b")
            axis.axvline(default, color="0.6", linestyle=":", linewidth=1)
            axis.set(xscale="log", xlabel="reconstruction weight", title=label, ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.plot, dpi=110)
    rows = []
    for weight in args.weights:
        for name, unit in (("active_units", "units"), ("kl", "nats"), ("pearson_r", "r")):
            ours, baseline = found[weight][name], found[default][name]
            rows.append(more_is_better(f"weight {weight:g}, {name}", ours, max(baseline, 1e-9), unit))
    return rows
