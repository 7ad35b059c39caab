"""Fixtures of the tests of infra."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Restore `os.environ` afterwards (workflows set defaults), and keep AWS and the home folder out of reach."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    os.environ.clear()
    os.environ.update(before)
