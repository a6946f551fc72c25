"""AgentNetBench's files: the layout, optional keys, and everything that can be wrong with them."""

from __future__ import annotations

import json

import pytest
from agentnetbench_files import action, record, write_folder

from mmkv.eval.agentnetbench.data import read_folder, target


def test_layout(tmp_path):
    (trajectory,) = read_folder(write_folder(tmp_path))
    assert (trajectory.task_id, trajectory.instruction, trajectory.problem) == ("a", "do it", "")
    assert [s.index for s in trajectory.steps] == [0, 1, 2, 3, 4]
    assert [s.step_num for s in trajectory.steps] == [1, 2, 4, 5, 6]
    assert not any(s.problem for s in trajectory.steps)
    drag = trajectory.steps[0].targets[1]
    assert (drag.type, drag.value, drag.boxes) == ("dragto", (0.5, 0.6), ((0.45, 0.55, 0.1, 0.1),))
    assert trajectory.steps[1].milestone and not trajectory.steps[0].milestone
    assert trajectory.steps[2].alternatives[0][0].value == ("ctrl", "t") and trajectory.steps[0].alternatives == ()
    assert trajectory.steps[3].monologue["low_level_instruction"] == "l5"


def test_images_may_lie_elsewhere(tmp_path):
    folder = write_folder(tmp_path / "data")
    (folder / "images").rename(tmp_path / "pictures")
    assert not any(s.problem for s in read_folder(folder, tmp_path / "pictures")[0].steps)
    assert all(s.problem.startswith("image missing") for s in read_folder(folder)[0].steps)


def test_optional_keys(tmp_path):
    bare = {"steps": [{"image": "x.png", "ground_truth_actions": [action("click", x=0.1, y=0.2)]}]}
    write_folder(tmp_path, {"task_id": "x", **bare})
    (tmp_path / "x.json").write_text(json.dumps(bare))
    (trajectory,) = read_folder(tmp_path)
    (only,) = trajectory.steps
    assert (trajectory.task_id, trajectory.instruction, only.step_num, only.milestone) == ("x", "", 0, False)
    assert not only.problem and only.monologue["thought"] == "" and only.action == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(image="gone.png"), "image missing: 'gone.png'"),
        (lambda s: s.pop("image"), "no 'image' key"),
        (
            lambda s: s["ground_truth_actions"][0].update(type="teleport"),
            "unknown action type 'teleport'; possible are click",
        ),
        (lambda s: s["ground_truth_actions"][0].update(params={}), "action 'moveto': KeyError"),
        (lambda s: s.update(ground_truth_actions=[]), "no ground_truth_actions"),
        (lambda s: s.update(ground_truth_actions="click"), "is no list"),
        (lambda s: s.update(alternative_options=[[{"type": "jump"}]]), "unknown action type 'jump'"),
        (
            lambda s: s["ground_truth_actions"][1]["metadata"]["bboxes"][0].update(rel_bbox=[1]),
            "action 'dragto': ValueError",
        ),
    ],
)
def test_a_broken_step_says_why_and_the_others_stay(tmp_path, change, reason):
    broken = record()
    write_folder(tmp_path, broken)
    change(broken["steps"][0])
    (tmp_path / "a.json").write_text(json.dumps(broken))
    (trajectory,) = read_folder(tmp_path)
    assert reason in trajectory.steps[0].problem and "\n" not in trajectory.steps[0].problem
    assert len(trajectory.steps) == 5 and not any(s.problem for s in trajectory.steps[1:])


@pytest.mark.parametrize("text", ["{not json", "[]", '{"steps": 3}', '{"steps": []}', "\xff"])
def test_a_broken_file_is_one_problem(tmp_path, text):
    write_folder(tmp_path)
    (tmp_path / "b.json").write_bytes(text.encode("latin-1"))
    good, bad = read_folder(tmp_path)
    assert not good.problem and len(good.steps) == 5
    assert bad.task_id == "b" and bad.steps == () and bad.problem.startswith("b.json: ")


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no \*\.json file"):
        read_folder(tmp_path)


def test_parameters_of_each_type():
    assert target(action("write", content="c", text="t")).value == "c"  # as the official code: content first
    assert target(action("write", content="", text="t")).value == "t"
    assert target(action("write", content="")).value == ""
    assert target(action("press", keys="enter")).value == ("enter",)
    assert target(action("scroll", amount=-54, x=0.5, y=0.5)).value == -54
    assert target(action("TERMINATE", status="failure")).type == "terminate"
