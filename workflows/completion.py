"""Completion of `lsemvae` in bash, zsh and fish: the commands, their recipes, options, and the options' choices.

`lsemvae --print-completion SHELL` prints a script that starts no Python while the user types.
"""

import argparse
import runpy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import command
import tyro

BASH = """\
_lsemvae() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if (( COMP_CWORD == 1 )); then
        words="{commands} --help --version --print-completion"
    elif (( COMP_CWORD == 2 )) && [[ $before == --print-completion ]]; then
        words="bash zsh fish"
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
        esac
        if [[ $current == -* ]]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        elif (( COMP_CWORD == 2 )); then
            case "${{COMP_WORDS[1]}}" in
{first}
            esac
        fi
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F _lsemvae lsemvae
"""

ZSH = """\
#compdef lsemvae
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


@dataclass
class Completion:
    """What may follow a command: first words, and option -> its choices, none where any value may be given."""

    first: list[str] = field(default_factory=list)
    options: dict[str, list[str]] = field(default_factory=dict)

    def add(self, parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if not action.option_strings:
                self.first += [str(choice) for choice in action.choices or []]
            self.options |= {name: list(action.choices or []) for name in action.option_strings if name != "-h"}
        self.options["--help-all"] = []


def completion(shell: str, scripts: Mapping[str, Path], about: Mapping[str, str]) -> str:
    """The script for one shell; `about` has a sentence for every command, those without a script included."""
    found = {name: Completion() for name in about} | {name: collect(path) for name, path in scripts.items()}
    if shell == "fish":
        return _fish(found, about)
    choices = [
        f'            "{name} {option}") words="{" ".join(values)}" ;;'
        for name, words in found.items()
        for option, values in words.options.items()
        if values
    ]
    text = BASH.format(
        commands=" ".join(found),
        choices="\n".join(choices),
        options="\n".join(
            f'                {n}) words="{" ".join(w.options or ["--help"])}" ;;' for n, w in found.items()
        ),
        first="\n".join(f'                {n}) words="{" ".join(w.first)}" ;;' for n, w in found.items() if w.first),
    )
    return (ZSH if shell == "zsh" else "") + text


def collect(script: Path) -> Completion:
    """Runs a script up to its call of `run_command` or `run_recipe_command`, and notes what it would parse."""
    found = Completion()

    def note(main: Any, args_type: type, default: Any = None) -> None:
        found.add(_parser(args_type, default))

    def note_recipes(main: Any, args_type: type, recipes: Mapping[str, Any], **fixed: Any) -> None:
        found.first = list(recipes)
        for recipe in recipes.values():  # a recipe's options depend on its architecture
            found.add(_parser(args_type, args_type(recipe=recipe, **{"data": tyro.MISSING, **fixed})))

    if "from command import" in script.read_text(encoding="utf-8"):
        before = command.run_command, command.run_recipe_command
        command.run_command, command.run_recipe_command = note, note_recipes  # type: ignore[assignment]
        try:
            runpy.run_path(str(script), run_name="__main__")
        except ModuleNotFoundError:  # its extra is not installed
            pass
        finally:
            command.run_command, command.run_recipe_command = before
    return found


def _parser(args_type: type, default: Any) -> argparse.ArgumentParser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro itself has nothing in its place
        return tyro.extras.get_parser(args_type, default=default)


def _fish(found: Mapping[str, Completion], about: Mapping[str, str]) -> str:
    lines = ["complete -c lsemvae -n __fish_use_subcommand -f -l version", "complete -c lsemvae -f -l help"]
    lines += ["complete -c lsemvae -n __fish_use_subcommand -x -l print-completion -a 'bash zsh fish'"]
    for name, words in found.items():
        sentence = about[name].replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c lsemvae -n __fish_use_subcommand -f -a {name} -d '{sentence}'")
        within = f"complete -c lsemvae -n '__fish_seen_subcommand_from {name}'"
        if words.first:
            lines.append(f"{within[:-1]}; and test (count (commandline -opc)) -eq 2' -a '{' '.join(words.first)}'")
        for option, values in words.options.items():
            lines.append(f"{within} -l {option.lstrip('-')}" + (f" -x -a '{' '.join(values)}'" if values else ""))
    return "\n".join(lines) + "\n"
