"""Write what `selection.yaml` and `nice.yaml` compare on: `python benchmarks/short_rows.py FOLDER [MODEL]`, once.

FOLDER/choose: pool.jsonl, 800 rows of ../shared/data/pool.jsonl of at most 112 tokens; of math and sentiment 24 rows to
    choose by (224 tokens) and 60 to test on (160)
FOLDER/rewards: pool.jsonl, 400 rows of at most 160 tokens, enlarged.jsonl, 600; prompts of sums and openings, 24 to
    choose by, 24 others, 48 to test on

Tokens are MODEL's, the demo's if not given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nice_prompts
from relevance_table import DATA, rows_of

from gradsift.base.progress import Reporter
from gradsift.base.types import TokenizedExample
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.demo.model import demo_model
from gradsift.model.models import load_tokenizer

PARTS = {"validation": (24, 224), "test": (60, 160)}  # rows, and tokens of each


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    model = sys.argv[2] if len(sys.argv) > 2 else str(demo_model(Reporter()))
    write(folder / "choose", "pool", rows_of(model, 800, 112))
    chat = ChatFormat(load_tokenizer(model), max_length=100_000)
    for target in ("math", "sentiment"):
        for part, (count, tokens) in PARTS.items():
            write(folder / "choose", f"{target}-{part}", target_rows(chat, f"target_{target}_{part}", count, tokens))
    for name, count in (("pool", 400), ("enlarged", 600)):
        write(folder / "rewards", name, rows_of(model, count, 160))
    for task, parts in (("sums", nice_prompts.sums()), ("openings", nice_prompts.openings())):
        for part, rows in parts.items():
            write(folder / "rewards", f"{task}-{part}", rows)


def target_rows(chat: ChatFormat, name: str, count: int, tokens: int) -> list[dict[str, Any]]:
    """The first so many rows that fit; `answer` is what a reward compares with."""
    found = []
    for example in load_examples(str(DATA / f"{name}.jsonl")).examples:
        entry = chat.tokenize(example)
        if isinstance(entry, TokenizedExample) and len(entry.token_ids) <= tokens:
            answer = example.row.get("answer", example.messages[-1]["content"])
            found.append({**example.row, "id": example.id, "answer": answer})
    assert len(found) >= count, f"{name}: only {len(found)} rows have at most {tokens} tokens"
    return found[:count]


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
