"""`mmkv train-rates`, and the images it learns on."""

from __future__ import annotations

import json
import sys

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from mmkv import cli
from mmkv._vision import train_data
from mmkv._vision.train_rates import costs
from mmkv.tokens import DiffRate

NAME = "vit_tiny_patch16_224"
SETTINGS = ["img_size=64", "embed_dim=32", "depth=3", "num_heads=2", "num_classes=10"]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    options = dict(setting.split("=") for setting in SETTINGS)
    model = timm.create_model(NAME, **{key: int(value) for key, value in options.items()})
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    return tmp_path / "vit.pt"


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        kind = tmp_path / "images" / f"class{i % 2}"
        kind.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70 + i, 60), (40 * i, 0, 255 - 40 * i)).save(kind / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def mmkv_command(capsys, monkeypatch):
    """Call with arguments: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "out", Console(width=1000))
    monkeypatch.setattr(cli, "err", Console(width=1000, stderr=True))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmkv", "train-rates", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        seen = capsys.readouterr()
        return stopped.value.code or 0, seen.out, seen.err

    return call


def options(checkpoint, *more):
    given = ["--model", NAME, "--checkpoint", checkpoint, "--device", "cpu", "--granularity", 2, *more]
    return given + [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.mark.parametrize("loss", ["distillation", "labels"])
def test_rates_of_a_folder(mmkv_command, checkpoint, folder, tmp_path, loss):
    file = tmp_path / "rates.json"
    given = options(checkpoint, "--target", 0.0009, "--out", file, "--epochs", 2, "--batch", 3, "--loss", loss)
    code, out, err = mmkv_command(folder, *given)
    assert code == 0, err
    rates, held = DiffRate.load(file), json.loads(file.read_text())
    assert (rates.tokens, len(rates.prune), held["model"]) == (17, 3, NAME)
    model = train_data.load_model(NAME, str(checkpoint), SETTINGS)
    assert (held["gflops"], held["gflops_dense"]) == pytest.approx(costs(model, rates))
    assert f"{held['gflops']:.4g} of {held['gflops_dense']:.4g} GFLOPs; written to {file}" in out
    assert "behind merging" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--target", 9.0), "target of 9 GFLOPs; the whole model costs"),
        (("--target", 0.0009, "--loss", "l2"), "possible are 'labels', 'distillation'"),
        (("--target", 0.0009, "--model", "vit_tinny_patch16_224"), "did you mean 'vit_tiny_patch16_224'"),
        (("--target", 0.0009, "--model", "resnet18"), "could not be made"),
        (("--target", 0.0009, "--checkpoint", "nowhere.pt"), "no file nowhere.pt"),
        (("--target", 0.0009, "--set", "img_size"), "write KEY=VALUE"),
    ],
)
def test_what_a_person_can_get_wrong(mmkv_command, checkpoint, folder, change, message):
    code, _, err = mmkv_command(folder, *options(checkpoint), *change)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err


def test_folders_without_images(mmkv_command, checkpoint, tmp_path):
    given = options(checkpoint, "--target", 0.0009)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        assert "no folder, or there are no images in it" in mmkv_command(tmp_path / folder, *given)[2]
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    assert "no images in" in mmkv_command(tmp_path / "empty", *given)[2]


def test_digits():
    pytest.importorskip("sklearn")
    images, labels = train_data.digit_canvases(64, 40, seed=1)
    again, _ = train_data.digit_canvases(64, 40, seed=1)
    unseen, _ = train_data.digit_canvases(64, 40, seed=1, train=False)
    assert images.shape == (64, 3, 40, 40) and torch.equal(images, again) and not torch.equal(images, unseen)
    assert set(labels.tolist()) == set(range(10))
    assert 0.5 < float(images.std()) < 1.5
    background = (images[:, 0] < 1).float().mean()
    assert float(background) > 0.6


def test_batches_are_shuffled_and_whole():
    batches = train_data.Batches(torch.arange(10.0), torch.arange(10), 4)
    first, second = ([labels.tolist() for _, labels in batches] for _ in range(2))
    assert len(batches) == len(first) == 2 and [len(part) for part in first] == [4, 4]
    assert first != second and len(set(sum(first, []))) == 8
    assert all(torch.equal(images, labels.float()) for images, labels in batches)
    assert len(train_data.Batches(torch.arange(3.0), torch.arange(3), 8)) == 1


def test_files_without_classes(tmp_path):
    Image.new("L", (70, 60)).save(tmp_path / "a.png")
    model = timm.create_model(NAME, img_size=64, depth=1, embed_dim=32, num_heads=2)
    (batch,) = train_data.folder_loader(str(tmp_path), model, 8, workers=0)
    assert batch[0].shape == (1, 3, 64, 64) and batch[1].tolist() == [0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("digits", "--target", "-1"), "--target -1"),
        (("digits", "--target", "1", "--out", "/no/such/rates.json"), "no such folder"),
        (("EMPTY", "--target", "1"), "no images in it"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_is_loaded(tmp_path, words, said):
    from typer.testing import CliRunner

    from mmkv.cli import app

    words = [str(tmp_path) if w == "EMPTY" else w for w in words]
    found = CliRunner().invoke(app, ["train-rates", *words, "--model", "no_such_model"])
    assert found.exit_code == 2
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
