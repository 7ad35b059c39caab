"""Estimate what a pre-training run costs: the model's arithmetic at assumed shares of the hardware's published peaks.

python workflows/scale.py --gpus 8                                  MIMIC-IV-ECG, 100 epochs, one p4d.24xlarge

python workflows/scale.py --gpus 8 --feed-records-per-core-s RATE   … and how many cores feed it, at a measured RATE

All results are estimates; only RATE is measured. A step takes the GPU's work (the longer of arithmetic and memory
traffic) plus the exchange of gradients; DistributedDataParallel hides part of the exchange behind the backward pass.
docs/scale.md has the tables and their consequences.
"""

import math
from dataclasses import dataclass

import torch
from benchmarks.model import model_work
from command import run_command

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models import build
from lsemvae.recipes import PRETRAIN

PAPER = PRETRAIN["paper"]
DECODES = 1
"""The z of a recording goes through the shared decoder once, for all leads."""
BF16, FLOAT32 = 2, 4
"""Bytes of an activation on the GPU, and of a sample as it is fed."""


@dataclass(frozen=True)
class Args:
    """A run of the recipe `paper`, by default on MIMIC-IV-ECG and one A100 of a p4d.24xlarge."""

    records: int = 800_035
    epochs: int = PAPER.optim.epochs
    gpus: int = 1
    batch: tuple[int, ...] = (PAPER.optim.batch_size, 1024, 8192)
    """Recordings in a step, over all GPUs; gradient accumulation counts as a larger batch."""
    share: tuple[float, ...] = (0.1, 0.3, 1.0)
    """ASSUMED shares of a GPU's peaks that a step attains; 1 is the upper bound."""
    matrix_tflops: float = 312.0
    """Peak arithmetic of a GPU. Published for the A100's tensor cores in bf16."""
    memory_tb_s: float = 1.555
    """Peak memory bandwidth of a GPU. Published for the A100 with 40 GB; with 80 GB (p4de) it is about 2.0."""
    gpu_link_gb_s: float = 300.0
    """Bandwidth between GPUs of a node, each way: the A100's NVLink, published as 600 for both ways together."""
    node_link_gbit_s: float = 400.0
    """Bandwidth between nodes, published for p4d.24xlarge with EFA. ray_cluster.yaml attaches no EFA."""
    gpus_per_node: int = 8
    gradient_bytes: int = 4
    """Bytes sent for one gradient: 4 for float32, or 2 with `--optim.gradient-exchange bf16` in pre-training."""
    record_bytes: float = 28_800.0
    """Bytes of a recording in the shards: 24 % of its 120,000, measured on PTB-XL (lsemvae/data/shards.py)."""
    feed_records_per_core_s: float | None = None
    """What `workflows/bench.py feed` measured on the feeding machines; needed to estimate the number of cores."""


@dataclass(frozen=True)
class Plan:
    """One row of the table."""

    gpu_s: float  # work of a step on each GPU
    exchange_s: float  # exchange of gradients in a step, if none of it is hidden
    records_per_s: float
    hours: float


def parameters() -> int:
    """The number of parameters of the model that the recipe `paper` trains."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(PAPER.model, PAPER.leads).parameters())


def exchanged_bytes(gpus: int, gradient_bytes: int) -> float:
    """Bytes that each GPU sends (and receives) in a ring all-reduce of all gradients: 2 (n - 1) / n of their size."""
    return 2 * (gpus - 1) / gpus * parameters() * gradient_bytes


def plan(args: Args, batch: int, share: float) -> Plan:
    """Estimate a run; raises LsemvaeError if a GPU gets no recording or the share is not in (0, 1]."""
    if args.gpus < 1 or batch < args.gpus or not 0 < share <= 1:
        raise LsemvaeError(
            f"gpus={args.gpus}, batch={batch}, share={share}: give each GPU at least one recording, and 0 < share <= 1"
        )
    flops, moved = model_work(PAPER.model, math.ceil(batch / args.gpus), DECODES, True, BF16)
    gpu_s = max(flops / (args.matrix_tflops * 1e12), moved / (args.memory_tb_s * 1e12)) / share
    # The ring enters and leaves each node once, so the slowest link carries as much as each GPU sends.
    link_bytes_s = args.gpu_link_gb_s * 1e9
    if args.gpus > args.gpus_per_node:
        link_bytes_s = min(link_bytes_s, args.node_link_gbit_s / 8 * 1e9)
    exchange_s = exchanged_bytes(args.gpus, args.gradient_bytes) / link_bytes_s
    records_per_s = batch / (gpu_s + exchange_s)
    return Plan(gpu_s, exchange_s, records_per_s, args.records * args.epochs / records_per_s / 3600)


def main(args: Args) -> None:
    rows = {(batch, share): plan(args, batch, share) for batch in args.batch for share in args.share}
    flops, moved = model_work(PAPER.model, 1, DECODES, True, BF16)
    per_record = model_work(PAPER.model, 2, DECODES, True, BF16)[1] - moved
    seen = args.records * args.epochs
    nodes = math.ceil(args.gpus / args.gpus_per_node)
    print(
        f"- {args.records:,} recordings, {args.epochs} epochs, {args.gpus} GPU(s) on {nodes} node(s), "
        f"{parameters():,} parameters\n"
        f"- a recording: {flops / 1e9:.2f} GFLOP and {per_record / 1e6:.1f} MB of GPU memory traffic\n"
        f"- a step, whatever its batch: {(moved - per_record) / 1e9:.2f} GB of GPU memory traffic (weights, AdamW) and "
        f"{exchanged_bytes(args.gpus, args.gradient_bytes) / 1e9:.2f} GB sent by each GPU (gradients)\n"
        f"- memory of a GPU, at least: {16 * parameters() / 1e9:.2f} GB (weights, gradients, two moments) and "
        f"{per_record / 6e6:.2f} MB for each recording of its batch\n"
        f"- the shards: {args.records * args.record_bytes / 1e9:.1f} GB; read in all epochs: "
        f"{seen * args.record_bytes / 1e12:.2f} TB, which decode to "
        f"{seen * len(LEADS) * PAPER.model.samples * FLOAT32 / 1e12:.1f} TB\n\n"
        "| batch | share of the peaks, assumed | GPU, ms | exchange, ms | recordings/s | hours | GPU hours "
        "| MB/s from storage | cores to feed it |\n|---|---|---|---|---|---|---|---|---|"
    )
    feed = args.feed_records_per_core_s
    for (batch, share), row in rows.items():
        cores = f"{math.ceil(row.records_per_s / feed):,}" if feed else "not measured"
        print(
            f"| {batch} | {share:.0%} | {row.gpu_s * 1e3:.1f} | {row.exchange_s * 1e3:.1f} | {row.records_per_s:,.0f} "
            f"| {row.hours:.2f} | {row.hours * args.gpus:.1f} | {row.records_per_s * args.record_bytes / 1e6:,.0f} "
            f"| {cores} |"
        )


if __name__ == "__main__":
    run_command(main, Args)
