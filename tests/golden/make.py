"""Write the golden files beside this script: a shard, a bundle, a checkpoint and what they mean.

`python tests/golden/make.py` is run once for each change that is meant to break them (see CHANGELOG.md); a test that
reads them proves that everything else does not. Seeded throughout, so a second run on one machine gives equal files.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsemvae.bundle import Bundle, Calibration, Scorer, example_record, save
from lsemvae.config import OptimConfig, PretrainRecipe
from lsemvae.data.order import Order
from lsemvae.data.shards import pack, shard_bytes
from lsemvae.fields import as_json
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.classifier import Classifier
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.models.parts.head import Head
from lsemvae.preprocess import PreprocessConfig, preprocess
from lsemvae.quality import quality_flags
from lsemvae.recipes import FINETUNE, PRETRAIN
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg
from lsemvae.training.checkpoints import Progress, save_checkpoint
from lsemvae.training.fit import Step, Watcher, fit, make_optimizer

HERE = Path(__file__).parent
SHARD, BUNDLE, CHECKPOINT, FACTS = "shard.parquet", "bundle", "checkpoint", "facts.json"
SMALL = PreprocessConfig(rate_hz=100, samples=1000, scale="record")
RECIPE = PretrainRecipe(
    model=LSEMVAEConfig(samples=1000, latent=2, channels=(2, 2, 2)),
    optim=OptimConfig(epochs=1, batch_size=4, learning_rate=1e-3),
    preprocess=SMALL,
    streams=2,
)
ORDER = Order((5, 130, 64), batch_size=8, streams=4, buffer=64, seed=3)


def records() -> list[Record]:
    """Six recordings: a gap, a missing lead, 250 Hz, and a known step among them."""
    rng = np.random.default_rng(11)
    found = []
    for number in range(6):
        signal_mv_LT, _ = simulate_ecg(EcgParameters(severity=number / 3, heart_rate_bpm=60 + 7 * number), rng)
        leads = dict(zip(LEADS, np.round(signal_mv_LT * 200) / 200, strict=True))
        steps = dict.fromkeys(LEADS, 5.0)
        if number == 1:
            leads["V2"][100:400] = np.nan
        if number == 2:
            del leads["V6"], steps["V6"]
        if number == 3:
            leads = {lead: values[::2] for lead, values in leads.items()}
        found.append(
            Record.from_leads(
                leads, 250 if number == 3 else 500, record_id=f"r{number}", subject_id=f"s{number // 2}",
                uv_per_lsb=steps if number != 4 else None,
            )
        )  # fmt: skip
    return found


def shard(recordings: list[Record]) -> bytes:
    rows = [
        pack(record, path=f"{record.record_id}.hea", flags=quality_flags(record))
        | {"label.ph": None if number == 5 else float(number % 2)}
        for number, record in enumerate(recordings)
    ]
    return shard_bytes(rows, ["ph"], {"plan": "golden", "rows": len(rows), "unreadable": [], "flags": {}})


def batch(recordings: list[Record]) -> dict[str, torch.Tensor]:
    prepared = preprocess(recordings, LEADS, SMALL)
    noise = np.random.default_rng(5).standard_normal((len(recordings), RECIPE.model.latent), dtype=np.float32)
    return {
        "x_BLT": torch.from_numpy(prepared.x_BLT),
        "lead_mask_BL": torch.from_numpy(prepared.lead_mask_BL),
        "noise_BD": torch.from_numpy(noise),
    }


def steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int, recordings: list[Record]
) -> list[float]:
    """Losses of so many training steps on one batch."""
    losses: list[float] = []
    data = batch(recordings)

    def batches(epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        yield from (data for _ in range(count))

    class Losses(Watcher):
        def on_step(self, step: Step) -> None:
            losses.append(step.terms["loss"])

    fit(model, optimizer, RECIPE.optim, batches, Losses())
    return losses


def classifier(encoder: torch.nn.Module) -> Classifier:
    torch.manual_seed(2)
    head = Head(len(LIMB_LEADS) * RECIPE.model.latent, hidden=4)
    head.mean_F.uniform_(-1, 1)
    return Classifier.from_encoder(encoder, LIMB_LEADS, head.eval())


def described(model: Classifier) -> Bundle:
    return Bundle.of(
        model, SMALL, task="ph", threshold=0.4, calibration=Calibration(1.5, -0.25), provenance={"recipe": "golden"}
    )


def facts(recordings: list[Record]) -> dict[str, Any]:
    """What must stay as it is and is no file: numbers to a tolerance, and digests of what is exact."""
    full = preprocess(recordings, LEADS, PreprocessConfig(scale="record"))
    blocks = [
        repr(ORDER.demand(epoch, list(ORDER.streams_of(w, 2)), step)) for epoch, w, step in ((0, 0, 0), (1, 1, 3))
    ]
    orders = [ORDER.permutation(block).tolist() for block in ORDER.blocks(2, 1)]
    recipes = {f"{kind}.{name}": digest(as_json(r)) for kind, all in (("pretrain", PRETRAIN), ("finetune", FINETUNE)) for name, r in all.items()}  # fmt: skip  # noqa: E501
    return {
        "preprocess_digests": {
            scale: PreprocessConfig(scale=scale).digest for scale in ("fixed", "lead", "record", "none")
        },
        "order": digest([blocks, orders]),
        "recipes": recipes,
        "x_sample": full.x_BLT[:, ::4, ::1000].astype(float).round(5).tolist(),
        "flags": [list(quality_flags(record)) for record in recordings],
        "config_text_sha256": hashlib.sha256((HERE / BUNDLE / "config.json").read_bytes()).hexdigest(),
        "scores": [answer.score for answer in Scorer(HERE / BUNDLE).score([*recordings, example_record()])],
    }


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    recordings = records()
    (HERE / SHARD).write_bytes(shard(recordings))
    for folder in (BUNDLE, CHECKPOINT):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    torch.manual_seed(1)
    encoder = build(RECIPE.model, LEADS)
    optimizer = make_optimizer(encoder, RECIPE.optim)
    losses = steps(encoder, optimizer, 2, recordings)
    model = classifier(encoder)
    save(described(model), model, HERE / BUNDLE)
    (HERE / CHECKPOINT).mkdir()
    bundle = Bundle.of(encoder, SMALL, provenance={"recipe": "golden"})
    save_checkpoint(
        HERE / CHECKPOINT, bundle, encoder, optimizer, Progress(epoch=0, step=2, sums={"records": 12.0}), ORDER, 1
    )
    losses += steps(encoder, optimizer, 1, recordings)
    found = facts(recordings) | {"losses": losses}
    (HERE / FACTS).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
