"""Embeddings: every labelled recording once through every encoder, on Ray Data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lsemvae.data.shards import LABEL_PREFIX, ShardedDataset
from lsemvae.models import Encoder, build
from lsemvae.preprocess import PreprocessConfig


@dataclass(frozen=True)
class Embedded:
    """What a head is trained on, computed once: features by encoder, labels, records and subjects. B recordings.

    observed_BF   by encoder, which features hold something of the recording; see `lsemvae.models.Encoder.observed`
    refused       labelled recordings that preprocessing refused; they are not among the B
    """

    h_BF: dict[str, np.ndarray]
    observed_BF: dict[str, np.ndarray]
    y_B: np.ndarray
    record_B: np.ndarray
    subject_B: np.ndarray
    refused: int


class Embedder:
    """A Ray Data actor: embeds batches with every encoder it is given."""

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        self._encoders = encoders

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x_BLT, mask_BL = (torch.from_numpy(batch.pop(name).copy()) for name in ("x_LT", "lead_mask_L"))
        with torch.inference_mode():
            for name, encoder in self._encoders.items():
                batch[f"h.{name}"] = encoder.embed(x_BLT, mask_BL).numpy()
                batch[f"observed.{name}"] = encoder.observed(mask_BL).numpy()
        return batch


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
) -> Embedded:
    """Every recording that has the label `task` once through every encoder, on Ray Data.

    Raises LsemvaeError where the data set has no such label.
    """
    import ray.data

    column = data.require_label(task)
    columns = ["record_id", "subject_id", column]
    labelled = data.model_input(leads, preprocess, columns=columns, labelled=column)
    embedded = labelled.map_batches(
        Embedder,
        fn_constructor_args=(encoders,),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    parts: list[dict[str, np.ndarray]] = []
    counts = data.manifest.labels[column.removeprefix(LABEL_PREFIX)]
    with tqdm(total=counts["0"] + counts["1"], desc="embed", unit="records") as bar:
        for batch in embedded.iter_batches(batch_size=None):
            parts.append(batch)
            bar.update(len(batch["record_id"]))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # Ray Data keeps no order: sort, so that folds and results depend on the data and the seed alone.
    order = np.argsort(whole["record_id"], kind="stable")
    accepted = order[pd.isna(whole["refused"][order])]
    return Embedded(
        h_BF={name: whole[f"h.{name}"][accepted] for name in encoders},
        observed_BF={name: whole[f"observed.{name}"][accepted].astype(bool) for name in encoders},
        y_B=whole[column][accepted].astype(np.int64),
        record_B=whole["record_id"][accepted].astype(str),
        subject_B=whole["subject_id"][accepted].astype(str),
        refused=len(order) - len(accepted),
    )
