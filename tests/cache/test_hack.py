"""HACK on heads whose kinds are known: its selections worked out slowly, its budgets, and what it is worth there."""

from __future__ import annotations

from itertools import accumulate

import pytest
import random_models as rm
import torch
from cache_reference import Bare, held_by_head
from next_scale import HALF, SIDES, SIZES, Painter, layout

import mmkv
from mmkv.cache import HACK, KIVI, ScaleStatistics, SnapKV, pipeline
from mmkv.cache.hack import merged_into_nearest
from mmkv.parts.calibration import HeadClasses, Identity

SEEN = list(accumulate(SIZES))
NONE, ALL = ((), (), ()), ((0, 1, 2, 3),) * 3
TINY = Identity("tiny_var", 3, 4)


# --- the rules, slowly


def slow_held(painter: Painter, structural, drop: int, few: int, first_cut: int, probes=32):
    """What each head holds after each scale but the last, by loops: {(scale, layer, head): positions}.

    Args:
        drop, few: percent of what came so far that is dropped on average, and that a contextual head keeps; half of the heads
            are contextual.
        first_cut: the first scale after which something is dropped.
    """
    out, heads = {}, len(structural) * painter.heads
    for layer, queries in enumerate(zip(*painter.queries)):
        for head in range(painter.heads):
            held, total = [], {}
            keys = painter.keys[layer][0, head].double()
            for scale, size in enumerate(painter.sizes[:-1]):
                start = sum(painter.sizes[:scale])
                held += range(start, start + size)
                seen = dict.fromkeys(held, 0.0)
                count = min(probes, size)
                rows = [int((i + 0.5) * size / count) for i in range(count)]
                for q in range(head * painter.group, (head + 1) * painter.group):
                    for row in rows:
                        weights = (queries[scale][0, q, row].double() @ keys[held].T).softmax(0)
                        for at, weight in zip(held, weights.tolist()):
                            seen[at] += weight / painter.group
                for at, weight in seen.items():
                    total[at] = total.get(at, 0.0) + weight
                if scale >= first_cut:
                    least = few * (start + size) // 100
                    if head in structural[layer]:
                        most = ((100 - drop) * (start + size) * heads // 100 - heads // 2 * least) // (heads // 2)
                        rank = [(2 if at < 5 else 1 if at >= start else 0, seen[at], at) for at in held]
                        held = [at for *_, at in sorted(rank, reverse=True)[:most]]
                    else:
                        held = sorted(held, key=lambda at: -total[at])[:least]
                    held = sorted(held)
                out[scale, layer, head] = list(held)
    return out


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    ("drop", "few"), [(70, 10), (50, 20), (80, 10), (85, 15)]
)  # from 80 no room for the latest scale
def test_the_rules(drop, few, group):
    sides = (1, 2, 3, 4, 5, 6, 8, 10)
    method = HACK(HALF, compression=drop / 100, contextual_share=few / 100, scales=len(sides))
    painter, found = Painter(method, sides=sides, group=group), {}
    for scale in range(len(sides) - 1):
        painter.scale(scale)
        found |= {(scale, i, head): painter.held(i, head).tolist() for i in range(3) for head in range(4)}
    first_cut = next(i for i, seen in enumerate(accumulate(painter.sizes)) if (100 - drop) * seen >= 500)
    want = slow_held(painter, HALF, drop, few, first_cut)
    assert found == want
    assert first_cut < 5


def test_a_constant_budget():
    """With the tokens of each scale known, B = 30 % of all before the last scale, and nothing goes before it is exceeded."""
    painter = Painter(HACK(HALF, scales=SIZES))
    mean = 0.3 * SEEN[-2]
    for scale, seen in enumerate(SEEN[:-1]):
        painter.scale(scale)
        lengths = torch.tensor(painter.lengths[scale]).float()
        if seen <= mean:
            assert (lengths == seen).all()
        else:
            assert mean - 1 < lengths.mean() <= mean
    assert SEEN[4] < mean < SEEN[5]


# --- budgets


@pytest.mark.parametrize("structural", [HALF, NONE, ALL, ((3,), (), (0, 1, 2))], ids=["half", "none", "all", "uneven"])
@pytest.mark.parametrize(("compression", "share"), [(0.5, 0.1), (0.7, 0.3), (0.9, 0.05)])
@pytest.mark.parametrize("scales", [None, len(SIZES), SIZES], ids=["unknown", "count", "sizes"])
def test_the_mean_over_heads_is_the_budget(scales, compression, share, structural):
    method = HACK(structural, compression=compression, contextual_share=share, scales=scales)
    painter = Painter(method).paint(len(SIZES) - 1)
    cut = 0
    for scale, seen in enumerate(SEEN[:-1]):
        lengths = torch.tensor(painter.lengths[scale]).float()
        mean = (1 - compression) * (SEEN[-2] if isinstance(scales, tuple) else seen)
        if seen <= mean or mean < 5:
            assert (lengths == seen).all()
        else:
            assert mean - 1 < lengths.mean() <= mean + 1e-4
            cut += 1
    assert cut >= 2


def test_structural_heads_keep_the_first_scales_and_the_latest():
    painter = Painter(HACK(HALF, compression=0.5))
    for scale, seen in enumerate(SEEN):
        painter.scale(scale)
        latest = set(range(seen - SIZES[scale], seen))
        for layer in range(3):
            for head in HALF[layer]:
                held = set(painter.held(layer, head).tolist())
                assert set(range(min(5, seen))) <= held
                assert latest <= held or 0.9 * seen < 5 + len(latest)  # 90 % of 14 is no room for 5 + 9
    assert not all(set(range(5)) <= set(painter.held(layer, head).tolist()) for layer in range(3) for head in (0, 2))


def test_the_last_scale_is_not_compressed():
    known = Painter(HACK(HALF, scales=len(SIZES))).paint()
    unknown = Painter(HACK(HALF)).paint()
    assert known.lengths[:-1] == unknown.lengths[:-1]
    before, after = (torch.tensor(known.lengths[i]) for i in (-2, -1))
    assert (after == before + SIZES[-1]).all()
    assert torch.tensor(unknown.lengths[-1]).sum() < 0.6 * after.sum()


def test_lengths_that_do_not_fit_are_evened_out():
    """One structural head of twelve cannot hold 2.4 times what came: it holds all, and contextual heads the rest."""
    few, many = HACK(((0,), (), ()), compression=0.7).lengths(1000, 5, 11, 1)
    assert (few, many) == ((300 * 12 - 1000) // 11, 1000)
    assert HACK(HALF, compression=0.7).lengths(1000, 5, 6, 6) == (100, 500)
    assert HACK(HALF, compression=0).lengths(1000, 5, 6, 6) == (1000, 1000)


# --- exactness


@pytest.mark.parametrize("scales", [None, SIZES])
def test_no_compression_changes_no_bit(scales):
    plain, painter = Painter(None).paint(), Painter(HACK(HALF, compression=0, scales=scales)).paint()
    for a, b in zip(plain.outputs, painter.outputs):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not any(layer.segments for layer in painter.layers)


def test_attention_is_exact_over_what_is_held():
    painter = Painter(HACK(HALF), batch=2, group=2).paint(5)
    for scale in range(5, len(SIZES)):
        before = {(i, r, h): painter.held(i, h, r) for i in range(3) for r in range(2) for h in range(4)}
        painter.scale(scale)
        new = torch.arange(SEEN[scale - 1], SEEN[scale])
        for (i, r, h), positions in before.items():
            at = torch.cat([positions, new])
            assert at.unique().numel() == at.numel()
            keys, values = painter.keys[i][r, h, at].double(), painter.values[i][r, h, at].double()
            for q in (2 * h, 2 * h + 1):
                want = (painter.queries[scale][i][r, q].double() @ keys.T).softmax(-1) @ values
                assert (painter.outputs[scale][i][r, :, q].double() - want).abs().max() < 1e-5


def test_a_batch_decides_row_by_row():
    """Both halves of guidance keep what each would alone."""
    both = Painter(HACK(HALF), batch=2)
    keys, values, queries = [], [], []
    for scale in range(6):
        both.scale(scale)
        keys.append([k[:, :, -SIZES[scale] :] for k in both.keys])
        values.append([v[:, :, -SIZES[scale] :] for v in both.values])
        queries.append(both.queries[scale])
    for row in range(2):
        alone = Painter(HACK(HALF))
        one = slice(row, row + 1)
        alone.heads_of = lambda i, h, w, one=one, a=alone: tuple(
            t[len(a.outputs)][i][one] for t in (queries, keys, values)
        )
        alone.paint(6)
        for i in range(3):
            for head in range(4):
                assert torch.equal(alone.held(i, head), both.held(i, head, row))


def test_heads_that_share_their_queries_agree():
    one, two = Painter(HACK(HALF), group=1), Painter(HACK(HALF), group=2)
    for scale in range(6):
        one.scale(scale)
        now = scale
        two.heads_of = lambda i, h, w, now=now: (
            one.queries[now][i].repeat_interleave(2, 1), one.keys[i][:, :, -SIZES[now] :], one.values[i][:, :, -SIZES[now] :]
        )  # fmt: skip
        two.scale(scale)
    assert all(torch.equal(one.held(i, h), two.held(i, h)) for i in range(3) for h in range(4))


# --- what it is worth


@pytest.mark.parametrize("scales", [len(SIZES), SIZES], ids=["count", "sizes"])
def test_each_kind_wants_its_rule(scales):
    """At 70 %: better than one rule for all, and far better than the rules swapped (the paper's ablation)."""
    swapped = tuple(tuple(set(range(4)) - set(heads)) for heads in HALF)
    error = {
        name: sum(Painter(HACK(s, scales=scales), sample=i).paint().error for i in range(3))
        for name, s in {"mixed": HALF, "contextual": NONE, "structural": ALL, "swapped": swapped}.items()
    }
    assert error["mixed"] < 0.9 * min(error["contextual"], error["structural"])
    assert error["mixed"] < 0.6 * error["swapped"]


def test_memory_falls_to_the_budget():
    """Keys, values (fp32, 32 channels each), 4 bytes of position for a held token, 4 of attention mass for one ever seen."""
    full = Painter(None).paint(len(SIZES) - 1)
    assert full.bytes == 12 * SEEN[-2] * 256
    painter = Painter(HACK(HALF, scales=SIZES)).paint(len(SIZES) - 1)
    held = int(torch.tensor(painter.lengths[-1]).sum())
    assert painter.bytes == held * (256 + 4) + 12 * SEEN[-2] * 4 + 3 * SEEN[-2] * 4  # and where each is
    assert painter.bytes < 0.33 * full.bytes


def test_merging_by_hand():
    keys = torch.tensor([[[1.0, 0], [0, 2], [2, 0.1], [4, 0], [0, -1]]])
    values = torch.tensor([[[1.0], [2], [3], [5], [7]]])
    kept = torch.tensor([[True, True, False, False, False]])
    dropped = torch.tensor([[False, False, True, True, False]])  # the last was no token at all
    k, v = merged_into_nearest(keys, values, kept, dropped)
    assert torch.allclose(k[0, 0], torch.tensor([7 / 3, 0.1 / 3])) and torch.equal(k[0, 1], keys[0, 1])
    assert torch.allclose(v[0, :2, 0], torch.tensor([3.0, 2.0]))


def test_merging_in_the_last_compression_alone():
    plain, merging = (Painter(HACK(HALF, scales=len(SIZES), merge=m)).paint(len(SIZES) - 1) for m in (False, True))
    assert plain.lengths == merging.lengths
    assert all(torch.equal(a, b) for x, y in zip(plain.outputs, merging.outputs) for a, b in zip(x, y))
    for i in range(3):
        for head in range(4):
            a, b = (held_by_head(p.layers[i], 0, head) for p in (plain, merging))
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1]) == (head in HALF[i])
    # the mean key of everything a head ever had after the last cut is weighed by how many it stands for
    assert merging.paint().error != plain.paint().error


# --- classes


def test_classes_are_found_and_stable():
    """1, 10 and 50 samples, and any of them, give the classes that the heads were made with."""
    found = {}
    statistics = ScaleStatistics()
    for sample in range(50):
        Painter(statistics, sample=sample, sides=SIDES[:6]).paint()
        if sample + 1 in (1, 10, 50):
            found[sample + 1] = statistics.head_classes(0.5, TINY).structural
    assert found == {1: HALF, 10: HALF, 50: HALF}
    assert statistics.variance[0, 0] < 0.01 < 0.1 < statistics.variance[0, 1]


def test_classes_do_not_depend_on_the_order_of_a_batch():
    there, back = ScaleStatistics(), ScaleStatistics()
    Painter(there, sample=1).paint(6)
    Painter(there, sample=2).paint(6)
    Painter(back, sample=2).paint(6)
    Painter(back, sample=1).paint(6)
    assert torch.allclose(there.variance, back.variance, rtol=1e-12)
    apart = [ScaleStatistics(), ScaleStatistics()]
    for sample, statistics in enumerate(apart):  # as the two halves of guidance
        Painter(statistics, sample=sample).paint(6)
    assert apart[0].head_classes(0.5, TINY) == apart[1].head_classes(0.5, TINY)


def test_from_samples_to_a_run(tmp_path):
    statistics = ScaleStatistics()
    Painter(statistics).paint()
    statistics.head_classes(0.5, TINY).save(tmp_path / "classes.json")
    painter = Painter(HACK(HeadClasses.load(tmp_path / "classes.json", TINY))).paint(6)
    assert painter.lengths == Painter(HACK(HALF)).paint(6).lengths


# --- refusals


METHODS = {"unset": HACK(), "set": HACK(((),) * 3), "statistics": ScaleStatistics()}


@pytest.mark.parametrize("method", METHODS)
def test_language_models_are_refused(method):
    for family in ("qwen2", "qwen2_5_vl"):
        with pytest.raises(ValueError, match="visual autoregressive") as caught:
            mmkv.wrap(rm.make(family), cache=[METHODS[method]])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_are_refused(method):
    """Text, an image that is attended to causally, and two scales at once."""
    wrong = layout(0, 2, 2).cat(layout(1, 2, 2))
    feeds = [
        lambda: Bare(METHODS[method]).feed(100),
        lambda: Bare(METHODS[method]).feed(16, chunk=layout(0, 4, 4)),
        lambda: Painter(METHODS[method], sides=((2, 4),), chunk=wrong).scale(0),
    ]
    for feed in feeds:
        with pytest.raises(ValueError, match="scale by scale") as caught:
            feed()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_beside_it_are_refused(method):
    for others in ((METHODS[method], KIVI()), (SnapKV(), METHODS[method])):
        with pytest.raises(ValueError, match="use it alone") as caught:
            pipeline(others)
        assert "\n" not in str(caught.value)


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="needs to know the structural heads"):
        Painter(HACK()).paint(1)


@pytest.mark.parametrize(
    ("structural", "says"),
    [
        (((0,), (1,)), "this model has 3"),
        (((0,), (4,), ()), "no KV head 4"),
        (HeadClasses(Identity("x", 2, 4), ((), ())), "3"),
    ],
)
def test_head_groups_that_do_not_fit(structural, says):
    with pytest.raises(ValueError, match=says) as caught:
        Painter(HACK(structural)).paint(1)
    assert "\n" not in str(caught.value)


def test_what_structural_takes_is_said():
    with pytest.raises(
        ValueError, match=r"^structural 5: needed is for each layer a group of different whole numbers from 0,"
    ):
        HACK(structural=5)


def test_heads_are_checked_against_a_models_shape():
    for method in (HACK(((0,), (3,))), HACK(HeadClasses(Identity("x", 2, 4), ((0,), (3,))))):
        method.check_model(2, 4)
        for layers, heads, says in ((3, 4, "this model has 3"), (2, 3, "no KV head 3")):
            with pytest.raises(ValueError, match=says):
                method.check_model(layers, heads)


@pytest.mark.parametrize(
    "options",
    [
        dict(structural=5), dict(structural=(1, 2)), dict(structural=((-1,),)), dict(structural=((0, 0),)),
        dict(structural=((True,),)), dict(structural=((0.5,),)), dict(compression=1.0), dict(compression=-0.1),
        dict(compression="70%"), dict(compression=True), dict(compression=0.95), dict(contextual_share=0.0),
        dict(contextual_share=0.4), dict(contextual_share=1.5, compression=0), dict(probes=0), dict(probes=1.5),
        dict(scales=1), dict(scales=(4,)), dict(scales=2.5), dict(scales=True), dict(scales=(1, 0)), dict(scales=(1, "4")),
        dict(merge=True), dict(merge=1),
    ],
)  # fmt: skip
def test_impossible_settings(options):
    with pytest.raises(ValueError) as caught:
        HACK(**options)
    assert "\n" not in str(caught.value)
