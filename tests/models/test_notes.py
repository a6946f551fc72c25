"""What methods note about patches in the tower comes down to the decoder's tokens as the features do."""

from __future__ import annotations

import pytest
import random_models as rm
import torch

import mmkv
from mmkv._wrap import session
from mmkv.layout import IMAGE, VIDEO, TokenLayout
from mmkv.models import adapter_for
from mmkv.tokens.method import TokenMethod


class Peek(TokenMethod):
    """Notes the mean of each patch's hidden state in the last block, and remembers what came out."""

    def __init__(self):
        self.seen, self.blocks = [], []

    def tower_blocks(self, depth):
        return (depth - 1,)

    def in_tower(self, view):
        self.blocks.append(view)
        view.notes["mean"] = view.of_patches(view.received_attention())

    def before_decoder(self, vision):
        self.seen.append(vision)


def layouts(model, given, kind) -> list[TokenLayout]:
    adapter = adapter_for(model)
    ids = given["input_ids"]
    chunk = adapter.layout(given, *ids.shape, None)
    out = []
    for row in range(len(ids)):
        mine = chunk.modality[row] == kind
        for medium in chunk.medium[row, mine].unique():
            at = ((chunk.medium[row] == medium) & mine).nonzero()[:, 0]
            out.append(chunk.rows(torch.tensor([row])).take(at))
    return out


def qwen_order(t: int, h: int, w: int, side: int) -> list[int]:
    """Raster index of each merged token in the tower's order: windows from left to right and down, frame by frame."""
    order = []
    for frame in range(t):
        for top in range(0, h, side):
            for left in range(0, w, side):
                order += [
                    (frame * h + r) * w + c
                    for r in range(top, min(top + side, h))
                    for c in range(left, min(left + side, w))
                ]
    return order


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 4, 12), (2, 10, 6), (1, 2, 2)])
def test_qwen_windows_are_undone(grid):
    tower = adapter_for(rm.make("qwen2_5_vl")).vision_tower()
    t, h, w = grid[0], grid[1] // 2, grid[2] // 2
    order = qwen_order(t, h, w, 2)  # window 16 px, patch 4, merge 2
    patches = torch.tensor(order, dtype=torch.float32).repeat_interleave(4) + torch.tensor(
        [-1.5, -0.5, 0.5, 1.5]
    ).repeat(t * h * w)
    (got,) = tower.to_tokens(patches, torch.tensor([grid]))
    assert got.tolist() == list(range(t * h * w))


def test_qwen_order_is_that_of_the_tower():
    """Change one merged token's pixels: without attention across windows, its own token changes most."""
    model = rm.make("qwen2_5_vl")
    visual = model.model.visual
    grid = torch.tensor([[1, 12, 8]])
    torch.manual_seed(0)
    pixels = torch.randn(96, 96)
    seen = {}
    hook = visual.blocks[0].register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
    with torch.no_grad():
        visual(pixels, grid_thw=grid)
        before = seen["x"]
        changed = pixels.clone()
        changed[5 * 4 : 6 * 4] += 1.0  # patches come block by block: those of merged token 5
        visual(changed, grid_thw=grid)
    hook.remove()
    moved = (seen["x"] - before).abs().sum(1)
    (got,) = adapter_for(model).vision_tower().to_tokens(moved, grid)
    assert got.nonzero()[:, 0].tolist() == [5]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_qwen_queries_and_keys_are_those_of_the_attention(family):
    """Received attention from the captured projections equals that of the eager weights."""
    model = rm.make(family, attn="eager")
    given = rm.inputs(model, [rm.words(3) + [rm.Video(2, 8, 4), rm.Image(4, 8)] + rm.words(3)])
    peek, weights = Peek(), []
    last = model.model.visual.blocks[-1].attn
    import sys

    module = sys.modules[type(last).__module__]
    stock = module.eager_attention_forward

    def spying(attention, *args, **kwargs):
        out = stock(attention, *args, **kwargs)
        if attention is last:
            weights.append(out[1][0].mean(0).mean(0))  # heads, queries
        return out

    module.eager_attention_forward = spying
    try:
        with torch.no_grad(), mmkv.wrapped(model, tokens=[peek]):
            model(**given)
    finally:
        module.eager_attention_forward = stock
    got = torch.cat([view.received_attention()[0] for view in peek.blocks])
    assert torch.allclose(got, torch.cat(weights), atol=1e-5)
    assert [len(v) for v in peek.seen] == [8, 16]  # images are run first
    for vision in peek.seen:
        assert vision.notes["mean"].shape == (len(vision),)


@pytest.mark.parametrize("size", [(32, 32), (50, 20), (33, 90), (96, 96), (30, 96), (64, 40), (90, 31)])
def test_llava_onevision_images(size, monkeypatch):
    """The model's own packing of patch indices, against where notes go."""
    model = rm.make("llava_onevision")
    given = rm.inputs(model, [[rm.FIRST_TEXT, rm.Image(*size), rm.FIRST_TEXT]])
    (layout,) = layouts(model, given, IMAGE)
    tiles = rm._llava_tiles(model, rm.Image(*size)) + 1
    values = torch.arange(tiles * 16, dtype=torch.float32).view(tiles, 16)
    monkeypatch.setattr(model.model.multi_modal_projector, "forward", lambda x: values[..., None])
    monkeypatch.delattr(model.model, "image_newline")
    monkeypatch.setattr(model.model, "image_newline", torch.zeros(1), raising=False)
    with torch.no_grad():
        want = model.model.get_image_features(
            given["pixel_values"], torch.tensor([size]), return_dict=True
        ).pooler_output[0]
    (got,) = adapter_for(model).notes_of_media(values, IMAGE, [layout])
    assert torch.equal(got, want[:, 0])


def test_llava_onevision_videos(monkeypatch):
    model = rm.make("llava_onevision")
    given = rm.inputs(model, [[rm.Video(3)] + rm.words(2), [rm.Video(3)] + rm.words(4)])
    values = torch.arange(6 * 16, dtype=torch.float32).view(6, 16)
    monkeypatch.setattr(model.model.multi_modal_projector, "forward", lambda x: values[..., None])
    monkeypatch.delattr(model.model, "image_newline")
    monkeypatch.setattr(model.model, "image_newline", torch.zeros(1), raising=False)
    with torch.no_grad():
        features = model.model.get_video_features(given["pixel_values_videos"], return_dict=True).pooler_output
    features = features.view(2, -1, features.shape[-1])[:, :12]  # without the newline, which 5.2 adds later
    got = adapter_for(model).notes_of_media(values, VIDEO, layouts(model, given, VIDEO))
    for mine, theirs in zip(got, features):
        assert torch.allclose(mine[:-1], theirs[:, 0])
        assert float(mine[-1]) == 0  # the newline


@pytest.mark.parametrize("mode", ["greedy", "beam", "returns"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava"])
def test_repeated_rows_get_the_notes_of_their_own_media(family, mode):
    """Beams and several answers repeat rows of two different prompts; each copy carries what the tower noted of its media."""
    model = rm.make(family)
    prompts = [rm.default_prompt(model, 64), rm.second_prompt(model, 64)]
    alone = []
    for prompt in prompts:
        peek = Peek()
        with torch.no_grad(), mmkv.wrapped(model, tokens=[peek]):
            model(**rm.inputs(model, [prompt]))
        alone.append(peek.seen)
    assert all(v.notes for seen in alone for v in seen)
    peek = Peek()
    given = rm.inputs(model, prompts)
    with mmkv.wrapped(model, tokens=[peek]):
        rm.generate(model, given, mode, new=1)
    repeat = {"greedy": 1, "beam": 3, "returns": 2}[mode]
    assert len(peek.seen) == repeat * sum(map(len, alone))
    first = alone[0] * repeat
    for got, want in zip(peek.seen, first):
        assert len(got) == len(want)
        assert torch.allclose(got.notes["mean"], want.notes["mean"], atol=1e-5)
        assert torch.allclose(got.features, want.features, atol=1e-5)


def test_features_in_place_of_pixels_bring_no_notes():
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [rm.words(3) + [rm.Video(2, 8, 4)] + rm.words(3)])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(given["input_ids"])
    peek = Peek()
    with torch.no_grad(), mmkv.wrapped(model, tokens=[peek]):
        model(
            inputs_embeds=embeds,
            mm_token_type_ids=2 * (given["input_ids"] == rm.VIDEO).int(),
            attention_mask=given["attention_mask"],
            position_ids=torch.arange(embeds.shape[1]).expand(3, 1, -1),
        )
    assert [v.notes for v in peek.seen] == [{}]


def test_another_image_than_the_prompt_holds_is_refused():
    """What the tower saw in this very forward has to be the prompt's images."""
    model = rm.make("llava")
    given = rm.inputs(model, [[rm.Image(48, 48)] + rm.words(3)])
    with torch.no_grad(), mmkv.wrapped(model, tokens=[Peek()]):
        media = session(model).dropping.media
        chunk = session(model).adapter.layout(given, *given["input_ids"].shape, None)
        chunk.valid[:] = True
        other = torch.nn.Parameter(torch.zeros(1))
        media.noted_in_tower(other, {"mean": torch.zeros(3, 36)})
        with pytest.raises(ValueError, match="in one call"):
            media.choose(chunk, torch.zeros(1, len(chunk), 64), {})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "llava"])
def test_features_bring_the_notes_of_their_own_run(family):
    """Encoded ahead, in another order than they are used: each prompt gets what the tower noted of its own media."""
    model = rm.make(family)
    if "mm_encoder_outputs" not in model.forward.__code__.co_varnames:
        import inspect

        if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            pytest.skip("this transformers takes no features in place of pixels")
    prompt = rm.default_prompt(model, 64)
    both = [rm.inputs(model, [prompt], seed=seed) for seed in (3, 4)]
    kind = "image" if family == "llava" else "video"
    pixels = [n for n in both[0] if n.startswith(("pixel_values", "image_sizes")) or n.endswith("grid_thw")]
    want = []
    for given in both:
        peek = Peek()
        with torch.no_grad(), mmkv.wrapped(model, tokens=[peek]):
            model(**given)
        want.append([v.notes["mean"] for v in peek.seen])
    peek = Peek()
    encode = getattr(model.model, f"get_{kind}_features")
    with torch.no_grad(), mmkv.wrapped(model, tokens=[peek]):
        features = [encode(**{n: given[n] for n in pixels}, return_dict=True) for given in both]
        for given, ready in zip(both, features):
            rest = {n: v for n, v in given.items() if n not in pixels}
            model(**rest, mm_encoder_outputs={kind: ready})
        noted = session(model).dropping.media._noted
        assert len(noted) == 2
        del features, ready
        session(model).dropping.media.begin()
        assert not session(model).dropping.media._noted
    got = [v.notes["mean"] for v in peek.seen]
    for mine, theirs in zip(got, sum(want, [])):
        assert torch.allclose(mine, theirs, atol=1e-5)
