"""Weights that were published elsewhere: their tensors' names and shapes against those that an architecture reads."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from lsemvae.errors import LsemvaeError

State = Mapping[str, Tensor]
_NAMED = 3
"""So many tensors are named in a message, and the others counted."""


def shape_of(state: State, name: str, dims: int) -> tuple[int, ...]:
    """The shape of this tensor. Raises LsemvaeError where it is missing or has another number of dimensions."""
    if name not in state:
        raise LsemvaeError(f"the weights have no tensor {name}: they are not of this architecture")
    shape = tuple(state[name].shape)
    if len(shape) != dims:
        raise LsemvaeError(f"{name} has the shape {list(shape)}: it must have {dims} dimensions")
    return shape


def layers(state: State, prefix: str) -> int:
    """How many layers `prefix.0.…`, `prefix.1.…` there are."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in found if match})


def require(state: State, wanted: Mapping[str, Sequence[int]], unused: Sequence[str]) -> None:
    """Raises LsemvaeError naming tensors that are missing, of another shape, or not known.

    Names that begin as one of `unused` are known: the encoder's own training needed them.
    """
    troubles = {
        "missing": [name for name in wanted if name not in state],
        "of the wrong shape": [
            f"{name} {list(state[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in state and tuple(state[name].shape) != tuple(shape)
        ],
        "unexpected": [name for name in state if name not in wanted and not name.startswith(tuple(unused))],
    }
    found = [f"{_listed(names)} {what}" for what, names in troubles.items() if names]
    if found:
        raise LsemvaeError(f"the weights do not fit: {'; '.join(found)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
