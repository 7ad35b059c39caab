"""Fine-tune a head on a frozen encoder's embeddings: cross-validate it with Ray Tune, refit it, and register it.

The table always has two more rows: the naive score (the label's mean), and the same head on an untrained encoder. Where
the untrained encoder does as well, pre-training has not been shown to help. Folds are stratified by label and keep each
subject's recordings together. The model's probability is its score, calibrated on the out-of-fold scores.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from command import run_recipe_command, start_ray

from lsemvae import __version__
from lsemvae.bundle import Bundle, load, save
from lsemvae.config import FinetuneRecipe
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation.embedding import embed, untrained
from lsemvae.evaluation.folds import require_subjects
from lsemvae.evaluation.protocol import ENCODER, UNTRAINED, Result, run_protocol
from lsemvae.fields import as_json
from lsemvae.leads import lead_set_name, parse_leads
from lsemvae.models import Pretrains
from lsemvae.models.classifier import Classifier
from lsemvae.recipes import FINETUNE
from lsemvae.tracking import CANDIDATE, Run, fetch
from lsemvae.training.finetune import train_head


@dataclass(frozen=True)
class Args:
    """Fine-tune on labelled shards."""

    recipe: Annotated[FinetuneRecipe, tyro.conf.arg(name="")]
    data: str
    """Labelled shards: the --output of workflows/ingest.py."""
    task: str
    """The label to predict: one of the data set's label columns, with values 0 and 1."""
    encoder: str
    """A pre-trained bundle: folder, s3:// URI, models:/NAME@alias or models:/NAME/VERSION."""
    leads: str = "12"
    """6, 12, or names such as I,II,V1."""
    model_name: str | None = None
    """The MLflow model that the result becomes a version of; by default TASK-LEADS, such as ph-6L."""
    output: Path | None = None
    """Also write results.csv, scores.csv, the curves and the bundle into this folder."""
    storage: str | None = None
    """Where Ray Tune keeps its trials; needed on a cluster of several machines, by default a temporary folder."""
    max_concurrent: int = 2
    """Trials at a time, one CPU each."""


def main(args: Args) -> None:
    recipe, leads = args.recipe, parse_leads(args.leads)
    data = ShardedDataset.open(args.data)
    column = data.require_label(args.task)
    labelled = data.read(["subject_id", column]).drop_null().to_pandas()
    require_subjects(labelled[column].to_numpy(), labelled["subject_id"].to_numpy(), recipe.folds)
    bundle, encoder = load_encoder(args.encoder, leads)
    start_ray()
    encoders = {
        ENCODER: encoder.embedder(leads),
        UNTRAINED: untrained(encoder, recipe.optim.seed).embedder(leads),
    }
    embedded = embed(data, args.task, leads, bundle.preprocess, encoders, recipe.embed_batch_size)

    model_name = args.model_name or f"{args.task}-{lead_set_name(leads)}"
    params = {"recipe": as_json(recipe), "task": args.task, "leads": ",".join(leads), "encoder": args.encoder}
    run = Run.start("finetune", model_name, params)
    run.tags({"data": data.storage.uri, "data_digest": data.manifest.digest, "encoder_digest": bundle.digest})
    try:
        result = run_protocol(embedded, recipe, run.run_id, args.storage, args.max_concurrent)
        head = train_head(embedded.h_BF[ENCODER], embedded.observed_BF[ENCODER], embedded.y_B, recipe)
    except BaseException:
        run.end("FAILED")
        raise
    classifier = Classifier.from_encoder(encoder, leads, head)
    described = Bundle.of(
        classifier,
        bundle.preprocess,
        task=args.task,
        threshold=result.threshold,
        calibration=result.calibration,
        provenance={
            "recipe": as_json(recipe),
            "data": {
                "uri": data.storage.uri,
                "digest": data.manifest.digest,
                "recordings": len(embedded.y_B),
                **({"since_ingest": data.since_ingest} if data.since_ingest else {}),
            },
            "encoder": {"uri": args.encoder, "digest": bundle.digest},
            "out_of_fold": {name: asdict(value) for name, value in result.metrics[ENCODER].items()},
            "mlflow_run": run.run_id,
            "lsemvae": __version__,
        },
    )
    positive = int(embedded.y_B.sum())
    title = f"{args.task}, {lead_set_name(leads)}: {len(embedded.y_B)} recordings, {positive} positive"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result.log(run, result.write(folder, title))
        saved = save(described, classifier, folder / "bundle")
        run.bundle(folder / "bundle")
    version = run.register(model_name, {"digest": saved.digest, "task": args.task, "leads": ",".join(leads)}, CANDIDATE)
    run.end()

    print(f"\n{title}, {embedded.refused} refused; {recipe.folds} folds by subject, 95 % bootstrap intervals\n")
    show(result, saved, f"models:/{model_name}/{version}")
    if args.output:
        print(f"files:   {args.output}")
    print(f"MLflow:  {run.url}")
    print(f"promote: python workflows/promote.py --name {model_name}")


def load_encoder(uri: str, leads: tuple[str, ...]) -> tuple[Bundle, Any]:
    """A pre-trained bundle and its model; raises LsemvaeError where it is none, or lacks a lead."""
    with tempfile.TemporaryDirectory() as temporary:
        bundle, encoder = load(fetch(uri, Path(temporary)).folder)
    if not isinstance(encoder, Pretrains):
        raise LsemvaeError(f"{uri} is a {bundle.architecture}: --encoder takes a pre-trained encoder")
    absent = [lead for lead in leads if lead not in bundle.leads]
    if absent:
        raise LsemvaeError(f"the encoder has no lead {', '.join(absent)}: it has {', '.join(bundle.leads)}")
    return bundle, encoder


def show(result: Result, saved: Bundle, model: str) -> None:
    """Print the table, and what the model decides at."""
    print(result.table().to_string(index=False))
    print(f"\nmodel:   {model} (alias {CANDIDATE}, digest {saved.digest})")
    print(f"         decision at {result.threshold:.3f} or above")
    if saved.calibration:
        print(f"         probability {saved.calibration.probability(result.threshold):.3f} there")
    else:
        print("         no probabilities: out of fold, higher scores did not mean more positives")


if __name__ == "__main__":
    run_recipe_command(main, Args, FINETUNE, task=tyro.MISSING, encoder=tyro.MISSING)
