"""How the tests are built: what they share is in tests/support and in conftest.py, never in another test file."""

import ast
import os
import signal
import sys
from pathlib import Path

import pytest
from support.session import ROOT, workflow

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
TEST_FILES = {path.stem for path in FILES if path.name.startswith("test_")} | {"conftest"}


def imported(path: Path) -> set[str]:
    """Every part of every name that the file imports: `from support.faults import Fault` gives all three."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in [*modules, *(alias.name for alias in node.names)]:
                found |= set(name.split("."))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_a_test_file(path: Path):
    assert not imported(path) & TEST_FILES


def test_an_import_of_a_test_file_would_be_found(tmp_path: Path):
    for line in (
        "import test_api",
        "from tests.serve import test_api",
        "from serve.test_api import ask",
        "import conftest",
    ):
        (tmp_path / "x.py").write_text(line)
        assert imported(tmp_path / "x.py") & TEST_FILES, line


def test_a_workflow_here_is_one_in_a_process_of_its_own(tmp_path: Path):
    """The same status and the same words, and nothing of this process is changed."""
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "x").touch()
    words = ("simulate", "--output", tmp_path / "cohort", "--subjects", 2)
    before = dict(os.environ), list(sys.argv), signal.getsignal(signal.SIGINT), Path.cwd(), sys.stdout
    here = workflow(*words, check=False)
    assert (dict(os.environ), sys.argv, signal.getsignal(signal.SIGINT), Path.cwd(), sys.stdout) == before
    alone = workflow(*words, check=False, alone=True)
    assert (here.returncode, here.stdout, here.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert here.returncode == 2 and here.stderr.startswith("error: ")
