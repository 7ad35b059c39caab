"""Cross-validation by Ray Tune, and what it gives: out-of-fold scores, metrics with intervals, calibration."""

import tempfile
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lsemvae.config import FinetuneRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import calibration
from lsemvae.evaluation.embedding import Embedded
from lsemvae.evaluation.metrics import METRICS, Estimate, best_threshold, with_intervals
from lsemvae.training.finetune import train_head

ENCODER, UNTRAINED, NAIVE = "LS-EMVAE", "untrained encoder", "naive"


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
    embedded: Embedded, folds: list[Any], recipe: FinetuneRecipe, run_id: str, storage: str | None, max_concurrent: int
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
            tune.with_resources(tune.with_parameters(trial, embedded=embedded, folds=folds, recipe=recipe), {"cpu": 1}),
            param_space={
                "row": tune.grid_search(list(rows)),
                "fold": tune.grid_search(list(range(len(folds)))),
            },
            tune_config=tune.TuneConfig(max_concurrent_trials=max_concurrent, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=storage or temporary,
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
