"""Cache methods on Infinity: nothing dropped is no bit changed, memory falls to the budget, what makes no sense is refused."""

from __future__ import annotations

import infinity_tiny as tiny
import pytest
import torch
from cache_reference import held_by_head

import mmkv
from mmkv.cache import (
    GEAR,
    H2O,
    HACK,
    KIVI,
    AdaKV,
    PrefixKV,
    PyramidKV,
    ScaleKV,
    ScaleStatistics,
    SnapKV,
    StreamingLLM,
    VidKV,
    WaterfillKV,
    ZipVL,
    scale_budgets,
    state_of,
)  # fmt: skip
from mmkv.parts.calibration import HeadClasses, Identity, LayerRoles
from mmkv.tokens import FastV

OPTIONS = dict(guidance=1.5, temperature=3.0, seed=0)
IDENTITY = Identity("infinity", 4, 4)
HEADS = HeadClasses(IDENTITY, ((0, 2), (1,), (2, 3), (0, 1, 3)))
ROLES = LayerRoles(IDENTITY, ((), (), (), (), (), (1,), (0, 3)))
BEFORE = 265  # tokens before the last scale, of 521
TOKEN = 2 * 16 * 4  # bytes of a token of a head: key and value of 16 channels


@pytest.fixture(scope="module")
def painter():
    return tiny.lively()


@pytest.fixture(scope="module")
def text():
    return tiny.features((5, 3), seed=1)


@pytest.fixture(scope="module")
def dense(painter, text):
    return painter.generate(text, **OPTIONS)


def painted(painter, text, *methods, **options):
    """With the methods: what was generated, and the report."""
    with mmkv.wrapped(painter, cache=list(methods), **options):
        return painter.generate(text, **OPTIONS), mmkv.report(painter)


# --- nothing dropped


EVERYTHING = {
    "nothing": (), "hack": (HACK(HEADS, compression=0),), "scalekv": (ScaleKV(roles=ROLES, share=1.0),),
    "snapkv": (SnapKV(budget=1.0),), "h2o": (H2O(budget=1.0),), "statistics": (ScaleStatistics(),),
    "scalekv, budgets": (ScaleKV(budgets=((), (), (), (), (265,) * 4, (265,) * 4), base=0),),
}  # fmt: skip


@pytest.mark.support("modes", family="infinity", name="painting")
@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_compression_changes_no_bit(painter, text, name, implementation):
    painter.set_attn_implementation(implementation)
    try:
        plain = painter.generate(text, **OPTIONS)
        found, report = painted(painter, text, *EVERYTHING[name])
        assert tiny.same(plain, found)
        if name == "nothing":
            assert report.kv_bytes == report.kv_bytes_dense == 4 * BEFORE * 16 * TOKEN
            assert report.tokens_seen == 4 * BEFORE and report.tokens["image"] == 4 * BEFORE
    finally:
        painter.set_attn_implementation("sdpa")


def test_a_stock_cache_of_ones_own(painter, text, dense):
    from transformers import DynamicCache

    with mmkv.wrapped(painter):
        cache = DynamicCache(config=painter.config)
        assert tiny.same(dense, painter.generate(text, past_key_values=cache, **OPTIONS))
        assert state_of(cache).seen == cache.get_seq_length() == BEFORE


def test_unwrap_restores_everything(painter, text, dense):
    before = {name: set(vars(module)) for name, module in painter.named_modules()}
    painted(painter, text, HACK(HEADS))
    assert before == {name: set(vars(module)) for name, module in painter.named_modules()}
    assert painter.config._attn_implementation == "sdpa" and not painter._forward_hooks
    assert tiny.same(dense, painter.generate(text, **OPTIONS))


# --- memory


def lengths_after_each_scale(painter, text, method) -> list[list[list[int]]]:
    """[scale][layer][head] of the first row, before the last scale."""
    found = []
    with mmkv.wrapped(painter, cache=[method]):
        cache = mmkv.Cache(painter)

        def note(scale):
            found.append([[held_by_head(layer, 0, head)[0].numel() for head in range(4)] for layer in cache.layers])

        painter.generate(text, past_key_values=cache, on_scale=note, **OPTIONS)
    return found


@pytest.mark.support("cache", family="infinity", name="HACK", modes=("painting",))
@pytest.mark.parametrize("compression", [0.5, 0.7, 0.9])
def test_hack_falls_to_its_budget(painter, text, dense, compression):
    """The mean over all heads is the share of the 265 tokens before the last scale; nothing goes before that is exceeded."""
    found = lengths_after_each_scale(painter, text, HACK(HEADS, compression=compression))
    for scale, seen in enumerate((1, 5, 21, 57, 121, 265, 265)):
        mean = sum(map(sum, found[scale])) / 16
        most = (1 - compression) * BEFORE + 1e-6
        assert mean == seen if seen <= most else most - 1 < mean <= most
    structural = [found[-1][layer][head] for layer in range(4) for head in HEADS.structural[layer]]
    assert len(set(structural)) == 1 and structural[0] > (1 - compression) * BEFORE
    generated, report = painted(painter, text, HACK(HEADS, compression=compression))
    assert report.tokens_held / 4 == pytest.approx(mean, abs=0.51)
    held = sum(map(sum, found[-1])) * 4  # rows
    beside = 4 * held + 4 * 4 * 16 * BEFORE + 4 * 4 * BEFORE * 4  # positions, scores of all seen, and where those are
    assert held * TOKEN <= report.kv_bytes <= held * TOKEN + beside
    assert not tiny.same(dense, generated)


def test_budgets_that_leave_nothing(painter, text):
    """HACK's structural heads keep 5 tokens of the first two scales, whatever the budget."""
    for method, said in (
        (
            HACK(HEADS, compression=0.99, contextual_share=0.001),
            "structural heads always keep the first 2 scales, 5 tokens",
        ),
        (SnapKV(budget=0.001), "is not one token"),
        (H2O(budget=0.001), "is not one token"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            painted(painter, text, method)
        assert "\n" not in str(caught.value)


@pytest.mark.support("cache", family="infinity", name="ScaleKV", modes=("painting",))
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_scalekv_falls_to_its_budget(painter, text, share):
    found = lengths_after_each_scale(painter, text, ScaleKV(roles=ROLES, share=share))
    average = round(share * BEFORE)
    want = scale_budgets((1, 4, 16, 36, 64, 144, 256), ROLES.drafters, 4, average)
    for scale, row in enumerate(want):
        assert [layer[0] for layer in found[scale]] == (list(row) or [sum((1, 4, 16, 36, 64)[: scale + 1])] * 4)
    assert sum(want[5]) == average * 4 and want[5][0] > want[5][1]
    _, report = painted(painter, text, ScaleKV(roles=ROLES, share=share))
    assert report.kv_bytes == pytest.approx(share * report.kv_bytes_dense, rel=0.05)


@pytest.mark.support("cache", family="infinity", by="method", modes=("painting",))
@pytest.mark.parametrize(
    "method", [SnapKV(budget=0.3), H2O(budget=0.3), AdaKV(budget=0.3), PyramidKV(budget=0.3), StreamingLLM(budget=0.3)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_methods_for_prompts_decide_anew_after_each_scale(painter, text, method):
    """Each scale's end is a decision about all that is held: 30 % of the 265 tokens before the last stay at any time."""
    found = lengths_after_each_scale(painter, text, method)
    for scale, seen in enumerate((1, 5, 21, 57, 121, 265, 265)):
        mean = sum(map(sum, found[scale])) / 16
        assert mean == pytest.approx(min(seen, int(0.3 * BEFORE)), abs=1)
    _, report = painted(painter, text, method)
    assert 0.28 < report.kv_bytes / report.kv_bytes_dense < 0.37


def test_a_number_of_tokens_as_budget(painter, text):
    found = lengths_after_each_scale(painter, text, SnapKV(budget=40))
    assert [layer[0][0] for layer in found] == [1, 5, 21, 40, 40, 40, 40]


def test_snapkv_keeps_what_the_newest_queries_look_at(painter):
    """After the scale of 36 tokens, of one layer, by hand: votes of its last 32 queries, pooled over 5, the best stay."""
    text, budget, seen, new = tiny.features((4,), seed=2), 40, 57, 36
    recorded = {}

    def record(module, query, key, value, mask, **kwargs):
        if query.shape[2] == new and module.layer_idx == 1 and not recorded:
            recorded.update(query=query, key=key)
        return original(module, query, key, value, mask, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = record
    try:
        painter.generate(text, guidance=1.0, greedy=True)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
    with mmkv.wrapped(painter, cache=[SnapKV(budget=budget)]):
        cache, kept = mmkv.Cache(painter), {}

        def note(scale):
            kept[scale] = [held_by_head(cache.layers[1], 0, head)[0].tolist() for head in range(4)]

        painter.generate(text, past_key_values=cache, on_scale=note, guidance=1.0, greedy=True)
    for head in range(4):
        query, key = recorded["query"][0, head, -32:].double(), recorded["key"][0, head].double()
        votes = (query @ key.T).softmax(-1).sum(0)
        pooled = [votes[max(i - 2, 0) : i + 3].sum() / 5 for i in range(seen)]
        assert kept[3][head] == sorted(sorted(range(seen), key=lambda i: -pooled[i])[:budget])


@pytest.mark.support("cache", family="infinity", by="method", modes=("painting",))
@pytest.mark.parametrize(
    "method", [KIVI(bits=4), VidKV(), WaterfillKV(), GEAR()], ids=lambda m: type(m).__name__
)  # fmt: skip
def test_quantizers(painter, text, dense, method):
    found, report = painted(painter, text, method)
    assert report.kv_bytes < 0.7 * report.kv_bytes_dense and report.tokens_held == 4 * BEFORE
    assert torch.equal(found.bits[0], dense.bits[0])  # nothing is packed yet


def test_eviction_before_packing(painter, text):
    """What is packed stays, so half of each scale's own tokens do."""
    _, report = painted(painter, text, SnapKV(budget=0.5), KIVI(bits=4, group=32, residual=32))
    assert 0.35 * 4 * BEFORE < report.tokens_held < 0.7 * 4 * BEFORE and report.packed_bits < 10


def test_a_limit_of_bytes(painter, text):
    found, report = painted(painter, text, max_bytes=400_000)
    assert report.kv_bytes <= 400_000 < report.kv_bytes_dense and len(found.bits) == 7


def test_the_last_scale_is_not_held(painter, text):
    _, report = painted(painter, text)
    one_layer = 4 * 256 * 4 * TOKEN  # rows, tokens, heads
    assert report.kv_bytes_peak == report.kv_bytes_dense + one_layer
    assert report.prefill_seconds > 0 and report.decode_tokens == 0


def test_both_halves_of_guidance_choose_for_themselves(painter):
    """Rows of a batch: each keeps what it keeps without the other."""
    text = tiny.features((5,), seed=3)
    kept = {}
    for name, guidance in (("both", 1.5), ("one", 1.0)):
        with mmkv.wrapped(painter, cache=[HACK(HEADS)]):
            cache = mmkv.Cache(painter)
            notes = kept.setdefault(name, [])
            painter.generate(
                text, past_key_values=cache, guidance=guidance, greedy=True,
                on_scale=lambda scale, cache=cache, notes=notes: notes.append(
                    [[held_by_head(cache.layers[i], 0, h)[0].tolist() for h in range(4)] for i in range(4)]
                ),
            )  # fmt: skip
    first = next(scale for scale, seen in enumerate((1, 5, 21, 57, 121, 265)) if seen > 0.3 * BEFORE)
    assert kept["both"][first - 1] == kept["one"][first - 1]
    assert first == 4


def test_a_scale_attends_to_the_kept_and_to_itself(painter, text):
    """Scores of a wrapped run's last scale, by hand: softmax over what each head holds and the scale."""
    from mmkv.cache.view import View

    seen = {}
    attend = View.attend

    def watch(self, stock, name, module, query, mask, **kwargs):
        layer, row, head = self.layer, 0, 2
        before = held_by_head(layer, row, head)
        out = attend(self, stock, name, module, query, mask, **kwargs)
        if query.shape[2] == 256 and layer.index == 2:
            _, keys, values, _ = before
            weights = (query[row, head].double() @ keys.T).softmax(-1)
            seen["want"], seen["got"], seen["held"] = weights @ values, out[0][row, :, head], len(keys)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(View, "attend", watch)
        painted(painter, text, HACK(HEADS, compression=0.5))
    assert seen["held"] > 256 and (seen["got"].double() - seen["want"]).abs().max() < 1e-4


# --- calibration


def test_from_painting_to_wrapping(tmp_path, text):
    """Measured, left in the model's folder, and found by the presets."""
    tiny.lively().save_pretrained(tmp_path)
    painter = type(tiny.lively()).from_pretrained(tmp_path)
    for preset in ("hack", "scalekv"):
        with pytest.raises(
            ValueError, match=r"run `mmkv calibrate MODEL`, which leaves \w+.json in its folder"
        ) as caught:
            mmkv.wrap(painter, preset)
        assert "\n" not in str(caught.value) and not hasattr(painter, "_mmkv")
    statistics = ScaleStatistics()
    painted(painter, text, statistics)
    identity = Identity.of(painter.config)
    assert identity == IDENTITY
    statistics.head_classes(0.5, identity).save(tmp_path / "head_classes.json")
    statistics.layer_roles(3, identity, first=4).save(tmp_path / "layer_roles.json")
    shares = {}
    for preset in ("hack", "scalekv"):
        with mmkv.wrapped(painter, preset):
            painter.generate(text, **OPTIONS)
            report = mmkv.report(painter)
            shares[preset] = report.tokens_held / report.tokens_seen
    assert shares["hack"] == pytest.approx(0.3, abs=0.01)
    assert shares["scalekv"] == pytest.approx(0.1, abs=0.01)


def test_another_models_calibration(tmp_path):
    tiny.lively().save_pretrained(tmp_path)
    painter = type(tiny.lively()).from_pretrained(tmp_path)
    HeadClasses(Identity("infinity", 2, 4), ((0,), (1,))).save(tmp_path / "head_classes.json")
    with pytest.raises(ValueError, match="was measured on infinity with 2 layers of 4 KV heads, this model is"):
        mmkv.wrap(painter, "hack")


def test_statistics_see_the_last_scale_too(painter, text):
    statistics = ScaleStatistics()
    painted(painter, text, statistics)
    assert statistics.selectivity.shape == (4, 7) and statistics.variance.shape == (4, 4)


# --- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(tokens=[FastV()]), r"tokens=\[FastV\(\)\] on InfinityForImageGeneration, which reads no images"),
        (dict(prefill_chunk=64), "prefill_chunk on InfinityForImageGeneration: a scale attends to itself as a whole"),
        (dict(positions="trained"), "positions='trained' on InfinityForImageGeneration, whose tokens have places"),
        (dict(cache=[PrefixKV()]), "PrefixKV decides once about a whole prompt"),
        (dict(cache=[ZipVL()]), "ZipVL reads a prompt causally"),
        (dict(cache=[HACK()]), "HACK needs structural= of this model"),
        (dict(cache=[ScaleKV()]), "ScaleKV needs roles= of this model"),
        (dict(cache=[HACK(((0,), (1,)))]), "structural for 2 layers: this model has 4"),
        (dict(cache=[HACK(((0,), (1,), (), (4,)))]), "there is no KV head 4"),
        (dict(cache=[ScaleKV(roles=LayerRoles(Identity("infinity", 9, 4), ((8,),)))]), "there is no layer 8"),
        (dict(cache=[HACK(HEADS), KIVI()]), "HACK decides anew"),
        (dict(cache=[SnapKV(budget={"video": 0.5})]), "budget for text or video on InfinityForImageGeneration"),
    ],
)
def test_what_makes_no_sense(painter, options, says):
    with pytest.raises(ValueError, match=says) as caught:
        mmkv.wrap(painter, **options)
    assert "\n" not in str(caught.value)
    assert not hasattr(painter, "_mmkv") and painter.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [dict(share=0), dict(share=1.5), dict(share=True), dict(roles=3)])
def test_impossible_settings_of_scalekv(options):
    with pytest.raises(ValueError) as caught:
        ScaleKV(**options)
    assert "\n" not in str(caught.value)


def test_roles_for_another_number_of_scales(painter, text):
    few = LayerRoles(IDENTITY, ((), (), ()))
    with pytest.raises(ValueError, match="drafters of 3 scales, sizes of 7"):
        painted(painter, text, ScaleKV(roles=few))
    painted(painter, text)  # and the model is free again


def test_several_scales_at_once_are_not_cached(painter, text):
    from mmkv.models.infinity.conditioning import Text

    schedule = painter.schedule()
    with (
        mmkv.wrapped(painter),
        pytest.raises(ValueError, match="several scales at once cannot be cached"),
        torch.no_grad(),
    ):
        painter(torch.zeros(2, 520, 8), Text.of(text), schedule)
    with mmkv.wrapped(painter), torch.no_grad():
        assert painter(torch.zeros(2, 520, 8), Text.of(text), schedule, use_cache=False).logits.shape == (2, 521, 8, 2)


def test_the_next_image_starts_a_new_cache(painter, text, dense):
    with mmkv.wrapped(painter):
        cache = mmkv.Cache(painter)
        painter.generate(text, past_key_values=cache, **OPTIONS)
        with pytest.raises(ValueError, match="new cache"):
            painter.generate(text, past_key_values=cache, **OPTIONS)
        cache.reset()
        assert tiny.same(dense, painter.generate(text, past_key_values=cache, **OPTIONS))
