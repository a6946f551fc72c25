"""ScaleKV: its published tables and length traces, its grid, and its two scorings worked out slowly."""

from __future__ import annotations

from itertools import accumulate

import pytest
import random_models as rm
import torch
from cache_reference import Bare
from next_scale import SIZES, Painter, layout

import mmkv
from mmkv.cache import ScaleKV, ScaleStatistics, scale_budgets
from mmkv.cache.scalekv import grid_centres
from mmkv.parts.calibration import Identity, LayerRoles

SIDES_1M = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
SIZES_1M = tuple(side * side for side in SIDES_1M)

# The published tables of the 10 % budget: what a drafting and a refining layer keep for scales 9 ... 13 (counted from 1).
PUBLISHED = {
    "2B": dict(layers=32, keep=[(920, 632), (1490, 594), (2510, 526), (4100, 420), (6385, 465)],
               drafters=[(0, 23)] * 4 + [(0,)], decay=70),
    "8B": dict(layers=40, keep=[(909, 629), (1464, 584), (2463, 503), (4054, 374), (6200, 200)],
               drafters=[(0, 1, 2)] * 5, decay=100),
}  # fmt: skip


def published(model: str) -> list[tuple[int, ...]]:
    """By scale (from 0) what each layer keeps after it."""
    table = PUBLISHED[model]
    rows = [
        tuple(draft if layer in mine else refine for layer in range(table["layers"]))
        for (draft, refine), mine in zip(table["keep"], table["drafters"])
    ]
    return [()] * 7 + rows


# --- budgets


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_formula_gives_the_published_tables(model):
    """Refining layers start at 600 (published for the 2B) and lose 70 (2B) or, as 200 in the last column of the 8B says, 100."""
    table = PUBLISHED[model]
    got = scale_budgets(SIZES_1M, [()] * 8 + table["drafters"], table["layers"], decay=table["decay"])
    assert list(got) == published(model)
    assert all(sum(row) == 650 * table["layers"] for row in got if row)


def test_budgets_by_hand():
    """Three layers of 10 tokens on average: 12 tokens came when the first is cut."""
    # refining 9: the drafting layer would get 30 - 18 = 12, which it holds; then 8 and 14 of 12 + 8; then it drafts no more
    got = scale_budgets((4, 8, 8, 20, 50), [(), (), (1,), (1,), ()], 3, average=10, start=9, decay=1)
    assert got == ((), (9, 12, 9), (8, 14, 8), (10, 10, 10))
    # refining 4: 30 - 8 = 22 is more than the 12 that came, so it keeps 12 and they 18 / 2
    assert scale_budgets((4, 8, 8), [(), (), (1,)], 3, average=10, start=4, decay=0) == ((), (9, 12, 9))
    # two drafting layers: 2 * 11 leaves 8 for one, 2 * 12 leaves 6: the most that they can hold
    assert scale_budgets((4, 8, 8), [(), (), (0, 1)], 3, average=10, start=4, decay=0) == ((), (12, 12, 6))


@pytest.mark.parametrize("average", [265, 650, 1300])
def test_other_budgets(average):
    """4 %, 10 % and 20 % of 6425: on average as asked, drafting layers above refining ones."""
    got = scale_budgets(SIZES_1M, [()] * 5 + [(0, 2)] * 8, 8, average=average)
    for row, seen in zip(got, accumulate(SIZES_1M)):
        assert bool(row) == (seen > average)
        if row:
            assert sum(row) == 8 * average
            assert row[0] == row[2] > row[1] == row[7]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(drafters=[()] * 3), "13"),
        (dict(start=100, decay=50), "change start"),
        (dict(start=2000), "change start"),
    ],
)
def test_impossible_budgets(options, says):
    given = dict(drafters=[()] * 8 + [(0,)] * 5) | options
    with pytest.raises(ValueError, match=says) as caught:
        scale_budgets(SIZES_1M, given.pop("drafters"), 8, **given)
    assert "\n" not in str(caught.value)


# --- lengths


class Small(Painter):
    """One head of four channels a layer, all random: for lengths of real schedules."""

    def __init__(self, method, layers, sides=SIDES_1M, **options):
        super().__init__(method, structural=((),) * layers, heads=1, dim=4, sides=sides, **options)


@pytest.mark.parametrize("scoring", ["paper", "official"])
def test_length_trace_of_the_2b(scoring):
    """Before the cut and after it, of layer 0 (drafts), 23 (drafts but for the last) and 1 (refines)."""
    layers = (0, 23, 1)
    budgets = [tuple(row[layer] for layer in layers) if row else () for row in published("2B")]
    painter = Small(ScaleKV(budgets, scoring=scoring), 3).paint(12)
    after = [[lengths[0] for lengths in scale] for scale in painter.lengths]
    grown = [[n + SIZES_1M[i + 1] for n in scale] for i, scale in enumerate(after)]
    assert [row[0] for row in after[:7]] == [row[2] for row in after[:7]] == [1, 5, 21, 57, 121, 265, 521]
    assert [(grown[i - 1][2], after[i][2]) for i in range(7, 12)] == [
        (921, 632), (1208, 594), (1618, 526), (2126, 420), (2724, 465),
    ]  # fmt: skip
    assert grown[11][2] == 4561  # the last scale is not cut
    assert [(grown[i - 1][0], after[i][0]) for i in range(7, 12)] == [
        (921, 920), (1496, 1490), (2514, 2510), (4110, 4100), (6404, 6385),
    ]  # fmt: skip
    assert [row[1] for row in after[7:12]] == [920, 1490, 2510, 4100, 465]


def test_memory_falls_to_the_budget():
    """Keys, values and 4 bytes of position for each held token: nothing else stays."""
    budgets = [tuple(row[layer] for layer in (0, 1, 2)) if row else () for row in published("2B")]
    painter = Small(ScaleKV(budgets), 3).paint(10)
    held = [length for scale in painter.lengths[9] for length in scale]
    assert held == [2510, 526, 526]
    assert painter.bytes == sum(held) * (2 * 4 * 4 + 4)


def test_nothing_is_dropped_at_first():
    """Up to `base` tokens, where the table has no entry, and where it allows more than there is."""
    few = (20, 20, 20)
    for method, cut in (
        (ScaleKV([few] * 6, base=0), 4),  # scales of 1, 4, 9, 16, 36: 30 tokens after the fourth
        (ScaleKV([few] * 6, base=66), 6),
        (ScaleKV([(), (), (), (), few], base=0), 5),
        (ScaleKV([(500,) * 3] * 6, base=0), 7),
    ):
        lengths = [scale[0][0] for scale in Painter(method).paint(6).lengths]
        seen = list(accumulate(SIZES))[:6]
        assert lengths[: cut - 1] == seen[: cut - 1]
        assert cut > 6 or lengths[cut - 1] == 20


def test_a_full_budget_changes_no_bit():
    plain, painter = Painter(None).paint(), Painter(ScaleKV([(1000,) * 3] * 9, base=0)).paint()
    for a, b in zip(plain.outputs, painter.outputs):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


# --- the grid


@pytest.mark.parametrize(
    ("rows", "cols", "at_rows", "at_cols"),
    [
        (20, 20, [2, 7, 12, 17], [2, 7, 12, 17]),
        (24, 64, [2, 8, 14, 20], [7, 23, 39, 55]),
        (10, 8, [0, 2, 4, 6], [0, 2, 4, 6]),
        (2, 7, [0, 1], [0, 1, 2, 3]),
    ],
)
def test_grid(rows, cols, at_rows, at_cols):
    painter = Painter(ScaleKV([()]), structural=((),), sides=(1, (rows, cols)))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScaleKV, "after_scale", lambda self, scale, fill, plan: seen.append(grid_centres(fill, 4)))
        painter.paint()
    assert seen[1].tolist() == [1 + r * cols + c for r in at_rows for c in at_cols]


@pytest.mark.parametrize("scoring", ["paper", "official"])
def test_the_grid_always_stays(scoring):
    """Also as the only tokens, and where its keys are what nobody looks at."""
    painter = Painter(ScaleKV([()] * 6 + [(16, 40, 16)], base=0, scoring=scoring)).paint(7)
    at = [(r * 10 + c) for r in (0, 2, 4, 6) for c in (0, 2, 4, 6)]
    want = torch.tensor(at) + sum(SIZES[:6])
    for head in range(4):
        assert torch.equal(painter.held(0, head), want)
        assert painter.held(1, head).numel() == 40
        assert set(want.tolist()) < set(painter.held(1, head).tolist())


def test_a_layout_without_places_is_refused():
    painter = Painter(ScaleKV([(16,) * 3] * 9, base=0)).paint(4)
    painter.chunk = layout(4, 6, 6)
    painter.chunk.row[:] = -1
    with pytest.raises(ValueError, match="rows or columns"):
        painter.scale(4)


# --- scores


def slow_kept(queries, keys, scoring: str, window: list[int], count: int, kernel: int) -> list[int]:
    """Positions that stay: fp64, by loops. Queries `[G, 16, D]` of one KV head, keys `[n, D]`."""
    n = keys.shape[0]
    score = [0.0] * n
    for group in queries.double():
        for q in group:
            row = (keys.double() @ q).tolist()
            if scoring == "paper":
                high = max(row)
                raised = [torch.tensor(x - high, dtype=torch.float64).exp().item() for x in row]
                row = [x / sum(raised) for x in raised]
            score = [a + b / len(queries) for a, b in zip(score, row)]
    pooled = []
    for i in range(n):
        near = [j for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < n]
        if scoring == "paper":
            pooled.append(sum(score[j] for j in near) / kernel)
        else:
            pooled.append(max((score[j] for j in near if j not in window), default=float("-inf")))
    rest = sorted((i for i in range(n) if i not in window), key=lambda i: (-pooled[i], i))
    return sorted(window + rest[: count - len(window)])


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kernel", [5, 1])
@pytest.mark.parametrize("scoring", ["paper", "official"])
def test_the_scores(scoring, kernel, group):
    """Two cuts of a drafting and a refining layer; the second chooses anew among what the first left."""
    budgets = [()] * 4 + [(60, 40, 30), (100, 35, 50)]
    painter = Painter(ScaleKV(budgets, base=0, kernel=kernel, scoring=scoring), group=group).paint(4)
    for scale, side in ((4, 6), (5, 8)):
        before = {(i, h): painter.held(i, h).tolist() for i in range(3) for h in range(4)}
        painter.scale(scale)
        start, cell = sum(SIZES[:scale]), side // 4
        grid = [r * side + c for r in range(0, 4 * cell, cell) for c in range(0, 4 * cell, cell)]
        grid = [at + (cell - 1) // 2 * (side + 1) for at in grid]
        for (i, h), old in before.items():
            held = old + list(range(start, start + SIZES[scale]))
            queries = painter.queries[scale][i][0, h * group : (h + 1) * group, grid]
            window = [len(old) + at for at in grid]
            kept = slow_kept(queries, painter.keys[i][0, h, held], scoring, window, budgets[scale][i], kernel)
            assert painter.held(i, h).tolist() == [held[at] for at in kept]


def test_attention_is_exact_over_what_is_held():
    painter = Painter(ScaleKV([()] * 4 + [(60, 40, 30)] * 4, base=0), batch=2).paint(5)
    for scale in range(5, len(SIZES)):
        before = {(i, r, h): painter.held(i, h, r) for i in range(3) for r in range(2) for h in range(4)}
        painter.scale(scale)
        new = torch.arange(SIZES[scale]) + sum(SIZES[:scale])
        for (i, r, h), positions in before.items():
            at = torch.cat([positions, new])
            keys, values = painter.keys[i][r, h, at].double(), painter.values[i][r, h, at].double()
            want = (painter.queries[scale][i][r, h].double() @ keys.T).softmax(-1) @ values
            assert (painter.outputs[scale][i][r, :, h].double() - want).abs().max() < 1e-5


def test_both_halves_of_guidance_choose_for_themselves():
    painter = Painter(ScaleKV([()] * 4 + [(60, 40, 30)] * 4, base=0), batch=2).paint(6)
    pairs = [(painter.held(i, h, 0), painter.held(i, h, 1)) for i in range(3) for h in range(4)]
    assert all(a.numel() == b.numel() for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in pairs)


# --- roles


def test_roles_are_found(tmp_path):
    """Layers that look at everything alike draft; sharp ones, which look at their own map and few keys, refine."""
    statistics = ScaleStatistics(top=8)
    sharp = (14.0, 0.0, 14.0, 14.0)
    structural = ((0, 1, 2, 3),) * 4
    for sample in range(3):
        Painter(statistics, structural=structural, sharp=sharp, sample=sample).paint()
    model = Identity("tiny_var", 4, 4)
    roles = statistics.layer_roles(4, model, first=5)
    assert roles.drafters == ((),) * 5 + ((1,),) * 4
    roles.save(tmp_path / "roles.json")
    roles = LayerRoles.load(tmp_path / "roles.json", model)
    budgets = scale_budgets(SIZES, roles.drafters, 4, average=66)
    painter = Painter(ScaleKV(budgets, base=66), structural=structural, sharp=sharp).paint(len(SIZES) - 1)
    for scale in (5, 6, 7):
        lengths = torch.tensor(painter.lengths[scale]).float()
        assert lengths.mean() == 66
        assert (lengths[1] > lengths[0]).all()


# --- refusals


def test_language_models_are_refused():
    with pytest.raises(ValueError, match="visual autoregressive"):
        mmkv.wrap(rm.make("qwen2"), cache=[ScaleKV()])
    with pytest.raises(ValueError, match="scale by scale"):
        Bare(ScaleKV()).feed(100)


def test_missing_budgets_are_refused():
    with pytest.raises(ValueError, match="needs budgets"):
        Painter(ScaleKV()).paint(1)


def test_budgets_of_another_model_are_refused():
    with pytest.raises(ValueError, match="budgets of 32 layers for scale 7: this model has 3") as caught:
        Painter(ScaleKV(published("2B"), base=20)).paint(9)
    assert "\n" not in str(caught.value)


def test_budgets_are_checked_against_a_models_layers():
    method = ScaleKV(((), (16, 20), (18, 30)))
    method.check_model(2, 4)
    with pytest.raises(ValueError, match="budgets of 2 layers for scale 1: this model has 3"):
        method.check_model(3, 4)
    with pytest.raises(ValueError, match="scale 2"):
        ScaleKV(((), (16, 20), (18, 30, 40))).check_model(2, 4)


@pytest.mark.parametrize(
    "options",
    [
        dict(budgets=5), dict(budgets=(20, 20)), dict(budgets=((15,),)), dict(budgets=((20.5,),)), dict(budgets=((True,),)),
        dict(base=-1), dict(base=1.5), dict(grid=0), dict(grid=True), dict(kernel=4), dict(kernel=0), dict(scoring="max"),
    ],
)  # fmt: skip
def test_impossible_settings(options):
    with pytest.raises(ValueError) as caught:
        ScaleKV(**options)
    assert "\n" not in str(caught.value)
