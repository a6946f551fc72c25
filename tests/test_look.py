"""`mmkv look`: from what a method did to stages, from stages to pixels, and the command that joins them."""

from __future__ import annotations

import json
import re
import sys

import av
import numpy as np
import pytest
import random_models
import torch
import videos
from PIL import Image
from rich.console import Console

from mmkv import cli
from mmkv._look import run
from mmkv._look.film import panels
from mmkv._look.page import page
from mmkv._look.paint import DIM, EDGE, LINE, TINT, colour, paint
from mmkv._look.stages import ALONE, DROPPED, NOWHERE, decoder_stages, tower_stage
from mmkv._look.strip import Scene, chosen, shortened, strip
from mmkv._vision.tower import TowerState
from mmkv._vision.trace import Trace
from mmkv.layout import VIDEO, TokenLayout
from mmkv.models import tiny
from mmkv.models.tiny import build
from mmkv.tokens import MustDrop, ToMe, VisionZip


def trace(into: dict[int, list[int]], newline: bool = False) -> Trace:
    """A text token, two frames of 2 x 2 tokens (numbers 1 to 8), perhaps a newline, two text tokens."""
    layout = TokenLayout.text(1, 11 + newline)
    layout.modality[0, 1 : 9 + newline] = VIDEO
    layout.medium[0, 1 : 9 + newline] = 0
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).T
    for name, values in zip(("frame", "row", "col"), cells):
        getattr(layout, name)[0, 1:9] = values.to(getattr(layout, name).dtype)
    layout.frame[0, 9 : 9 + newline] = 1
    out = Trace(layout, layers=6)
    out.into = {layer: torch.tensor([values]) for layer, values in into.items()}
    return out


WENT = {
    0: [0, 1, 1, -1, 4, 1, 6, -1, 8, 9, 10],  # 2 and 5 merge into 1; 3 and 7 go
    3: [0, -1, -1, -1, 4, -1, 8, -1, 8, 9, 10],  # then 1 goes with those that are in it, and 6 merges into 8
}


def test_stages_of_a_trace():
    first, second = decoder_stages(trace(WENT), "Mine")
    assert (first.place, first.counts) == ("before the decoder", "4 of 8 tokens, 50 %")
    assert [g.tolist() for g in first.group] == [[[1, 1], [DROPPED, ALONE]], [[1, ALONE], [DROPPED, ALONE]]]
    assert [x.tolist() for x in first.lead] == [[[True, False], [False, True]], [[False, True], [False, True]]]
    assert (second.place, second.counts) == ("behind layer 2", "2 of 8 tokens, 25 %")
    assert [g.tolist() for g in second.group] == [[[DROPPED, DROPPED], [DROPPED, ALONE]], [[DROPPED, 8], [DROPPED, 8]]]
    assert [x.tolist() for x in second.lead] == [[[False, False], [False, True]], [[False, False], [False, True]]]


def test_two_methods_at_one_place_chain():
    (stage,) = decoder_stages(trace({2: [0, 2, 3, 3, -1, 6, -1, 7, 8, 9, 10]}), "Mine")
    assert [g.tolist() for g in stage.group] == [[[3, 3], [3, DROPPED]], [[DROPPED, DROPPED], [ALONE, ALONE]]]
    assert stage.kept == 3


def test_newlines_count_but_are_not_drawn():
    (stage,) = decoder_stages(trace({}, newline=True), "Mine")
    assert (stage.place, stage.kept, stage.total) == ("in all layers", 9, 9)
    assert all((g == ALONE).all() and g.shape == (2, 2) for g in stage.group)


def test_tokens_without_places_are_refused():
    bare = trace({})
    bare.layout.row[:] = -1
    with pytest.raises(ValueError, match="places in a grid are unknown"):
        decoder_stages(bare, "Mine")


def test_stages_in_the_tower():
    """Two images of CLS and 2 x 2 patches; in the first patches 0 and 3 are one, in the second patch 1 was pruned."""
    source = torch.tensor([[0, 1, 2, 3, 1], [0, 1, -1, 2, 3]])
    state = TowerState(5, source=source, grid=(2, 2))
    stage = tower_stage(state, 1, "Mine", frames=2)
    assert stage.counts == "6 of 8 patches, 75 %"
    assert [g.tolist() for g in stage.group] == [[[1, ALONE], [ALONE, 1]], [[ALONE, DROPPED], [ALONE, ALONE]]]
    assert stage.lead[0].tolist() == [[True, True], [True, False]]
    tiled = tower_stage(state, 1, "Mine", frames=1)
    assert [g.tolist() for g in tiled.group] == [[[1, ALONE], [ALONE, 1]]]
    assert tower_stage(TowerState(5, grid=(2, 2)), 1, "Mine", 2) is None


def test_pixels():
    """Cells of 20 x 20 pixels: kept, led, merged away / dropped, kept, nothing."""
    image = np.full((40, 60, 3), 200, np.uint8)
    group = np.array([[ALONE, 2, 2], [DROPPED, ALONE, NOWHERE]])
    lead = np.array([[True, True, False], [False, True, False]])
    out = paint(image, group, lead, 60)
    assert out.shape == image.shape
    assert (out[1:18, 1:18] == 200).all()  # bright
    hue = np.array(colour(2))
    assert (out[3:17, 23:37] == 200).all()  # a group's own token is bright
    assert (out[:2, 20:40] == hue).all()  # and has a rim
    assert (out[:20, 20:22] == hue).all()
    assert (out[1:18, 42:59] == np.round(200 + TINT * (hue - 200.0))).all()  # what went into it is tinted
    dropped = out[22:38, 2:18]
    dark = round(200 * DIM)
    assert set(np.unique(dropped)) == {dark, max(dark, LINE)}
    assert (dropped == dark).mean() > 0.8
    assert (out[21:39, 21:39] == 200).all()
    assert (out[25, 20] == EDGE).all()  # an outline between kept and dropped
    assert (out[22:, 42:] < 30).all()


def test_an_unknown_frame_is_left_blank():
    out = paint(np.full((10, 20, 3), 200, np.uint8), None, None, 40)
    assert out.shape == (20, 40, 3) and (out > 220).all()


def test_colours_differ():
    assert len({colour(group) for group in range(1, 200)}) == 199


@pytest.fixture
def scene():
    images = [np.full((32, 32, 3), 40 * (i + 1), np.uint8) for i in range(2)]
    return Scene("<b>a & b</b>", "a caption", images, ["0.0 s", "1.0 s"])


def test_frames_are_chosen_evenly():
    assert chosen(16, 4) == [0, 5, 10, 15]
    assert chosen(3, 8) == [0, 1, 2]
    assert chosen(5, 1) == [0]


def test_the_strip_has_a_row_for_each_stage(scene):
    stages = decoder_stages(trace(WENT), "Mine")
    one, two = strip(scene, stages[:1], 8), strip(scene, stages, 8)
    assert two.height - one.height == 428  # one more row of cells, 2 x 210, and a gap
    assert strip(scene, stages, 1).width < two.width
    bright = np.asarray(two)
    assert (bright == 40).all(-1).any() and (bright == 80).all(-1).any()
    assert (bright == 8).all(-1).any()  # 40 darkened


def test_long_words_are_shortened():
    assert shortened("short", 13, 200) == "short"
    assert shortened("x" * 500, 13, 100).endswith("x...")


def test_the_page_asks_for_nothing(scene):
    source = page(scene, decoder_stages(trace(WENT), "Mine"))
    assert not re.search(r"https?:|src=|href=|@import|url\(", source)
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in source and "<b>a" not in source
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', source, re.DOTALL)[1])
    assert data["labels"] == ["0.0 s", "1.0 s"]
    assert [stage["name"] for stage in data["stages"]] == ["input", "Mine, before the decoder", "Mine, behind layer 2"]
    assert all(len(stage["pictures"]) == 2 for stage in data["stages"])


def test_the_film_shows_every_picture(scene):
    """Five pictures of two decoder frames: three of the first, two of the second."""
    pictures = np.full((5, 32, 32, 3), 200, np.uint8)
    shown = list(panels(scene, decoder_stages(trace(WENT), "Mine"), pictures))
    assert len(shown) == 5
    assert all(n % 2 == 0 for n in shown[0].shape[:2])
    assert [np.array_equal(a, b) for a, b in zip(shown, shown[1:])] == [True, True, False, True]


def onevision():
    """LLaVA-OneVision: SigLIP of 4 x 4 patches; a video's frames become 2 x 2 tokens, an image its base tile and its tiles."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    model, side = random_models.make("llava_onevision"), {"height": 32, "width": 32}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=model.config.image_grid_pinpoints),
        build.make_processor().tokenizer,
        LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    model.config.image_token_id, model.config.video_token_id = processor.image_token_id, processor.video_token_id
    return model, processor


def llava():
    """LLaVA-1.5: CLIP of 6 x 6 patches, which sees the central square."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    model = random_models.make("llava")
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        build.make_processor().tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
    )
    model.config.image_token_id = processor.image_token_id
    return model, processor


def shapes(stage):
    return [None if grid is None else grid.shape for grid in stage.group]


PICTURES = np.random.default_rng(0).integers(0, 255, (3, 40, 70, 3)).astype(np.uint8)


def test_merging_in_the_tower_of_a_video():
    look = run.Look(*onevision(), PICTURES, 2.0, "what is red?")
    tower, decoder = look.stages(ToMe(r=3))  # in 2 blocks
    assert (tower.place, tower.counts) == ("in the vision tower", "30 of 48 patches, 62.5 %")
    assert shapes(tower) == [(4, 4)] * 3 and shapes(decoder) == [(2, 2)] * 3
    assert (decoder.kept, decoder.total) == (13, 13)  # with the newline
    for frame in range(3):
        assert tower.lead[frame].sum() == 10
    assert look.scene("", "").labels == ["0.0 s", "0.5 s", "1.0 s"]


def test_an_image_in_tiles():
    """A base tile and 40 x 70 pixels in tiles of 32: 6 x 12 tokens, a newline behind each row of these."""
    look = run.Look(*onevision(), PICTURES[:1], None, "what is red?")
    tower, decoder = look.stages(MustDrop(window=2, tau=-1.0))
    assert shapes(tower) == [(4, 4), None]
    assert shapes(decoder) == [(4, 4), (6, 12)]
    assert decoder.total == 4 * 4 + 6 * 12 + 6
    # each window of 2 x 2 is one token; of the tiles' 8 rows the first and the last are cut away, and newlines stay
    assert decoder.kept == 2 * 2 + 4 * 6 + 6
    assert decoder.group[0].tolist() == [[1, 1, 3, 3], [1, 1, 3, 3], [9, 9, 11, 11], [9, 9, 11, 11]]
    assert look.scene("", "").labels == ["whole image", "its tiles"]


def test_a_cropped_image():
    look = run.Look(*llava(), PICTURES[:1], None, "what is red?")
    (stage,) = look.stages(VisionZip(4, 2))
    assert (stage.kept, stage.total, shapes(stage)) == (6, 36, [(6, 6)])
    assert np.array_equal(look.scene("", "").images[0], PICTURES[0, :, 15:55])


@pytest.mark.parametrize("name", ["diffrate", "prumerge", "tome"])
def test_methods_without_a_ratio_take_none(name):
    (method,) = run.methods_of(name, None)
    assert type(method).__name__.lower() == name
    with pytest.raises(ValueError, match="a keep ratio takes one of"):
        run.methods_of(name, 0.5)


def test_a_quarter_by_default():
    assert [m.ratio for m in run.methods_of("FastV, evs", None)] == [0.75, 0.75]


@pytest.fixture
def mmkv_look(capsys, monkeypatch, tmp_path):
    """Call with arguments in a fresh folder, the bundled model without its weights: (exit code, stdout, stderr)."""
    torch.manual_seed(0)
    pair = build.make_model(), build.make_processor()
    monkeypatch.setattr(tiny, "load", lambda *_, **__: pair)
    monkeypatch.setattr(cli, "out", Console(width=1000))
    monkeypatch.setattr(cli, "err", Console(width=1000, stderr=True))
    monkeypatch.chdir(tmp_path)
    videos.write(tmp_path / "clip.mp4", count=16, fps=2)
    Image.fromarray(videos.picture(3, 90, 60)).save(tmp_path / "shot.png")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmkv", "look", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        seen = capsys.readouterr()
        return stopped.value.code or 0, seen.out, seen.err

    call.model = pair[0]
    return call


def test_a_video_becomes_a_picture(mmkv_look, tmp_path):
    before = {k: v.clone() for k, v in mmkv_look.model.state_dict().items()}
    code, out, err = mmkv_look("clip.mp4", "--method", "uniform,FastV", "--columns", 3)
    assert code == 0, err
    counts = re.findall(r"(\d+) of (\d+) tokens, ([\d.]+) %", out)
    assert len(counts) == 2
    assert all(abs(int(kept) - int(total) / 4) <= 8 for kept, total, _ in counts)
    assert "Uniform, before the decoder" in out and "FastV, behind layer 1" in out
    assert out.endswith("written: clip-uniform-fastv.png\n")
    with Image.open(tmp_path / "clip-uniform-fastv.png") as image:
        assert image.width > 600 and image.height > 600
    after = mmkv_look.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert getattr(mmkv_look.model, "_mmkv", None) is None


def test_a_video_becomes_a_film(mmkv_look, tmp_path):
    code, _, err = mmkv_look("clip.mp4", "--method", "dycoke", "--keep", 0.5, "--out", "film.mp4")
    assert code == 0, err
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert film.streams.video[0].average_rate == 2
        assert sum(1 for _ in film.decode(video=0)) == 16


def test_a_video_becomes_a_page(mmkv_look, tmp_path):
    code, _, err = mmkv_look("clip.mp4", "--method", "sparsevlm", "--out", "page.html", "--frames", 4)
    assert code == 0, err
    assert "SparseVLM, behind layer 2" in (tmp_path / "page.html").read_text()


def test_an_image(mmkv_look, tmp_path):
    code, out, err = mmkv_look("shot.png", "--method", "uniform", "--keep", 0.5)
    assert code == 0, err
    kept, total = map(int, re.search(r"(\d+) of (\d+) tokens", out).groups())
    assert kept == round(total / 2)
    assert (tmp_path / "shot-uniform.png").exists()


def test_what_was_left_alone_is_said(mmkv_look):
    code, out, err = mmkv_look("shot.png", "--method", "evs")
    assert code == 0
    assert "100 %" in out and "EVS left every token in its place, as it does with images" in err
    _, _, err = mmkv_look("clip.mp4", "--method", "mustdrop")
    assert "MustDrop has thresholds and no keep ratio" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.mp4"], "no such video file: gone.mp4"),
        (["gone.png"], "no such image file: gone.png"),
        (["broken.png"], "broken.png is not a readable image"),
        (["clip.mp4", "--method", "fasttv"], "did you mean 'fastv'"),
        (["clip.mp4", "--method", "snapkv"], "SnapKV drops no vision tokens"),
        (["clip.mp4", "--method", "toc3d"], "ToC3D drops no vision tokens of a language model"),
        (["clip.mp4", "--method", "tome"], "ToMe merges inside a vision tower with absolute positions"),
        (["clip.mp4", "--method", "prumerge", "--keep", "0.5"], "adapts to each frame"),
        (["clip.mp4", "--method", "dycoke", "--keep", "0.1"], "possible are shares from 0.25"),
        (["clip.mp4", "--keep", "0"], "above 0, at most 1"),
        (["clip.mp4", "--out", "a.gif"], "possible are files that end in .png, .mp4, .html"),
        (["clip.mp4", "--out", "no/a.png"], "there is no folder no"),
        (["shot.png", "--out", "a.mp4"], "shot.png is a single image; write .png or .html"),
        (["shot.png", "--frames", "2"], "--fps and --frames are for videos"),
        (["clip.mp4", "--question", " "], "an empty question"),
        (["clip.mp4", "--question", "where is the zebra?"], "'zebra'"),
        (["clip.mp4", "--model", "/no/such/folder"], "cannot load the model"),
    ],
)
def test_user_errors(mmkv_look, tmp_path, arguments, says):
    (tmp_path / "broken.png").write_text("hello")
    code, out, err = mmkv_look(*arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("clip.mp4: ")]
    assert lines[0].startswith("mmkv: ") and says in lines[0]
    assert len(lines) == 1 or "zebra" in says
