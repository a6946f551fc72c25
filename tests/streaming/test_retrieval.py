"""Which frames come back: hand-computed, and the compact index against repeated heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from mmkv.streaming.choosing import best, fixed, representatives, scores
from mmkv.streaming.external import ImageTextRetriever


def test_the_compact_index_scores_as_repeated_heads_do():
    """Check 4: query heads of a group summed, against keys repeated for each of them (the official index)."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 5 * 7, 8, generator=generator)
    queries = torch.randn(6, 3, 8, generator=generator)
    index = representatives(keys, 7)
    assert index.shape == (5, 16)
    official = torch.stack([keys[:, f * 7 : f * 7 + 7].mean(1).repeat_interleave(3, 0).flatten() for f in range(5)])
    mean = queries.mean(1).flatten()
    assert torch.allclose(scores(queries, index, 2, "dot"), official @ mean, atol=1e-5)
    want = torch.nn.functional.cosine_similarity(official, mean[None])
    assert torch.allclose(scores(queries, index, 2, "cosine"), want, atol=1e-5)


def test_best_by_hand():
    found = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.7])
    assert best(found, 2) == [1, 3]
    assert best(found, 9) == [0, 1, 2, 3, 4]
    assert best(found, 2, without=[1]) == [3, 4]
    assert best(found, 5, without=[1]) == [0, 2, 3, 4]
    # groups (0, 1), (2, 3), (4,): means .5, .5, .7; the last one is shorter and counts by its own
    assert best(found, 2, group=2) == [4]
    assert best(torch.tensor([0.1, 0.9, 0.2, 0.9, 0.7]), 3, group=2) == [4]
    assert best(torch.tensor([0.1, 0.9, 0.2, 0.9, 0.5]), 2, group=2) == [2, 3]


def test_fixed_by_hand():
    assert fixed("recent", 10, 3) == [7, 8, 9]
    assert fixed("uniform", 10, 2) == [2, 7]
    assert fixed("uniform", 3, 8) == [0, 1, 2]
    assert fixed("recent", 5, 2, without=[4]) == [2, 3]


class Clip(torch.nn.Module):
    """Colours as vectors."""

    device = torch.device("cpu")

    def get_image_features(self, pixels):
        return pixels

    def get_text_features(self, pixels):
        return pixels


class ClipProcessor:
    def __call__(self, images=None, text=None, **_):
        if images is not None:
            return BatchFeature({"pixels": torch.stack([torch.tensor(i.reshape(-1, 3).mean(0)) for i in images])})
        return BatchFeature({"pixels": torch.tensor([{"red": [1.0, 0, 0], "blue": [0, 0, 1.0]}[text[0]]])})


def test_external_retrieval():
    retriever = ImageTextRetriever(Clip(), ClipProcessor())
    pictures = np.zeros((8, 4, 4, 3), np.uint8)
    pictures[2, ..., 0] = 200  # the first picture of frame 1 of 4
    pictures[6, ..., 2] = 200
    pictures[7, ..., 0] = 200  # a second picture is not looked at
    pictures += 10
    retriever.see(pictures, [0.0, 1.0, 2.0, 3.0])
    assert retriever.choose("red", 1) == [1]
    assert retriever.choose("blue", 1) == [3]


def test_a_model_without_text_is_refused():
    with pytest.raises(ValueError, match="CLIP"):
        ImageTextRetriever(torch.nn.Linear(2, 2), None)
