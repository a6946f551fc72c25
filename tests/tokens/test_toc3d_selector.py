"""ToC3D's selector: against the formulas written out, samples with and without a history, noise, loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmkv.tokens.toc3d import ToC3D
from mmkv.tokens.toc3d_selector import (
    History,
    MotionNorm,
    Selector,
    box_targets,
    octaves,
    selection_loss,
    sine,
    sine3d,
    transform,
)

RANGE = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
DIM, QUERY, COUNT = 12, 8, 5


def rigid(batch: int) -> torch.Tensor:
    """Random rotations about z and shifts, `[B, 4, 4]`."""
    pose = torch.eye(4).repeat(batch, 1, 1)
    for i in range(batch):
        a = math.pi * (2 * torch.rand(()).item() - 1)
        pose[i, :2, :2] = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        pose[i, :3, 3] = torch.randn(3) * 3
    return pose


def history(batch: int, count: int = COUNT + 2, exists=None) -> History:
    exists = [True] * batch if exists is None else exists
    return History(
        torch.randn(batch, count, QUERY),
        torch.randn(batch, count, 3) * 5,
        torch.randn(batch, count, 2),
        torch.rand(batch, 1).expand(batch, count),
        rigid(batch)[:, None].expand(-1, count, -1, -1),
        torch.tensor(exists),
    )


def selector(**options) -> Selector:
    made = Selector(ToC3D(queries=COUNT, **options), DIM, QUERY, RANGE).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


# --- encodings


def test_sine_by_hand():
    """dim 4 of 0.25: angles pi / 2 and pi / 200."""
    want = [math.sin(math.pi / 2), math.cos(math.pi / 2), math.sin(math.pi / 200), math.cos(math.pi / 200)]
    assert sine(torch.tensor(0.25), 4).tolist() == pytest.approx(want, abs=1e-6)
    x, y, z = 0.1, 0.2, 0.3
    want = [f(2 * math.pi * v) for v in (y, x, z) for f in (math.sin, math.cos)]
    assert sine3d(torch.tensor([x, y, z]), 2).tolist() == pytest.approx(want, abs=1e-6)


def test_octaves_by_hand():
    want = [f(v * k) for k in (1, 2, 4) for f in (math.sin, math.cos) for v in (0.3, -0.7)]
    assert octaves(torch.tensor([0.3, -0.7]), 3).tolist() == pytest.approx(want, abs=1e-6)


def test_transform_by_hand():
    """A quarter turn to the left, then 1 m forward."""
    pose = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert transform(torch.tensor([[2.0, 3, 4]]), pose).tolist() == [[-2, 2, 4]]


def test_motion_norm_starts_as_layer_norm():
    x = torch.randn(3, QUERY)
    want = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(MotionNorm(6, QUERY)(x, torch.randn(3, 6)), want, atol=1e-6)


# --- the formulas for one query and one token


def linear(layer, x):
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(layer.weight.tolist(), layer.bias.tolist())]


def relu(x):
    return [max(v, 0.0) for v in x]


def gelu(x):
    return [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x]


def layer_norm(x, weight=None, bias=None):
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    x = [(v - mean) / deviation for v in x]
    return x if weight is None else [v * w + b for v, w, b in zip(x, weight.tolist(), bias.tolist())]


def motion_norm(layer, x, condition):
    condition = relu(linear(layer.reduce[0], condition))
    gamma, beta = linear(layer.gamma, condition), linear(layer.beta, condition)
    return [g * v + b for g, v, b in zip(gamma, layer_norm(x), beta)]


def wave(position, dim):
    angles = [2 * math.pi * position / 10000 ** (2 * (i // 2) / dim) for i in range(dim)]
    return [math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)]


def log_softmax(pair):
    total = math.log(sum(math.exp(v) for v in pair))
    return [v - total for v in pair]


def naive_query(made, told, sample, index, time, pose):
    to_ego = torch.linalg.inv(pose[sample].double())
    old = told.pose[sample, index].double()
    point = (to_ego @ torch.cat([told.points[sample, index].double(), torch.ones(1)]))[:3].tolist()
    share = [(p - low) / (high - low) for p, low, high in zip(point, RANGE[:3], RANGE[3:])]
    velocity, age = told.velocity[sample, index].tolist(), -told.time[sample, index].item()
    if made.method.history == "aligned":
        relative = to_ego @ old
        turned = relative[:2, :2] @ torch.tensor(velocity).double()
        velocity, age, old = turned.tolist(), time[sample].item() + age, relative
    motion = velocity + [age] + [v for row in old[:3].tolist() for v in row]
    code = [f(v * 2**k) for k in range(6) for f in (math.sin, math.cos) for v in motion]
    place = wave(share[1], QUERY // 2) + wave(share[0], QUERY // 2) + wave(share[2], QUERY // 2)
    place = linear(made.position[2], relu(linear(made.position[0], place)))
    place = motion_norm(made.position_motion, place, code)
    moment = layer_norm(linear(made.time[0], wave(age, QUERY)), made.time[1].weight, made.time[1].bias)
    query = motion_norm(made.query_motion, told.queries[sample, index].tolist(), code)
    return [q + p + m for q, p, m in zip(query, place, moment)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["aligned", "official"])
def test_queries_and_scores_equal_the_formulas(kind):
    made, told = selector(history=kind), history(2)
    time, pose, x, mask = torch.tensor([1.5, 2.0]), rigid(2), torch.randn(6, 4, DIM), torch.rand(6, 4)
    got = made.motion_queries(told, time, pose)
    want = [[naive_query(made, told, b, q, time, pose) for q in range(COUNT)] for b in range(2)]
    assert torch.allclose(got, torch.tensor(want), atol=1e-3, rtol=1e-3)
    score, new_mask = made(x, mask, told, time, pose)
    for view, token in ((0, 0), (2, 3), (3, 1), (5, 2)):  # three views a sample
        content = linear(made.project, [v * mask[view, token].item() for v in x[view, token].tolist()])
        affinity = [sum(c * q for c, q in zip(content, query)) / math.sqrt(QUERY) for query in want[view // 3]]
        log_p = log_softmax(linear(made.aggregate, affinity))
        assert score[view, token].item() == pytest.approx(log_p[0], abs=2e-3)
        assert new_mask[view, token].item() == pytest.approx(math.exp(log_p[0]), abs=2e-3)


@torch.no_grad()
def test_fallback_equals_the_formulas():
    made, x = selector(), torch.randn(2, 3, DIM)
    score, _ = made(x, None, None, torch.zeros(1), rigid(1))
    for view in range(2):
        own = [gelu(linear(made.own[1], layer_norm(t, made.own[0].weight, made.own[0].bias))) for t in x[view].tolist()]
        whole = [sum(t[c] for t in own) / 3 for c in range(DIM // 2, DIM)]
        for token in range(3):
            hidden = own[token][: DIM // 2] + whole
            for layer in (0, 2):
                hidden = gelu(linear(made.own_score[layer], hidden))
            want = log_softmax(linear(made.own_score[4], hidden))[0]
            assert score[view, token].item() == pytest.approx(want, abs=1e-4)


# --- histories


@torch.no_grad()
def test_each_sample_has_its_own_history_flag():
    made, told, x = selector(), history(3, exists=[True, False, True]), torch.randn(6, 4, DIM)
    time, pose = torch.rand(3) + 1, rigid(3)
    score, mask = made(x, None, told, time, pose)
    for i in range(3):
        alone = told.rows(torch.arange(3) == i)
        one = made(x[2 * i : 2 * i + 2], None, alone if i != 1 else None, time[i : i + 1], pose[i : i + 1])
        assert torch.allclose(score[2 * i : 2 * i + 2], one[0], atol=1e-5)
        assert torch.allclose(mask[2 * i : 2 * i + 2], one[1], atol=1e-5)
    assert torch.allclose(score[2:4], made.by_themselves(x[2:4])[..., 0], atol=1e-6)


@torch.no_grad()
def test_scores_follow_the_history():
    made, told, x = selector(), history(1), torch.randn(2, 4, DIM)
    time, pose = torch.ones(1), rigid(1)
    usual = made(x, None, told, time, pose)[0]
    for name in ("queries", "points", "velocity", "time"):
        other = replace(told, **{name: torch.randn_like(getattr(told, name))})
        assert (made(x, None, other, time, pose)[0] - usual).abs().max() > 1e-4, name
    last = replace(told, queries=told.queries.clone())
    last.queries[:, COUNT:] += 1  # beyond the first COUNT
    assert torch.equal(made(x, None, last, time, pose)[0], usual)


@torch.no_grad()
def test_aligned_history_does_not_know_where_the_world_begins():
    """Moving the global frame changes nothing; the official inputs see it."""
    move, x, time = rigid(1)[0], torch.randn(2, 4, DIM), torch.ones(1)
    for kind, same in (("aligned", True), ("official", False)):
        made, told, pose = selector(history=kind), history(1), rigid(1)
        moved = replace(told, points=transform(told.points, move), pose=move @ told.pose)
        difference = (made(x, None, told, time, pose)[0] - made(x, None, moved, time, move @ pose)[0]).abs().max()
        assert (difference < 2e-3) == same


def test_refuses_short_histories():
    with pytest.raises(ValueError, match=f"a history of 2 queries; the selector needs {COUNT}"):
        selector()(torch.randn(1, 4, DIM), None, history(1, 2), torch.zeros(1), rigid(1))


def test_refuses_odd_queries_and_views_that_do_not_fit():
    with pytest.raises(ValueError, match="query_dim 7; must be even"):
        Selector(ToC3D(), DIM, 7, RANGE)
    with pytest.raises(ValueError, match="5 images, 2 histories, 2 times"):
        selector()(torch.randn(5, 4, DIM), None, history(2), torch.zeros(2), rigid(2))
    with pytest.raises(ValueError, match="6 images, 3 histories, 2 times"):
        selector()(torch.randn(6, 4, DIM), None, history(3), torch.zeros(2), rigid(2))


# --- noise


def test_noise_only_in_training_unless_asked():
    x, told, time, pose = torch.randn(2, 9, DIM), history(1), torch.ones(1), rigid(1)
    quiet, loud = selector(), selector(noise="always")
    assert torch.equal(quiet(x, None, told, time, pose)[1], quiet(x, None, told, time, pose)[1])
    assert not torch.equal(loud(x, None, told, time, pose)[1], loud(x, None, told, time, pose)[1])
    score, mask = quiet(x, None, told, time, pose)
    assert torch.allclose(mask, score.exp())
    quiet.train()
    noisy_score, noisy_mask = quiet(x, None, told, time, pose)
    assert torch.equal(noisy_score, score) and not torch.allclose(noisy_mask, score.exp(), atol=1e-2)


def test_first_frames_train_the_fallback_scorer():
    """In the official code the mask carries no gradient to it."""
    made = selector().train()
    _, mask = made(torch.randn(2, 9, DIM), None, None, torch.zeros(1), rigid(1))
    selection_loss([mask], [torch.tensor([[0.0, 0, 10, 10]]), torch.zeros(0, 4)], (3, 3), 8).backward()
    assert made.own_score[4].weight.grad.abs().max() > 1e-3 and made.aggregate.weight.grad is None


# --- loss


def test_box_targets_by_hand():
    """Patches of 8 px on 3 x 4: a box from (9, 0) to (16, 17), one that reaches the far corner, and none."""
    boxes = [torch.tensor([[9.0, 0, 16, 17]]), torch.tensor([[24.5, 16, 32, 24]]), torch.zeros(0, 4)]
    targets = box_targets(boxes, (3, 4), 8)
    assert targets[0].tolist() == [[0, 1, 0, 0]] * 3
    assert targets[1].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert targets[2].sum() == 0


def test_selection_loss_by_hand():
    """Two scorings of one view of two patches, the first under a box: -(1-p)^2 log p there, -p^2 log(1-p) elsewhere."""
    masks = [torch.tensor([[0.9, 0.2]]), torch.tensor([[0.5, 0.7]])]
    parts = [0.1**2 * -math.log(0.9), 0.2**2 * -math.log(0.8), 0.5**2 * -math.log(0.5), 0.7**2 * -math.log(0.3)]
    got = selection_loss(masks, [torch.tensor([[0.0, 0, 8, 8]])], (1, 2), 8)
    assert got.item() == pytest.approx(sum(parts) / 4, rel=1e-5)
    assert torch.isfinite(selection_loss([torch.tensor([[0.0, 1.0]])], [torch.tensor([[0.0, 0, 8, 8]])], (1, 2), 8))
