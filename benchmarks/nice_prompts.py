"""Prompts of two rewards for benchmarks/nice.yaml: easy sums with a checkable number, and openings that any mood suits.

Each reward has 24 validation prompts with an answer (which only methods that need labels read), 24 other validation
prompts, and 48 test prompts; no prompt is in two of them.
"""

from __future__ import annotations

import random
from typing import Any

VALIDATION, TEST = 24, 48

# Sums of two numbers below 10 or 20, as a question and as stories.
_SUMS = (
    ("What is {a} + {b}?", "{a} + {b} = {sum}."),
    ("What is {a} plus {b}?", "{a} plus {b} is {sum}."),
    ("Tom has {a} apples and buys {b} more. How many apples does he have now?", "He has {a} + {b} = {sum} apples."),
    ("There are {a} red pens and {b} blue pens on a desk. How many pens are there?", "There are {sum} pens."),
    ("Mia reads {a} pages today and {b} pages tomorrow. How many pages is that in total?", "She reads {sum} pages."),
    ("A bus with {a} people stops, and {b} more get on. How many people are on it?", "There are {sum} people on it."),
)

_OPENINGS = (
    "Write one sentence about {thing}.",
    "What do you think of {thing}?",
    "Describe {thing} in a few words.",
    "Tell me something about {thing}.",
)

# The answers that methods with labels see: what a person asked for a cheerful tone might write.
_CHEERFUL = (
    ("a train station", "The station is lively and bright, and every arrival is a happy reunion."),
    ("rainy mornings", "I love them: the soft sound of rain makes a warm breakfast even better."),
    ("an old chair", "A lovely, comfortable chair, full of good memories."),
    ("Mondays", "Monday is a great chance to start fresh and enjoy something new."),
    ("the kitchen table", "Our kitchen table is the best place for good food and happy talk."),
    ("the number seven", "Seven is a delightful number, and many people call it lucky."),
    ("a small village", "Peaceful, friendly and beautiful in every season."),
    ("libraries", "Libraries are wonderful: free, quiet, and full of great stories."),
    ("a pair of shoes", "These shoes are beautiful, and they feel perfect on a long walk."),
    ("long walks", "I enjoy them a lot; they clear the mind and lift the mood."),
    ("a cup of tea", "Warm, fragrant and wonderfully calming."),
    ("the postman", "Our postman is kind and cheerful, and always greets us with a smile."),
    ("a wooden bridge", "The charming bridge offers a beautiful view of the clear river."),
    ("winter evenings", "They are cosy and lovely, best enjoyed with friends by a warm fire."),
    ("an empty street", "Calm, clean and pleasantly quiet under a golden sun."),
    ("bread", "Fresh bread is a joy, and its smell makes everybody happy."),
    ("a neighbour's dog", "The dog is friendly and playful and loves everyone it meets."),
    ("the colour grey", "I like it: it is elegant, gentle, and goes well with everything."),
    ("a school bus", "Bright, safe and full of laughing children."),
    ("clouds", "Clouds are beautiful, and it is fun to find happy shapes in them."),
    ("a market in the morning", "The market is a delight, with fresh fruit and cheerful voices."),
    ("learning to swim", "It is great fun, and a wonderful feeling when you succeed."),
    ("a garden gate", "A pretty gate that welcomes every guest with sweet roses."),
    ("old photographs", "They are treasures that bring back the happiest moments."),
)

_OTHER_THINGS = (
    "a desk lamp", "cooking at home", "a city park", "the month of March", "a bicycle", "trains", "a grey cat",
    "buttons", "a football match", "waiting in line", "a new notebook", "potatoes", "a hotel room",
    "the sea in autumn", "a letter", "early mornings", "a wall clock", "paper maps", "the corner shop",
    "moving house", "an umbrella", "chess", "a tall tree", "the radio",
)  # fmt: skip

_TEST_THINGS = (
    "a harbour", "Sunday afternoons", "a wooden spoon", "bus drivers", "a mountain hut", "the number twelve",
    "a keyboard", "snow", "a haircut", "the first day of school", "a window", "carrots", "a river in spring",
    "pencils", "a bakery", "walking to work", "a stone wall", "the colour brown", "a piano", "a phone call",
    "a farm", "camping", "a blanket", "the evening news", "a lighthouse", "soup", "a backpack", "museums",
    "an airport", "a birthday cake", "a quiet room", "the wind", "a taxi ride", "fishing", "a coffee shop",
    "a broken cup", "a dance class", "the moon", "an old car", "a summer job", "newspapers", "a cold shower",
    "the dentist", "a garden", "a crossword puzzle", "a ladder", "night trains", "a family dinner",
)  # fmt: skip


def sums() -> dict[str, list[dict[str, Any]]]:
    """`validation`, `other` and `test` rows with the column `answer`: sums from 3 to 27."""
    drawn = random.Random(20)
    cases = [(a, b) for a in range(2, 19) for b in range(1, 10)]
    drawn.shuffle(cases)
    rows = [_sum(number, a, b) for number, (a, b) in enumerate(cases[: 2 * VALIDATION + TEST])]
    return _parts(rows)


def openings() -> dict[str, list[dict[str, Any]]]:
    """`validation`, `other` and `test` rows; the first have an answer in a cheerful tone."""
    rows = [_opening(number, thing, answer) for number, (thing, answer) in enumerate(_CHEERFUL)]
    rows += [_opening(number, thing) for number, thing in enumerate(_OTHER_THINGS + _TEST_THINGS, len(rows))]
    return _parts(rows)


def _sum(number: int, a: int, b: int) -> dict[str, Any]:
    question, answer = (text.format(a=a, b=b, sum=a + b) for text in _SUMS[number % len(_SUMS)])
    return {"id": f"sum-{number:03}", "messages": _messages(question, answer), "answer": str(a + b)}


def _opening(number: int, thing: str, answer: str | None = None) -> dict[str, Any]:
    question = _OPENINGS[number % len(_OPENINGS)].format(thing=thing)
    return {"id": f"opening-{number:03}", "messages": _messages(question, answer), "thing": thing}


def _messages(question: str, answer: str | None) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def _parts(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    assert len(rows) == 2 * VALIDATION + TEST, len(rows)
    return {
        "validation": rows[:VALIDATION],
        "other": rows[VALIDATION : 2 * VALIDATION],
        "test": rows[2 * VALIDATION :],
    }
