"""SparseVLM: raters, what stays at each stage, and the clusters of what does not."""

from __future__ import annotations

import math

import pytest
import torch
from decoder_views import after, random_attention, view

from mmkv.tokens.method import TowerFacts
from mmkv.tokens.sparsevlm import SparseVLM

ONE = {"layers": (2,)}


def kept(choice) -> set[int]:
    return set(choice.keep.nonzero()[:, 0].tolist())


def naive_raters(vision, text):
    """Indices of text tokens above the mean, in fp64."""
    answer = [0.0] * len(text)
    for v in vision.double():
        dots = [math.exp(float(v @ t)) for t in text.double()]
        for i, dot in enumerate(dots):
            answer[i] += dot / sum(dots) / len(vision)
    return [i for i, a in enumerate(answer) if a > sum(answer) / len(answer)]


def naive_clusters(x, k):
    """DPC-kNN with k neighbours, in fp64: centres and members."""
    n = len(x)
    d = [[math.dist(a.tolist(), b.tolist()) / x.shape[1] ** 0.5 for b in x] for a in x]
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / k) for row in d]
    far = max(map(max, d))
    apart = [min([d[i][j] for j in range(n) if density[j] > density[i]] or [far]) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -apart[i] * density[i])[:k]
    member = [centres.index(i) if i in centres else min(range(k), key=lambda c: d[i][centres[c]]) for i in range(n)]
    return centres, member


def test_raters_by_hand():
    # two image tokens e1 and e1; text e1 * 3, e2, nothing: softmax (.909, .045, .045), so only the first rates
    embeds = torch.tensor([[1.0, 0], [1, 0], [3, 0], [0, 1], [0, 0]])
    attention = torch.zeros(1, 5, 5)
    attention[0, 2] = torch.tensor([0.6, 0.4, 0, 0, 0])  # the rater likes the first, the others the second
    attention[0, 3:] = torch.tensor([0.0, 1.0, 0, 0, 0])
    seen = view("IITTT", attention, embeds=embeds)
    assert kept(SparseVLM(keep=(1,), recycle=False, **ONE).in_decoder(seen)) == {0, 2, 3, 4}
    assert kept(SparseVLM(keep=(1,), recycle=False, raters="all", **ONE).in_decoder(seen)) == {1, 2, 3, 4}


def test_where_nobody_is_above_the_mean_all_rate():
    attention = torch.zeros(1, 3, 3)
    attention[0, 2] = torch.tensor([0.4, 0.6, 0])
    assert kept(SparseVLM(keep=(1,), recycle=False, **ONE).in_decoder(view("IIT", attention))) == {1, 2}


@pytest.mark.parametrize("seed", range(4))
def test_a_whole_stage_against_the_naive_way(seed):
    torch.manual_seed(seed)
    kinds = "T" * 5 + "I" * 120 + "T" * 14
    attention, hidden = random_attention(4, len(kinds), seed), torch.randn(len(kinds), 8)
    embeds = torch.randn(len(kinds), 8)
    choice = SparseVLM(keep=(50, 30, 20)).in_decoder(view(kinds, attention, hidden, embeds))
    rows = [125 + i for i in naive_raters(embeds[5:125], embeds[125:])]
    score = [float(attention[:, rows, 5 + j].double().mean()) for j in range(120)]
    ranked = sorted(range(120), key=lambda j: -score[j])
    recycled = sorted(5 + j for j in ranked[50 : 50 + int(70 * 0.3) + 1])
    centres, member = naive_clusters(hidden[recycled].double(), 22 // 10 + 1)
    expected = {*range(5), *(5 + j for j in ranked[:50]), *(recycled[c] for c in centres), *range(125, 139)}
    assert kept(choice) == expected
    for place, cluster in enumerate(centres):
        members = [recycled[i] for i in range(22) if member[i] == place]
        torch.testing.assert_close(choice.features[recycled[cluster]], hidden[members].mean(0))
        assert choice.into[members].tolist() == [recycled[cluster]] * len(members)
    untouched = [t for t in expected if t not in [recycled[c] for c in centres]]
    assert torch.equal(choice.features[untouched], hidden[untouched])
    assert choice.into[untouched].tolist() == untouched
    assert choice.into[5 + ranked[-1]] == -1


def test_three_stages_with_ratios_of_the_first_number():
    method = SparseVLM(keep=(0.5, 0.25, 0.1), recycle=False)
    seen = view("T" + "I" * 40 + "TTT")
    for layer, count in ((2, 20), (6, 10), (15, 4)):
        choice = method.in_decoder(seen)
        assert int(choice.keep.sum()) == count + 4
        seen = after(seen, choice, random_attention(4, count + 4, layer), {2: 6, 6: 15, 15: 15}[layer])


def test_numbers_of_tokens_with_recycling_over_the_stages():
    # 576 -> 300 of which 276 go, 83 of them make 9 clusters; 309 -> 200, 109 go, 33 make 4; 204 -> 110, 94 go, 29 make 3
    method, seen = SparseVLM(), view("T" + "I" * 576 + "TTT")
    for layer, count in ((6, 309), (15, 204), (15, 113)):
        choice = method.in_decoder(seen)
        assert int(choice.keep.sum()) == count + 4
        seen = after(seen, choice, random_attention(4, count + 4, layer), layer)


@pytest.mark.parametrize(("tokens", "mean"), [(192, 192.4), (128, 128.0), (96, 96.8), (64, 64.4)])
def test_the_lists_have_the_mean_they_claim(tokens, mean):
    a, b, c = SparseVLM.for_tokens(tokens, "2.0").keep
    assert round((2 * 576 + 4 * a + 9 * b + 17 * c) / 32, 1) == mean
    assert SparseVLM.for_tokens(tokens, "2.0").heads == 14
    assert SparseVLM.for_tokens(tokens).recycle and not SparseVLM.for_tokens(tokens, "2.0").recycle


def test_the_heads_that_look_at_the_image():
    attention = torch.zeros(3, 3, 3)
    attention[0, 2] = torch.tensor([0.5, 0.4, 0.1])  # .9 of it to the image
    attention[1, 2] = torch.tensor([0.1, 0.3, 0.6])
    attention[2, 2] = torch.tensor([0.0, 0.3, 0.7])

    def one_of(heads):
        method = SparseVLM(keep=(1,), recycle=False, heads=heads, **ONE)
        return kept(method.in_decoder(view("IIT", attention)))

    assert one_of(1) == {0, 2}
    assert one_of(2) == {1, 2}  # .6 : .7
    assert one_of(None) == one_of(99) == {1, 2}


def test_the_rank_rule():
    # two raters whose rows are multiples of one another: rank 1; with a third direction rank 2
    attention = torch.zeros(1, 9, 9)
    attention[0, 7, :7] = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])
    attention[0, 8, :7] = attention[0, 7, :7] / 2
    rank = SparseVLM(budget="rank", scale=2.0, bias=1, recycle=False, raters="all")
    assert kept(rank.in_decoder(view("IIIIIIITT", attention))) == {0, 1, 2, 7, 8}
    attention[0, 8, 6] = 0.3
    assert kept(rank.in_decoder(view("IIIIIIITT", attention))) == {0, 1, 2, 3, 6, 7, 8}
    # a number that reaches what is there, or a full rank, drops nothing
    assert SparseVLM(budget="rank", raters="all").in_decoder(view("IIIIIIITT", attention)) is None
    full = torch.zeros(1, 4, 4)
    full[0, 2:, :2] = torch.eye(2)
    assert SparseVLM(budget="rank", scale=0.5, raters="all").in_decoder(view("IITT", full)) is None
    # int(1 * .4) = 0 would be no image at all
    flat = torch.full((1, 4, 4), 0.25)
    assert kept(SparseVLM(budget="rank", scale=0.4, raters="all", recycle=False).in_decoder(view("IITT", flat))) == {
        0,
        2,
        3,
    }


def test_keeping_everything():
    assert SparseVLM(budget="rank").keeping_everything().in_decoder(view("TIIIT")) is None
    assert SparseVLM(keep=(3, 2, 1)).in_decoder(view("TIIIT")) is None
    assert SparseVLM(keep=(1, 1, 1)).in_decoder(view("TTT")) is None


def test_which_text_rates():
    attention = torch.zeros(1, 6, 6)
    attention[0, 2] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    attention[0, 5] = torch.tensor([0.0, 0.2, 0, 0.3, 0.1, 0.4])
    method = dict(keep=(2,), recycle=False, raters="all", **ONE)
    assert kept(SparseVLM(**method).in_decoder(view("IITIIT", attention))) == {0, 2, 3, 5}
    assert kept(SparseVLM(rows="after_last", **method).in_decoder(view("IITIIT", attention))) == {1, 2, 3, 5}
    with pytest.raises(ValueError, match="the text behind them, and this prompt has none"):
        SparseVLM(**method).in_decoder(view("TTII"))


def test_layers():
    assert SparseVLM().decoder_layers(32) == SparseVLM().decoder_layers(17) == (2, 6, 15)
    assert SparseVLM().decoder_layers(16) == (1, 3, 7)
    # 2 * 4 // 32 and 6 * 4 // 32 are both layer 0: the second stage's number counts there
    shallow = SparseVLM(keep=(8, 4, 2), recycle=False)
    assert shallow.decoder_layers(4) == (0, 1)
    assert int(shallow.in_decoder(view("I" * 9 + "T", layer=0, layers=4)).keep.sum()) == 5
    with pytest.raises(ValueError, match="behind layer 15 of a decoder of 16 layers"):
        SparseVLM(layers=(2, 6, 15)).check(TowerFacts(layers=16))
    with pytest.raises(ValueError, match="it needs two"):
        SparseVLM().check(TowerFacts(layers=0))


@pytest.mark.parametrize(
    "options",
    [
        {"keep": (1, 2)}, {"keep": [1, 2, 3]}, {"keep": (0, 1, 2)}, {"keep": (1.5, 1, 2)}, {"keep": (True, 1, 2)},
        {"layers": (6, 2, 15)}, {"layers": ()}, {"layers": (1.0, 2, 3)}, {"budget": "best"}, {"scale": -1}, {"scale": "1"},
        {"scale": 0}, {"recycle": 1}, {"recycled": 0}, {"recycled": 1.1}, {"per_cluster": 0}, {"heads": 0}, {"raters": "x"},
        {"rows": "x"}, {"position_ids": "x"},
    ],
)  # fmt: skip
def test_refusals(options):
    with pytest.raises(ValueError, match=r"^[^\n]*(possible are|needed)[^\n]*$"):
        SparseVLM(**options)
    with pytest.raises(ValueError, match=r"^tokens=100; possible are 192, 128, 96, 64$"):
        SparseVLM.for_tokens(100)
