"""What the protocol needs of each labelled recording, computed once on Ray Data: features, model input, labels.

Features and model input stay in Ray's object store: see `lsemvae.evaluation.stored`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from lsemvae.bundle import load
from lsemvae.data.shards import LABEL_PREFIX, ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import classical
from lsemvae.evaluation.noise import AddNoise, Noise
from lsemvae.evaluation.stored import Kept, Table, keep
from lsemvae.models import Embeds, Encoder, build
from lsemvae.models.parts.shifts import recorded_samples
from lsemvae.preprocess import FIXED_MV, PreprocessConfig
from lsemvae.tracking import fetched

CLASSICAL, QUANTILES = "classical features", "amplitude quantiles"


@dataclass(frozen=True)
class Embedded:
    """Labelled recordings, sorted by record id: features by name, labels, records and subjects. B recordings.

    observed_BF   by name, which features hold something of the recording; see `lsemvae.models.Encoder.observed`
    inputs        model input x_BLT and lead_mask_BL, where it was asked for, by a name for its preprocessing
    refused       labelled recordings that preprocessing refused; they are not among the B
    """

    h_BF: dict[str, Table]
    observed_BF: dict[str, Table]
    y_B: np.ndarray
    record_B: np.ndarray
    subject_B: np.ndarray
    refused: int
    inputs: dict[str, tuple[Table, Table]] = field(default_factory=dict)


class Pretrained(NamedTuple):
    """A pre-trained model, the digest of its bundle, its preprocessing, and where it comes from."""

    model: Any
    digest: str
    preprocess: PreprocessConfig
    uri: str


def load_encoder(uri: str, leads: Sequence[str] = ()) -> Pretrained:
    """The pre-trained bundle at a folder, s3:// or models:/ URI.

    Raises LsemvaeError where it is no pre-trained encoder, or lacks one of the leads.
    """
    with fetched(uri) as found:
        bundle, model = load(found.folder)
    if not isinstance(model, Embeds):
        raise LsemvaeError(f"{uri} is a {bundle.architecture}: this command takes a pre-trained encoder")
    if absent := [lead for lead in leads if lead not in bundle.leads]:
        raise LsemvaeError(f"the encoder has no lead {', '.join(absent)}: it has {', '.join(bundle.leads)}")
    return Pretrained(model, bundle.digest, bundle.preprocess, uri)


class Embedder:
    """A Ray Data actor: embeds batches with every encoder it is given."""

    def __init__(self, encoders: Mapping[str, Any], keep_input: bool = False, device: str = "cpu") -> None:
        self._device, self._keep_input = device, keep_input
        self._encoders = {name: encoder.to(device) for name, encoder in encoders.items()}  # modules, and this actor's

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x_LT, mask_L = (batch.pop(name) for name in ("x_LT", "lead_mask_L"))
        x_BLT, mask_BL = (torch.from_numpy(values.copy()).to(self._device) for values in (x_LT, mask_L))
        with torch.inference_mode():
            for name, encoder in self._encoders.items():
                batch[f"h.{name}"] = encoder.embed(x_BLT, mask_BL).cpu().numpy()
                batch[f"observed.{name}"] = encoder.observed(mask_BL).cpu().numpy()
        return batch | ({"x": x_LT, "mask": mask_L.astype(bool)} if self._keep_input else {})


def untrained(model: Any, seed: int) -> Any:
    """The same architecture with its initial weights."""
    torch.manual_seed(seed)
    return build(model.config, model.leads)


def embed(
    data: ShardedDataset,
    task: str,
    leads: Sequence[str],
    preprocess: PreprocessConfig,
    encoders: Mapping[str, Encoder],
    batch_size: int = 64,
    *,
    keep_input: bool = False,
    name: str = "",
    gpus: float = 0,
    noise: Noise | None = None,
    title: str = "embed",
) -> Embedded:
    """Every recording that has the label `task` once through every encoder and through `lsemvae.evaluation.classical`.

    With `gpus`, the encoders run on that share of a GPU. `noise` is added to the model input. `name` is the
    input's in `Embedded.inputs`, `title` that of the progress bar. Raises LsemvaeError where the data set has no such
    label.
    """
    import ray.data

    column = data.require_label(task)
    columns = ["record_id", "subject_id", column]
    counts = data.manifest.labels[column.removeprefix(LABEL_PREFIX)]
    total = counts["0"] + counts["1"]
    place: dict[str, Any] = {"columns": columns, "labelled": column}
    embedder: dict[str, Any] = {
        "fn_constructor_args": (encoders, keep_input, "cuda" if gpus else "cpu"),
        "batch_size": batch_size,
        "num_gpus": gpus or None,
        "compute": ray.data.ActorPoolStrategy(size=1),
    }
    unit_mv = {"fixed": FIXED_MV, "none": 1.0}.get(preprocess.scale)
    measure = Classical(tuple(leads), preprocess.rate_hz, unit_mv or 1.0)
    add_noise = AddNoise(noise, preprocess.rate_hz) if noise else None

    def model_input(config: PreprocessConfig) -> Any:
        rows = data.model_input(leads, config, **place)
        return rows.map_batches(add_noise, batch_size=batch_size) if add_noise else rows

    rows = model_input(preprocess)
    if unit_mv:
        rows = rows.map_batches(measure, batch_size=batch_size)
    whole = keep(rows.map_batches(Embedder, **embedder), [*columns, "refused"], total, title)
    measured = whole
    if not unit_mv:  # the model's input has lost its voltages
        in_mv = model_input(replace(preprocess, scale="none"))
        in_mv = in_mv.map_batches(measure, batch_size=batch_size).drop_columns(["x_LT", "lead_mask_L"])
        measured = keep(in_mv, ["record_id"], total, "measure")
        assert (whole.small["record_id"] == measured.small["record_id"]).all()
    accepted = pd.isna(whole.small["refused"])
    kept_in: dict[str, Kept] = dict.fromkeys(encoders, whole) | dict.fromkeys((CLASSICAL, QUANTILES), measured)

    def columns_of(kind: str) -> dict[str, Table]:
        return {name: kept.column(f"{kind}.{name}", accepted) for name, kept in kept_in.items()}

    return Embedded(
        h_BF=columns_of("h"),
        observed_BF=columns_of("observed"),
        y_B=whole.small[column][accepted].astype(np.int64),
        record_B=whole.small["record_id"][accepted].astype(str),
        subject_B=whole.small["subject_id"][accepted].astype(str),
        refused=int((~accepted).sum()),
        inputs={name: (whole.column("x", accepted), whole.column("mask", accepted))} if keep_input else {},
    )


def merged(parts: Sequence[Embedded]) -> Embedded:
    """The recordings that all of them have, with the features and inputs of all; the first's where a name is twice."""
    common = sorted(set.intersection(*(set(part.record_B.tolist()) for part in parts)))
    rows = [np.searchsorted(part.record_B, common) for part in parts]  # sorted by record id
    first = parts[0]
    h_BF: dict[str, Table] = {}
    observed_BF: dict[str, Table] = {}
    inputs: dict[str, tuple[Table, Table]] = {}
    for part, kept in zip(parts, rows, strict=True):
        h_BF = {name: values.take(kept, axis=0) for name, values in part.h_BF.items()} | h_BF
        observed_BF = {name: values.take(kept, axis=0) for name, values in part.observed_BF.items()} | observed_BF
        inputs = {
            name: (x.take(kept, axis=0), mask.take(kept, axis=0)) for name, (x, mask) in part.inputs.items()
        } | inputs
    return Embedded(
        h_BF=h_BF,
        observed_BF=observed_BF,
        y_B=first.y_B[rows[0]],
        record_B=first.record_B[rows[0]],
        subject_B=first.subject_B[rows[0]],
        refused=len(first.y_B) + first.refused - len(common),
        inputs=inputs,
    )


class Classical:
    """A Ray Data function: adds the classical features of rows whose `x_LT` is in units of so many millivolts."""

    def __init__(self, leads: tuple[str, ...], rate_hz: int, unit_mv: float) -> None:
        self._leads, self._rate_hz, self._unit_mv = leads, rate_hz, unit_mv

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {CLASSICAL: [], QUANTILES: []}
        size_B = recorded_samples(torch.from_numpy(batch["x_LT"].copy())).tolist()
        for x_LT, mask_L, size in zip(batch["x_LT"], batch["lead_mask_L"].astype(bool), size_B, strict=True):
            signal_mv_LT = x_LT[:, :size].astype(np.float64) * self._unit_mv
            found[CLASSICAL].append(classical.beat_features(signal_mv_LT, mask_L, self._rate_hz, self._leads))
            found[QUANTILES].append(classical.quantile_features(signal_mv_LT, mask_L))
        whole = {name: np.stack(rows) for name, rows in found.items()}
        batch |= {f"h.{name}": np.nan_to_num(values_BF) for name, values_BF in whole.items()}
        return batch | {f"observed.{name}": np.isfinite(values_BF) for name, values_BF in whole.items()}
