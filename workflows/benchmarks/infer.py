"""`infer`: scoring with a bundle against a bare torch loop over the same weights."""

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, alternate, more_is_better
from benchmarks.model import SIZES, PaperEncoder
from lsemvae.bundle import CHUNK, Bundle, Scorer, save
from lsemvae.leads import LIMB_LEADS
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.models.parts.blocks import LeadEncoders
from lsemvae.preprocess import PreprocessConfig, preprocess_signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case."""
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: 1, 32 and 1024)")
    parser.add_argument("--size", default="full", choices=SIZES, help="size of the model")


def bench_infer(args: argparse.Namespace) -> list[Row]:
    """Time `Scorer` on a 6-lead bundle and a bare loop over the leads with the same weights, both from int16."""
    config = ClassifierConfig(encoder=SIZES[args.size])
    torch.manual_seed(0)
    model = Classifier(config, LIMB_LEADS).eval()
    preprocessing = PreprocessConfig(samples=config.encoder.samples, min_seconds=1)
    encoders = [module.to(args.device) for module in encoder_modules(model.encoders, config.encoder)]
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


def encoder_modules(encoders: LeadEncoders, config: LSEMVAEConfig) -> list[PaperEncoder]:
    """A module for each lead with the weights of these encoders; the log-variances have random weights."""
    modules = [PaperEncoder(config) for _ in encoders.leads]
    for row, module in enumerate(modules):
        for part in ("conv1", "conv2", "conv3"):
            getattr(module, part).weight.data = getattr(encoders, part).weight.data[row]
            getattr(module, part).bias.data = getattr(encoders, part).bias.data[row]
        module.fc_mu.weight.data = encoders.fc_mu.weight.data[row].T
        module.fc_mu.bias.data = encoders.fc_mu.bias.data[row]
    return modules


def mean_of(encoder: PaperEncoder, x_B1T: Tensor) -> Tensor:
    """The mean of one lead, without its log-variance, as the loop computes it."""
    h = F.relu(encoder.conv3(F.relu(encoder.conv2(F.relu(encoder.conv1(x_B1T)))))).flatten(1)
    return encoder.fc_mu(h)
