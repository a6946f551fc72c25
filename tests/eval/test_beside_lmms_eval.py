"""lmms-eval's own Video-MME functions beside ours, where it is installed (`pip install "mmkv[lmms-eval]"`)."""

from __future__ import annotations

import random

import pytest

from mmkv.eval.video_mme.answers import lmms
from mmkv.eval.video_mme.prompts import build

theirs = pytest.importorskip("lmms_eval.tasks.videomme.utils")

PIECES = (
    "A", "B", "C", "D", "E", "a", "b", "(A)", "(C)", "B.", "D)", "C:", "The answer is", "the best answer is", "My choice is",
    "I choose", "Answer:", "option", ".", ",", "!", '"', "'", "\n", " ", "Because", "A man", "Apple", "Dog", "答案是", "选",
    "정답은", "the correct option is B", "not A", "**C**", " D ", "ABCD", "none", "it could be",
)  # fmt: skip
ASKED = {"pre_prompt": "", "post_prompt": "\nAnswer with the option's letter from the given choices directly."}


def test_the_same_letter_in_many_answers():
    draw = random.Random(0)
    for _ in range(20_000):
        parts = [draw.choice(PIECES) + draw.choice(["", " "]) for _ in range(draw.randint(0, 6))]
        answer = draw.choice(["", " "]).join(parts)
        assert theirs.extract_characters_regex(answer) == lmms(answer), repr(answer)


def test_the_same_prompt_and_score():
    draw = random.Random(1)
    for _ in range(500):
        words = [draw.choice(["a", "b c", "é."]) for _ in range(4)]
        question, right = draw.choice(["What?", "How many {x}?\nline"]), draw.choice("ABCD")
        options = [f"{letter}. {word}" for letter, word in zip("ABCD", words)]
        doc = dict(
            question=question, options=options, answer=right, domain="Knowledge", sub_category="Law",
            task_type="OCR Problems", duration="short", question_id="1-1", videoID="v",
        )  # fmt: skip
        assert theirs.videomme_doc_to_text(doc, ASKED) == build("lmms", question, options)
        response = draw.choice(["A", "B.", "(C)", "D", "x"])
        score = theirs.videomme_process_results(doc, [response])["videomme_perception_score"]
        assert score["pred_answer"] == lmms(response)
        assert score["score"] == float(lmms(response) == right)
