"""Every word the tiny agent knows, the clauses it was trained on, and how text becomes words."""

from __future__ import annotations

import re

from mmkv.models.tiny.words import DIGITS, DRAWN_WORDS, EASY_COLOURS, EASY_SHAPES, SPECIAL

COLOURS = EASY_COLOURS
FIELD = "field"
NAMES = [*EASY_SHAPES, *DIGITS, *DRAWN_WORDS, FIELD]
DIRECTIONS = ["up", "down", "left", "right"]
STEP = 8  # px: coordinates are multiples of it
XS = list(range(16, 152, STEP))  # px; 8 is left out, it is a digit
YS = list(range(16, 128, STEP))
SCROLL_AT = (64, 48)  # px: where it scrolls, inside every screen

# kind -> clauses: {c} colour, {n} name, {t} a digit or word to type, {d} direction
CLAUSES = {
    "both": ["click the {c} {n}"],
    "name": ["click the {n}"],
    "colour": ["click the {c} icon"],
    "fill": ["type {t} into the field"],
    "read": ["type the digit"],
    "recall": ["click what was {c}"],
    "recall digit": ["type the digit that was shown"],
    "scroll": ["scroll {d}"],
    "finish": ["finish"],
}
RECALLS = ("recall", "recall digit")  # need an earlier screenshot
CLICKS = ("both", "name", "colour", "fill", "recall")  # end in a place

WORD = re.compile(r"[a-z_]+\([a-z_]+='(?:<point>)?|\d+</point>|'(?:, direction='[a-z]+')?\)|[a-z]+:?|\d+|\S")
GLUE = [  # (what stands between two words after joining with blanks, what the agent grammar wants there)
    ("<point> ", "<point>"), ("=' ", "='"), (" '", "'"), ("thought:", "Thought:"), (" action:", "\nAction:"),
    ("') ", "')\n\n"),
]  # fmt: skip


def words_of(text: str) -> list[str]:
    """Text as words, special tokens left out: lower case, `click(point='<point>` and `40</point>` are one word each."""
    return WORD.findall(text.lower())


def vocabulary() -> list[str]:
    """All tokens, in id order: special tokens, then every word of clauses, thoughts and actions."""
    words = ["user", "assistant", "system", "thought:", "action:", "is", "was", "done", ",", "."]
    words += [*COLOURS, *NAMES, *DIRECTIONS]
    for clause in sum(CLAUSES.values(), []):
        words += [w for w in clause.split() if "{" not in w]
    words += ["click(point='<point>", "scroll(point='<point>", "type(content='", "finished(content='", "')"]
    words += [f"', direction='{d}')" for d in DIRECTIONS]
    words += [*map(str, XS), *(f"{y}</point>" for y in YS)]
    return list(dict.fromkeys(SPECIAL + words))


def say(kind: str, name: str = "", colour: str = "", at: tuple[int, int] | None = None, typed: str = "") -> str:
    """The right answer in the agent grammar.

    Args:
        kind: key of `CLAUSES`.
        name, colour: of the element that it is about.
        at: where it clicks, px.
        typed: what it types, or the direction it scrolls.
    """
    point = "<point>{} {}</point>".format(*(SCROLL_AT if at is None else at))
    if kind == "finish":
        return "Thought: finish\nAction: finished(content='done')"
    if kind == "scroll":
        return f"Thought: scroll {typed}\nAction: scroll(point='{point}', direction='{typed}')"
    thought = f"Thought: the {name} {'was' if kind == 'recall digit' else 'is'} {colour}\nAction: "
    if kind in ("read", "recall digit"):
        return f"{thought}type(content='{name}')"
    click = f"{thought}click(point='{point}')"
    return click + f"\n\ntype(content='{typed}')" if kind == "fill" else click
