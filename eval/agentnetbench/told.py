"""A ground-truth step in the words that an agent would have answered with, for a history that it reads as its own."""

from __future__ import annotations

from collections.abc import Sequence

from mmkv.agents import PastStep, Resize
from mmkv.eval.agentnetbench.data import Step, Target

CALLS = {"click": "click", "doubleclick": "left_double", "rightclick": "right_single", "moveto": "hover"}


def told_step(step: Step, size: tuple[int, int], resize: Resize, screenshot: object = None) -> PastStep:
    """The step as the annotator described it.

    Args:
        step: of a trajectory.
        size: width and height of its screenshot; (0, 0) where that is missing, points are then thousandths.
        resize: how the agent's processor sizes it, as the agent writes pixels of the resized picture.
        screenshot: what stands for the picture in the prompt, None for none.
    """
    said = step.monologue
    return PastStep(
        screenshot,
        f"Thought: {said['thought']}\nAction: {ui_tars_calls(step.targets, size, resize)}",
        said["thought"],
        said["low_level_instruction"],
        said["observation"],
        step.action,
    )


def ui_tars_calls(targets: Sequence[Target], size: tuple[int, int], resize: Resize) -> str:
    """The actions in UI-TARS' grammar, a blank line between two: moveTo and dragTo are a drag, moveTo and scroll a scroll."""
    calls: list[str] = []
    start: Target | None = None
    for target in targets:
        if target.type == "moveto":
            calls += [] if start is None else [_call(start, None, size, resize)]
            start = target
            continue
        if start is not None and target.type not in ("dragto", "scroll"):
            calls.append(_call(start, None, size, resize))
            start = None
        calls.append(_call(target, start, size, resize))
        start = None
    return "\n\n".join(calls if start is None else [*calls, _call(start, None, size, resize)])


def _call(target: Target, start: Target | None, size: tuple[int, int], resize: Resize) -> str:
    if target.type == "dragto":
        begin = _point((start or target).value, size, resize)
        return f"drag(start_point='{begin}', end_point='{_point(target.value, size, resize)}')"
    if target.type == "scroll":
        place = _point(start.value if start else (0.5, 0.5), size, resize)
        return f"scroll(point='{place}', direction='{'up' if target.value > 0 else 'down'}')"
    if target.type == "write":
        return f"type(content={target.value!r})"
    if target.type in ("press", "hotkey"):
        return f"hotkey(key='{' '.join(target.value).lower()}')"
    if target.type == "terminate":
        return f"finished(content='{target.value}')"
    if target.type == "tripleclick":
        return "\n\n".join([f"left_double(point='{_point(target.value, size, resize)}')"] * 2)
    return f"{CALLS[target.type]}(point='{_point(target.value, size, resize)}')"


def _point(point: tuple[float, float], size: tuple[int, int], resize: Resize) -> str:
    x, y = resize.pixels(point, size) if all(size) else (1000 * point[0], 1000 * point[1])
    return f"<point>{round(x)} {round(y)}</point>"
