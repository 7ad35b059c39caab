"""The files for people who cite, extend or package this project."""

import re
import tomllib

import yaml
from support.readme import README
from support.session import ROOT

import lsemvae
from lsemvae.bundle import FORMAT
from lsemvae.data.order import ORDER_VERSION
from lsemvae.data.shards import SCHEMA_VERSION
from lsemvae.preprocess import VERSION


def test_the_citation_is_the_readmes():
    """The fields that CFF 1.2.0 requires, and the paper as README.md cites it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == lsemvae.__version__
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    entry = " ".join(README.split("@article")[1].split("```")[0].split())
    assert f"title = {{{paper['title']}}}" in entry and f"year = {{{paper['year']}}}" in entry
    authors = re.search(r"author = \{(.*?)\}", entry)[1].split(" and ")
    assert authors == [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]


def test_the_changelog_has_the_versions_of_files():
    rows = re.findall(r"^\| [^|]*`(\w+)`[^|]*\|[^|]*\| (\d+) \|", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    found = {name: int(number) for name, number in rows}
    assert found == {
        "FORMAT": FORMAT,
        "VERSION": VERSION,
        "ORDER_VERSION": ORDER_VERSION,
        "SCHEMA_VERSION": SCHEMA_VERSION,
    }


def test_paths_and_links_of_the_documents_exist():
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        text = (ROOT / name).read_text()
        paths = re.findall(r"\]\((?!https?:)([^)#\s]+)\)", text)
        paths += re.findall(r"`((?:lsemvae|workflows|serve|tests|docs|infra)/[\w./]*)`", text)
        for path in paths:
            assert "NAME" in path or (ROOT / path).exists(), f"{name} names {path}"


def test_hooks_run_programs_of_the_development_environment_and_need_no_network():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    development = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        program = hook["entry"].split()[0]
        assert program.startswith(".venv/bin/")
        assert any(line.startswith(program.removeprefix(".venv/bin/")) for line in development)
