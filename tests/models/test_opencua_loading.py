"""OpenCUA's checkpoints: every layout of keys, what does not fit, its tokenizer from tiktoken's file, its processor."""

from __future__ import annotations

import base64
import json

import agent_models as am
import pytest
import random_models as rm
import torch
from safetensors.torch import save_file
from transformers import Qwen2VLImageProcessor

from mmkv.models.opencua import OpenCUA, OpenCUAConfig, OpenCUAProcessor, load
from mmkv.models.opencua.loading import model_shapes, our_name, our_names, read_config
from mmkv.models.opencua.tokenizer import TEMPLATE, load_tokenizer, read_ranks

SPECIAL = {
    300: "[BOS]", 301: "[EOS]", 302: "<|im_end|>", 303: "<|im_user|>", 304: "<|im_assistant|>", 310: "<|im_system|>",
    311: "<|im_middle|>", 320: "<|media_begin|>", 321: "<|media_content|>", 322: "<|media_end|>", 323: "<|media_placeholder|>",
}  # fmt: skip
MERGED = [b"he", b"ll", b"hell", b"hello", b" w", "日".encode()[:2], "日".encode()]


def published(name: str) -> str:
    """Our key by the layout of the hub's files."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("model.visual.", "vision_tower.").replace("model.language_model.", "language_model.model.")


def qwens(name: str) -> str:
    """Our key by the layout of Qwen2.5-VL's first files."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


LAYOUTS = {"published": published, "qwen's": qwens, "ours": lambda name: name,
           "mixed": lambda name: published(name) if "visual" in name else name}  # fmt: skip


def folder(tmp_path, model, rename=published, shards=1, **config):
    """A checkpoint as it is published: weights, config.json, and a tokenizer."""
    tensors = {rename(k): v.contiguous() for k, v in model.state_dict().items()}
    names = list(tensors)
    if shards == 1:
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        files = {k: f"model-{i % shards + 1}-of-{shards}.safetensors" for i, k in enumerate(names)}
        for file in set(files.values()):
            save_file({k: tensors[k] for k in names if files[k] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    about = json.loads(model.config.to_json_string(use_diff=False)) | config
    (tmp_path / "config.json").write_text(json.dumps(about | {"auto_map": {"AutoModel": "modeling_opencua.OpenCUA"}}))
    tokenizer(tmp_path)
    return tmp_path


def tokenizer(path, special=None):
    ranks = {bytes([b]): b for b in range(256)} | {token: 256 + i for i, token in enumerate(MERGED)}
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    tokens = {str(i): {"content": t, "special": True} for i, t in (SPECIAL if special is None else special).items()}
    about = {
        "added_tokens_decoder": tokens,
        "bos_token": "[BOS]",
        "eos_token": {"content": "[EOS]"},
        "pad_token": "[EOS]",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(about))


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, shards):
    model = rm.make("opencua")
    found, processor = load(str(folder(tmp_path, model, LAYOUTS[layout], shards)))
    assert isinstance(found, OpenCUA) and isinstance(processor, OpenCUAProcessor)
    for (name, a), (other, b) in zip(model.state_dict().items(), found.state_dict().items()):
        assert name == other and torch.equal(a, b)
    ids, grid = torch.tensor([[20, rm.IMAGE, 21]]), torch.tensor([[1, 4, 4]])
    given = dict(pixel_values=torch.randn(16, 96), grid_thws=grid)
    assert found.generation_config.eos_token_id == [rm.EOS, 301, 302]  # the end of a turn ends an answer
    assert torch.equal(found(ids, **given).logits, model(ids, **given).logits)  # rotary tables are there too


def test_saved_and_loaded(tmp_path):
    model = rm.make("opencua")
    model.save_pretrained(tmp_path)
    again = OpenCUA.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert again.config.media_placeholder_token_id == rm.IMAGE


def test_all_that_does_not_fit_is_named(tmp_path):
    model = rm.make("opencua")
    folder(tmp_path, model)
    weights = {published(k): v.clone() for k, v in model.state_dict().items()}
    del weights["vision_tower.merger.ln_q.weight"], weights["language_model.lm_head.weight"]
    weights |= {name: torch.zeros(2) for name in ("vision_tower.extra.weight", "what.is.this")}
    weights["language_model.model.norm.weight"] = torch.zeros(7)
    weights["language_model.model.rotary_emb.inv_freq"] = torch.zeros(8)  # computed: nobody's loss
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(str(tmp_path))
    said = str(error.value)
    assert "missing: lm_head.weight, model.visual.merger.ln_q.weight" in said
    assert "extra: model.visual.extra.weight, what.is.this" in said
    assert "misshapen: model.language_model.norm.weight [7] for [64]" in said
    assert "inv_freq" not in said and "\n" not in said


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(str(tmp_path))
    folder(tmp_path, rm.make("opencua"), shards=3)
    (tmp_path / "model-2-of-3.safetensors").unlink()
    (tmp_path / "model-3-of-3.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2-of-3.*model-3-of-3"):
        load(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(ValueError, match="possible is 'opencua'"):
        load(str(tmp_path))


def test_two_layouts_of_one_weight():
    with pytest.raises(ValueError, match="stand for the same weights"):
        our_names(["visual.x", "vision_tower.x"], "here")
    assert our_name("model.layers.0.mlp.up_proj.weight") == "model.language_model.layers.0.mlp.up_proj.weight"


def test_the_published_sizes(tmp_path):
    """OpenCUA-7B's defaults: Qwen2.5-VL-7B's tensors by count and shape, on the meta device."""
    shapes = model_shapes(OpenCUAConfig())
    assert len([n for n in shapes if n.startswith("model.visual.blocks.")]) == 32 * 12
    assert len([n for n in shapes if n.startswith("model.language_model.layers.")]) == 28 * 12
    assert shapes["model.visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert shapes["model.visual.blocks.31.mlp.gate_proj.weight"] == (3420, 1280)
    assert shapes["model.visual.merger.mlp.0.weight"] == (5120, 5120)
    assert shapes["model.visual.merger.mlp.2.weight"] == (3584, 5120)
    assert shapes["model.language_model.layers.27.self_attn.k_proj.weight"] == (512, 3584)
    assert shapes["model.language_model.layers.0.mlp.down_proj.weight"] == (3584, 18944)
    assert shapes["lm_head.weight"] == shapes["model.language_model.embed_tokens.weight"] == (152064, 3584)
    text = OpenCUAConfig().text_config
    assert text.rope_parameters["rope_theta"] == 1e6 and text.max_position_embeddings == 128000
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "opencua", "vision_config": {}, "text_config": {"rope_theta": 5e5, "model_type": "qwen2"}}
        )
    )
    assert read_config(tmp_path).text_config.rope_parameters["rope_theta"] == 5e5


def naive_bpe(text: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte pairs by rank, as tiktoken merges them: the pair of lowest rank first, leftmost of equals."""
    parts = [bytes([b]) for b in text]
    while len(parts) > 1:
        pairs = [(ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        rank, i = min(pairs)
        if rank == 10**9:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[p] for p in parts]


def test_tokenizer_from_ranks(tmp_path):
    tokenizer(tmp_path)
    found, ranks = load_tokenizer(tmp_path), read_ranks(tmp_path / "tiktoken.model")
    pieces = ["hello", " world", "日", "本語", " 12", "345"]  # as the pattern splits what follows
    for piece in ("hello", " world", "hell", "x"):
        assert found(piece)["input_ids"] == naive_bpe(piece.encode(), ranks)
    assert found("日本")["input_ids"] == naive_bpe("日本".encode(), ranks)
    text = "".join(pieces) + "\n\n  Don't stop<|im_end|>it"
    ids = found(text)["input_ids"]
    assert found.decode(ids) == text and 302 in ids
    assert {found.convert_ids_to_tokens(i): i for i in SPECIAL} == {t: i for i, t in SPECIAL.items()}
    assert found.eos_token_id == 301 and found.pad_token_id == 301 and found.padding_side == "left"
    assert found("a<|media_placeholder|>b")["input_ids"] == [97, 323, 98]


def test_the_kimi_template(tmp_path):
    tokenizer(tmp_path)
    chat = [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "go"}]},
        {"role": "assistant", "content": "ok"},
        {"role": "assistant", "content": [{"type": "text", "text": "again"}]},
    ]
    found = load_tokenizer(tmp_path)
    assert found.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_system|>system<|im_middle|>be good<|im_end|>"
        "<|im_user|>user<|im_middle|><|media_begin|>image<|media_content|><|media_placeholder|><|media_end|>go<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>ok<|im_end|><|im_assistant|>assistant<|im_middle|>again<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": "mine"}))
    assert load_tokenizer(tmp_path).chat_template == "mine"  # a shipped one is the checkpoint's word
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert load_tokenizer(tmp_path).chat_template == "newer"


def test_a_tokenizer_json(tmp_path):
    tokenizer(tmp_path)
    first = load_tokenizer(tmp_path)
    first.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tiktoken.model").unlink()
    again = load_tokenizer(tmp_path)
    assert again("hello 日本<|im_end|>")["input_ids"] == first("hello 日本<|im_end|>")["input_ids"]
    assert again.eos_token_id == 301


def test_damaged_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tiktoken\.model"):
        load_tokenizer(tmp_path)
    tokenizer(tmp_path, special={})
    with pytest.raises(ValueError, match="added_tokens_decoder"):
        load_tokenizer(tmp_path)
    tokenizer(tmp_path, special={97: "[BOS]"})
    with pytest.raises(ValueError, match=r"ids \[97\] belong to plain and to special"):
        load_tokenizer(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"aGU= 1\nnot base64 at all\n")
    with pytest.raises(ValueError, match="line 2"):
        read_ranks(tmp_path / "tiktoken.model")


def test_processor(tmp_path):
    tokenizer(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "min_pixels": 3136,
                "max_pixels": 28 * 28 * 8,
                "patch_size": 14,
            }
        )
    )
    processor = OpenCUAProcessor.from_pretrained(tmp_path)
    assert processor.image_token_id == 323
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}], add_generation_prompt=True
    )
    given = processor(text, images=am.screen(0, 200, 100))
    assert given["input_ids"].tolist()[0].count(323) == 1
    t, h, w = given["image_grid_thw"][0].tolist()
    assert t == 1 and h * w // 4 <= 8 and given["pixel_values"].shape == (h * w, 3 * 2 * 14 * 14)
    both = processor([text, "hi"], images=[am.screen(0, 56, 56)])
    assert both["input_ids"].shape == both["attention_mask"].shape and both["attention_mask"][1].sum() == 2
    assert both["attention_mask"][1, -1] == 1
    assert processor.decode(processor("hello")["input_ids"][0]) == "hello"
    with pytest.raises(ValueError, match=r"1 <.media_placeholder.> for 2 images"):
        processor(text, images=[am.screen(0), am.screen(1)])
    with pytest.raises(ValueError, match="media_begin"):
        OpenCUAProcessor(Qwen2VLImageProcessor(), am.tokenizer(am.QWEN, am.QWEN_TEMPLATE))
    assert TEMPLATE.count("media_placeholder") == 1
