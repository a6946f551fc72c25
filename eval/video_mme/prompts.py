"""The texts that Video-MME asks with, character by character as the public code has them."""

from __future__ import annotations

from collections.abc import Sequence

STYLES = ("official", "lmms", "vlmeval", "plain")

_ONLY_LETTER = "Respond with only the letter (A, B, C, or D) of the correct option."
_SELECT = "Select the best answer to the following multiple-choice question based on the video"
_LISTED = "This video's subtitles are listed below:"


def build(style: str, question: str, options: Sequence[str], subtitles: Sequence[str] | None = None) -> str:
    """The text behind the video.

    Args:
        style: "official" (Video-MME's README), "lmms" (lmms-eval's `default` key), "vlmeval" (VLMEvalKit), or "plain" (the
            question alone, for models that know no letters; the options are then compared by likelihood).
        question: as in the data.
        options: four strings that begin with "A. " ...
        subtitles: lines; None asks without them. An empty list is a video that has none: "lmms" then leaves their place empty,
            the others ask as without subtitles.

    Raises:
        ValueError: an unknown style, or one that has no form with subtitles.
    """
    if style not in STYLES:
        raise ValueError(f"prompt style {style!r}: possible are {', '.join(STYLES)}")
    if style == "plain":
        if subtitles is not None:
            raise ValueError("prompt style 'plain' has no form with subtitles; possible are official, lmms, vlmeval")
        return question
    if not subtitles and style != "lmms":
        subtitles = None
    return {"official": _official, "lmms": _lmms, "vlmeval": _vlmeval}[style](question, options, subtitles)


def _official(question: str, options: Sequence[str], subtitles: Sequence[str] | None) -> str:
    """spec: README of MME-Benchmarks/Video-MME."""
    lines = [f"{_SELECT}{'' if subtitles is None else ' and the subtitles'}. {_ONLY_LETTER}"]
    if subtitles is not None:
        lines = [_LISTED, *subtitles, *lines]
    return "\n".join([*lines, question, *options, "The best answer is:"])


def _lmms(question: str, options: Sequence[str], subtitles: Sequence[str] | None) -> str:
    """spec: tasks/videomme of lmms-eval 0.7.3. Its first line names subtitles even where there are none."""
    asked = "\n".join([f"{_SELECT} and the subtitles. {_ONLY_LETTER}", question, *options])
    if subtitles is None:
        return f"{asked}\n\nAnswer with the option's letter from the given choices directly."
    return f"{_LISTED} \n" + "\n".join([*subtitles, asked] if subtitles else ["", asked]) + "\nThe best answer is:"


def _vlmeval(question: str, options: Sequence[str], subtitles: Sequence[str] | None) -> str:
    """spec: dataset/videomme.py of VLMEvalKit, without its text about frames that only frame-by-frame models get."""
    head = "" if subtitles is None else f"\n{_LISTED}\n" + "\n".join(subtitles)
    middle = f"\nThese are the frames of a video. {_SELECT}{'' if subtitles is None else ' and the subtitles'}. {_ONLY_LETTER}\n"
    return head + middle + "\n".join([f"Question: {question}", *options, "Answer: "])
