"""How doubtful a score is: measures that need no label, and nothing that scoring does not compute anyway."""

from typing import Literal

from torch import Tensor

Kind = Literal["distance", "disagreement"]
"""distance: how far the features are from those of the training recordings; disagreement: how much the logit changes
with circular shifts of the recording in time."""
_FARTHEST = 5.0
"""Standard deviations."""


def distance(standard_BF: Tensor, observed_BF: Tensor | None = None) -> Tensor:
    """Standardised features, 0 where they are not observed -> the mean of min(z^2, 25) over the observed ones, [B].

    z^2 is a feature's squared distance from its training mean in standard deviations, 1 on average. A feature counts as
    at most five standard deviations off, so that a few which hardly varied in training do not outweigh all others.
    Worked example: z = (0, 1, -3, 1000) gives (0 + 1 + 9 + 25) / 4 = 8.75.
    """
    total_B = standard_BF.float().square().clamp(max=_FARTHEST**2).sum(dim=1)
    if observed_BF is None:
        return total_B / standard_BF.shape[1]
    return total_B / observed_BF.sum(dim=1).clamp(min=1)


def disagreement(logit_SB: Tensor) -> Tensor:
    """Logits under each shift -> their standard deviation, [B]."""
    return logit_SB.float().std(dim=0, correction=0)
