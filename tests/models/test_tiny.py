"""The bundled checkpoint: small, loads offline, and answers held-out questions on decoded files."""

import pathlib

import numpy as np
import pytest
import torch

from mmkv.models import tiny
from mmkv.models.tiny import answer, data, fast, world
from mmkv.models.tiny.words import vocabulary


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


def test_size(loaded):
    model, _ = loaded
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert sum(f.stat().st_size for f in pathlib.Path(tiny.path()).rglob("*")) < 16 * 2**20
    assert next(model.parameters()).dtype == torch.float32 and not model.training


def test_tokenizer_round_trip(loaded):
    tokenizer = loaded[1].tokenizer
    text = "what colour is the circle ?"
    ids = tokenizer("What colour is the circle?")["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.convert_tokens_to_ids(w) for w in vocabulary()] == list(range(len(vocabulary())))
    for q in world.make_video(2, 32, "stress").questions:
        assert data.encode(q)[0][: len(tokenizer(q.text)["input_ids"])] == tokenizer(q.text)["input_ids"]


def test_unknown_words(loaded):
    assert answer.unknown_words(loaded[1], "What colour is the giraffe?") == ["giraffe"]
    assert "how many objects are there?" in answer.question_forms()


def test_prepared_inputs(loaded):
    video = world.make_video(0, 16)
    inputs = answer.prepare(loaded[1], video.frames, video.questions[0].text)
    assert inputs["video_grid_thw"].tolist() == [[8, 8, 8]]
    assert (inputs["input_ids"] == loaded[0].config.video_token_id).sum() == 128
    assert inputs["second_per_grid_ts"][0] == 1.0


def test_training_forward_equals_the_library(loaded, monkeypatch):
    """In float32 the packed forward used for training gives the library's logits."""
    model, processor = loaded
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    video = world.make_video(3, 16)
    q = video.questions[0]
    inputs = answer.prepare(processor, video.frames, q.text)
    with torch.no_grad():
        theirs = model(**inputs).logits[0, 132:]
        pairs = torch.from_numpy(video.frames).float().view(8, 2, 64, 64, 3) / 127.5 - 1
        features = fast.see(model.model.visual, pairs).view(1, -1, 256)
        position = model.model.get_rope_index(
            **{
                k: inputs[k]
                for k in ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
                if k in inputs
            }
        )[0][0, 0, 131]
        ids = torch.tensor([[data.encode(q)[0]]])
        start = position.view(1)
        text = (start[:, None] + 1 + torch.arange(data.SLOT)).expand(3, -1, -1)
        head = torch.tensor([data.IDS[w] for w in ("<|im_start|>", "user", "<|vision_start|>", "<|vision_end|>")])
        positions = fast.prefix_positions(8, torch.ones(1), start)
        hidden, _ = fast.read(model.model.language_model, head, features, ids, positions, text)
        ours = hidden[0, 0] @ model.model.language_model.embed_tokens.weight.T
    assert torch.allclose(ours[: len(theirs)], theirs, atol=2e-3)


@pytest.mark.parametrize(("frames", "videos"), [(16, 6), (128, 2)])
def test_answers_held_out_files(loaded, tmp_path, frames, videos):
    """Open questions on decoded .mp4 files that training never saw; guessing reaches about one in three."""
    model, processor = loaded
    right = asked = picked = 0
    rng = np.random.default_rng(0)
    for i in range(videos):
        video = world.make_video(2**42 + i, frames, "easy")
        world.write_mp4(video.frames, tmp_path / "v.mp4")
        seen = world.read_mp4(tmp_path / "v.mp4")
        for q in data.pick(video.questions, 5, rng):
            inputs = answer.prepare(processor, seen, q.text)
            right += answer.reply(model, processor, inputs) == q.answer
            picked += frames > 16 or answer.choose(model, processor, inputs, q.options)[0] == q.answer
            asked += 1
    assert right >= 0.8 * asked and picked >= 0.8 * asked
