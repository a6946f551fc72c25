"""The command `mmkv`: what it prints, and one line with exit code 2 for everything a person can get wrong."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import videos
from rich.console import Console

from mmkv import _doctor, _inputs, cli
from mmkv.models import tiny
from mmkv.models.tiny import build


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Consoles that wrap nothing, whatever COLUMNS said when the module was imported."""
    monkeypatch.setattr(cli, "out", Console(width=1000))
    monkeypatch.setattr(cli, "err", Console(width=1000, stderr=True))


@pytest.fixture
def mmkv_command(capsys, monkeypatch):
    """Call with arguments: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmkv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        seen = capsys.readouterr()
        return stopped.value.code or 0, seen.out, seen.err

    return call


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return build.make_model(), build.make_processor()


@pytest.fixture
def quick(monkeypatch, untrained):
    """The bundled model's architecture without its weights: quick, and enough for the mechanics."""
    monkeypatch.setattr(tiny, "load", lambda *_, **__: untrained)
    monkeypatch.setattr("mmkv.models.tiny.answer.unknown_words", lambda processor, question: [])


@pytest.fixture
def clip(tmp_path):
    return videos.write(tmp_path / "clip.mp4", count=40, fps=10)


def test_version(mmkv_command):
    import mmkv

    assert mmkv_command("--version") == (0, f"mmkv {mmkv.__version__}\n", "")


def test_methods_lists_all(mmkv_command):
    import mmkv

    code, out, _ = mmkv_command("methods")
    assert code == 0
    assert all(entry.name in out and entry.paper in out for entry in mmkv.methods())
    assert all(name in out for name in mmkv.presets())


def test_doctor(mmkv_command, monkeypatch):
    code, out, _ = mmkv_command("doctor")
    assert code == 0
    assert f"{torch.__version__.split('+')[0]}" in out
    assert all(word in out for word in ("python", "transformers", "device", "kernels", "attend_packed", "pyav"))
    wanted = [_doctor.Requirement("torch>=99"), _doctor.Requirement("nil>1")]
    monkeypatch.setattr(_doctor, "_requirements", lambda: wanted)
    code, out, _ = mmkv_command("doctor")
    assert code == 1
    assert "not supported" in out
    assert "pip install --upgrade 'torch>=99' 'nil>1'" in out


def test_doctor_names_missing_extras(mmkv_command, monkeypatch):
    monkeypatch.setattr(_doctor, "extras", lambda: {"demo": ["gradio"], "dev": []})
    _, out, _ = mmkv_command("doctor")
    assert "demo: gradio missing: pip install 'mmkv[demo]'" in out
    assert "dev: complete" in out


def test_ask_prints_answer_and_report(mmkv_command, quick, clip):
    code, out, err = mmkv_command("ask", clip, "what colour is the square?", "--max-new-tokens", 3)
    assert code == 0, err
    assert "KV cache, resident" in out
    assert "read 8 of 40 frames (2 a second) by decord" in err


def test_ask_compares(mmkv_command, quick, clip, untrained):
    before = {k: v.clone() for k, v in untrained[0].state_dict().items()}
    arguments = "--compare", "--fps", 10, "--max-new-tokens", 3, "--method", "kivi-2"
    code, out, err = mmkv_command("ask", clip, "one?", "two?", *arguments)
    assert code == 0, err
    header, one, two = (next(line for line in out.splitlines() if w in line) for w in ("stock cache", "one?", "two?"))
    assert "kivi-2" in header
    assert one != two
    dense, held = (next(line for line in out.splitlines() if w in line).split("│") for w in ("if dense", "resident"))
    assert dense[2].strip() == dense[3].strip() == held[2].strip() != held[3].strip()
    after = untrained[0].state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert untrained[0].config.get_text_config()._attn_implementation != "mmkv"


@pytest.mark.parametrize("question", ["", "   "])
def test_empty_questions_are_refused(mmkv_command, clip, question):
    code, out, err = mmkv_command("ask", clip, question)
    assert (code, out) == (2, "")
    assert "empty question" in err


def test_unknown_words_are_named(mmkv_command, clip, monkeypatch, untrained):
    monkeypatch.setattr(tiny, "load", lambda *_: untrained)
    code, out, err = mmkv_command("ask", clip, "where is the zebra?")
    assert (code, out) == (2, "")
    assert "'zebra'" in err
    assert "where is the red circle?" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.mp4", "q"], "no such video file: gone.mp4"),
        (["CLIP", "q", "--fps", "1", "--frames", "2"], "not both"),
        (["CLIP", "q", "--frames", "0"], "positive"),
        (["CLIP", "q", "--frames", "41"], "41 frames"),
        (["CLIP", "q", "--method", "vidkw"], "did you mean 'vidkv'"),
        (["CLIP", "q", "--method", "snapkv"], "SnapKV is a method, given in Python as cache=[mmkv.cache.SnapKV(...)]"),
        (["CLIP", "q", "--device", "toaster"], "no device 'toaster'"),
        (["CLIP", "q", "--dtype", "int7"], "no dtype 'int7'"),
        (["CLIP", "q", "--dtype", "int8"], "no dtype 'int8'"),
        (["CLIP", "q", "--model", "/no/such/folder"], "cannot load the model '/no/such/folder'"),
    ],
)
def test_user_errors_are_one_line(mmkv_command, quick, clip, arguments, says):
    code, out, err = mmkv_command("ask", *[str(clip) if a == "CLIP" else a for a in arguments])
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line and not line.startswith("clip.mp4:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("mmkv: ")
    assert says in lines[0]


def test_a_text_file_is_no_video(mmkv_command, tmp_path):
    (tmp_path / "note.mp4").write_text("hello" * 100)
    code, _, err = mmkv_command("ask", tmp_path / "note.mp4", "q")
    assert code == 2
    assert "not a video" in err
    assert "Traceback" not in err


def test_frames_keep_their_times_in_the_inputs(untrained):
    """Qwen2.5-VL's processor gets exactly our frames at exactly our rate; it samples nothing away."""
    model, processor = untrained
    frames = np.zeros((8, 64, 64, 3), np.uint8)
    inputs = _inputs.prepare(model, processor, frames, 1.6, "where?")
    assert inputs["video_grid_thw"][0, 0] == 4
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 / 1.6)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 4 * 16


def test_llava_onevision_inputs(untrained):
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(),
        untrained[1].tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    inputs = _inputs.prepare(untrained[0], processor, np.zeros((5, 48, 80, 3), np.uint8), 1.6, "where?")
    assert inputs["pixel_values_videos"].shape == (1, 5, 3, 32, 32)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 5 * 4 + 1


def test_a_model_without_video_is_refused(untrained):
    with pytest.raises(_inputs.UserError, match="takes no video"):
        _inputs.prepare(untrained[0], object(), np.zeros((2, 8, 8, 3), np.uint8), 1.0, "q")


def test_default_sampling(tmp_path):
    slow = videos.write(tmp_path / "slow.mp4", count=6, fps=1)
    long = videos.write(tmp_path / "long.mp4", count=400, fps=4, size=(32, 32))
    assert len(_inputs.sample(str(slow))) == 6
    assert len(_inputs.sample(str(long))) == _inputs.DEFAULT_FRAMES
    assert len(_inputs.sample(str(long), fps=4)) == 400


def test_demo_answers_right(capsys, monkeypatch):
    """What `make demo` shows: bundled model, real .mp4, at least two right answers of three with either cache."""
    from mmkv.demos import ask as demo

    with pytest.raises(SystemExit) as stopped:
        demo.main()
    out = capsys.readouterr().out
    assert not stopped.value.code
    pairs = out.splitlines()[-1].removeprefix("right answers: ").split("; ")
    for column in (2, 3):
        right = 0
        for pair in pairs:
            question, answer = pair.rsplit("? ", 1)
            row = next(line for line in out.splitlines() if f"{question[:20]}" in line and "│" in line)
            right += answer.split()[0] in row.split("│")[column]
        assert right >= 2
