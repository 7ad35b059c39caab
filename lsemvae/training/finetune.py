"""Training a head on embeddings that were computed once."""

from collections.abc import Iterator

import numpy as np
import torch

from lsemvae.config import FinetuneRecipe
from lsemvae.models.parts.head import Head
from lsemvae.training.fit import Batch, fit, make_optimizer


def train_head(h_BF: np.ndarray, observed_BF: np.ndarray, y_B: np.ndarray, recipe: FinetuneRecipe) -> Head:
    """A head on these embeddings, standardised on them, in evaluation mode."""
    torch.manual_seed(recipe.optim.seed)
    data = {
        "h_BF": torch.from_numpy(h_BF),
        "observed_BF": torch.from_numpy(observed_BF),
        "y_B": torch.from_numpy(y_B).float(),
    }
    head = Head(
        h_BF.shape[1],
        hidden=recipe.hidden,
        dropout=recipe.dropout,
        focal_gamma=recipe.focal_gamma,
        focal_alpha=float(1 - y_B.mean()) if recipe.balance else None,
    )
    head.standardise_from(data["h_BF"], data["observed_BF"])

    def batches(epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(recipe.optim.seed * 100_003 + epoch)
        for rows in torch.randperm(len(y_B), generator=generator).split(recipe.optim.batch_size):
            yield {name: values[rows] for name, values in data.items()}

    steps = -(-len(y_B) // recipe.optim.batch_size)
    fit(head, make_optimizer(head, recipe.optim), recipe.optim, batches, steps_per_epoch=steps)
    return head.eval()
