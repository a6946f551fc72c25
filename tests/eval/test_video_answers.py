"""The letter in a response: the spec sheet's golden table, and odd responses with what the public scorers said of them.

The second list and 261,573 more were compared with `extract_characters_regex` (thanku-all/parse_answer) and `extract_mcq_answer`
(lmms-eval 0.7.3) outside of the repository: no difference. EgoSchema's rule likewise on 200,000 responses.
"""

from __future__ import annotations

import pytest

from mmkv.eval.video_mme.answers import lmms, official
from mmkv.eval.video_mme.egoschema import extract
from mmkv.eval.video_mme.rekv import letter_of

TABLE = [
    ("B. Gray.", "B", "B"),
    ("(C)", "C", "C"),
    ("D)", "D", "D"),
    ("The best answer is: D", "D", "D"),
    ("The correct answer is (B).", "B", "B"),
    ("A man in red. The answer is C.", "A", "A"),
    ("I think it is B because A is wrong", "B", "A"),
    ("Best option: (D", "B", "D"),
    ("Both A and C", "B", "C"),
    ("The answer is option C", "C", "C"),
    ("b", "", ""),
    ("I do not know", "", ""),
    ("none of these", "", ""),
    ("", "", ""),
]
ODD = [
    ("None these choice telld;'C' Best answer:Best option:\n", "C", "B"),
    ("ABBA dog An A option. (D)The answer is. and ABBA is of A ", "A", "A"),
    ("cannot option in Dad **c** a: in A choice BCD ", "D", "D"),
    ("(b)\n\n\n", "", ""),
    ("The correct choice is ", "", ""),
    ('"A"\naman\n', "A", "A"),
    ("(b. a)\n\\boxed{D} 'A'", "D", "A"),
    ("The correct option D)\n", "D", "D"),
    ('"E"\nD.. An ', "D", "D"),
    ("tell of. [C]**d**", "C", "C"),
    ("(a\nman red red man. ", "", ""),
    ("[E]\nof is these dog Cat c;. ", "C", "C"),
    ("(A ", "A", "A"),
    ("옵션 ", "", ""),
    ("답은\ni select ", "", ""),
    ("Both Among정답은", "B", "A"),
    ("The answer\n,\nThe best option isthe correct option is\n", "", ""),
    ("not Among Cat Dad tell None\nBest option:. b. ", "A", "B"),
    ("The correct answer is None\n(a\nBCD not Dad option. ", "B", "D"),
    ("(E). \nd C\nAnswer is ", "C", "A"),
    ("Beard not these BCD option Both ", "B", "D"),
    ("or red Cata not cannot Dad Among Both", "C", "B"),
    ("Best option:. 选tell A red An None Among these ", "B", "A"),
    ("BCD in cannot An BCD Beard man\n!\nThe choice is. ", "B", "D"),
    ("答案是\nis BCD Dad Cat is **d** Beard BCD Among man ", "B", "A"),
    ("Best answer:\tc: choice because or or An. ", "B", "A"),
    ("i pickThe correct option. them ABBA The answer is ", "A", "B"),
    ("in E.\nnot is a and because BCD ", "B", "D"),
    ("Answer: . \n d; ", "", "A"),
    ("Answer:", "", "A"),
    ("Best answer:Best option:\n", "", "B"),
    ("E:Best answer:Best option:\n'c'\n\\boxed{F}. ", "", "B"),
]


@pytest.mark.parametrize(("response", "theirs", "lmms_evals"), TABLE + ODD)
def test_as_the_public_scorers(response, theirs, lmms_evals):
    assert official(response) == theirs
    assert lmms(response) == lmms_evals


def test_phrases_are_deleted_one_after_the_other():
    # "The answer" goes before "Answer:" could; the glued phrases go only together
    assert official("The answer: b") == ""
    assert official("The best option isThe correct option is c") == ""
    assert official("The best option is c") == ""
    assert official("Best answer: c") == "B"


def test_egoschema_takes_the_letter_whose_last_place_is_first():
    options = {"A": "C washes", "B": "C paints a wall", "C": "C reads", "D": "C cooks", "E": "C walks"}
    assert extract("(B) rather than (D)", options) == "B"
    assert extract("E.", options) == "E"  # the full stop is stripped, "E " is left
    assert extract("b", options) == ""
    assert extract("in the video one sees that someone else c Paints a wall here", options) == "B"
    assert extract("paints a wall", options) == ""  # three words: not searched


def test_rekv_takes_what_stands_before_the_bracket():
    assert [letter_of(r) for r in ("B) a dog", "C", "", "(D) x", ") odd")] == ["B", "C", "", "D", ")"]
