"""Video-MME: rows, prompts character by character, subtitles, both denominators, and the official file."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from videos import write

from mmkv.eval.media import Clip, Media
from mmkv.eval.sampling import Sampling
from mmkv.eval.video_mme import score
from mmkv.eval.video_mme.prompts import build
from mmkv.eval.video_mme.subtitles import at_frames, at_frames_lmms, read_srt
from mmkv.eval.video_mme.task import VideoMME, choices

QUESTION = "When demonstrating the Germany modern Christmas tree is initially decorated with apples, candles and berries, which kind of the decoration has the largest number?"  # noqa: E501
OPTIONS = ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number."]
ROW = dict(
    video_id="001", duration="short", domain="Knowledge", sub_category="Humanity & History", url="", videoID="fFjv93ACGo8",
    question_id="001-1", task_type="Counting Problem", question=QUESTION, options=OPTIONS, answer="C",
)  # fmt: skip
SECOND = ROW | dict(question_id="001-2", task_type="Information Synopsis", answer="A")
THIRD = ROW | dict(question_id="001-3", options=["A. 1.", "B. 4.", "C. 2.", "D. 3."], answer="D")
LETTERS = "Respond with only the letter (A, B, C, or D) of the correct option."


@pytest.fixture
def folder(tmp_path):
    """The official first rows, in the real layout."""
    (tmp_path / "videomme").mkdir()
    (tmp_path / "data").mkdir()
    parquet.write_table(
        pa.Table.from_pylist([ROW, SECOND, THIRD]), tmp_path / "videomme" / "test-00000-of-00001.parquet"
    )
    write(tmp_path / "data" / "fFjv93ACGo8.mp4", count=12)
    return tmp_path


def task_of(folder, **options):
    return VideoMME(folder, Sampling(frames=4), **options)


def test_official_prompt():
    text = build("official", QUESTION, OPTIONS)
    assert text == (
        "Select the best answer to the following multiple-choice question based on the video. " + LETTERS + "\n"
        + QUESTION + "\nA. Apples.\nB. Candles.\nC. Berries.\nD. The three kinds are of the same number.\n"
        "The best answer is:"
    )  # fmt: skip
    assert len(text.split("\n")) == 7


def test_official_prompt_with_subtitles():
    assert build("official", "Q?", OPTIONS, ["one", "two"]) == (
        "This video's subtitles are listed below:\none\ntwo\n"
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        + LETTERS
        + "\nQ?\n"
        + "\n".join(OPTIONS)
        + "\nThe best answer is:"
    )
    assert build("official", "Q?", OPTIONS, []) == build("official", "Q?", OPTIONS)


def test_lmms_prompt_has_a_blank_line_and_names_subtitles_always():
    assert build("lmms", "Q?", OPTIONS) == (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        + LETTERS
        + "\nQ?\n"
        + "\n".join(OPTIONS)
        + "\n\nAnswer with the option's letter from the given choices directly."
    )


def test_lmms_prompt_with_subtitles():
    tail = (
        "\nSelect the best answer to the following multiple-choice question based on the video and the subtitles. "
        + LETTERS
        + "\nQ?\n"
        + "\n".join(OPTIONS)
        + "\nThe best answer is:"
    )
    assert build("lmms", "Q?", OPTIONS, ["one"]) == "This video's subtitles are listed below: \none" + tail
    assert build("lmms", "Q?", OPTIONS, []) == "This video's subtitles are listed below: \n" + tail


def test_vlmeval_prompt():
    assert build("vlmeval", "Q?", OPTIONS) == (
        "\nThese are the frames of a video. Select the best answer to the following multiple-choice question based on the video. "
        + LETTERS
        + "\nQuestion: Q?\n"
        + "\n".join(OPTIONS)
        + "\nAnswer: "
    )


def test_unknown_style_and_plain_with_subtitles_are_refused():
    with pytest.raises(ValueError, match="possible are official, lmms, vlmeval, plain"):
        build("openai", "Q?", OPTIONS)
    with pytest.raises(ValueError, match="no form with subtitles"):
        build("plain", "Q?", OPTIONS, [])


def test_official_rows(folder):
    first, second, third = task_of(folder).samples()
    assert [s.id for s in (first, second, third)] == ["001-1", "001-2", "001-3"]
    assert [s.target for s in (first, second, third)] == ["C", "A", "D"]
    assert first.group == "fFjv93ACGo8" and first.skipped is None
    assert first.facts["sub_category"] == "Humanity & History" and first.facts["task_type"] == "Counting Problem"
    prompt = task_of(folder).prompt(first, Media())
    assert prompt.messages[0]["content"][1]["text"] == build("official", QUESTION, OPTIONS)
    assert prompt.choices == {
        "A": "Apples",
        "B": "Candles",
        "C": "Berries",
        "D": "The three kinds are of the same number",
    }


def test_choices_keep_texts_that_only_look_lettered():
    found = choices(["A. A. Milne.", "blue", "C.S. Lewis", "D. 3.5."])
    assert found == {"A": "A. Milne", "B": "blue", "C": "C.S. Lewis", "D": "3.5"}


def test_missing_video_and_corrupt_rows_are_named(folder):
    rows = [
        ROW,
        ROW | dict(question_id="002-1", videoID="gone", video_id="002"),
        SECOND | dict(options=["A. x", "B. y"]),
        THIRD | dict(answer="E"),
        ROW,
        ROW | dict(question_id=None),
        ROW | dict(question_id="003-1", duration="tiny"),
    ]
    path = folder / "videomme" / "test-00000-of-00001.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    found = {s.id: s.skipped for s in task_of(folder).samples()}
    assert len(found) == len(rows)
    assert found["001-1"] is None
    assert found["002-1"] == "missing video: gone.mp4"
    assert "options are ['A. x', 'B. y'], not four texts" in found["001-2"]
    assert "answer is 'E'" in found["001-3"]
    assert "'001-1' is there twice" in found["001-1 (row 4)"]
    assert "question_id is None" in found["row 5"]
    assert "duration is 'tiny'" in found["003-1"]


def test_files_that_are_no_data_are_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such data folder"):
        task_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no file"):
        task_of(tmp_path / "empty")
    (folder / "videomme" / "test-00000-of-00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        task_of(folder).samples()
    parquet.write_table(pa.Table.from_pylist([{"question": "x"}]), folder / "videomme" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="no column video_id"):
        task_of(folder).samples()


def test_durations_are_chosen_and_refused(folder):
    assert task_of(folder, durations=("long",)).samples() == []
    with pytest.raises(ValueError, match="possible are short, medium, long"):
        task_of(folder, durations=("huge",))


SRT = """1
00:00:00,000 --> 00:00:02,000
<font color="white" size=".72c">first line</font>

2
00:00:02,000 --> 00:00:04,500
<font color="white" size=".72c">second</font>
<font color="white" size=".72c">goes on</font>

3
00:00:03,000 --> 00:00:06,000
plain third

4
00:01:00,250 --> 00:01:02,000
late
"""


def test_subtitles_cover_the_frames_and_are_no_more_than_them(tmp_path):
    path = tmp_path / "a.srt"
    path.write_text(SRT.replace("\n", "\r\n"))
    lines = read_srt(path)
    assert [(line.start, line.end) for line in lines] == [(0.0, 2.0), (2.0, 4.5), (3.0, 6.0), (60.25, 62.0)]
    assert at_frames(lines, [0.5, 1.0, 2.0]) == ["first line", "second goes on"]
    assert at_frames(lines, [3.5]) == ["plain third"]  # two are shown, one frame gives one line
    assert at_frames(lines, [10.0]) == []


def test_lmms_subtitles_need_the_white_tag(tmp_path):
    path = tmp_path / "a.srt"
    path.write_text(SRT)
    # 10 frames a second, 63 s: 32 frames at every 20th; frames 0, 20, 40, 60 ... and 609 show lines 1, 2, 2 and 3, none, 4
    assert at_frames_lmms(read_srt(path), 630, 10.0) == ["first line", "second"]


def test_a_file_that_is_no_subtitle_file_is_refused(tmp_path):
    path = tmp_path / "a.srt"
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a subtitle file"):
        read_srt(path)
    path.write_text("")
    assert read_srt(path) == []


def test_subtitles_come_into_the_prompt(folder):
    (folder / "subtitle").mkdir()
    clip = Clip(np.zeros((4, 8, 8, 3), np.uint8), 1.0, (0.0, 1.0, 2.0, 3.5), 40, 4.0, "pyav")
    text = {}
    for style in ("official", "lmms"):
        task = task_of(folder, subtitles=True, style=style)
        sample = task.samples()[0]
        without = task.prompt(sample, Media(clip)).messages[0]["content"][1]["text"]
        (folder / "subtitle" / "fFjv93ACGo8.srt").write_text(SRT)
        text[style] = (without, task.prompt(sample, Media(clip)).messages[0]["content"][1]["text"])
        (folder / "subtitle" / "fFjv93ACGo8.srt").unlink()
    assert text["official"][0] == build("official", QUESTION, OPTIONS)
    assert text["official"][1] == build("official", QUESTION, OPTIONS, ["first line", "second goes on", "plain third"])
    assert text["lmms"][0].startswith("This video's subtitles are listed below: \nNo subtitles available\nSelect")
    assert text["lmms"][1].startswith("This video's subtitles are listed below: \nfirst line\nsecond\nSelect")


def rows_of(folder, responses, **options):
    """Rows as the runner writes them."""
    task = task_of(folder, **options)
    out = []
    for sample, response in zip(task.samples(), responses):
        head = dict(method="dense", id=sample.id, group=sample.group, facts=dict(sample.facts), target=sample.target)
        out.append(head | task.score(sample, response) | dict(response=response))
    return task, out


def test_both_denominators(folder):
    # responses C, nothing, D; answers C, A, A: one of two answered is right, one of three asked
    task, rows = rows_of(folder, ["C", "I do not know", "D"])
    rows[2] |= dict(target="A", correct=False, score=0.0)
    head = task.summary(rows)["headline"]
    assert head["accuracy_answered"] == 50.0
    assert head["accuracy"] == pytest.approx(100 / 3)
    assert head["unanswered"] == pytest.approx(100 / 3)
    by = task.summary(rows)["by"]
    assert by["task_type"] == {
        "Counting Problem": {"n": 2, "score": 0.5},
        "Information Synopsis": {"n": 1, "score": 0.0},
    }
    assert by["duration"] == {"short": {"n": 3, "score": pytest.approx(1 / 3)}}
    assert task.summary(rows)["by_answered"]["task_type"]["Counting Problem"] == {"n": 2, "score": 0.5}


def test_extractors_differ(folder):
    assert rows_of(folder, ["I think it is B because A is wrong"])[1][0]["answer"] == "B"
    assert rows_of(folder, ["I think it is B because A is wrong"], extractor="lmms")[1][0]["answer"] == "A"
    with pytest.raises(ValueError, match="possible are official, lmms"):
        task_of(folder, extractor="regex")


def test_official_file(folder):
    _, rows = rows_of(folder, ["C.", "A", "x"])
    gone = dict(method="dense", id="002-1", group="gone", facts=dict(video_id="002", duration="short"), target="A")
    found = score.official_json([*rows, gone | dict(skipped="missing video: gone.mp4")])
    assert [entry["missing"] for entry in found] == [False, True]
    assert list(found[0]) == ["video_id", "duration", "domain", "sub_category", "missing", "questions"]
    assert found[0]["questions"][0] == dict(
        question_id="001-1", task_type="Counting Problem", question=QUESTION, options=OPTIONS, answer="C", response="C."
    )
    assert json.loads(json.dumps(found)) == found


def test_settings_change_with_everything_that_matters(folder):
    first = task_of(folder).settings()
    assert first["frames"] == 4 and first["style"] == "official" and len(first["data"]) == 16
    assert task_of(folder, extractor="lmms").settings() != first
    parquet.write_table(pa.Table.from_pylist([ROW]), folder / "videomme" / "test-00000-of-00001.parquet")
    assert task_of(folder).settings()["data"] != first["data"]
