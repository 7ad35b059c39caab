"""Training a classifier: a head on embeddings that were computed once, or a head and its encoder together."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lsemvae.config import FinetuneRecipe
from lsemvae.models.classifier import Classifier
from lsemvae.models.parts import augment, shifts
from lsemvae.models.parts.doubt import Kind
from lsemvae.models.parts.head import Head
from lsemvae.training.fit import Batch, Epoch, Watcher, fit, make_optimizer

_STANDARDISED_SHIFTS = 4
_SMOOTHED_EPOCHS = 3
_CHUNK = 64


def train_head(
    h_BF: np.ndarray, observed_BF: np.ndarray, y_B: np.ndarray, recipe: FinetuneRecipe, device: str = "cpu"
) -> Head:
    """A head on these embeddings, standardised on them, in evaluation mode, on the CPU."""
    torch.manual_seed(recipe.optim.seed)
    data = {
        "h_BF": torch.from_numpy(h_BF).to(device),
        "observed_BF": torch.from_numpy(observed_BF).to(device),
        "y_B": torch.from_numpy(y_B).float().to(device),
    }
    head = new_head(h_BF.shape[1], y_B, recipe).to(device)
    head.standardise_from(data["h_BF"], data["observed_BF"])

    def batches(epoch: int) -> Iterator[Batch]:
        for rows in shuffled(len(y_B), recipe, epoch):
            yield {name: values[rows] for name, values in data.items()}

    fit(
        head,
        make_optimizer(head, recipe.optim),
        recipe.optim,
        batches,
        steps_per_epoch=steps_per_epoch(len(y_B), recipe),
    )
    return head.cpu().eval()


def new_head(features: int, y_B: np.ndarray, recipe: FinetuneRecipe) -> Head:
    """An untrained head for embeddings of so many features; with `recipe.balance`, its loss balances these labels."""
    return Head(
        features,
        hidden=recipe.hidden,
        dropout=recipe.dropout,
        focal_gamma=recipe.focal_gamma,
        focal_alpha=float(1 - y_B.mean()) if recipe.balance else None,
    )


@dataclass(frozen=True)
class Inputs:
    """Labelled recordings as model input."""

    x_BLT: np.ndarray
    lead_mask_BL: np.ndarray
    y_B: np.ndarray

    def of(self, rows: np.ndarray) -> "Inputs":
        return Inputs(self.x_BLT[rows], self.lead_mask_BL[rows], self.y_B[rows])


def train_all(
    classifier: Classifier,
    inputs: Inputs,
    recipe: FinetuneRecipe,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    device: str = "cpu",
) -> Classifier:
    """Train the head and every weight of the encoder -> a trained copy in evaluation mode, on the CPU.

    Each step sees each recording under a random circular shift. The encoder's rate is `recipe.encoder_rate`, the
    head's `recipe.optim.learning_rate`; both follow the recipe's schedule. With `recipe.early_stop`, `held_out` are the
    rows to train on and those to choose the number of epochs on; then all rows are trained on for so many.
    """
    if recipe.early_stop and held_out is not None:
        train, test = held_out
        chooser = _HeldOut(inputs.of(test), device)
        _train_all(classifier, inputs.of(train), recipe, recipe.optim.epochs, device, chooser)
        return _train_all(classifier, inputs, recipe, chooser.best_epochs(), device)
    return _train_all(classifier, inputs, recipe, recipe.optim.epochs, device)


def logits(classifier: Classifier, inputs: Inputs, device: str = "cpu") -> Tensor:
    """logit_B as the classifier scores: the mean over its shifts; on the CPU."""
    return logits_and_doubts(classifier, inputs, (), device)[0]


def logits_and_doubts(
    classifier: Classifier, inputs: Inputs, kinds: Sequence[Kind], device: str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, with these measures of doubt."""
    was_training = classifier.training
    classifier.eval()
    found: list[Tensor] = []
    doubts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    with torch.inference_mode():
        for start in range(0, len(inputs.y_B), _CHUNK):
            part = slice(start, start + _CHUNK)
            x_BLT, mask_BL = (torch.from_numpy(v[part]).to(device) for v in (inputs.x_BLT, inputs.lead_mask_BL))
            logit_B, doubt_of = classifier.logit_and_doubts(x_BLT, mask_BL, kinds)
            found.append(logit_B.float().cpu())
            for kind, of_batches in doubts.items():
                of_batches.append(doubt_of[kind].cpu())
    classifier.train(was_training)
    return torch.cat(found), {kind: torch.cat(of_batches) for kind, of_batches in doubts.items()}


def _train_all(
    classifier: Classifier,
    inputs: Inputs,
    recipe: FinetuneRecipe,
    epochs: int,
    device: str,
    watcher: "_HeldOut | None" = None,
) -> Classifier:
    """The recipe's schedule, ended after so many epochs."""
    torch.manual_seed(recipe.optim.seed)
    model = copy.deepcopy(classifier).to(device)
    model.head = new_head(model.embedding_size, inputs.y_B, recipe).to(device)
    x_BLT, mask_BL = (torch.from_numpy(values).to(device) for values in (inputs.x_BLT, inputs.lead_mask_BL))
    y_B = torch.from_numpy(inputs.y_B).float().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    _standardise(model, x_BLT, mask_BL)

    def batches(epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(recipe.optim.seed * 100_003 + epoch)
        for rows in shuffled(len(y_B), recipe, epoch):
            shift_B = torch.rand(len(rows), generator=generator).to(device)
            shifted_BLT = shifts.each_shifted(x_BLT[rows], shift_B)
            yield _augmented(shifted_BLT, mask_BL[rows], recipe) | {"y_B": y_B[rows]}

    watch = watcher or Watcher()
    if watcher:
        watcher.model = model
    fit(
        model,
        make_optimizer(model, recipe.optim, {"encoders.": recipe.encoder_rate}),
        recipe.optim,
        batches,
        _Until(epochs, watch),
        steps_per_epoch=steps_per_epoch(len(y_B), recipe),
    )
    return model.cpu().eval()


def _standardise(model: Classifier, x_BLT: Tensor, mask_BL: Tensor) -> None:
    """The head's mean and scale from the features of some shifts, before training."""
    model.eval()
    shift_S = shifts.evenly(_STANDARDISED_SHIFTS)
    with torch.inference_mode():
        parts = zip(x_BLT.split(_CHUNK), mask_BL.split(_CHUNK), strict=True)
        h_SBF = torch.cat([model.encoders.embed_shifted(x, mask, shift_S) for x, mask in parts], dim=1)
        h_BF = h_SBF.flatten(0, 1)
        model.head.standardise_from(h_BF, model.observed(mask_BL).repeat(_STANDARDISED_SHIFTS, 1))


def _augmented(x_BLT: Tensor, mask_BL: Tensor, recipe: FinetuneRecipe) -> dict[str, Tensor]:
    if recipe.lead_dropout:
        mask_BL = augment.hide_leads(mask_BL, recipe.lead_dropout)
    if recipe.amplitude:
        x_BLT = augment.rescaled(x_BLT, recipe.amplitude)
    if recipe.noise:
        x_BLT = augment.noisy(x_BLT, recipe.noise)
    return {"x_BLT": x_BLT, "lead_mask_BL": mask_BL}


def shuffled(records: int, recipe: FinetuneRecipe, epoch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(recipe.optim.seed * 100_003 + epoch)
    return torch.randperm(records, generator=generator).split(recipe.optim.batch_size)


def steps_per_epoch(records: int, recipe: FinetuneRecipe) -> int:
    return -(-records // recipe.optim.batch_size)


class _Until(Watcher):
    """Ends the training after so many epochs, wherever the schedule is."""

    def __init__(self, epochs: int, watcher: Watcher) -> None:
        self._epochs, self._watcher = epochs, watcher

    def on_epoch(self, epoch: Epoch) -> bool:
        self._watcher.on_epoch(epoch)
        return epoch.index + 1 >= self._epochs


class _HeldOut(Watcher):
    """The loss on held-out recordings after each epoch."""

    model: Classifier

    def __init__(self, inputs: Inputs, device: str) -> None:
        self._inputs, self._device = inputs, device
        self._losses: list[float] = []

    def on_epoch(self, epoch: Epoch) -> None:
        logit_B, y_B = logits(self.model, self._inputs, self._device), torch.from_numpy(self._inputs.y_B).float()
        self._losses.append(float(self.model.head.loss(logit_B, y_B).mean()))

    def best_epochs(self) -> int:
        """Epochs up to the smallest loss, averaged over three epochs: a single one is noisy on a few recordings."""
        width = min(_SMOOTHED_EPOCHS, len(self._losses))
        smooth = np.convolve(self._losses, np.ones(width) / width, mode="valid")
        return int(smooth.argmin()) + 1 + width // 2


def from_scratch(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The recipe of the row that starts from random weights: as long as it needs, all weights at one rate."""
    optim = replace(recipe.optim, epochs=recipe.scratch_epochs, learning_rate=recipe.scratch_rate)
    return replace(recipe, optim=optim, encoder_rate=recipe.scratch_rate)
