"""The benchmarks of the token methods: they run on tiny settings, and break-evens and shares are what they should be."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import mmkv
from mmkv.models import tiny
from mmkv.tokens import FastV, MustDrop, Uniform, VisionZip

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import asking
import shapes
import token_accuracy
import token_points
import tokens as speed

QUICK = ["--sizes", "64", "128", "--hidden", "128", "--layers", "4", "--rounds", "1", "--budget", "0"]


@pytest.fixture(scope="module")
def loaded():
    return tiny.load(dtype=torch.float32)


@pytest.fixture
def few(monkeypatch):
    """Two settings, a variant and a mix in place of all."""
    half = token_points.TokenPoint("VisionZip", "50 %", (VisionZip(0.4, 0.1),))
    other = token_points.varied(half, "official merge", contextual_merge="official")
    between = token_points.TokenPoint("FastV", "25 %", (FastV(ratio=0.75),))
    mix = [p for p in token_points.mixes() if p.setting in ("dense", "KIVI 2 bits") and p.family != "FastV 25 %"]
    monkeypatch.setattr(token_accuracy, "settings", lambda: [token_points.DENSE, half, between, other])
    monkeypatch.setattr(token_accuracy, "mixes", lambda: mix)
    return mix


# Break-even


def test_break_even_between_two_sizes():
    """1.2 at 256, 0.9 at 1024: two thirds of the way of two doublings on a log scale, 256 * 2^(4/3)."""
    assert speed.break_even([256, 1024], [1.2, 0.9]) == pytest.approx(645.0796, abs=1e-3)
    assert speed.break_even([256, 512, 1024], [1.5, 1.1, 0.9]) == pytest.approx(512 * math.sqrt(2))


def test_break_even_at_the_ends():
    assert speed.break_even([256, 512], [0.9, 0.8]) == 256
    assert speed.break_even([256, 512], [0.9, 1.0]) is None  # not faster at the last
    assert speed.break_even([256, 512, 1024], [0.9, 1.1, 0.9]) == pytest.approx(512 * math.sqrt(2))  # for good


def test_verdict():
    assert speed.verdict([512, 1024, 2048], [1.3, 0.99, 0.6]) == "yes"
    assert speed.verdict([512, 1024, 2048], [0.9, 1.0, 0.6]) == "no"
    assert speed.verdict([256, 512], [0.5, 0.5]) == "-"


def test_ratios_are_taken_within_a_round():
    """The machine is four times slower in the second round; the method takes 3/4 in each."""
    assert speed.against_dense({"dense": [4.0, 16.0, 4.0], "it": [3.0, 12.0, 3.0]}, "it") == 0.75


def test_the_first_round_is_not_counted():
    ran = []
    taken = speed.in_turn({"a": nullcontext, "b": nullcontext}, lambda: ran.append(1), "cpu", rounds=2, budget=0)
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}
    assert len(ran) == 6


# Speed


@pytest.mark.parametrize("name", list(shapes.MODELS))
def test_prompts_have_the_tokens_they_say(name):
    small = dict(shapes.SMALL, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
    model = shapes.make(name, small, "cpu", torch.float32)
    inputs = shapes.video(model, 128)
    newline = name == "LLaVA-OneVision"
    assert int((inputs["input_ids"] == shapes.VIDEO).sum()) == 128 + newline
    with mmkv.wrapped(model, tokens=[Uniform(0.5)]), torch.no_grad():
        model(**inputs, use_cache=True)
        text = shapes.BEFORE + shapes.BEHIND + (2 - 2 * newline)
        assert mmkv.report(model).tokens_per_layer == (text + 64 + newline,) * 2


def test_every_method_halves_what_it_can():
    """On both models each layer behind the drop has half of the vision tokens, but for the method that adapts."""
    settings = speed.halving()
    on_models = {m.name for m in mmkv.methods() if m.kind == "tokens"} - set(token_points.ELSEWHERE)
    assert set(settings) == on_models
    small = dict(shapes.SMALL, hidden_size=128, intermediate_size=128, num_hidden_layers=4)
    model = shapes.make("Qwen2.5-VL", small, "cpu", torch.float32)
    inputs = shapes.video(model, 512)
    for name in settings.keys() - {"PruMerge"}:
        with mmkv.wrapped(model, tokens=settings[name]), torch.no_grad():
            model(**inputs, use_cache=True)
            left = mmkv.report(model).tokens_per_layer[-1] - 66
        assert abs(left - 256) <= 16, name  # DyCoke rounds in each frame


def test_speed_of_decoders(tmp_path):
    out = tmp_path / "tokens.json"
    speed.main([*QUICK, "--parts", "decoders", "--only", "Uniform", "FastV", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["environment"]["torch"] == torch.__version__
    assert len(result["decoders"]) == 2 * 2 * 3  # models, sizes, dense and two methods
    for row in result["decoders"]:
        assert row["seconds"] > 0
        assert 0 < row["tower_seconds"] < row["seconds"]
    halved = [row for row in result["decoders"] if row["method"] == "Uniform" and row["model"] == "Qwen2.5-VL"]
    assert [row["tokens_per_layer"] for row in halved] == [[66 + 32] * 4, [66 + 64] * 4]
    assert all(row["macs_ratio"] < 1 for row in halved)
    assert {(s["model"], s["method"]) for s in result["break_even"]} == {
        (m, n) for m in shapes.MODELS for n in ("Uniform", "FastV")
    }
    assert all(s["faster_from_1k"] == "-" for s in result["break_even"])


def test_speed_of_towers(tmp_path, capsys):
    out = tmp_path / "tokens.json"
    speed.main(
        ["--parts", "towers", "--depth", "2", "--pixels", "224", "--batch", "1", "--rounds", "1", "--budget", "0"]
        + ["--out", str(out)]
    )
    rows = json.loads(out.read_text())["towers"]
    mine = next(row for row in rows if row["method"] == "ToMe, r 13")
    assert mine["tokens_per_block"] == [184, 171]
    assert mine["images_per_second"] > 0
    noting = next(row for row in rows if row["method"] == "VisionZip, notes received attention")
    assert noting["promised"] == 1
    dense = next(row for row in rows if row["method"] == "dense")
    assert (dense["speedup"], dense["promised"]) == (1, 1)
    assert mine["promised"] == pytest.approx(dense["gmacs"] / mine["gmacs"])
    assert "images/s" in capsys.readouterr().out


# Accuracy


def test_every_registered_token_method_is_measured_or_named():
    found = {point.family for point in token_points.settings()} - {"dense"}
    assert found | set(token_points.ELSEWHERE) == {m.name for m in mmkv.methods() if m.kind == "tokens"}


def test_a_method_without_settings_is_named(monkeypatch):
    monkeypatch.delitem(token_points.ELSEWHERE, "ToMe")
    with pytest.raises(KeyError, match="no settings for ToMe"):
        token_points.settings()


def test_settings_are_told_apart():
    every = token_points.settings()
    assert len({(p.family, p.setting) for p in every}) == len({repr(p.tokens) for p in every}) == len(every)
    names = {(p.family, p.setting) for p in every}
    assert all((p.family, p.against) in names for p in every if p.against is not None)


def test_places():
    place = {method: token_points.TokenPoint("", "", (method,)) for method in (Uniform(), FastV(), MustDrop())}
    assert [(p.place, p.blind) for p in place.values()] == [
        ("before the decoder", True), ("between layers", False), ("both", False)
    ]  # fmt: skip


def test_the_tower_reads_a_video_once(loaded):
    """One pass of the tower for three questions gives what three passes give, notes of the tower included."""
    model, processor = loaded
    wanted = asking.questions_of("easy", 16, 0, 3)
    seen = asking.frames_of("easy", 16, 0)
    ready = asking.prompt(model, processor, seen, [q.text for q in wanted], True)
    runs = []
    handle = model.model.visual.register_forward_hook(lambda module, args, out: runs.append(len(args[0])))
    caches = []
    with mmkv.wrapped(model, tokens=[VisionZip(0.4, 0.1)], positions="trained"):
        caches.append(asking.prefill(model, ready))
        with token_accuracy.one_video(model, 3):
            caches.append(asking.prefill(model, ready))
    handle.remove()
    assert runs[0] == 3 * runs[1]
    for one, two in zip(caches[0].layers, caches[1].layers):
        for a, b in zip(one.tensors(), two.tensors(), strict=True):
            torch.testing.assert_close(a, b)
    assert "get_video_features" not in vars(model.model)


def test_accuracy(tmp_path, few, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib: pip install mmkv[bench]")
    options = ["--videos", "1", "--questions", "2", "--frames", "16", "--dtype", "float32"]
    options += ["--log", str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "found.json")]
    token_accuracy.main(options)
    result = json.loads((tmp_path / "found.json").read_text())
    dense, half, between, other = result["rows"]
    assert dense["known"]["tokens_mean"] == dense["unknown"]["tokens_final"] == 1
    assert dense["known"]["accuracy"] == 1
    assert half["known"]["tokens_mean"] == half["unknown"]["tokens_final"] == 0.5
    assert half["unknown"]["kv_share"] == pytest.approx((64 + 4) / (128 + 4))  # four tokens of text around the video
    assert "unknown" not in between
    assert between["known"]["layers"] == [1, 1, 0.25, 0.25, 0.25, 0.25]
    assert between["known"]["tokens_mean"] == pytest.approx(0.5)
    assert other["variant_of"] == "50 %"
    assert [v["setting"] for v in result["variants"]] == ["50 %, official merge"]
    assert [(m["tokens"], m["cache"]) for m in result["mixes"]] == [(p.family, p.setting) for p in few]
    assert result["mixes"][1]["kv_share"] < 1
    assert (tmp_path / "found.png").stat().st_size > 10_000
    lines = (tmp_path / "log.jsonl").read_text()
    token_accuracy.main(options)  # nothing is measured again
    assert (tmp_path / "log.jsonl").read_text() == lines
    assert "tokens x cache" in capsys.readouterr().out
