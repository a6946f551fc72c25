"""A small set in AgentNetBench's exact form, made of the tiny agent's synthetic sessions: real JSON and PNG files.

A seed gives a session and a session gives its files, the same ones on every machine. The seeds are ones that the bundled agent
was never trained on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image

from mmkv.eval.bundled import made_once
from mmkv.models.tiny_agent.sessions import HELD_OUT, Session, Step, make_session
from mmkv.models.tiny_agent.words import RECALLS, SCROLL_AT

OFFSET = 8 * 2**20  # of the seeds, so that this set shares none with other measurements of the agent
SESSIONS, STEPS = 24, 5
CLICKS = 5  # amount of a scroll


def write_set(folder: str | Path, sessions: int = SESSIONS, steps: int = STEPS) -> Path:
    """Write the set: a `*.json` per session and `images/*.png`; files that are there already are written again.

    Args:
        folder: made where it is not there.
        sessions: how many trajectories.
        steps: of each, from 2.

    Returns:
        The folder.

    Raises:
        ValueError: `sessions` or `steps` is no whole number, or too small.
    """
    if type(sessions) is not int or sessions < 1:
        raise ValueError(f"sessions={sessions!r}; possible are whole numbers from 1")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(sessions):
        session = make_session(HELD_OUT + OFFSET + number, steps)
        name = f"tiny_{number:03d}"
        for k, step in enumerate(session.steps):
            Image.fromarray(step.image).save(folder / "images" / f"{name}_{k}.png")
        text = json.dumps(record(name, session), indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return folder


def bundled(folder: Path, sessions: int = SESSIONS) -> Path:
    """The set in a cache folder, made there the first time; what is half made is never taken for whole.

    Args:
        folder: the cache.
        sessions: how many trajectories.
    """
    target = Path(folder) / f"agentnetbench-world-{_version()}-{sessions}"
    return made_once(target, lambda beside: write_set(beside, sessions))


def _version() -> str:
    """A digest that changes with the way in which sessions are made and written down."""
    first = make_session(HELD_OUT + OFFSET, STEPS)
    found = hashlib.sha256(json.dumps(record("", first)).encode())
    for step in first.steps:
        found.update(step.image.tobytes())
    return found.hexdigest()[:8]


def record(name: str, session: Session) -> dict[str, Any]:
    """A session as AgentNetBench writes a trajectory."""
    return dict(
        task_id=name,
        user_task_description=session.instruction,
        high_level_task_description=session.instruction,
        steps=[_step(f"{name}_{k}.png", k, step, session.size) for k, step in enumerate(session.steps)],
        meta_info=dict(seed=session.seed, width=session.size[0], height=session.size[1]),
    )


def _step(image: str, k: int, step: Step, size: tuple[int, int]) -> dict[str, Any]:
    thought = step.task.response.split("\n")[0].removeprefix("Thought: ")
    actions = actions_of(step, size)
    return dict(
        step_num=k + 1,
        image=image,
        action="\n".join(map(_code, actions)),
        milestone=step.task.kind in RECALLS,
        inner_monologue=dict(observation="", thought=thought, low_level_instruction=step.task.clause),
        ground_truth_actions=actions,
        alternative_options=[],
    )


def actions_of(step: Step, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The right actions of a step, points and boxes relative to the screen's `size`."""
    task, out = step.task, []
    if task.kind == "finish":
        return [dict(type="terminate", params=dict(status="success"), metadata={})]
    if task.kind == "scroll":
        sign = 1 if task.response.split("direction='")[1][:-2] in ("up", "right") else -1
        place = dict(x=SCROLL_AT[0] / size[0], y=SCROLL_AT[1] / size[1])
        anywhere = dict(bboxes=[_box((0, 0, *size), size)])
        scroll = dict(type="scroll", params=dict(position=place, amount=sign * CLICKS), metadata=anywhere)
        return [dict(type="moveTo", params=dict(position=place), metadata=anywhere), scroll]
    if task.target is not None:
        # the point that the agent was taught, a multiple of 8 px near the centre: it has no words for others
        place = dict(x=task.target.at[0] / size[0], y=task.target.at[1] / size[1])
        hit = dict(bboxes=[_box(task.target.box, size)])
        out.append(dict(type="click", params=dict(position=place), metadata=hit))
    if task.typed:
        out.append(dict(type="write", params=dict(text=task.typed), metadata={}))
    return out


def _box(box: tuple[float, float, float, float], size: tuple[int, int]) -> dict[str, Any]:
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    relative = [left / size[0], top / size[1], wide / size[0], high / size[1]]
    return dict(category_id=1, rel_bbox=relative, abs_bbox=[left, top, wide, high], area=wide * high)


def _code(action: dict[str, Any]) -> str:
    params, kind = action["params"], action["type"]
    if kind == "terminate":
        return f"computer.terminate(status={params['status']!r})"
    if kind == "write":
        return f"pyautogui.write(message={params['text']!r})"
    if kind == "scroll":
        return f"pyautogui.scroll({params['amount']})"
    return f"pyautogui.{kind}(x={params['position']['x']:.4f}, y={params['position']['y']:.4f})"
