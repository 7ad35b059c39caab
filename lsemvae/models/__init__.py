"""Architectures by configuration: one contract, `embed(x_BLT, lead_mask_BL) -> h_BF`, one file each."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lsemvae.errors import BundleError
from lsemvae.fields import read_fields
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig

ARCHITECTURES: dict[type, type[nn.Module]] = {LSEMVAEConfig: LSEMVAE, ClassifierConfig: Classifier}


def build(config: Any, leads: Sequence[str]) -> nn.Module:
    """The module of a configuration over the named leads, freshly initialised.

    Under `torch.device("meta")` it costs nothing; then `load_state_dict(state, assign=True)` fills it.
    """
    return ARCHITECTURES[type(config)](config, leads)


def architecture_name(config: Any) -> str:
    """How a bundle's config.json calls the architecture of this configuration: `"lsemvae"`."""
    return type(config).architecture


def config_from(name: str, values: Mapping[str, Any]) -> Any:
    """The configuration that a bundle's config.json holds: what `dataclasses.asdict` and JSON made of it.

    Raises BundleError naming an architecture or a field that is not known, missing, or of another type.
    """
    for config_type in ARCHITECTURES:
        if config_type.architecture == name:
            return read_fields(config_type, values, "config")
    known = ", ".join(config_type.architecture for config_type in ARCHITECTURES)
    raise BundleError(f"unknown architecture {name!r}: this version knows {known}")
