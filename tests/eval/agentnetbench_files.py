"""Trajectories in AgentNetBench's layout, written for tests."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

SIZE = (280, 140)  # multiples of 28: resizing leaves it as it is


def action(kind, boxes=(), **params):
    if "x" in params:
        params = {"position": {"x": params.pop("x"), "y": params.pop("y")}, **params}
    bboxes = [{"category_id": 1, "rel_bbox": box, "abs_bbox": box, "area": 1.0} for box in boxes]
    return {"type": kind, "params": params, "metadata": {"bboxes": bboxes} if bboxes else {}}


def step(number, code, *truth, milestone=False, **more):
    said = {"observation": f"o{number}", "thought": f"t{number}", "low_level_instruction": f"l{number}"}
    return {
        "step_num": number, "image": f"a_{number}.png", "action": code, "milestone": milestone, "inner_monologue": said,
        "ground_truth_actions": list(truth), **more,
    }  # fmt: skip


def record():
    """Five steps: a drag, a hotkey, a click with an alternative, a text, the end; step numbers skip one."""
    press = [action("hotkey", keys=["ctrl", "t"])]
    return {
        "task_id": "a",
        "user_task_description": "please do",
        "high_level_task_description": "do it",
        "steps": [
            step(1, "pyautogui.moveTo(x=0.1, y=0.2)\npyautogui.dragTo(x=0.5, y=0.6, button='left')",
                 action("moveTo", x=0.1, y=0.2), action("dragTo", [[0.45, 0.55, 0.1, 0.1]], x=0.5, y=0.6)),
            step(2, "pyautogui.hotkey(keys=['ctrl', 'c'])", action("hotkey", keys=["ctrl", "c"]), milestone=True),
            step(4, "pyautogui.click(x=0.25, y=0.5)", action("click", x=0.25, y=0.5), alternative_options=[press]),
            step(5, "pyautogui.write(message='ok')\npyautogui.press(keys=['enter'])", action("write", text="ok\n")),
            step(6, "computer.terminate(status='success')", action("terminate", status="success")),
        ],
    }  # fmt: skip


def write_folder(folder: Path, *records, images=True) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for one in records or (record(),):
        (folder / f"{one['task_id']}.json").write_text(json.dumps(one))
        for number, here in enumerate(one["steps"] if images else []):
            Image.new("RGB", SIZE, (40 * number, 0, 0)).save(folder / "images" / here["image"])
    return folder
