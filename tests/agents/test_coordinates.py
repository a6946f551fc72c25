"""Pixels of the resized screenshot, relative coordinates and pixels of the screen."""

from __future__ import annotations

import pytest
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mmkv.agents import Resize, from_screen, to_screen

# width, height -> resized width, height with at most 12845056 pixels (golden table of Qwen2.5-VL's resizing)
GOLDEN = {
    (1280, 720): (1288, 728), (1468, 956): (1456, 952), (1212, 758): (1204, 756), (1920, 1080): (1932, 1092),
    (2560, 1440): (2548, 1428),
}  # fmt: skip
ODD = [(1, 1), (1, 200), (3, 5), (27, 29), (41, 43), (333, 777), (1366, 768), (1919, 1079), (1080, 2401), (7680, 4321)]


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_sizes(size):
    resize = Resize()
    assert resize.size(*size) == GOLDEN[size]
    wide, high = GOLDEN[size]
    assert resize.relative(wide / 2, high / 2, size) == (0.5, 0.5)


def test_fewer_pixels():
    assert Resize(max_pixels=1280 * 28 * 28).size(1468, 956) == (1232, 784)
    assert Resize(max_pixels=1280 * 28 * 28).size(1920, 1080) == (1316, 728)
    assert Resize(max_pixels=2560 * 28 * 28).size(1920, 1080) == (1876, 1036)


@pytest.mark.parametrize("limits", [(3136, 12845056), (78400, 12845056), (3136, 200704), (256, 1280)])
def test_as_the_processor_resizes(limits):
    least, most = limits
    factor = 8 if most < 3136 else 28
    resize = Resize(least, most, factor)
    for width, height in ODD + [(w, h) for w in range(20, 300, 37) for h in range(20, 300, 41)]:
        high, wide = smart_resize(height, width, factor, least, most)
        assert resize.size(width, height) == (wide, high), (width, height)


@pytest.mark.parametrize("size", ODD)
def test_there_and_back(size):
    """Relative to pixels and back is exact; a pixel of the screen is found again, at odd sizes too."""
    resize = Resize()
    for point in [(0.0, 0.0), (0.123, 0.877), (0.5, 0.5), (1.0, 1.0)]:
        assert resize.relative(*resize.pixels(point, size), size) == pytest.approx(point, abs=1e-12)
    for x in {0, size[0] // 3, size[0] - 1}:
        for y in {0, size[1] // 2, size[1] - 1}:
            point = from_screen((x, y), size)
            assert to_screen(point, size) == (x, y)
            assert to_screen(resize.relative(*resize.pixels(point, size), size), size) == (x, y)


def test_rounding_to_whole_pixels_moves_a_click_by_less_than_one():
    """A model writes whole pixels of the resized screenshot: at most half of one is lost, in units of the screen."""
    resize, size = Resize(), (1919, 1079)
    wide, high = resize.size(*size)
    for x in range(0, 1919, 131):
        for y in range(0, 1079, 97):
            exact = resize.pixels(from_screen((x, y), size), size)
            found = resize.relative(round(exact[0]), round(exact[1]), size)
            assert abs(found[0] * 1919 - (x + 0.5)) <= 0.5 * 1919 / wide + 1e-9
            assert abs(found[1] * 1079 - (y + 0.5)) <= 0.5 * 1079 / high + 1e-9


def test_points_outside_go_to_the_edge():
    assert to_screen((-0.2, 1.7), (100, 50)) == (0, 49)
    assert to_screen((1.0, 1.0), (100, 50)) == (99, 49)


def test_limits_of_a_processor():
    images = Qwen2VLImageProcessor(size={"shortest_edge": 78400, "longest_edge": 12845056})
    assert Resize.of(images) == Resize(78400, 12845056, 28)
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 640})
    assert Resize.of(images) == Resize(64, 640, 8)
    with pytest.raises(ValueError, match="no limits of pixels"):
        Resize.of(object())


@pytest.mark.parametrize(
    ("size", "said"),
    [((0, 5), "0 x 5"), ((5, -1), "5 x -1"), ((1.5, 2), "1.5 x 2"), ((1, 201), "200 times"), ((9, 3000), "200")],
)
def test_sizes_that_no_processor_takes(size, said):
    with pytest.raises(ValueError, match=said):
        Resize().size(*size)
    with pytest.raises(ValueError, match=said):
        to_screen((0.5, 0.5), size)


@pytest.mark.parametrize(
    "options", [dict(min_pixels=0), dict(factor=True), dict(max_pixels=1.5), dict(min_pixels=9, max_pixels=8)]
)
def test_limits_out_of_range(options):
    with pytest.raises(ValueError, match="pixels"):
        Resize(**options)
