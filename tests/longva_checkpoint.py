"""A LongVA checkpoint at tiny size, in the layout of `lmms-lab/LongVA-7B`: its keys one by one, weights by a formula.

Weights come from no random generator, so that numbers which the public code gave with the same ones stay valid.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig

CLIP = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
)
TEXT = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=1e9, bos_token_id=256,
    eos_token_id=258, tie_word_embeddings=False, hidden_act="silu",
)  # fmt: skip
PINPOINTS = [[56 * w, 56 * h] for w in range(1, 7) for h in range(1, 7) if 2 <= w * h <= 6]
TOWER = "model.vision_tower.vision_tower.vision_model."


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**CLIP)


def shapes(post_layernorm: bool = True) -> dict[str, tuple[int, ...]]:
    """Every key of the layout and its shape."""
    c, f, h, m, v = 32, 64, 64, 96, 320
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, h), "model.norm.weight": (h,), "lm_head.weight": (v, h),
        f"{TOWER}embeddings.class_embedding": (c,), f"{TOWER}embeddings.patch_embedding.weight": (c, 3, 14, 14),
        f"{TOWER}embeddings.position_embedding.weight": (17, c),
        f"{TOWER}pre_layrnorm.weight": (c,), f"{TOWER}pre_layrnorm.bias": (c,),
        "model.mm_projector.0.weight": (h, c), "model.mm_projector.0.bias": (h,),
        "model.mm_projector.2.weight": (h, h), "model.mm_projector.2.bias": (h,),
    }  # fmt: skip
    if post_layernorm:
        out |= {f"{TOWER}post_layernorm.{end}": (c,) for end in ("weight", "bias")}
    for i in range(2):
        at = f"model.layers.{i}."
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            out |= {f"{at}self_attn.{name}_proj.weight": (rows, h), f"{at}self_attn.{name}_proj.bias": (rows,)}
        out |= {
            f"{at}self_attn.o_proj.weight": (h, h), f"{at}mlp.gate_proj.weight": (m, h), f"{at}mlp.up_proj.weight": (m, h),
            f"{at}mlp.down_proj.weight": (h, m), f"{at}input_layernorm.weight": (h,),
            f"{at}post_attention_layernorm.weight": (h,),
        }  # fmt: skip
    for i in range(3):
        at = f"{TOWER}encoder.layers.{i}."
        for name in ("q", "k", "v", "out"):
            out |= {f"{at}self_attn.{name}_proj.weight": (c, c), f"{at}self_attn.{name}_proj.bias": (c,)}
        out |= {f"{at}layer_norm{n}.{end}": (c,) for n in (1, 2) for end in ("weight", "bias")}
        out |= {f"{at}mlp.fc1.weight": (f, c), f"{at}mlp.fc1.bias": (f,)}
        out |= {f"{at}mlp.fc2.weight": (c, f), f"{at}mlp.fc2.bias": (c,)}
    return out


def wave(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """fp32 numbers that a name and a shape alone determine, in [-1, 1]."""
    size = torch.Size(shape).numel()
    angle = torch.arange(size, dtype=torch.float64) * 12.9898 + zlib.crc32(name.encode()) % 10007
    return (angle.sin() * 43758.5453).sin().float().view(shape)


def weights(post_layernorm: bool = True) -> dict[str, torch.Tensor]:
    """The whole state dict; scales of norms are around 1."""
    out = {}
    for name, shape in shapes(post_layernorm).items():
        norm = len(shape) == 1 and name.endswith("weight")
        out[name] = 1 + 0.2 * wave(name, shape) if norm else 0.25 * wave(name, shape)
    return out


def config(**changes) -> dict:
    """config.json as the hub's."""
    return {
        "architectures": ["LlavaQwenForCausalLM"], "model_type": "qwen2", **TEXT, "mm_vision_tower": "tiny-clip",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32, "mm_patch_merge_type": "unires", "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": PINPOINTS, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "mm_resampler_type": None, "rope_scaling": None,
    } | changes  # fmt: skip


def tokenizer():
    """Bytes, and Qwen2's three special tokens at 256, 257, 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(letters + special)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>", additional_special_tokens=special[1:]
    )


def write(folder: Path, state: dict | None = None, shards: int = 2, **changes) -> Path:
    """A checkpoint's folder: config.json, shards with their index, tokenizer."""
    state = weights() if state is None else state
    where = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(state)}
    for file in set(where.values()):
        save_file({k: v.contiguous() for k, v in state.items() if where[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    tokenizer().save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int = 0):
    """A PIL image of smooth colours, by a formula."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:height, :width]
    parts = [np.sin(x / (17 + 5 * c + seed)) * np.cos(y / (11 + 7 * c + seed)) for c in range(3)]
    return Image.fromarray((127.5 + 127.4 * np.stack(parts, -1)).round().astype(np.uint8))
