"""`--help` of every command fits two screens, with the common options first; `--help-all` explains all."""

import math
import re

import pytest
from support.session import workflow

FIRST = {
    "simulate": ["output", "tasks"],
    "ingest": ["source", "output", "cohort", "labels"],
    "pretrain": ["data", "storage"],
    "tune": ["data", "storage", "grid"],
    "adapt": ["output", "weights"],
    "finetune": ["data", "task", "encoder", "leads"],
    "evaluate": ["cohort", "task", "output", "methods", "leads"],
    "promote": ["name", "source"],
    "score": ["model", "output", "data", "source"],
    "explain": ["model", "output", "data", "source"],
    "withdrawn": ["list", "places", "output"],
}
"""Command -> the options that its help begins with."""
HIDDEN = {
    "ingest": ["patience-s"], "pretrain": ["optim.epochs", "model.beta", "wait-s"], "tune": ["optim.epochs"],
    "finetune": ["folds", "optim.epochs"], "evaluate": ["gpus"], "score": ["digest"], "explain": ["effort.draws"],
}  # fmt: skip
"""Some of the options that only --help-all explains."""
SCREENS = 100
WIDTH = 100


@pytest.fixture(autouse=True)
def terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def help_of(name: str, flag: str) -> str:
    return workflow(name, *(["smoke"] if name in ("pretrain", "tune", "finetune") else []), flag).stdout


def explained(text: str) -> list[str]:
    """The options in the boxes, in order."""
    return re.findall(r"^[│ ] --([\w.-]+)", text.split("More options")[0], re.MULTILINE)


@pytest.mark.parametrize("name", FIRST)
def test_help_fits_two_screens_and_begins_with_the_common_options(name: str):
    text = help_of(name, "--help")
    assert sum(max(1, math.ceil(len(line) / WIDTH)) for line in text.splitlines()) <= SCREENS
    shown = explained(text)
    assert shown[: len(FIRST[name])] == FIRST[name]
    hidden = HIDDEN.get(name, [])
    assert ("--help-all" in text) == bool(hidden)
    for option in hidden:
        assert option not in shown and re.search(rf" --{option}\b", text)


@pytest.mark.parametrize("name", HIDDEN)
def test_help_all_explains_what_help_names(name: str):
    short, whole = help_of(name, "--help"), set(explained(help_of(name, "--help-all")))
    named = re.findall(r"--([\w.-]+)", short.split("--help-all explains:")[1])
    assert len(named) > 3 and set(named) <= whole
    assert set(explained(short)) <= whole and not set(explained(short)) & set(named)


def test_a_hidden_option_is_taken():
    done = workflow("ingest", "--source", "/nowhere", "--output", "/nowhere/out", "--patience-s", "1", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "/nowhere does not exist" in done.stderr
