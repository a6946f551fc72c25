"""PrefixKV: one share of the attention for all layers, by hand and against the paper's binary search; fixed layer ratios."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import random_models as rm
import torch
from cache_reference import Bare, checked_attention, held_by_head
from transformers import DynamicCache

import mmkv
from mmkv.cache import KIVI, PrefixKV, ratios_from, settle_jointly
from mmkv.cache.fill import Asked, Fill, Plan
from mmkv.kernels import Mass
from mmkv.layout import VIDEO, TokenLayout


def kept(bare, layer=0, head=0, row=0):
    return held_by_head(bare.layers[layer], row, head)[0].tolist()


class Known(Fill):
    """A fill of one head whose attention mass is given."""

    def mass(self, rows):
        return Mass(self.given, self.given, None)


def decided(method, masses, old, protected=()):
    """Indices of the old tokens that each layer keeps."""
    fills = []
    for layer, given in enumerate(masses):
        n = len(given)
        at, kv = torch.arange(n), torch.zeros(1, n, 4)
        sure = torch.tensor([i in protected for i in range(old)])
        fills.append(Known(layer, len(masses), at, old, 0, kv, kv, None, TokenLayout.text(1, n), sure))
        fills[-1].given = torch.tensor(given)[None]
    plans = [Plan.everything(fill, torch.full((old,), -1, dtype=torch.int8)) for fill in fills]
    method.decide_jointly(fills, plans)
    return [plan.keep[0].nonzero()[:, 0].tolist() for plan in plans]


STEEP, FLAT = [0.5, 0.2, 0.1, 0.1, 0.05, 0.05], [0.16, 0.17, 0.18, 0.19, 0.2, 0.1]


@pytest.mark.parametrize(
    ("budget", "protected", "want"),
    [
        # before its best tokens the steep layer holds .05 (the newest), .55, .75, .85, .95, the flat one .1, .3, .49, .67, .84;
        # 3 + 3 tokens less the newest two: the four smallest of these
        (0.5, (), [[0], [2, 3, 4]]),
        # 5 + 5 less two: all but .95 and .85
        (5 / 6, (), [[0, 1, 2], [0, 1, 2, 3, 4]]),
        # token 4 stays anyway: the steep layer has .1, .6, ..., the flat one .3, .49, ...; two tokens are left to choose
        (0.5, (4,), [[0, 4], [3, 4]]),
    ],
)
def test_by_hand(budget, protected, want):
    assert decided(PrefixKV(budget=budget, sinks=0), [STEEP, FLAT], 5, protected) == want


def naive_mass(keys, queries, rows):
    """fp64 `[n]`: attention of these queries on each key, averaged over all query heads."""
    heads, n = queries.shape[1], keys.shape[2]
    out = torch.zeros(n, dtype=torch.float64)
    for head in range(heads):
        for t in rows:
            scores = keys[0, head * keys.shape[1] // heads, : t + 1].double() @ queries[0, head, t].double() / 4
            out[: t + 1] += scores.softmax(0) / heads
    return out


@pytest.mark.parametrize("probe_rows", ["all", 20])
def test_against_the_papers_search(probe_rows):
    """A share p by bisection, until the tokens that all layers need for it are as many as the budget."""
    n, layers, budget = 120, 4, 60
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 4, n, 16, generator=generator)
    bare = Bare(PrefixKV(budget=budget, probe_rows=probe_rows, sinks=0), layers=layers)
    spread = torch.tensor([0.3, 1.0, 2.0, 3.0])
    made = [torch.randn(1, 2, n, 16, generator=generator) * s for s in spread]
    bare.state.extend(TokenLayout.text(1, n), None)
    for layer, keys in zip(bare.layers, made):
        layer.update(keys, keys)
        layer.settle(Asked(queries, 0.25))
    settle_jointly(bare.layers)
    rows = range(n) if probe_rows == "all" else range(n - probe_rows, n)
    mass = [naive_mass(k, queries, rows) for k in made]
    ranked = [m[: n - 32].argsort(descending=True) for m in mass]

    def needed(p):
        """How many old tokens each layer takes until it holds the share p."""
        counts = []
        for m, order in zip(mass, ranked):
            held = m[n - 32 :].sum()
            count = 0
            while held < p * m.sum() and count < len(order):
                held += m[order[count]]
                count += 1
            counts.append(count)
        return counts

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(needed(middle)) < layers * (budget - 32) else (low, middle)
    counts = needed(high)
    assert sum(counts) == layers * (budget - 32)
    assert len(set(counts)) > 2
    for layer in range(layers):
        want = sorted(ranked[layer][: counts[layer]].tolist()) + list(range(n - 32, n))
        assert kept(bare, layer, 0) == kept(bare, layer, 1) == want


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.95, 40, 120])
def test_all_layers_together_keep_the_budget(budget):
    bare = Bare(PrefixKV(budget=budget), batch=2, layers=3)
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[0, :50] = False
    bare.feed(200, valid)
    for row, real in enumerate((150, 200)):
        total = sum(len(kept(bare, layer, 0, row)) for layer in range(3))
        assert total == 3 * (budget if isinstance(budget, int) else int(budget * real + 1e-6))
        for layer in range(3):
            assert kept(bare, layer, 0, row) == kept(bare, layer, 1, row)
            assert kept(bare, layer, 0, row)[:4] == list(range(200 - real, 204 - real))


def test_by_modality():
    chunk = TokenLayout.text(1, 240)
    chunk.modality[0, 20:120], chunk.medium[0, 20:120] = VIDEO, 0
    bare = Bare(PrefixKV(budget={"video": 0.2}), layers=3).feed(240, chunk=chunk)
    video = [sum(20 <= i < 120 for i in kept(bare, layer)) for layer in range(3)]
    assert sum(video) == 60
    assert all(len(kept(bare, layer)) - count == 140 for layer, count in enumerate(video))


# --- fixed ratios


def test_ratios_are_shares_of_the_tokens():
    """The best of each layer; decided right after its attention, not at the forward's end."""
    method = PrefixKV(ratios=(0.6, 0.25), sinks=0)
    assert not method.joint
    assert method.budget.total == 0.425
    generator = torch.Generator().manual_seed(4)
    keys, queries = torch.randn(1, 2, 200, 16, generator=generator), torch.randn(1, 4, 200, 16, generator=generator)
    bare = Bare(method, layers=2)
    bare.feed(200, keys=keys, queries=queries)
    order = naive_mass(keys, queries, range(200))[:168].argsort(descending=True)
    for layer, count in enumerate((120, 50)):
        want = sorted(order[: count - 32].tolist()) + list(range(168, 200))
        assert kept(bare, layer, 0) == kept(bare, layer, 1) == want


def test_ratios_from_prompts():
    bares = [Bare(PrefixKV(budget=0.4), batch=2, layers=3, seed=seed).feed(180 + 40 * seed) for seed in range(2)]
    found = ratios_from(SimpleNamespace(layers=bare.layers) for bare in bares)
    for layer in range(3):
        shares = [len(kept(bare, layer, 0, row)) / (180 + 40 * i) for i, bare in enumerate(bares) for row in range(2)]
        assert found[layer] == pytest.approx(sum(shares) / 4)
    assert sum(found) / 3 == pytest.approx(0.4)
    assert len(set(found)) == 3
    again = Bare(PrefixKV(ratios=found), layers=3).feed(1000)
    assert [len(kept(again, layer)) for layer in range(3)] == [int(1000 * ratio + 1e-6) for ratio in found]


def test_ratios_of_a_wrapped_model():
    model = rm.make("qwen2")
    prompts = [rm.inputs(model, [rm.words(180, seed)]) for seed in range(2)]
    with mmkv.wrapped(model, cache=[PrefixKV(budget=0.5)]):
        keep = dict(new=1, return_dict_in_generate=True)
        found = ratios_from(rm.generate(model, prompt, **keep).past_key_values for prompt in prompts)
    assert sum(found) / 3 == pytest.approx(0.5)
    with mmkv.wrapped(model, cache=[PrefixKV(ratios=found)]), checked_attention() as errors:
        rm.generate(model, prompts[0], new=4)
        rm.generate(model, prompts[1], "beam", new=4)
    assert errors


def test_ratios_for_another_model():
    with pytest.raises(ValueError, match="2 ratios: this model has 3 layers"):
        Bare(PrefixKV(ratios=(0.5, 0.5)), layers=3).feed(100)
    for cache in ([PrefixKV(ratios=(0.5, 0.5))], [PrefixKV(ratios=(0.5, 0.5)), KIVI()]):
        model = rm.make("qwen2")
        with pytest.raises(ValueError, match="2 ratios: this model has 3 layers"):
            mmkv.wrap(model, cache=cache)
        assert not hasattr(model, "_mmkv")
        assert model.config.get_text_config()._attn_implementation != "mmkv"


@pytest.mark.parametrize(
    ("caches", "error", "says"),
    [
        (list, ValueError, "at least one cache"),
        (lambda: [DynamicCache()], TypeError, "ratios from DynamicCache: needed are caches of a model wrapped with PrefixKV"),
        (lambda: [3], TypeError, "ratios from int: needed are caches of a model wrapped with PrefixKV"),
        (lambda: 3, TypeError, "in a list"),
        (lambda: [mmkv.Cache(mmkv.wrap(rm.make("qwen2"), cache=[PrefixKV()]))], ValueError, "empty Cache"),
    ],
)  # fmt: skip
def test_ratios_from_what_holds_none(caches, error, says):
    with pytest.raises(error, match=says) as caught:
        ratios_from(caches())
    assert "\n" not in str(caught.value)


def test_ratios_that_are_no_sequence():
    with pytest.raises(ValueError, match="ratios 5: needed is one share for each layer"):
        PrefixKV(ratios=5)


@pytest.mark.parametrize("budget", [0.9, 300, "64MiB", {"video": 0.25}])
def test_a_budget_beside_ratios(budget):
    with pytest.raises(ValueError, match=r"^budget .* with ratios whose mean is 0.4: ") as caught:
        PrefixKV(ratios=(0.5, 0.3), budget=budget)
    assert "\n" not in str(caught.value)


def test_a_budget_that_agrees_with_the_ratios():
    method = PrefixKV(ratios=(0.5, 0.3), budget=0.4)
    assert replace(method, sinks=0).budget.total == 0.4
    assert PrefixKV(ratios=(0.5, 0.3), budget=0.25).budget.total == 0.4  # the default cannot be told from a given one


@pytest.mark.parametrize(
    "make",
    [
        lambda: PrefixKV(ratios=()), lambda: PrefixKV(ratios=(0.5, 0)), lambda: PrefixKV(ratios=(0.5, 1.1)),
        lambda: PrefixKV(ratios=(0.5, "a")), lambda: PrefixKV(ratios=(True,)), lambda: PrefixKV(probe_rows=0),
        lambda: PrefixKV(probe_rows="some"), lambda: PrefixKV(probe_rows=True), lambda: PrefixKV(probe_rows=1.5),
    ],
)  # fmt: skip
def test_impossible_settings(make):
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value)
