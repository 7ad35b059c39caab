"""A disk that is really full: a small tmpfs, which the test mounts. It needs root."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096


@contextmanager
def small_disk(folder: Path, pages: int, files: int = 10_000) -> Iterator[Path]:
    """A file system of so many pages at `folder`; the test is skipped where it may not be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    options = _options(pages, files)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted, which needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def resize(folder: Path, pages: int, files: int = 10_000) -> None:
    subprocess.run(["mount", "-o", f"remount,{_options(pages, files)}", folder], check=True)


def _options(pages: int, files: int) -> str:
    return f"size={pages * PAGE},nr_inodes={files}"
