"""Parse the commands of README.md and docs/, and the files in infra/, as their own programs parse them."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro
import yaml

from support.session import ROOT

README = (ROOT / "README.md").read_text()


DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()


PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "infra" / "constraints.txt").read_text(), re.MULTILINE))


SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|AUTH_KEY")


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def docker_environment(cluster: dict) -> dict[str, str]:
    words = shlex.split(" ".join(cluster["docker"]["run_options"]))
    pairs = [words[i + 1] for i, word in enumerate(words) if word in ("--env", "-e")]
    return dict(pair.split("=", 1) for pair in pairs)


DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}


OTHER_PROGRAMS = {"export", ".", "mkdir", "openssl", "aws", "sqlite3", "pg_dump", "pg_restore", "kubectl"}
"""Programs of commands in the documents that are no part of this project and are not installed for its tests."""


def blocks(language: str, text: str = README) -> list[str]:
    """The content of the document's fenced blocks in this language; "" is those that name none."""
    return [content for name, content in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if name == language]


def shell_commands(document: str = README) -> list[str]:
    """The lines of its `sh` blocks, and commands in its text and in blocks of no language."""
    unnamed = re.findall(
        r"^(?:[A-Z_]+=\S+ )*python workflows/(?:[^\n]|(?<=\\)\n)*", "\n".join(blocks("", document)), re.M
    )
    text = "\n".join(blocks("sh", document) + unnamed).replace("\\\n", " ")
    text = re.sub(r"^.*<<'EOF'\n.*?^EOF$", "", text, flags=re.DOTALL | re.MULTILINE)  # a script to type in
    inline = re.findall(
        r"`((?:[A-Z_]+=\S+ )*(?:python|lsemvae|make|ray|serve) [^` ]+[ ][^`]+|make [^`]+)`",
        re.sub(r"^( *)```.*?^\1```", "", document, flags=re.DOTALL | re.MULTILINE),
    )
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines() + inline]
    return [line for line in dict.fromkeys(lines) if line and "…" not in line]


def click_context(command, words: list[str]):
    """Parse as `command words…` would, without running anything."""
    context = None
    while True:
        context = command.make_context(command.name, list(words), parent=context)
        if not hasattr(command, "commands"):
            return context
        words = [*context._protected_args, *context.args]
        _, command, words = command.resolve_command(context, words)


def parse_workflow(script: str, words: list[str]) -> object:
    """The result of parsing `python SCRIPT WORDS…`: the script runs up to its call of tyro or argparse."""

    class Parsed(Exception):
        pass

    def stop_after(parse: Callable) -> Callable:
        def stopped(*args: object, **kwargs: object) -> object:
            nonlocal parsing
            if parsing:  # tyro calls argparse
                return parse(*args, **kwargs)
            parsing = True
            raise Parsed(parse(*args, **kwargs))

        return stopped

    parsing = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", stop_after(tyro.cli))
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises((Parsed, SystemExit)) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    if caught.type is SystemExit:
        assert caught.value.code == 0 and "--help" in words, f"{script} does not take {words}"
        return None
    return caught.value.args[0]


def endpoint_paths() -> set[str]:
    """The paths that the endpoint answers."""
    from serve.api import make_api
    from serve.service import Service

    api = make_api(Service(registry=None, metrics=None))
    return {*api.openapi()["paths"], api.openapi_url}


def parse_command(words: list[str]) -> object:
    """Check a command against the program's own parser -> the arguments that a workflow would get, else None."""
    words = words[:-1] if words[-1] == "&" else words
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    match words:
        case ["python", "-m", "http.server", "--directory", "site"]:
            pass
        case ["python", script, *rest]:
            return parse_workflow(script, rest)
        case ["lsemvae", "serve" | "--help" | "--version" | "--print-completion", *_]:
            pass  # tests/infra/test_package.py runs them
        case ["lsemvae", name, *rest]:
            return parse_workflow(f"workflows/{name}.py", rest)
        case ["make", *rest]:
            done = subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            makefile = (ROOT / "Makefile").read_text()
            assert all(f"$({word.split('=')[0]})" in makefile for word in rest if "=" in word)
            for line in done.stdout.splitlines():
                if "workflows/" in line:
                    program, *call = shlex.split(line)
                    assert Path(program).name == "python"
                    parse_command(["python", *call])
        case ["ray", *rest]:
            from ray.scripts.scripts import cli

            parameters = click_context(cli, rest).params
            for name in ("cluster_config_file", "runtime_env", "working_dir"):
                assert (ROOT / (parameters.get(name) or "")).exists()
            if parameters.get("entrypoint"):
                return parse_command(list(parameters["entrypoint"]))
        case ["serve", *rest]:
            from ray.serve.scripts import cli

            assert (ROOT / click_context(cli, rest).params["config_or_import_path"]).is_file()
        case ["docker", "build", "--file", file, "--tag", _, "."]:
            assert (ROOT / file).is_file()
        case ["docker", "compose", "--file", file, *_]:
            assert (ROOT / file).is_file()
        case ["docker", "push", _]:
            pass
        case [program, *_] if program in OTHER_PROGRAMS:
            pass
        case ["curl", url, *_]:
            options = load("serve/config.yaml")["http_options"]
            prefix = f"http://{options['host']}:{options['port']}"
            assert url.startswith(prefix)
            assert url.removeprefix(prefix) in endpoint_paths()
        case _:
            pytest.fail(f"nothing here checks {words}")
    return None
