"""The package as people install it: the wheel, the sdist, the core without extras, and the command `lsemvae`."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import command
import completion
import numpy as np
import pytest
from support import bundles, wfdb_files
from support.bare import CORE, HEAVY, PROJECT, bare_environment
from support.dicom_files import dicom_bytes, group
from support.readme import blocks
from support.session import ROOT

import lsemvae
from lsemvae import cli
from lsemvae.bundle import Scorer
from lsemvae.leads import LEADS

EXTRAS = PROJECT["optional-dependencies"]
SOURCE = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "lsemvae", "workflows", "serve", "tests")


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(*command: object, cwd: Path, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that pip builds from it, by the build backend that is installed here."""
    place = tmp_path_factory.mktemp("built")
    (source := place / "source").mkdir()
    for name in SOURCE:
        (source / name).symlink_to(ROOT / name)
    backend = "from setuptools import build_meta; build_meta.build_sdist('../dist')"
    succeed(sys.executable, "-c", backend, cwd=source)
    (sdist,) = (place / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", place / "dist")
    succeed(sys.executable, "-m", "pip", "wheel", *options, unpacked, cwd=place)
    (wheel,) = (place / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has the wheel and the core's dependencies, and nothing of the extras."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    python = bare_environment(folder, *CORE)
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile")
    succeed(sys.executable, "-m", "pip", "--python", python, "install", *options, built[1], cwd=folder)
    return python.parent


def test_the_wheel_holds_the_library_and_the_programs_and_nothing_else(built):
    with ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = set()
    for folder, inside in (("lsemvae", ""), ("workflows", "lsemvae/programs/"), ("serve", "lsemvae/programs/")):
        paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        wanted |= {inside + str(path.relative_to(ROOT)) for path in paths}
    assert names == wanted
    assert {"lsemvae/py.typed", "lsemvae/recipes.py", "lsemvae/programs/serve/page/index.html"} <= names


def test_the_sdist_has_no_tests_and_both_pass_twine(built):
    with tarfile.open(built[0]) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert {"lsemvae", "workflows", "serve", "pyproject.toml", "README.md", "LICENSE"} <= tops
    assert "tests" not in tops
    said = succeed(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=built[0].parent)
    assert said.count("PASSED") == 2


def test_every_import_belongs_to_a_dependency_or_an_extra_that_the_program_needs():
    """The distributions of all modules that lsemvae, workflows and serve import are named in pyproject.toml."""
    distributions = metadata.packages_distributions()
    own = {"lsemvae", "serve", *(path.stem for path in (ROOT / "workflows").iterdir())} | set(sys.stdlib_module_names)

    def named(*extras: str) -> set[str]:
        lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
        return {re.match(r"[\w-]+", line)[0].lower() for line in lines}

    def unnamed(paths: list[Path], *extras: str) -> set[str]:
        modules = set()
        for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
        have = named(*extras)
        return {m for m in modules - own if not {d.lower() for d in distributions.get(m, [m])} & have}

    assert unnamed(sorted((ROOT / "workflows").glob("*.py")), "train") == set()
    assert unnamed(sorted((ROOT / "serve").rglob("*.py")), "serve") <= {"starlette"}  # FastAPI's own foundation
    # Triton comes with torch's builds for GPUs.
    assert unnamed(sorted((ROOT / "lsemvae").rglob("*.py")), "train", "explain", "formats") <= {"triton"}
    assert set(cli.NEEDS.values()) | {("train",)} >= {("serve",), ("all",)}
    assert {extra for extras in cli.NEEDS.values() for extra in extras} <= EXTRAS.keys()


def test_the_core_reads_preprocesses_and_scores_without_any_extra(installed, tmp_path):
    listed = f"import importlib.util as u; print([n for n in {HEAVY!r} if u.find_spec(n)])"
    assert succeed(installed / "python", "-I", "-c", listed, cwd=tmp_path).strip() == "[]"
    (record,) = bundles.records(1)
    counts = {lead: np.round(record.signal_for([lead])[0] * 200) for lead in LEADS}
    for name, content in wfdb_files.record_files(counts).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "e.dcm").write_bytes(dicom_bytes(group(counts)))
    table = np.stack([counts[lead] / 200 for lead in LEADS], axis=1)
    np.savetxt(
        tmp_path / "e.csv", table, "%.3f", ",", header=f"# rate_hz: 500\n# unit: mV\n{','.join(LEADS)}", comments=""
    )
    (tmp_path / "packed.hea").write_bytes(wfdb_files.header(["I", "II"], file="packed.dat", layout="212"))
    (tmp_path / "packed.dat").write_bytes(bytes(60))
    bundles.save(tmp_path / "bundle")
    (readme,) = blocks("py")
    program = """
import json, sys
import lsemvae
assert not {"numpy", "torch", "scipy"} & sys.modules.keys(), "importing it is not cheap"
assert lsemvae.__file__.startswith(sys.prefix)
from lsemvae import LEADS, LsemvaeError, Record, Score, Scorer, formats, preprocess
record = formats.read("r.hea")
assert isinstance(record, Record) and record.leads == LEADS
x = preprocess.preprocess([record], LEADS, preprocess.PreprocessConfig())
assert x.x_BLT.shape == (1, 12, 5000)
scorer = Scorer("bundle")
scorer.check_example()
answers = [scorer.score_file(name) for name in ("r.hea", "e.dcm", "e.csv")]
answers += scorer.score_signals([record.signal_for(scorer.bundle.leads)], [500.0])
assert all(isinstance(answer, Score) for answer in answers)
try:
    formats.read("packed.hea")
except LsemvaeError as error:
    said = str(error)
exec(sys.argv[1])
assert x.x_BLT.shape == (1, 6, 5000) and answer.score == answers[0].score
print(json.dumps([[answer.score for answer in answers], said]))
"""
    code = readme.replace("recording.hea", "r.hea")
    said = succeed(installed / "python", "-I", "-c", program, code, cwd=tmp_path)
    scores, problem = json.loads(said.splitlines()[-1])
    expected = [Scorer(tmp_path / "bundle").score_file(tmp_path / name).score for name in ("r.hea", "e.dcm", "e.csv")]
    assert scores == pytest.approx([*expected, expected[0]], abs=1e-6)
    assert "needs pip install 'lsemvae[formats]'" in problem


def test_the_console_command_without_extras_says_which_to_install(installed, tmp_path):
    console = installed / "lsemvae"
    shown = succeed(console, "--help", cwd=tmp_path)
    for name in cli.about():
        assert re.search(rf"^  {name} +[A-Z]", shown, re.MULTILINE)
    version = succeed(console, "--version", cwd=tmp_path)
    assert f"lsemvae {lsemvae.__version__}, Python 3." in version and "torch" in version and "ray" not in version
    for words, extras in (
        (["ingest"], "train"),
        (["pretrain", "smoke", "--help"], "train"),
        (["explain"], "train,explain"),
        (["serve"], "serve"),
        (["demo"], "all"),
        (["--print-completion", "bash"], "train"),
    ):
        done = run(console, *words, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "", words
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: lsemvae ") and line.endswith(f": pip install 'lsemvae[{extras}]'")


def test_an_unknown_command_names_the_nearest(installed, tmp_path):
    done = run(installed / "lsemvae", "pretian", "paper", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command 'pretian': did you mean 'pretrain'?\n"
    done = run(installed / "lsemvae", "xyzzy", cwd=tmp_path)
    assert done.returncode == 2 and "choose one of adapt, bench" in done.stderr and len(done.stderr.splitlines()) == 1
    assert run(installed / "lsemvae", "--print-completion", "tcsh", cwd=tmp_path).returncode == 2


def test_a_wheel_runs_the_workflows(built, tmp_path):
    """With the libraries of this environment, and the wheel in place of the repository."""
    with ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path / "wheel")
    words = ("simulate", "--output", "cohort", "--subjects", "4")
    program = "from lsemvae.cli import main; main()"
    succeed(sys.executable, "-c", program, *words, cwd=tmp_path, PYTHONPATH=str(tmp_path / "wheel"))
    assert (tmp_path / "cohort" / "truth.json").exists()


def test_help_names_the_command_as_it_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["workflows/ingest.py"])
    assert command.program() == "workflows/ingest.py"
    monkeypatch.setattr(sys, "argv", ["/environment/lsemvae/programs/workflows/lsemvae pretrain paper", "--data", "x"])
    assert command.program() == "lsemvae pretrain paper"


def test_bash_completes_commands_recipes_options_and_choices(tmp_path):
    scripts = {name: path for name, path in cli.commands().items() if name in ("promote", "pretrain")}
    about = {"serve": cli.SERVE, **dict.fromkeys(scripts, "…")}
    (tmp_path / "complete.sh").write_text(completion.completion("bash", scripts, about))

    def completed(line: str) -> list[str]:
        program = f"""
source complete.sh
read -ra COMP_WORDS <<< "{line}x"
last=$(( ${{#COMP_WORDS[@]}} - 1 ))
COMP_WORDS[last]=${{COMP_WORDS[last]%x}}
COMP_CWORD=$last
_lsemvae
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        return succeed("bash", "-c", program, cwd=tmp_path).split()

    assert completed("lsemvae p") == ["pretrain", "promote"]
    assert completed("lsemvae pretrain sm") == ["small", "smoke"]
    assert completed("lsemvae promote --al") == ["--alias"]
    assert "--optim.learning-rate" in completed("lsemvae pretrain paper --optim.")
    assert completed("lsemvae pretrain paper --preprocess.scale ") == ["fixed", "record", "lead", "none"]
    assert completed("lsemvae promote --name ") == []  # bash then offers files
    for shell in ("zsh", "fish"):
        text = completion.completion(shell, {"promote": scripts["promote"]}, {"promote": "Promote a model."})
        assert "alias" in text and "promote" in text
