"""Words in many scripts: what they are, that none loses a mark, and that Latin text has those of the published DSIR."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.data.words import composed, count_words, has_words, set_apart, stands_in, words
from gradsift.influence.bm25 import bm25_scores

# A question, the row that is about it, and two that are about something else; the first of these is the longest.
LANGUAGES = {
    "French, accents": (
        "Où élève-t-on des brebis ?",
        "L'élevage : on élève des brebis dans les Causses",
        "Quelle heure est-il à Paris quand il est midi à Tokyo ?",
        "Le piano a des touches",
    ),
    "Vietnamese": (
        "Thủ đô của Việt Nam là gì?",
        "Hà Nội là thủ đô của nước Việt Nam",
        "Con mèo đang ngủ trên ghế, và con chó đang ăn ở ngoài sân",
        "Trời hôm nay mưa to",
    ),
    "Hindi": (
        "भारत की राजधानी क्या है?",
        "नई दिल्ली भारत की राजधानी है",
        "बिल्ली मेज़ पर सो रही है और कुत्ता बाहर खाना खा रहा है",
        "आज बहुत बारिश हुई",
    ),
    "Tamil": (
        "இந்தியாவின் தலைநகரம் எது?",
        "இந்தியாவின் தலைநகரம் புது தில்லி",
        "பூனை மேசையில் தூங்குகிறது, நாய் வெளியே சாப்பிடுகிறது",
        "இன்று மழை பெய்தது",
    ),
    "Chinese": (
        "中国的首都是哪里？",
        "北京是中国的首都。",
        "猫在桌子上睡觉，狗在外面吃东西，今天的天气很好。",
        "钢琴有黑键和白键。",
    ),
    "Japanese": (
        "日本の首都はどこですか？",
        "東京は日本の首都です。",
        "猫は机の上で寝ていて、犬は外でご飯を食べています。",
        "ピアノには黒い鍵盤があります。",
    ),
    "Korean, particles": (
        "고양이는 무엇을 먹나요?",
        "우리 집 고양이가 생선을 먹었다",
        "내일은 서울에 비가 많이 올 것이라고 한다",
        "피아노를 치는 사람",
    ),
    "Thai": (
        "แมวกินอะไร",
        "แมวชอบกินปลาทู",
        "วันนี้ฝนตกหนักที่กรุงเทพและรถติดมากตั้งแต่เช้า",
        "เปียโนมีคีย์สีดำ",
    ),
    "Lao": (
        "ນະຄອນຫຼວງຂອງລາວແມ່ນຫຍັງ",
        "ວຽງຈັນແມ່ນນະຄອນຫຼວງຂອງລາວ",
        "ແມວນອນຢູ່ເທິງໂຕະ ແລະໝາກິນເຂົ້າຢູ່ຂ້າງນອກ",
        "ມື້ນີ້ຝົນຕົກ",
    ),
    "Khmer": (
        "រាជធានីនៃប្រទេសកម្ពុជាជាអ្វី?",
        "ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា",
        "ឆ្មាដេកលើតុ ហើយឆ្កែស៊ីបាយនៅខាងក្រៅផ្ទះ",
        "ថ្ងៃនេះភ្លៀងធ្លាក់",
    ),
    "Burmese": (
        "မြန်မာနိုင်ငံ၏မြို့တော်ကဘာလဲ",
        "နေပြည်တော်သည်မြန်မာနိုင်ငံ၏မြို့တော်ဖြစ်သည်",
        "ကြောင်ကစားပွဲပေါ်မှာအိပ်ပြီးခွေးကအပြင်မှာထမင်းစား",
        "ဒီနေ့မိုးရွာတယ်",
    ),
    "Tibetan": (
        "བོད་ཀྱི་རྒྱལ་ས་གང་ཡིན།",
        "ལྷ་ས་བོད་ཀྱི་རྒྱལ་ས་ཡིན།",
        "ཞི་མི་ཅོག་ཙེའི་སྒང་ལ་ཉལ།",
        "དེ་རིང་ཆར་པ་བབས།",
    ),
    "Arabic, vowels": (
        "ما هي عَاصِمَة مِصْر؟",
        "القاهرة عَاصِمَة مِصْر",
        "القطة تنام على الطاولة والكلب يأكل في الخارج كل يوم",
        "نزل المطر اليوم",
    ),
    "Hebrew": (
        "מהי בירת ישראל?",
        "ירושלים היא בירת ישראל",
        "החתול ישן על השולחן והכלב אוכל בחוץ כל היום",
        "היום ירד גשם",
    ),
    "Russian": (
        "Какая столица России?",
        "Москва — столица России",
        "Кошка спит на столе, а собака ест на улице",
        "Идёт дождь",
    ),
}
FORMS = ("NFC", "NFD")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("query_form", FORMS)
def test_the_related_row_ranks_first(language: str, form: str, query_form: str) -> None:
    """BM25 finds it in every script, whichever of two equivalent forms question and rows are written in."""
    question, *rows = LANGUAGES[language]
    documents = [words(unicodedata.normalize(form, row)) for row in rows]
    scores = bm25_scores(documents, [words(unicodedata.normalize(query_form, question))], k1=1.5, b=0.75)[:, 0]
    assert scores[0] > 1.5 * scores[1:].max()


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_mark_is_lost_and_no_form_matters(language: str) -> None:
    """Every letter and mark of a text stands in a word, and composed and decomposed texts have the same words."""
    for text in LANGUAGES[language]:
        found = words(text)
        whole = unicodedata.normalize("NFC", text.lower())
        letters = {letter for letter in whole if unicodedata.category(letter)[0] in "LM"}
        assert letters == {letter for word in found for letter in word if unicodedata.category(letter)[0] in "LM"}
        assert found == words(unicodedata.normalize("NFD", text))
        assert all(unicodedata.category(word[0])[0] != "M" for word in found)


def test_words_of_scripts_without_gaps() -> None:
    """Pairs of neighbouring characters with their marks, Chinese characters by themselves as well, a lone one once;
    digits and Latin letters among them are words of their own."""
    assert words("黒い猫") == ["黒", "黒い", "い猫", "猫"]
    assert words("我用GPT-4o写3行") == ["我", "我用", "用", "gpt", "4o", "写", "3", "行"]
    assert words("ネコ、犬") == ["ネコ", "犬"]
    assert words("น้ำใจ") == ["น้ำใ", "ใจ"]
    assert words("고양이가 잔다") == ["고양", "양이", "이가", "잔다"]
    assert words("ｶﾞｽ ＡＢＣ１２") == ["ガス", "abc12"]
    assert words("می\u200cروم نمی\u200c") == ["میروم", "نمی"]


LATIN = st.text(st.sampled_from("abzÄßéñøŒ019²½_ .,!'’—…™€\n\t-"), max_size=20)


@given(LATIN)
def test_latin_text_has_the_words_of_the_published_dsir(text: str) -> None:
    """NLTK's WordPunct on lower-cased text, by which the package data-selection hashes, and the same without signs."""
    assert words(text, punctuation=True) == re.findall(r"\w+|[^\w\s]+", text.lower())
    assert words(text) == re.findall(r"\w+", text.lower())


@given(st.text(st.sampled_from("ab0_ .,!'\n"), max_size=20), st.booleans())
def test_the_short_way_of_ascii_is_the_long_one(text: str, punctuation: bool) -> None:
    """A text of ASCII has the words that it has before a word that is none."""
    assert [*words(text, punctuation=punctuation), "é"] == words(f"{text} é", punctuation=punctuation)


def test_emoji_are_no_words_and_signs_stay_whole() -> None:
    """Variation selectors and joiners of emoji do not count as letters; a text of emoji has no words."""
    assert words("❤️ 1️⃣ 👩‍💻 ok") == ["1", "ok"]
    assert words("I ❤️ you", punctuation=True) == ["i", "❤️", "you"]
    assert not has_words("❤️ — !?")
    assert all(has_words(text) for texts in LANGUAGES.values() for text in texts)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("it's a red-hot day!", 4),
        ("a - b …", 4),
        ("今天天气很好。", 6),
        ("我爱 you", 3),
        ("고양이가 잔다", 2),
        ("भारत की राजधानी", 3),
        ("น้ำใจ", 3),
        ("", 0),
    ],
)
def test_words_are_counted_by_gaps_or_characters(text: str, count: int) -> None:
    """As word processors do: by white space, and by characters in scripts without gaps; Korean has gaps."""
    assert count_words(text) == count


@pytest.mark.parametrize(
    ("text", "part", "found"),
    [
        ("the cat.", "cat", True),
        ("concatenate", "cat", False),
        ("cats", "cat", False),
        ("C++ it is", "C++", True),
        ("हिन्दी", "हिन", False),
        ("मेरी हिन्दी है", "हिन्दी", True),
        ("答案是猫。", "猫", True),
        ("答え：犬です", "犬", True),
        ("คำตอบคือแมว", "แมว", True),
        ("น้ำ", "น", False),
        ("정답은 고양이입니다", "고양이", True),
        ("무지개", "개", False),
        ("用GPT写", "GPT", True),
        ("用GPTs写", "GPT", False),
        ("cafe\u0301", "café", True),
        ("café", "caf", False),
        ("a", "", False),
    ],
)
def test_whole_words_within_a_text(text: str, part: str, found: bool) -> None:
    """Where a script has gaps a word ends at them, marks included; where it has none, at any character."""
    assert stands_in(text, part) is found


def test_numbers_are_set_apart_from_scripts_without_gaps() -> None:
    """A digit or a sign after such a letter gets a blank before it; other texts stay as they are."""
    assert set_apart("共12个，是－３。") == "共 12个,是 -3。"
    assert set_apart("x2 is a-b, 3-4") == "x2 is a-b, 3-4"
    assert composed("e\u0301 １") == "é 1"
