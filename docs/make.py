"""Generate the reference pages: `python docs/make.py`. A test checks that they are current."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

from inlaid.cli.main import app
from inlaid.config.reference import reference_page

REFERENCE = Path(__file__).parent / "reference"


EXITS = (
    "Every command has `--help`. On invalid input, a command prints one message and exits with code 2. After "
    "Ctrl-C, it exits with code 130."
)


def commands() -> str:
    """Return the page of commands, generated from their help."""
    group: Any = typer.main.get_command(app)
    out = [
        "# Commands",
        "",
        "Generated from `inlaid --help` by `python docs/make.py`; a test keeps it current.",
        "",
        *_paragraphs(group.help),
        EXITS,
        "",
    ]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = ["inlaid", name, *map(_written, arguments), *(["[OPTIONS]"] if options else [])]
        out += [f"## inlaid {name}", "", *_paragraphs(command.help), "```", " ".join(usage), "```", ""]
        rows = [(_written(p).strip("[].").replace("]...", ""), p) for p in arguments]
        rows += [(", ".join(p.opts), p) for p in options]
        if rows:
            out += ["| argument or option | default | meaning |", "|---|---|---|"]
            out += [
                f"| `{left.replace('|', chr(92) + '|')}` | {_default(p)} | {_line(p.help)} |"
                for left, p in rows
            ]
            out.append("")
    return "\n".join(out)


def _paragraphs(text: str | None) -> list[str]:
    return [line for part in inspect.cleandoc(text or "").split("\n\n") for line in (_line(part), "")]


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "/")


def _written(argument: Any) -> str:
    """Return an argument in usage notation, such as `RUN` or `[PROMPT]...`."""
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]" + "..." * (argument.nargs != 1)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value, said = parameter.default, "Default" in (parameter.help or "")
    return "" if value is None or value is False or said else f"`{value}`"


PAGES = {"config.md": reference_page, "cli.md": commands}


if __name__ == "__main__":
    for page, text in PAGES.items():
        (REFERENCE / page).write_text(text(), "utf-8")
