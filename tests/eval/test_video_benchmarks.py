"""MLVU, EgoSchema, StreamingBench and ReKV's files: loading, prompts, scores."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from videos import write

from mmkv.eval.media import Media
from mmkv.eval.sampling import Sampling
from mmkv.eval.video_mme import egoschema, mlvu, rekv, streamingbench

FOUR = Sampling(frames=4)


def rows_of(task, responses):
    out = []
    for sample, response in zip(task.samples(), responses):
        head = dict(method="dense", id=sample.id, group=sample.group, facts=dict(sample.facts), target=sample.target)
        out.append(head | task.score(sample, response) | dict(response=response))
    return out


def text_of(task, number=0):
    prompt = task.prompt(task.samples()[number], Media())
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["video", "text"]
    return prompt.messages[0]["content"][1]["text"], prompt


# --- MLVU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlvu_folder(tmp_path):
    rows = [dict(video_name="ego_1.mp4", question="Where?\n(A) here\n(B) there", answer="B", task_type="ego")]
    rows += [dict(video_name=f"c{n}.mp4", question=f"How many? {n}", answer="A", task_type="count") for n in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    for row in rows[:3]:
        write(tmp_path / row["video_name"], count=4)
    return tmp_path


def test_mlvu_means(mlvu_folder):
    # two tasks with 1 of 1 and 0 of 3: 50 over the two, 100 / 7 over the seven of the dev set, 25 over the questions
    task = mlvu.MLVU(mlvu_folder, FOUR)
    head = task.summary(rows_of(task, ["B) there", "B", "C", "x"]))["headline"]
    assert head == dict(m_avg=50.0, m_avg_lmms=pytest.approx(100 / 7), accuracy=25.0)
    test = mlvu.MLVU(mlvu_folder, FOUR, split="test")
    assert test.summary(rows_of(task, ["B", "B", "C", "x"]))["headline"]["m_avg_lmms"] == pytest.approx(100 / 9)


def test_mlvu_prompt_and_missing_video(mlvu_folder):
    task = mlvu.MLVU(mlvu_folder, FOUR)
    assert text_of(task)[0] == "Where?\n(A) here\n(B) there\nOnly give the best option.\nBest option: ("
    assert [s.skipped for s in task.samples()] == [None, None, None, "missing video: c2.mp4"]
    with pytest.raises(ValueError, match="possible are dev, test"):
        mlvu.MLVU(mlvu_folder, FOUR, split="val")
    with pytest.raises(ValueError, match="'generate' alone"):
        mlvu.MLVU(mlvu_folder, FOUR, "likelihood")


def test_mlvu_unknown_task_is_named(mlvu_folder):
    test = mlvu.MLVU(mlvu_folder, FOUR, split="test")
    assert all(s.skipped is None or "missing" in s.skipped for s in test.samples())
    row = dict(video_name="c0.mp4", question="?", answer="A", task_type="sportsQA")
    parquet.write_table(pa.Table.from_pylist([row]), mlvu_folder / "test.parquet")
    assert "task_type 'sportsQA'" in mlvu.MLVU(mlvu_folder, FOUR).samples()[0].skipped
    assert test.samples()[0].skipped is None


# --- EgoSchema ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ego_folder(tmp_path):
    options = [f"{c}. C does {c.lower()}{c.lower()}" for c in "ABCDE"]
    rows = [dict(video_idx=f"v{n}", question="What does C do?", option=options, answer=a) for n, a in enumerate("240")]
    rows[2]["answer"] = None
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    (tmp_path / "videos").mkdir()
    for n in range(3):
        write(tmp_path / "videos" / f"v{n}.mp4", count=4)
    return tmp_path


def test_egoschema(ego_folder):
    task = egoschema.EgoSchema(ego_folder, FOUR)
    assert [s.target for s in task.samples()] == ["C", "E", None]
    assert text_of(task)[0] == (
        "What does C do?\nA. C does aa\nB. C does bb\nC. C does cc\nD. C does dd\nE. C does ee"
        "\nAnswer with the option's letter from the given choices directly."
    )
    rows = rows_of(task, ["(C)", "no idea", "D."])
    assert [row["guessed"] for row in rows] == [False, True, False]
    assert rows[1]["answer"] in "ABCDE" and rows[1] == rows_of(task, ["", "no idea", ""])[1]  # seeded: the same again
    assert rows[2]["score"] is None
    found = task.summary(rows)
    assert found["labelled"] == 2 and found["headline"]["guessed"] == pytest.approx(100 / 3)
    assert found["headline"]["accuracy"] == 100 * (1 + (rows[1]["answer"] == "E")) / 2
    submitted = egoschema.submission([*rows, dict(skipped="gone")])
    assert submitted == {"v0": 2, "v1": "ABCDE".index(rows[1]["answer"]), "v2": 3}


# --- StreamingBench -----------------------------------------------------------------------------------------------


def asked(**more):
    told = dict(
        task_type="Clips Summarize", question="What happens?", time_stamp="00:00:31", answer="C",
        options=["A. one", "B. two", "C. three", "D. four"], required_ability="episodic memory",
    )  # fmt: skip
    return told | more


@pytest.fixture
def stream_folder(tmp_path):
    real = [
        dict(time="[0:00:00 - 0:06:00]", video_categories="life", video_path="./videos/sample_1/video.mp4", questions=[
            asked(), asked(time_stamp="00:02:05", options=["one", "two", "three", "four"]), asked(answer="E"),
            asked(time_stamp="later"),
        ])
    ]  # fmt: skip
    (tmp_path / "questions_real.json").write_text(json.dumps(real))
    (tmp_path / "questions_sqa.json").write_text(json.dumps([real]))
    (tmp_path / "videos" / "sample_1").mkdir(parents=True)
    write(tmp_path / "videos" / "sample_1" / "video.mp4", count=40, fps=1)
    return tmp_path


def test_streamingbench_prompt(stream_folder):
    task = streamingbench.StreamingBench(stream_folder / "questions_real.json", FOUR)
    text = (
        "You are an advanced video question-answering AI assistant. You have been provided with some frames from the video and a "
        "multiple-choice question related to the video. Your task is to carefully analyze the video and provide the best "
        "answer to question, choosing from the four options provided. "
        "Respond with only the letter (A, B, C, or D) of the correct option."
        "\n\nQuestion: What happens?\n\nOptions:\nA. one\nB. two\nC. three\nD. four\n\nThe best option is:"
    )
    assert text_of(task)[0] == text
    assert text_of(task, 1)[0] == text  # options that lack their letters get them


def test_streamingbench_windows(stream_folder):
    task = streamingbench.StreamingBench(stream_folder / "questions_real.json", FOUR)
    windows = [(s.data["sampling"].start, s.data["sampling"].end) for s in task.samples()[:2]]
    assert windows == [(0.0, 31.0), (65.0, 125.0)]
    assert not task.shares_media
    clip = task.media(task.samples()[0]).clip
    assert clip.timestamps == (0.0, 10.0, 20.0, 31.0)
    whole = streamingbench.StreamingBench(stream_folder / "questions_real.json", FOUR, context=None)
    assert whole.window(125.0) == (0.0, 125.0)


def test_streamingbench_nested_list_bad_rows_and_first_letter(stream_folder):
    task = streamingbench.StreamingBench(stream_folder / "questions_sqa.json", FOUR)
    found = task.samples()
    assert len(found) == 4 and found[0].skipped is None
    assert "answer is 'E'" in found[2].skipped and "time_stamp 'later'" in found[3].skipped
    rows = rows_of(task, ["C", "", "C", "(C)"])
    rows[2]["target"] = "C"
    assert [row["answer"] for row in rows] == ["C", "", "C", "("]
    rows = [rows[0], rows[1]]
    assert task.summary(rows)["headline"] == dict(accuracy_answered=100.0, accuracy=50.0)
    with pytest.raises(ValueError, match="holds 2 files"):
        streamingbench.StreamingBench(stream_folder, FOUR)


# --- ReKV's files -------------------------------------------------------------------------------------------------


def half(question, answer, prediction):
    """A judge."""
    return 0.5 if prediction else 0.0


def test_rvs_waits_for_a_judge(tmp_path):
    write(tmp_path / "v.mp4", count=20, fps=2)
    talk = [dict(question="who?", answer="a man", start_time=0, end_time=4), dict(question="?", answer="", end_time=1)]
    (tmp_path / "ego4d_oe.json").write_text(
        json.dumps([dict(video_id="v", video_path="data/v.mp4", conversations=talk)])
    )
    task = rekv.RVS(tmp_path, Sampling(fps=rekv.FPS))
    first, second = task.samples()
    assert first.data["sampling"].end == 4.0 and "no answer" in second.skipped
    assert task.media(first).clip.timestamps == (0.0, 2.0, 4.0)
    assert text_of(task)[0] == "who?"
    rows = rows_of(task, ["a woman"])
    assert rows[0]["score"] is None and task.summary(rows)["unscored"] == 1
    told = dict(id="v-0", question="who?", answer="a man", prediction="a woman")
    assert rekv.for_judging([*rows, dict(skipped="x")]) == [told]
    judged = rekv.RVS(tmp_path, Sampling(fps=0.5), judge=half)
    assert rows_of(judged, ["a woman"])[0]["score"] == 0.5
    assert judged.settings()["judge"].endswith("half") and task.settings()["judge"] is None


def test_rekv_choice(tmp_path):
    write(tmp_path / "v.mp4", count=4)
    talk = [
        dict(question="who?", choices=["a man", "a dog"], answer="a dog", question_type="plotQA"),
        dict(question="who?", choices=["a man", "a dog"], answer="a cat", question_type="plotQA"),
    ]
    (tmp_path / "dev_debug_mc.json").write_text(
        json.dumps([dict(video_id="v", video_path="v.mp4", conversations=talk)])
    )
    task = rekv.ReKVChoice(tmp_path, FOUR)
    text, prompt = text_of(task)
    assert text == "Question: who?\nOptions:\n(A) a man\n(B) a dog\nOnly give the best option."
    assert prompt.prefix == "Best option: (" and prompt.choices == {"A": "a man", "B": "a dog"}
    assert [s.target for s in task.samples()] == ["B", None]
    assert "'a cat' is not one of the choices" in task.samples()[1].skipped
    assert rows_of(task, ["B) a dog"])[0]["score"] == 1.0


def test_files_that_are_no_list_are_refused(tmp_path):
    path = tmp_path / "questions_real.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds a dict, not a list"):
        streamingbench.StreamingBench(path, FOUR).samples()
    path.write_text("[{},")
    with pytest.raises(ValueError, match="is not a JSON file"):
        streamingbench.StreamingBench(path, FOUR).samples()
