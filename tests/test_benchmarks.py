"""The benchmark scripts: they import, every method has settings, and what they compute from answers is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import mmkv
from mmkv.cache import KIVI, SnapKV, WaterfillKV, ZipVL
from mmkv.models import tiny

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import accuracy  # noqa: E402
import asking  # noqa: E402
import pareto  # noqa: E402
import points  # noqa: E402


@pytest.fixture(scope="module")
def loaded():
    return tiny.load(dtype=torch.float32)


def asked(loaded, known: bool, frames: int = 16):
    model, processor = loaded
    wanted = asking.questions_of("easy", frames, 0, 3)
    seen = asking.frames_of("easy", frames, 0)
    return asking.prompt(model, processor, seen, [q.text for q in wanted], known), [q.answer for q in wanted]


def test_every_registered_cache_method_is_measured(loaded):
    families = {type(method).__name__ for point in points.points(loaded[0]) for method in point.cache}
    wanted = {m.name for m in mmkv.methods() if m.kind == "cache" and not m.method.next_scale}
    assert families == wanted


def test_a_method_without_settings_is_named(monkeypatch, loaded):
    monkeypatch.delitem(points.SETTINGS, "GEAR")
    with pytest.raises(KeyError, match="no settings for GEAR"):
        points.points(loaded[0])


def test_settings_are_told_apart(loaded):
    every = points.points(loaded[0])
    assert len({(p.family, p.setting) for p in every}) == len({repr(p.cache) for p in every}) == len(every)


@pytest.mark.parametrize("known", [False, True])
def test_both_protocols_answer_over_the_dense_cache(loaded, known):
    prompt, truth = asked(loaded, known)
    model, processor = loaded
    with mmkv.wrapped(model, positions="trained"):
        cache = asking.prefill(model, prompt)
        assert cache.get_seq_length() == prompt.cut
        assert asking.answers(model, processor, prompt, cache) == truth
    words = processor.tokenizer.decode(prompt.ids[0, : prompt.cut])
    assert ("?" in words) == known  # the question is read before the cut or after it
    assert prompt.cut < prompt.ids.shape[1]  # the first word of the answer comes from what is held


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "cache", [(SnapKV(budget=48),), (KIVI(group=32, residual=32), ), (SnapKV(budget=64), WaterfillKV(group=32))]
)  # fmt: skip
def test_a_replay_holds_what_the_forward_does(loaded, known, cache):
    prompt, _ = asked(loaded, known)
    model, _ = loaded
    replay = asking.Replay(model)
    replay.record(prompt)
    with mmkv.wrapped(model, cache=cache, positions="trained"):
        want = asking.prefill(model, prompt)
        bytes_held = mmkv.report(model).kv_bytes
        with replay.playing():
            got = asking.prefill(model, prompt)
        assert mmkv.report(model).kv_bytes == bytes_held
    for one, two in zip(want.layers, got.layers):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
    assert "forward" not in vars(model.model.visual)


def test_sparse_prefill_is_not_replayed():
    assert asking.Replay.allowed((SnapKV(), KIVI()))
    assert not asking.Replay.allowed((ZipVL(),))


def test_scores():
    """Of four answers dense has three right, the method two: one lost, one won, one more lost."""
    found = asking.score(["a", "x", "y", "d"], ["a", "b", "c", "x"], ["a", "b", "c", "d"])
    assert found["accuracy"] == 0.5
    assert found["loss_points"] == 25.0
    assert found["loss_error"] == pytest.approx(100 * 3**0.5 / 4)
    assert found["agreement"] == 0.25


def test_what_was_measured_is_not_measured_again(tmp_path):
    point = points.evicting(SnapKV, 0.25)
    ground = pareto.Ground()
    pareto.Log(tmp_path / "log.jsonl").add(dict(key=ground.key(point, "known", 3)))
    again = pareto.Log(tmp_path / "log.jsonl")
    assert ground.key(points.evicting(SnapKV, 0.25), "known", 3) in again.rows
    for other in (
        ground.key(point, "unknown", 3),
        ground.key(point, "known", 4),
        ground.key(points.evicting(SnapKV, 0.26), "known", 3),
        pareto.Ground(questions=9).key(point, "known", 3),
    ):
        assert other not in again.rows


def numbers(share: float, loss: float) -> dict:
    return dict(
        accuracy=1 - loss / 100, loss_points=loss, loss_error=0.5, agreement=1.0, questions=8, videos=1, kv_bytes=1,
        kv_bytes_dense=1, share=share, kv_bits=2.0, packed_bits=None, tokens=0.5, seconds_per_question=0.1, commits=[],
    )  # fmt: skip


class Made:
    """A `Bench` whose numbers are given: (share, points lost) by family and setting, and for what is measured alone."""

    def __init__(self, known: dict, evicts: float):
        self.known, self.evicts, self.measured = known, evicts, []

    def measure(self, which, protocols, videos):
        self.measured += [p.setting for p in which]

    def row(self, point, protocol, videos):
        return numbers(*self.known.get((point.family, point.setting), (0.1, self.evicts)))


@pytest.mark.parametrize(
    ("evicts", "quantizes", "holds"), [(5.0, 9.0, True), (1.0, 9.0, False), (5.0, 1.0, False), (2.4, 9.0, False)]
)
def test_a_mix_has_to_beat_both_parts(evicts, quantizes, holds):
    small, smaller = points.mix(SnapKV, 164, points.kivi, 2), points.mix(SnapKV, 100, points.kivi, 2)
    one, two = points.kivi(1), points.kivi(2)
    known = {
        (small.family, small.setting): (0.08, 1.0),
        (smaller.family, smaller.setting): (0.05, 1.8),  # within the limit, but not by a standard error, 0.5
        (one.family, one.setting): (0.12, quantizes),  # the smallest that takes at least 8 %
        (two.family, two.setting): (0.18, 0.0),
    }
    bench = Made(known, evicts)
    (found,) = pareto.compose(bench, [points.DENSE, one, two, small, smaller], "unknown", range(2), range(2, 4))
    assert found["holds"] == holds
    assert found.get("holds_on_fresh_videos", False) == holds
    assert all(("fresh" in part) == holds for part in found["parts"])
    assert [part["setting"] for part in found["parts"]] == [small.setting, "8 %", one.setting]
    assert bench.measured[0] == "8 %"


def made_result() -> dict:
    rows = []
    for point, share, loss in (
        (points.DENSE, 1.0, 0.0),
        (points.evicting(SnapKV, 0.25), 0.25, 1.0),
        (points.evicting(SnapKV, 0.05), 0.05, 12.0),
        (points.kivi(2), 0.18, 0.0),
        (points.mix(SnapKV, 164, points.kivi, 2), 0.055, 0.5),
    ):
        about = dict(method=point.family, setting=point.setting, kind=pareto.kind_of(point), cache=repr(point.cache))
        rows.append(about | dict(unknown=numbers(share, loss), known=numbers(share, 0.0)))
    part = dict(method="SnapKV", setting="5 %", chosen_on=numbers(0.05, 12.0), fresh=numbers(0.05, 11.0))
    whole = dict(mix="SnapKV + KIVI", protocol="unknown", holds=True, holds_on_fresh_videos=False, parts=[part])
    none = dict(mix="GUIKV + KIVI", protocol="known", holds=False, why="none is within")
    return dict(split="easy", rows=rows, composition=[whole, none])


def test_tables(capsys):
    pareto.show(made_result())
    out = capsys.readouterr().out
    assert "164 tokens, 2 bits" in out
    assert "12.0 ± 0.5" in out
    assert "yes, not on fresh videos" in out
    assert "none is within" in out


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib: pip install mmkv[bench]")
    import plots

    plots.pareto(made_result(), tmp_path / "plot.png")
    assert 10_000 < (tmp_path / "plot.png").stat().st_size < 150_000


def test_table_of_the_presets():
    row = numbers(0.2, 1.0) | dict(method="dense", video_tokens=1024, packed_bits=2.5)
    assert accuracy.table("easy", [row]).row_count == 1
