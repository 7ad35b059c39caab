"""How trials ended: outcomes that outlive the command, and the table of them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pandas as pd

from lsemvae.config import PretrainRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.fields import as_json
from lsemvae.storage import Storage
from lsemvae.tracking import flatten
from lsemvae.training.checkpoints import folders
from lsemvae.training.grid import searched

log = logging.getLogger(__name__)

RESULT, HISTORY = "result.json", "epochs.json"
TABLE, PLOT, BEST = "results.csv", "results.png", "best_recipe.json"

Select = Literal["pearson_r", "reconstruction"]
SIGN = {"pearson_r": 1, "reconstruction": -1}
LABEL = {"pearson_r": "mean Pearson r", "reconstruction": "reconstruction error, unweighted"}
SHOWN = ("pearson_r", "reconstruction", "kl")
"""Columns of the table, of those that an architecture's validation has."""
_SAID = {
    "val.pearson_r": "mean Pearson r {:.3f}",
    "val.reconstruction": "reconstruction {:.4g}",
    "val.kl": "KL {:.3g}",
    "val.active_units": "{:.0f} active units",
}


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. `metrics` are those of its epoch with the lowest validation loss."""

    state: Literal["finished", "stopped", "failed"]
    metrics: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    """Of the bundle of a finished trial."""
    reason: str = ""


def score(metrics: Mapping[str, float], select: Select) -> float:
    """Higher is better. The loss weights do not affect it; a collapsed model ranks below all others.

    Raises LsemvaeError where the architecture's validation has no such metric.
    """
    if f"val.{select}" not in metrics:
        raise LsemvaeError(f"this architecture's validation has no {select}: its trials cannot be ranked by it")
    return SIGN[select] * metrics[f"val.{select}"] - 1e6 * metrics["val.collapsed"]


def read_outcome(place: Storage) -> Outcome | None:
    if not place.exists(RESULT):
        return None
    mend = f"Delete {place.uri} and give the same command again: the trial is run again, as its checkpoints are gone"
    found = place.read_json(RESULT, mend, ("state",))
    return Outcome(**{name: found[name] for name in vars(Outcome("failed")) if name in found})


def write_outcome(place: Storage, outcome: Outcome) -> None:
    place.write_bytes(RESULT, json.dumps(asdict(outcome), indent=2).encode())


def read_history(place: Storage) -> list[dict[str, float]]:
    """Each epoch's validation metrics, as far as the command received them before it was killed."""
    if not place.exists(HISTORY):
        return []
    try:
        rows = json.loads(place.read_bytes(HISTORY))
        if isinstance(rows, list) and all("epochs" in row for row in rows):
            return rows
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError):
        pass
    log.warning(f"{place.uri}/{HISTORY} is damaged: ASHA does not know of this trial's earlier epochs")
    return []


def forget_checkpoints(place: Storage) -> None:
    """Delete the checkpoints of a trial that has ended: the optimiser's tensors are twice the bundle's size."""
    for folder in folders(place):
        place.filesystem.delete_dir(place.path(folder))


def make_table(
    entries: Mapping[str, Mapping[str, Any]],
    recipe: PretrainRecipe,
    outcomes: Mapping[str, Outcome],
    select: Select,
) -> pd.DataFrame:
    """A row for each trial that has ended: the best first; those that were stopped, collapsed or failed come last."""
    of_recipe = flatten(as_json(recipe))
    rows = []
    for number, (id, entry) in enumerate(entries.items(), start=1):
        if id not in outcomes:
            continue
        outcome = outcomes[id]
        values = {name: entry["settings"].get(name, of_recipe[name]) for name in searched(entries)}
        row: dict[str, Any] = {"trial": number} | {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        row |= {"state": outcome.state}
        if outcome.metrics:
            metrics = outcome.metrics
            row |= {name: metrics[f"val.{name}"] for name in SHOWN if f"val.{name}" in metrics}
            if "val.active_units" in metrics:
                row |= {"active_units": int(metrics["val.active_units"])}
            row |= {"collapsed": bool(metrics["val.collapsed"]), "epoch": int(metrics["epoch"])}
        collapsed = bool(outcome.metrics.get("val.collapsed"))
        reached = score(outcome.metrics, select) if outcome.metrics else 0.0
        order = (outcome.state == "failed", collapsed, outcome.state == "stopped", -reached, number)
        rows.append((order, row | {"reason": outcome.reason, "id": id}))
    return pd.DataFrame([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def best_of(table: pd.DataFrame) -> str | None:
    """The id of the first row, where that trial finished alive."""
    first = table.iloc[0]
    return first["id"] if first["state"] == "finished" and not first["collapsed"] else None


def describe_settings(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name.removeprefix('model.')}={value}" for name, value in settings.items())


def describe_metrics(metrics: Mapping[str, float]) -> str:
    parts = [text.format(metrics[name]) for name, text in _SAID.items() if name in metrics]
    parts += ["collapsed"] if metrics["val.collapsed"] else []
    return f"{', '.join(parts)} (epoch {metrics['epoch']:.0f})"
