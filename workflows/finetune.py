"""Fine-tune: a head on a frozen encoder's embeddings, cross-validated by Ray Tune, refit, and registered.

Out-of-fold results stand beside two rows that are always there: the naive score (the label's mean) and the same
head on an untrained encoder. Folds are stratified by label and keep each subject's recordings together. The model's
probability is its score, calibrated on the out-of-fold scores.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import tyro
from command import run_recipe_command, start_ray
from sklearn.model_selection import StratifiedGroupKFold
from tqdm import tqdm

from lsemvae import __version__, calibration, plots
from lsemvae.bundle import Bundle, load, save
from lsemvae.config import FinetuneRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.fit import Batch, fit, make_optimizer
from lsemvae.leads import lead_set_name, parse_leads
from lsemvae.metrics import METRICS, Estimate, best_threshold, with_intervals
from lsemvae.models import build
from lsemvae.models.classifier import Classifier, Head
from lsemvae.models.lsemvae import LSEMVAE
from lsemvae.preprocess import PreprocessConfig
from lsemvae.recipes import FINETUNE
from lsemvae.shards import ShardedDataset
from lsemvae.tracking import CANDIDATE, Run, fetch

ENCODER, UNTRAINED, NAIVE = "LS-EMVAE", "untrained encoder", "naive"


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


def main(args: Args) -> None:
    recipe, leads = args.recipe, parse_leads(args.leads)
    data = ShardedDataset.open(args.data)
    column = data.require_label(args.task)
    labelled = data.read(["subject_id", column]).drop_null().to_pandas()
    require_subjects(labelled[column].to_numpy(), labelled["subject_id"].to_numpy(), recipe.folds)
    bundle, encoder = load(fetch(args.encoder).folder)
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
        scores, by_fold = cross_validate(embedded, folds, args, run.run_id)
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


def require_subjects(y_B: np.ndarray, subject_B: np.ndarray, folds: int) -> None:
    """Raises LsemvaeError when either class has fewer subjects than there are folds."""
    negative, positive = (len(np.unique(subject_B[y_B == value])) for value in (0, 1))
    if min(negative, positive) < folds:
        raise LsemvaeError(
            f"{positive} subjects are positive and {negative} negative: {folds} folds need {folds} of each; "
            "lower --folds or add recordings"
        )


def make_folds(embedded: Embedded, recipe: FinetuneRecipe) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, test rows) of each fold; raises LsemvaeError when a fold would lack a class."""
    require_subjects(embedded.y_B, embedded.subject_B, recipe.folds)
    splitter = StratifiedGroupKFold(recipe.folds, shuffle=True, random_state=recipe.optim.seed)
    folds = list(splitter.split(embedded.y_B, embedded.y_B, embedded.subject_B))
    for number, (train, test) in enumerate(folds):
        assert not set(embedded.subject_B[train]) & set(embedded.subject_B[test])
        if len(np.unique(embedded.y_B[test])) < 2:
            raise LsemvaeError(f"fold {number} has one class only: lower --folds (now {recipe.folds})")
    return folds


def train_head(h_BF: np.ndarray, lead_mask_BL: np.ndarray, y_B: np.ndarray, recipe: FinetuneRecipe) -> Head:
    """A head on these embeddings, standardised on them, in evaluation mode."""
    torch.manual_seed(recipe.optim.seed)
    data = {
        "h_BF": torch.from_numpy(h_BF),
        "lead_mask_BL": torch.from_numpy(lead_mask_BL),
        "y_B": torch.from_numpy(y_B).float(),
    }
    head = Head(
        h_BF.shape[1],
        hidden=recipe.hidden,
        dropout=recipe.dropout,
        focal_gamma=recipe.focal_gamma,
        focal_alpha=float(1 - y_B.mean()) if recipe.balance else None,
    )
    head.standardise_from(data["h_BF"], data["lead_mask_BL"])

    def batches(epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(recipe.optim.seed * 100_003 + epoch)
        for rows in torch.randperm(len(y_B), generator=generator).split(recipe.optim.batch_size):
            yield {name: values[rows] for name, values in data.items()}

    fit(head, make_optimizer(head, recipe.optim), recipe.optim, batches, on_epoch=lambda epoch: None)
    return head.eval()


def trial(config: dict[str, Any], embedded: Embedded, folds: list[Any], recipe: FinetuneRecipe) -> None:
    """One head on one fold of one encoder: reports the scores of its test recordings."""
    from ray import tune

    torch.set_num_threads(1)
    train, test = folds[config["fold"]]
    h_BF, mask_BL = embedded.h_BF[config["row"]], embedded.lead_mask_BL
    head = train_head(h_BF[train], mask_BL[train], embedded.y_B[train], recipe)
    with torch.inference_mode():
        score_B = head.predict(torch.from_numpy(h_BF[test]), torch.from_numpy(mask_BL[test]))
    tune.report({"scores": score_B.tolist()})


def cross_validate(
    embedded: Embedded, folds: list[Any], args: Args, run_id: str
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Out-of-fold scores by row of the table, and AUROC by fold."""
    from ray import tune
    from sklearn.metrics import roc_auc_score

    class Progress(tune.Callback):
        def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
            bar.update(1)

    rows = (ENCODER, UNTRAINED)
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(rows) * len(folds), desc="folds", unit="trial") as bar,
    ):
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(trial, embedded=embedded, folds=folds, recipe=args.recipe), {"cpu": 1}
            ),
            param_space={
                "row": tune.grid_search(list(rows)),
                "fold": tune.grid_search(list(range(len(folds)))),
            },
            tune_config=tune.TuneConfig(max_concurrent_trials=args.max_concurrent, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=args.storage or temporary,
                name=f"folds-{run_id}",
                verbose=0,
                callbacks=[Progress()],
            ),
        )
        fitted = tuner.fit()
        if fitted.errors:
            raise LsemvaeError(f"a fold failed: {str(fitted.errors[0]).strip().splitlines()[-1]}")
        scores = {row: np.full(len(embedded.y_B), np.nan) for row in rows}
        by_fold: dict[str, list[float]] = {row: [] for row in rows}
        for result in fitted:
            test = folds[result.config["fold"]][1]
            scores[result.config["row"]][test] = result.metrics["scores"]
            by_fold[result.config["row"]].append(roc_auc_score(embedded.y_B[test], result.metrics["scores"]))
    assert all(np.isfinite(values).all() for values in scores.values())
    return scores, by_fold


def decisions(y_B: np.ndarray, score_B: np.ndarray, folds: list[Any]) -> np.ndarray:
    """Each fold is decided at the threshold that is best on the other folds' scores: never on its own labels."""
    decision_B = np.zeros(len(y_B), dtype=bool)
    for train, test in folds:
        decision_B[test] = score_B[test] >= best_threshold(y_B[train], score_B[train])
    return decision_B


def summarise(
    embedded: Embedded, scores: dict[str, np.ndarray], folds: list[Any], recipe: FinetuneRecipe
) -> dict[str, dict[str, Estimate]]:
    """Metrics with intervals for each row, the naive one included."""
    naive_B = np.full(len(embedded.y_B), embedded.y_B.mean())
    rows = {name: (score_B, decisions(embedded.y_B, score_B, folds)) for name, score_B in scores.items()}
    rows[NAIVE] = (naive_B, naive_B >= 0.5)
    return {
        name: with_intervals(
            embedded.y_B,
            score_B,
            decision_B,
            embedded.subject_B,
            draws=recipe.bootstrap_draws,
            seed=recipe.optim.seed,
        )
        for name, (score_B, decision_B) in tqdm(rows.items(), desc="bootstrap", unit="row")
    }


def reliability(
    embedded: Embedded, scores: dict[str, np.ndarray], folds: list[Any]
) -> tuple[dict[str, dict[str, float]], dict[str, calibration.Diagram]]:
    """Brier score and expected calibration error by row, of the scores as they are and cross-fitted; and the diagrams
    of the encoder's."""
    y_B, weight_B = embedded.y_B, calibration.subject_weights(embedded.subject_B)
    errors: dict[str, dict[str, float]] = {}
    diagrams: dict[str, calibration.Diagram] = {}
    for row, score_B in {**scores, NAIVE: np.full(len(y_B), y_B.mean())}.items():
        errors[row] = {}
        for kind, p_B in (("", score_B), ("calibrated", calibration.cross_fitted(y_B, score_B, weight_B, folds))):
            if p_B is None:
                continue
            errors[row][f"Brier {kind}".strip()] = calibration.brier(y_B, p_B, weight_B)
            errors[row][f"ECE {kind}".strip()] = calibration.expected_calibration_error(y_B, p_B, weight_B)
            if row == ENCODER:
                diagrams[f"{kind}, cross-fitted" if kind else "score"] = calibration.diagram(y_B, p_B, weight_B)
    return errors, diagrams


def as_table(
    results: dict[str, dict[str, Estimate]], errors: dict[str, dict[str, float]], by_fold: dict[str, list[float]]
) -> pd.DataFrame:
    rows = []
    for name, metrics in results.items():
        folds = by_fold.get(name)
        mean_of_folds = f"{np.mean(folds):.3f} ± {np.std(folds, ddof=1):.3f}" if folds else "-"
        row = {"scored by": name} | {m.upper(): str(metrics[m]) for m in METRICS} | {"AUROC of folds": mean_of_folds}
        row |= {error: f"{errors[name][error]:.3f}" if error in errors[name] else "-" for error in errors[ENCODER]}
        rows.append(row)
    return pd.DataFrame(rows)


def out_of_fold(embedded: Embedded, scores: dict[str, np.ndarray], folds: list[Any]) -> pd.DataFrame:
    fold_B = np.zeros(len(embedded.y_B), dtype=int)
    for number, (_, test) in enumerate(folds):
        fold_B[test] = number
    return pd.DataFrame(
        {
            "record_id": embedded.record_B,
            "subject_id": embedded.subject_B,
            "fold": fold_B,
            "label": embedded.y_B,
            **scores,
        }
    )


if __name__ == "__main__":
    run_recipe_command(main, Args, FINETUNE, task=tyro.MISSING, encoder=tyro.MISSING)
