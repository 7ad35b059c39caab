"""JSON -> typed frozen dataclasses, with messages that name the field."""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lsemvae.errors import BundleError, LsemvaeError


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
