"""MiKV: who is important, the balancer, the quantizer, and that no token is lost."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from cache_reference import Bare, checked_attention, codes, held, held_by_head, same_codes, unpacked

import mmkv
from mmkv.cache import MiKV


def important_by_hand(bare, queries, head, rows, old, ratio) -> set:
    """Attention of the newest `rows` queries, summed over them and over the query heads, naively."""
    keys = bare.keys[0][0, head].double()
    n = keys.shape[0]
    total = torch.zeros(n, dtype=torch.float64)
    for q in queries[0, 2 * head : 2 * head + 2].double():
        for r in range(n - rows, n):
            total[: r + 1] += (16**-0.5 * q[r] @ keys[: r + 1].T).softmax(0)
    return set(total[:old].topk(round(ratio * old)).indices.tolist())


@pytest.mark.parametrize(("probe_rows", "rows"), [(20, 20), ("all", 112), (1000, 112)])
@pytest.mark.parametrize("high", [8, 4, 16])
def test_the_most_attended_share_is_stored_at_high_bits(high, probe_rows, rows):
    bare, queries = Bare(MiKV(ratio=0.25, high=high, probe_rows=probe_rows)), torch.randn(1, 4, 112, 16)
    bare.feed(112, queries=queries)
    names = [s.packer.form.name for s in bare.layer.packed]
    assert names == ["mikv-2"] if high == 16 else [f"mikv-{high}", "mikv-2"]
    for head in range(2):
        wanted = important_by_hand(bare, queries, head, rows, 80, 0.25)
        low = set(unpacked(bare.layer.packed[-1], 0, head)[0].tolist())
        assert low == set(range(80)) - wanted
        at, keys, values, _ = held_by_head(bare.layer, 0, head)
        assert torch.equal(at, torch.arange(112))  # no token left behind
        if high == 16:
            mine = sorted(wanted)
            assert torch.equal(keys[mine], bare.keys[0][0, head, mine].double())
            assert torch.equal(values[mine], bare.values[0][0, head, mine].double())


def test_the_balancer_by_hand():
    """b = sqrt(max |q| / max |k|) over the prompt, per KV head and channel; every token is stored as k b."""
    loud = torch.ones(16)
    loud[3], loud[9] = 50, 0.02
    keys, queries = torch.randn(1, 2, 112, 16) * loud, torch.randn(1, 4, 112, 16) / loud
    bare = Bare(MiKV()).feed(112, keys=keys, queries=queries)
    for segment in bare.layer.packed:
        for head in range(2):
            q = queries[0, 2 * head : 2 * head + 2].flatten(0, 1).abs().amax(0)
            b = (q / keys[0, head, :80].abs().amax(0)).sqrt()
            assert torch.allclose(1 / segment.packer.key_balance[0, head], b, rtol=1e-4)


@pytest.mark.parametrize(("ratio", "bits"), [(1.0, 8), (1.0, 4), (0.0, 2), (0.0, 1)])
@pytest.mark.parametrize("channel_group", [0, 8])
def test_every_token_has_its_own_range(ratio, bits, channel_group):
    """Asymmetric min-max, round to nearest: |x - x'| <= s / 2, keys in balanced units, values as they are."""
    high, low = (bits, 1) if ratio else (8, bits)
    bare, queries = Bare(MiKV(ratio=ratio, high=high, low=low, channel_group=channel_group)), torch.randn(1, 4, 112, 16)
    bare.feed(112, queries=queries)
    _, keys, values, packed = held(bare.layer, 0)
    assert packed[:80].all()
    c = bare.layer.packed[0].packer.key_balance[0][:, None].double()
    for got, x in ((keys / c, bare.keys[0][0].double() / c), (values, bare.values[0][0].double())):
        got, x = (t[:, :80].unflatten(-1, (-1, channel_group or 16)) for t in (got, x))
        step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
        assert ((got - x).abs() <= step / 2 + 5e-3).all()
        assert ((got - x).abs().amax() > step.min() / 8).all()


def test_balancing_saves_scores_from_outlier_channels():
    """A key channel 30 times louder than the rest, and a query channel likewise: the scores' error falls."""
    loud = torch.ones(64)
    loud[5] = 30
    keys, queries = torch.randn(1, 2, 160, 64) * loud, torch.randn(1, 4, 160, 64) * loud.roll(1)
    ours = Bare(MiKV(ratio=1.0, high=4), dim=64).feed(160, keys=keys, queries=queries)
    plain = ours.layer.packed[0].packer.form
    assert plain.keys.balance == "query_key"
    q = queries[0, :2].double()

    def error(got):
        return ((got[0, :128] - keys[0, 0, :128].double()) @ q.flatten(0, 1).T).square().mean().sqrt()

    x = keys[0, :, :128].double()
    low = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - low) / 15
    unbalanced = ((x - low) / step).round() * step + low
    assert error(held(ours.layer, 0)[1]) < 0.5 * error(unbalanced)


def test_decoded_tokens_join_at_high_bits_and_old_ones_stay():
    bare = Bare(MiKV(ratio=0.5)).feed(112)
    blocks, first = codes(bare.layer), bare.layer.packed[1].held
    factors = [s.packer.key_balance.clone() for s in bare.layer.packed]
    for _ in range(70):
        bare.feed(1)
    assert same_codes(blocks, codes(bare.layer))
    high, low = bare.layer.packed
    # 8 bits and scales for a block of 32 places are more than 8 tokens left as they are: those wait for others
    assert high.tokens == [32 + 64]
    assert bare.layer.dense_segment(role=0, make=False).tokens == [8]
    assert low.held == first
    assert all(torch.equal(s.packer.key_balance, f) for s, f in zip(bare.layer.packed, factors))
    dense = Bare(MiKV(ratio=0.5, high=16)).feed(112)
    for _ in range(70):
        dense.feed(1)
    assert [s.tokens for s in dense.layer.packed] == [[40]]
    assert dense.layer.keys.shape[2] == 32 + 70


def test_closer_than_uniform_low_bits():
    """What the queries look at comes out closer than with the same low bits for all."""
    model = rm.make("qwen2")
    given = rm.inputs(model, [rm.words(240)])
    logits = {}
    step = dict(input_ids=torch.tensor([[30]]))
    for name, method in {"stock": None, "mikv": MiKV(high=16, ratio=0.5), "all low": MiKV(ratio=0.0)}.items():
        with mmkv.wrapped(model, cache=[] if method is None else [method]), torch.no_grad():
            cache = model(**given).past_key_values
            logits[name] = model(**step, past_key_values=cache).logits
    error = {name: float((x - logits["stock"]).norm()) for name, x in logits.items()}
    assert 0 < error["mikv"] < 0.8 * error["all low"]


def test_true_bits_and_what_a_report_says():
    high, low = MiKV().formats()
    assert high.bits(128) == (8.25, 8.25)
    assert low.bits(128) == (2.25, 2.25)
    assert MiKV(channel_group=32).formats()[1].bits(128) == (3.0, 3.0)
    bare = Bare(MiKV(ratio=0.5), dim=128, dtype=torch.bfloat16).feed(2048 + 32)
    segments = sum(t.nbytes for s in bare.layer.packed for t in s.tensors())
    bits = 8 * segments / (2048 * 2 * 2 * 128)
    # 5.25 of codes; a position of 4 bytes for each token and head; tables and balancers
    assert 5.25 + 32 / 256 <= bits < 5.25 + 32 / 256 + 0.1


def test_a_generation_is_exact_over_what_is_held():
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [rm.default_prompt(model, 160), rm.second_prompt(model, 160)])
    with mmkv.wrapped(model, cache=[MiKV(probe_rows="all")]), checked_attention() as errors:
        rm.generate(model, given, new=40)
    assert errors


def test_prompts_shorter_than_the_window_lose_nothing():
    bare = Bare(MiKV()).feed(20)
    assert not bare.layer.segments
    for _ in range(60):
        bare.feed(1)
    at, _, _, packed = held(bare.layer, 0)
    assert at.numel() == 80
    assert int(packed.sum()) == 32
    assert torch.allclose(
        bare.layer.packed[0].packer.key_balance[0], bare.keys[0][0, :, :32].abs().amax(1).sqrt()
    )  # no prompt's queries are known: keys are evened by themselves


@pytest.mark.parametrize(
    "wrong",
    [
        dict(ratio=2), dict(ratio=None), dict(high=3), dict(low=3), dict(low=8), dict(group=0), dict(residual=3),
        dict(probe_rows=0), dict(probe_rows="some"), dict(probe_rows=True), dict(channel_group=-1), dict(sinks=1.5),
    ],
)  # fmt: skip
def test_impossible_settings(wrong):
    with pytest.raises(ValueError) as caught:
        MiKV(**wrong)
    assert "\n" not in str(caught.value)


def test_groups_that_do_not_divide_a_head_are_refused():
    model = rm.make("qwen2")
    with pytest.raises(ValueError, match="does not divide head size"):
        mmkv.wrap(model, cache=[MiKV(channel_group=5)])
