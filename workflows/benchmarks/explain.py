"""`explain`: attributions of a batch against captum's plain loop: one recording at a time with captum's settings."""

import argparse
import math
from functools import partial

import numpy as np
import torch
from captum.attr import IntegratedGradients

from benchmarks.measure import Row, alternate, more_is_better
from lsemvae.errors import LsemvaeError
from lsemvae.explain.attribution import Settings, attribute
from lsemvae.leads import LEADS
from lsemvae.models import PRESETS, build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.simulate import RATE_HZ, EcgParameters, simulate_ecg

CAPTUM_STEPS = 50
"""captum's default."""
TOLERANCE = 1e-4
"""Of the largest attribution of a recording: both sides take the same points."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    sizes = sorted(PRESETS["lsemvae"])
    parser.add_argument("--size", nargs="+", default=["paper", "cpu"], choices=sizes, help="configurations")
    parser.add_argument("--batch", type=int, default=16, help="recordings in a batch")
    parser.add_argument("--looped", type=int, default=4, help="of them, how many the plain loop explains in a round")


def bench_explain(args: argparse.Namespace) -> list[Row]:
    """Time both with the same points, then ours with its default settings; weights are random."""
    return [row for size in args.size for row in _rows(size, args)]


def _rows(size: str, args: argparse.Namespace) -> list[Row]:
    config, device, rounds = PRESETS["lsemvae"][size], args.device, args.rounds or 3
    torch.manual_seed(0)
    model = build(ClassifierConfig(encoder=config), LEADS).to(device).eval()
    x_BLT, mask_BL = (values.to(device) for values in _recordings(args.batch, config.samples))
    looped, method = min(args.looped, args.batch), IntegratedGradients(model.logit)

    def loop() -> list[torch.Tensor]:
        pairs = zip(x_BLT[:looped].split(1), mask_BL[:looped].split(1), strict=True)
        return [method.attribute(x, additional_forward_args=(mask,)) for x, mask in pairs]

    expected_BLT = torch.cat(loop()).detach().cpu().numpy()
    rows = []
    for name, settings in (
        (f"{CAPTUM_STEPS} points", Settings(steps=CAPTUM_STEPS, bound=math.inf)),
        ("default settings", Settings()),
    ):
        found = attribute(model, x_BLT, mask_BL, settings)
        off_B = np.abs(found.values_BLT[:looped] - expected_BLT).max((1, 2)) / np.abs(expected_BLT).max((1, 2))
        if settings.bound == math.inf and off_B.max() > TOLERANCE:
            raise LsemvaeError(f"the attributions differ by {off_B.max():.1e} of the largest: more than {TOLERANCE}")
        delta = np.max(np.abs(found.delta_B) / np.abs(found.values_BLT).sum((1, 2)))
        print(
            f"{size}, {name}: {found.steps_B.mean():.0f} points a recording, delta up to {delta:.1e} of all absolute "
            f"attributions; the attributions differ from captum's by {off_B.max():.1e} of the largest"
        )
        ours, baseline = alternate(partial(attribute, model, x_BLT, mask_BL, settings), loop, rounds, device)
        case = f"explain {size} b{args.batch}, {name}"
        rows.append(more_is_better(case, args.batch / ours, looped / baseline, "records/s"))
    return rows


def _recordings(count: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Simulated recordings of 10 s, as model input."""
    rng = np.random.default_rng(0)
    signals = [simulate_ecg(EcgParameters(severity=b / count), rng)[0] for b in range(count)]
    preprocessing = PreprocessConfig(rate_hz=round(samples / 10), samples=samples, min_seconds=1)
    prepared = preprocess_signals(signals, [RATE_HZ] * count, LEADS, preprocessing)
    return torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL)
