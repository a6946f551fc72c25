"""OpenCUA: Qwen2.5-VL's tower, features in place of one placeholder, one-axis positions."""

from __future__ import annotations

import agent_models as am
import pytest
import random_models as rm
import torch
import transformers as tf

import mmkv
from mmkv.models import adapter_for
from mmkv.models.expansion import expand, image_tokens, images_of_rows

GRID = torch.tensor([[1, 8, 12]])  # 24 tokens
IDS = torch.tensor([[21, 22, rm.IMAGE, 23, 24]])


def pixels(grid=GRID, seed=0):
    return torch.randn(int(grid.prod(-1).sum()), 96, generator=torch.Generator().manual_seed(seed))


def naive(model, ids, grid, patches):
    """Logits of Qwen2's decoder and head over embeddings that are put together by hand, at positions 0, 1, 2 ..."""
    features = model.model.visual(patches, grid_thw=grid).pooler_output
    embed = model.model.language_model.embed_tokens
    counts, rows, at = [int(t * h * w) // 4 for t, h, w in grid], [], 0
    for token in ids[0].tolist():
        if token == rm.IMAGE:
            n = counts.pop(0)
            rows.append(features[at : at + n])
            at += n
        else:
            rows.append(embed(torch.tensor([token])))
    plain = tf.Qwen2ForCausalLM(model.config.text_config).eval()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    embeds = torch.cat(rows)[None]
    return plain(inputs_embeds=embeds, position_ids=torch.arange(embeds.shape[1])[None]).logits


@torch.no_grad()
def test_one_placeholder_is_the_images_rows():
    """(a) of the sheet; two images too."""
    model = rm.make("opencua")
    given = dict(pixel_values=pixels(), grid_thws=GRID)
    out = model(IDS, **given).logits
    assert out.shape == (1, 28, rm.VOCAB)
    assert torch.allclose(out, naive(model, IDS, GRID, pixels()), atol=1e-5)
    two = torch.tensor([[1, 4, 4], [1, 8, 4]])
    ids = torch.tensor([[rm.IMAGE, 20, rm.IMAGE]])
    out = model(ids, pixel_values=pixels(two), image_grid_thw=two).logits
    assert torch.allclose(out, naive(model, ids, two, pixels(two)), atol=1e-5)


def mrope_twin(model):
    """A Qwen2.5-VL with the same tensors."""
    twin = rm.make("qwen2_5_vl", rms_norm_eps=model.config.text_config.rms_norm_eps)
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def test_not_mrope():
    """(b): the same tensors with three-axis positions give other logits; (c): without an image the same."""
    model = rm.make("opencua")
    twin = mrope_twin(model)
    ids = torch.tensor([[21, rm.VISION_START] + [rm.IMAGE] * 24 + [23, 24]])
    given = dict(pixel_values=pixels(), image_grid_thw=GRID)
    kinds = {"mm_token_type_ids": (ids == rm.IMAGE).long()} if am.takes(twin, "mm_token_type_ids") else {}
    ours, theirs = model(ids, **given).logits, twin(input_ids=ids, **given, **kinds).logits
    assert (ours[:, :3] - theirs[:, :3]).abs().max() < 1e-5  # up to the first of the image's tokens
    assert (ours[:, -1] - theirs[:, -1]).abs().max() > 1e-3
    text = torch.tensor([rm.words(30)])
    assert torch.allclose(model(text).logits, twin(input_ids=text).logits, atol=1e-5)


@torch.no_grad()
def test_generate_returns_the_prompt_that_was_given():
    model = rm.make("opencua")
    given = dict(pixel_values=pixels(), do_sample=False, max_new_tokens=6)
    short = model.generate(IDS, grid_thws=GRID, **given)
    assert torch.equal(short[:, :5], IDS) and short.shape == (1, 11)
    assert torch.equal(short, model.generate(input_ids=IDS, image_grid_thw=GRID, **given))
    long = expand(IDS, None, [24], rm.IMAGE)[0]
    assert torch.equal(model.generate(long, grid_thws=GRID, **given)[:, 28:], short[:, 5:])
    out = model.generate(IDS, grid_thws=GRID, return_dict_in_generate=True, **given)
    assert torch.equal(out.sequences, short) and out.past_key_values.get_seq_length() == 28 + 5


@torch.no_grad()
def test_greedy_by_hand():
    """Each token is the argmax of a forward over all that precedes it."""
    model = rm.make("opencua")
    ids = IDS
    for _ in range(5):
        ids = torch.cat([ids, model(ids, pixel_values=pixels(), grid_thws=GRID).logits[:, -1:].argmax(-1)], 1)
    given = dict(pixel_values=pixels(), grid_thws=GRID, do_sample=False, max_new_tokens=5)
    assert torch.equal(model.generate(IDS, **given), ids)
    assert torch.equal(model.generate(IDS, use_cache=False, **given), ids)


@torch.no_grad()
@pytest.mark.parametrize(
    "more", [{}, dict(num_beams=3), dict(num_beams=2, num_return_sequences=2), dict(use_cache=False)]
)
def test_a_batch_is_its_rows(more):
    """Two images in one row, one in the other, padded on the left before and after images are expanded."""
    model = rm.make("opencua")
    grid = torch.tensor([[1, 8, 12], [1, 4, 4], [1, 8, 4]])
    patches = pixels(grid)
    ids = torch.tensor([[21, 22, rm.IMAGE, 23, rm.IMAGE], [0, 0, rm.IMAGE, 23, 24]])
    mask = (ids != 0).long()
    options = dict(do_sample=False, max_new_tokens=4, **more)
    both = model.generate(ids, attention_mask=mask, pixel_values=patches, grid_thws=grid, **options)
    times = more.get("num_return_sequences", 1)
    one = model.generate(ids[:1], pixel_values=patches[: 96 + 16], grid_thws=grid[:2], **options)
    two = model.generate(ids[1:, 2:], pixel_values=patches[96 + 16 :], grid_thws=grid[2:], **options)
    assert torch.equal(both[:times, 5:], one[:, 5:]) and torch.equal(both[times:, 5:], two[:, 3:])
    assert torch.equal(both[:, :5], ids.repeat_interleave(times, 0))


@torch.no_grad()
def test_wrapped_with_one_placeholder():
    """What `generate` and the forward do with short ids, wrapped with nothing and with methods."""
    model = rm.make("opencua")
    given = dict(pixel_values=pixels(), grid_thws=GRID)
    stock, logits = model.generate(IDS, do_sample=False, max_new_tokens=5, **given), model(IDS, **given).logits
    with mmkv.wrapped(model):
        assert torch.equal(stock, model.generate(IDS, do_sample=False, max_new_tokens=5, **given))
        assert torch.equal(logits, model(IDS, **given).logits)
    with mmkv.wrapped(
        model, tokens=[mmkv.tokens.FastV(layer=1)], cache=[mmkv.cache.KIVI(bits=4, group=32, residual=32)]
    ):
        assert model.generate(IDS, do_sample=False, max_new_tokens=5, **given).shape == stock.shape


def test_layout():
    """Each image is a medium with rows and columns; short and long ids give the same."""
    model = rm.make("opencua")
    adapter = adapter_for(model)
    grid = torch.tensor([[1, 4, 8], [1, 4, 4]])
    patches = pixels(grid)
    ids = torch.tensor([[20, rm.IMAGE, 21, rm.IMAGE, 22]])
    for given in (ids, expand(ids, None, [8, 4], rm.IMAGE)[0]):
        for name in ("grid_thws", "image_grid_thw"):
            layout = adapter.layout({"input_ids": given, "pixel_values": patches, name: grid}, 1, 15, None)
            assert layout.medium[0].tolist() == [-1] + [0] * 8 + [-1] + [1] * 4 + [-1]
            assert layout.row[0].tolist() == [-1] + [0] * 4 + [1] * 4 + [-1, 0, 0, 1, 1, -1]
            assert layout.col[0].tolist() == [-1, 0, 1, 2, 3, 0, 1, 2, 3, -1, 0, 1, 0, 1, -1]
            assert layout.frame[0].tolist() == [-1] + [0] * 8 + [-1] + [0] * 4 + [-1]
    with pytest.raises(ValueError, match="cannot be streamed"):
        adapter.frames_reader(None)


def test_expand():
    """A hand-made batch."""
    ids = torch.tensor([[1, 9, 2, 9], [0, 3, 9, 4]])
    mask = torch.tensor([[7, 1, 1, 1, 1], [7, 0, 1, 1, 1]])  # one column of the past
    out, grown = expand(ids, mask, [2, 1, 4], 9)
    assert out.tolist() == [[0, 0, 1, 9, 9, 2, 9], [0, 3, 9, 9, 9, 9, 4]]
    assert grown.tolist() == [[7, 0, 0, 1, 1, 1, 1, 1], [7, 0, 1, 1, 1, 1, 1, 1]]
    assert expand(ids, None, [2, 1, 4], 9)[1].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    again = expand(out, grown, [2, 1, 4], 9)
    assert again[0] is out and again[1] is grown
    assert image_tokens(torch.tensor([[1, 4, 6], [2, 4, 4]]), 2) == [6, 8]
    assert images_of_rows(out, [2, 1, 4], 9) == [2, 1]
    assert images_of_rows(torch.tensor([[1, 2], [9, 9]]), [2], 9) == [0, 1]


def test_bad_input():
    model = rm.make("opencua")
    given = dict(pixel_values=pixels())
    with pytest.raises(ValueError, match=r"2 placeholders .* for 1 images of 24 tokens"):
        model(torch.tensor([[rm.IMAGE, 20, rm.IMAGE]]), grid_thws=GRID, **given)
    with pytest.raises(ValueError, match="0 placeholders"):
        model.generate(torch.tensor([[20, 21]]), grid_thws=GRID, max_new_tokens=2, **given)
    with pytest.raises(ValueError, match="two names of one thing"):
        model(IDS, grid_thws=GRID, image_grid_thw=GRID, **given)
    with pytest.raises(ValueError, match="without grid_thws"):
        model(IDS, **given)
    with pytest.raises(ValueError, match="one of the two"):
        model()
    with pytest.raises(ValueError, match="leave position_ids out"):
        model(IDS, position_ids=torch.arange(5)[None], grid_thws=GRID, **given)
    with pytest.raises(ValueError, match="do not fit"):
        images_of_rows(torch.tensor([[9, 9, 9]]), [2], 9)


@torch.no_grad()
def test_half_precision_and_labels():
    model = rm.make("opencua")
    loss = model(IDS, pixel_values=pixels(), grid_thws=GRID, labels=torch.full((1, 28), 30)).loss
    want = model(IDS, pixel_values=pixels(), grid_thws=GRID).logits[:, :-1].log_softmax(-1)[..., 30].mean()
    assert torch.allclose(loss, -want, atol=1e-5)
    kept = model(IDS, pixel_values=pixels(), grid_thws=GRID, logits_to_keep=2).logits
    assert kept.shape == (1, 2, rm.VOCAB)
    half = model.to(torch.bfloat16)
    assert half(IDS, pixel_values=pixels(), grid_thws=GRID).logits.dtype == torch.bfloat16
