"""JSON <-> typed frozen dataclasses, with messages that name the field.

A field's type may be one of several configurations: a union of dataclasses, or a base class of which they are
subclasses. JSON tells them apart by the member's `architecture`, a class variable that is written beside its fields:

    {"model": {"architecture": "lsemvae", "latent": 256, …}}

A dataclass that has gained fields keeps the meaning of older files: its class variable `before` holds the new fields
with the values that they had before they existed.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lsemvae.errors import BundleError, LsemvaeError

TAG = "architecture"
UNTAGGED = "untagged"
"""Class variable of a base class: the architecture that a value without a tag has."""
BEFORE = "before"
"""Class variable: fields that older files lack, and their values there."""


def as_json(value: Any, *, every_tag: bool = False) -> Any:
    """A dataclass as `dataclasses.asdict` gives it, with the tag of each configuration in a field of a family.

    What `read` assumes is omitted, so that older bundles keep their digests: the default tag, and fields of `before`
    that have the value there. With `every_tag` nothing is omitted.
    """
    if is_dataclass(value) and not isinstance(value, type):
        found = {}
        before = {} if every_tag else getattr(type(value), BEFORE, {})
        for field in fields(value):
            inner = getattr(value, field.name)
            if field.name in before and inner == before[field.name]:
                continue
            found[field.name] = as_json(inner, every_tag=every_tag)
            tag = getattr(type(inner), TAG, None)
            if tag is not None and (every_tag or tag != getattr(type(inner), UNTAGGED, None)):
                found[field.name] = {TAG: tag} | found[field.name]
        return found
    if isinstance(value, Mapping):
        return {name: as_json(inner, every_tag=every_tag) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_json(inner, every_tag=every_tag) for inner in value)
    return value


def read(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as a value of the annotated type.

    `where` names the value in messages. Raises BundleError naming a field that is unknown, missing, of another type or
    out of range, and an architecture that is not known.
    """
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if optional and value is None:
        return None
    if members := _members(hint):
        return _read_member(members, value, where)
    if is_dataclass(hint):
        return _read_dataclass(hint, value, where)
    if optional:
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
        return read(hint, value, where)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(
                read(kind, item, f"{where}[{row}]") for row, (kind, item) in enumerate(zip(kinds, value, strict=True))
            )
    elif get_origin(hint) is Literal and value in get_args(hint):
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise BundleError(f"{where} is {value!r}: not a {getattr(hint, '__name__', hint)}")


def _members(hint: Any) -> Sequence[type]:
    """The configurations that a field of this type may hold; empty if the type is no such family.

    A value without a tag is a union's first member, or the member that a base class names as `untagged`.
    """
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds if len(kinds) > 1 and all(hasattr(kind, TAG) for kind in kinds) else []
    if isinstance(hint, type) and hasattr(hint, UNTAGGED) and not hasattr(hint, TAG):
        found = [kind for kind in _subclasses(hint) if hasattr(kind, TAG)]
        return sorted(found, key=lambda kind: getattr(kind, TAG) != getattr(hint, UNTAGGED))
    return []


def _subclasses(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return children + [kind for child in children for kind in _subclasses(child)]


def _read_member(members: Sequence[type], value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise BundleError(f"{where} is {value!r}: it must hold the fields of a configuration")
    tag = value.get(TAG, getattr(members[0], TAG))
    kind = next((kind for kind in members if getattr(kind, TAG) == tag), None)
    if kind is None:
        known = ", ".join(getattr(kind, TAG) for kind in members)
        raise BundleError(f"{where} has the unknown {TAG} {tag!r}: this version knows {known}")
    return _read_dataclass(kind, {name: inner for name, inner in value.items() if name != TAG}, where)


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise BundleError(f"{where} is {value!r}: it must hold the fields of {kind.__name__}")
    hints, value = get_type_hints(kind), {**getattr(kind, BEFORE, {}), **value}
    names = [field.name for field in fields(kind)]
    for trouble, found in (
        ("lacks", [name for name in names if name not in value]),
        ("has the unknown field", [name for name in value if name not in names]),
    ):
        if found:
            raise BundleError(f"{where} {trouble} {', '.join(map(str, found))}")
    try:
        return kind(**{name: read(hints[name], value[name], f"{where}.{name}") for name in names})
    except BundleError:
        raise
    except LsemvaeError as error:
        raise BundleError(f"{where}: {error}") from None
