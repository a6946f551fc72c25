"""The original LongVA checkpoint's layout, at tiny size: every key finds its place, and what does not fit is listed."""

from __future__ import annotations

import json

import longva_checkpoint as lc
import numpy as np
import pytest
import torch

from mmkv.models import longva
from mmkv.models.longva.loading import read_config, their_name


def load(folder, **options):
    return longva.load(str(folder), vision_config=lc.vision_config(), **options)


@pytest.mark.parametrize("model_type", ["qwen2", "llava_qwen"])
@pytest.mark.parametrize("post_layernorm", [True, False])
def test_every_key_finds_its_place(tmp_path, model_type, post_layernorm):
    state = lc.weights(post_layernorm)
    model, processor = load(lc.write(tmp_path, state, model_type=model_type))
    ours = {their_name(name): value for name, value in model.state_dict().items()}
    assert set(ours) == set(lc.shapes(True))
    for name, value in state.items():  # those of the tower too come from the file
        assert torch.equal(ours[name], value), name
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e9
    assert len(processor.tokenizer) == 259
    assert not model.training
    assert (model.config.image_token_id, model.config.video_token_id) == (318, 319)


def test_what_the_layout_may_hold_beside(tmp_path):
    state = lc.weights() | {
        "model.image_newline": torch.zeros(64),
        f"{lc.TOWER}embeddings.position_ids": torch.arange(17)[None],
    }
    assert load(lc.write(tmp_path, state))[0].config.model_type == "longva"


def test_one_file_and_another_dtype(tmp_path):
    folder = lc.write(tmp_path, shards=1)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    model, _ = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, lc.weights()["lm_head.weight"].bfloat16())
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_all_keys_that_do_not_fit_are_listed_at_once(tmp_path):
    state = lc.weights()
    del state["model.norm.weight"], state[f"{lc.TOWER}encoder.layers.1.mlp.fc1.bias"]
    state["model.mm_projector.4.weight"] = torch.zeros(3)
    state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)
    state["lm_head.weight"] = torch.zeros(319, 64)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load(lc.write(tmp_path, state))
    said = str(caught.value)
    assert "\n" not in said
    assert f"missing: model.norm.weight, {lc.TOWER}encoder.layers.1.mlp.fc1.bias" in said
    assert "extra: model.layers.7.mlp.up_proj.weight, model.mm_projector.4.weight" in said
    assert "misshapen: lm_head.weight [319, 64] for [320, 64]" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model_type="llama"), "is not LongVA"),
        (dict(mm_patch_merge_type="spatial_unpad"), "is not LongVA"),
        (dict(mm_projector_type="linear"), "possible are {'mm_projector_type': 'mlp2x_gelu'}"),
        (dict(mm_resampler_type="qformer"), "possible are"),
    ],
)
def test_configurations_of_other_models(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        load(lc.write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_the_tower_has_to_be_known(tmp_path):
    with pytest.raises(ValueError, match="give vision_config"):
        longva.load(str(lc.write(tmp_path)))
    known = tmp_path / "known"
    known.mkdir()
    found = read_config(lc.write(known, mm_vision_tower="openai/clip-vit-large-patch14-336"))
    assert (found.vision_config.image_size, found.patches_per_side) == (336, 24)


def test_defaults_where_the_file_is_silent(tmp_path):
    folder = lc.write(tmp_path)
    given = json.loads((folder / "config.json").read_text())
    del given["rope_theta"], given["image_grid_pinpoints"]
    (folder / "config.json").write_text(json.dumps(given | {"rope_scaling": {"type": "linear", "factor": 4.0}}))
    config = read_config(folder, lc.vision_config())
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1e9}
    assert (config.mm_spatial_pool_stride, config.mm_spatial_pool_mode) == (2, "average")
    assert len(config.image_grid_pinpoints) == 200


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)
    folder = lc.write(tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(folder)


def test_a_tokenizer_that_needs_the_rows_of_the_placeholders(tmp_path):
    tokenizer = lc.tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(60)])
    with pytest.raises(ValueError, match="two rows have to be left"):
        load(lc.write(tmp_path), tokenizer=tokenizer)


def test_whose_configuration_it_is():
    assert longva.is_longva(lc.config())
    assert not longva.is_longva({"model_type": "qwen2"})


def test_the_commands_find_the_loader(tmp_path, monkeypatch):
    from mmkv import _inputs
    from mmkv.models.longva import loading

    monkeypatch.setitem(loading.TOWERS, "tiny-clip", lc.CLIP)
    model, processor = _inputs.load(str(lc.write(tmp_path)), "cpu", "bfloat16")
    assert isinstance(model, longva.LongVAForConditionalGeneration) and model.dtype == torch.bfloat16
    frames = np.zeros((3, 20, 30, 3), np.uint8)
    given = _inputs.prepare(model, processor, frames, 1.0, "what?")
    assert int((given["input_ids"] == 319).sum()) == 12 and given["pixel_values_videos"].dtype == torch.bfloat16
    given = _inputs.prepare_image(model, processor, frames[0], "what?")
    assert given["image_tiles"].tolist() == [2]
