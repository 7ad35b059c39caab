"""How the tests are built: what they share is in tests/support and in conftest.py, never in another test file."""

import ast
from pathlib import Path

import pytest
from support.session import ROOT

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
