"""Write a small classification set, `python benchmarks/labels.py FOLDER`: reviews.jsonl, of whose 96 labels 8 are wrong
(wrong.json: their lines, from 0), and reviews_clean.jsonl with 16 right ones.
"""

import json
import random
import sys
from pathlib import Path

GOOD = ("great", "lovely", "excellent", "wonderful", "superb", "delightful", "charming", "brilliant")
BAD = ("awful", "boring", "terrible", "dreadful", "dull", "horrible", "poor", "weak")
THINGS = ("film", "book", "phone", "meal", "hotel", "song", "game", "car", "show", "lamp", "coat", "tent")
LABELS = ("negative", "positive")


def main() -> None:
    folder, draw = Path(sys.argv[1]), random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, wrong in (("reviews", 96, 8), ("reviews_clean", 16, 0)):
        rows, flipped = [], set(draw.sample(range(count), wrong))
        for number in range(count):
            first, second = draw.sample(GOOD if number % 2 else BAD, 2)
            text = f"The {draw.choice(THINGS)} was {first} and {second}, no. {number}."
            rows.append({"text": text, "label": LABELS[number % 2 ^ (number in flipped)]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if wrong:
            (folder / "wrong.json").write_text(json.dumps(sorted(flipped)))


main()
