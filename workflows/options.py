"""What `--help` shows of a command: its common options, explained, and the names of the others.

Options whose type is `Annotated[…, RARE]`, and the fields of a recipe, are explained by `--help-all`.
"""

import ast
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_args, get_type_hints

import tyro

RARE = "rare"
HELP, ALL = {"-h", "--help"}, "--help-all"
WIDTH = 100


def common(args_type: type, default: Any) -> tuple[type, Any]:
    """A type with the same arguments, of which `--help` explains only the common ones, and `default` as its instance.

    It is made for help alone. tyro breaks the lines of a docstring where the source does, so they are joined here.
    """
    hints, written = get_type_hints(args_type, include_extras=True), _docstrings(args_type)
    changed: list[tuple[str, Any, Field]] = []
    for one in fields(args_type):
        marker = tyro.conf.arg(help=written[one.name]) if one.name in written else None
        hint = tyro.conf.Suppress[hints[one.name]] if _is_rare(hints[one.name]) else Annotated[hints[one.name], marker]
        changed.append((one.name, hint, _same_default(one)))
    shown = make_dataclass(args_type.__name__, changed, bases=(args_type,), frozen=True)
    if default is not None:
        default = shown(**{one.name: getattr(default, one.name) for one in fields(args_type)})
    return shown, default


def others(args_type: type, default: Any) -> str:
    """The names of all other options, as a paragraph; empty where there are none."""
    hints, names = get_type_hints(args_type, include_extras=True), []
    for one in fields(args_type):
        if _is_rare(hints[one.name]):
            value = getattr(default, one.name) if default is not None else _default_of(one)
            # A recipe's fields have no prefix.
            names += list(_names("" if one.name == "recipe" else f"{one.name}.", one.name, value))
    if not names:
        return ""
    width = min(WIDTH, shutil.get_terminal_size().columns) - 2
    listed = textwrap.fill(" ".join(names), width, break_on_hyphens=False, initial_indent="  ", subsequent_indent="  ")
    return f"More options, which {ALL} explains:\n{listed}\n"


def _names(prefix: str, name: str, value: Any) -> Iterator[str]:
    if is_dataclass(value):
        for one in fields(value):
            inner = getattr(value, one.name)
            yield from _names(f"{prefix}{one.name}.", f"{prefix}{one.name}", inner)
    else:
        yield f"--{name.replace('_', '-')}"


def _is_rare(hint: Any) -> bool:
    return RARE in get_args(hint)[1:]


def _default_of(one: Field) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def _same_default(one: Field) -> Any:
    if one.default_factory is not MISSING:
        return field(default_factory=one.default_factory)
    return field() if one.default is MISSING else field(default=one.default)


def _docstrings(args_type: type) -> dict[str, str]:
    """The docstring below each field, in one line, also of inherited fields."""
    found = {}
    for of in reversed(args_type.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
        assert isinstance(body, ast.ClassDef)
        for one, after in itertools.pairwise(body.body):
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
                found[one.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found
