"""The head: standardisation and one or two fully connected layers on an embedding."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.models.parts import objectives


class Head(nn.Module):
    """Standardisation and two fully connected layers on an embedding: h_BF -> logit_B. With `hidden=0` it is linear.

    It can be trained alone, on embeddings that were computed once. With `observed_BF`, which an encoder's `observed`
    gives, a feature that was not observed counts as its average over the training set, not as the embedding's zero.
    """

    mean_F: Tensor
    scale_F: Tensor

    def __init__(
        self,
        features: int,
        *,
        hidden: int = 128,
        dropout: float = 0.5,
        focal_gamma: float = 2.0,
        focal_alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.focal_gamma, self.focal_alpha = focal_gamma, focal_alpha
        self.register_buffer("mean_F", torch.zeros(features))
        self.register_buffer("scale_F", torch.ones(features))
        self.hidden = hidden
        self.fc1 = nn.Linear(features, hidden) if hidden else None
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden or features, 1)

    @torch.no_grad()
    def standardise_from(self, h_BF: Tensor, observed_BF: Tensor | None = None) -> None:
        """Set mean and scale from the training embeddings; with a mask, from the observed features alone."""
        there_BF = torch.ones_like(h_BF, dtype=torch.bool) if observed_BF is None else observed_BF
        count_F = there_BF.sum(dim=0).clamp(min=1)
        values_BF = torch.where(there_BF, h_BF, 0).double()
        mean_F = values_BF.sum(dim=0) / count_F
        variance_F = torch.where(there_BF, values_BF - mean_F, 0).square().sum(dim=0) / count_F
        self.mean_F.copy_(mean_F)
        # A feature that never varies carries no information: it is centred and keeps its scale.
        self.scale_F.copy_(torch.where(variance_F > 1e-12, variance_F, 1.0).sqrt())

    def standardised(self, h_BF: Tensor, observed_BF: Tensor | None = None) -> Tensor:
        """h_BF -> the same in standard deviations from the training mean, 0 where a feature was not observed."""
        if h_BF.ndim != 2 or h_BF.shape[1] != len(self.mean_F):
            raise LsemvaeError(f"the embedding is {list(h_BF.shape)}: give [batch, {len(self.mean_F)}]")
        standard_BF = (h_BF - self.mean_F) / self.scale_F
        if observed_BF is not None:
            standard_BF = torch.where(observed_BF, standard_BF, torch.zeros_like(standard_BF))
        return standard_BF

    def logit(self, h_BF: Tensor, observed_BF: Tensor | None = None) -> Tensor:
        """h_BF -> logit_B."""
        return self.logit_of(self.standardised(h_BF, observed_BF))

    def logit_of(self, standard_BF: Tensor) -> Tensor:
        """What `standardised` gives -> logit_B."""
        if self.fc1 is None:
            return self.fc2(self.dropout(standard_BF)).squeeze(-1)
        return self.fc2(self.dropout(F.relu(self.fc1(standard_BF)))).squeeze(-1)

    def predict(self, h_BF: Tensor, observed_BF: Tensor | None = None) -> Tensor:
        """h_BF -> probability_B of the positive class."""
        return torch.sigmoid(self.logit(h_BF, observed_BF).float())

    def loss(self, logit_B: Tensor, y_B: Tensor) -> Tensor:
        """The focal loss of each record, loss_B."""
        return objectives.binary_focal(logit_B, y_B, self.focal_gamma, self.focal_alpha)

    def forward(self, batch: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """batch: `h_BF`, `y_B` (0 or 1), optionally `observed_BF` -> "loss", and "focal", the same detached.

        `share_B`, `check` and NonFiniteBatch as in `lsemvae.models.contract.Trains`.
        """
        loss_B = self.loss(self.logit(batch["h_BF"], batch.get("observed_BF")), batch["y_B"])
        good_B = objectives.finite_records(loss_B.detach())
        loss = objectives.average(loss_B, batch.get("share_B"))
        found = {"loss": loss, "focal": loss.detach()}
        return objectives.checked(found, good_B, "NaN or infinity", check=check)
