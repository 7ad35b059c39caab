"""Small bundles of every architecture, and recordings to score with them."""

from pathlib import Path

import numpy as np
import torch

from lsemvae import bundle as bundles
from lsemvae.bundle import Bundle, Calibration
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import PRESETS, build
from lsemvae.models.classifier import ClassifierConfig
from lsemvae.models.ecg_fm import ECGFMConfig
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.models.timesfm import TimesFMConfig
from lsemvae.preprocess import PreprocessConfig
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg

SMALL = LSEMVAEConfig(latent=4, channels=(2, 3, 4))


CONFIGS = [
    SMALL,
    ClassifierConfig(encoder=SMALL, hidden=8),
    *(presets["smoke"] for name, presets in PRESETS.items() if name != "lsemvae"),
    ECGFMConfig(channels=4, width=8, depth=1, heads=2, hidden=8, position_kernel=4, position_groups=2),
    TimesFMConfig(samples=5000, patch=50, width=8, depth=1, heads=2, hidden=8, hidden_embedding=8),
]


CALIBRATION = Calibration(slope=2.5, intercept=-0.75)


def records(count: int, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    signals = [simulate_ecg(EcgParameters(severity=b / 2), rng)[0] for b in range(count)]
    return [Record.from_leads(dict(zip(LEADS, s, strict=True)), 500, record_id=f"r{b}") for b, s in enumerate(signals)]


def save(
    folder: Path, config: object = CONFIGS[1], leads: tuple[str, ...] = LIMB_LEADS, **provenance: object
) -> Bundle:
    torch.manual_seed(1)
    model = build(config, leads)
    rest = {"task": "ph", "threshold": 0.5, "calibration": CALIBRATION} if isinstance(config, ClassifierConfig) else {}
    return bundles.save(
        Bundle.of(model, PreprocessConfig(), provenance={"data": "made up"} | provenance, **rest), model, folder
    )
