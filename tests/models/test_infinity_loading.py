"""Official Infinity checkpoints: keys, shapes and counts of the published layouts, the ways they come, and what is refused."""

from __future__ import annotations

import json

import infinity_tiny as tiny
import pytest
import torch
from safetensors.torch import save_file

import mmkv
from mmkv.cache import SnapKV
from mmkv.models.infinity.configuration import InfinityConfig, named_config
from mmkv.models.infinity.loading import fill, load_official, official_names, official_shapes, read_weights
from mmkv.models.infinity.model import InfinityForImageGeneration

CONFIG = InfinityConfig(**tiny.TINY)


@pytest.fixture(scope="module")
def weights():
    return tiny.official_weights(official_shapes(on_meta(CONFIG)))


def on_meta(config: InfinityConfig) -> InfinityForImageGeneration:
    bare = InfinityConfig(**{**config.to_dict(), "vae_config": None})
    with torch.device("meta"):
        return InfinityForImageGeneration(bare)


# --- the layouts


def sheet(config: dict) -> dict[str, tuple[int, ...]]:
    """Keys and shapes as the spec sheet lists them."""
    c, d, h, text = config["c"], config["d"], config["h"], 2048
    shapes = {
        "cfg_uncond": (512, text), "pos_start": (1, 1, c), "text_norm.weight": (text,),
        "text_proj_for_sos.ca.mat_q": (1, 16, c // 16), "text_proj_for_sos.ca.v_bias": (c,),
        "text_proj_for_sos.ca.zero_k_bias": (c,), "text_proj_for_sos.ca.mat_kv.weight": (2 * c, text),
        "text_proj_for_sos.ca.proj.weight": (c, c), "text_proj_for_sos.ca.proj.bias": (c,),
        "text_proj_for_ca.0.weight": (c, text), "text_proj_for_ca.0.bias": (c,), "text_proj_for_ca.2.weight": (c, c),
        "text_proj_for_ca.2.bias": (c,), "lvl_embed.weight": (15, c), "word_embed.weight": (c, d), "word_embed.bias": (c,),
        "shared_ada_lin.1.weight": (6 * c, c), "shared_ada_lin.1.bias": (6 * c,), "head_nm.ada_lin.1.weight": (2 * c, c),
        "head_nm.ada_lin.1.bias": (2 * c,), "head.weight": (2 * d, c), "head.bias": (2 * d,),
    }  # fmt: skip
    block = {
        "ada_gss": (1, 1, 6, c), "sa.scale_mul_1H11": (1, h, 1, 1), "sa.q_bias": (c,), "sa.v_bias": (c,), "sa.zero_k_bias": (c,),
        "sa.mat_qkv.weight": (3 * c, c), "sa.proj.weight": (c, c), "sa.proj.bias": (c,),
        "ca.v_bias": (c,), "ca.zero_k_bias": (c,), "ca.mat_q.weight": (c, c), "ca.mat_q.bias": (c,),
        "ca.mat_kv.weight": (2 * c, c), "ca.proj.weight": (c, c), "ca.proj.bias": (c,), "ffn.fc1.weight": (4 * c, c),
        "ffn.fc1.bias": (4 * c,), "ffn.fc2.weight": (c, 4 * c), "ffn.fc2.bias": (c,), "ca_norm.weight": (c,),
        "ca_norm.bias": (c,),
    }  # fmt: skip
    for chunk in range(config["chunks"]):
        for j in range(config["depth"] // config["chunks"]):
            shapes |= {f"block_chunks.{chunk}.module.{j}.{name}": shape for name, shape in block.items()}
    return shapes


RELEASED = {
    "2b": (dict(c=2048, d=32, h=16, depth=32, chunks=8), 694, 2.204564032e9),
    "8b": (dict(c=3584, d=56, h=28, depth=40, chunks=8), 862, 8.376e9),
    "8b-512": (dict(c=3584, d=56, h=28, depth=40, chunks=8), 862, 8.376e9),
    "125m": (dict(c=768, d=16, h=8, depth=12, chunks=4), 274, 0.12515e9),
}


@pytest.mark.parametrize("name", RELEASED)
def test_published_layouts(name):
    settings, count, parameters = RELEASED[name]
    model = on_meta(named_config(name))
    shapes = official_shapes(model)
    assert shapes == sheet(settings)
    assert len(shapes) == count
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-4)
    ours = [mine for mine in official_names(model.config).values() if mine is not None]
    assert sorted(ours) == sorted(model.state_dict())  # one to one


def test_counts_of_the_small_one(weights):
    assert len(weights) == 106 == 22 + 4 * 21


# --- the ways they come


def equal(model, weights) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[ours], weights[key]) for key, ours in official_names(CONFIG).items() if ours is not None)


def test_one_file(weights, tmp_path):
    torch.save(weights, tmp_path / "reg.pth")
    model = load_official(tmp_path / "reg.pth", CONFIG)
    assert equal(model, weights) and not model.training
    assert model.name_or_path == str(tmp_path)  # where a calibration is looked for
    text = tiny.features(seed=1)
    assert tiny.same(model.generate(text, seed=0), tiny.model().generate(text, seed=0))


def test_loaded_ones_can_be_wrapped(weights, tmp_path):
    torch.save(weights, tmp_path / "reg.pth")
    config = InfinityConfig(**tiny.TINY, vae_config=dict(latent_channels=8))
    model = load_official(tmp_path / "reg.pth", config)
    assert model.config.vae_config.latent_channels == 8 and model.vae is None
    with mmkv.wrapped(model, cache=[SnapKV(budget=0.25)]):
        model.generate(tiny.features(), greedy=True)
        assert mmkv.report(model).tokens_held == 2 * 66  # int(265 / 4)
    assert model.config.to_dict()["vae_config"] is not None and config.vae_config is model.config.vae_config


def test_a_training_checkpoint(weights, tmp_path):
    torch.save({"trainer": {"gpt_fsdp": weights}, "epoch": 3}, tmp_path / "ar-ckpt.pth")
    assert equal(load_official(tmp_path / "ar-ckpt.pth", CONFIG), weights)


def test_safetensors(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    assert equal(load_official(tmp_path / "model.safetensors", CONFIG), weights)
    assert equal(load_official(tmp_path, CONFIG), weights)


def shards(weights, folder, lacking=()):
    names = sorted(weights)
    of = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(of.values()) - set(lacking):
        save_file({name: weights[name] for name in names if of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": of}))


def test_shards(weights, tmp_path):
    shards(weights, tmp_path)
    assert equal(load_official(tmp_path, CONFIG), weights)


def test_a_shard_that_is_missing(weights, tmp_path):
    shards(weights, tmp_path, lacking=["model-00002-of-00003.safetensors"])
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00003.safetensors: download the whole folder"):
        load_official(tmp_path, CONFIG)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        read_weights(tmp_path)


def test_something_else_in_the_file(tmp_path):
    torch.save({"trainer": {"epoch": 3}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_official(tmp_path / "x.pth", CONFIG)
    (tmp_path / "y.pth").write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint") as caught:
        load_official(tmp_path / "y.pth", CONFIG)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_old_format(weights, tmp_path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(load_official(tmp_path / "old.pth", CONFIG), weights)


def test_layers_in_half_precision(weights, tmp_path):
    torch.save(weights, tmp_path / "reg.pth")
    model = load_official(tmp_path / "reg.pth", CONFIG, dtype=torch.bfloat16)
    assert {p.dtype for p in model.model.layers.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    painted, outputs = tiny.watched(model, tiny.features(), greedy=True)
    whole, exact = tiny.watched(tiny.model(), tiny.features(), greedy=True)
    assert (outputs[0].logits - exact[0].logits).abs().max() < 0.03
    assert painted.past_key_values.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(painted.bits[0], whole.bits[0])


@pytest.mark.parametrize("rows", [7, 16, 40])
def test_unconditional_text_is_cut_or_filled_up(weights, rows):
    model = on_meta(CONFIG)
    given = torch.arange(rows * 256.0).view(rows, 256)
    fill(model, {**weights, "cfg_uncond": given})
    found = model.model.conditioner.unconditional
    kept = min(rows, 16)
    assert found.shape == (16, 256) and torch.equal(found[:kept], given[:kept]) and not bool(found[kept:].any())


# --- what does not fit


def test_all_that_is_wrong_is_said_at_once(weights):
    wrong = {name: tensor for name, tensor in weights.items() if name not in ("head.bias", "pos_start")}
    wrong |= {"extra.weight": torch.zeros(1), "norm0_ve.bias": torch.zeros(2), "word_embed.weight": torch.zeros(64, 9)}
    wrong["block_chunks.1.module.1.ffn.fc2.bias"] = torch.zeros(63)
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        fill(on_meta(CONFIG), wrong, "reg.pth")
    assert str(caught.value) == (
        "reg.pth: its keys do not fit the model; missing: head.bias, pos_start; extra: extra.weight, norm0_ve.bias; "
        "misshapen: block_chunks.1.module.1.ffn.fc2.bias [63] for [64], word_embed.weight [64, 9] for [64, 8]"
    )


def test_another_models_weights(weights):
    with pytest.raises(ValueError, match="do not fit the model; missing: block_chunks") as caught:
        fill(on_meta(InfinityConfig(**{**tiny.TINY, "num_hidden_layers": 6})), weights)
    assert "block_chunks.0.module.2.sa.mat_qkv.weight" in str(caught.value) and "\n" not in str(caught.value)


def test_biases_of_keys(weights):
    wrong = {**weights, "block_chunks.0.module.1.ca.zero_k_bias": torch.ones(64)}
    with pytest.raises(ValueError, match=r"biases of keys that are not zero: block_chunks.0.module.1.ca.zero_k_bias"):
        fill(on_meta(CONFIG), wrong)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="model '3b'"):
        load_official("anything.pth", "3b")
