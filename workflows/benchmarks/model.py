"""`model`: the model against the loop over leads that the paper describes. It needs only torch and numpy."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Row, alternate, less_is_better, more_is_better, peak_bytes, roofs
from benchmarks.parts import parts_of, show_parts
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig
from lsemvae.models.parts.blocks import fuse

SIZES = {
    "full": LSEMVAEConfig(),
    "small": LSEMVAEConfig(samples=1000, latent=64),
    "smoke": LSEMVAEConfig(samples=512, latent=16, channels=(4, 8, 8)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: 64, on a GPU 128 and 1024)")
    parser.add_argument("--size", default="full", choices=SIZES, help="size of the model")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="use torch.compile for ours (default on a GPU)"
    )
    parser.add_argument(
        "--fused", action="store_true", help="the fused kernel for our encoders' convolutions, on a GPU"
    )


class PaperEncoder(nn.Module):
    """The encoder of one lead, as in section 2.1 of the paper."""

    def __init__(self, config: LSEMVAEConfig) -> None:
        super().__init__()
        first, second, third = config.channels
        self.conv1 = nn.Conv1d(1, first, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(first, second, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(second, third, 3, stride=2, padding=1)
        self.fc_mu = nn.Linear(third * config.samples // 8, config.latent)
        self.fc_logvar = nn.Linear(third * config.samples // 8, config.latent)

    def forward(self, x_B1T: Tensor) -> tuple[Tensor, Tensor]:
        """x_B1T -> mu_BD, logvar_BD."""
        h = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x_B1T)))))).flatten(1)
        return self.fc_mu(h), self.fc_logvar(h)


class PaperDecoder(nn.Module):
    """The shared decoder, called once for each lead."""

    def __init__(self, config: LSEMVAEConfig) -> None:
        super().__init__()
        first, second, third = config.channels
        self.shape = (third, config.samples // 8)
        self.fc = nn.Linear(config.latent, third * config.samples // 8)
        self.convtrans1 = nn.ConvTranspose1d(third, second, 4, stride=2, padding=1)
        self.convtrans2 = nn.ConvTranspose1d(second, first, 4, stride=2, padding=1)
        self.convtrans3 = nn.ConvTranspose1d(first, 1, 4, stride=2, padding=1)

    def forward(self, z_BD: Tensor) -> Tensor:
        """z_BD -> x_B1T."""
        h = self.fc(z_BD).unflatten(1, self.shape)
        return self.convtrans3(F.relu(self.convtrans2(F.relu(self.convtrans1(h)))))


class PaperLoop(nn.Module):
    """The baseline: one lead after another, with twelve encoder modules and twelve decoder calls.

    It uses the paper's formulas as printed, with the same gate as ours; all leads are observed.
    """

    def __init__(self, config: LSEMVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(PaperEncoder(config) for _ in LEADS)
        self.shared_decoder = PaperDecoder(config)

    def forward(self, x_BLT: Tensor, noise_BD: Tensor) -> Tensor:
        """The loss of a batch: eqs. 1 and 2."""
        experts = [encoder(x_BLT[:, row : row + 1]) for row, encoder in enumerate(self.encoders)]
        mu = [mu.float() for mu, _ in experts]
        logvar = [logvar.float() for _, logvar in experts]
        precision = [torch.exp(-value) for value in logvar]
        mu.append(sum(m * p for m, p in zip(mu, precision, strict=True)) / sum(precision))
        logvar.append(-torch.log(sum(precision)))
        weights = torch.softmax(torch.stack([-value.mean(dim=1) for value in logvar]), dim=0).unsqueeze(-1)
        fused = sum(w * m for w, m in zip(weights, mu, strict=True))
        second = sum(w * (torch.exp(v) + m**2) for w, m, v in zip(weights, mu, logvar, strict=True))
        variance = second - fused**2
        z_BD = fused + torch.sqrt(variance) * noise_BD
        loss = x_BLT.new_zeros(())
        for row in range(len(self.encoders)):
            prediction_BT = self.shared_decoder(z_BD).squeeze(1)
            loss = loss + self.config.reconstruction_weight * F.mse_loss(prediction_BT.float(), x_BLT[:, row])
        kl = 0.5 * (fused**2 + variance - 1 - torch.log(variance)).sum(dim=1).mean()
        alignment = sum(((m - fused) ** 2).sum(dim=1).mean() for m in mu) / len(mu)
        return loss + self.config.beta * kl + self.config.gamma * alignment


def model_work(config: LSEMVAEConfig, batch: int, decodes: int, train: bool, width: int) -> tuple[int, int]:
    """The smallest number of FLOPs and bytes that a forward pass or a training step needs.

    `width` is the size of an activation in bytes. A training step computes every matrix product three times (forward,
    gradient of the input, gradient of the weight), reads each weight twice and writes its gradient; AdamW reads four
    and writes three float32 numbers for each parameter. The forward pass writes and reads each activation once; the
    backward pass reads it again, writes its gradient once and reads that twice.
    """
    first, second, third = config.channels
    samples, latent, leads = config.samples, config.latent, len(LEADS)
    features = third * samples // 8
    convolutions = 3 * (samples // 2 * first + samples // 4 * second * first + samples // 8 * third * second)
    transposed = 4 * (samples // 8 * third * second + samples // 4 * second * first)
    last = 4 * samples // 2 * first * (1 if decodes > 1 else leads)
    products = leads * (convolutions + 2 * features * latent) + decodes * (features * latent + transposed + last)
    encoded = samples + samples // 2 * first + samples // 4 * second + features
    decoded = features + samples // 4 * second + samples // 2 * first
    activations = batch * (leads * encoded + decodes * decoded + leads * samples) * width
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LSEMVAE(config).parameters())
    if not train:
        return 2 * batch * products, 4 * parameters + 2 * activations
    return 6 * batch * products, (12 + 28) * parameters + 6 * activations


def bench_model(args: argparse.Namespace) -> list[Row]:
    """Time a training step and a forward pass against the loop over leads that the paper describes."""
    config, device, rounds = (
        SIZES[args.size],
        args.device,
        args.rounds or (15 if args.device == "cuda" else 5),
    )
    precision = args.precision or ("bfloat16" if device == "cuda" else "float32")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    before = roofs(device, dtype)

    torch.manual_seed(0)
    model = LSEMVAE(config).to(device)
    loop = PaperLoop(config).to(device)
    compiled = device == "cuda" if args.compile is None else args.compile
    if args.fused:
        if device != "cuda":
            raise LsemvaeError("--fused needs --device cuda: the fused kernel runs on a GPU alone")
        print(fuse(model, torch.device(device)))
    # Compile once for each batch size: one graph for both would be slower at each.
    ours = torch.compile(model, dynamic=False) if compiled else model
    our_adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loop_adamw = torch.optim.AdamW(loop.parameters(), lr=1e-4, foreach=False, fused=False)

    measured, of_steps = [], []
    for batch in args.batch or ([128, 1024] if device == "cuda" else [64]):
        x_BLT = torch.randn(batch, len(LEADS), config.samples, device=device)
        lead_mask_BL = torch.ones(batch, len(LEADS), dtype=torch.bool, device=device)
        noise_BD = torch.randn(batch, config.latent, device=device)
        inputs = {"x_BLT": x_BLT, "lead_mask_BL": lead_mask_BL}

        def our_loss(inputs: dict[str, Tensor] = inputs, noise_BD: Tensor = noise_BD) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return ours(inputs | {"noise_BD": noise_BD})["loss"]

        def loop_loss(x_BLT: Tensor = x_BLT, noise_BD: Tensor = noise_BD) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return loop(x_BLT, noise_BD)

        steps = (_training_step(our_loss, our_adamw), _training_step(loop_loss, loop_adamw))
        passes = (torch.no_grad()(our_loss), torch.no_grad()(loop_loss))
        for name, train, pair in (("train step", True, steps), ("forward", False, passes)):
            seconds = alternate(*pair, rounds, device)
            static = (12 if train else 4) * sum(p.numel() for p in model.parameters())
            peaks = [peak_bytes(call, static, device) / 2**30 for call in pair]
            measured.append((name, batch, train, seconds, peaks))
            if train:
                of_steps.append((seconds[0], x_BLT))

    # Measured at the start and at the end; the machine was less busy for the larger of the two.
    flops_s, bytes_s = (max(pair) for pair in zip(before, roofs(device, dtype), strict=True))
    print(f"matrix products {flops_s / 1e12:.3g} TFLOP/s ({precision}), copies {bytes_s / 1e9:.3g} GB/s")
    for step_s, x_BLT in of_steps:
        show_parts(parts_of(model, our_adamw, x_BLT, dtype), step_s, len(x_BLT), flops_s, bytes_s, device)
    rows = []
    for name, batch, train, seconds, peaks in measured:
        case = f"{name} b{batch}"
        works = [model_work(config, batch, decodes, train, dtype.itemsize) for decodes in (1, len(LEADS))]
        shares = [
            (100 * flops / flops_s / s, 100 * size / bytes_s / s)
            for (flops, size), s in zip(works, seconds, strict=True)
        ]
        rows += [
            less_is_better(case, *(1e3 * s for s in seconds), "ms"),
            more_is_better(f"{case}, rate", *(batch / s for s in seconds), "records/s"),
            less_is_better(f"{case}, peak memory", *peaks, "GiB"),
            more_is_better(f"{case}, of matrix rate", *(share for share, _ in shares), "%"),
            more_is_better(f"{case}, of bandwidth", *(share for _, share in shares), "%"),
        ]
    return rows


def _training_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
