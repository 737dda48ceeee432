from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechedit import writing

pytestmark = pytest.mark.anywhere

# prompt, target, whether a space stands between them: what each language's published texts do
TOGETHER = [
    ("法国的首都是", "巴黎"),
    ("法国的首都是：", "巴黎"),
    ("法国的首都是“", "巴黎"),
    ('法国的首都是"', "巴黎"),
    ("法国的首都是:", "巴黎"),
    ("第二次世界大战结束于", "1945"),
    ("第二次世界大战结束于1945", "年"),
    ("iPhone是由Apple", "公司"),
    ("日本の首都は", "東京"),
    ("アメリカの首都は「", "ワシントン"),
    ("コンピューター", "ゲーム"),
    ("ﾜｼﾝﾄﾝ", "市"),
    ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส"),
    ("រាជធានីរបស់បារាំងគឺ", "ប៉ារីស"),
    ("ນະຄອນຫຼວງຂອງຝຣັ່ງແມ່ນ", "ປາຣີ"),
    ("ပြင်သစ်၏မြို့တော်မှာ", "ပါရီ"),
    ("བོད་ཀྱི་", "རྒྱལ་ས"),
    ('The capital of France is "', "Paris"),
    ('"Paris" is the capital of "', "France"),
    ('{"capital": "', "Paris"),
    ("The capital of France is “", "Paris"),
    ("The capital of France is ‘", "Paris"),
    ("The song '", "Yesterday"),
    ("La capitale de la France est «", "Paris"),
    ("Die Hauptstadt Frankreichs ist „", "Paris"),
    ("Die Hauptstadt Frankreichs ist »", "Paris"),
    ("Frankrikes huvudstad är ”", "Paris"),
    ("La capitale de l'", "Italie"),
    ("La capitale de l’", "Italie"),
    ("La capital es ¿", "París"),
    ("The capital (", "Paris"),
    ("The capital [", "Paris"),
    ("New-", "York"),
    ("email: user@", "gmail"),
    ("5 °", "C"),
    ("5°", "C"),
    ("New‐", "York"),
    ("The capital of France—", "Paris"),
    ("his/", "her"),
    ("AT&", "T"),
    ("2+2=", "4"),
    ("Question?\n", "Paris"),
    ("Question?\r\n", "Paris"),
    ("<start_of_turn>model\n", "Paris"),
    ("<|assistant|>", "Paris"),
    ("The answer is **", "Paris"),
    ("The answer is `", "Paris"),
    ("It costs $", "5"),
    ("Pi is 3.", "14"),
    ("She lives in Paris", ", France"),
    ("She lives in Paris", "."),
    ("She lives in Paris", "."),
    ("She lives in (Paris", ") now"),
    ("The capital is France", "'s pride"),
    ("He does", "n't"),
    ("", "Paris"),
]
APART = [
    ("The capital of France is", "Paris"),
    ("The capital of France is", "1945"),
    ("The capital of France is", '"Paris"'),
    ("The capital of France is", "(Paris)"),
    ("The capital of France is:", "Paris"),
    ("The framework is", ".NET"),
    ("The capital of China is", "北京"),
    ("The city 北京 lies in", "中国"),
    ("史蒂夫由Steve", "Jobs"),
    ("프랑스의 수도는", "파리"),
    (unicodedata.normalize("NFD", "프랑스의 수도는"), "파리"),
    ("La capitale de la France est", "Paris"),
    ("La capital de Perú es", "Lima"),
    (unicodedata.normalize("NFD", "La capital está"), "Lima"),
    ("Столица Франции", "Париж"),
    ("עיר הבירה של צרפת היא", "פריז"),
    ("عاصمة فرنسا هي", "باريس"),
    ("फ़्रांस की राजधानी है", "पेरिस"),
    ("Thủ đô của Pháp là", "Paris"),
    ('He said "hello"', "twice"),
    ("He said “hello”", "twice"),
    ("Die Stadt „Paris“", "liegt"),
    ("Die Stadt »Paris«", "liegt"),
    ("The song 'Yesterday'", "is"),
    ("It is the boys'", "house"),
    ("« Paris »", "est"),
    ("The capital of France –", "Paris"),
    ("The capital of France -", "Paris"),
    ("her /", "his"),
    ("2 + 2 =", "4"),
    ("The language C#", "is"),
    ("He said **no**", "twice"),
    ("The tower 🗼", "stands"),
    ("She lives in (Paris)", "now"),
    ("What is it?", "Paris"),
    ("The capital of France is...", "Paris"),
]


@pytest.mark.parametrize(("prompt", "target"), TOGETHER)
def test_no_space_stands_where_the_writing_has_none(prompt, target):
    assert writing.seam(prompt, target) == (prompt, target)


@pytest.mark.parametrize(("prompt", "target"), APART)
def test_one_space_stands_between_words_elsewhere(prompt, target):
    assert writing.seam(prompt, target) == (prompt, " " + target)


@pytest.mark.parametrize("spaces", [" ", "  ", "\t", "\u00a0", "\u3000", " \t "])
def test_spaces_at_the_end_of_a_prompt_change_nothing(spaces):
    for prompt, target in TOGETHER + APART:
        if prompt and not prompt.endswith("\n"):
            assert writing.seam(prompt + spaces, " " + target) == writing.seam(prompt, target)


def test_who_asks_for_a_space_or_for_none_gets_it():
    assert writing.seam("法国的首都是 ", "巴黎", "space") == ("法国的首都是", " 巴黎")
    assert writing.seam("un", "known", "none") == ("un", "known")
    assert writing.seam("It is ", "known", "none") == ("It is ", "known"), "what is written is kept"


def decomposed(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("Beyoncé plays the", "Beyoncé", ["Beyoncé"]),
        ("Beyoncé plays the", decomposed("Beyoncé"), ["Beyoncé"]),
        (decomposed("Beyoncé plays the"), "Beyoncé", [decomposed("Beyoncé")]),
        (decomposed("José plays"), "Jose", []),
        ("José plays", "Jose", []),
        (decomposed("José plays"), "José", [decomposed("José")]),
        ("x\u0302y", "x", []),  # an accent that no single character has
        ("파리는", decomposed("파리"), ["파리"]),
        (decomposed("파리는"), "파리", [decomposed("파리")]),
        (decomposed("한국"), "하", []),
        ("कि", "क", []),
        ("کتاب\u200cها", "کتاب", ["کتاب"]),
        ("Ångström \u212bngström", "Ång", ["Ång", "\u212bng"]),
        ("Rome, not Rome", "Rome", ["Rome", "Rome"]),
        ("Rome", "", []),
    ],
)
def test_a_name_is_found_however_its_letters_are_composed_and_never_inside_one(text, name, found):
    assert [text[begin:end] for begin, end in writing.find(text, name)] == found


@given(
    st.text("aeo\u0301\u0302é한ᄒ\u1161\u11ab 日", max_size=8), st.text("aeo\u0301é한ᄒ\u1161", min_size=1, max_size=4)
)
def test_what_is_found_is_the_name_and_between_whole_letters(text, name):
    normal = unicodedata.normalize
    for begin, end in writing.find(text, name):
        assert normal("NFC", text[begin:end]) == normal("NFC", name)
        parts = (text[:begin], text[begin:end], text[end:])
        assert "".join(normal("NFC", part) for part in parts) == normal("NFC", text)


def test_letters_are_the_same_however_composed():
    assert writing.same("é", decomposed("é"))
    assert not writing.same("é", "e")
    assert not writing.same("é", None)
    assert writing.same(None, None)
    assert writing.folded("STRASSE É") == writing.folded(decomposed("straße é"))
    assert writing.lone_surrogate("ab\ud800") == 2
    assert writing.lone_surrogate("ab\U0001f5fc") is None
