"""Measure our way and the baseline in turn, several times in one process. A ratio above 1: ours is better.

python workflows/bench.py model [--device cuda] [--batch 128 1024] [--json FILE]

Each case is a function in CASES. Case `model` needs torch and numpy alone; from a bare checkout run it with
PYTHONPATH=. in front. On a CPU that others use as well, OMP_WAIT_POLICY=PASSIVE keeps waiting threads from
spinning, and the ratios steady.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.bundle import CHUNK, Bundle, Scorer, save
from lsemvae.errors import LsemvaeError
from lsemvae.fit import fit, kl_scale, make_optimizer, validate
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig, preprocess_signals

SIZES = {
    "full": LSEMVAEConfig(),
    "small": LSEMVAEConfig(samples=1000, latent=64),
    "smoke": LSEMVAEConfig(samples=512, latent=16, channels=(4, 8, 8)),
}


@dataclass(frozen=True)
class Row:
    """One line of the answer. `ratio` above 1 means that ours is better, whatever the unit."""

    case: str
    ours: float
    baseline: float
    ratio: float
    unit: str


def less_is_better(case: str, ours: float, baseline: float, unit: str) -> Row:
    """A row of times or of memory."""
    return Row(case, ours, baseline, baseline / ours, unit)


def more_is_better(case: str, ours: float, baseline: float, unit: str) -> Row:
    """A row of rates or of shares of what the machine can do."""
    return Row(case, ours, baseline, ours / baseline, unit)


def alternate(
    ours: Callable[[], object], baseline: Callable[[], object], rounds: int, device: str
) -> tuple[float, float]:
    """Median seconds of a call of each, called in turn so that a busy machine is busy for both."""
    for call in (ours, baseline):  # compilation, first allocations
        call()
        call()
    seconds = [(timed(ours, device), timed(baseline, device)) for _ in range(rounds)]
    return statistics.median(pair[0] for pair in seconds), statistics.median(pair[1] for pair in seconds)


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds until the device has done the call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for both sides: else a third of a step on a CPU is page faults.

    Each step allocates a gigabyte of gradients anew. The same for any other program, from outside:
    MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ above the largest allocation.
    """
    mmap_max, trim_threshold = -4, -1  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def roofs(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """The best this machine gives: matrix products in FLOP/s at `dtype`, and copies in byte/s."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    values = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    copy = torch.empty_like(values)
    product_s = min(timed(lambda: torch.mm(a, a, out=product), device) for _ in range(30))
    copy_s = min(timed(lambda: copy.copy_(values), device) for _ in range(30))
    return 2 * size**3 / product_s, 2 * values.nbytes / copy_s


# ---------------------------------------------------------------------------------------------------- model


class PaperEncoder(nn.Module):
    """One lead's encoder, as section 2.1 of the paper describes it."""

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
    """The shared decoder, called once a lead."""

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
    """The baseline: the model lead by lead, twelve encoder modules and twelve decoder calls.

    Its formulas are the paper's as printed, with the same gate as ours; all leads are observed.
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
    """The least FLOPs and bytes of a forward pass or a training step, without any waste.

    `width` is the bytes of an activation. A training step does every matrix product three times (forward,
    and the gradients of input and of weight), reads each weight twice and writes its gradient, and AdamW
    reads four and writes three float32 numbers a parameter. Activations are written once and read once going
    forward; going back they are read once more, and their gradient is written once and read twice.
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


def peak_bytes(call: Callable[[], object], static: int, device: str) -> int:
    """The most memory that a call holds at once; `static` is its weights and optimiser state in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before + static
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    call()
    return _resident_bytes("VmHWM") - before + static


def _resident_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LsemvaeError(f"/proc/self/status has no {key}: memory is measured on Linux alone")


def bench_model(args: argparse.Namespace) -> list[Row]:
    """Training step and forward pass against the loop over leads that the paper describes."""
    config, device, rounds = (
        SIZES[args.size],
        args.device,
        args.rounds or (15 if args.device == "cuda" else 5),
    )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.precision]
    before = roofs(device, dtype)

    torch.manual_seed(0)
    model = LSEMVAE(config).to(device)
    loop = PaperLoop(config).to(device)
    ours = torch.compile(model) if args.compile else model
    our_adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loop_adamw = torch.optim.AdamW(loop.parameters(), lr=1e-4, foreach=False, fused=False)

    measured = []
    for batch in args.batch or ([128, 1024] if device == "cuda" else [64]):
        x_BLT = torch.randn(batch, len(LEADS), config.samples, device=device)
        lead_mask_BL = torch.ones(batch, len(LEADS), dtype=torch.bool, device=device)
        noise_BD = torch.randn(batch, config.latent, device=device)
        inputs = {"x_BLT": x_BLT, "lead_mask_BL": lead_mask_BL}

        def our_loss(inputs: dict[str, Tensor] = inputs, noise_BD: Tensor = noise_BD) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return ours(inputs, noise_BD=noise_BD)["loss"]

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

    # The roofs at the start or at the end, whichever found the machine less busy.
    flops_s, bytes_s = (max(pair) for pair in zip(before, roofs(device, dtype), strict=True))
    print(f"matrix products {flops_s / 1e12:.3g} TFLOP/s ({args.precision}), copies {bytes_s / 1e9:.3g} GB/s")
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


# ---------------------------------------------------------------------------------------------------- infer


def bench_infer(args: argparse.Namespace) -> list[Row]:
    """Scorer on a 6-lead bundle against a bare loop over the leads with the same weights, both from int16."""
    config = ClassifierConfig(encoder=SIZES[args.size])
    torch.manual_seed(0)
    model = Classifier(config, LIMB_LEADS).eval()
    preprocessing = PreprocessConfig(samples=config.encoder.samples, min_seconds=1)
    encoders = [PaperEncoder(config.encoder) for _ in LIMB_LEADS]
    for row, encoder in enumerate(encoders):
        for part in ("conv1", "conv2", "conv3"):
            getattr(encoder, part).weight.data = getattr(model.encoders, part).weight.data[row]
            getattr(encoder, part).bias.data = getattr(model.encoders, part).bias.data[row]
        encoder.fc_mu.weight.data = model.encoders.fc_mu.weight.data[row].T
        encoder.fc_mu.bias.data = model.encoders.fc_mu.bias.data[row]
        encoder.to(args.device)
    head = copy.deepcopy(model.head).to(args.device)
    rng = np.random.default_rng(0)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bundle"
        save(Bundle.of(model, preprocessing, task="ph", threshold=0.5), model, folder)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        del model
        scorer = Scorer(folder, args.device)
        print(f"6-lead bundle: {megabytes:.1f} MB on disk (at most 250 at full size)")

        def in_mv(raw_BLT: np.ndarray) -> list[np.ndarray]:
            return list(raw_BLT.astype(np.float32) * np.float32(0.005))

        def our_scores(raw_BLT: np.ndarray) -> np.ndarray:
            answers = scorer.score_signals(in_mv(raw_BLT), [500.0] * len(raw_BLT))
            return np.array([answer.score for answer in answers])

        @torch.inference_mode()
        def bare_scores(raw_BLT: np.ndarray) -> np.ndarray:
            scores = []
            for start in range(0, len(raw_BLT), CHUNK):
                signals = in_mv(raw_BLT[start : start + CHUNK])
                x_BLT = preprocess_signals(signals, [500.0] * len(signals), LIMB_LEADS, preprocessing).x_BLT
                x_BLT = torch.from_numpy(x_BLT).to(args.device)
                h_BF = torch.cat([mean_of(encoder, x_BLT[:, [k]]) for k, encoder in enumerate(encoders)], dim=1)
                scores.append(head.predict(h_BF).cpu().numpy())
            return np.concatenate(scores)

        rows = []
        for batch in args.batch or [1, 32, 1024]:
            raw_BLT = rng.integers(-400, 400, (batch, len(LIMB_LEADS), config.encoder.samples), dtype=np.int16)
            np.testing.assert_allclose(our_scores(raw_BLT), bare_scores(raw_BLT), atol=1e-5)
            rounds = args.rounds or (30 if batch == 1 else 7 if batch < 1000 else 3)
            seconds = alternate(partial(our_scores, raw_BLT), partial(bare_scores, raw_BLT), rounds, args.device)
            rows.append(more_is_better(f"infer 6L b{batch}", *(batch / s for s in seconds), "records/s"))
    return rows


def mean_of(encoder: PaperEncoder, x_B1T: Tensor) -> Tensor:
    """One lead's mean alone, as the loop computes it."""
    h = F.relu(encoder.conv3(F.relu(encoder.conv2(F.relu(encoder.conv1(x_B1T)))))).flatten(1)
    return encoder.fc_mu(h)


# ------------------------------------------------------------------------------------------------- collapse


def bench_collapse(args: argparse.Namespace) -> list[Row]:
    """What the reconstruction weight does on the recordings of `--data`; the baseline is the recipe's own weight.

    The `small` recipe's model and schedule on training subjects, measured on validation subjects.
    """
    from matplotlib.figure import Figure

    from lsemvae.recipes import PRETRAIN
    from lsemvae.shards import ShardedDataset, signals_mv

    if not args.data:
        raise LsemvaeError("collapse needs recordings: give --data SHARDS, made by workflows/ingest.py")
    recipe = PRETRAIN["small"]
    parts: dict[str, list[dict[str, Tensor]]] = {"train": [], "val": []}
    for uri in args.data:
        for split, batches in parts.items():
            columns = ["signal", "samples", "rate_hz", "uv_per_lsb", "offset"]
            table = ShardedDataset.open(uri).read(columns, split).to_pydict()
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

        def batches_of(epoch: int, size: int = size) -> Iterator[dict[str, Tensor]]:
            order = torch.randperm(len(train["x_BLT"]), generator=torch.Generator().manual_seed(epoch))
            for rows in order.split(size):
                yield {name: values[rows].to(args.device) for name, values in train.items()}

        optim = replace(recipe.optim, epochs=args.epochs or recipe.optim.epochs)
        scale = lambda epoch, step, steps=steps: {"kl_scale": kl_scale(recipe, epoch, step, steps)}  # noqa: E731
        fit(model, make_optimizer(model, optim), optim, batches_of, lambda epoch: None, forward_kwargs=scale)
        pieces = zip(*(values.to(args.device).split(size) for values in held_out.values()), strict=True)
        found[weight], _ = validate(model, [dict(zip(held_out, piece, strict=True)) for piece in pieces], recipe)
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


# ---------------------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "model": bench_model,
    "infer": bench_infer,
    "collapse": bench_collapse,
}


def machine(device: str) -> dict[str, str | int]:
    """What was measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    facts = {"cpu": name, "cores": os.cpu_count() or 0, "threads": torch.get_num_threads()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"python": platform.python_version(), "torch": torch.__version__}


def show(rows: list[Row]) -> None:
    """The table."""
    width = max(len(row.case) for row in rows)
    print(f"{'case':<{width}} {'ours':>10} {'baseline':>10} {'ratio':>7}  unit")
    for row in rows:
        print(f"{row.case:<{width}} {row.ours:>10.4g} {row.baseline:>10.4g} {row.ratio:>7.2f}  {row.unit}")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (model: 64, on a GPU 128 and 1024)")
    parser.add_argument("--size", default="full", choices=SIZES, help="of the model")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="float32, on a GPU bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile ours (GPU: yes)")
    parser.add_argument("--rounds", type=int, help="how often each side is timed")
    parser.add_argument("--data", nargs="+", help="shards (collapse)")
    parser.add_argument("--weights", type=float, nargs="+", default=[1, 10, 100, 1000, 10000], help="(collapse)")
    parser.add_argument("--epochs", type=int, help="of each training run (collapse; by default the recipe's)")
    parser.add_argument("--plot", type=Path, help="also draw the curves into this PNG file (collapse)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    args = parser.parse_args()
    args.precision = args.precision or ("bfloat16" if args.device == "cuda" else "float32")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise LsemvaeError("torch sees no CUDA device here: leave out --device cuda")
        if args.device == "cpu":
            keep_freed_memory()
        if args.threads:
            torch.set_num_threads(args.threads)
        rows = CASES[args.case](args)
    except LsemvaeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    show(rows)
    if args.json:
        answer = {"machine": machine(args.device), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
