"""gradsift's numbers beside those of the published code of its methods.

    python benchmarks/conformance.py                         # compare, and write docs/conformance.md
    python benchmarks/conformance.py --check                 # compare; fail where a number or the page is off
    python benchmarks/conformance.py --setup less dattri     # virtual environments for some of the published codes
    python benchmarks/conformance.py --record less dattri --checkout less=~/LESS

Published code runs in an environment of its own under `.cache/peers/`, by a program in `conformance/programs` that
imports nothing of gradsift; inputs and outputs stay as `conformance/NAME.json`. Papers' code is no package: clone it,
and name the folder with `--checkout`. What has no environment or no checkout is left out and told.

gradsift is compared with the recorded numbers, so `tests/test_conformance.py` needs none of this. Each file of
`published/` is one published code: `compared` holds what must agree, `departures` what gradsift does otherwise on
purpose, with its effect on the same inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from published.alpaca_eval import AlpacaEval
from published.apricot import Apricot
from published.base import Published
from published.bergson import Bergson
from published.compact import Compact
from published.datainf import DataInf
from published.dattri import Dattri
from published.dsir import Dsir
from published.kronfluence import Kronfluence
from published.less import Less
from published.lm_eval import LmEval
from published.nice import Nice
from published.rank_bm25 import RankBm25
from published.tsds import Tsds

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conformance.md"

CODES: tuple[type[Published], ...] = (
    Less, DataInf, Nice, Compact, Apricot, RankBm25, Dsir, Tsds, AlpacaEval, Dattri, Kronfluence, Bergson, LmEval,
)  # fmt: skip

HEAD = """# Agreement with published code

Most of gradsift's methods have published code, of a paper or in a package. It was run on small inputs, and the tests
compare gradsift's numbers on the same inputs with what it gave ([benchmarks/conformance](../benchmarks/conformance)).
`python benchmarks/conformance.py` makes this page; its `--help` says how the published code is run again, and
[benchmarks/published](../benchmarks/published) which of its functions.

**Difference** is the largest one between two numbers, relative to the largest number compared, or the share of choices
or token ids that differ; **rounding** is what is allowed for it. Measured 2026-11-28 on a CPU.
"""

TAIL = """## Without published code

JI2S has none; of DIVINE and AIDE, Compact's readings are compared above. TRAK is compared with dattri's: the soft
threshold at the end of its paper's algorithm is in neither. What is gradsift's own (relevance pursuit, greedy joint
selection, the exact optimum on the simplex) is tested against brute force.

What the differences do on real rows and models: [the papers](papers.md).
"""


def page(codes: Sequence[Published]) -> str:
    """docs/conformance.md."""
    agreed = ["| published code | quantity | ours | difference | rounding |", "|---|---|---|---|---|"]
    departed = ["| published code | theirs | ours | effect, measured | option for theirs |", "|---|---|---|---|---|"]
    for code in codes:
        name = f"[{code.title}]({code.source})"
        first = f"{name}, {code.version}"
        for one in code.agreement[0]:
            size = f"{shown(one.difference)} | {'none' if one.exact else f'{one.tolerance:.0e}'}"
            agreed.append(f"| {first} | {one.quantity} | {one.ours} | {size} |")
            first = ""
        first = name
        for other in code.agreement[1]:
            departed.append(f"| {first} | {other.published} | {other.ours} | {other.effect} | {other.option} |")
            first = ""
    parts = [HEAD, "## What agrees\n", "\n".join(agreed), "", "## Deliberate departures\n",
             "In every line gradsift does otherwise unless the option in its last column is given.\n",
             "\n".join(departed), "", TAIL]  # fmt: skip
    return "\n".join(parts)


def shown(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.0e}"


def without_differences(text: str) -> str:
    """The page without what rounding changes from one machine to the next."""
    return re.sub(r"\| (?:0|\de-\d\d) (?=\| \de-\d\d \|$)", "| … ", text, flags=re.MULTILINE)


def main() -> None:
    names = [code.name for code in CODES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", nargs="+", metavar="NAME", choices=names, default=[], help="make environments")
    parser.add_argument("--record", nargs="*", metavar="NAME", choices=names, help="run published code; all by default")
    parser.add_argument("--checkout", action="append", default=[], metavar="NAME=FOLDER", help="of a paper's code")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is off")
    options = parser.parse_args()
    by_name = {code.name: code for code in CODES}
    for name in options.setup:
        by_name[name].place().make()
    if options.record is not None:
        given = dict(entry.split("=", 1) for entry in options.checkout)
        checkouts = {name: Path(folder).expanduser().resolve() for name, folder in given.items()}
        for name in options.record or names:
            record_one(by_name[name], checkouts.get(name))
    if options.setup and options.record is None:
        return
    absent = [code.title for code in CODES if code.needs and importlib.util.find_spec(code.needs) is None]
    if absent:
        sys.exit(f"{', '.join(absent)}: gradsift's side needs the extra eval: pip install 'gradsift[eval]'")
    codes = [code.load() for code in CODES]
    off = [f"{code.title}: {one.quantity} differ by {one.difference:.2g}"
           for code in codes for one in code.agreement[0] if not one.agrees]  # fmt: skip
    text = page(codes)
    if options.check:
        if without_differences(text) != without_differences(PAGE.read_text()):
            off.append(f"{PAGE} is not what this script writes: run it without --check")
    else:
        PAGE.write_text(text)
    sys.exit("\n".join(off) if off else 0)


def record_one(code: type[Published], checkout: Path | None) -> None:
    if not code.place().program("python").exists():
        print(f"{code.title}: left out, no environment at {code.place().folder}: --setup {code.name}", file=sys.stderr)
    elif code.package is None and checkout is None:
        print(f"{code.title}: left out, no checkout of {code.source}: --checkout {code.name}=FOLDER", file=sys.stderr)
    else:
        code.run(checkout)


if __name__ == "__main__":
    main()
