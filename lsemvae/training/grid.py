"""A grid: fields of a recipe with their values, and a trial for each combination."""

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lsemvae.config import PretrainRecipe, with_settings
from lsemvae.errors import LsemvaeError
from lsemvae.fields import as_json
from lsemvae.tracking import flatten

CHANGES_THE_ERROR = ("preprocess.", "leads", "model.objective", "model.decoder_leads", "model.samples")


@dataclass(frozen=True)
class Trial:
    """One combination of the grid. `id` is a digest of its recipe and the data."""

    id: str
    settings: dict[str, Any]
    recipe: PretrainRecipe


def parse_grid(recipe: PretrainRecipe, words: Sequence[str]) -> dict[str, list[Any]]:
    """`["beta=0.5,1"]` -> `{"model.beta": [0.5, 1]}`. Raises LsemvaeError naming a word that cannot be parsed.

    A short name stands for the one field that ends with it. `make_trials` checks that values fit their fields.
    """
    current = flatten(asdict(recipe))
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, texts = word.partition("=")
        if not equals or not all(texts.split(",")):
            raise LsemvaeError(f"--grid {word!r} names no values: write FIELD=VALUE,VALUE such as beta=0.5,1")
        name = name.replace("-", "_")
        found = [known for known in current if known == name] or [n for n in current if n.endswith(f".{name}")]
        if not found:
            short = {known.rpartition(".")[2]: known for known in current}
            near = difflib.get_close_matches(name.rpartition(".")[2], short, n=1)
            hint = f"did you mean {short[near[0]]}?" if near else f"it has {', '.join(current)}"
            raise LsemvaeError(f"--grid {word!r}: the recipe has no field {name!r}: {hint}")
        if len(found) > 1:
            raise LsemvaeError(f"--grid {word!r} can mean {' or '.join(found)}: write one of them")
        if found[0] in grid:
            raise LsemvaeError(f"--grid gives {found[0]} twice: write all its values after one =")
        grid[found[0]] = [_parse_value(text, current[found[0]]) for text in texts.split(",")]
    return grid


def _parse_value(text: str, current: object) -> Any:
    if isinstance(current, tuple):
        return [_parse_value(part, None) for part in text.split("+")]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text  # a name, or a mistake
    return text if isinstance(value, float) and not math.isfinite(value) else value


def make_trials(recipe: PretrainRecipe, grid: Mapping[str, list[Any]], data_digest: str) -> list[Trial]:
    """Every combination of the grid's values once. Raises LsemvaeError on a value that the recipe does not allow."""
    trials: dict[str, Trial] = {}
    for values in itertools.product(*grid.values()):
        found = with_settings(recipe, dict(zip(grid, values, strict=True)))
        flat = flatten(asdict(found))
        id = digest(as_json(found), data_digest)
        trials[id] = Trial(id, {name: flat[name] for name in grid}, found)
    return list(trials.values())


def searched(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The fields that the trials set."""
    return list(dict.fromkeys(name for entry in entries.values() for name in entry["settings"]))


def require_comparable(entries: Mapping[str, Mapping[str, Any]], place: str) -> None:
    for name in searched(entries):
        if name.startswith(CHANGES_THE_ERROR):
            raise LsemvaeError(
                f"{place} searches {name}, which changes the size of the reconstruction error: --select pearson_r"
            )


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
