"""Which scoring rules are in force: the published ones, the later ones of the same repository, or all that we correct."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """What a scorer does where the first published one (xlang-ai/OpenCUA at 1d70f20) is too mild, too strict or blind.

    Args:
        key_order: keys are compared as a sequence, so order and repeats count; else as a set.
        scroll_amount: a scroll in the wrong direction scores 0, in the right one the smaller amount over the larger; else any
            scroll scores 1.
        surplus: more predicted than true actions scale the score by true / predicted; else surplus actions are free.
        one_name: "triple_click" is "tripleclick", and control, cmd and command are ctrl, on both sides; else names are compared
            as they come.
        one_key: a hotkey of one key is press (UI-TARS has no press), and return is enter, on both sides.
        enter_by_hotkey: a predicted write followed by hotkey(enter) is merged as one followed by press(enter) is.
        in_order: predictions are matched to the true actions in order, with gaps, so that one missing or added action does not
            cost the ones behind it; a true terminate is an action like others, wherever it stands. Else the i-th is compared with
            the i-th, nothing scores where the first type is not among the true ones, and only a terminate in first place counts.
        newline_seen: whether a text ends with a newline is looked at before the text is stripped, so the factor 0.9 on the
            similarity is applied where one text submits and the other does not; else it never is.
    """

    key_order: bool = False
    scroll_amount: bool = False
    surplus: bool = False
    one_name: bool = False
    one_key: bool = False
    enter_by_hotkey: bool = False
    in_order: bool = False
    newline_seen: bool = False


OFFICIAL = Rules()
"""The evaluator that the published numbers were made with (OpenCUA 1d70f20, August 2025)."""

OFFICIAL_2026 = Rules(key_order=True, scroll_amount=True, surplus=True)
"""The same file after OpenCUA pull request 56 (May 2026, commit 60da8b9)."""

CORRECTED = Rules(True, True, True, True, True, True, True, True)
"""The later official rules, and every other quirk fixed: see the fields of `Rules`."""

NAMED = {"corrected": CORRECTED, "official": OFFICIAL, "official-2026": OFFICIAL_2026}
