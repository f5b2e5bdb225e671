"""The page of the command line, from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import typer.main

from tmm.cli import app

_INTRODUCTION = """\
# Command line

`RUN` is an id, the beginning of one, a name or a path. `--root`, or the environment variable `TMM_ROOT`, says
where runs lie; without either it is `runs`. What is not found exits with 1. Commands that only read import no
torch and answer in well under a second.

Every command has `--help`. This page is made from what it says.
"""


def page() -> str:
    """The whole page."""
    command = typer.main.get_command(app)
    lines = [_INTRODUCTION]
    lines += ["| command | |", "|---|---|"]
    for path, found in commands(command):
        anchor = "-".join(path.split())
        lines.append(f"| [`{path}`](#{anchor}) | {_sentence(found.help)} |")
    lines.append("")
    for path, found in commands(command):
        lines += [f"## {path}", ""]
        if (same := re.match(r"The same as: (tmm .*)\.$", found.help or "")) is not None:
            lines += [f"The same as [`{same[1]}`](#{'-'.join(same[1].split())}).", ""]
            continue
        lines += [_text(found.help), "", *_table(path, found)]
    return "\n".join(lines).rstrip() + "\n"


def commands(group: click.Command, path: str = "tmm") -> Iterator[tuple[str, click.Command]]:
    """Each command that does something, with what is typed for it."""
    if not hasattr(group, "commands"):
        yield path, group
        return
    for name, command in sorted(group.commands.items()):
        yield from commands(command, f"{path} {name}")


def _table(path: str, command: click.Command) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    names = (_metavar(one) for one in arguments)
    usage = " ".join(
        [path, *(n if one.required else f"[{n}]" for n, one in zip(names, arguments, strict=True))]
    )
    yield from (f"Usage: `{usage}{' [OPTIONS]' if options else ''}`", "")
    if arguments or options:
        yield from ("| | | default |", "|---|---|---|")
    for one in (*arguments, *options):
        spelled = _metavar(one) if one in arguments else ", ".join((*one.opts, *one.secondary_opts))
        default = one.default if not callable(one.default) else None
        shown = "" if _is_nothing(default) else f"`{default}`"
        help_text = _text(getattr(one, "help", "")).replace("|", "\\|")
        yield f"| `{spelled}` | {help_text} | {shown} |"
    yield ""


def _is_nothing(default: object) -> bool:
    return default in (None, False, "", (), []) or "UNSET" in repr(default)


def _metavar(argument: click.Parameter) -> str:
    name = (argument.metavar or argument.name or "").upper().rstrip(".")
    return f"{name} ..." if argument.nargs < 0 else name


def _sentence(text: str | None) -> str:
    """The first sentence of a help text."""
    return re.split(r"(?<=[.])\s", _text(text).replace("\n", " "), maxsplit=1)[0]


def _text(text: str | None) -> str:
    lines = (
        line.strip() for line in (text or "").replace("``", "`").replace("\\[", "[").splitlines()
    )
    return " ".join(" ".join(lines).split())
