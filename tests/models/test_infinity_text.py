"""Prompts through a T5 encoder (random and small, with a tokenizer of letters), as Infinity wants them."""

from __future__ import annotations

from types import SimpleNamespace

import infinity_tiny as tiny
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from mmkv.models.infinity.text import T5Prompts


def letters(prompt: str, return_tensors: str):
    """A token for each letter, and an end."""
    return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % 90 + 2 for letter in prompt] + [1]]))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=100, d_model=256, d_kv=16, d_ff=64, num_layers=2, num_heads=4)).eval()


def test_features_are_those_of_the_padded_batch_without_its_padding(encoder):
    """The released scripts pad to 512 tokens with a mask, and cut the features to the prompt."""
    prompts = ["a red circle", "blue"]
    found = T5Prompts(encoder, letters)(prompts)
    assert [tuple(features.shape) for features in found] == [(13, 256), (5, 256)]
    assert all(features.dtype == torch.float32 for features in found)
    ids, mask = torch.zeros(2, 40, dtype=torch.int64), torch.zeros(2, 40, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        own = letters(prompt, "pt").input_ids[0]
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    with torch.no_grad():
        padded = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, features in enumerate(found):
        assert (padded[row, : len(features)] - features).abs().max() < 1e-5


def test_half_precision_encoders_give_fp32(encoder):
    half = T5EncoderModel(encoder.config).to(torch.bfloat16)
    assert T5Prompts(half, letters)(["red"])[0].dtype == torch.float32


def test_prompts_that_are_too_long_are_refused(encoder):
    prompts = T5Prompts(encoder, letters, most=8)
    assert len(prompts(["seven.."])[0]) == 8
    with pytest.raises(
        ValueError, match=r"a prompt of 9 tokens \('eight\.\.\.' \.\.\.\): this model takes 8 at most"
    ) as caught:
        prompts(["red", "eight..."])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [None, 3, b"red"])
def test_what_is_no_text_is_refused(encoder, prompt):
    with pytest.raises(ValueError, match="a text is needed"):
        T5Prompts(encoder, letters)([prompt])


def test_with_the_model(encoder):
    painter = tiny.lively()
    painter.text_encoder = T5Prompts(encoder, letters, most=16)
    features = painter.text_encoder(["a red circle", "blue"])
    painted = painter.generate(features, seed=0)
    assert painted.latent.shape == (2, 8, 16, 16)
