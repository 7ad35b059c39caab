"""Probabilities: fitted on scores of other recordings, in the order of the scores, nearer to the truth than these."""

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from sklearn.metrics import brier_score_loss, roc_auc_score
from support.session import Trained

from lsemvae.bundle import Calibration, describe, load, logit
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import calibration
from lsemvae.evaluation.metrics import best_threshold

TRUE = Calibration(slope=3.0, intercept=-1.5)
FEW = np.array([0, 0, 1, 1])


def cohort(recordings: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn with the probabilities that TRUE gives to the scores -> y_B, score_B."""
    rng = np.random.default_rng(seed)
    score_B = 1 / (1 + np.exp(-0.6 * rng.standard_normal(recordings)))
    return (rng.random(recordings) < TRUE.probability(score_B)).astype(int), score_B


def folds_of(recordings: int, count: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    everyone = np.arange(recordings)
    return [(everyone[everyone % count != fold], everyone[everyone % count == fold]) for fold in range(count)]


def test_the_fit_finds_the_sigmoid_that_the_labels_were_drawn_with():
    y_B, score_B = cohort(20_000)
    fitted = calibration.fit_sigmoid(y_B, score_B, np.ones(len(y_B)))
    assert fitted.slope == pytest.approx(TRUE.slope, rel=0.05)
    assert fitted.intercept == pytest.approx(TRUE.intercept, abs=0.05)


def test_the_fit_equals_that_of_scikit_learn():
    """Theirs is private: CalibratedClassifierCV, with the logit as the classifier's decision."""
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Given(ClassifierMixin, BaseEstimator):
        def fit(self, x, y):
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, x):
            return x[:, 0]

        def predict(self, x):
            return (x[:, 0] > 0).astype(int)

    y_B, score_B = cohort(80)
    x = logit(score_B)[:, None]
    theirs = CalibratedClassifierCV(FrozenEstimator(Given().fit(x, y_B)), method="sigmoid").fit(x, y_B)
    ours = calibration.fit_sigmoid(y_B, score_B, np.ones(80)).probability(score_B)
    np.testing.assert_allclose(ours, theirs.predict_proba(x)[:, 1], atol=1e-5)


def test_the_order_the_auroc_and_the_decisions_stay():
    y_B, score_B = cohort(300)
    fitted, threshold = calibration.fit_sigmoid(y_B, score_B, np.ones(300)), best_threshold(y_B, score_B)
    probability_B = fitted.probability(score_B)
    assert roc_auc_score(y_B, probability_B) == roc_auc_score(y_B, score_B)
    np.testing.assert_array_equal(probability_B >= fitted.probability(threshold), score_B >= threshold)


def test_separated_classes_give_no_certainty():
    probability_B = calibration.fit_sigmoid(FEW, np.array([0.1, 0.2, 0.8, 0.9]), np.ones(4)).probability([0.2, 0.8])
    assert 0.15 < probability_B[0] < 0.35 and 0.65 < probability_B[1] < 0.85  # Platt's targets are 1/4 and 3/4


@pytest.mark.parametrize("score_B", [[0.9, 0.8, 0.2, 0.1], [0.3, 0.3, 0.3, 0.3], [1.0, 1.0, 0.0, 0.0]])
def test_scores_that_do_not_rank_get_no_calibration(score_B: list[float]):
    """A falling sigmoid would turn the order round."""
    assert calibration.fit_sigmoid(FEW, np.array(score_B), np.ones(4)) is None
    assert (
        calibration.fit_sigmoid(np.arange(50) % 7 == 0, np.full(50, score_B[0]), np.ones(50)) is None
    )  # nor constant ones
    assert calibration.cross_fitted(np.tile(FEW, 3), np.tile(score_B, 3), np.ones(12), folds_of(12, 3)) is None


@pytest.mark.parametrize(("slope", "intercept"), [(0.0, 0.0), (-1.0, 0.0), (np.inf, 0.0), (1.0, np.nan)])
def test_no_other_sigmoid_can_be_made(slope: float, intercept: float):
    with pytest.raises(LsemvaeError, match="slope above 0"):
        Calibration(slope, intercept)


def test_a_fold_is_calibrated_without_its_own_labels():
    y_B, score_B = cohort(200)
    folds = folds_of(200)
    before_B = calibration.cross_fitted(y_B, score_B, np.ones(200), folds)
    test = folds[2][1]
    turned_B = y_B.copy()
    turned_B[test] = 1 - y_B[test]
    after_B = calibration.cross_fitted(turned_B, score_B, np.ones(200), folds)
    np.testing.assert_array_equal(before_B[test], after_B[test])
    others = np.setdiff1d(np.arange(200), test)
    assert (before_B[others] != after_B[others]).all()
    assert calibration.brier(y_B, before_B, np.ones(200)) < calibration.brier(y_B, score_B, np.ones(200))


def test_a_subject_counts_once_however_many_recordings_it_has():
    """Fitted on each subject's recording n times over equals fitted on it once."""
    y_B, score_B = cohort(60)
    times = np.random.default_rng(1).integers(1, 9, 60)
    subject_B = np.repeat([f"s{subject}" for subject in range(60)], times)
    weight_B = calibration.subject_weights(subject_B)
    assert weight_B.sum() == pytest.approx(60)
    once = calibration.fit_sigmoid(y_B, score_B, np.ones(60))
    often = calibration.fit_sigmoid(np.repeat(y_B, times), np.repeat(score_B, times), weight_B)
    assert (often.slope, often.intercept) == pytest.approx((once.slope, once.intercept), rel=1e-4)
    assert calibration.brier(np.repeat(y_B, times), np.repeat(score_B, times), weight_B) == pytest.approx(
        brier_score_loss(y_B, score_B)
    )


def test_the_calibration_error_is_zero_of_true_probabilities_and_the_shift_of_shifted_ones():
    rng = np.random.default_rng(2)
    probability_B = rng.uniform(0.2, 0.6, 200_000)
    y_B = (rng.random(200_000) < probability_B).astype(int)
    weight_B = np.ones(200_000)
    assert calibration.expected_calibration_error(y_B, probability_B, weight_B) < 0.006
    assert calibration.expected_calibration_error(y_B, probability_B + 0.2, weight_B) == pytest.approx(0.2, abs=0.006)
    drawn = calibration.diagram(y_B, probability_B, weight_B)
    np.testing.assert_allclose(drawn.weight, 20_000, rtol=0.01)
    np.testing.assert_allclose(drawn.positive, drawn.probability, atol=0.015)


def test_equal_probabilities_are_one_bin():
    """Else the order of the recordings would decide the error of a constant."""
    y_B = np.repeat([0, 1], [70, 30])
    drawn = calibration.diagram(y_B, np.full(100, 0.3), np.ones(100))
    assert (drawn.probability.tolist(), drawn.positive.tolist(), drawn.weight.tolist()) == (
        pytest.approx([0.3]), pytest.approx([0.3]), [100],
    )  # fmt: skip
    assert calibration.expected_calibration_error(y_B, np.full(100, 0.3), np.ones(100)) == pytest.approx(0)


@pytest.mark.ray
@pytest.mark.parametrize("leads", ["6", "12"])
def test_fine_tuning_calibrates_on_its_out_of_fold_scores(finetuned: dict[str, Trained], leads: str):
    folder = finetuned[leads].folder
    scores = pd.read_csv(folder / "scores.csv", dtype={"subject_id": str})
    y_B, score_B, fold_B = (scores[name].to_numpy() for name in ("label", "LS-EMVAE", "fold"))
    weight_B = calibration.subject_weights(scores["subject_id"].to_numpy())
    bundle = describe(folder / "bundle")
    expected = calibration.fit_sigmoid(y_B, score_B, weight_B)
    assert expected is not None  # the smoke models rank
    assert (bundle.calibration.slope, bundle.calibration.intercept) == pytest.approx(
        (expected.slope, expected.intercept), rel=1e-3
    )

    folds = [(np.flatnonzero(fold_B != fold), np.flatnonzero(fold_B == fold)) for fold in np.unique(fold_B)]
    probability_B = calibration.cross_fitted(y_B, score_B, weight_B, folds)
    results = pd.read_csv(folder / "results.csv", index_col="scored by", dtype=str)
    brier = brier_score_loss(y_B, probability_B, sample_weight=weight_B)
    assert results.loc["LS-EMVAE", "Brier calibrated"] == f"{brier:.3f}"
    assert results.loc["LS-EMVAE", "Brier"] == f"{brier_score_loss(y_B, score_B, sample_weight=weight_B):.3f}"
    assert results.loc["naive", "Brier calibrated"] == "-"

    run_id = bundle.provenance["mlflow_run"]
    metrics = MlflowClient().get_run(run_id).data.metrics
    assert metrics["LS-EMVAE.brier_calibrated"] == pytest.approx(brier, abs=1e-6)
    assert {"LS-EMVAE.ece", "LS-EMVAE.ece_calibrated", "naive.brier"} <= metrics.keys()
    assert "reliability.png" in {item.path for item in MlflowClient().list_artifacts(run_id)}
    assert 0 < bundle.example < 1
    load(folder / "bundle")
