"""What MkDocs does beside its own work: pages of the repository's files, tables of recipes, equations as MathML."""

import html
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
TOP_PAGES = {name: name.lower() for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")} | {
    "README.md": "overview.md"  # MkDocs would take a README.md for the first page
}
"""Files beside docs/ -> the pages of the site that they are."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".sh": "sh"}
RECIPES = "<!-- recipes -->"

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
_NAMED = re.compile(r"(\S.*?) {2,}(\S.*)")
_MATH = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages beside docs/, and a page with the text of each file that a page links to."""
    for name, page in TOP_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    waiting = {path for file in files.documentation_pages() for path in _linked_files(file)}
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        files.append(File.generated(config, _source_page(path), content=_shown(path)))
        if (ROOT / path).is_dir():
            waiting |= {f"{path}/{name}" for name in _names(path)} - done
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to the repository's files at their pages, and write the tables of recipes."""
    here = page.file.src_uri
    if RECIPES in markdown:
        markdown = markdown.replace(RECIPES, _recipe_tables())
    if here.startswith("source/"):
        return markdown

    def mended(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        path, _, anchor = link.partition("#")
        target = _repository_path(here, path)
        if target is None:
            return match[0]
        page_there = _page_of(target)
        link = posixpath.relpath(page_there, posixpath.dirname(here) or ".")
        return f"{before}{link}{'#' + anchor if anchor else ''}{after}"

    return _outside_fences(markdown, lambda text: _LINK.sub(mended, text))


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations become MathML, which browsers draw without a script; columns of a docstring become a list."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "[" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    html_text = _MATH.sub(drawn, html_text)
    return _PARAGRAPH.sub(_as_list, html_text) if page.file.src_uri.startswith("api/") else html_text


def _as_list(match: re.Match[str]) -> str:
    """A paragraph of lines `name   what it is`, as docstrings have them -> a list of definitions; else as it was."""
    items: list[list[str]] = []
    for line in match[1].splitlines():
        if named := _NAMED.fullmatch(line):
            items.append([*named.groups()])
        elif not items:
            return match[0]
        else:
            items[-1][1] += f" {line.strip()}"
    if len(items) < 2:
        return match[0]
    return "<dl>" + "".join(f"<dt><code>{name}</code></dt><dd>{text}</dd>" for name, text in items) + "</dl>"


def _outside_fences(markdown: str, change: Any) -> str:
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def _linked_files(file: File) -> Iterator[str]:
    """The repository's files and folders, as paths from its root, that a page links to and that are no pages."""
    for _, link, _ in _LINK.findall(_FENCE.sub("", file.content_string)):
        path = _repository_path(file.src_uri, link.partition("#")[0])
        if path is not None and _page_of(path).startswith("source/"):
            yield path


def _repository_path(page: str, link: str) -> str | None:
    """Where a page's relative link leads, from the repository's root; None for other links and for what is absent."""
    if not link or ":" in link or link.startswith("/"):
        return None
    folder = "" if page in TOP_PAGES.values() else f"docs/{posixpath.dirname(page)}"
    path = posixpath.normpath(posixpath.join(folder, link))
    return path if (ROOT / path).exists() and not path.startswith("..") else None


def _page_of(path: str) -> str:
    """A path from the repository's root -> the site's file that shows it."""
    if path in TOP_PAGES:
        return TOP_PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else _source_page(path)


def _source_page(path: str) -> str:
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def _names(folder: str) -> list[str]:
    names = (entry.name for entry in os.scandir(ROOT / folder) if entry.is_file() and not entry.name.startswith("."))
    return sorted(name for name in names if not name.endswith(".pyc"))


def _shown(path: str) -> str:
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if (ROOT / path).is_dir():
        return head + "\n".join(f"- [{name}]({name}.md)" for name in _names(path)) + "\n"
    text = (ROOT / path).read_text()
    return f"{head}~~~~~~ {LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n~~~~~~\n"


def _recipe_tables() -> str:
    """Every named recipe with every setting, from `lsemvae.recipes`; the compared methods are those of README.md."""
    from lsemvae.recipes import COMPARED, FINETUNE, PRETRAIN

    own = {name: recipe for name, recipe in PRETRAIN.items() if name not in COMPARED}
    return f"## Pre-training: every setting\n\n{_table(own)}\n\n## Fine-tuning: every setting\n\n{_table(FINETUNE)}\n"


def _table(recipes: dict[str, Any]) -> str:
    columns = {name: dict(_settings(recipe)) for name, recipe in recipes.items()}
    settings = list(dict.fromkeys(setting for column in columns.values() for setting in column))
    lines = [f"| option | {' | '.join(f'`{name}`' for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for setting in settings:
        option = "--" + setting.replace("_", "-")
        lines.append(f"| `{option}` | {' | '.join(column.get(setting, '') for column in columns.values())} |")
    return "\n".join(lines)


def _settings(recipe: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The recipe's fields as the command line names them -> their values as one types them."""
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if is_dataclass(value):
            yield from _settings(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple):
            yield prefix + field.name, " ".join(map(str, value)) or "none"
        else:
            yield prefix + field.name, f"{value:g}" if isinstance(value, float) else str(value)
