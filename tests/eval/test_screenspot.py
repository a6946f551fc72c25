"""ScreenSpot-v2 and -Pro: files, boxes in both conventions, accuracies by hand, prompts, and what is wrong with a record."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mmkv.agents import get_format
from mmkv.eval.screenspot.data import read_pro, read_v2
from mmkv.eval.screenspot.score import hits, macro
from mmkv.eval.screenspot.task import ScreenSpotPro, ScreenSpotV2

SIZE = (280, 140)  # multiples of 28: resizing leaves it as it is


def v2(kind="text", box=(10, 20, 30, 40), **more):
    return {
        "img_filename": "a.png",
        "instruction": "go",
        "bbox": list(box),
        "data_type": kind,
        "data_source": "ios",
        **more,
    }


def pro(kind="text", group="CAD", **more):
    return {
        "img_filename": "cad/a.png", "instruction": "go", "bbox": [10, 20, 30, 40], "ui_type": kind, "group": group,
        "application": "autocad", "platform": "windows", "img_size": list(SIZE), "id": "x", **more,
    }  # fmt: skip


def write(folder, images="images", **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    for name in ("a.png", "cad/a.png"):
        (folder / images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(folder / images / name)
    return folder


def test_boxes_of_both_sets(tmp_path):
    """[10, 20, 30, 40] takes (40, 60) where it is x, y, width, height, and (30, 40) at most where it is two corners."""
    (first,) = read_v2(write(tmp_path / "v2", screenspot_web_v2=[v2()]))
    (second,) = read_pro(write(tmp_path / "pro", autocad=[pro()]))

    def inside(element, x, y):
        return hits((x / 1000, y / 1000), element.box, (1000, 1000))

    assert inside(first, 40, 60) and not inside(first, 41, 60) and inside(first, 10, 20) and not inside(first, 10, 19)
    assert inside(second, 30, 40) and not inside(second, 31, 40)


def test_layouts(tmp_path):
    files = dict(screenspot_mobile_v2=[v2()], screenspot_desktop_v2=[v2("icon")], screenspot_web_v2=[v2(), v2("icon")])
    found = read_v2(write(tmp_path / "v2", "screenspotv2_image", **files))
    assert [(e.id, e.platform, e.kind) for e in found] == [
        ("screenspot_desktop_v2/0", "desktop", "icon"), ("screenspot_mobile_v2/0", "mobile", "text"),
        ("screenspot_web_v2/0", "web", "text"), ("screenspot_web_v2/1", "web", "icon"),
    ]  # fmt: skip
    assert not any(e.problem for e in found) and found[0].facts == {"data_source": "ios"}
    write(tmp_path / "pro", autocad=[])
    (tmp_path / "pro" / "annotations").mkdir()
    (tmp_path / "pro" / "autocad.json").rename(tmp_path / "pro" / "annotations" / "autocad.json")
    (tmp_path / "pro" / "annotations" / "autocad.json").write_text(json.dumps([pro(instruction_style="action")]))
    (one,) = read_pro(tmp_path / "pro")
    assert not one.problem and one.facts == {"application": "autocad", "group": "CAD", "instruction_style": "action"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (v2(img_filename="gone.png"), "image missing: 'gone.png'"),
        (v2(box=(1, 2, 3)), "record 0: ValueError"),
        (v2("picture"), "type 'picture'; possible are text, icon"),
        ({}, "record 0: KeyError 'bbox'"),
        ("x", "record 0: TypeError"),
    ],
)
def test_broken_records_say_why(tmp_path, record, reason):
    bad, good = read_v2(write(tmp_path, screenspot_web_v2=[record, v2()]))
    assert reason in bad.problem and not good.problem


def test_broken_and_missing_files(tmp_path):
    write(tmp_path, screenspot_web_v2=[v2()], screenspot_mobile_v2={})
    (tmp_path / "screenspot_desktop_v2.json").write_text("{")
    desktop, mobile, web = read_v2(tmp_path)
    assert "not readable" in desktop.problem and "no list" in mobile.problem and not web.problem
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_v2(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="screenspot_"):
        read_v2(tmp_path / "empty")


def test_prompts(tmp_path):
    folder = write(tmp_path, screenspot_web_v2=[v2()])
    task = ScreenSpotV2(folder, agent="ui_tars")
    (sample,) = task.samples()
    turns = task.prompt(sample, task.media(sample)).messages
    assert (
        turns[0]["content"][0]["text"].startswith("You are a GUI agent.")
        and "point='<point>" in turns[0]["content"][0]["text"]
    )
    assert turns[-1] == {"role": "user", "content": [{"type": "image"}]}
    task = ScreenSpotV2(folder, agent="opencua")
    system, asked = task.prompt(sample, task.media(sample)).messages
    assert "Thought:" not in system["content"][0]["text"]
    assert asked["content"] == [{"type": "image"}, {"type": "text", "text": "go"}]


def test_scores_and_accuracies_by_hand(tmp_path):
    """Web: one text right of two, icon right; mobile: text wrong, unreadable icon. Samples 2/5; macro (1/4 + 1/2) / 2."""
    files = dict(screenspot_web_v2=[v2(), v2(), v2("icon")], screenspot_mobile_v2=[v2(), v2("icon")])
    task = ScreenSpotV2(write(tmp_path, **files), agent="opencua")
    hit, miss = "pyautogui.click(x=25, y=40)", "pyautogui.click(x=200, y=40)"
    responses = [miss, "I do not see it", hit, miss, hit]  # mobile first
    rows = [dict(facts=s.facts, **task.score(s, r)) for s, r in zip(task.samples(), responses)]
    assert [row["score"] for row in rows] == [0, 0, 1, 0, 1]
    assert rows[2]["answer"] == pytest.approx([25, 40]) and rows[1]["answer"] is None
    found = task.summary(rows)
    assert found["headline"] == pytest.approx(dict(accuracy=40, text=100 / 3, icon=50, macro=(25 + 50) / 2))
    assert found["accuracies"]["platform"]["mobile"] == dict(n=2, accuracy=0.0, text=0.0, icon=0.0, wrong_format=1)
    assert found["wrong_format"] == 1 and found["by"]["kind"]["icon"] == {"n": 2, "score": 0.5}
    assert macro([]) is None


def test_pro_by_group(tmp_path):
    task = ScreenSpotPro(write(tmp_path, autocad=[pro(), pro("icon", "OS")]), agent=get_format("ui_tars"))
    answers = ["Action: click(point='<point>20 30</point>')", "Action: click(start_box='(200,30)')"]
    rows = [dict(facts=s.facts, **task.score(s, r)) for s, r in zip(task.samples(), answers)]
    found = task.summary(rows)
    assert [row["score"] for row in rows] == [1, 0]
    assert found["accuracies"]["group"]["CAD"]["accuracy"] == 1 and found["accuracies"]["group"]["OS"]["icon"] == 0
    assert found["headline"]["accuracy"] == 50 and set(found["by"]) == {"group", "application", "platform", "kind"}
