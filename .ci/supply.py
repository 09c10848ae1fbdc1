"""What gradsift is made of: a check of the installed versions against their pins, and a software bill of materials.

    python .ci/supply.py audit                    exit status 1 where something disagrees or is known to be vulnerable
    python .ci/supply.py sbom build/sbom.json     CycloneDX 1.6

`audit` compares every distribution of this environment with constraints.txt and the pins with pyproject.toml, runs
`pip check`, and asks osv.dev for known vulnerabilities. Where that database cannot be reached it says so, and the rest
still counts; `--offline` does not try.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OWN = "gradsift"
INSTALLERS = {"pip", "setuptools", "wheel"}
DATABASE = "https://api.osv.dev/v1/querybatch"


def pins() -> dict[str, str]:
    """Name → version of constraints.txt."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            name, _, version = text.partition("==")
            found[canonicalize_name(name)] = version.strip()
    return found


def direct() -> list[Requirement]:
    """What pyproject.toml asks for, with every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras for text in extra)]]


def installed() -> dict[str, metadata.Distribution]:
    """Distributions of this environment by name; of two with one name the one that is imported."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution)
    return found


def requirements(distribution: metadata.Distribution) -> list[Requirement]:
    """What a distribution needs here, without its extras."""
    wanted = [Requirement(text) for text in distribution.requires or []]
    return [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]


def disagreements(
    found: Mapping[str, str],
    pinned: Mapping[str, str],
    wanted: list[Requirement],
    exact: Mapping[str, str] | None = None,
) -> list[str]:
    """Sentences on what does not fit together.

    Args:
        found: installed versions by name.
        pinned: those of constraints.txt.
        wanted: direct requirements.
        exact: versions that an installed distribution asks for with `==` (CUDA's parts, by torch): pinned by it.
    """
    exact = exact or {}
    problems = []
    for name, version in sorted(found.items()):
        if name in INSTALLERS or name == OWN:
            continue
        public = str(Version(version).public)
        if name in pinned:
            if Version(pinned[name]) != Version(public):
                problems.append(f"{name} {version} is installed, constraints.txt says {pinned[name]}")
        elif exact.get(name) != public:
            problems.append(f"{name} {version} is installed, and constraints.txt has no line for it")
    for need in wanted:
        name = canonicalize_name(need.name)
        if name not in pinned:
            problems.append(f"{need.name} is a direct dependency, and constraints.txt has no line for it")
        elif not need.specifier.contains(pinned[name], prereleases=True):
            problems.append(f"constraints.txt has {name} {pinned[name]}, pyproject.toml wants {need.specifier}")
    return problems


def exact_by_others(distributions: Mapping[str, metadata.Distribution]) -> dict[str, str]:
    """Versions that installed distributions ask for with a single `==`."""
    found = {}
    for distribution in distributions.values():
        for need in requirements(distribution):
            version = _exactly(need.specifier)
            if version is not None:
                found[canonicalize_name(need.name)] = version
    return found


def _exactly(specifiers: SpecifierSet) -> str | None:
    versions = [one.version for one in specifiers if one.operator == "==" and "*" not in one.version]
    return versions[0] if len(versions) == 1 else None


def vulnerabilities(versions: Mapping[str, str], database: str = DATABASE) -> dict[str, list[str]]:
    """Names of known vulnerabilities by distribution.

    Raises:
        OSError: the database cannot be reached.
        ValueError: its answer is none.
    """
    names = sorted(versions)
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": versions[name]} for name in names]
    request = urllib.request.Request(
        database, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        results = json.loads(reply.read())["results"]
    if len(results) != len(names):
        raise ValueError(f"{len(results)} results for {len(names)} distributions")
    return {
        name: [entry["id"] for entry in result["vulns"]]
        for name, result in zip(names, results, strict=True)
        if result.get("vulns")
    }


def audit(*, offline: bool, database: str = DATABASE) -> int:
    """Print what was found; the exit status."""
    distributions = installed()
    versions = {name: distribution.version for name, distribution in distributions.items()}
    problems = disagreements(versions, pins(), direct(), exact_by_others(distributions))
    print(f"{len(versions)} distributions are installed, {len(pins())} pinned, {len(direct())} named by pyproject.toml")
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    if checked.returncode:
        problems += [line for line in (checked.stdout + checked.stderr).splitlines() if line.strip()]
    if offline:
        print("known vulnerabilities were not looked up (--offline)")
    else:
        others = {n: str(Version(v).public) for n, v in versions.items() if n != OWN}
        try:
            found = vulnerabilities(others, database)
        except (OSError, ValueError, KeyError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            print(f"NOT CHECKED for known vulnerabilities: {database} cannot be reached ({reason})")
        else:
            print(f"{len(others)} distributions looked up at {database}")
            problems += [f"{name} {others[name]} is vulnerable: {', '.join(ids)}" for name, ids in found.items()]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print("pins and environment disagree, or worse" if problems else "versions, pins and pyproject.toml agree")
    return 1 if problems else 0


def bill() -> dict[str, Any]:
    """The environment as CycloneDX 1.6: the same environment gives the same bill, byte for byte."""
    distributions = {name: entry for name, entry in installed().items() if name != OWN}
    references = {name: f"pkg:pypi/{name}@{entry.version}" for name, entry in distributions.items()}
    components = [_component(name, entry, references[name]) for name, entry in sorted(distributions.items())]
    dependencies = []
    for name, distribution in sorted(distributions.items()):
        needed = {canonicalize_name(need.name) for need in requirements(distribution)}
        dependencies.append(
            {"ref": references[name], "dependsOn": sorted(references[n] for n in needed if n in references)}
        )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = {
        "type": "application",
        "bom-ref": OWN,
        "name": OWN,
        "version": project["version"],
        "description": project["description"],
        "licenses": [{"license": {"id": project["license"]}}],
    }
    model = _demo_model()
    needed = {canonicalize_name(need.name) for need in direct()}
    dependencies.insert(0, {"ref": OWN, "dependsOn": sorted(references[name] for name in needed if name in references)})
    content: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": [*(entry for entry in components if entry["name"] != model["name"]), model],
        "dependencies": dependencies,
    }
    text = json.dumps(content, sort_keys=True)
    return {**content, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, text)}"}


def _component(name: str, distribution: metadata.Distribution, reference: str) -> dict[str, Any]:
    about = distribution.metadata
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "version": distribution.version,
        "purl": reference,
    }
    if about.get("Summary"):
        entry["description"] = about["Summary"]
    if about.get("License-Expression"):
        entry["licenses"] = [{"expression": about["License-Expression"]}]
    else:
        kinds = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if "License ::" in line]
        short = (about.get("License") or "").strip()
        named = kinds or ([short] if short and len(short) < 80 and "\n" not in short else [])
        if named:
            entry["licenses"] = [{"license": {"name": text}} for text in named]
    return entry


def _demo_model() -> dict[str, Any]:
    """The model that `gradsift demo` fetches on its first run, with the hashes that it is compared with."""
    source = (ROOT / "src/gradsift/demo/model.py").read_text(encoding="utf-8")
    package, version = re.findall(r'^PACKAGE, VERSION = "(.+)", "(.+)"', source, re.MULTILINE)[0]
    wheel, file = (re.findall(rf'^_{part}_SHA256 = "(\w+)"', source, re.MULTILINE)[0] for part in ("WHEEL", "GGUF"))
    return {
        "type": "machine-learning-model",
        "bom-ref": f"pkg:pypi/{package}@{version}",
        "name": package,
        "version": version,
        "purl": f"pkg:pypi/{package}@{version}",
        "scope": "optional",
        "description": "SmolLM2-135M-Instruct, 4 bits; fetched by `gradsift demo` and compared with these hashes",
        "hashes": [{"alg": "SHA-256", "content": wheel}],
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "properties": [{"name": "gradsift:gguf_sha256", "value": file}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("audit")
    checking.add_argument("--offline", action="store_true", help="do not ask for known vulnerabilities")
    writing = commands.add_parser("sbom")
    writing.add_argument("path", type=Path)
    given = parser.parse_args()
    if given.command == "audit":
        sys.exit(audit(offline=given.offline))
    given.path.parent.mkdir(parents=True, exist_ok=True)
    content = bill()
    given.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{given.path}: {len(content['components'])} components")


if __name__ == "__main__":
    main()
