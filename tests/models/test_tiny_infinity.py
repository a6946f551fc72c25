"""The bundled tiny Infinity: its world, its detector, and that it paints what a caption says, also with a compressed cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mmkv
from mmkv.cache import H2O, HACK, SnapKV
from mmkv.models import adapter_for, tiny_infinity
from mmkv.models.tiny_infinity import world
from mmkv.models.tiny_infinity.detect import agreement, look
from mmkv.models.tiny_infinity.evaluate import match, paint, psnr, reconstructed
from mmkv.models.tiny_infinity.model import SCHEDULE
from mmkv.models.tiny_infinity.words import Facts, caption_of, facts_of, vocabulary
from mmkv.parts.calibration import HeadClasses, Identity

CAPTION = "a red circle left of a blue square on grey"
BEFORE = 91  # 1 + 4 + 9 + 16 + 25 + 36 tokens before the last scale


@pytest.fixture(scope="module")
def model():
    return tiny_infinity.load()


@pytest.fixture(scope="module")
def pictures():
    return [world.make_picture(7 * 10**6 + i) for i in range(24)]


# --- the world


def test_captions_and_what_they_say():
    facts = Facts("grey", (("red", "circle"), ("blue", "square")), relation="left of")
    assert facts_of(CAPTION) == facts and caption_of(facts) == CAPTION
    assert facts_of("three green triangles on white") == Facts("white", (("green", "triangle"),) * 3)
    assert facts_of("A large red circle on grey") == Facts("grey", (("red", "circle"),), size="large")
    for seed in range(50):
        picture = world.make_picture(seed)
        assert facts_of(picture.caption) == picture.facts
        assert set(picture.caption.split()) <= set(vocabulary())


@pytest.mark.parametrize(
    "caption",
    ["", "a cat", "a large red circle", "a huge red circle on grey", "a red circle near a blue square on grey",
     "five red circles on grey", "a large red circle on pink", "two red circle on grey"],
)  # fmt: skip
def test_other_sentences_are_refused(caption):
    with pytest.raises(ValueError, match="possible are") as error:
        facts_of(caption)
    assert "\n" not in str(error.value) and repr(caption) in str(error.value)


def test_a_seed_is_a_picture():
    one, again, other = world.make_picture(3), world.make_picture(3), world.make_picture(4)
    assert one.caption == again.caption and np.array_equal(one.image, again.image)
    assert not np.array_equal(one.image, other.image)


def test_the_detector_sees_what_is_drawn():
    """Where a single object of known place and radius is, and that all captions of 60 pictures are true of them."""
    facts = facts_of("a large red circle on grey")
    image = np.full((64, 64, 3), 120, np.uint8)
    y, x = np.mgrid[:64, :64]
    image[(x - 20) ** 2 + (y - 40) ** 2 <= 13**2] = (220, 40, 40)
    (thing,) = look(image).things
    assert (thing.colour, thing.shape) == ("red", "circle") and look(image).background == "grey"
    assert thing.x == pytest.approx(20, abs=0.5) and thing.y == pytest.approx(40, abs=0.5)
    assert thing.radius == pytest.approx(13, abs=0.5)
    assert all(agreement(facts, image).values())
    for seed in range(60):
        picture = world.make_picture(seed)
        assert agreement(picture.facts, picture.image)["all"], picture.caption


def test_the_detector_sees_what_is_wrong():
    picture = next(p for p in map(world.make_picture, range(100)) if p.facts.kind == "pair")
    mirrored = picture.image[::-1, ::-1]
    assert agreement(picture.facts, mirrored)["colours"] and not agreement(picture.facts, mirrored)["place"]
    assert not agreement(picture.facts, np.full_like(picture.image, 120))["number"]


# --- the model


def test_it_loads_offline_with_all_its_parts(model):
    assert model.vae is not None and model.text_encoder is model.words
    assert sum(p.numel() for p in model.parameters()) < 4e6
    assert adapter_for(model).next_scale
    assert model.schedule() is SCHEDULE and sum(SCHEDULE.tokens[:-1]) == BEFORE
    for prompt in tiny_infinity.PROMPTS:
        facts_of(prompt)
    with pytest.raises(ValueError, match="squares of one size"):
        model.schedule(ratio=2.0)
    with pytest.raises(ValueError, match="possible are"):
        model.generate_image("a cat")


def test_a_seed_paints_one_picture_alone_and_in_a_batch(model):
    one = np.asarray(model.generate_image(CAPTION, seed=5))
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8
    both = model.generate_image([CAPTION, "two red triangles on white"], seed=[5, 6])
    assert psnr(one[None], np.asarray(both[0])[None]) > 40


def test_captions_are_true_of_its_pictures_above_chance(model, pictures):
    """Chance: the same pictures against each other's captions."""
    facts = [picture.facts for picture in pictures]
    images = paint(model, [picture.caption for picture in pictures])
    right, wrong = match(facts, images), match(facts, np.roll(images, 1, axis=0))
    assert right["background"] > 0.9
    assert right["all"] > wrong["all"] + 0.3


def test_the_autoencoder_keeps_what_captions_say(model, pictures):
    real = np.stack([picture.image for picture in pictures])
    after = reconstructed(model, real)
    assert psnr(real, after) > 22
    assert match([picture.facts for picture in pictures], after)["colours"] > 0.8


def heads_of(model) -> HeadClasses:
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    return HeadClasses(Identity("infinity", layers, heads), tuple((0, 2, 4) for _ in range(layers)))


def test_dropping_nothing_changes_no_bit(model):
    plain = np.asarray(model.generate_image(CAPTION, seed=1))
    for method in (HACK(heads_of(model), compression=0), H2O(budget=1.0), SnapKV(budget=1.0)):
        with mmkv.wrapped(model, cache=[method]):
            assert np.array_equal(plain, np.asarray(model.generate_image(CAPTION, seed=1)))
    assert np.array_equal(plain, np.asarray(model.generate_image(CAPTION, seed=1)))


def test_dropping_most_frees_the_memory(model):
    with mmkv.wrapped(model, cache=[HACK(heads_of(model), compression=0.7)]):
        model.generate_image(CAPTION, seed=1)
        report = mmkv.report(model)
    token = 2 * 16 * 4  # bytes of a head's key and value of 16 channels
    assert report.kv_bytes_dense == 2 * BEFORE * 6 * 6 * token  # both halves of guidance, 6 layers of 6 heads
    assert report.tokens_held == 2 * int(0.3 * BEFORE)  # averaged over heads and layers
    assert report.kv_bytes < 0.45 * report.kv_bytes_dense  # 30 % of the tokens, and where they are


def test_words_do_not_see_padding(model):
    """A short caption's features are the same beside a long one."""
    with torch.no_grad():
        alone = model.words(["two red circles on grey"])[0]
        beside = model.words([CAPTION, "two red circles on grey"])[1]
    assert torch.allclose(alone, beside, atol=1e-5)
