"""The perplexity and low-bit benchmarks: needles are found where they were put, and sizes are what is stored."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mmkv
from mmkv.cache import PyramidKV, SnapKV, WaterfillKV

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import low_bit
import perplexity


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text, return_tensors=None, add_special_tokens=True):
        ids = [ord(c) for c in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


TEXT = "\n".join(f"line {i} of a text that says nothing much" for i in range(60))


@pytest.fixture
def found():
    return perplexity.needles(Letters(), TEXT, 2000, seed=0)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_needles_are_in_the_text_and_told_apart_by_their_first_digit(found):
    text = Letters().decode(found.ids[0].tolist())
    assert len(set(found.digits)) == 10
    for name, ids, digit in zip(found.names, found.asked, found.digits):
        question = Letters().decode(ids.tolist())
        number = question[-5:]
        assert number.isdigit()
        assert text.count(f"the secret number of {name} is {number}") == 2
        assert ids[found.first] == digit == ord(number[0])
    depths = [text.index(f"number of {name} is") / len(text) for name in found.names]
    assert depths == sorted(depths)
    assert depths[0] < 0.1
    assert depths[-1] > 0.85


@pytest.mark.parametrize(("shift", "right"), [(0, (10, 10)), (1, (0, 0))])
def test_recall_counts_right_answers(found, shift, right):
    """A model that says the next token, or the one after it in the alphabet (the answer of another name)."""

    def say(ids, past_key_values):
        assert torch.equal(ids, found.asked[:, :-1])
        digit = found.asked[:, 1:]
        said = torch.where((digit >= 48) & (digit < 58), (digit - 48 + shift) % 10 + 48, digit)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, 128).float())

    assert perplexity.recall(say, None, found) == right


@pytest.mark.parametrize(
    "cache",
    [
        (WaterfillKV(group=32, residual=32),),
        (SnapKV(budget=0.5),),
        (PyramidKV(budget=0.5),),
        (SnapKV(budget=0.7), WaterfillKV(group=32)),
    ],
    ids=lambda cache: type(cache[0]).__name__ + str(len(cache)),
)
def test_a_restored_cache_is_that_of_a_prefill(model, cache):
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(0))
    heard = perplexity.listen(model, ids[:, :180])
    with mmkv.wrapped(model, cache=cache):
        restored = perplexity.restored(model, heard)
        sizes = perplexity.size_of(restored)
        assert sizes["kv_bytes"] == perplexity.size_of(perplexity.prefilled(model, ids[:, :180]))["kv_bytes"]
        want = perplexity.scored(model, perplexity.prefilled(model, ids[:, :180]), ids, 180)
        got = perplexity.scored(model, restored, ids, 180)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("layer", "package"), [("Quanto", "optimum.quanto"), ("HQQ", "hqq")])
def test_size_of_transformers_quantized_layers(layer, package):
    """2 bits a code, and fp16 scale and zero point for every 64: 2.5 bits; the rest of the prompt is a dense tail."""
    pytest.importorskip(package)
    kind = getattr(perplexity, f"{layer}QuantizedLayer")
    keys, values = torch.randn(1, 2, 200, 64).half(), torch.randn(1, 2, 200, 64).half()
    method = perplexity.HFQuantized(kind, 2)
    cache = method.store([perplexity.Heard(keys, values, None, None)])
    old = 128  # (200 - 64) // 64 groups
    codes = 2 * 2 * old * 64
    packed, tail = codes * 2 / 8 + codes / 64 * 4, 2 * 2 * (200 - old) * 64 * 2
    assert method.size(cache) == pytest.approx(
        dict(packed_bits=2.5, kv_bytes=packed + tail, kv_bits=8 * (packed + tail) / (2 * 2 * 200 * 64))
    )
    read = method.read(cache, 3).layers[0]
    assert read.keys.shape == (3, 2, 200, 64)
    torch.testing.assert_close(read.values[1, :, old:], values[0, :, old:])
    assert (read.keys - keys).abs().max() < 3


def test_heads_cut_in_two_keep_every_product():
    keys, values, queries = torch.randn(2, 7, 8), torch.randn(2, 7, 8), torch.randn(6, 3, 8)
    k, v, q = low_bit.in_halves(keys, values, queries)
    assert (k.shape, v.shape, q.shape) == ((4, 7, 4), (4, 7, 4), (12, 3, 4))
    for head in range(6):
        shared = head // 3
        whole = queries[head] @ keys[shared].T
        halves = sum(q[(2 * shared + part) * 3 + head % 3] @ k[2 * shared + part].T for part in range(2))
        torch.testing.assert_close(halves, whole)


def test_free_sizes_expect_no_more_error():
    keys = torch.randn(3, 1100, 32) * torch.rand(3, 1, 32).pow(4) * torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    for row in low_bit.sizes([(keys, keys, keys)]):
        assert row["free"] <= row["own"] * 1.001
        assert row["own"] <= 1.001


def test_output_error_falls_with_bits():
    keys, values, queries = torch.randn(2, 1100, 64), torch.randn(2, 1100, 64), torch.randn(4, 8, 64)
    low, bits, _ = low_bit.output_error(low_bit.water(key_bits=1), keys, values, queries)
    high, more, _ = low_bit.output_error(low_bit.water(key_bits=4, value_bits=4), keys, values, queries)
    assert bits < more
    assert high < low / 4


def test_divergence_of_like_predictions_is_nothing():
    logits = torch.randn(100, 50)
    assert low_bit._divergence(logits, logits + 3) == pytest.approx(0, abs=1e-5)
    one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    want = -0.5 * sum(p.log().item() for p in torch.softmax(other, -1)[0]) + torch.tensor(0.5).log().item()
    assert low_bit._divergence(one, other) == pytest.approx(want)


def test_the_page_has_the_figures_of_the_result_files():
    """`python benchmarks/low_bit.py --write` puts them there."""
    assert (low_bit.ROOT / "docs/low-bit.md").read_text() == low_bit.document()
