"""External retrieval by real SigLIP and CLIP models of transformers (random weights), beside what the models say themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import mmkv
from mmkv.models import tiny
from mmkv.streaming.external import ImageTextRetriever

QUESTION = "which colour appears first?"
WORDS = ["[PAD]", "[UNK]", "[EOS]", "what", "which", "colour", "is", "the", "star", "circle", "appears", "first", "?"]
TEXT = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)


def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", model_max_length=16
    )


def siglip():
    config = transformers.SiglipConfig(
        text_config=TEXT | dict(max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=2),
        vision_config=VISION,
    )
    pictures = transformers.SiglipImageProcessor(size=dict(height=32, width=32))
    return transformers.SiglipModel(config), transformers.SiglipProcessor(pictures, tokenizer())


def clip():
    config = transformers.CLIPConfig(
        text_config=TEXT | dict(max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=2),
        vision_config=VISION, projection_dim=24,
    )  # fmt: skip
    size = dict(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    return transformers.CLIPModel(config), transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(**size), tokenizer()
    )


@pytest.fixture(scope="module", params=[siglip, clip], ids=["siglip", "clip"])
def retriever_model(request):
    torch.manual_seed(0)
    model, processor = request.param()
    with torch.no_grad():
        for parameter in model.parameters():  # far from initialization, or all pictures look alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval(), processor


@pytest.fixture(scope="module")
def pictures():
    coarse = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)  # no two frames alike
    return coarse.repeat(16, 1).repeat(16, 2)


def ranking(model, processor, pictures, question) -> list[int]:
    """Frames by the model's own logits, best first; no code of the retriever."""
    given = processor(
        text=[question], images=list(pictures[::2]), padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**given).logits_per_image[:, 0]
    assert logits.unique().numel() == len(logits)
    return logits.argsort(descending=True).tolist()


def test_frames_are_ranked_as_by_the_model(retriever_model, pictures):
    model, processor = retriever_model
    retriever = ImageTextRetriever(model, processor)
    for first in range(0, len(pictures), 8):  # as they come
        retriever.see(pictures[first : first + 8], [float(first + i) for i in range(4)])
    for question in (QUESTION, "what is the star?"):
        best = ranking(model, processor, pictures, question)
        for count in (1, 4, 9):
            assert retriever.choose(question, count) == sorted(best[:count])


def test_a_stream_answers_from_the_frames_it_chose(retriever_model, pictures):
    retriever = ImageTextRetriever(*retriever_model)
    model, processor = tiny.load()
    with mmkv.stream(model, processor, window=400, retrieve=4, fps=2.0, by=retriever) as stream:
        stream.watch(pictures)
        found = stream.answer(QUESTION, max_new_tokens=3)
        fewer = stream.answer(QUESTION, retrieve=2, max_new_tokens=3)
    best = ranking(*retriever_model, pictures, QUESTION)
    assert [f.frame for f in found.frames] == sorted(best[:4])
    assert {f.layers for f in found.frames} == {6}  # the same for all layers
    assert [f.frame for f in fewer.frames] == sorted(best[:2])
    assert found.text
