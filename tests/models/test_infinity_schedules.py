"""Infinity's scales and rotary embedding, against numbers of the spec sheet and against loops."""

from __future__ import annotations

import math

import pytest
import torch

from mmkv.kernels import rotate
from mmkv.models.infinity.rotary import places, rotary_table
from mmkv.models.infinity.schedules import PIXELS, SCALES, Schedule, scale_schedule


def test_totals_of_square_images():
    assert [sum(scale_schedule(1.0, pixels).tokens) for pixels in PIXELS] == [521, 2521, 6425, 10521]
    assert [len(scale_schedule(1.0, pixels)) for pixels in PIXELS] == [7, 10, 12, 13]


def test_rows_of_the_table():
    assert scale_schedule(1.333, "0.25M").sizes == (
        (1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27)
    )  # fmt: skip
    assert scale_schedule(3.0).finest == (111, 37) and scale_schedule(2.5, "0.06M").finest == (25, 10)
    assert list(SCALES) == [0.333, 0.4, 0.5, 0.571, 0.666, 0.75, 0.8, 1.0, 1.25, 1.333, 1.5, 1.75, 2.0, 2.5, 3.0]


@pytest.mark.parametrize("ratio", SCALES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_every_schedule(ratio, pixels):
    """It starts with one token, grows, ends near its ratio, and lies within the whole one, whose end the places are on."""
    schedule = scale_schedule(ratio, pixels)
    assert schedule.sizes[0] == (1, 1)
    assert all(a[0] <= b[0] and a[1] <= b[1] and a != b for a, b in zip(schedule.sizes, schedule.sizes[1:]))
    assert abs(schedule.finest[0] / schedule.finest[1] - ratio) < 0.01
    assert scale_schedule(ratio).sizes[: len(schedule)] == schedule.sizes
    assert schedule.extent == scale_schedule(ratio).finest
    assert len(scale_schedule(ratio)) == 13


@pytest.mark.parametrize(
    ("tall", "wide"),
    [(1.25, 0.8), (1.333, 0.75), (1.5, 0.666), (1.75, 0.571), (2.0, 0.5), (2.5, 0.4), (3.0, 0.333)],
)
def test_wide_images_are_tall_ones_turned(tall, wide):
    assert scale_schedule(wide).sizes == tuple((w, h) for h, w in scale_schedule(tall).sizes)


def test_doubled():
    schedule = scale_schedule(1.333, "0.25M").doubled()
    assert schedule.finest == (72, 54) and schedule.sizes[0] == (2, 2)


@pytest.mark.parametrize(("ratio", "pixels", "says"), [
    (1.1, "1M", "ratio 1.1: possible are 0.333, 0.4"), (True, "1M", "ratio True"), ("1", "1M", "ratio '1'"),
    (1.0, "2M", "pixels '2M': possible are '0.06M'"), (1.0, None, "pixels None"), ([], "1M", "ratio"),
])  # fmt: skip
def test_other_shapes_are_refused(ratio, pixels, says):
    with pytest.raises(ValueError, match=says) as caught:
        scale_schedule(ratio, pixels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [(), ((1, 0),), ((1, 1.5),), ((True, 1),)])
def test_schedules_of_ones_own(sizes):
    with pytest.raises(ValueError, match="rows and columns"):
        Schedule(sizes, (4, 4))


def test_places_are_rounded_half_to_even():
    assert places(6, 64).tolist() == [0, 11, 21, 32, 43, 53]
    assert places(12, 64).tolist() == [0, 5, 11, 16, 21, 27, 32, 37, 43, 48, 53, 59]
    assert places(4, 10).tolist() == [0, 2, 5, 8]  # of 0, 2.5, 5, 7.5


def test_rotation_pair_by_pair():
    """Against loops in fp64: pairs of neighbours, the first half of them by row, the others by column."""
    schedule, dim = scale_schedule(1.333, "0.06M"), 16
    scale, (rows, columns) = 3, (8, 6)
    x = torch.randn(2, 3, rows * columns, dim, generator=torch.Generator().manual_seed(0))
    found = rotate(x, *rotary_table(schedule, range(scale, scale + 1), dim), interleaved=True)
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        row, column = round(row * 72 / 8), round(column * 54 / 6)
        for pair in range(dim // 2):
            place, k = (row, pair) if pair < dim // 4 else (column, pair - dim // 4)
            angle = place * 10000 ** (-2 * k / (dim // 2))
            a, b = x[..., token, 2 * pair].double(), x[..., token, 2 * pair + 1].double()
            want = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
            for i in range(2):
                assert (found[..., token, 2 * pair + i] - want[i]).abs().max() < 1e-5


def test_tables_of_scales_are_parts_of_the_whole():
    schedule = scale_schedule(1.0, "0.06M")
    whole = rotary_table(schedule, range(7), 32)
    assert [tuple(part.shape) for part in whole] == [(521, 16)] * 2
    one = rotary_table(schedule, range(3, 4), 32)
    assert all(torch.equal(a[21:57], b) for a, b in zip(whole, one))
