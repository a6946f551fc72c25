"""`mmkv paint` and `mmkv calibrate`: what they write, what they measure, and one line for what a person can get wrong."""

from __future__ import annotations

import sys

import infinity_tiny
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import mmkv
from mmkv import _calibrate, _paint, cli
from mmkv.cache import H2O, HACK, KIVI, ScaleKV, SnapKV
from mmkv.models.infinity import InfinityVAE, InfinityVAEConfig
from mmkv.parts.calibration import HeadClasses, Identity, LayerRoles

PROMPTS = ["a red circle", "two blue squares", "a green triangle on black"]


def words(prompts: list[str]) -> list[torch.Tensor]:
    """Stands for a text encoder: features `[words, 256]` that depend on each word alone."""
    return [
        torch.stack([torch.sin(torch.arange(256) * (1 + sum(word.encode()) % 97) / 20) for word in prompt.split()])
        for prompt in prompts
    ]


@pytest.fixture
def painter(tmp_path):
    """With random weights, an autoencoder and a folder of its own."""
    torch.manual_seed(0)
    made = infinity_tiny.lively()
    vae = InfinityVAEConfig(
        latent_channels=8,
        patch_size=4,
        base_channels=8,
        channel_multipliers=(1, 1, 1),
        residual_blocks=1,
        norm_groups=4,
    )
    made.vae = InfinityVAE(vae).eval()
    made.config.vae_config = vae
    (tmp_path / "model").mkdir()
    made.save_pretrained(tmp_path / "model")
    again = type(made).from_pretrained(tmp_path / "model").eval()
    again.text_encoder = words
    return again


@pytest.fixture
def mmkv_command(capsys, monkeypatch, painter):
    """Call with arguments, the painter in place of any model: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "out", Console(width=1000))
    monkeypatch.setattr(cli, "err", Console(width=1000, stderr=True))
    monkeypatch.setattr(_paint, "load_painter", lambda *_, **__: painter)

    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mmkv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        seen = capsys.readouterr()
        return stopped.value.code or 0, seen.out, seen.err

    return call


# --- images


def test_images_are_red_green_blue(painter, monkeypatch):
    """What the autoencoder paints in its first channel is red; the released code turns channels round for OpenCV."""
    monkeypatch.setattr(
        painter.vae, "decode", lambda latent: torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    )
    image = painter.generate_image("a red circle", seed=0)
    assert image.mode == "RGB" and image.size == (8, 8)
    assert image.getpixel((3, 3)) == (255, 0, 127)


def test_one_prompt_and_several(painter):
    alone = painter.generate_image("a red circle", seed=0, greedy=True)
    both = painter.generate_image(PROMPTS[:2], greedy=True)
    assert isinstance(both, list) and len(both) == 2 and both[0].size == alone.size == (64, 64)
    assert np.array_equal(np.asarray(both[0]), np.asarray(alone))
    away = painter.generate_image("a red circle", negative="two blue squares", greedy=True)
    assert away.size == (64, 64)


@pytest.mark.parametrize("preset", ["nothing", "hack", "scalekv"])
def test_images_with_everything_kept_are_equal(painter, preset):
    heads = HeadClasses(Identity("infinity", 4, 4), ((0,), (1,), (2,), (3,)))
    roles = LayerRoles(Identity("infinity", 4, 4), ((), (), (), (), (), (0,), (1,)))
    methods = {"nothing": [], "hack": [HACK(heads, compression=0)], "scalekv": [ScaleKV(roles=roles, share=1.0)]}
    dense = painter.generate_image("a red circle", seed=3)
    with mmkv.wrapped(painter, cache=methods[preset]):
        assert np.array_equal(np.asarray(dense), np.asarray(painter.generate_image("a red circle", seed=3)))


def test_what_is_missing_is_said(painter):
    painter.text_encoder = None
    with pytest.raises(ValueError, match="this model has no text encoder"):
        painter.generate_image("a red circle")
    painter.text_encoder, painter.vae = words, None
    with pytest.raises(ValueError, match="this model has no autoencoder"):
        painter.generate_image("a red circle")


def test_another_models_autoencoder(painter):
    painter.vae = InfinityVAE(
        InfinityVAEConfig(latent_channels=4, patch_size=2, base_channels=8, channel_multipliers=(1, 1), norm_groups=4)
    )
    with pytest.raises(ValueError, match="an autoencoder of 4 channels for a model of 8 bits per position"):
        painter.generate_image("a red circle")


# --- mmkv paint


def test_paint(mmkv_command, tmp_path):
    code, out, _ = mmkv_command(
        "paint", "a red circle", "--method", "snapkv", "--keep", 0.3, "--out", tmp_path / "a.png"
    )
    assert code == 0 and "written:" in out and "80 / 530" not in out
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"


def test_paint_beside_dense(mmkv_command, tmp_path):
    code, out, _ = mmkv_command(
        "paint", "a red circle", "--method", "snapkv", "--keep", 0.3, "--compare", "--out", tmp_path / "a.png"
    )
    assert code == 0 and "dense" in out and "PSNR of the second against the first:" in out
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in out.splitlines()
        if "│" in line
    }
    assert rows["tokens held / seen"] == ["530 / 530", "158 / 530"]  # two rows of 265; int(0.3 * 265) = 79
    assert (
        rows["KV cache before the last scale"][0] == "1.0 MiB"
    )  # 2 rows, 4 layers, 4 heads, 265 tokens, 32 numbers of 4 bytes
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] > 2 * 64 and image.size[1] == 64 + _paint.LABEL


def test_paint_is_repeatable(mmkv_command, tmp_path):
    for name in ("a.png", "b.png"):
        mmkv_command("paint", "a red circle", "--method", "dense", "--seed", 4, "--out", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "a.txt"], "--out a.txt: possible are .png, .jpg and .webp"),
        (["--out", "nowhere/a.png"], "--out nowhere/a.png: no such folder"),
        (["--method", "hak"], "unknown preset 'hak' (did you mean 'hack'?)"),
        (["--method", "nosuch"], "--method nosuch: possible are dense, kivi-4"),
        (["--method", "snapkv", "--keep", "1.5"], "--keep 1.5: possible are numbers above 0 to 1"),
        (["--method", "kivi-4", "--keep", "0.5"], "--keep with kivi-4, which keeps all tokens"),
        (["--method", "dense", "--ratio", "1.1"], "ratio 1.1: possible are 0.333"),
        (["--method", "dense", "--pixels", "9M"], "pixels '9M': possible are"),
        (["--method", "hack"], "HACK needs structural= of this model: run `mmkv calibrate MODEL`"),
        (["--method", "dense", "--temperature", "0"], "temperature 0.0: possible are numbers above 0"),
        (["--method", "dense", "--temperature", "nan"], "temperature nan: possible are numbers above 0"),
        (["--method", "dense", "--guidance", "inf"], "guidance inf: possible are"),
        (["--method", "dense", "--seed", "-1"], "seed -1: possible are None and whole numbers from 0, below 2^63"),
        (["--method", "dense", "--keep", "0.5"], "--keep 0.5 with dense, which keeps all tokens"),
        (["--method", "dense", "--compare"], "--compare with dense, which is one of the two already"),
        (["--method", "snapkv", "--keep", "1e-6"], "is not one token; give"),
    ],
)
def test_paint_says_what_is_wrong(mmkv_command, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = mmkv_command("paint", "a red circle", *arguments)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_methods_by_name():
    assert _paint.method_of("dense", None) is None
    assert _paint.method_of("hack", 0.05) == HACK(compression=0.95, contextual_share=0.05)
    assert _paint.method_of("scalekv", 0.2) == ScaleKV(share=0.2)
    assert _paint.method_of("SnapKV", 0.2) == SnapKV(budget=0.2) and _paint.method_of("h2o", None) == H2O()
    assert _paint.method_of("kivi-4", None) == KIVI(bits=4)


def test_differences():
    black, grey = (_paint.Picture("x", Image.new("RGB", (4, 4), colour), None) for colour in ("black", (51, 51, 51)))
    assert _paint.difference([black]) is None and _paint.difference([black, black]) == float("inf")
    assert _paint.difference([black, grey]) == pytest.approx(20 * np.log10(5))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(name="nothing-here"), "nothing-here is no folder made by save_pretrained"),
        (dict(name="nothing-here", settings="2b"), "no checkpoint at nothing-here"),
        (dict(name="nothing-here", settings="3b"), "model '3b': possible are"),
        (dict(name="tiny", settings="2b"), "--settings 2b: is for official checkpoints, the bundled model has its own"),
        (dict(name="tiny", vae="x.pth"), "--vae x.pth: is for official checkpoints"),
        (dict(name="tiny", text_encoder="t5"), "--text-encoder t5: is for official checkpoints"),
        (dict(name="nothing-here", dtype="int8"), "no dtype 'int8'"),
        (dict(name="nothing-here", device="gpu"), "no device 'gpu'"),
    ],
)
def test_models_that_are_not_there(options, says):
    with pytest.raises((_paint.UserError, ValueError, FileNotFoundError), match=says):
        _paint.load_painter(**{"device": "cpu", **options})


def test_folders_are_loaded(painter, tmp_path):
    """Found by name; what is no text encoder, and what is no model, is said in a line."""
    with pytest.raises(_paint.UserError, match="cannot load the text encoder") as caught:
        _paint.load_painter(str(tmp_path / "model"), text_encoder=str(tmp_path / "no-t5"), device="cpu")
    assert "\n" not in str(caught.value)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(_paint.UserError, match="cannot load the model") as caught:
        _paint.load_painter(str(tmp_path / "model"), device="cpu")
    assert "\n" not in str(caught.value)


# --- mmkv calibrate


def test_calibrate_then_paint(mmkv_command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    code, out, _ = mmkv_command("calibrate", "a-model", "--prompts", prompts, "--share", 0.3)
    assert code == 0 and "head_classes.json" in out and "layer_roles.json" in out
    heads = HeadClasses.load(tmp_path / "model" / "head_classes.json")
    roles = LayerRoles.load(tmp_path / "model" / "layer_roles.json")
    assert sum(map(len, heads.structural)) == 8 and heads.model == Identity("infinity", 4, 4)
    assert len(roles.drafters) == 7 and sum(map(len, roles.drafters)) == 1
    assert not any(roles.drafters[:5])  # 30 % of 265 is 79, which 121 tokens before scale 5 exceed
    for method in ("hack", "scalekv"):
        assert mmkv_command("paint", PROMPTS[0], "--method", method, "--keep", 0.3, "--out", tmp_path / "a.png")[0] == 0


def test_calibrate_into_files(mmkv_command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS[0])
    files = tmp_path / "h.json", tmp_path / "r.json"
    code, _, _ = mmkv_command(
        "calibrate",
        "m",
        "--prompts",
        prompts,
        "--out",
        files[0],
        "--roles",
        files[1],
        "--contextual",
        0.25,
        "--drafters",
        3,
    )
    assert code == 0
    assert sum(map(len, HeadClasses.load(files[0]).structural)) == 12
    assert sum(map(len, LayerRoles.load(files[1]).drafters)) == 3


def test_calibration_is_repeatable_and_leaves_the_model_alone(painter):
    first = _calibrate.calibrate(painter, PROMPTS[:2])
    assert not hasattr(painter, "_mmkv") and first == _calibrate.calibrate(painter, PROMPTS[:2])
    assert 0 <= first.agreement <= 1 and _calibrate.calibrate(painter, PROMPTS[:1]).agreement == 1


def test_agreement_by_hand():
    one = HeadClasses(Identity("infinity", 2, 4), ((0, 1), (2,)))
    other = HeadClasses(Identity("infinity", 2, 4), ((0, 3), (2,)))
    assert _calibrate.agreement(one, one) == 1 and _calibrate.agreement(one, other) == 0.75


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a-model"], "--prompts is missing"),
        (["a-model", "--prompts", "nowhere.txt"], "--prompts nowhere.txt: no such file"),
        (["a-model", "--prompts", "empty.txt"], "--prompts empty.txt is empty"),
        (["a-model", "--prompts", "one.txt", "--out", "nowhere/h.json"], "nowhere/h.json: no such folder"),
        (["a-model", "--prompts", "one.txt", "--contextual", "2"], "contextual 2.0: possible are 0 to 1"),
        (["a-model", "--prompts", "one.txt", "--drafters", "99"], "drafters 99: possible are 0 to"),
        (["a-model", "--prompts", "one.txt", "--share", "0"], "share 0.0: possible are numbers above 0 to 1"),
    ],
)
def test_calibrate_says_what_is_wrong(mmkv_command, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "one.txt").write_text("a red circle\n")
    code, _, err = mmkv_command("calibrate", *arguments)
    assert code == 2 and says in err and err.count("\n") == 1
