"""The letter in a response, as the public scorers find it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

LETTERS = "ABCD"

# Deleted wherever they stand, in this order (spec: eval_your_results.py of thanku-all/parse_answer). The fifth and sixth are two
# phrases each, glued together by a missing comma there: alone, none of the four is deleted.
_OFFICIAL_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is" + "The correct option is",
    "Best answer:" + "Best option:",
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)


def official(response: str) -> str:
    """The first upper-case A, B, C or D behind known phrases; "" where there is none. Video-MME's own rule."""
    text = response.strip()
    for phrase in _OFFICIAL_PHRASES:
        text = text.replace(phrase, "")
    found = re.search(f"[{LETTERS}]", text)
    return found[0] if found else ""


# spec: mcq_extract.py of lmms-eval 0.7.3. Each phrase counts where it stands first, so the longer ones are no repetition.
_LMMS_PHRASES = (
    *(f"{said}answer is" for said in ("", "the ", "the correct ", "correct ", "the best ", "best ", "my ")),
    *(f"{said}option is" for said in ("the correct ", "correct ", "the best ", "best ")),
    *(f"{said}choice is" for said in ("", "the ", "the correct ", "correct ", "my ")),
    "i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
_LMMS_STRIPPED = (",", ".", "!", "?", ";", ":", "'", '"')
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0
_FORMS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))  # priority, how the letter stands


def lmms(response: str, letters: Sequence[str] = LETTERS) -> str:
    """The letter in the most telling form, the last one of that form; "" where there is none. lmms-eval's rule.

    Forms from the most to the least telling: a response that starts with the letter, ends with it, has it behind a phrase such
    as "the answer is"; "(A)", "A.", "A:", "A)", "A "; only where none of these is there, anywhere.
    """
    core = response.strip()
    for sign in _LMMS_STRIPPED:  # one after the other, each once: what a later sign uncovers stays
        core = core.strip(sign)
    if not response.strip():
        return ""
    text, bare = f" {core} ", core.strip()
    found: list[tuple[int, int, str]] = []  # priority, position, letter
    for priority, form in _FORMS:
        found += [(priority, text.rfind(form.format(c)), c) for c in letters if form.format(c) in text]
    found += _behind_phrases(text, letters)
    found += [(_START, 0, c) for c in letters if bare.startswith(c) and not bare[1:2].isalpha()]
    found += [(_END, len(text) - 1, c) for c in letters if bare.endswith(c) and not bare[-2:-1].isalpha()]
    if not found:
        found = [(_ANYWHERE, text.rfind(c), c) for c in letters if c in text]
    return max(found, key=lambda f: f[:2])[2] if found else ""


def _behind_phrases(text: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    """For each phrase's first occurrence, where each letter stands next behind it."""
    small, out = text.lower(), []
    for phrase in _LMMS_PHRASES:
        at = small.find(phrase)
        if at >= 0:
            out += [(_PHRASE, where, c) for c in letters if (where := text.find(c, at + len(phrase))) >= 0]
    return out


EXTRACTORS: dict[str, Callable[[str], str]] = {"official": official, "lmms": lmms}
