"""What a pre-training run costs: the model's arithmetic over the hardware's published peaks, at assumed shares of them.

python workflows/scale.py --gpus 8                                  MIMIC-IV-ECG, 100 epochs, one p4d.24xlarge
python workflows/scale.py --gpus 8 --feed-records-per-core-s RATE   … and how many cores feed it, RATE being measured

Nothing here is a measurement but what is given as one. The time of a step is the GPU's work (the longer of arithmetic
and memory traffic) and then the exchange of gradients, of which DistributedDataParallel hides a part behind the
backward pass. docs/scale.md has the tables and what follows from them.
"""

import math
from dataclasses import dataclass

import torch
from benchmarks.model import model_work
from command import run_command

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models.lsemvae import LSEMVAE
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
    """Recordings in a step, over all GPUs. Gradient accumulation counts as a larger batch."""
    share: tuple[float, ...] = (0.1, 0.3, 1.0)
    """ASSUMED shares of a GPU's peaks that a step attains; 1 is a bound that nothing beats."""
    matrix_tflops: float = 312.0
    """A100, bf16 tensor cores, published."""
    memory_tb_s: float = 1.555
    """A100 of 40 GB, published; the one of 80 GB (p4de) has about 2.0."""
    gpu_link_gb_s: float = 300.0
    """Between GPUs of a node, each way: NVLink of the A100, published as 600 both ways."""
    node_link_gbit_s: float = 400.0
    """Between nodes: p4d.24xlarge with EFA, published. ray_cluster.yaml attaches no EFA: its nodes have less."""
    gpus_per_node: int = 8
    gradient_bytes: int = 4
    """Of one gradient on the wire: 4 for float32 as here, 2 with a bf16 compression hook."""
    record_bytes: float = 28_800.0
    """Of a recording in the shards: 24 % of its 120,000, measured on PTB-XL (lsemvae/data/shards.py)."""
    feed_records_per_core_s: float | None = None
    """Measured on the machines that feed, by `workflows/bench.py feed`. Without it no number of cores is given."""


@dataclass(frozen=True)
class Plan:
    """One row of the answer."""

    gpu_s: float  # a step's work on each GPU
    exchange_s: float  # a step's exchange of gradients, none of it hidden
    records_per_s: float
    hours: float


def parameters() -> int:
    """Of the model that the recipe `paper` trains."""
    with torch.device("meta"):
        return sum(p.numel() for p in LSEMVAE(PAPER.model).parameters())


def exchanged_bytes(gpus: int, gradient_bytes: int) -> float:
    """What each GPU sends (and receives) in one ring all-reduce of all gradients: 2 (n - 1) / n of their size."""
    return 2 * (gpus - 1) / gpus * parameters() * gradient_bytes


def plan(args: Args, batch: int, share: float) -> Plan:
    """Raises LsemvaeError when the batch cannot be dealt out or a share is not within 0 and 1."""
    if args.gpus < 1 or batch < args.gpus or not 0 < share <= 1:
        raise LsemvaeError(
            f"gpus={args.gpus}, batch={batch}, share={share}: give each GPU a recording, and 0 < share <= 1"
        )
    flops, moved = model_work(PAPER.model, math.ceil(batch / args.gpus), DECODES, True, BF16)
    gpu_s = max(flops / (args.matrix_tflops * 1e12), moved / (args.memory_tb_s * 1e12)) / share
    # A ring crosses into and out of each node once, so the slowest link carries what each GPU sends.
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
