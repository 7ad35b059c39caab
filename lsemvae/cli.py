"""The console command `lsemvae`: each workflow as a sub-command, and `serve`.

    lsemvae ingest --source recordings --output shards     the same as python workflows/ingest.py --source …
    lsemvae serve                                           the same as serve run serve/config.yaml

A wheel holds the folders workflows/ and serve/ as lsemvae/programs. In a repository they lie beside this package.
"""

import ast
import difflib
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from lsemvae import __version__

SHELLS = ("bash", "zsh", "fish")
SERVE = "Start the endpoint on this machine; the first word may be a configuration in place of serve/config.yaml."

NEEDS: dict[str, tuple[str, ...]] = {
    "bench": ("all", "dsp"),
    "demo": ("all",),
    "explain": ("train", "explain"),
    "serve": ("serve",),
}
"""The extras of pyproject.toml that a command needs; every other one needs `train`."""

USAGE = """\
usage: lsemvae COMMAND [options]        options: lsemvae COMMAND --help
       lsemvae --version
       lsemvae --print-completion {shells}

{title}

{commands}
"""


def main() -> None:
    """Runs the command that the first word names, with the words after it. A mistake is one line and exit status 2."""
    word, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if word in ("-h", "--help", ""):
        print(usage(), end="")
        raise SystemExit(0 if word else 2)
    if word == "--version":
        print(versions())
    elif word == "--print-completion":
        _print_completion(rest)
    elif word == "serve":
        _require(word)
        _serve(rest)
    elif word in (known := commands()):
        _require(word)
        run(known[word], rest)
    else:
        names = [*known, "serve"]
        nearest = difflib.get_close_matches(word, names, 1, 0.5)
        mend = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(sorted(names))}"
        _exit(f"there is no command {word!r}: {mend}")


def programs() -> Path:
    """The folder that holds workflows/ and serve/: inside an installed package, or the repository."""
    package = Path(__file__).parent
    installed = package / "programs"
    return installed if installed.is_dir() else package.parent


def commands() -> dict[str, Path]:
    """Name -> script. Those without a main part are modules that the scripts share."""
    scripts = sorted((programs() / "workflows").glob("*.py"))
    return {path.stem: path for path in scripts if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")}


def about() -> dict[str, str]:
    """Command -> the first line of its docstring. Nothing is imported for it."""
    return dict(sorted({**{name: _first_line(path) for name, path in commands().items()}, "serve": SERVE}.items()))


def usage() -> str:
    """What `lsemvae --help` prints."""
    width = max(map(len, sentences := about()))
    lines = [f"  {name:<{width}}  {sentence}" for name, sentence in sentences.items()]
    title = "LS-EMVAE: find pulmonary hypertension in an ECG. Research use only: not a medical device."
    return USAGE.format(shells="|".join(SHELLS), title=title, commands="\n".join(lines))


def versions() -> str:
    """Of this package, Python, torch, and Ray and MLflow where they are installed. Bug reports need it."""
    found = [f"lsemvae {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "ray", "mlflow"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def run(script: Path, words: list[str]) -> None:
    """Runs a script as Python would, with its folder first on the path, and `lsemvae NAME` in its help.

    Ray gives its workers the folder of `sys.argv[0]`, so this must be the script's. `runpy` would write the script's
    own name there, and would take `__main__` away at the end, which threads may still need.
    """
    sys.path[:0] = [str(script.parent)]
    sys.argv = [str(script.with_name(f"lsemvae {script.stem}")), *words]
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = str(script)
    exec(compile(script.read_bytes(), script, "exec"), module.__dict__)


def _serve(words: list[str]) -> NoReturn:
    """Becomes `serve run CONFIG …`, which finds the folder serve/ as a package. Replicas inherit the environment."""
    config = [] if words and not words[0].startswith("-") else [str(programs() / "serve" / "config.yaml")]
    environment = {"RAY_ADDRESS": "local"} | os.environ  # start a new Ray unless the user names a cluster
    environment["PYTHONPATH"] = os.pathsep.join([str(programs()), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ray.serve.scripts", "run", *config, *words]
    os.execve(sys.executable, command, environment)


def _print_completion(words: list[str]) -> None:
    if words not in [[shell] for shell in SHELLS]:
        _exit(f"--print-completion {' '.join(words)}: give one of {', '.join(SHELLS)}")
    _require("--print-completion")
    sys.path[:0] = [str(programs() / "workflows")]
    print(import_module("completion").completion(words[0], commands(), about()), end="")


def _first_line(script: Path) -> str:
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def _require(command: str) -> None:
    """Ends with one line that says which extras to install, where a library of one is absent."""
    extras = NEEDS.get(command, ("train",))
    if lacking := missing(extras):
        shown = ", ".join(lacking[:3]) + (" …" if len(lacking) > 3 else "")
        _exit(f"lsemvae {command} needs {shown}: pip install 'lsemvae[{','.join(extras)}]'")


def missing(extras: Iterable[str]) -> list[str]:
    """The distributions of these extras that are not installed, by this package's own metadata.

    A requirement there reads `ray[serve]<2.61,>=2.60; extra == "serve"`, or `lsemvae[explain]; extra == "serve"` for
    all that another extra has.
    """
    try:
        requirements = metadata.requires("lsemvae") or []
    except metadata.PackageNotFoundError:  # run from a repository that is not installed, such as the image's
        return []
    found: set[str] = set()
    for text in requirements:
        named = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", text)
        if not named or not any(f'extra == "{extra}"' in text.replace("'", '"') for extra in extras):
            continue
        name, inner = named.groups()
        if name == "lsemvae":
            found |= set(missing((inner or "").split(",")))
        elif not _is_installed(name):
            found.add(name)
    return sorted(found)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _exit(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2)
