"""The words of a text in any script: what lexical methods compare, and what rewards count and look for.

A word is a run of letters, digits and underscores with the marks that belong to them, in lower case. Chinese, Japanese,
Thai, Khmer and their like write words side by side, and Korean joins particles to them; what stands between two gaps is
taken apart into pairs of neighbouring characters there, as search engines do, and a Chinese character, which is a word
or means something in one, also stands for itself.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

# Scripts without gaps between words. Line_Break=SA: Thai, Lao, Khmer, Burmese, Tai and the like.
_JOINED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Bopomofo}\p{Yi}\p{Line_Break=SA}\p{Javanese}\p{Balinese}"
_PAIRED = rf"{_JOINED}\p{{Hangul}}"
_LETTER = r"\p{L}\p{N}_"
_MARK = r"[\p{Mn}\p{Mc}--[\uFE00-\uFE0F]]"  # the latter say how an emoji is drawn
# Widths and presentation forms are no letters of their own. Other such forms (½, …, ™) are left alone: a Latin text has
# the words that NLTK's WordPunct finds in it, by which DSIR is defined.
_FORMS = r"[\uFB50-\uFDFF\uFE70-\uFEFC\uFF01-\uFFEF]+"
# Of a word: a letter that is set apart from other words, before it or after it; nothing begins with a mark.
_NOT_AFTER = rf"(?<![[{_LETTER}{_MARK}]--[{_JOINED}]])"
_NOT_BEFORE = rf"(?![[{_LETTER}]--[{_PAIRED}]]|\p{{M}})"
_JOINERS = dict.fromkeys((0x200C, 0x200D))  # say how letters are drawn


def words(text: str, *, punctuation: bool = False) -> list[str]:
    """Lower-case words in their order, digits and single letters included; the same for canonically equivalent texts.

    punctuation: runs of what is neither letter nor white space are words, too.

    >>> words("It's 7 o'clock"), words("हिन्दी में"), words("黒い猫")
    (['it', 's', '7', 'o', 'clock'], ['हिन्दी', 'में'], ['黒', '黒い', 'い猫', '猫'])
    >>> words("What?", punctuation=True)
    ['what', '?']
    """
    if text.isascii():  # the same, several times faster
        return re.findall(r"\w+|[^\w\s]+" if punctuation else r"\w+", text.lower())
    found: list[str] = []
    for match in _pattern("words").finditer(composed(text.lower())):
        kind, piece = match.lastgroup, match[0]
        if kind == "paired":
            found += _pairs(_pattern("characters").findall(piece))
        elif kind == "word":
            found.append(piece.translate(_JOINERS))
        elif punctuation:
            found.append(piece)
    return found


def has_words(text: str) -> bool:
    """Whether there is any letter or digit."""
    return any(character.isalnum() for character in text)


def count_words(text: str) -> int:
    """How many words white space sets apart; in scripts without gaps between words every character counts."""
    joined, total = _pattern("joined"), 0
    for piece in composed(text).split():
        characters, rest = joined.findall(piece), joined.sub(" ", piece).split()
        total += len(characters) + sum(not characters or has_words(part) for part in rest)
    return total


def composed(text: str) -> str:
    """One form of what can be written in several: composed letters, of usual width."""
    if text.isascii():
        return text
    usual = _pattern("forms").sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return unicodedata.normalize("NFC", usual)


def set_apart(text: str) -> str:
    """The text in usual width, with a blank where a sign or digit follows a letter of a script without gaps."""
    return str(_pattern("edges").sub(" ", composed(text)))


def stands_in(text: str, part: str) -> bool:
    """Whether `part` occurs in `text` as whole words, as far as the script sets them apart: "猫" in "答案是猫。"."""
    text, part = composed(text), composed(part)
    whole = rf"(?V1){_NOT_AFTER}{_regex().escape(part)}{_NOT_BEFORE}"
    return bool(part) and _regex().search(whole, text) is not None


def _pairs(characters: list[str]) -> list[str]:
    if len(characters) == 1:
        return characters
    found = []
    for position, character in enumerate(characters):
        if _pattern("meaningful").match(character):
            found.append(character)
        if position + 1 < len(characters):
            found.append(character + characters[position + 1])
    return found


_PATTERNS = {
    "words": (
        rf"(?P<paired>[[{_PAIRED}]&&[{_LETTER}]](?:[[{_PAIRED}]&&[{_LETTER}]]|{_MARK})*)"
        rf"|(?P<word>[{_LETTER}](?:[[{_LETTER}]--[{_PAIRED}]]|{_MARK}|[\u200c\u200d]+(?=[[{_LETTER}]--[{_PAIRED}]]))*)"
        rf"|(?P<punctuation>[^\s{_LETTER}]+)"
    ),
    "joined": rf"(?=[[{_JOINED}]&&[{_LETTER}]])\X\p{{M}}*",
    "meaningful": r"\p{Han}",
    "characters": r"\X\p{M}*",
    "edges": rf"(?<=[{_PAIRED}])(?=[\d+$€£-])",
    "forms": _FORMS,
}


@cache
def _pattern(name: str) -> Any:
    return _regex().compile(rf"(?V1){_PATTERNS[name]}")


def _regex() -> Any:
    import regex  # a tenth of a second, for properties of characters that `re` does not know

    return regex
