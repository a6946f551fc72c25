"""LongVA's container against hand computation, transformers' LLaVA-OneVision, and numbers of the public code.

`longva_public.json` holds what the public code (EvolvingLMMs-Lab/LongVA at f4c8781: `process_anyres_image`,
`CLIPVisionTower`, `prepare_inputs_labels_for_multimodal`, `select_best_resolution`) gave for the weights and pictures of
`longva_checkpoint.py`, run on a stock CLIP and Qwen2: pixels, spliced embeddings, logits, best resolutions.
"""

from __future__ import annotations

import json
from pathlib import Path

import longva_checkpoint as lc
import numpy as np
import pytest
import random_models as rm
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionModel

import mmkv
from mmkv.layout import IMAGE, VIDEO
from mmkv.models import adapter_for, longva
from mmkv.models.longva.pictures import clip_pixels, frame_indices, opened
from mmkv.models.longva.unires import PINPOINTS, best_resolution, grid_of, tiles_of

PUBLIC = json.loads((Path(__file__).parent / "longva_public.json").read_text())
FRAMES = [lc.picture(90, 56, seed=i) for i in range(5)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(model, processor) from the tiny checkpoint."""
    return longva.load(str(lc.write(tmp_path_factory.mktemp("longva"))), vision_config=lc.vision_config())


def close(got: torch.Tensor, want: list[float]) -> bool:
    return torch.allclose(got.flatten(), torch.tensor(want), atol=2e-5)


# --- the container


def test_the_tower_gives_one_hidden_state_more_than_it_has_layers(loaded):
    tower = loaded[0].model.vision_tower
    with torch.no_grad():
        out = tower(torch.randn(2, 3, 56, 56), output_hidden_states=True)
    assert len(out.hidden_states) == 3 + 1
    assert not torch.allclose(out.hidden_states[-2], out.hidden_states[-1])


def test_a_token_is_the_mean_of_four_projected_patches(loaded):
    body = loaded[0].model
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        (got,) = body.get_video_features(pixels, torch.tensor([3])).pooler_output
        hidden = body.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        projected = body.multi_modal_projector(hidden[:, 1:])
        early = body.multi_modal_projector(
            torch.nn.functional.avg_pool2d(hidden[:, 1:].mT.unflatten(2, (4, 4)), 2).flatten(2).mT
        )
    assert got.shape == (3 * 4, 64)
    for frame in range(3):
        for r in range(2):
            for c in range(2):
                at = [4 * (2 * r + i) + 2 * c + j for i in (0, 1) for j in (0, 1)]
                want = projected[frame, at].double().mean(0)
                assert torch.allclose(got[frame * 4 + 2 * r + c].double(), want, atol=1e-6)
    assert (early.flatten(0, 1) - got).abs().max() > 1e-3  # pooling before the projector is another model


def test_the_maximum_instead_of_the_mean():
    config = longva.LongVAConfig(
        vision_config=lc.vision_config(), text_config=dict(vocab_size=320), mm_spatial_pool_mode="max"
    )
    from mmkv.models.longva.modeling import pool

    patches = torch.randn(1, 16, 3)
    got = pool(patches, config.mm_spatial_pool_stride, config.mm_spatial_pool_mode)
    assert torch.equal(got[0, 0], patches[0, [0, 1, 4, 5]].amax(0))


@pytest.mark.parametrize(
    "options",
    [dict(mm_spatial_pool_stride=0), dict(mm_spatial_pool_stride=True), dict(mm_spatial_pool_mode="bilinear")],
)
def test_impossible_pooling(options):
    with pytest.raises(ValueError, match="possible are") as caught:
        longva.LongVAConfig(vision_config=lc.vision_config(), **options)
    assert "\n" not in str(caught.value)


def test_features_are_those_of_llava_onevision_without_its_newline(loaded):
    """Select layer -2, strategy "default"; its bilinear pooling of 4x4 to 2x2 is the mean of squares."""
    body = loaded[0].model
    config = LlavaOnevisionConfig(
        vision_config=lc.vision_config(), text_config=body.config.text_config, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_token_index=300, video_token_index=301, multimodal_projector_bias=True,
    )  # fmt: skip
    other = LlavaOnevisionModel(config).eval()
    other.vision_tower.load_state_dict(body.vision_tower.state_dict())
    other.multi_modal_projector.load_state_dict(body.multi_modal_projector.state_dict())
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        want = other.get_video_features(pixels[None], return_dict=True).pooler_output
        (got,) = body.get_video_features(pixels).pooler_output
    want = (want[0] if want[0].dim() == 2 else want[0].flatten(0, 1))[:12]
    assert torch.allclose(got, want, atol=1e-6)


def test_length_and_positions(loaded):
    model, processor = loaded
    given = processor(text="ab<video>c", videos=[FRAMES[:3]])
    seen = {}
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(ids=kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(**given).logits
    hook.remove()
    assert logits.shape[1] == 2 + 12 + 1
    assert seen["ids"].flatten().tolist() == list(range(15))


def test_what_does_not_fit_is_refused(loaded):
    model, processor = loaded
    given = dict(processor(text="ab<video>c", videos=[FRAMES[:3]]))
    with torch.no_grad():
        with pytest.raises(ValueError, match="-200"):
            model(**{**given, "input_ids": torch.tensor([[5, -200, 6]])})
        with pytest.raises(ValueError, match=r"8 video placeholders \(id 319\) for 12 features"):
            model(**{**given, "input_ids": given["input_ids"][:, :10]})
        with pytest.raises(ValueError, match="says 2 pictures, the pixels are 3"):
            model(**{**given, "video_frames": torch.tensor([2])})
        with pytest.raises(ValueError, match="give input_ids"):
            model(inputs_embeds=torch.zeros(1, 15, 64), pixel_values_videos=given["pixel_values_videos"])


def test_beams_repeat_all_images_of_a_prompt_in_order():
    """Two images in one prompt, of one tile more than the other; a beam of three that is greedy by its first."""
    model = rm.make("longva")
    prompts = [
        [*rm.words(4), rm.Image(32, 32), *rm.words(3, 1), rm.Image(64, 32)],
        [rm.Video(2), *rm.words(5, 2), rm.Image(64, 64)],
    ]
    both = rm.inputs(model, prompts)
    new = {}
    for mode in ("beam", "returns"):
        out = rm.generate(model, both, mode, new=4, output_logits=True, return_dict_in_generate=True)
        new[mode] = out.logits[0]
    with torch.no_grad():
        want = model(**both).logits[:, -1]
    for mode, repeat in (("beam", 3), ("returns", 2)):
        assert torch.allclose(new[mode], want.repeat_interleave(repeat, 0), atol=1e-5)


def test_saved_and_loaded_again(loaded, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path)
    again = longva.LongVAForConditionalGeneration.from_pretrained(tmp_path)
    given = processor(text="ab<video>c", videos=[FRAMES[:3]])
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)


# --- what each token is


def test_layout(loaded):
    model, processor = loaded
    given = processor(text="ab<image>c<video>", images=[lc.picture(50, 50)], videos=[FRAMES[:2]])
    assert given["image_tiles"].tolist() == [2]
    chunk = adapter_for(model).layout(dict(given), *given["input_ids"].shape, None)
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert chunk.modality[0].tolist() == [0, 0] + [IMAGE] * 8 + [0] + [VIDEO] * 8
    assert chunk.medium[0].tolist() == [-1, -1] + [0] * 8 + [-1] + [1] * 8
    assert chunk.frame[0, 2:10].tolist() == [0] * 4 + [1] * 4
    assert chunk.frame[0, 11:].tolist() == [0] * 4 + [1] * 4
    assert list(zip(chunk.row[0, 11:].tolist(), chunk.col[0, 11:].tolist())) == cells * 2


@pytest.mark.support("modes", family="longva", name="streaming")
def test_a_short_clip_in_a_stream_is_answered_as_in_one_pass(loaded):
    model, processor = loaded
    frames = np.stack([np.asarray(frame) for frame in FRAMES])
    given = processor(text=processor.prompt("what?"), videos=[frames])
    with torch.no_grad():
        want = model.generate(**given, max_new_tokens=5, do_sample=False)[0, given["input_ids"].shape[1] :]
    with mmkv.stream(model, processor, window=500, retrieve=8, encode=2) as stream:
        assert stream.watch(frames) == 5
        found = stream.answer("what?", max_new_tokens=5)
        assert stream.store.tokens_per_frame == 4
    assert found.text == processor.decode(want, skip_special_tokens=True).strip()


# --- numbers of the public code


def test_a_video_of_the_public_code(loaded):
    model, processor = loaded
    want = PUBLIC["video"]
    given = processor(text=processor.prompt("what?").replace("<video>", "<image>"), videos=[FRAMES])
    ids = given["input_ids"]
    assert ids.shape[1] == want["length"]
    assert (ids[0] == model.config.video_token_id).nonzero()[:, 0].tolist() == list(
        range(want["start"], want["start"] + 20)
    )
    assert close(given["pixel_values_videos"].mean((2, 3)), want["pixels"])
    embeds = embedded(model, given)
    assert close(embeds[0].mean(-1), want["embeds"])
    assert close(embeds[0, want["start"], :8], want["first"])
    assert close(embeds[0, want["start"] + 19, :8], want["last"])
    with torch.no_grad():
        logits = model(**given).logits
    assert close(logits[0, -1, :16], want["logits"])
    assert logits[0].argmax(-1).tolist() == want["argmax"]


def test_an_image_of_the_public_code(loaded):
    model, processor = loaded
    want = PUBLIC["image"]
    given = processor(text=processor.prompt("which?", "image"), images=[lc.picture(130, 60, seed=3)])
    assert given["image_tiles"].tolist() == [want["tiles"]]
    assert given["input_ids"].shape[1] == want["length"]
    assert int((given["input_ids"][0] == model.config.image_token_id).nonzero()[0]) == want["start"]
    assert close(given["pixel_values"].mean((2, 3)), want["pixels"])
    embeds = embedded(model, given)
    assert close(embeds[0].mean(-1), want["embeds"])
    assert close(embeds[0, want["start"], :8], want["first"])
    with torch.no_grad():
        assert close(model(**given).logits[0, -1, :16], want["logits"])


def embedded(model, given) -> torch.Tensor:
    """What enters the decoder."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**given)
    hook.remove()
    return seen["inputs_embeds"]


# --- UniRes


@pytest.mark.parametrize(
    ("size", "best", "tiles"),
    [
        ((336, 336), (336, 672), 2), ((640, 480), (672, 672), 4), ((1280, 720), (1344, 1008), 12),
        ((1920, 1080), (2016, 1344), 24), ((224, 672), (336, 672), 2),
    ],
)  # fmt: skip
def test_golden_sizes(size, best, tiles):
    assert best_resolution(*size, PINPOINTS) == best
    rows, cols = grid_of(*size, PINPOINTS)
    assert (rows * cols, rows * cols * 144) == (tiles, 144 * tiles)
    assert len(tiles_of(lc.picture(*size), PINPOINTS)) == tiles


def test_pinpoints():
    assert len(PINPOINTS) == 200
    assert PINPOINTS[0] == (336, 672) and (336, 336) not in PINPOINTS
    assert all(w % 336 == h % 336 == 0 and 2 <= (w // 336) * (h // 336) <= 49 for w, h in PINPOINTS)


@pytest.mark.parametrize(("width", "height", "wide", "high"), PUBLIC["best"])
def test_best_resolutions_of_the_public_code(width, height, wide, high):
    assert best_resolution(width, height, PINPOINTS) == (wide, high)


def test_tiles_are_cut_row_by_row_from_the_middle_of_black():
    """A white square in 2x1: a quarter black, the white half in the middle, a quarter black."""
    from PIL import Image

    left, right = (
        np.asarray(tile)[..., 0] for tile in tiles_of(Image.new("RGB", (336, 336), (255,) * 3), [(672, 336)])
    )
    assert (left[:, :168] == 0).all() and (left[:, 168:] == 255).all()
    assert (right[:, :168] == 255).all() and (right[:, 168:] == 0).all()
    top, bottom = (np.asarray(t)[..., 0] for t in tiles_of(Image.new("RGB", (336, 336), (255,) * 3), [(336, 672)]))
    assert (top[:168] == 0).all() and (bottom[:168] == 255).all()


def test_the_sides_of_a_wide_picture_are_cut_off():
    wide = np.zeros((56, 112, 3), np.uint8)
    wide[:, 28:84] = 255
    pixels = clip_pixels([opened(wide)], 56)
    assert pixels.shape == (1, 3, 56, 56)
    white = (1 - 0.48145466) / 0.26862954
    assert torch.allclose(pixels[0, 0], torch.full((56, 56), white), atol=1e-5)


@pytest.mark.parametrize("bad", ["a.png", np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_what_is_no_picture(bad):
    with pytest.raises((TypeError, ValueError)):
        opened(bad)


def test_frame_indices():
    assert frame_indices(100, 8) == [0, 14, 28, 42, 56, 70, 84, 99]
    assert frame_indices(5, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="possible are"):
        frame_indices(5, 0)


# --- prompts


def qwen_tokenizer():
    """Bytes, and the special tokens at the ids that they have in Qwen2's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(letters | {x: 151643 + i for i, x in enumerate(special)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=special[0], eos_token=special[2], additional_special_tokens=special[1:]
    )


def test_the_prompt_is_qwen_1_5():
    processor = longva.LongVAProcessor(qwen_tokenizer(), longva.LongVAConfig(text_config=dict(vocab_size=152064)))
    text = processor.prompt("What happens?")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\nWhat happens?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = processor.sentinel_ids(text)
    assert ids[0] == 151644 and ids.count(-200) == 1
    cue = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    assert ids[-len(cue) :] == cue and cue[0] == 151644
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (
        processor.apply_chat_template(own)
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_sizes_of_the_real_model():
    config = longva.LongVAConfig()
    assert config.image_side**2 == config.video_side**2 == 144
    assert [config.vision_config.num_hidden_layers, config.vision_config.hidden_size] == [24, 1024]


def test_a_batch_is_padded_on_the_left(loaded):
    processor = loaded[1]
    config = processor.config
    out = processor(text=["a<video>", "bcd"], videos=[np.stack([np.asarray(f) for f in FRAMES[:2]])])
    assert out["input_ids"].tolist()[0][1:] == [config.video_token_id] * 8
    assert out["attention_mask"].tolist() == [[1] * 9, [0] * 6 + [1] * 3]
    assert out["video_frames"].tolist() == [2]
    assert processor(text="x", pad_to=5)["input_ids"].shape == (1, 5)


def test_frames_are_sampled_on_request(loaded):
    processor = loaded[1]
    out = processor(text="<video>", videos=[FRAMES], do_sample_frames=True, num_frames=3)
    assert torch.equal(
        out["pixel_values_videos"], processor(text="<video>", videos=[FRAMES[::2]])["pixel_values_videos"]
    )


def test_a_chat_with_its_own_pictures(loaded):
    processor = loaded[1]
    parts = [{"type": "image", "image": lc.picture(50, 50)}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": parts}]
    out = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    want = processor(text=processor.prompt("what?", "image"), images=lc.picture(50, 50))
    assert torch.equal(out["input_ids"], want["input_ids"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(), "a prompt is needed"),
        (dict(text="a"), "0 images and 0 videos, given are 0 and 1"),
        (dict(text="<video><video>"), "0 images and 2 videos, given are 0 and 1"),
        (dict(text="<video>", return_tensors="np"), "possible is 'pt'"),
    ],
)
def test_impossible_calls_of_the_processor(loaded, given, said):
    with pytest.raises(ValueError, match=said) as caught:
        loaded[1](videos=[FRAMES[:1]], **given)
    assert "\n" not in str(caught.value)


def test_a_video_without_frames(loaded):
    with pytest.raises(ValueError, match="without frames"):
        loaded[1](text="<video>", videos=[[]])
