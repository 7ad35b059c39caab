"""How much each lead counts in the posterior of a model that fuses one expert a lead, as LS-EMVAE does."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsemvae.bundle import Bundle, load
from lsemvae.errors import LsemvaeError
from lsemvae.models import Embeds, Weighs


class Experts(NamedTuple):
    """Each lead's gate weight and its share of the leads' precision; see `lsemvae.models.contract.Weighs`."""

    gate_BL: np.ndarray
    precision_BL: np.ndarray


@torch.inference_mode()
def experts(embedder: Any, x_BLT: Tensor, lead_mask_BL: Tensor) -> Experts | None:
    """The weights of the leads; None where the embedder has none."""
    found = embedder.lead_weights(x_BLT, lead_mask_BL) if isinstance(embedder, Weighs) else None
    return Experts(*(weight_BL.float().cpu().numpy() for weight_BL in found)) if found else None


def encoder_for(folder: Path, classifier: Bundle, device: str = "cpu") -> Any:
    """What fuses the classifier's leads in the pre-trained encoder of another bundle.

    Raises LsemvaeError where it reads other input than the classifier, or has no posterior.
    """
    bundle, model = load(folder, device)
    if not isinstance(model, Embeds):
        raise LsemvaeError(f"{folder} is no pre-trained encoder ({bundle.architecture}): give the bundle of one")
    given = classifier.preprocess
    if replace(bundle.preprocess, window=given.window, min_lead_share=given.min_lead_share) != given:
        raise LsemvaeError(f"{folder} has other preprocessing than the classifier: give the encoder that it came from")
    return model.embedder(classifier.leads, "fused")
