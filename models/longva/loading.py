"""LongVA from the original checkpoint (`lmms-lab/LongVA-7B`, `LongVA-7B-DPO`), by its own keys."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, GenerationConfig

from mmkv.models.longva.configuration import CLIP_L_336, LongVAConfig, is_longva
from mmkv.models.longva.modeling import LongVAForConditionalGeneration
from mmkv.models.longva.processor import LongVAProcessor
from mmkv.models.shards import check_keys, files_of_keys, read_keys, shapes_of_keys

TOWERS = {"openai/clip-vit-large-patch14-336": CLIP_L_336}
ROPE_THETA = 1e9  # of the 224K base, where config.json does not say
TOWER = "model.vision_tower.vision_tower.vision_model."
IGNORED = (f"{TOWER}embeddings.position_ids", "model.image_newline")  # no weights of ours
OPTIONAL = f"{TOWER}post_layernorm."  # nothing reads it
TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_dropout", "bos_token_id", "eos_token_id",
    "initializer_range",
)  # fmt: skip
FIXED = {  # what the port was written for, and what an older config may leave out
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "unires",
    "mm_vision_select_feature": "patch",
    "mm_resampler_type": None,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}


def load(name: str, *, dtype=None, device="cpu", vision_config: CLIPVisionConfig | None = None, tokenizer=None):
    """(model, processor) of an original LongVA checkpoint.

    Args:
        name: a folder with config.json, safetensors shards with their index (or one file), and a tokenizer; or a hub name.
        dtype: of the weights; None as stored (the official code runs float16).
        device: where the model goes.
        vision_config: of the tower, where config.json names another than CLIP ViT-L/14 at 336 pixels.
        tokenizer: in place of the folder's.

    Raises:
        ValueError: another model's config.json, or missing, extra or misshapen keys: all of them in one message.
        FileNotFoundError: no config.json, no weights, or a shard is missing.
    """
    folder = _folder(name)
    config = read_config(folder, vision_config)
    files = files_of_keys(folder)
    shapes = shapes_of_keys(files)
    names = _names(config, shapes, folder)
    found = read_keys(files, (theirs for theirs in names if theirs in shapes))
    weights = {names[theirs]: tensor for theirs, tensor in found.items()}
    kind = dtype or weights[names["model.norm.weight"]].dtype
    for theirs, mine in names.items():
        if theirs not in found:  # the norm that nothing reads
            fill = torch.ones if mine.endswith("weight") else torch.zeros
            weights[mine] = fill(config.vision_config.hidden_size, dtype=kind)
    model = LongVAForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights, dtype=kind)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder) if tokenizer is None else tokenizer
    if len(tokenizer) > config.image_token_id:
        raise ValueError(
            f"a tokenizer of {len(tokenizer)} tokens for {config.text_config.vocab_size} rows; two rows have to be left"
        )
    return model.to(device).eval(), LongVAProcessor(tokenizer, config)


def read_config(folder: Path, vision_config: CLIPVisionConfig | None = None) -> LongVAConfig:
    """The checkpoint's config.json as ours; pooling and the base of the rotary angles have LongVA's values where it is silent.

    Raises:
        FileNotFoundError: there is none.
        ValueError: of another model, or of a tower that is not known and not given.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a LongVA checkpoint has one")
    given = json.loads(path.read_text())
    if not is_longva(given):
        about = {name: given.get(name) for name in ("model_type", "mm_vision_tower", "mm_patch_merge_type")}
        raise ValueError(f"{path}: {about} is not LongVA; possible are qwen2 or llava_qwen, a tower, and 'unires'")
    other = {name: given[name] for name, value in FIXED.items() if given.get(name, value) != value}
    if other:
        raise ValueError(f"{path}: {other}; possible are { ({name: FIXED[name] for name in other}) }")
    tower = given["mm_vision_tower"]
    if vision_config is None and tower not in TOWERS:
        raise ValueError(
            f"{path}: tower {tower!r}; known are {', '.join(TOWERS)}; give vision_config=CLIPVisionConfig(...)"
        )
    rope = given.get("rope_parameters") or {}
    theta = rope.get("rope_theta", given.get("rope_theta", ROPE_THETA))
    text = {name: given[name] for name in TEXT if name in given}
    text |= dict(rope_parameters=dict(rope_type="default", rope_theta=theta))  # the public code forces scaling off
    more = {name: given[name] for name in ("mm_spatial_pool_stride", "mm_spatial_pool_mode") if name in given}
    return LongVAConfig(
        vision_config=TOWERS[tower] if vision_config is None else vision_config,
        text_config=text | dict(tie_word_embeddings=given.get("tie_word_embeddings", False)),
        vision_feature_layer=given.get("mm_vision_select_layer", -2),
        image_grid_pinpoints=_pinpoints(given.get("image_grid_pinpoints")),
        tie_word_embeddings=given.get("tie_word_embeddings", False),
        **more,
    )


def _pinpoints(given) -> list | None:
    """(width, height) pairs, which older files hold as a string."""
    return json.loads(given.replace("(", "[").replace(")", "]")) if isinstance(given, str) else given


def their_name(ours: str) -> str:
    """The checkpoint's key of one of our parameters."""
    for mine, theirs in (
        ("model.vision_tower.vision_model.", TOWER),  # transformers before 5.3
        ("model.vision_tower.", TOWER),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if ours.startswith(mine):
            return theirs + ours.removeprefix(mine)
    return ours


def _names(config: LongVAConfig, shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, str]:
    """Our name of each key that the model has.

    Raises:
        ValueError: keys of the checkpoint that are missing, extra or misshapen.
    """
    with torch.device("meta"):
        ours = {n: tuple(p.shape) for n, p in LongVAForConditionalGeneration(config).state_dict().items()}
    if config.tie_word_embeddings:
        ours.pop("lm_head.weight", None)
    names = {their_name(n): n for n in ours}
    wanted = {n: ours[mine] for n, mine in names.items() if n in shapes or not n.startswith(OPTIONAL)}
    check_keys(wanted, {n: shape for n, shape in shapes.items() if not n.startswith(IGNORED)}, str(folder))
    return names


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
