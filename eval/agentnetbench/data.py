"""Trajectories of AgentNetBench as they lie on disk: `<task_id>.json` files beside a folder `images/`.

Spec: key layout of the repository xlang-ai/OpenCUA, `evaluation/agentnetbench/sample_data`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTING = ("click", "doubleclick", "rightclick", "tripleclick", "moveto", "dragto")
TYPING = ("write",)
KEYS = ("press", "hotkey")
KNOWN = (*POINTING, *TYPING, *KEYS, "scroll", "terminate")


@dataclass(frozen=True)
class Target:
    """One action that is right at a step.

    Args:
        type: lower-case name, one of `KNOWN`.
        value: (x, y) in 0..1 for pointing, text for write, tuple of keys for press and hotkey, amount for scroll, status
            for terminate.
        boxes: (x, y, width, height) in 0..1 of each box that a pointing action may hit.
    """

    type: str
    value: Any
    boxes: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of a trajectory: a screenshot and what was done there.

    Args:
        index: place in the trajectory's list, from 0; `step_num` of the file may skip numbers.
        step_num: the file's own number; the index where it has none.
        image: the screenshot's path.
        action: pyautogui source with coordinates in 0..1, as the file has it.
        targets: the ground truth actions, in order.
        alternatives: other lists of actions that are right as well.
        milestone: whether the file marks the step so.
        monologue: observation, thought and low_level_instruction; missing ones are empty.
        problem: why the step cannot be asked or scored; empty where it can.
    """

    index: int
    step_num: int | str
    image: Path
    action: str
    targets: tuple[Target, ...]
    alternatives: tuple[tuple[Target, ...], ...]
    milestone: bool
    monologue: dict[str, str]
    problem: str = ""


@dataclass(frozen=True)
class Trajectory:
    """One task: its instruction and its steps.

    Args:
        task_id: the file's `task_id`, its name where it has none.
        instruction: `high_level_task_description`.
        steps: in the file's order; those that cannot be used are among them, with a `problem`.
        problem: why the file cannot be read at all; empty where it can.
    """

    task_id: str
    instruction: str
    steps: tuple[Step, ...]
    problem: str = ""


def read_folder(folder: str | Path, images: str | Path | None = None) -> list[Trajectory]:
    """All trajectories of a folder, by file name; what cannot be read is in the list too, with its reason.

    Args:
        folder: holds the `*.json` files.
        images: holds the screenshots; by default `images/` in the folder.

    Raises:
        FileNotFoundError: no such folder, or no JSON file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the folder of AgentNetBench's *.json files")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no *.json file in {str(folder)!r}; give the folder of AgentNetBench's trajectories")
    place = Path(images) if images is not None else folder / "images"
    return [read_trajectory(file, place) for file in files]


def read_trajectory(file: Path, images: Path) -> Trajectory:
    """One trajectory; a file that is no trajectory comes back without steps and with a `problem`."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Trajectory(file.stem, "", (), f"{file.name}: not readable as JSON: {error}")
    if not isinstance(record, dict) or not isinstance(record.get("steps"), list):
        return Trajectory(file.stem, "", (), f"{file.name}: no list of 'steps'")
    task = str(record.get("task_id") or file.stem)
    instruction = record.get("high_level_task_description") or record.get("instruction") or ""
    if not record["steps"]:
        return Trajectory(task, str(instruction), (), f"{file.name}: no step in 'steps'")
    return Trajectory(task, str(instruction), tuple(_step(i, s, images) for i, s in enumerate(record["steps"])))


def _step(index: int, record: Any, images: Path) -> Step:
    if not isinstance(record, dict):
        return Step(index, index, images, "", (), (), False, {}, f"step {index} is no object")
    image = images / str(record.get("image") or "")
    problem = "" if image.is_file() else f"image missing: {image.name!r}" if record.get("image") else "no 'image' key"
    targets: tuple[Target, ...] = ()
    alternatives: list[tuple[Target, ...]] = []
    try:
        targets = _targets(record.get("ground_truth_actions"))
        alternatives = [_targets(option) for option in record.get("alternative_options") or []]
        if not targets:
            raise ValueError("no ground_truth_actions")
    except ValueError as error:
        problem = problem or str(error)
    monologue = record.get("inner_monologue") or {}
    keys = ("observation", "thought", "low_level_instruction")
    return Step(
        index,
        record.get("step_num", index),
        image,
        str(record.get("action") or ""),
        targets,
        tuple(alternatives),
        bool(record.get("milestone", False)),
        {key: str(monologue.get(key) or "") for key in keys},
        problem,
    )


def _targets(records: Any) -> tuple[Target, ...]:
    if not isinstance(records, list):
        raise ValueError("ground_truth_actions or an alternative is no list")
    return tuple(target(record) for record in records)


def target(record: dict[str, Any]) -> Target:
    """One action of the file as a `Target`.

    Raises:
        ValueError: an unknown type, or parameters that the type needs are missing.
    """
    kind = str(record.get("type", "")).lower()
    params = record.get("params") or {}
    if kind not in KNOWN:
        raise ValueError(f"unknown action type {record.get('type')!r}; possible are {', '.join(KNOWN)}")
    try:
        if kind in POINTING:
            value: Any = (float(params["position"]["x"]), float(params["position"]["y"]))
        elif kind in TYPING:
            value = str(params.get("content") or params["text" if "text" in params else "content"])
        elif kind in KEYS:
            keys = params["keys"]
            value = (keys,) if isinstance(keys, str) else tuple(str(key) for key in keys)
        else:
            value = params["status"] if kind == "terminate" else params.get("amount", 0)
        boxes = tuple(_box(box["rel_bbox"]) for box in (record.get("metadata") or {}).get("bboxes") or [])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"action {kind!r}: {type(error).__name__} {error} in its params or bboxes") from error
    return Target(kind, value, boxes)


def _box(numbers: Any) -> tuple[float, float, float, float]:
    x, y, width, height = (float(number) for number in numbers)
    return x, y, width, height
