"""Architectures by configuration: one contract, `embed(x_BLT, lead_mask_BL) -> h_BF`, one file each."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from lsemvae.errors import BundleError, LsemvaeError
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


def read_fields(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the annotated type of a configuration's field."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise BundleError(f"{where} is {value!r}: it must hold the fields of {hint.__name__}")
        hints = get_type_hints(hint)
        names = [f.name for f in fields(hint)]
        for trouble, found in (
            ("lacks", [name for name in names if name not in value]),
            ("has the unknown field", [name for name in value if name not in names]),
        ):
            if found:
                raise BundleError(f"{where} {trouble} {', '.join(map(str, found))}")
        try:
            return hint(**{name: read_fields(hints[name], value[name], f"{where}.{name}") for name in names})
        except BundleError:
            raise
        except LsemvaeError as error:
            raise BundleError(f"{where}: {error}") from None
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
        return read_fields(hint, value, where)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(
                read_fields(kind, item, f"{where}[{row}]")
                for row, (kind, item) in enumerate(zip(kinds, value, strict=True))
            )
    elif get_origin(hint) is Literal and value in get_args(hint):
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise BundleError(f"{where} is {value!r}: not a {getattr(hint, '__name__', hint)}")
