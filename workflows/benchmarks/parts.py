"""The parts of a training step: how long each takes, its shares of the machine's peaks, and which peak bounds it."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import timed
from lsemvae.models.lsemvae import LSEMVAE
from lsemvae.training.fit import clip_in_step

ROUNDS = 7


@dataclass(frozen=True)
class Part:
    """A part of a step: a call that runs it, and the FLOPs and bytes that it cannot do without."""

    name: str
    call: Callable[[], object]
    flops: int
    moved: int


def parts_of(model: LSEMVAE, optimizer: torch.optim.Optimizer, x_BLT: Tensor, dtype: torch.dtype) -> list[Part]:
    """Forward and backward of the encoders' convolutions, their heads and the decoder, each alone; then the optimiser.

    Bytes: a float32 weight is read twice and its gradient written. The convolutions read their input twice, write their
    output, and read it and its gradient; the heads read that twice and write its gradient. The optimiser reads weight,
    gradient and both moments and writes all four, since it clips.
    """
    config, encoders, device = model.config, model.encoders, x_BLT.device.type
    (batch, leads, samples), (first, second, third) = x_BLT.shape, config.channels
    weights = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in ("encoders", "decoder")}
    features, width = third * samples // 8, dtype.itemsize
    convolved = 3 * (samples // 2 * first + samples // 4 * second * first + samples // 8 * third * second)
    heads = 2 * leads * features * config.latent
    transposed = 4 * (samples // 8 * third * second + samples // 4 * second * first + samples // 2 * first * leads)
    between = features + samples // 4 * second + samples // 2 * first + leads * samples
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        h_LBF = encoders.features(x_BLT)
    h_LBF = h_LBF.clone().requires_grad_()
    z_BD = torch.randn(batch, config.latent, device=device)

    def both(forward: Callable[[], tuple[Tensor, ...]]) -> Callable[[], None]:
        def call() -> None:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                outputs = forward()
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

        return call

    def clip_and_step() -> None:
        clip_in_step(model, optimizer, 1.0)
        optimizer.step()

    total = sum(weights.values())
    return [
        Part("convolutions", both(lambda: (encoders.features(x_BLT),)), 6 * batch * leads * convolved,
             batch * leads * (2 * samples + 3 * features) * width),
        Part("heads", both(lambda: (encoders.fc_mu(h_LBF), encoders.fc_logvar(h_LBF))), 6 * batch * heads,
             12 * weights["encoders"] + 3 * batch * leads * features * width),
        Part("decoder", both(lambda: (model.decoder(z_BD),)), 6 * batch * (features * config.latent + transposed),
             12 * weights["decoder"] + 6 * batch * between * width),
        Part("clipping and AdamW", clip_and_step, 0, 36 * total),
    ]  # fmt: skip


def show_parts(parts: list[Part], step_s: float, batch: int, flops_s: float, bytes_s: float, device: str) -> None:
    """Print each part's time, the least that the machine's peaks allow, and which of them bounds it."""
    print(f"{f'part of a step b{batch}':<26} {'ms':>8} {'of step':>8} {'matrix':>8} {'memory':>8}  bound by")
    for part in parts:
        part.call()
        seconds = statistics.median(timed(part.call, device) for _ in range(ROUNDS))
        matrix, memory = part.flops / flops_s / seconds, part.moved / bytes_s / seconds
        bound = "memory" if memory > matrix else "matrix products"
        if max(matrix, memory) < 0.3:
            bound = f"neither: {max(matrix, memory):.0%} of {bound}"
        shares = "".join(f"{100 * share:>8.1f}%" for share in (seconds / step_s, matrix, memory))
        print(f"{part.name:<26} {1e3 * seconds:>8.2f}{shares}  {bound}")
