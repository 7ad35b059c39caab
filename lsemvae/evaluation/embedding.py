"""Every labelled recording once through every encoder, on Ray Data."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lsemvae.config import FinetuneRecipe
from lsemvae.data.shards import ShardedDataset
from lsemvae.models import build
from lsemvae.models.classifier import Classifier
from lsemvae.models.lsemvae import LSEMVAE
from lsemvae.models.parts.head import Head
from lsemvae.preprocess import PreprocessConfig


@dataclass(frozen=True)
class Embedded:
    """What the head sees, computed once: embeddings by encoder, masks, labels and groups. B recordings."""

    h_BF: dict[str, np.ndarray]
    lead_mask_BL: np.ndarray
    y_B: np.ndarray
    record_B: np.ndarray
    subject_B: np.ndarray
    refused: int


class Embedder:
    """A Ray Data actor: embeds batches with every encoder it is given."""

    def __init__(self, encoders: dict[str, Classifier]) -> None:
        self._encoders = encoders

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x_BLT, mask_BL = (torch.from_numpy(batch.pop(name).copy()) for name in ("x_LT", "lead_mask_L"))
        with torch.inference_mode():
            for name, encoder in self._encoders.items():
                batch[name] = encoder.embed(x_BLT, mask_BL).numpy()
        return batch | {"lead_mask_L": mask_BL.numpy()}


def embedding_of(encoder: LSEMVAE, leads: tuple[str, ...]) -> Classifier:
    """The named leads' encoders without log-variance heads and decoder, under a head that is not used."""
    return Classifier.from_encoder(encoder, leads, Head(len(leads) * encoder.config.latent)).eval()


def untrained(encoder: LSEMVAE, recipe: FinetuneRecipe) -> LSEMVAE:
    """The same architecture with its initial weights."""
    torch.manual_seed(recipe.optim.seed)
    return build(encoder.config, encoder.leads)


def embed(
    data: ShardedDataset,
    column: str,
    leads: tuple[str, ...],
    preprocess: PreprocessConfig,
    encoders: dict[str, Classifier],
    recipe: FinetuneRecipe,
) -> Embedded:
    """Every labelled recording once through every encoder, on Ray Data."""
    import ray.data

    columns = ["record_id", "subject_id", column]
    labelled = data.model_input(leads, preprocess, columns=columns, labelled=column)
    embedded = labelled.map_batches(
        Embedder,
        fn_constructor_args=(encoders,),
        batch_size=recipe.embed_batch_size,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    parts: list[dict[str, np.ndarray]] = []
    counts = data.manifest.labels[column.removeprefix("label.")]
    with tqdm(total=counts["0"] + counts["1"], desc="embed", unit="records") as bar:
        for batch in embedded.iter_batches(batch_size=None):
            parts.append(batch)
            bar.update(len(batch["record_id"]))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # Ray Data keeps no order: sort, so that folds and results depend on the data and the seed alone.
    order = np.argsort(whole["record_id"], kind="stable")
    accepted = order[pd.isna(whole["refused"][order])]
    return Embedded(
        h_BF={name: whole[name][accepted] for name in encoders},
        lead_mask_BL=whole["lead_mask_L"][accepted].astype(bool),
        y_B=whole[column][accepted].astype(np.int64),
        record_B=whole["record_id"][accepted].astype(str),
        subject_B=whole["subject_id"][accepted].astype(str),
        refused=len(order) - len(accepted),
    )
