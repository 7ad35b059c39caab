"""Virtual environments without what this project's extras install."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.session import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]]
HEAVY = (
    "ray",
    "mlflow",
    "wfdb",
    "ecgdatakit",
    "pyarrow",
    "pandas",
    "sklearn",
    "matplotlib",
    "captum",
    "boto3",
    "fastapi",
    "tyro",
    "httpx",
)
"""Modules that the core must not need."""


def bare_environment(folder: Path, *distributions: str, source: Path | None = None) -> Path:
    """Make a virtual environment with these distributions, their dependencies and a link to `source` -> its Python.

    It links to the files of the environment that runs the tests, so nothing is downloaded.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    wanted, seen = list(distributions), set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        needed = [Requirement(text) for text in distribution.requires or []]
        wanted += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] != ".."}:
            link, target = site / top, Path(distribution.locate_file(top))
            if not link.exists() and top != "__pycache__":
                link.symlink_to(target)
    if source:
        (site / source.name).symlink_to(source)
    return folder / "bin" / "python"
