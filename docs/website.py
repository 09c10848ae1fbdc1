"""The documentation as a static site in build/site: `make docs`. Nothing is fetched, and every link is checked.

`python -m http.server -d build/site` shows it, with its search.

Pages are taken as they lie in the repository, so that their links hold; the reference is made of docstrings.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "site-pages"
SITE = ROOT / "build" / "site"
# Files that pages link to and that are no pages stand in the site as they are.
TAKEN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs", "recipes", "benchmarks")


def names() -> dict[str, str]:
    """Exported names, with the module of each, from the imports in gradsift/__init__.pyi."""
    tree = ast.parse((ROOT / "src/gradsift/__init__.pyi").read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    return {one.name: node.module for node in found for one in node.names if "gradsift" in (node.module or "")}


def reference() -> str:
    """A page with every exported name, functions first."""
    entries = sorted(names().items(), key=lambda entry: (entry[0][0].isupper(), entry[0].lower()))
    return "# From Python\n\n" + "\n\n".join(f"::: {module}.{name}" for name, module in entries) + "\n"


def navigation() -> list[dict[str, object]]:
    """The sections of docs/index.md with their pages, in its order."""
    found: list[dict[str, object]] = [{"gradsift": ["README.md", "docs/index.md"]}]
    for section in re.split(r"^## ", (ROOT / "docs/index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        pages = [os.path.normpath(f"docs/{page}") for page in re.findall(r"\]\(([\w./-]+\.md)\)", section)]
        title = section.partition("\n")[0]
        if title == "Decisions":
            pages = ["docs/decisions/index.md", *(f"docs/decisions/{page.name}" for page in decisions())]
        if pages:
            found.append({title: [*pages, *["docs/python.md"] * (title == "Reference")]})
    return found


def decisions() -> list[Path]:
    """The pages of docs/decisions in their order."""
    return sorted((ROOT / "docs/decisions").glob("0*.md"))


def titles() -> str:
    """A page with the title of each decision."""
    headings = ((page, page.read_text(encoding="utf-8").partition("\n")[0]) for page in decisions())
    return "# Decisions\n\n" + "".join(f"- [{heading.lstrip('# ')}]({page.name})\n" for page, heading in headings)


def build() -> None:
    """Gather the pages and build the site; what is wrong with a link ends it."""
    shutil.rmtree(PLACE, ignore_errors=True)
    for name in TAKEN:
        source, target = ROOT / name, PLACE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        skipped = shutil.ignore_patterns("*.py", "__pycache__")
        shutil.copytree(source, target, ignore=skipped) if source.is_dir() else shutil.copy(source, target)
    (PLACE / "docs/python.md").write_text(reference(), encoding="utf-8")
    (PLACE / "docs/decisions/index.md").write_text(titles(), encoding="utf-8")
    config = {
        "site_name": "gradsift",
        "docs_dir": str(PLACE),
        "site_dir": str(SITE),
        "use_directory_urls": False,
        "theme": {"name": "material", "font": False, "features": ["navigation.sections", "navigation.indexes"]},
        "plugins": [
            "search",
            {"mkdocstrings": {"handlers": {"python": {"paths": [str(ROOT / "src")], "options": {
                "show_source": False, "heading_level": 2, "docstring_section_style": "list", "show_root_heading": True,
                "show_root_full_path": False, "members_order": "source", "filters": ["!^_", "!^model_config$"],
                "show_signature_annotations": True, "separate_signature": True,
            }}}}},
        ],
        "markdown_extensions": ["tables", "admonition", "pymdownx.superfences", {"toc": {"permalink": True}}],
        "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "info"},
                       "nav": {"omitted_files": "ignore"}},
        "nav": navigation(),
    }  # fmt: skip
    path = ROOT / "build" / "mkdocs.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    calm = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(path)]
    subprocess.run(command, check=True, env=calm)
    print(f"{SITE.relative_to(ROOT)}/index.html, with {len(list(SITE.rglob('*.html')))} pages")


if __name__ == "__main__":
    build()
