"""From a trained row to a registered model: its bundle, with threshold, calibration and where it comes from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lsemvae import __version__
from lsemvae.bundle import MODEL_CARD, Bundle, Calibration, Doubt, save
from lsemvae.config import FinetuneRecipe
from lsemvae.data.shards import ShardedDataset
from lsemvae.fields import as_json
from lsemvae.models.classifier import Classifier
from lsemvae.models.parts.head import Head
from lsemvae.preprocess import PreprocessConfig
from lsemvae.progress import Bar
from lsemvae.scoring.drift import SCORE_BINS, ScoreBins
from lsemvae.tracking import CANDIDATE, Run


@dataclass(frozen=True)
class Trained:
    """A row trained on all recordings, with what its out-of-fold scores gave."""

    classifier: Classifier
    preprocess: PreprocessConfig
    recipe: FinetuneRecipe
    threshold: float
    calibration: Calibration | None
    out_of_fold: Mapping[str, Any]
    encoder: Mapping[str, str] | None = None
    """URI and digest of the pre-trained encoder."""
    doubt: Doubt | None = None
    score_bins: ScoreBins | None = None
    """The distribution of the out-of-fold scores."""


def assembled(trained: Head | Classifier, encoder: Any, leads: Sequence[str], recipe: FinetuneRecipe) -> Classifier:
    """The classifier: the trained one, or a trained head on the frozen encoder."""
    if isinstance(trained, Classifier):
        return trained
    return Classifier.from_encoder(encoder, leads, trained, recipe.features)


def release(
    trained: Trained,
    data: ShardedDataset,
    recordings: int,
    task: str,
    model_name: str,
    run: Run,
    folder: Path,
    card: Callable[[Bundle], str],
) -> tuple[Bundle, int]:
    """Write the bundle into `folder`, log and register it as the candidate -> the bundle and its version.

    `card` writes its model card, which travels in the bundle and is the version's description.
    """
    described = Bundle.of(
        trained.classifier,
        trained.preprocess,
        task=task,
        threshold=trained.threshold,
        calibration=trained.calibration,
        doubt=trained.doubt,
        provenance={
            "recipe": as_json(trained.recipe),
            "data": {
                "uri": data.storage.uri,
                "digest": data.manifest.digest,
                "recordings": recordings,
                **({"since_ingest": data.since_ingest} if data.since_ingest else {}),
            },
            **({"encoder": dict(trained.encoder)} if trained.encoder else {}),
            "out_of_fold": dict(trained.out_of_fold),
            **({SCORE_BINS: trained.score_bins.as_json()} if trained.score_bins else {}),
            "mlflow_run": run.run_id,
            "lsemvae": __version__,
        },
    )
    text = card(described)
    described = replace(described, provenance={**described.provenance, MODEL_CARD: text})
    saved = save(described, trained.classifier, folder)
    tags = {"digest": saved.digest, "task": task, "leads": ",".join(trained.classifier.leads)}
    with Bar(None, "register"):
        run.bundle(folder)
        return saved, run.register(model_name, tags, CANDIDATE, text, encoder=trained.encoder)
