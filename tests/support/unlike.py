"""A small classifier on simulated recordings, and recordings unlike those."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lsemvae.leads import LIMB_LEADS
from lsemvae.models import Features, build
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig, preprocess
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg

PREPROCESS = PreprocessConfig(rate_hz=100, samples=992)


def ecgs(count: int, seed: int) -> list[Record]:
    """Six leads at 100 Hz of as many people, every second ill."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        heart = EcgParameters(severity=float(number % 2), heart_rate_bpm=float(rng.uniform(55, 95)))
        signal_mv_LT, _ = simulate_ecg(heart, rng)
        leads = dict(zip(LIMB_LEADS, signal_mv_LT[:6, ::5].astype(np.float32), strict=True))
        found.append(Record.from_leads(leads, 100, record_id=f"r{number}"))
    return found


def _noise(record: Record) -> Record:
    rng = np.random.default_rng(len(record.record_id))
    return replace(record, signal_mv_LT=rng.normal(0, 0.5, record.signal_mv_LT.shape).astype(np.float32))


UNLIKE: dict[str, Callable[[Record], Record]] = {
    "noise": _noise,
    "inverted": lambda record: replace(record, signal_mv_LT=-record.signal_mv_LT),
    "four times as large": lambda record: replace(record, signal_mv_LT=4 * record.signal_mv_LT),
}


def classifier(features: Features, shifts: int) -> tuple[Classifier, PreprocessConfig]:
    """A linear head, trained on 60 recordings, on an encoder with its initial weights."""
    torch.manual_seed(0)
    encoder = LSEMVAEConfig(samples=PREPROCESS.samples, latent=8, channels=(4, 6, 8))
    config = ClassifierConfig(encoder=encoder, hidden=0, dropout=0.0, features=features, shifts=shifts)
    model = build(config, LIMB_LEADS)
    prepared = preprocess(ecgs(60, seed=1), LIMB_LEADS, PREPROCESS)
    x_BLT, mask_BL = torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL)
    with torch.no_grad():
        h_BF = model.embed(x_BLT, mask_BL)
    model.head.standardise_from(h_BF, model.observed(mask_BL))
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.02)
    y_B = torch.arange(60) % 2
    for _ in range(50):
        optimizer.zero_grad()
        model.head({"h_BF": h_BF, "y_B": y_B})["loss"].backward()
        optimizer.step()
    return model.eval(), PREPROCESS
