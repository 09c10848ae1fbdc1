"""Writes the tables of options into docs/command-line.md: `python docs/options.py`; a test says if they are true."""

from __future__ import annotations

from pathlib import Path

from gradsift import options
from gradsift.cli import app

PAGE = Path(__file__).parent / "command-line.md"
BEGIN = "<!-- made by docs/options.py -->"


def tables() -> str:
    """Every option by panel, with the field of a recipe that it fills, its default and the commands that take it."""
    rows: dict[str, dict[tuple[str, str, str, str], list[str]]] = {}
    for name, command in app.commands.items():
        for option in command.options:
            default = options.default_of(option)
            shown = "" if default in (None, False, "", ()) or option.form in ("flag", "switch") else f"`{default}`"
            said = options.help_for(option).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
            flags = " ".join(f"`{flag}`" for flag in (f"--{option.name}", *option.short))
            field = f"`{option.field}`" if option.field else ""
            rows.setdefault(option.panel, {}).setdefault((flags, field, shown, said), []).append(name)
    lines = []
    for panel, entries in rows.items():
        lines += [f"### {panel}", "", "| option | field | default | | commands |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(entry)} | {', '.join(names)} |" for entry, names in entries.items()]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The page with the tables as they are now."""
    return f"{PAGE.read_text(encoding='utf-8').partition(BEGIN)[0]}{BEGIN}\n\n{tables()}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
