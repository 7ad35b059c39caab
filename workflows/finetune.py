"""Fine-tune a pre-trained encoder for a label: cross-validate it with Ray Tune, refit it, and register it.

The recipe says what is trained: `paper` and `linear` a head on frozen features, `full` every weight of the encoder. The
table always has other rows: the naive score (the label's mean), classical features in logistic regression, an untrained
encoder, and with `full` the same training from random weights. Where such a row does as well, pre-training has not been
shown to help; paired differences say so. Folds are stratified by label and keep each subject's recordings together. The
model's probability is its score, calibrated on the out-of-fold scores. If it is interrupted, the same command with the
same --output or --storage goes on after the trainings that had finished.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from command import run_recipe_command, start_ray
from options import RARE

from lsemvae import __version__
from lsemvae.bundle import Bundle
from lsemvae.config import FinetuneRecipe
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import abstention
from lsemvae.evaluation.cells import Trials
from lsemvae.evaluation.compare import Known, compare
from lsemvae.evaluation.embedding import embed, load_encoder, untrained
from lsemvae.evaluation.lead_set import read_people
from lsemvae.evaluation.metrics import METRICS
from lsemvae.evaluation.protocol import (
    Result,
    material_of,
    outer_folds,
    refit,
    rows_of,
    run_protocol,
    untrained_names,
)
from lsemvae.evaluation.release import Trained, assembled, release
from lsemvae.fields import as_json
from lsemvae.leads import lead_set_name, parse_leads
from lsemvae.models import Features
from lsemvae.models.classifier import Classifier
from lsemvae.recipes import FINETUNE
from lsemvae.reports.model_card import model_card
from lsemvae.scoring.drift import ScoreBins
from lsemvae.storage import Storage
from lsemvae.tracking import CANDIDATE, Run
from lsemvae.training.finetune import new_head
from lsemvae.training.grid import digest

RUN = "run.json"


@dataclass(frozen=True)
class Args:
    """Fine-tune on labelled shards."""

    recipe: Annotated[FinetuneRecipe, tyro.conf.arg(name=""), RARE]
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
    """Also write results.csv, differences.csv, scores.csv, the curves and the bundle into this folder."""
    storage: Annotated[str | None, RARE] = None
    """Folder or s3:// URI where finished trainings are kept until the end, so that an interrupted command can go on; by
    default the output folder."""
    max_concurrent: Annotated[int, RARE] = 2
    """Trainings at a time, one CPU each."""
    data_licence: Annotated[str, RARE] = "not stated"
    """The licence of the data, for the model card."""
    gpus: Annotated[float, RARE] = 0
    """GPUs for each training and for embedding, such as 0.5 for two trainings on one; 0 uses CPUs."""


def main(args: Args) -> None:
    recipe, leads = args.recipe, parse_leads(args.leads)
    data = ShardedDataset.open(args.data)
    column = data.require_label(args.task)
    labelled = data.read(["subject_id", column]).drop_null().to_pandas()
    outer_folds(labelled[column].to_numpy(), labelled["subject_id"].to_numpy(), recipe)  # before anything starts
    pretrained = load_encoder(args.encoder, leads)
    encoder = pretrained.model
    title = encoder.config.title
    start, frozen = None, recipe.features
    if recipe.trains == "all":
        head = new_head(encoder.embedder(leads, recipe.features).embedding_size, labelled[column].to_numpy(), recipe)
        start = Classifier.from_encoder(encoder, leads, head, recipe.features, recipe.shifts)
        frozen = pooled_where_it_can(encoder, leads)  # beside it stand frozen features in logistic regression
    encoders = {title: encoder.embedder(leads, frozen)}
    encoders |= {
        name: untrained(encoder, recipe.optim.seed + seed).embedder(leads, frozen)
        for seed, name in enumerate(untrained_names(recipe))
    }
    start_ray()
    embedded = embed(
        data, args.task, leads, pretrained.preprocess, encoders, recipe.embed_batch_size, keep_input=start is not None,
        gpus=args.gpus,
    )  # fmt: skip

    model_name = args.model_name or f"{args.task}-{lead_set_name(leads)}"
    params = {
        "recipe": as_json(recipe, every_tag=True),
        "task": args.task,
        "leads": ",".join(leads),
        "encoder": args.encoder,
    }
    kept_in = args.storage or (str(args.output) if args.output else None)
    # Equal for equal data, encoder, recipe and release: the same command goes on.
    made_of = digest(
        data.manifest.digest, data.since_ingest, args.task, leads, pretrained.digest, as_json(recipe), __version__
    )
    keep = Storage.open(kept_in) / f"folds-{made_of}" if kept_in else None
    run = start_run(model_name, params, keep)
    run.tags({"data": data.storage.uri, "data_digest": data.manifest.digest, "encoder_digest": pretrained.digest})
    run.reads(data)
    trials = Trials(keep, args.max_concurrent, args.gpus)
    try:
        material, rows = material_of(embedded, recipe, title, start), rows_of(recipe, title)
        result = run_protocol(material, rows, trials)
        trained = refit(rows[0], material, trials)
    except BaseException:
        run.end("FAILED")
        raise
    released = Trained(
        assembled(trained, encoder, leads, recipe),
        pretrained.preprocess,
        recipe,
        result.threshold,
        result.calibration,
        {name: asdict(result.metrics[title][name]) for name in METRICS},
        {"uri": args.encoder, "digest": pretrained.digest},
        score_bins=ScoreBins.of(result.score_B),
    )
    positive = int(embedded.y_B.sum())
    caption = f"{args.task}, {lead_set_name(leads)}: {len(embedded.y_B)} recordings, {positive} positive"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result.log(run, result.write(folder, caption))
        scores = result.as_scores(
            facts(args, data, recipe, released), read_people(data, args.task), lead_set_name(leads)
        )
        comparison = compare(
            scores, draws=recipe.bootstrap_draws, seed=recipe.optim.seed, reference=title,
            known=Known(result.metrics, result.differences),
        )  # fmt: skip
        about = (title, lead_set_name(leads))
        lines = comparison.set_aside(*about)
        released = replace(released, doubt=abstention.carried(lines, scores.doubts_of(*about)))
        saved, version = release(
            released, data, len(embedded.y_B), args.task, model_name, run, folder / "bundle",
            lambda described: model_card(
                scores, comparison, described, leads=lead_set_name(leads), abstention=abstention.verdict(lines),
                data_licence=args.data_licence,
            ),
        )  # fmt: skip
    run.end()

    print(f"\n{caption}, {embedded.refused} refused; {recipe.folds} folds by subject, 95 % bootstrap intervals\n")
    show(result, saved, f"models:/{model_name}/{version}")
    print(f"doubt:   {abstention.verdict(lines)}")
    if args.output:
        print(f"files:   {args.output}")
    print(f"MLflow:  {run.url}")
    print(f"promote: python workflows/promote.py --name {model_name}")


def start_run(name: str, params: dict[str, Any], keep: Storage | None) -> Run:
    """The MLflow run of this command; where finished trainings are kept, that of the command that was interrupted."""
    if keep is None:
        return Run.start("finetune", name, params)
    mend = "Delete it and give the same command again: finished trainings are kept, in a new MLflow run"
    previous = keep.read_json(RUN, mend, ("run",))["run"] if keep.exists(RUN) else None
    run = Run.start("finetune", name, params, resume=previous, place=keep.uri)
    keep.write_bytes(RUN, json.dumps({"run": run.run_id}).encode())
    return run


def facts(args: Args, data: ShardedDataset, recipe: FinetuneRecipe, trained: Trained) -> dict[str, Any]:
    """What the model card says beside figures."""
    how = {
        "head": "a head on frozen features",
        "linear": "L2 logistic regression on frozen features, its strength chosen on inner folds",
        "all": f"all weights under circular shifts, scores averaged over {recipe.shifts} shifts",
    }[recipe.trains]
    return {
        "task": args.task,
        "source_layout": data.manifest.cohort,  # a simulated cohort has that of MIMIC-IV-ECG
        "data": {"uri": data.storage.uri, "digest": data.manifest.digest},
        "folds": f"{recipe.folds} folds, stratified by label, each subject in one of them",
        "seeds": recipe.seeds,
        "training": f"{how}; features: {recipe.features}",
        "encoder": dict(trained.encoder or {}),
        "preprocess": trained.preprocess.digest,
        "release": __version__,
    }


def pooled_where_it_can(encoder: Any, leads: tuple[str, ...]) -> Features:
    """Pooled features if the architecture gives them, otherwise its own."""
    try:
        encoder.embedder(leads, "pooled")
    except LsemvaeError:
        return "means"
    return "pooled"


def show(result: Result, saved: Bundle, model: str) -> None:
    """Print the tables, and what the model decides at."""
    print(result.table().to_string(index=False))
    print(f"\n{result.differences_table().to_string(index=False)}")
    print(f"\nmodel:   {model} (alias {CANDIDATE}, digest {saved.digest})")
    print(f"         decision at {result.threshold:.3f} or above")
    if saved.calibration:
        print(f"         probability {saved.calibration.probability(result.threshold):.3f} there")
    else:
        print("         no probabilities: out of fold, higher scores did not mean more positives")


if __name__ == "__main__":
    run_recipe_command(main, Args, FINETUNE, task=tyro.MISSING, encoder=tyro.MISSING)
