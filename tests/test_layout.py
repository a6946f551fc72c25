"""What each token is: layouts of every family, and position ids by the trained rule."""

from __future__ import annotations

import pytest
import random_models as rm
import torch
from packaging.version import Version
from transformers import DynamicCache

import mmkv
from mmkv.compat import TRANSFORMERS
from mmkv.layout import IMAGE, TEXT, VIDEO, TokenLayout

OLD_RULE = Version("5.3") > TRANSFORMERS  # stock text positions after a video are the trained ones


def layout_of(model, prompts, **given):
    """Layout of a batch of prompts, and the position ids that the decoder got."""
    seen = {}
    text = model.model.language_model if rm.is_vlm(model) else model.model
    hook = text.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with mmkv.wrapped(model), torch.no_grad():
        cache = model(**(given or rm.inputs(model, prompts))).past_key_values
    hook.remove()
    return cache.layers[0].state.layout, seen.get("position_ids")


# --- the class itself


def example():
    chunk = TokenLayout.text(2, 5, axes=3)
    chunk.modality[0, 1:4] = VIDEO
    chunk.modality[1, 2] = IMAGE
    chunk.valid[1, 0] = False
    chunk.positions[:, 1] += 10
    return chunk


def test_text_layout():
    chunk = TokenLayout.text(2, 3, start=7)
    assert len(chunk) == 3
    assert chunk.batch == 2
    assert chunk.positions.tolist() == [[[7, 8, 9]] * 2]
    assert not chunk.visual.any()
    assert chunk.valid.all()
    for name in ("medium", "frame", "row", "col"):
        assert (getattr(chunk, name) == -1).all()


def test_cat_crop_rows():
    a = example()
    both = a.cat(TokenLayout.text(2, 2, axes=3, start=5))
    assert len(both) == 7
    assert both.positions.shape == (3, 2, 7)
    assert both.counts() == {"text": 9, "image": 1, "video": 3}  # the padding is counted nowhere
    back = both.crop(5)
    for name in ("modality", "medium", "valid", "positions"):
        assert torch.equal(getattr(back, name), getattr(a, name))
    swapped = both.rows(torch.tensor([1, 0, 0]))
    assert swapped.batch == 3
    assert torch.equal(swapped.modality, both.modality[[1, 0, 0]])
    assert torch.equal(swapped.positions, both.positions[:, [1, 0, 0]])


# --- what the adapters make of prompts


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_video(family):
    """Grid (10, 4, 4): ten temporal patches of 2 x 2 merged tokens, raster order."""
    model = rm.make(family)
    got, positions = layout_of(model, [[20, 21, 22, rm.Video(10, 4, 4), 23, 24]])
    block = slice(4, 44)
    assert got.modality[0].tolist() == [TEXT] * 4 + [VIDEO] * 40 + [TEXT] * 3
    assert got.medium[0, block].tolist() == [0] * 40
    assert got.frame[0, block].tolist() == [f for f in range(10) for _ in range(4)]
    assert got.row[0, block].tolist() == [0, 0, 1, 1] * 10
    assert got.col[0, block].tolist() == [0, 1, 0, 1] * 10
    assert (got.frame[0, :4] == -1).all()
    assert torch.equal(got.positions, positions[-3:].to(torch.int32))
    assert got.counts() == {"text": 7, "image": 0, "video": 40}


def test_qwen_image_and_video_in_a_padded_batch():
    model = rm.make("qwen2_5_vl")
    prompts = [[20, rm.Image(4, 8), 21, rm.Video(2, 8, 4), 22], [30, rm.Video(3, 4, 4)]]
    given = rm.inputs(model, prompts)
    got, positions = layout_of(model, None, **given)
    assert torch.equal(got.modality == IMAGE, given["input_ids"] == rm.IMAGE)
    assert torch.equal(got.modality == VIDEO, given["input_ids"] == rm.VIDEO)
    assert torch.equal(got.valid, given["attention_mask"].bool())
    assert torch.equal(got.positions, positions[-3:].to(torch.int32))
    image = got.modality[0] == IMAGE
    assert got.row[0, image].tolist() == [0] * 4 + [1] * 4
    assert got.col[0, image].tolist() == [0, 1, 2, 3] * 2
    video = got.modality[0] == VIDEO
    assert got.frame[0, video].tolist() == [0] * 8 + [1] * 8
    assert got.row[0, video].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert len(set(got.medium[0, image].tolist())) == len(set(got.medium[0, video].tolist())) == 1
    assert got.medium[0, image][0] != got.medium[0, video][0]
    second = got.modality[1] == VIDEO
    assert got.medium[1, second].tolist() == [0] * 12
    assert got.frame[1, second].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_two_media_of_a_kind():
    model = rm.make("qwen2_5_vl")
    got, _ = layout_of(model, [[rm.Video(2, 4, 4), 20, rm.Video(1, 4, 8), rm.Video(1, 4, 4)]])
    video = got.modality[0] == VIDEO
    assert got.medium[0, video].tolist() == [0] * 8 + [1] * 8 + [2] * 4
    assert got.frame[0, video].tolist() == [0] * 4 + [1] * 4 + [0] * 12


def test_media_of_a_later_turn_get_new_numbers():
    model = rm.make("qwen2_5_vl")
    with mmkv.wrapped(model), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(**rm.inputs(model, [[20, rm.Video(2, 4, 4), 21]]), past_key_values=cache)
        more = rm.inputs(model, [[22, rm.Image(4, 4), rm.Video(1, 4, 4)]])
        del more["attention_mask"]
        positions = torch.arange(12, 12 + more["input_ids"].shape[1]).expand(3, 1, -1)
        model(**more, position_ids=positions, past_key_values=cache)
        got = cache.layers[0].state.layout
    assert got.medium[0, got.modality[0] == IMAGE].tolist() == [1] * 4
    assert got.medium[0, got.modality[0] == VIDEO].tolist() == [0] * 8 + [2] * 4
    assert got.positions[:, 0, -1].tolist() == [positions[0, 0, -1]] * 3


def test_qwen3_frames_are_blocks_of_one_medium():
    model = rm.make("qwen3_vl")
    got, positions = layout_of(model, [[20, rm.Video(3, 4, 8), 21]])
    video = got.modality[0] == VIDEO
    assert int(video.sum()) == 24
    assert got.frame[0, video].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert got.row[0, video].tolist() == ([0] * 4 + [1] * 4) * 3
    assert set(got.medium[0, video].tolist()) == {0}
    assert (video.int().diff() == 1).sum() == 3  # a time stamp before each frame
    assert torch.equal(got.positions, positions[-3:].to(torch.int32))


def test_llava_video_ends_in_a_newline():
    model = rm.make("llava_onevision")
    got, _positions = layout_of(model, [[20, rm.Video(3), 21, 22]])
    block = slice(1, 14)
    assert got.modality[0].tolist() == [TEXT] + [VIDEO] * 13 + [TEXT] * 2
    assert got.frame[0, block].tolist()[:12] == [0] * 4 + [1] * 4 + [2] * 4
    assert got.row[0, block].tolist() == [0, 0, 1, 1] * 3 + [-1]
    assert got.col[0, block].tolist() == [0, 1, 0, 1] * 3 + [-1]
    assert got.positions.shape == (1, 1, 16)
    assert got.positions[0, 0].tolist() == list(range(16))


@pytest.mark.parametrize(
    "size", [(32, 32), (50, 20), (20, 50), (31, 97), (96, 96), (400, 390), (64, 33), (7, 60), (300, 20)], ids=str
)
def test_llava_image_tiles(size):
    """As many tokens as the model's own packing gives: a base tile, then rows that end in a newline each."""
    model = rm.make("llava_onevision")
    prompt = [20, rm.Image(*size), 21]
    count = len(rm.inputs(model, [prompt])["input_ids"][0]) - 2
    got, _ = layout_of(model, [prompt])
    image = got.modality[0] == IMAGE
    assert int(image.sum()) == count
    frame, row, col = (getattr(got, name)[0, image] for name in ("frame", "row", "col"))
    assert (frame >= 0).all(), "the grid does not add up to the tokens"
    assert frame[:16].tolist() == [0] * 16
    assert col[:16].tolist() == [0, 1, 2, 3] * 4
    if count == 16:
        return  # so flat that unpadding leaves no row
    rows = int((row[16:] < 0).sum())  # a newline ends each row
    cols = (count - 16) // rows
    assert rows * cols == count - 16
    assert row[16:].tolist() == [r if c < cols - 1 else -1 for r in range(rows) for c in range(cols)]
    assert col[16:].tolist() == [*range(cols - 1), -1] * rows
    pixels = rm.inputs(model, [prompt])["pixel_values"]
    newline = model.model.image_newline
    with torch.no_grad():
        features = model.model.get_image_features(pixels, torch.tensor([size]), return_dict=True).pooler_output[0]
    is_newline = (features == newline).all(-1)
    assert is_newline.nonzero()[:, 0].tolist() == [16 + r * cols + cols - 1 for r in range(rows)]


def test_llava_several_images_are_not_tiled():
    model = rm.make("llava_onevision")
    given = rm.inputs(model, [[20, *[rm.IMAGE] * 17, 21, *[rm.IMAGE] * 17, 22]])
    given |= dict(
        pixel_values=torch.randn(2, 1, 3, 32, 32),
        image_sizes=torch.tensor([[40, 40], [20, 90]]),
        batch_num_images=torch.tensor([2]),
    )
    got, _ = layout_of(model, None, **given)
    image = got.modality[0] == IMAGE
    assert got.medium[0, image].tolist() == [0] * 17 + [1] * 17
    assert got.row[0, image].tolist() == ([r for r in range(4) for _ in range(4)] + [-1]) * 2


@pytest.mark.parametrize("family", rm.TEXTS)
def test_text_families(family):
    model = rm.make(family)
    got, _ = layout_of(model, [rm.words(9), rm.words(5, 1)])
    assert got.counts() == {"text": 14, "image": 0, "video": 0}
    assert got.valid.tolist() == [[True] * 9, [False] * 4 + [True] * 5]


def test_embeddings_without_ids():
    """Given inputs_embeds alone the modality comes from mm_token_type_ids, where the model knows them."""
    model = rm.make("qwen2_5_vl")
    embeds = torch.randn(1, 12, 64)
    got, _ = layout_of(model, None, inputs_embeds=embeds, position_ids=torch.arange(12).expand(3, 1, -1))
    assert got.counts() == {"text": 12, "image": 0, "video": 0}
    assert len(got) == 12


def test_layout_follows_the_cache():
    """Through beams, crops and batch selection, padding included."""
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [rm.default_prompt(model), rm.second_prompt(model)])
    with mmkv.wrapped(model):
        cache = DynamicCache(config=model.config)
        out = rm.generate(model, given, "beam", past_key_values=cache)
        state = cache.layers[0].state
        assert state.layout.batch == 6
        assert len(state.layout) == out.shape[1] - 1
        length = given["input_ids"].shape[1]
        assert torch.equal(state.layout.valid[::3, :length], given["attention_mask"].bool())
        cache.batch_select_indices(torch.tensor([3]))
        cache.crop(-8)
        assert state.layout.batch == 1
        assert len(state.layout) == out.shape[1] - 9
        assert state.layout.counts()["image"] == 8


@pytest.mark.parametrize("mode", ["greedy", "beam", "returns"])
@pytest.mark.parametrize("family", rm.VLMS)
def test_layout_in_generate_is_that_of_forward(family, mode):
    """Newer versions run the tower before the first forward and pass its output instead of pixels and grids."""
    model = rm.make(family)
    given = rm.inputs(model, [rm.default_prompt(model), rm.second_prompt(model)])
    want, _ = layout_of(model, None, **given)
    with mmkv.wrapped(model):
        cache = DynamicCache(config=model.config)
        rm.generate(model, given, mode, new=1, past_key_values=cache)
    got = cache.layers[0].state.layout.crop(len(want))
    repeat = got.batch // 2
    for name in ("modality", "medium", "frame", "row", "col", "valid"):
        assert torch.equal(getattr(got, name), getattr(want, name).repeat_interleave(repeat, 0)), name
    # stock: generate counts positions from the first valid token, a bare forward of these does not
    if family.startswith("qwen"):
        assert torch.equal(got.positions, want.positions.repeat_interleave(repeat, 1))


def test_a_generated_placeholder_is_text():
    """A token that merely has the placeholder's id, without features, is no vision token."""
    model = rm.make("qwen2_5_vl")
    with mmkv.wrapped(model, positions="trained"), torch.no_grad():
        cache = model(**rm.inputs(model, [EXAMPLE])).past_key_values
        for i in range(3):
            model(input_ids=torch.tensor([[rm.VIDEO]]), past_key_values=cache, position_ids=torch.full((3, 1, 1), 5))
            layout = cache.layers[0].state.layout
            assert int(layout.modality[0, -1]) == TEXT
            assert layout.positions[:, 0, -1].tolist() == [26 + i] * 3


# --- positions="trained"

EXAMPLE = [20, 21, 22, rm.Video(10, 4, 4), 23, 24]  # hf-vlms.md section 4


def positions_of(model, run, **options):
    """Position ids `[3, B, T]` of every forward of the decoder during `run()`."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["position_ids"][-3:].clone()), with_kwargs=True
    )
    with mmkv.wrapped(model, **options):
        run()
    hook.remove()
    return seen


@pytest.mark.parametrize("rule", ["stock", "trained"])
def test_text_after_a_video(rule):
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [EXAMPLE])
    first, *steps = positions_of(model, lambda: rm.generate(model, given, new=4), positions=rule)
    time, height, width = first[:, 0].tolist()
    assert time[4:44] == [4 + 2 * f for f in range(10) for _ in range(4)]
    assert height[4:44] == [4, 4, 5, 5] * 10
    assert width[4:44] == [4, 5, 4, 5] * 10
    after = [23, 24, 25] if rule == "trained" or OLD_RULE else [6, 7, 8]
    assert time[44:] == height[44:] == width[44:] == after
    for i, step in enumerate(steps, 1):
        assert step.shape == (3, 1, 1)
        assert step.flatten().tolist() == [after[-1] + i] * 3


def test_trained_is_stock_where_the_rule_was_never_changed():
    """5.2 still has the rule of training, so the two must agree to the bit there; newer versions must differ."""
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [EXAMPLE + rm.words(5), [30, rm.Image(8, 4), 31, rm.Video(6, 4, 4), 32]])
    keep = dict(return_dict_in_generate=True, output_logits=True, new=6)
    stock = rm.generate(model, given, **keep)
    with mmkv.wrapped(model, positions="trained"):
        trained = rm.generate(model, given, **keep)
    same = torch.equal(torch.stack(stock.logits), torch.stack(trained.logits))
    assert same == OLD_RULE


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "qwen2"])
def test_trained_changes_nothing_elsewhere(family):
    model = rm.make(family)
    given = rm.inputs(model, [rm.default_prompt(model), rm.second_prompt(model)])
    stock = rm.generate(model, given)
    with mmkv.wrapped(model, positions="trained"):
        assert torch.equal(stock, rm.generate(model, given))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("mode", rm.MODES)
def test_trained_in_every_mode(family, mode):
    """Every decode step continues at 1 + the largest position so far, in batches, beams and drafts."""
    model = rm.make(family)
    rows = [EXAMPLE] if mode == "lookup" else [EXAMPLE, [30, rm.Image(8, 4), 31, 32]]
    given = rm.inputs(model, rows)
    first, *steps = positions_of(model, lambda: rm.generate(model, given, mode, new=5), positions="trained")
    valid = given["attention_mask"].bool()
    last = torch.stack([first[:, r * (first.shape[1] // len(rows)), valid[r]].max() for r in range(len(rows))])
    if mode == "lookup":
        assert int(steps[0][0, 0, 0]) == int(last) + 1
        return
    for i, step in enumerate(steps, 1):
        want = (last + i).repeat_interleave(step.shape[1] // len(rows))
        assert torch.equal(step[..., 0], want.expand(3, -1))


def test_trained_over_turns():
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [EXAMPLE])

    def run():
        cache = mmkv.Cache(model)
        out = rm.generate(model, given, past_key_values=cache, new=3)
        ids = torch.cat([out, torch.tensor([[40, 41]])], 1)
        more = {k: v for k, v in given.items() if not k.startswith("pixel")}
        more |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        if "mm_token_type_ids" in more:
            kinds = more["mm_token_type_ids"]
            more["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, ids.shape[1] - kinds.shape[1]))
        rm.generate(model, more, past_key_values=cache, new=3)

    seen = positions_of(model, run, positions="trained")
    follow = torch.cat(seen[1:], -1)
    assert follow[0, 0].tolist() == list(range(26, 26 + follow.shape[-1]))
    assert torch.equal(follow[0], follow[1])


def test_trained_fractional_seconds():
    """T = start + trunc(frame x tokens per second x seconds): a float product, then truncation."""
    model = rm.make("qwen2_5_vl")
    given = rm.inputs(model, [EXAMPLE]) | dict(second_per_grid_ts=torch.tensor([0.75]))

    def run():
        with torch.no_grad():
            model(**given)

    (first,) = positions_of(model, run, positions="trained")
    assert first[0, 0, 4:44:4].tolist() == [4 + int(f * 1.5) for f in range(10)]
    assert first[0, 0, 44:].tolist() == [18, 19, 20]


def test_trained_batch_is_its_rows():
    model = rm.make("qwen2_5_vl")
    rows = [EXAMPLE, [30, rm.Video(6, 8, 4), 31, rm.Image(4, 8), 32]]

    def positions(prompts):
        given = rm.inputs(model, prompts)
        return positions_of(model, lambda: rm.generate(model, given, new=2), positions="trained")

    batch = positions(rows)
    for row, prompt in enumerate(rows):
        alone = positions([prompt])
        assert torch.equal(batch[0][:, row, -alone[0].shape[-1] :], alone[0][:, 0])
        assert torch.equal(batch[1][:, row], alone[1][:, 0])
