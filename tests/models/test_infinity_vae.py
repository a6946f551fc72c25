"""Infinity's autoencoder and bitwise quantizer against numbers of the official classes (spec sheet infinity.md).

The golden numbers were computed by the official AutoEncoder (FoundationVision/Infinity at 4c27bbb, base_ch 32, ch_mult 1 2 2,
patch 4, 8 bits) and MultiScaleBSQ, weights filled by the formula below over the official keys in sorted order.
"""

from __future__ import annotations

import math

import pytest
import torch

from mmkv.models.infinity.autoencoder import InfinityVAE
from mmkv.models.infinity.quantizer import (
    SelfCorrection,
    accumulate,
    codes,
    next_input,
    patchified,
    quantize,
    unpatchified,
)
from mmkv.models.infinity.vae_configuration import InfinityVAEConfig
from mmkv.models.infinity.vae_loading import check_vae, load_vae

SMALL = dict(latent_channels=8, patch_size=4, base_channels=32, channel_multipliers=(1, 2, 2))
SQUARES = [(n, n) for n in (1, 2, 3, 4)]


def official_key(key: str) -> str:
    """encoder.mid.block_1.norm1.weight -> encoder.mid.block_1.norm1.norm.weight, and so for convolutions."""
    *head, layer, kind = key.split(".")
    return ".".join([*head, layer, "norm" if layer.startswith("norm") else "conv", kind])


def wave(channels, side, formula):
    c, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (channels, side, side)), indexing="ij")
    return formula(c, y, x).float()[None]


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    """A checkpoint of the small model in the official spelling, filled by the sheet's formula."""
    shapes = {official_key(key): p.shape for key, p in InfinityVAE(InfinityVAEConfig(**SMALL)).state_dict().items()}
    weights = {}
    for j, key in enumerate(sorted(shapes)):
        i = torch.arange(math.prod(shapes[key]), dtype=torch.float64)
        base = 1.0 if key.endswith("norm.weight") else 0.0
        weights[key] = (base + 0.05 * torch.sin(0.37 * i + 1.3 * j)).float().view(shapes[key])
    return weights


@pytest.fixture(scope="module")
def vae(official, tmp_path_factory) -> InfinityVAE:
    path = tmp_path_factory.mktemp("vae") / "vae.pth"
    masks = {f"{name}.lfq.mask": 2 ** torch.arange(7, -1, -1) for name in ("quantizer", "quantize")}
    torch.save({"vae": official | masks}, path)
    return load_vae(path)


def test_the_small_model_has_the_official_number_of_tensors(official):
    assert len(official) == 176


@torch.no_grad()
def test_decoder_golden(vae):
    latent = wave(8, 4, lambda c, y, x: 0.35 * torch.sin(0.7 * c + 1.1 * y + 0.5 * x + 0.3))
    image = vae.decoder(latent)
    assert image.shape == (1, 3, 16, 16)
    assert image.mean().item() == pytest.approx(0.010314, abs=1e-6)
    assert image.std().item() == pytest.approx(0.093193, abs=1e-6)
    assert image[0, 0, 0, :4].tolist() == pytest.approx([0.02272, 0.02739, 0.03840, 0.04549], abs=1e-5)
    assert image[0, 2, 15, 12:].tolist() == pytest.approx([0.00292, -0.00366, -0.01410, -0.01729], abs=1e-5)
    assert torch.equal(vae.decode(latent), image.clamp(-1, 1))


@torch.no_grad()
def test_encoder_golden(vae):
    features = vae.encode(wave(3, 16, lambda c, y, x: torch.sin(0.9 * c + 0.31 * y + 0.23 * x)))
    assert features.shape == (1, 8, 4, 4)
    assert features.mean().item() == pytest.approx(0.039049, abs=1e-6)
    assert features.std().item() == pytest.approx(0.072984, abs=1e-6)
    assert features[0, :4, 0, 0].tolist() == pytest.approx([0.06265, 0.09312, 0.10505, 0.09621], abs=1e-5)


def golden_features() -> torch.Tensor:
    return wave(8, 4, lambda c, y, x: torch.sin(0.7 * c**2 + 1.1 * y + 0.5 * x + 0.3))


def test_quantizer_golden():
    found = quantize(golden_features(), SQUARES)
    assert [(int(bits.sum()), bits.numel()) for bits in found.bits] == [(5, 8), (16, 32), (40, 72), (58, 128)]
    assert found.summed.sum().item() == pytest.approx(12.40751, abs=1e-4)
    assert found.summed.abs().mean().item() == pytest.approx(0.64936, abs=1e-5)
    assert found.summed[0, :4, 0, 0].tolist() == pytest.approx([0.70711, 0.70711, 0, 0.70711], abs=1e-5)


def test_bits_alone_rebuild_sum_and_inputs():
    found = quantize(golden_features(), SQUARES)
    summed = None
    for scale, bits in enumerate(found.bits):
        summed = accumulate(summed, codes(bits), SQUARES[-1])
        if scale < 3:
            assert torch.equal(next_input(summed, SQUARES[scale + 1]), found.inputs[scale])
    assert torch.equal(summed, found.summed)


def test_codes_by_hand():
    bits = torch.tensor([1, 0, 0, 1]).view(1, 1, 1, 4)
    assert codes(bits).flatten().tolist() == [0.5, -0.5, -0.5, 0.5]  # 1/sqrt(4), a point on the unit sphere
    with pytest.raises(ValueError, match="height, width"):
        codes(bits[0])


def test_two_scales_by_hand():
    """One channel pair, map of 2 x 2: the mean sets scale 1, the rest scale 2; zero counts as negative."""
    features = torch.tensor([[[1.0, -3.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]])[None]
    found = quantize(features, [(1, 1), (2, 2)])
    assert found.bits[0].flatten().tolist() == [0, 1]  # means -0.5 and 2
    code = 2**-0.5
    assert found.bits[1][0, :, :, 0].tolist() == [[1, 0], [1, 1]]  # 1 + code, -3 + code, code, code
    assert found.bits[1][0, :, :, 1].all()  # 2 - code
    assert found.summed[0, 0].flatten().tolist() == pytest.approx([0.0, -2 * code, 0.0, 0.0])
    zero = quantize(torch.zeros(1, 2, 1, 1), [(1, 1)])
    assert zero.bits[0].flatten().tolist() == [0, 0]


def test_each_picture_of_a_batch_is_quantized_by_itself():
    one = golden_features()
    both = quantize(torch.cat([one, -one]), SQUARES)
    for i, alone in enumerate((quantize(one, SQUARES), quantize(-one, SQUARES))):
        for bits, mine in zip(both.bits, alone.bits, strict=True):
            assert torch.equal(bits[i : i + 1], mine)


def test_patchify_is_undone():
    bits = torch.randint(2, (2, 6, 4, 3), generator=torch.Generator().manual_seed(0))
    tokens = patchified(bits.movedim(-1, 1)).movedim(1, -1)
    assert tokens.shape == (2, 3, 2, 12)
    assert torch.equal(unpatchified(tokens), bits)
    assert tokens[0, 0, 0, :4].tolist() == bits[0, :2, :2, 0].flatten().tolist()  # a channel's four neighbours
    with pytest.raises(ValueError, match="patchify is off"):
        unpatchified(bits)


def test_gradients_pass_straight_through():
    features = golden_features().requires_grad_()
    found = quantize(features, SQUARES)
    assert torch.allclose(found.summed, quantize(features.detach(), SQUARES).summed, atol=1e-6)
    found.summed.sum().backward()
    assert bool(features.grad.abs().sum() > 0)


def test_self_correction_flips_what_goes_on_but_not_the_labels():
    generator = torch.Generator().manual_seed(3)
    flip = SelfCorrection(strength=0.3, scales=2, generator=generator)
    clean, noisy = quantize(golden_features(), SQUARES), quantize(golden_features(), SQUARES, flip)
    assert torch.equal(noisy.bits[0], clean.bits[0])  # no error before the first scale
    used, summed = [], None
    replay = SelfCorrection(strength=0.3, scales=2, generator=torch.Generator().manual_seed(3))
    for scale, bits in enumerate(noisy.bits):
        used.append(replay(scale, bits))
        summed = accumulate(summed, codes(used[-1]), SQUARES[-1])
    assert torch.equal(summed, noisy.summed)
    assert torch.equal(used[2], noisy.bits[2]) and torch.equal(used[3], noisy.bits[3])  # scales without errors
    nothing = quantize(golden_features(), SQUARES, SelfCorrection(strength=0.0))
    assert all(torch.equal(a, b) for a, b in zip(nothing.bits, clean.bits, strict=True))
    bits = torch.zeros(1, 200, 200, 8, dtype=torch.uint8)
    shares = {round(float(SelfCorrection(0.1, 1)(0, bits).float().mean()), 2) for _ in range(40)}
    assert shares <= {k / 100 for k in range(11)} and len(shares) > 3
    with pytest.raises(ValueError, match=r"strength 1.5: possible are 0 to 1"):
        SelfCorrection(strength=1.5)


def test_official_spelling_with_and_without_inner_names(official, vae, tmp_path):
    from mmkv.models.infinity.vae_loading import plain_key

    torch.save({plain_key(key): value for key, value in official.items()}, tmp_path / "plain.pth")
    plain = load_vae(tmp_path / "plain.pth", InfinityVAEConfig(**SMALL))
    for key, value in vae.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value)
    assert vae.config.to_dict() == InfinityVAEConfig(**SMALL).to_dict()  # read off the shapes


def test_all_wrong_keys_are_listed_at_once(official, tmp_path):
    bad = dict(official)
    del bad["decoder.mid.block_1.conv1.conv.bias"], bad["encoder.norm_out.norm.weight"]
    bad["decoder.up.9.block.0.conv1.conv.weight"] = torch.zeros(1)
    bad["decoder.conv_in.conv.bias"] = torch.zeros(3)
    torch.save({"vae": bad}, tmp_path / "bad.pth")
    with pytest.raises(ValueError) as error:
        load_vae(tmp_path / "bad.pth", InfinityVAEConfig(**SMALL))
    for part in (
        "decoder.mid.block_1.conv1.bias",
        "encoder.norm_out.weight",
        "decoder.up.9",
        "decoder.conv_in.bias [3]",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_autoencoder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no autoencoder at .*none.pth"):
        load_vae(tmp_path / "none.pth")
    torch.save({"vae": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is no Infinity autoencoder"):
        load_vae(tmp_path / "other.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_vae(tmp_path / "junk.pth")


def test_another_models_autoencoder_is_refused():
    d32 = InfinityVAEConfig()
    d14 = InfinityVAEConfig(latent_channels=14, patch_size=8, channel_multipliers=(1, 2, 4, 4))
    check_vae(d32, 32)
    check_vae(d14, 56, patchify=True)
    with pytest.raises(ValueError, match="use the one of 14 bits"):
        check_vae(d32, 56, patchify=True)
    with pytest.raises(ValueError, match="use the one of 16 px"):
        check_vae(InfinityVAEConfig(latent_channels=32, patch_size=8, channel_multipliers=(1, 2, 4, 4)), 32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(patch_size=12), "powers of 2"),
        (dict(latent_channels=True), "latent_channels True"),
        (dict(patch_size=32), "needs more than 5 levels"),
        (dict(base_channels=20), "cannot be normalised"),
    ],
)
def test_configurations_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        InfinityVAEConfig(**wrong)


def test_pictures_and_latents_of_another_shape(vae):
    with pytest.raises(ValueError, match="multiples of 4 px"):
        vae.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match="batch, 3, height, width"):
        vae.encode(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="batch, 8, height, width"):
        vae.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="the last scale is the whole map"):
        quantize(torch.zeros(1, 8, 4, 4), SQUARES[:2])


def test_the_2b_models_size():
    """110.1 M parameters, of which 65.1 M in the decoder; 270 tensors with the two names of the mask (spec sheet)."""
    with torch.device("meta"):
        vae = InfinityVAE(InfinityVAEConfig())
    assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(110.1, abs=0.05)
    assert sum(p.numel() for p in vae.decoder.parameters()) / 1e6 == pytest.approx(65.1, abs=0.05)
    assert len(vae.state_dict()) + 2 == 270


def test_save_and_load(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    again = InfinityVAE.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))
