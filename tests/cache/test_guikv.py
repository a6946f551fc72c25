"""GUI-KV against the paper's recipe, worked out slowly here in fp64, and the invariants of its spec."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import random_models as rm
import torch
from cache_reference import Bare, held_by_head

import mmkv
from mmkv.cache import GUIKV, SnapKV, guikv
from mmkv.cache.fill import Fill, Plan
from mmkv.cache.guikv import distance_to_subspace, screenshots
from mmkv.layout import IMAGE, TEXT, VIDEO, TokenLayout

MARGIN = 32  # newest tokens that stay whatever happens


def make_layout(kinds: list[tuple[int, int, int]]) -> TokenLayout:
    """Of (modality, medium, frame) triples."""
    layout = TokenLayout.text(1, len(kinds))
    for name, values in zip(("modality", "medium", "frame"), zip(*kinds)):
        getattr(layout, name)[0] = torch.tensor(values)
    return layout


def images(*sizes: int, text: int = 20, kind: int = IMAGE) -> list[tuple[int, int, int]]:
    """Text, a screenshot, text, a screenshot, ..., text."""
    out = [(TEXT, -1, -1)] * text
    for i, size in enumerate(sizes):
        where = (kind, i, 0) if kind == IMAGE else (kind, 0, i)
        out += [where] * size + [(TEXT, -1, -1)] * text
    return out


def make_fill(kinds, heads=2, group=2, dim=16, seed=0, norms="random", fresh=0, **changes) -> Fill:
    generator = torch.Generator().manual_seed(seed)
    n = len(kinds)
    draw = lambda h, t: torch.randn(h, t, dim, generator=generator)  # noqa: E731
    if norms == "random":
        norms = torch.rand(n, generator=generator) + 0.5
    fill = Fill(
        layer=0, layers=1, columns=torch.arange(n), old=n - MARGIN, fresh=fresh, keys=draw(heads, n), values=draw(heads, n),
        query=3 * draw(heads * group, n)[:, fresh:], layout=make_layout(kinds), scale=dim**-0.5, norms=norms, seen=n,
        protected=torch.zeros(n - MARGIN, dtype=torch.bool), boundary=n - MARGIN,
    )  # fmt: skip
    return dataclasses.replace(fill, **changes)


def kept(method, fill: Fill) -> torch.Tensor:
    plan = Plan.everything(fill, torch.full((fill.old,), -1, dtype=torch.int8))
    method.decide(fill, plan)
    return plan.keep


# --- the recipe, slowly


def gram_schmidt(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    basis: list[torch.Tensor] = []
    for v in vectors:
        for b in basis:
            v = v - (v @ b) * b
        basis.append(v / v.norm())
    return basis


def slow_scores(
    fill: Fill, span: list[list[int]], budget: float, *, window=8, kernel=5, alpha=2.0, temperature=3.5, rank=32
):
    """fp64 scores of every old token by loops; `span`: the indices of each screenshot, the newest one last."""
    n, heads, group = fill.length, fill.heads, fill.query.shape[0] // fill.heads
    kept_in_all = int(n * budget)
    out = torch.zeros(heads, fill.old, dtype=torch.float64)
    for head in range(heads):
        keys = fill.keys[head].double()
        votes = [0.0] * n
        for q in range(head * group, (head + 1) * group):
            for row in range(n - window, n):
                weights = (
                    (fill.query[q, row - fill.fresh].double() @ keys[: row + 1].T * fill.scale).softmax(0).tolist()
                )
                for i, w in enumerate(weights):
                    votes[i] += w / group
        for i in range(fill.old):
            near = range(i - kernel // 2, i + kernel // 2 + 1)
            out[head, i] = sum(votes[j] for j in near if 0 <= j < fill.old) / kernel
        last = span[-1]
        norms = [float(fill.norms[i]) for i in last]
        mean = sum(norms) / len(norms)
        std = math.sqrt(sum((x - mean) ** 2 for x in norms) / (len(norms) - 1))
        raised = [math.exp((x - mean) / (std + 1e-8) / temperature) for x in norms]
        for i, x in zip(last, raised):
            if i < fill.old:
                out[head, i] += alpha * x / sum(raised)
        before = [i for s in span[:-1] for i in s]
        basis = gram_schmidt([keys[i] for i in last[: min(rank, keys.shape[1])]])
        rho = {}
        for i in before:
            left = keys[i]
            for b in basis:
                left = left - (keys[i] @ b) * b
            rho[i] = float(left.norm())
        for i in sorted(before, key=lambda i: rho[i])[: int((1 - kept_in_all / n) * len(before))]:
            out[head, i] = 0.0
    return out


def slow_kept(scores: torch.Tensor, count: int) -> torch.Tensor:
    out = torch.zeros_like(scores, dtype=torch.bool)
    for head, row in enumerate(scores.tolist()):
        for i in sorted(range(len(row)), key=lambda i: -row[i])[:count]:
            out[head, i] = True
    return out


SHAPES = {
    "four heads of the paper's check": dict(heads=4, group=1, dim=64, sizes=(100, 100, 100)),
    "grouped queries": dict(heads=2, group=3, dim=48, sizes=(60, 40, 80)),
    "a newest one below the rank": dict(heads=2, group=2, dim=48, sizes=(60, 50, 20)),
    "one screenshot": dict(heads=2, group=2, dim=16, sizes=(150,)),
}


@pytest.mark.parametrize("kind", [IMAGE, VIDEO])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_recipe(shape, kind):
    given = dict(SHAPES[shape])
    sizes, start, span = given.pop("sizes"), 20, []
    for size in sizes:
        span.append(list(range(start, start + size)))
        start += size + 20
    for seed, budget in ((0, 0.2), (1, 0.4), (2, 0.3)):
        fill = make_fill(images(*sizes, kind=kind), seed=seed, **given)
        want = slow_scores(fill, span, budget)
        method = GUIKV(budget=budget)
        assert (method.score(fill).double() - want).abs().max() < 1e-5
        assert torch.equal(kept(method, fill), slow_kept(want, int(budget * fill.length) - MARGIN))


def test_other_settings_of_the_recipe():
    sizes, span = (70, 90), [list(range(20, 90)), list(range(110, 200))]
    options = dict(window=5, kernel=1, alpha=0.7, temperature=0.5, rank=4)
    fill = make_fill(images(*sizes), dim=32, heads=3, group=1)
    method = GUIKV(budget=0.35, **options)
    assert (method.score(fill).double() - slow_scores(fill, span, 0.35, **options)).abs().max() < 1e-5


# --- the spec's checks


def test_without_bonus_and_with_one_screenshot_it_is_snapkv():
    fill = make_fill(images(120))
    assert torch.equal(kept(GUIKV(alpha=0, budget=0.3), fill), kept(SnapKV(window=8, budget=0.3), fill))
    assert GUIKV(alpha=0).reads_hidden is None


def test_no_norms_no_bonus():
    fill = make_fill(images(90, 90))
    none = dataclasses.replace(fill, norms=None)
    unknown = dataclasses.replace(fill, norms=torch.full((fill.length,), torch.nan))
    want = GUIKV(alpha=0).score(fill)
    assert torch.equal(GUIKV().score(none), want)
    assert torch.equal(GUIKV().score(unknown), want)
    assert not torch.equal(GUIKV().score(fill), want)


def test_the_bonus_by_hand():
    """Norms 1, 2, 3: standardized -1, 0, 1; softmax 0.0900, 0.2447, 0.6652 at temperature 1."""
    norms = torch.full((60,), 9.0)
    norms[5:8] = torch.tensor([1.0, 2.0, 3.0])
    kinds = [(TEXT, -1, -1)] * 5 + [(IMAGE, 0, 0)] * 3 + [(TEXT, -1, -1)] * 52
    fill = make_fill(kinds, norms=norms)
    got = GUIKV(alpha=1, temperature=1.0).bonus(fill, screenshots(fill)[0])
    assert got[5:8].tolist() == pytest.approx([0.09003057, 0.24472847, 0.66524096], abs=1e-6)
    assert not got[:5].any() and not got[8:].any()


def test_unknown_norms_are_left_out_of_the_statistics():
    norms = torch.full((60,), torch.nan)
    norms[6:9] = torch.tensor([1.0, 2.0, 3.0])
    kinds = [(TEXT, -1, -1)] * 4 + [(IMAGE, 0, 0)] * 5 + [(TEXT, -1, -1)] * 51
    fill = make_fill(kinds, norms=norms)
    got = GUIKV(alpha=1, temperature=1.0).bonus(fill, screenshots(fill)[0])
    assert got[6:9].tolist() == pytest.approx([0.09003057, 0.24472847, 0.66524096], abs=1e-6)
    assert not got[:6].any()


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_equal_norms_give_an_even_bonus(noise):
    """A normed state without gain has norm sqrt(C) up to rounding, which must not be blown up to a saliency."""
    norms = 8.0 * (1 + noise * torch.randn(140, generator=torch.Generator().manual_seed(0)))
    fill = make_fill(images(100), norms=norms)
    got = GUIKV(alpha=2).bonus(fill, screenshots(fill)[0])[20:120]
    assert (got - 0.02).abs().max() < 1e-4


def test_one_token_has_all_the_bonus():
    fill = make_fill(images(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(GUIKV().bonus(fill, screenshots(fill)[0]).max()) == pytest.approx(2.0)


def test_distances_that_are_known():
    """What is in the span of a screenshot of 20 tokens is at 0, what is orthogonal to it at its own length."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 60, 48, generator=generator)
    keys[:, :20] = keys[:, 40:]  # the same content again
    full = torch.linalg.qr(keys[:, 40:].mT, mode="complete").Q
    keys[:, 20:40] = full[:, :, 20:40].mT * torch.arange(1, 21)[:, None]
    spanning = torch.zeros(1, 60, dtype=torch.bool)
    spanning[:, 40:] = True
    got = distance_to_subspace(keys, spanning, 40, 32)
    assert got[:, :20].abs().max() < 1e-4
    assert (got[:, 20:] - torch.arange(1, 21)).abs().max() < 1e-4


def test_a_repeated_screenshot_goes_first():
    """Of two earlier ones the repeated one loses its votes, and the new one keeps them."""
    fill = make_fill(images(30, 30, 30), dim=64)
    fill.keys[:, 20:50] = fill.keys[:, 120:150]
    score = GUIKV(budget=0.5).score(fill)
    assert not score[:, 20:50].any()
    assert (score[:, 70:100] > 0).all()


@pytest.mark.parametrize("budget", [0.2, 0.33, 0.5, 0.9, 64])
def test_how_many_lose_their_votes(budget):
    fill = make_fill(images(70, 50, 60), dim=32)
    n = fill.length
    count = budget if isinstance(budget, int) else int(budget * n)
    zero = GUIKV(budget=budget).score(fill) == 0
    assert zero.sum(1).tolist() == [int((1 - count / n) * 120)] * 2
    assert not zero[:, 160:].any() and not zero[:, :20].any()


def test_losers_by_modality():
    """The images' own budget says how many of them lose; the text is not touched."""
    fill = make_fill(images(70, 50, 60), dim=32)
    zero = GUIKV(budget={"image": 0.25}).score(fill) == 0
    assert zero.sum(1).tolist() == [int((1 - 45 / 180) * 120)] * 2
    keep = kept(GUIKV(budget={"image": 0.25}), fill)
    visual = fill.layout.visual[0, : fill.old]
    assert keep[:, ~visual].all()
    assert keep[:, visual].sum(1).tolist() == [45 - 12, 45 - 12]  # 12 of the newest 32 are of the image


def test_heads_that_share_their_queries_agree():
    """With the same query in each of a group, grouped heads choose as ungrouped ones do."""
    fill = make_fill(images(80, 80), group=1)
    grouped = dataclasses.replace(fill, query=fill.query.repeat_interleave(3, 0))
    assert torch.equal(kept(GUIKV(), fill), kept(GUIKV(), grouped))


def test_which_tokens_are_the_newest_screenshot():
    kinds = [(IMAGE, 0, 0)] * 2 + [(IMAGE, 0, 1)] * 2 + [(TEXT, -1, -1)] + [(IMAGE, 1, 0), (IMAGE, 1, 1)]
    newest, earlier = screenshots(make_fill(kinds + [(TEXT, -1, -1)] * MARGIN))
    assert newest[0, :7].int().tolist() == [0, 0, 0, 0, 0, 1, 1]  # tiles of one image belong together
    assert earlier[0, :7].int().tolist() == [1, 1, 1, 1, 0, 0, 0]
    kinds = [(IMAGE, 0, 0)] * 2 + [(VIDEO, 1, 0)] * 2 + [(TEXT, -1, -1)] + [(VIDEO, 1, 1)] * 2
    newest, earlier = screenshots(make_fill(kinds + [(TEXT, -1, -1)] * MARGIN))
    assert newest[0, :7].int().tolist() == [0, 0, 0, 0, 0, 1, 1]  # frames of a video do not
    assert earlier[0, :7].int().tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_recalled_tokens_that_differ_by_head():
    """Beside a method that recalls: places without a token are no screenshot, and heads lose votes by their own number."""
    fill = make_fill(images(60, 60), dim=16, fresh=100, norms=None)
    columns = torch.arange(180).repeat(2, 1)
    columns[1, 60:80] = -1
    held = columns >= 0
    fill = dataclasses.replace(
        fill, columns=columns, layout=fill.layout.rows(torch.zeros(2, dtype=torch.int64)), recalled=100,
        present=held[:, : fill.old], protected=fill.protected.expand(2, -1),
    )  # fmt: skip
    newest, earlier = screenshots(fill)
    assert newest.sum(1).tolist() == [60, 60]
    assert earlier.sum(1).tolist() == [60, 40]
    share = 1 - int(0.3 * 170) / 170
    assert GUIKV(budget=0.3).redundant(fill, newest, earlier).sum(1).tolist() == [int(share * 60), int(share * 40)]
    assert kept(GUIKV(budget=0.3), fill)[:, ~held[1, : fill.old]].tolist()[1] == [False] * 20


# --- on a cache and a model


def test_lengths_and_positions():
    bare = Bare(GUIKV(budget=0.25), layers=2, heads=2, batch=2)
    chunk = make_layout(images(80, 80)).rows(torch.tensor([0, 0]))
    bare.feed(220, chunk=chunk)
    for layer in bare.layers:
        assert layer.get_seq_length() == 220
        assert [held_by_head(layer, row, head)[0].numel() for row in range(2) for head in range(2)] == [55] * 4
    bare.feed(1)
    assert held_by_head(bare.layer, 0, 0)[0][-1] == 220  # the true position, not the compressed length


@pytest.mark.parametrize("norm", ["residual", "post"])
def test_norms_are_the_models(norm):
    """What the bonus is made of: what enters the decoder layer, or its attention."""
    model = rm.make("qwen2_5_vl")
    with torch.no_grad():
        for layer in model.model.language_model.layers:  # a gain, or all norms behind it are alike
            layer.input_layernorm.weight.normal_(1, 0.5, generator=torch.Generator().manual_seed(0))
    prompt = rm.inputs(model, [[*rm.words(5), rm.Image(16, 16), *rm.words(5), rm.Image(16, 20), *rm.words(40)]])
    states, seen = [], []
    with torch.no_grad():
        hidden = model(**prompt, output_hidden_states=True).hidden_states
    for layer, state in zip(model.model.language_model.layers, hidden):
        states.append(state if norm == "residual" else layer.input_layernorm(state))
    original = GUIKV.bonus

    def bonus(self, fill, newest):
        seen.append((fill.layer, fill.norms))
        return original(self, fill, newest)

    with pytest.MonkeyPatch.context() as patch, mmkv.wrapped(model, cache=[GUIKV(norm=norm)]):
        patch.setattr(GUIKV, "bonus", bonus)
        rm.generate(model, prompt, new=3)
    assert [layer for layer, _ in seen] == [0, 1, 2]
    for layer, norms in seen:
        want = states[layer][0].norm(dim=-1)
        assert torch.allclose(norms, want, rtol=1e-4)
        assert want.std() > 0.05 * want.mean()


def test_a_prompt_without_images_says_so_once():
    guikv._say_that_votes_decide_alone.cache_clear()
    fill = make_fill([(TEXT, -1, -1)] * 150)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = kept(GUIKV(), fill), kept(GUIKV(), fill)
    assert torch.equal(first, kept(SnapKV(window=8, budget=0.2), fill)) and torch.equal(first, second)
    assert [w.category for w in caught] == [UserWarning]
    assert "\n" not in str(caught[0].message)


def test_a_prompt_in_chunks():
    """The share that loses its votes is the whole prompt's; a chunk without images says nothing where others have some."""
    guikv._say_that_votes_decide_alone.cache_clear()
    whole = torch.tensor([kind for kind, _, _ in images(60, 60, 100)], dtype=torch.int8)
    fill = make_fill(images(60, 60), prompt=whole)
    zero = GUIKV(budget=90).score(fill) == 0
    assert zero.sum(1).tolist() == [int((1 - 90 / 300) * 60)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept(GUIKV(), make_fill([(TEXT, -1, -1)] * 150, prompt=whole))


@pytest.mark.parametrize(
    "options",
    [
        dict(alpha=-1), dict(alpha="2"), dict(alpha=True), dict(alpha=torch.inf), dict(temperature=0), dict(temperature=-1.0),
        dict(temperature=None), dict(rank=0), dict(rank=1.5), dict(rank=True), dict(norm="l2"), dict(norm=None),
        dict(window=0), dict(window=2.5), dict(kernel=4), dict(kernel=0), dict(budget=0.0), dict(budget=20), dict(residual=8),
    ],
)  # fmt: skip
def test_impossible_settings(options):
    with pytest.raises(ValueError) as caught:
        GUIKV(**options)
    assert "\n" not in str(caught.value)
