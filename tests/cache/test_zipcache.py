"""ZipCache against its spec sheet: saliency by hand, who gets which bits, the quantizers, and what decoding does."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import random_models as rm
import torch
from cache_reference import Bare, checked_attention, codes, held, held_by_head, same_codes, unpacked

import mmkv
from mmkv.cache import KIVI, ZipCache
from mmkv.cache.dense import DenseSegment
from mmkv.cache.fill import Fill
from mmkv.layout import TokenLayout

ALL_ROWS = dict(most=None, newest=1.0, random=0.0)


def fill_of(keys, query, old=None, **more) -> Fill:
    n = keys.shape[1]
    return Fill(
        layer=0, layers=1, columns=torch.arange(n), old=n if old is None else old, fresh=n - query.shape[1], keys=keys,
        values=keys, query=query, layout=TokenLayout.text(1, n), protected=torch.zeros(n, dtype=torch.bool), **more,
    )  # fmt: skip


def blank(n, new=None, group=2) -> Fill:
    """Keys of zeros: every row spreads its attention evenly over what it sees."""
    return fill_of(torch.zeros(1, n, 4), torch.zeros(group, n if new is None else new, 4))


# --- saliency


@pytest.mark.parametrize("normalize", ["paper", "official"])
def test_uniform_attention_over_all_rows(normalize):
    """a_i = sum over rows r >= i of 1 / (r + 1) falls fast, a_i / (L - i) slowly, and ends at 1 / L."""
    n = 50
    score = ZipCache(normalize=normalize, **ALL_ROWS).score(blank(n))[0] / 2  # two query heads alike
    plain = torch.tensor([sum(1 / (r + 1) for r in range(i, n)) for i in range(n)])
    wanted = plain / torch.tensor([n - i for i in range(n)])
    assert torch.allclose(score, wanted, rtol=1e-5)
    assert score[-1] == pytest.approx(1 / n)
    assert score[0] / score[-1] < 5 < 200 < plain[0] / plain[-1]


def test_a_list_of_probes_is_divided_by_the_probes_that_see():
    """Eight rows, the last two are probes: 1/7 and 1/8 of the mass on each key they see."""
    keep = dict(newest=0.25, random=0.0)
    both = 1 / 7 + 1 / 8
    paper = ZipCache(normalize="paper", **keep).score(blank(8, group=1))[0]
    assert paper.tolist() == pytest.approx([both / 2] * 7 + [1 / 8])
    official = ZipCache(normalize="official", **keep).score(blank(8, group=1))[0]
    assert official.tolist() == pytest.approx([both / (8 - i) for i in range(7)] + [1 / 8])
    assert official[6] / official[0] > 3.9  # late tokens favoured, where the paper's formula sees them alike


def test_rows_of_this_forward_alone_are_probes():
    """A second turn: six tokens were there, of the four new rows all see those."""
    official = ZipCache(normalize="official", **ALL_ROWS).score(blank(10, new=4, group=1))[0]
    plain = [sum(1 / (r + 1) for r in range(max(i, 6), 10)) for i in range(10)]
    assert official.tolist() == pytest.approx([m / (10 - max(i, 6)) for i, m in enumerate(plain)])


def test_query_heads_of_a_group_are_summed():
    keys, query = torch.randn(2, 12, 4), torch.randn(6, 12, 4)
    got = ZipCache(**ALL_ROWS).score(fill_of(keys, query, scale=0.5))
    for head in range(2):
        total = torch.zeros(12, dtype=torch.float64)
        for q in query[3 * head : 3 * head + 3].double():
            for r in range(12):
                total[: r + 1] += (0.5 * q[r] @ keys[head, : r + 1].double().T).softmax(0)
        wanted = total / torch.tensor([12 - i for i in range(12)])
        assert torch.allclose(got[head].double(), wanted, rtol=1e-4)


def test_random_probes_follow_the_seed(monkeypatch):
    seen = []
    original = Fill.mass
    monkeypatch.setattr(Fill, "mass", lambda self, rows: (seen.append(rows), original(self, rows))[1])
    for seed in (0, 0, 1):
        ZipCache(seed=seed).score(blank(400))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    for rows in seen:  # 5 % newest, 5 % of the others
        assert rows[-20:].tolist() == list(range(380, 400))
        assert len(rows) == len(rows.unique()) == 40
        assert rows[:20].max() < 380


def test_many_rows_are_probed_in_pieces(monkeypatch):
    keys, query = torch.randn(1, 60, 8), torch.randn(2, 60, 8)
    whole = ZipCache(**ALL_ROWS).score(fill_of(keys, query))
    monkeypatch.setattr(sys.modules["mmkv.kernels.probe"], "TILE_SCORES", 2 * 60 * 7)
    assert torch.allclose(whole, ZipCache(**ALL_ROWS).score(fill_of(keys, query)), rtol=1e-5)


# --- who gets which bits


def places(layer, row=0, head=0) -> dict[int, set]:
    """Format (DENSE = -1) -> logical positions of what one head stores there."""
    found = {s.role: set(unpacked(s, row, head)[0].tolist()) for s in layer.packed}
    for s in layer.segments:
        if isinstance(s, DenseSegment):
            r = row * s.heads + head
            found[-1] = set(s.positions[s.offsets[r] : s.offsets[r + 1]].tolist())
    return found


def salient_by_hand(keys, query, old, ratio, scale) -> set:
    """Naive: all rows as probes, mass over rows that see, the best of the first `old`."""
    n = keys.shape[0]
    total = torch.zeros(n, dtype=torch.float64)
    for q in query.double():
        for r in range(n):
            total[: r + 1] += (scale * q[r] @ keys[: r + 1].double().T).softmax(0)
    score = total / torch.arange(n, 0, -1)
    return set(score[:old].topk(round(ratio * old)).indices.tolist())


@pytest.mark.parametrize("high", [4, 8, 16])
def test_each_head_chooses_its_own(high):
    method = ZipCache(high=high, group=32, **ALL_ROWS)
    bare, queries = Bare(method), torch.randn(1, 4, 132, 16)
    bare.feed(132, queries=queries)
    low = 0 if high == 16 else 1
    chosen = []
    for head in range(2):
        wanted = salient_by_hand(bare.keys[0][0, head], queries[0, 2 * head : 2 * head + 2], 100, 0.6, 16**-0.5)
        found = places(bare.layer, head=head)
        assert found == {low - 1: wanted, low: set(range(100)) - wanted}
        chosen.append(wanted)
        at, keys, _, packed = held_by_head(bare.layer, 0, head)
        if high == 16:  # not a bit is lost
            assert set(at[packed].tolist()) == set(range(100)) - wanted
            assert torch.equal(keys[~packed], bare.keys[0][0, head][at[~packed]].double())
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize(("ratio", "bits"), [(1.0, 4), (0.0, 2)])
def test_ratio_one_and_zero_are_plain_quantization(ratio, bits):
    """Keys: min-max per channel and group. Values: divided by sqrt(max |v|) of the channel, then min-max per token."""
    bare = Bare(ZipCache(ratio=ratio, group=32), dim=32)
    bare.feed(96, keys=torch.randn(1, 2, 96, 32) * torch.linspace(0.2, 4, 32))
    assert [s.packer.form.name for s in bare.layer.packed] == [f"zipcache-{bits}"]
    _, keys, values, packed = held(bare.layer, 0)
    assert packed.tolist() == [True] * 64 + [False] * 32

    def rounded(x, axis):
        low = x.amin(axis, keepdim=True).half().double()
        step = ((x.amax(axis, keepdim=True) - low) / (2**bits - 1)).half().double()
        return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low

    k = bare.keys[0][0, :, :64].double().unflatten(1, (2, 32))
    assert (keys[:, :64] - rounded(k, 2).flatten(1, 2)).abs().max() < 1e-5
    v = bare.values[0][0, :, :64].double()
    c = v.abs().amax(1, keepdim=True).sqrt()
    step = (v / c).amax(-1, keepdim=True) - (v / c).amin(-1, keepdim=True)
    error = (values[:, :64] - rounded(v / c, 2) * c).abs() / (c * step)
    assert (error > 1e-5).double().mean() < 1e-3  # a tie of fp32 and fp64 may tip over
    assert error.max() <= 1.01 / (2**bits - 1)


def test_classes_do_not_share_groups_nor_lose_their_balance():
    """Salient and regular tokens are quantized apart; channel factors come from all of them together."""
    bare = Bare(ZipCache(group=32, **ALL_ROWS), heads=1)
    values = torch.randn(1, 1, 132, 16)
    bare.feed(132, values=values)
    high, low = bare.layer.packed
    wanted = values[0, 0, :100].abs().amax(0).sqrt()
    for segment in (high, low):
        assert torch.allclose(segment.packer.value_balance[0, 0], wanted)
        assert segment.packer.key_balance is None
    at, keys, _ = unpacked(low, 0, 0)
    first = at[:32]
    x = bare.keys[0][0, 0][first].double()
    assert (keys[:32] - x).abs().max() <= ((x.amax(0) - x.amin(0)) / 3 / 2 + 5e-3).max()


def test_a_loud_value_channel_hurts_the_others_little():
    """One channel times 100: a per-token range grows by about as much, here by no more than the square root of it."""
    plain = torch.randn(1, 2, 160, 64)
    loud = plain.clone()
    loud[..., 7] *= 100
    others = [c for c in range(64) if c != 7]

    def error(method, values):
        bare = Bare(method, dim=64)
        bare.feed(160, values=values)
        _, _, got, packed = held(bare.layer, 0)
        return (got - values[0].double())[:, packed][..., others].square().mean().sqrt()

    ours, kivi = ZipCache(ratio=1.0, group=32), KIVI(bits=4, group=32, residual=32)
    assert error(ours, loud) < 4 * error(ours, plain)  # measured 2.7
    assert error(kivi, loud) > 15 * error(kivi, plain)  # measured 20.5


def test_true_bits():
    """4 and 2 bits, 0.5 for a key channel's scale and minimum per 64 tokens, 0.25 for a token's over 128 channels."""
    high, low = ZipCache().formats()
    assert high.bits(128) == (4.5, 4.25)
    assert low.bits(128) == (2.5, 2.25)


# --- decoding


def test_decoded_tokens_wait_for_the_interval_and_old_ones_stay_as_they_are():
    bare = Bare(ZipCache(group=32, interval=50))
    bare.feed(132)
    first, blocks = [places(bare.layer, head=head) for head in range(2)], codes(bare.layer)
    factors = [s.packer.value_balance.clone() for s in bare.layer.packed]
    for _ in range(49):
        bare.feed(1)
    assert bare.layer.packed_to == [100]
    assert bare.layer.keys.shape[2] == 81
    queries = torch.randn(1, 4, 1, 16)
    bare.feed(1, queries=queries)
    assert bare.layer.packed_to == [150]
    assert bare.layer.keys.shape[2] == 32
    assert same_codes(blocks, codes(bare.layer))
    assert all(torch.equal(s.packer.value_balance, f) for s, f in zip(bare.layer.packed, factors))
    for head in range(2):
        tail = bare.keys[0][0, head, 100:].double()  # what was dense when the last query came
        mass = sum((16**-0.5 * q[0] @ tail.T).softmax(0) for q in queries[0, 2 * head : 2 * head + 2].double())
        new = {100 + i for i in mass[:50].topk(30).indices.tolist()}
        now = places(bare.layer, head=head)
        assert now[0] == first[head][0] | new
        assert now[1] == first[head][1] | (set(range(100, 150)) - new)
    for _ in range(100):
        bare.feed(1)
    assert bare.layer.packed_to == [250]
    assert same_codes(blocks, codes(bare.layer))


def test_a_long_generation_is_exact_over_what_is_held():
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(120), rm.words(70, 1)])
    with mmkv.wrapped(model, cache=[ZipCache(group=32, interval=20)]), checked_attention() as errors:
        rm.generate(model, given, new=50)
        assert mmkv.report(model).tokens_held == 120 + 70 + 2 * 49
    assert errors


def test_a_deep_crop_keeps_codes_and_goes_on():
    bare = Bare(ZipCache(group=32, interval=40), batch=2)
    bare.feed(200)
    before = [held_by_head(bare.layer, row, head) for row in range(2) for head in range(2)]
    blocks = codes(bare.layer)
    bare.layer.crop(-110)
    for i, (at, keys, values, _) in enumerate(before):
        now = held_by_head(bare.layer, i // 2, i % 2)
        assert torch.equal(now[0], torch.arange(90))
        assert torch.equal(now[1], keys[at < 90])
        assert torch.equal(now[2], values[at < 90])
    assert same_codes(codes(bare.layer), blocks)
    bare.keys[0], bare.values[0] = bare.keys[0][:, :, :90], bare.values[0][:, :, :90]
    for _ in range(80):
        bare.feed(1)
    at, _, _, packed = held_by_head(bare.layer, 1, 0)
    assert torch.equal(at, torch.arange(170))
    assert not packed[-32:].any()


def test_padding_is_in_nothing():
    method = ZipCache(group=32)
    keys, values, queries = (torch.randn(1, h, 150, 16) for h in (2, 2, 4))
    alone = Bare(method).feed(150, keys=keys, values=values, queries=queries)
    valid = torch.ones(1, 190, dtype=torch.bool)
    valid[0, :40] = False
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 40, 0), value=1e4)  # noqa: E731
    padded = Bare(method).feed(190, valid, keys=pad(keys), values=pad(values), queries=pad(queries))
    for head in range(2):
        a, b = held_by_head(alone.layer, 0, head), held_by_head(padded.layer, 0, head)
        assert torch.equal(a[0], b[0] - 40)
        assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))


def test_sixteen_bits_leave_sliding_layers_dense():
    """Nobody chooses there, so nothing is stored at low precision; with fewer bits all of it is at `high`."""
    for high, wanted in ((16, []), (4, ["zipcache-4"])):
        bare = Bare(ZipCache(high=high, group=32), window=300).feed(250)
        assert [s.packer.form.name for s in bare.layer.packed] == wanted
        at, _, _, packed = held(bare.layer, 0)
        assert torch.equal(at, torch.arange(250))
        assert int(packed.sum()) == (192 if wanted else 0)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(ratio=-0.1), dict(ratio=1.1), dict(ratio="0.5"), dict(ratio=True), dict(high=3), dict(high=2), dict(low=4),
        dict(low=16), dict(low=1.58), dict(group=4), dict(group=2.5), dict(residual=16), dict(newest=0), dict(newest=1.5),
        dict(random=-1), dict(random=None), dict(seed=0.5), dict(seed=True), dict(normalize="none"), dict(interval=0),
        dict(interval=None), dict(interval=True), dict(sinks=-1),
    ],
)  # fmt: skip
def test_impossible_settings(wrong):
    with pytest.raises(ValueError) as caught:
        ZipCache(**wrong)
    assert "\n" not in str(caught.value)
    assert "possible are" in str(caught.value) or "needed" in str(caught.value) or "at least" in str(caught.value)


def test_keeping_everything_stores_nothing():
    method = ZipCache().keeping_everything()
    assert method == dataclasses.replace(ZipCache(), ratio=1.0, high=16)
    assert method.formats() == ()
    bare = Bare(method).feed(300)
    assert not bare.layer.segments


def test_a_long_prompt_has_at_most_so_many_probes():
    """5 % and 5 % of 8,000 rows would be 400 each."""
    looked = []

    class Counted(Fill):
        def mass(self, rows):
            looked.append(len(rows))
            return super().mass(rows)

    fill = blank(8000)
    fill.__class__ = Counted
    for most, count in ((64, 128), (10, 20), (None, 800)):
        ZipCache(most=most).score(fill)
        assert looked[-1] == count
    with pytest.raises(ValueError, match="most"):
        ZipCache(most=0)
