"""The documents and the site that is made of them: links, commands, recipes, equations, and no request to elsewhere."""

import functools
import http.server
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from support.browser import browsing
from support.readme import DOCUMENTS, PINS, README, parse_command, shell_commands
from support.session import ROOT

from lsemvae.recipes import FINETUNE, PRETRAIN

COMMANDS = {line: name for name, text in DOCUMENTS.items() for line in shell_commands(text)}


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: f"{Path(COMMANDS[line]).stem}: {' '.join(line.split())}")
def test_command_is_understood(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parse_command(shlex.split(line))


def test_every_kind_of_command_is_found() -> None:
    """In a block of its own, after the words of a line, over two lines, and in a block of no language."""
    text = (
        "```sh\nA=1 python workflows/score.py --model m \\\n  --output o\n# a comment\n```\n"
        "Run `make docs`, and `python workflows/promote.py --name x`.\n\n"
        "```\npython workflows/bench.py model\n1.0 s\n```\n"
    )
    assert [" ".join(line.split()) for line in shell_commands(text)] == [
        "A=1 python workflows/score.py --model m --output o",
        "python workflows/bench.py model",
        "make docs",
        "python workflows/promote.py --name x",
    ]
    with pytest.raises(pytest.fail.Exception, match="nothing here checks"):
        parse_command(["rm", "-r", "shards"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: strictly, so that a dead link or anchor ends the build."""
    folder = tmp_path_factory.mktemp("site")
    line = re.search(r"^docs:.*\n\t\$\(RUN\)/(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    program, *words = shlex.split(line)
    assert program == "mkdocs" and "--strict" in words
    command = [Path(sys.executable).with_name(program), *words, "--site-dir", folder]
    # Without a network: a proxy that does not exist would make any download fail.
    environment = {"PATH": str(Path(sys.executable).parent), "https_proxy": "http://127.0.0.1:9", "HOME": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Parts(HTMLParser):
    """What a page refers to, the anchors that it has, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.equations = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.ids |= {named[name] for name in ("id", "name") if name in named}
        self.equations += tag == "math"
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in named:
            self.loaded.append(named["src"])
        elif tag == "link" and named.get("rel") in ("stylesheet", "icon", "preconnect", "prefetch"):
            self.loaded.append(named["href"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Parts]:
    return {path: Parts(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[Path, Parts]) -> None:
    dead, checked = [], 0
    for path, parts in pages.items():
        for link in parts.links:
            address, anchor = urldefrag(urljoin(path.as_uri(), link))
            if urlsplit(address).scheme != "file":
                continue
            target, checked = Path(unquote(urlsplit(address).path)), checked + 1
            if not target.is_file() or (anchor and target in pages and unquote(anchor) not in pages[target].ids):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead
    assert checked > 1000


def test_no_page_loads_anything_from_elsewhere(pages: dict[Path, Parts]) -> None:
    assert not [name for parts in pages.values() for name in parts.loaded if urlsplit(name).scheme]


def test_equations_are_mathml(site: Path, pages: dict[Path, Parts]) -> None:
    source = DOCUMENTS["docs/method.md"]
    displayed = source.count("$$") // 2
    assert displayed >= 7
    page = site / "method.html"
    assert pages[page].equations == displayed + len(re.findall(r"\$[^$]+\$", source.replace("$$", "")))
    assert "$" not in re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)


def test_pages_of_files_have_their_text(site: Path) -> None:
    """A link to a file of the repository shows that file, and a link to a folder its files."""
    assert "cluster_name" in (site / "source" / "ray_cluster.yaml.html").read_text()
    assert "aspire.py.html" in (site / "source" / "lsemvae" / "cohorts" / "index.html").read_text()


def test_recipes_page_has_every_setting_of_every_recipe(site: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", (site / "recipes.html").read_text())
    assert "&lt;!--" not in text
    words = set(text.split())
    assert set(FINETUNE) | {"paper", "released", "eight-gpus", "minutes", "cpu", "small", "smoke"} <= words
    for option in ("--optim.learning-rate", "--model.latent", "--preprocess.scale", "--kl-warmup-epochs", "--features"):
        assert option in words
    rows = (site / "recipes.html").read_text().split("<tr>\n")
    row = next(row for row in rows if row.startswith("<td><code>--model.latent<"))
    assert re.findall(r"<td>(\d+)</td>", row) == [
        str(PRETRAIN[name].model.latent)
        for name in ("paper", "released", "eight-gpus", "minutes", "cpu", "small", "smoke")
    ]


def test_every_documented_module_is_in_the_reference(site: Path) -> None:
    named = {name for text in DOCUMENTS.values() for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    assert {"lsemvae.formats", "lsemvae.preprocess", "lsemvae.bundle", "lsemvae.record"} <= named
    text = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    for name in ("lsemvae.formats.read", "lsemvae.bundle.Scorer.score", "lsemvae.models.lsemvae.LSEMVAEConfig.gamma"):
        assert f'id="{name}"' in text
    assert "<dt><code>focal_gamma</code></dt><dd>focusing of the focal loss" in text  # the columns of a docstring
    assert not [name for name in named if f'id="{name}"' not in text]


def test_tools_have_pins_and_are_no_dependency_of_users() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = [re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["docs"]]
    assert {"mkdocs-material", "mkdocstrings-python", "latex2mathml"} <= set(tools) <= PINS.keys()
    assert "docs" in re.search(r"lsemvae\[(.*)\]", project["optional-dependencies"]["dev"][0])[1].split(",")
    assert not [line for line in project["dependencies"] if line.startswith("mk")]


def test_readme_names_the_site() -> None:
    assert "make docs" in README and "(docs/index.md)" in README


def test_reliability_has_every_fault_once_and_names_tests_that_exist() -> None:
    text = DOCUMENTS["docs/reliability.md"]
    faults = re.findall(r"^\*\*(\d+)\. .*$", text, re.MULTILINE)
    assert faults == [str(number) for number in range(1, 43)]
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    assert len(named) > 80 and text.count("tests/") >= len(named)
    assert not [
        f"{path}::{test}"
        for path, test in named
        if not (ROOT / path).is_file() or not re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE)
    ]
    paragraphs = re.findall(r"^\*\*\d+\. .*$", text, re.MULTILINE)
    assert not [text[:40] for text in paragraphs if "::test_" not in text and "Not injected" not in text]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.server
def test_pages_in_a_browser_stay_here_and_fit_a_phone(url: str, site: Path, tmp_path: Path) -> None:
    """No page scrolls sideways, the search answers, and every request goes to the site's own address."""
    own = [f"{path.relative_to(site)}" for path in site.rglob("*.html") if "source" not in path.parts]
    with browsing(tmp_path) as browser:
        browser.size(390)
        for page in sorted(own):
            browser.open(url + page, "document.querySelector('article h1, .md-content')")
            assert browser.run("document.documentElement.scrollWidth") <= 390, page
        browser.size(1200)
        browser.open(url + "index.html?q=wedge+pressure", "document.querySelector('.md-search-result__link')")
        assert "labels.html" in browser.run("document.querySelector('.md-search-result__list').innerHTML")
        assert browser.requested and all(address.startswith((url, "data:", "blob:")) for address in browser.requested)
        assert not browser.logged
