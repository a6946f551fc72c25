"""The bundled tiny agent's format: UI-TARS' answers, and turns of a screenshot with one clause of the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmkv.agents.action import PastStep
from mmkv.agents.formats import image, register, text
from mmkv.agents.ui_tars import UITars

THEN = ", then "


@register
@dataclass(frozen=True)
class Tiny(UITars):
    """The tiny agent: it does not plan, so each step is given its clause of "click the star, then scroll down, then finish".

    Step `k` is asked the `k`-th clause, and the last one from there on; an instruction of one clause is asked at every step.

    Args:
        resize, prompt, language, factor: as in `UITars`; there is no prompt, so `prompt` and `language` are unused.
    """

    name: ClassVar[str] = "tiny"

    @classmethod
    def suits(cls, config) -> bool:
        return False  # its config.json says its format

    def messages(self, instruction: str, steps: Sequence[PastStep], screenshot) -> list[dict]:
        clauses = instruction.split(THEN)
        turns = []
        for k, step in enumerate([*steps, PastStep(screenshot)]):
            seen = [] if step.screenshot is None else [image(step.screenshot)]
            turns.append({"role": "user", "content": [*seen, text(clauses[min(k, len(clauses) - 1)])]})
            turns.append({"role": "assistant", "content": [text(step.response)]})
        return turns[:-1]
