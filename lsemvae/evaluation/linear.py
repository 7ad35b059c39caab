"""L2 logistic regression on features, its strength chosen on inner folds, as a linear `Head`."""

import copy
from collections.abc import Sequence

import numpy as np
import torch

from lsemvae.config import FinetuneRecipe
from lsemvae.evaluation.folds import make_folds
from lsemvae.models.parts.head import Head


def train_linear(
    h_BF: np.ndarray, observed_BF: np.ndarray, y_B: np.ndarray, subject_B: np.ndarray, recipe: FinetuneRecipe
) -> Head:
    """The head of a logistic regression on standardised features, in evaluation mode.

    Of `recipe.strengths` the one with the largest mean AUROC over inner folds is taken, which keep each subject's
    recordings together; of equal ones the strongest regularisation. Raises LsemvaeError when a class has fewer subjects
    than there are inner folds.
    """
    from sklearn.metrics import roc_auc_score

    strengths = sorted(recipe.strengths)
    chosen = strengths[0]
    if len(strengths) > 1:
        inner = make_folds(y_B, subject_B, recipe.inner_folds, recipe.optim.seed)
        auroc_NS = []
        for train, test in inner:
            heads = _fitted(h_BF[train], observed_BF[train], y_B[train], strengths, recipe.balance)
            with torch.inference_mode():
                test_BF = torch.from_numpy(h_BF[test]), torch.from_numpy(observed_BF[test])
                auroc_NS.append([float(roc_auc_score(y_B[test], head.logit(*test_BF).numpy())) for head in heads])
        chosen = strengths[int(np.mean(auroc_NS, axis=0).argmax())]
    return _fitted(h_BF, observed_BF, y_B, [chosen], recipe.balance)[0]


def _fitted(
    h_BF: np.ndarray, observed_BF: np.ndarray, y_B: np.ndarray, strengths: Sequence[float], balance: bool
) -> list[Head]:
    """A head for each strength, the strongest regularisation first: each solution is where the next search begins.

    With more features than recordings the solution lies in the span of the recordings, so it is found there. X = U S V'
    (thin): the weights w = V v have the same logits as v on U S, and the same L2 norm. So logistic regression on U S,
    at most B features, is exact and costs a fraction.
    """
    from sklearn.linear_model import LogisticRegression

    standard = Head(h_BF.shape[1], hidden=0, dropout=0.0).eval()
    standard.standardise_from(torch.from_numpy(h_BF), torch.from_numpy(observed_BF))
    x_BR = np.where(observed_BF, (h_BF - standard.mean_F.numpy()) / standard.scale_F.numpy(), 0.0).astype(np.float64)
    basis_RF = None
    if x_BR.shape[1] > len(x_BR):
        values_B, left_BB = np.linalg.eigh(x_BR @ x_BR.T)  # a tenth of the time of an SVD of X
        kept = values_B > values_B[-1] * 1e-10
        size_R, left_BR = np.sqrt(values_B[kept]), left_BB[:, kept]
        basis_RF = (left_BR / size_R).T @ x_BR
        x_BR = left_BR * size_R
    class_weight = "balanced" if balance else None
    regression = LogisticRegression(class_weight=class_weight, max_iter=1000, warm_start=True)
    heads = []
    for strength in strengths:
        regression.set_params(C=strength).fit(x_BR, y_B)
        weight_F = regression.coef_[0] if basis_RF is None else regression.coef_[0] @ basis_RF
        head = copy.deepcopy(standard)
        with torch.no_grad():
            head.fc2.weight.copy_(torch.from_numpy(weight_F)[None])
            head.fc2.bias.copy_(torch.from_numpy(regression.intercept_))
        heads.append(head)
    return heads
