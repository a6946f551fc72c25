"""The counter of multiply-adds against the numbers that papers print."""

from __future__ import annotations

import pytest

from mmkv.parts.flops import decoder_macs, vit_macs
from mmkv.tokens import DiffRate, ToMe


@pytest.mark.parametrize(
    ("model", "target", "dim", "patch", "published"),
    [
        ("deit-s", 2.9, 384, 16, 2.905),
        ("deit-b", 11.5, 768, 16, 11.517),
        ("mae-b", 11.5, 768, 16, 11.517),
        ("mae-l", 42.3, 1024, 16, 42.290),
        ("mae-h", 103.4, 1280, 14, 103.337),
    ],
)
def test_diffrate_published(model, target, dim, patch, published):
    rates = DiffRate.released(model, target)
    behind = [merged for _, merged in rates.kept(rates.tokens)]
    assert round(vit_macs(rates.tokens, behind, dim, patch) / 1e9, 3) == published


@pytest.mark.parametrize(
    ("dim", "depth", "tokens", "patch", "published"), [(384, 12, 197, 16, 4.6), (768, 12, 197, 16, 17.6)]
)
def test_dense_published(dim, depth, tokens, patch, published):
    assert vit_macs(tokens, [tokens] * depth, dim, patch) / 1e9 == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize(("r", "last"), [(8, 101), (13, 41), (16, 11)])
def test_tome_tokens(r, last):
    """197 tokens behind 12 blocks; with r=16 the last block finds but 10 pairs."""
    tokens = 197
    for wanted in ToMe(r).schedule(12):
        tokens -= min(wanted, (tokens - 1) // 2)
    assert tokens == last


def test_one_block_by_hand():
    # 3 tokens in, 2 behind; C = 2, patch 1, 1 channel, 5 classes
    patches, head = 3 * 2 * 1, 2 * 5
    attention = 3 * 2 * 2 * 4 + 2 * 3 * 3 * 2  # q, k, v, out; q.k and p.v
    mlp = 2 * 2 * 8 * 2  # two matrices of 2 x 8
    assert vit_macs(3, [2], 2, 1, classes=5, channels=1) == patches + head + attention + mlp


def test_decoder_by_hand():
    # one layer, 3 tokens, C = 4, two heads of 2, one KV head, MLP 5: q 4x4, k and v 4x2, out 4x4, three matrices 4x5
    projections, mlp = 3 * (16 + 8 + 8 + 16), 3 * 3 * 20
    assert decoder_macs([3], 4, 5, heads=2, kv_heads=1) == projections + 2 * 9 * 4 + mlp
    assert decoder_macs([3], 4, 5, heads=2, kv_heads=1, causal=True) == projections + 2 * 6 * 4 + mlp
    assert decoder_macs([3, 1], 4, 5, heads=2) == 3 * 64 + 2 * 9 * 4 + mlp + 64 + 2 * 4 + 60
