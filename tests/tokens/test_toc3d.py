"""ToC3D's router: against the algorithm written out token by token, its limits, and the counts of the published settings."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from timm.models.eva import EvaBlock

from mmkv.models.toc3d.backbone import Backbone
from mmkv.parts.registry import METHODS
from mmkv.tokens.toc3d import (
    PAD_SCORE,
    ToC3D,
    bridge_token,
    dense,
    fill,
    kept,
    mlp_tokens,
    route,
    split,
    take,
)
from mmkv.tokens.toc3d_windows import Region, regions

DIM, HEADS = 16, 2
OFFICIAL = ToC3D(bridge="official", select="padded")


# --- settings


def test_registered_and_not_for_language_models():
    entry = METHODS["toc3d"]
    assert entry.method is ToC3D and "2409.00633" in entry.paper and entry.method.for_vlm is False


def test_presets():
    assert ToC3D.fast().ratios == (0.7, 0.5, 0.5) and ToC3D.faster().ratios == (0.5, 0.4, 0.3)
    assert ToC3D.faster(queries=8).queries == 8
    assert ToC3D.faster(select="padded").keeping_everything() == ToC3D(ratios=(1.0, 1.0, 1.0))


def test_ratio_is_the_latest_stages_and_absolute():
    method = ToC3D(ratios=(0.7, 0.5, 0.3))
    assert [method.ratio(b) for b in (0, 5, 6, 11, 12, 17, 18, 23)] == [None, None, 0.7, 0.7, 0.5, 0.5, 0.3, 0.3]


@pytest.mark.parametrize(
    "options",
    [
        dict(ratios=(0.7, 0.5, 0.0)),
        dict(ratios=(0.7, 0.5, 1.1)),
        dict(ratios=(0.7, True, 0.5)),
        dict(ratios=()),
        dict(ratios=(0.5,)),
        dict(scoring=(6, 6, 12)),
        dict(scoring=(6, 12, 9)),
        dict(scoring=(-1, 3, 6)),
        dict(scoring=(1.0, 3, 6)),
        dict(queries=0),
        dict(queries=True),
        dict(bridge="mean"),
        dict(select="all"),
        dict(noise="never"),
        dict(history="none"),
        dict(loss_weight=-1),
        dict(loss_weight=float("nan")),
    ],
)
def test_refuses(options):
    with pytest.raises(ValueError) as caught:
        ToC3D(**options)
    assert next(iter(options)) in str(caught.value).replace(" ", "_") or "ratios" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_backbones_that_it_does_not_fit():
    with pytest.raises(ValueError, match="scoring block 18 of a backbone of 12 blocks"):
        ToC3D().check(12, ())
    with pytest.raises(ValueError, match="scoring block 12 is a global block"):
        ToC3D().check(24, (12, 20))


# --- selection


def test_kept_of_the_published_windows():
    assert [kept(256, r) for r in (0.7, 0.5, 0.4, 0.3)] == [179, 128, 102, 76]
    assert [kept(400, r) for r in (0.7, 0.5, 0.4, 0.3)] == [280, 200, 160, 120]
    assert kept(100, 0.29) == 29 and kept(2, 0.1) == 1 and kept(7, 1) == 7


def test_split_takes_real_tokens_before_pads():
    """8 windows of 16 x 16, of which only the first 4 rows are real in the last four (64 tokens)."""
    scores = torch.randn(8, 16, 16).log_softmax(-1)
    scores[4:, 4:] = PAD_SCORE
    for ratio in (0.7, 0.5, 0.4, 0.3):
        salient, redundant = split(scores.flatten(1), kept(256, ratio))
        assert salient.shape == (8, int(256 * ratio)) and redundant.shape == (8, 256 - int(256 * ratio))
        for window in range(8):
            row = scores[window].flatten().tolist()
            by_hand = sorted(range(256), key=lambda i, row=row: -row[i])
            assert set(salient[window].tolist()) == set(by_hand[: int(256 * ratio)]) or window >= 4
            if window >= 4:
                assert set(range(64)) <= set(salient[window].tolist())


def test_split_of_ties_is_by_place():
    assert split(torch.zeros(1, 6), 2)[0].tolist() == [[0, 1]]


def test_fill_undoes_take():
    x = torch.randn(5, 12, 3)
    for keep in (1, 4, 11):
        order = torch.stack([torch.randperm(12) for _ in range(5)])
        parts = order[:, :keep], order[:, keep:]
        assert torch.equal(fill(take(x, parts[0]), take(x, parts[1]), *parts), x)


def test_bridge_by_hand():
    """log p -0.1, -1, -3: |log p| / 4.1 against p / 1.3225."""
    x, scores = torch.eye(3)[None], torch.tensor([[-0.1, -1.0, -3.0]])
    assert bridge_token(x, scores, "official")[0, 0].tolist() == pytest.approx([0.1 / 4.1, 1 / 4.1, 3 / 4.1])
    p = [math.exp(-0.1), math.exp(-1), math.exp(-3)]
    assert bridge_token(x, scores, "paper")[0, 0].tolist() == pytest.approx([v / sum(p) for v in p])


def test_bridge_of_tokens_that_are_certain_to_be_kept_is_their_mean():
    x = torch.randn(1, 4, 3)
    for weights in ("paper", "official"):
        assert torch.allclose(bridge_token(x, torch.zeros(1, 4), weights)[0, 0], x[0].mean(0), atol=1e-6)


def test_official_bridge_of_a_padded_window_is_the_pad():
    x = torch.cat([torch.ones(1, 4, 2), torch.zeros(1, 4, 2)], 1)
    scores = torch.tensor([[-1.0] * 4 + [PAD_SCORE] * 4])
    assert bridge_token(x, scores, "official").abs().max() < 1e-5
    assert torch.allclose(bridge_token(x, scores, "paper"), torch.ones(1, 1, 2))


# --- windows


@pytest.mark.parametrize("size", [(20, 50, 16), (32, 32, 16), (7, 13, 4), (3, 2, 5), (9, 5, 3), (1, 1, 1)])
def test_regions_cover_each_token_once(size):
    height, width, window = size
    grid = torch.arange(2 * height * width).view(2, height, width)
    seen, back = [], torch.full_like(grid, -1)
    for region in regions(*size):
        cut = region.cut(grid)
        assert cut.shape[1] == region.height * region.width <= window * window
        seen += cut.flatten().tolist()
        back[:, region.rows, region.cols] = region.join(cut, 2)
    assert sorted(seen) == list(range(2 * height * width))
    assert torch.equal(back, grid)


def test_a_cut_window_by_hand():
    """The right part of a 2 x 5 grid in windows of 2: one column."""
    grid = torch.arange(10).view(1, 2, 5)
    last = Region(slice(0, 2), slice(4, 5), 2, 1)
    assert list(regions(2, 5, 2)) == [Region(slice(0, 2), slice(0, 4), 2, 2), last]
    assert last.cut(grid).tolist() == [[4, 9]] and last.places(2).tolist() == [0, 2]


def test_tokens_of_the_published_settings():
    """20 x 50 tokens, windows of 16: 8 x 180 slots at 0.7, of which 769 are real; ours none but real ones and 8 bridges."""
    padded = [mlp_tokens(20, 50, 16, r, "padded") for r in (0.7, 0.5, 0.4, 0.3)]
    assert [real for _, real in padded] == [769, 616, 538, 460]
    assert [slots for slots, _ in padded] == [8 * (k + 1) for k in (179, 128, 102, 76)]
    by_hand = 3 * 179 + 3 * int(64 * 0.7) + int(32 * 0.7) + int(8 * 0.7)
    assert mlp_tokens(20, 50, 16, 0.7) == (by_hand + 8, by_hand) == (704, 696)
    assert mlp_tokens(20, 50, 16, None) == mlp_tokens(20, 50, 16, 1.0) == (1000, 1000)
    assert mlp_tokens(20, 50, 16, None, "padded") == (1000, 1000)


# --- the router against the algorithm token by token


def eva_block() -> EvaBlock:
    block = EvaBlock(DIM, HEADS, qkv_fused=False, mlp_ratio=8 / 3, swiglu_mlp=True, scale_mlp=True, num_prefix_tokens=0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.double().eval()


def runner(block: EvaBlock, window: int):
    """The backbone's way to call a block, rotary positions included."""
    backbone = Backbone((32, 32), 16, dim=DIM, depth=1, heads=HEADS, window=window)
    return lambda tokens, places: backbone._run(block, window, tokens, places)


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def naive_block(block, tokens, places, window):
    """Pre-norm attention with rotary pairs as complex numbers, SwiGLU with its norm; tokens [n, C], places a list."""
    head = DIM // HEADS
    bands = [10000 ** (-i / (head // 4)) for i in range(head // 4)]
    angles = []
    for place in places:
        row, col = divmod(place, window)
        angles.append([row / window * 16 * f for f in bands] + [col / window * 16 * f for f in bands])
    turn = torch.polar(torch.ones(len(places), head // 2).double(), torch.tensor(angles).double())
    y = norm(tokens, block.norm1)
    out = []
    for h in range(HEADS):
        rows = slice(h * head, (h + 1) * head)
        q, k, v = (
            y @ p.weight[rows].T + (p.bias[rows] if p.bias is not None else 0)
            for p in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
        )
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.reshape(len(places), -1, 2).contiguous()) * turn).flatten(1)
            for t in (q, k)
        )
        out.append((q @ k.T / head**0.5).softmax(-1) @ v)
    attention = torch.cat(out, 1) @ block.attn.proj.weight.T + block.attn.proj.bias
    x = tokens + attention
    y = norm(x, block.norm2)
    gate, up = (y @ p.weight.T + p.bias for p in (block.mlp.fc1_g, block.mlp.fc1_x))
    return x + norm(gate * gate.sigmoid() * up, block.mlp.norm) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def naive_window(block, tokens, scores, places, window, keep, weights):
    """One window [n, C]: the salient and a bridge through the block, the others get the bridge's change."""
    scores = scores.tolist()
    order = sorted(range(len(tokens)), key=lambda i: -scores[i])
    good, rest = order[:keep], order[keep:]
    if not rest:
        return naive_block(block, tokens, places, window)
    best = max(scores[i] for i in rest)
    share = [scores[i] if weights == "official" else math.exp(scores[i] - best) for i in rest]
    bridge = sum(s / sum(share) * tokens[i] for s, i in zip(share, rest))
    out = naive_block(block, torch.stack([*tokens[good], bridge]), [places[i] for i in good] + [places[keep]], window)
    new = tokens + (out[-1] - bridge)
    for i, token in zip(good, out):
        new[i] = token
    return new


def naive_route(block, x, scores, window, ratio, method):
    """All windows of one image [H, W, C], one after another."""
    height, width = x.shape[:2]
    if method.select == "padded":
        tall, wide = math.ceil(height / window) * window, math.ceil(width / window) * window
        big, low = x.new_zeros(tall, wide, DIM), scores.new_full((tall, wide), PAD_SCORE)
        big[:height, :width], low[:height, :width] = x, scores
        x, scores = big, low
    out = torch.empty_like(x)
    for top in range(0, x.shape[0], window):
        for left in range(0, x.shape[1], window):
            part = x[top : top + window, left : left + window]
            high, across = part.shape[:2]
            places = [r * window + c for r in range(high) for c in range(across)]
            new = naive_window(
                block,
                part.reshape(-1, DIM),
                scores[top : top + window, left : left + window].flatten(),
                places,
                window,
                max(1, int(high * across * ratio)),
                method.bridge,
            )
            out[top : top + window, left : left + window] = new.view(high, across, DIM)
    return out[:height, :width]


@torch.no_grad()
@pytest.mark.parametrize("bridge", ["paper", "official"])
@pytest.mark.parametrize("select", ["real", "padded"])
@pytest.mark.parametrize(
    ("size", "ratio"), [((32, 32, 16), 0.5), ((20, 50, 16), 0.7), ((7, 13, 5), 0.3), ((5, 3, 7), 0.4)]
)
def test_router_equals_the_algorithm_token_by_token(size, ratio, select, bridge):
    height, width, window = size
    block, method = eva_block(), ToC3D(bridge=bridge, select=select)
    x = torch.randn(2, height, width, DIM).double()
    scores = torch.randn(2, height, width).double().sigmoid().log()
    out, salient = route(runner(block, window), x, scores, window, ratio, method)
    for i in range(2):
        want = naive_route(block, x[i], scores[i], window, ratio, method)
        assert (out[i] - want).abs().max() < 1e-6  # rotary tables and bridge weights are fp32
    assert (salient.flatten(1).sum(1) == mlp_tokens(height, width, window, ratio, select)[1]).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32, 16), (20, 50, 16), (7, 13, 5)])
def test_keeping_all_is_the_dense_block(size):
    height, width, window = size
    run = runner(eva_block(), window)
    x, scores = torch.randn(2, height, width, DIM).double(), -torch.rand(2, height, width).double()
    out, salient = route(run, x, scores, window, 1.0, ToC3D())
    assert (out - dense(run, x, window)).abs().max() < 1e-12 and salient.all()


@torch.no_grad()
def test_padded_ratio_1_puts_each_token_back():
    """The official code leaves them sorted by score; without pads the padded way equals the dense block as well."""
    run, x = runner(eva_block(), 16), torch.randn(1, 32, 32, DIM).double()
    scores = -torch.rand(1, 32, 32).double()
    assert (route(run, x, scores, 16, 1.0, OFFICIAL)[0] - dense(run, x, 16)).abs().max() < 1e-12


@torch.no_grad()
def test_redundant_tokens_of_a_window_share_one_update():
    height, width, window = 20, 50, 16
    x, scores = torch.randn(1, height, width, DIM).double(), -torch.rand(1, height, width).double()
    x[0, 2, 3] = x[0, 4, 5]
    scores[0, 2, 3] = scores[0, 4, 5] = -50
    out, salient = route(runner(eva_block(), window), x, scores, window, 0.5, ToC3D())
    update, windows = out - x, 0
    for region in regions(height, width, window):
        for change, chosen in zip(region.cut(update), region.cut(salient)):
            shared = change[~chosen]
            assert (shared - shared[0]).abs().max() < 1e-12 < shared.abs().max()
            windows += 1
    assert windows == 8
    assert torch.allclose(out[0, 2, 3], out[0, 4, 5], atol=1e-12)


@torch.no_grad()
def test_pads_are_not_attended_by_default():
    """A real window cut by the border equals a grid of that window alone."""
    run, x = runner(eva_block(), 16), torch.randn(1, 20, 50, DIM).double()
    scores = -torch.rand(1, 20, 50).double()
    whole = route(run, x, scores, 16, 0.5, ToC3D())[0]
    corner = route(run, x[:, 16:, 48:], scores[:, 16:, 48:], 16, 0.5, ToC3D())[0]
    assert torch.allclose(whole[:, 16:, 48:], corner, atol=1e-12)


def test_scores_learn_through_the_bridge():
    run, x = runner(eva_block(), 4), torch.randn(1, 6, 6, DIM).double()
    scores = (-torch.rand(1, 6, 6).double()).requires_grad_()
    out, salient = route(run, x, scores, 4, 0.5, ToC3D())
    out.pow(2).sum().backward()
    assert (scores.grad[salient] == 0).all() and (scores.grad[~salient] != 0).sum() > 10


@pytest.mark.gpu
def test_same_on_a_gpu():
    block, method = eva_block().float(), ToC3D()
    x, scores = torch.randn(2, 20, 50, DIM), -torch.rand(2, 20, 50)
    with torch.no_grad():
        here = route(runner(block, 16), x, scores, 16, 0.5, method)[0]
        there = route(runner(block.cuda(), 16), x.cuda(), scores.cuda(), 16, 0.5, method)[0]
    assert (here - there.cpu()).abs().max() < 1e-3


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ToC3D().queries = 3
