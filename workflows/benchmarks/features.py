"""Features that do not depend on where the beats fall: pooling through an FFT against explicit shifts; scores."""

import argparse
from collections.abc import Callable

import torch

from benchmarks.measure import Row, alternate, less_is_better
from lsemvae.leads import LEADS
from lsemvae.models import PRESETS, build
from lsemvae.models.parts.shifts import evenly

SHIFTS = (8, 16)
SCORED = (2, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--size", default="paper", choices=sorted(PRESETS["lsemvae"]), help="configuration")
    parser.add_argument("--batch", type=int, default=64, help="recordings in a batch")


def bench_features(args: argparse.Namespace) -> list[Row]:
    """Time all shifts at once against some explicit ones, and scores over some shifts against one."""
    config, device, rounds = PRESETS["lsemvae"][args.size], args.device, args.rounds or 5
    torch.manual_seed(0)
    with torch.no_grad():
        model = build(config, LEADS).to(device)
    means, pooled = model.embedder(LEADS), model.embedder(LEADS, "pooled")
    x_BLT = torch.randn(args.batch, len(LEADS), config.samples, device=device)
    mask_BL = torch.ones(args.batch, len(LEADS), dtype=torch.bool, device=device)

    def explicit(count: int) -> Callable[[], torch.Tensor]:
        return torch.inference_mode()(lambda: means.embed_shifted(x_BLT, mask_BL, evenly(count)))

    def one() -> torch.Tensor:
        with torch.inference_mode():
            return means.embed(x_BLT, mask_BL)

    def all_shifts() -> torch.Tensor:
        with torch.inference_mode():
            return pooled.embed(x_BLT, mask_BL)

    rows = []
    for count in SHIFTS:
        ours, baseline = alternate(all_shifts, explicit(count), rounds, device)
        rows.append(less_is_better(f"all shifts by FFT, against {count}", 1e3 * ours, 1e3 * baseline, "ms"))
    for count in SCORED:
        ours, baseline = alternate(explicit(count), one, rounds, device)
        rows.append(less_is_better(f"{count} shifts, against one", 1e3 * ours, 1e3 * baseline, "ms"))
    return rows
