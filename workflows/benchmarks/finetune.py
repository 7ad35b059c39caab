"""Cross-validation of a head on a frozen encoder: recordings embedded once and heads trained together, against the way
of the authors' notebook, which runs the encoder on every batch of every epoch and trains fold after fold."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.infer import encoder_modules
from benchmarks.measure import Row, less_is_better, timed
from lsemvae.config import FinetuneRecipe, OptimConfig
from lsemvae.leads import LEADS
from lsemvae.models import PRESETS
from lsemvae.models.parts.blocks import LeadEncoders
from lsemvae.training.batched_heads import Training, train_heads
from lsemvae.training.finetune import new_head, shuffled
from lsemvae.training.fit import make_optimizer

FOLDS, POSITIVES, EMBED_BATCH, LARGEST_DIFFERENCE = 5, 201 / 892, 64, 1e-3
Embed = Callable[[Tensor], Tensor]
Fold = tuple[np.ndarray, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--size", default="paper", choices=sorted(PRESETS["lsemvae"]), help="configuration")
    parser.add_argument("--records", type=int, default=892, help="number of simulated recordings")
    parser.add_argument("--epochs", type=int, default=50, help="epochs of each training")
    parser.add_argument(
        "--measured", type=int, default=1, help="epochs of the baseline that are timed; the time of all is extrapolated"
    )


def bench_finetune(args: argparse.Namespace) -> list[Row]:
    """Time five folds with the paper's settings; both ways must give the same scores after the measured epochs."""
    config, measured = PRESETS["lsemvae"][args.size], min(args.measured, args.epochs)
    rng = np.random.default_rng(0)
    x_BLT = torch.from_numpy(rng.standard_normal((args.records, len(LEADS), config.samples), np.float32))
    y_B = (rng.permutation(args.records) < round(POSITIVES * args.records)).astype(np.int64)
    tests = np.array_split(rng.permutation(args.records), FOLDS)
    folds = [(np.setdiff1d(np.arange(args.records), test), np.sort(test)) for test in tests]
    recipe = FinetuneRecipe(optim=OptimConfig(epochs=args.epochs, batch_size=32))
    short = replace(recipe, optim=replace(recipe.optim, epochs=measured))

    torch.manual_seed(0)
    encoders = config.embedder(LEADS).to(args.device).eval()
    with torch.no_grad():
        for parameter in encoders.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    modules = [module.to(args.device) for module in encoder_modules(encoders, config)]
    ways = {"the paper's modules": _by_modules(modules), "our encoder": _by_ours(encoders)}
    h_BF = _embedded(ways["our encoder"], x_BLT, args.device)

    expected_B = cross_validate(ways["our encoder"], x_BLT, y_B, folds, short, args.device)
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *ways)}
    for _ in range(args.rounds or 3):
        ours = timed(lambda: cross_validate(ways["our encoder"], x_BLT, y_B, folds, recipe, args.device), args.device)
        seconds["ours"].append(ours)
        for name, embed in ways.items():
            scores: list[np.ndarray] = []
            baseline = timed(
                lambda e=embed, s=scores: s.append(as_the_notebook(e, x_BLT, h_BF, y_B, folds, short, args.device)),
                args.device,
            )
            seconds[name].append(baseline * args.epochs / measured)
            difference = np.abs(scores[0] - expected_B)
            print(f"{name}, epochs {measured}: the scores differ by at most {difference.max():.1e}; ", end="")
            print(f"ours {ours:.1f} s, baseline {baseline:.1f} s", flush=True)
            assert difference.max() < LARGEST_DIFFERENCE, f"{name}: the scores differ by {difference.max()}"
    case = f"five folds x {args.epochs} epochs, {args.records} recordings"
    how = (
        f" (measured {measured} of {args.epochs} epochs, x {args.epochs}/{measured})" if measured < args.epochs else ""
    )
    ours = statistics.median(seconds["ours"])
    return [less_is_better(f"{case}, {name}{how}", ours, statistics.median(seconds[name]), "s") for name in ways]


def cross_validate(
    embed: Embed, x_BLT: Tensor, y_B: np.ndarray, folds: list[Fold], recipe: FinetuneRecipe, device: str
) -> np.ndarray:
    """This project's way: out-of-fold score_B."""
    h_BF = _embedded(embed, x_BLT, device)
    observed_BF = torch.ones_like(h_BF, dtype=torch.bool)
    trainings = [Training(train, recipe.optim.seed) for train, _ in folds]
    heads = train_heads(h_BF.cpu().numpy(), observed_BF.cpu().numpy(), y_B, trainings, recipe, device)
    score_B = np.empty(len(y_B), np.float32)
    with torch.inference_mode():
        for head, (_, test) in zip(heads, folds, strict=True):
            score_B[test] = head.predict(h_BF[test].cpu()).numpy()
    return score_B


def as_the_notebook(
    embed: Embed,
    x_BLT: Tensor,
    h_BF: Tensor,
    y_B: np.ndarray,
    folds: list[Fold],
    recipe: FinetuneRecipe,
    device: str,
) -> np.ndarray:
    """The notebook's way, with the same head: out-of-fold score_B after the last epoch.

    `h_BF` only gives the head's mean and scale, which the notebook does not have.
    """
    score_B, optim = np.empty(len(y_B), np.float32), recipe.optim
    label_B = torch.from_numpy(y_B).float().to(device)
    for train, test in folds:
        torch.manual_seed(optim.seed)
        head = new_head(h_BF.shape[1], y_B[train], recipe).to(device)
        head.standardise_from(h_BF[train])
        optimizer = make_optimizer(head, optim)
        for epoch in range(optim.epochs):
            head.train()
            for places in shuffled(len(train), recipe, epoch):
                rows = train[places.numpy()]
                loss = head.loss(head.logit(embed(x_BLT[rows].to(device))), label_B[rows]).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(head.parameters(), optim.clip_norm)
                optimizer.step()
            head.eval()
            with torch.inference_mode():
                for rows in np.split(test, range(optim.batch_size, len(test), optim.batch_size)):
                    score_B[rows] = head.predict(embed(x_BLT[rows].to(device))).cpu().numpy()
    return score_B


@torch.no_grad()
def _embedded(embed: Embed, x_BLT: Tensor, device: str) -> Tensor:
    return torch.cat([embed(part.to(device)) for part in x_BLT.split(EMBED_BATCH)])


def _by_ours(encoders: LeadEncoders) -> Embed:
    @torch.no_grad()
    def embed(x_BLT: Tensor) -> Tensor:
        return encoders.embed(x_BLT, torch.ones(x_BLT.shape[:2], dtype=torch.bool, device=x_BLT.device))

    return embed


def _by_modules(modules: list[nn.Module]) -> Embed:
    """A module for each lead, which returns mean and log-variance; the notebook concatenates the means."""

    @torch.no_grad()
    def embed(x_BLT: Tensor) -> Tensor:
        return torch.cat([module(x_BLT[:, [row]])[0] for row, module in enumerate(modules)], dim=1)

    return embed
