"""Writes the tables of options into docs/options.md: `python docs/options.py`; a test says if they are true."""

from __future__ import annotations

from pathlib import Path

from gradsift import options
from gradsift.cli import app

PAGE = Path(__file__).parent / "options.md"
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
        usual = max(entries.values(), key=list(entries.values()).count)
        lines += [
            f"### {panel}",
            "",
            f"Of {', '.join(f'`{name}`' for name in usual)}, where a row does not say others.",
            "",
        ]
        lines += ["| option | field | default | |", "|---|---|---|---|"]
        for (flags, field, default, said), names in entries.items():
            lines.append(f"| {flags} | {field} | {default} | {_taken(names, usual)}{said} |")
        lines.append("")
    return "\n".join(lines)


def _taken(names: list[str], usual: list[str]) -> str:
    """Who takes an option, where they are not the usual ones of its panel."""
    more, less = [n for n in names if n not in usual], [n for n in usual if n not in names]
    if not more and not less:
        return ""
    if len(more) + len(less) < len(names):
        said = [f"also {', '.join(more)}"] * bool(more) + [f"not {', '.join(less)}"] * bool(less)
        return f"*{'; '.join(said)}.* "
    return f"*{', '.join(names)}.* "


def page() -> str:
    """The page with the tables as they are now."""
    return f"{PAGE.read_text(encoding='utf-8').partition(BEGIN)[0]}{BEGIN}\n\n{tables()}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
