"""Fine-tune: a head on a frozen encoder's embeddings, cross-validated by Ray Tune, refit, and registered.

Out-of-fold results stand beside two rows that are always there: the naive score (the label's mean) and the same
head on an untrained encoder. Folds are stratified by label and keep each subject's recordings together. The model's
probability is its score, calibrated on the out-of-fold scores.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from command import run_recipe_command, start_ray

from lsemvae import __version__
from lsemvae.bundle import Bundle, load, save
from lsemvae.config import FinetuneRecipe
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import calibration
from lsemvae.evaluation.embedding import embed, embedding_of, untrained
from lsemvae.evaluation.folds import make_folds, require_subjects
from lsemvae.evaluation.metrics import best_threshold
from lsemvae.evaluation.protocol import (
    ENCODER,
    UNTRAINED,
    as_table,
    cross_validate,
    out_of_fold,
    reliability,
    summarise,
)
from lsemvae.leads import lead_set_name, parse_leads
from lsemvae.models.classifier import Classifier
from lsemvae.models.lsemvae import LSEMVAE
from lsemvae.plots import curves as plots
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
    with tempfile.TemporaryDirectory() as temporary:
        bundle, encoder = load(fetch(args.encoder, Path(temporary)).folder)
    if not isinstance(encoder, LSEMVAE):
        raise LsemvaeError(f"{args.encoder} is a {bundle.architecture}: --encoder takes a pre-trained lsemvae")
    absent = [lead for lead in leads if lead not in bundle.leads]
    if absent:
        raise LsemvaeError(f"the encoder has no lead {', '.join(absent)}: it has {', '.join(bundle.leads)}")
    start_ray()

    encoders = {
        ENCODER: embedding_of(encoder, leads),
        UNTRAINED: embedding_of(untrained(encoder, recipe), leads),
    }
    embedded = embed(data, column, leads, bundle.preprocess, encoders, recipe)
    folds = make_folds(embedded, recipe)
    model_name = args.model_name or f"{args.task}-{lead_set_name(leads)}"
    run = Run.start(
        "finetune",
        model_name,
        {"recipe": asdict(recipe), "task": args.task, "leads": ",".join(leads), "encoder": args.encoder},
    )
    run.tags({"data": data.storage.uri, "data_digest": data.manifest.digest, "encoder_digest": bundle.digest})
    try:
        scores, by_fold = cross_validate(embedded, folds, recipe, run.run_id, args.storage, args.max_concurrent)
        results = summarise(embedded, scores, folds, recipe)
        errors, diagrams = reliability(embedded, scores, folds)
        fitted = calibration.fit(embedded.y_B, scores[ENCODER], calibration.subject_weights(embedded.subject_B))
        head = train_head(embedded.h_BF[ENCODER], embedded.lead_mask_BL, embedded.y_B, recipe)
    except BaseException:
        run.end("FAILED")
        raise
    threshold = best_threshold(embedded.y_B, scores[ENCODER])

    classifier = Classifier.from_encoder(encoder, leads, head)
    described = Bundle.of(
        classifier,
        bundle.preprocess,
        task=args.task,
        threshold=threshold,
        calibration=fitted,
        provenance={
            "recipe": asdict(recipe),
            "data": {
                "uri": data.storage.uri,
                "digest": data.manifest.digest,
                "recordings": len(embedded.y_B),
            },
            "encoder": {"uri": args.encoder, "digest": bundle.digest},
            "out_of_fold": {name: asdict(value) for name, value in results[ENCODER].items()},
            "mlflow_run": run.run_id,
            "lsemvae": __version__,
        },
    )
    table = as_table(results, errors, by_fold)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / "results.csv", index=False)
        out_of_fold(embedded, scores, folds).to_csv(folder / "scores.csv", index=False)
        title = (
            f"{args.task}, {lead_set_name(leads)}: {len(embedded.y_B)} recordings, {int(embedded.y_B.sum())} positive"
        )
        plots.discrimination(embedded.y_B, scores, folder / "curves.png", title)
        plots.reliability(diagrams, folder / "reliability.png", title)
        saved = save(described, classifier, folder / "bundle")
        for name in ("results.csv", "scores.csv", "curves.png", "reliability.png"):
            run.file(folder / name)
        run.bundle(folder / "bundle")
    run.metrics(
        {
            f"{row.replace(' ', '_')}.{metric}{suffix}": value
            for row, metrics in results.items()
            for metric, estimate in metrics.items()
            for suffix, value in (("", estimate.value), (".low", estimate.low), (".high", estimate.high))
        }
    )
    run.metrics(
        {
            f"{row}.{name.lower()}".replace(" ", "_"): value
            for row, values in errors.items()
            for name, value in values.items()
        }
    )
    version = run.register(model_name, {"digest": saved.digest, "task": args.task, "leads": ",".join(leads)}, CANDIDATE)
    run.end()

    print(f"\n{title}, {embedded.refused} refused; {recipe.folds} folds by subject, 95 % bootstrap intervals\n")
    print(table.to_string(index=False))
    print(f"\nmodel:   models:/{model_name}/{version} (alias {CANDIDATE}, digest {saved.digest})")
    print(f"         decision at {threshold:.3f} or above")
    if saved.calibration:
        print(f"         probability {saved.calibration.probability(threshold):.3f} there")
    else:
        print("         no probabilities: out of fold, higher scores did not mean more positives")
    if args.output:
        print(f"files:   {args.output}")
    print(f"MLflow:  {run.url}")
    print(f"promote: python workflows/promote.py --name {model_name}")


if __name__ == "__main__":
    run_recipe_command(main, Args, FINETUNE, task=tyro.MISSING, encoder=tyro.MISSING)
