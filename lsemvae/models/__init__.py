"""Architectures by configuration: one contract (`lsemvae.models.contract`), one file for each architecture.

To add one: a file with a configuration (an `EncoderConfig`), a module that follows the contract, and `PRESETS`; and
its line in `ARCHITECTURES` and `PRESETS` here. Tests over every architecture then include it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lsemvae import fields
from lsemvae.errors import BundleError
from lsemvae.models import beta_vae, lsemvae, mmvae_plus, mopoe, mvae, resnet1d, st_mem, transformer, xresnet1d
from lsemvae.models.beta_vae import BetaVAE, BetaVAEConfig
from lsemvae.models.classifier import Classifier, ClassifierConfig
from lsemvae.models.contract import (
    Embeds,
    Encoder,
    EncoderConfig,
    Features,
    Predicts,
    Pretrains,
    Reconstructs,
    Trains,
    Validation,
    Weighs,
)
from lsemvae.models.ecg_fm import ECGFM, ECGFMConfig
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig
from lsemvae.models.mmvae_plus import MMVAEPlus, MMVAEPlusConfig
from lsemvae.models.mopoe import MoPoEConfig, MoPoEVAE
from lsemvae.models.mvae import MVAE, MVAEConfig
from lsemvae.models.resnet1d import ResNet1d, ResNet1dConfig
from lsemvae.models.st_mem import STMEM, STMEMConfig
from lsemvae.models.timesfm import TimesFM, TimesFMConfig
from lsemvae.models.transformer import Transformer, TransformerConfig
from lsemvae.models.xresnet1d import XResNet1d, XResNet1dConfig

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "Embeds",
    "Encoder",
    "EncoderConfig",
    "Features",
    "Predicts",
    "Pretrains",
    "Reconstructs",
    "Trains",
    "Validation",
    "Weighs",
    "architecture_name",
    "build",
    "config_from",
]

ARCHITECTURES: dict[type[Any], type[nn.Module]] = {
    LSEMVAEConfig: LSEMVAE,
    ClassifierConfig: Classifier,
    ResNet1dConfig: ResNet1d,
    XResNet1dConfig: XResNet1d,
    TransformerConfig: Transformer,
    BetaVAEConfig: BetaVAE,
    STMEMConfig: STMEM,
    MVAEConfig: MVAE,
    MoPoEConfig: MoPoEVAE,
    MMVAEPlusConfig: MMVAEPlus,
    ECGFMConfig: ECGFM,
    TimesFMConfig: TimesFM,
}
"""The module of each configuration. One that has no `embedder` learns from labels alone: it is an encoder, no more. One
that has it and no `validation` has learned elsewhere, see `lsemvae.external`."""

PRESETS: Mapping[str, Mapping[str, EncoderConfig]] = {
    "lsemvae": lsemvae.PRESETS,
    "resnet1d": resnet1d.PRESETS,
    "xresnet1d": xresnet1d.PRESETS,
    "transformer": transformer.PRESETS,
    "beta-vae": beta_vae.PRESETS,
    "st-mem": st_mem.PRESETS,
    "mvae": mvae.PRESETS,
    "mopoe-vae": mopoe.PRESETS,
    "mmvae-plus": mmvae_plus.PRESETS,
}
"""Configurations that recipes name, by architecture. What has learned elsewhere has none: its weights decide."""


def build(config: Any, leads: Sequence[str]) -> nn.Module:
    """The module of a configuration over the named leads, freshly initialised.

    Under `torch.device("meta")` it costs nothing; then `load_state_dict(state, assign=True)` fills it.
    """
    return ARCHITECTURES[type(config)](config, leads)


def architecture_name(config: Any) -> str:
    """The name of this configuration's architecture in a bundle's config.json: `"lsemvae"`."""
    return type(config).architecture


def config_from(name: str, values: Mapping[str, Any]) -> Any:
    """The configuration that a bundle's config.json holds, as `fields.as_json` wrote it.

    Raises BundleError naming an architecture or a field that is not known, missing, or of another type.
    """
    known: dict[str, Any] = {config_type.architecture: config_type for config_type in ARCHITECTURES}
    if name not in known:
        raise BundleError(f"unknown architecture {name!r}: this version knows {', '.join(known)}")
    return fields.read(known[name], values, "config")
