"""Streams on LLaVA-OneVision (random weights): one axis of positions, one picture a frame."""

from __future__ import annotations

import numpy as np
import pytest
import random_models as rm
import torch
from transformers import BatchFeature

import mmkv


class Tokenizer:
    """A letter is a token."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [rm.FIRST_TEXT + ord(c) % 100 for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + int(i) % 26) for i in ids)


class Processor:
    """The parts of a processor that a stream uses."""

    video_token = "<video>"
    tokenizer = Tokenizer()

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        return f"user: <video>{chat[0]['content'][1]['text']} you:"

    class video_processor:
        @staticmethod
        def to_dict():
            return {"size": 32}

        def __new__(cls, videos, do_sample_frames, return_tensors):
            pixels = videos[0].float()[None] / 255 - 0.5
            return BatchFeature({"pixel_values_videos": pixels})


@pytest.mark.support("modes", family="llava_onevision", name="streaming")
def test_a_short_clip_is_answered_as_in_one_pass():
    model, processor = rm.make("llava_onevision"), Processor()
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    question = "what now?"
    pixels = processor.video_processor([torch.from_numpy(frames).permute(0, 3, 1, 2)], False, "pt")[
        "pixel_values_videos"
    ]
    init, prompt = (torch.tensor(processor.tokenizer(t)["input_ids"]) for t in ("user: ", f"{question} you:"))
    embed = model.get_input_embeddings()
    with torch.no_grad():
        features = model.model.get_video_features(pixels, return_dict=True).pooler_output[0][: 6 * 4]
        embeds = torch.cat([embed(init), features, embed(prompt)])[None]
        want = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=6, do_sample=False
        )
    for encode in (1, 4):
        with mmkv.stream(model, processor, window=500, retrieve=8, encode=encode) as stream:
            assert stream.watch(frames) == 6
            found = stream.answer(question, max_new_tokens=6)
            assert stream.store.tokens_per_frame == 4
        assert found.text == processor.tokenizer.decode(want[0])
        assert found.tokens == 6
        assert [f.time for f in found.frames] == [0, 1, 2, 3, 4, 5]


def test_a_long_clip_with_a_small_window_goes_on():
    model, processor = rm.make("llava_onevision"), Processor()
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    with mmkv.stream(model, processor, window=24, retrieve=4, by="dot", group=2) as stream:
        for picture in frames:
            stream.watch(picture)
        assert stream.frames == 40
        found = stream.answer("what now?", max_new_tokens=3)
    chosen = [f.frame for f in found.frames]
    assert all(f ^ 1 in chosen for f in chosen)  # groups of two
