"""ToC3D end to end: backbone, detector whose history flows from frame to frame, scenes, training, metrics, committed results."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mmkv.models.toc3d import evaluate, speed, train
from mmkv.models.toc3d.backbone import BLOCKS, Backbone
from mmkv.models.toc3d.detector import Detector
from mmkv.models.toc3d.losses import code, detection_loss, match
from mmkv.models.toc3d.metrics import Sample, accuracy, average_precision, hits, ranking
from mmkv.models.toc3d.proposals import lift, pixels, project
from mmkv.models.toc3d.scenes import CLASSES, PC_RANGE, SEEN, batch, make_scene
from mmkv.tokens import ToC3D
from mmkv.tokens.toc3d_selector import selection_loss

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "toc3d.json"
SMALL = dict(image=(40, 72), patch=8, dim=16, depth=4, heads=2, window=4, query_dim=16, pc_range=PC_RANGE)
METHOD = ToC3D(ratios=(0.5, 0.3), scoring=(1, 3), queries=4)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(seed, frames=3, cameras=3, height=40, width=72) for seed in range(3)]


def frame_of(scenes, moment: int):
    return batch([scene[moment] for scene in scenes])


def small(method: ToC3D | None = METHOD, **options) -> Detector:
    torch.manual_seed(1)
    backbone = Backbone(**SMALL | options, toc3d=method)
    return Detector(backbone, 16, queries=4, proposals=6, memory=6).eval()


def told(count: int = 3):
    """History, time and pose of a start of scenes."""
    return None, torch.zeros(count), torch.eye(4).expand(count, 4, 4)


# --- backbone


@torch.no_grad()
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("global_window", [5, None])
def test_keeping_all_is_the_dense_backbone(kind, global_window):
    """5 x 9 patches in windows of 4 and 5, which do not divide them."""
    options = SMALL | dict(block=kind, global_window=global_window)
    dense, routed = Backbone(**options).eval(), Backbone(**options, toc3d=METHOD.keeping_everything()).eval()
    routed.load_state_dict(dense.state_dict(), strict=False)
    images = torch.randn(6, 3, 40, 72)
    assert (dense(images).grid - routed(images, *told()).grid).abs().max() < 1e-5
    routed.toc3d = METHOD
    assert (dense(images).grid - routed(images, *told()).grid).abs().max() > 1e-3


@torch.no_grad()
def test_blocks_before_the_first_scoring_are_dense():
    out = small().backbone(torch.randn(6, 3, 40, 72), *told())
    assert out.salient[0] is None and all(s is not None for s in out.salient[1:])
    assert len(out.scores) == len(out.masks) == 2 and out.grid.shape == (6, 16, 5, 9)


@torch.no_grad()
@pytest.mark.parametrize("select", ["real", "padded"])
def test_tokens_counted_in_the_mlps(select):
    """5 x 9 in windows of 4: 2 of 4 x 4, then 1 x 4 twice, 4 x 1, 1 x 1; the global block 2 has windows of 5: 5 x 5 and 5 x 4."""
    backbone = small(replace(METHOD, select=select), global_window=5).backbone
    images = torch.randn(6, 3, 40, 72)
    counted = evaluate.count_mlp_tokens(backbone, lambda: backbone(images, *told()))
    assert counted == [slots for slots, _ in backbone.mlp_tokens(5, 9)]
    real = [45, 8 + 8 + 2 + 2 + 2 + 1, 12 + 10, 4 + 4 + 1 + 1 + 1 + 1]
    if select == "real":  # and a bridge in each window but that of one token
        assert counted == [45, real[1] + 5, real[2] + 2, real[3] + 5]
        assert [r for _, r in backbone.mlp_tokens(5, 9)] == real
    else:
        assert counted == [45, 6 * 9, 2 * 13, 6 * 5]


@torch.no_grad()
def test_inference_repeats_itself(scenes):
    detector = small()
    one, two = evaluate.run(detector, scenes), evaluate.run(detector, scenes)
    for (_, a), (_, b) in zip(one, two):
        assert torch.equal(a.boxes, b.boxes) and all(
            torch.equal(x, y) for x, y in zip(a.features.masks, b.features.masks)
        )


@pytest.mark.parametrize(
    ("name", "kind", "heads"), [("eva02_tiny_patch14_224", "eva02-small", 3), ("vit_tiny_patch16_224", "vit", 3)]
)
@torch.no_grad()
def test_timm_weights(name, kind, heads):
    model = timm.create_model(name, pretrained=False, num_classes=0)
    backbone = Backbone((64, 96), 16, model.embed_dim, 12, heads, block=kind)
    left = backbone.load_timm(model.state_dict())
    assert set(left) <= {"norm.weight", "norm.bias"}
    for key, value in model.state_dict().items():
        if key.startswith("blocks."):
            assert torch.equal(backbone.state_dict()[key], value)
    with pytest.raises(ValueError, match="no block weight fits: dim 16, 4 blocks"):
        Backbone(**SMALL).load_timm(model.state_dict())


@torch.no_grad()
def test_one_global_window_of_a_timm_grid_is_timms_own_features():
    """14 x 14 patches, all blocks global, no class token in the stream: a timm EVA-02 without one."""
    model = timm.create_model("eva02_tiny_patch14_224", pretrained=False, num_classes=0, class_token=False)
    backbone = Backbone((224, 224), 14, 192, 12, 3, "eva02-small", 16, None, tuple(range(12)))
    backbone.load_timm(model.state_dict())
    images = torch.randn(1, 3, 224, 224)
    x = backbone.embed(images)
    want, rope = model._pos_embed(model.patch_embed(images))
    assert torch.allclose(x.flatten(1, 2), want, atol=1e-5)
    side = backbone.side(0, 16, 16)
    out = backbone._run(backbone.blocks[0], side, x.flatten(1, 2), torch.arange(256)[None])
    assert torch.allclose(out, model.blocks[0](want, rope=rope), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(block="swin"), "block 'swin'; possible are 'eva02', 'eva02-small', 'vit'"),
        (dict(window=0), "window 0"),
        (dict(global_window=-1), "global_window -1"),
        (dict(heads=3), "dim 16 over 3 heads"),
        (dict(heads=8), "dim 16 over 8 heads; .* a multiple of 4 to rotate"),
        (dict(toc3d=METHOD, global_blocks=(3,)), "scoring block 3 is a global block"),
        (dict(toc3d=ToC3D()), "scoring block 18 of a backbone of 4 blocks"),
    ],
)
def test_backbone_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        Backbone(**SMALL | options)


def test_detector_refuses_other_queries_than_the_selectors():
    with pytest.raises(ValueError, match="dim 32; the backbone's selectors expect queries of 16"):
        Detector(Backbone(**SMALL, toc3d=METHOD), 32)


def test_detector_refuses_a_memory_that_is_too_small():
    with pytest.raises(ValueError, match="scores by 4 queries; the memory of 3"):
        Detector(Backbone(**SMALL, toc3d=METHOD), 16, memory=3)


# --- the history flows


@torch.no_grad()
def test_first_frames_use_the_fallback_scorer_and_later_ones_the_queries(scenes):
    detector, called = small(), []
    for selector in detector.backbone.selectors:
        selector.own.register_forward_hook(lambda *_: called.append("own"))
        selector.project.register_forward_hook(lambda *_: called.append("queries"))
    _, history = detector(frame_of(scenes, 0))
    assert called == ["own"] * 2
    called.clear()
    detector(frame_of(scenes, 1), history)
    assert called == ["queries"] * 2
    called.clear()
    detector(frame_of(scenes, 1), replace(history, exists=torch.tensor([True, False, True])))
    assert sorted(called) == ["own"] * 2 + ["queries"] * 2


@torch.no_grad()
def test_scores_follow_the_memory_of_the_frame_before(scenes):
    """The same frame after two different pasts, and after none."""
    detector, now = small(), frame_of(scenes, 1)
    past = detector(frame_of(scenes, 0))[1]
    other = detector(frame_of(scenes[::-1], 0))[1]
    pasts = [detector(now, history)[0].features.scores for history in (past, other, None)]
    for one, two in itertools.combinations(pasts, 2):
        assert all((a - b).abs().max() > 1e-6 for a, b in zip(one, two))


@torch.no_grad()
def test_a_batch_with_mixed_histories_is_its_samples(scenes):
    detector, now = small(), frame_of(scenes, 1)
    history = detector(frame_of(scenes, 0))[1]
    mixed = detector(now, replace(history, exists=torch.tensor([True, False, True])))[0]
    for i in range(3):
        one = batch([scenes[i][1]])
        alone = detector(one, history.rows(torch.arange(3) == i) if i != 1 else None)[0]
        assert torch.allclose(mixed.boxes[:, i], alone.boxes[:, 0], atol=1e-3)
        assert torch.allclose(mixed.features.scores[1][3 * i : 3 * i + 3], alone.features.scores[1], atol=1e-4)


@torch.no_grad()
def test_memory_is_the_most_confident_objects_in_global_coordinates(scenes):
    detector, frame = small(), frame_of(scenes, 1)
    found, history = detector(frame)
    for i in range(3):
        order = found.logits[-1, i].amax(-1).argsort(descending=True)[:6]
        centre = torch.cat([found.boxes[-1, i, order, :3], torch.ones(6, 1)], 1)
        assert torch.allclose(history.points[i], (frame.pose[i] @ centre.T).T[:, :3], atol=1e-4)
        assert torch.equal(history.velocity[i], found.boxes[-1, i, order, 8:])
    assert not history.queries.requires_grad and history.time.unique().tolist() == [0.5]


@torch.no_grad()
def test_remembered_objects_move_on_with_their_velocity_and_the_ego(scenes):
    """An object at (5, 2) m of the old ego with 2 m/s along its x; the ego turned left by 90 degrees and went 1 m forward."""
    detector, frame = small(), batch([scenes[0][1]])
    history = detector(batch([scenes[0][0]]))[1]
    frame.pose[0] = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    history = replace(
        history,
        points=torch.tensor([5.0, 2, 0]).expand(1, 6, 3),
        velocity=torch.tensor([2.0, 0]).expand(1, 6, 2),
        time=frame.time[:, None].expand(1, 6) - 0.5,
        pose=torch.eye(4).expand(1, 6, 4, 4),
    )
    _, points = detector.start(frame, history)
    assert detector.metres(points)[0, -1].tolist() == pytest.approx([2, -5, 0], abs=1e-4)  # (6, 2) from (1, 0), turned


# --- scenes


def test_scenes_repeat_themselves_and_differ():
    one, two, other = (make_scene(seed, 2) for seed in (5, 5, 6))
    assert all(torch.equal(a.images, b.images) and torch.equal(a.boxes, b.boxes) for a, b in zip(one, two))
    assert not torch.equal(one[0].images, other[0].images)
    with pytest.raises(ValueError, match="7 cameras; possible are 2 to 6"):
        make_scene(0, cameras=7)


@pytest.mark.parametrize("cameras", [2, 3, 6])
def test_cameras_see_the_objects_where_they_are(cameras):
    """Each 2D box lies around some object's projected centre unless something hides it, and most objects are in a view."""
    around = total = 0
    for seed in range(4):
        for frame in make_scene(seed, 2, cameras, 40, 72):
            assert frame.images.shape == (cameras, 3, 40, 72) and frame.images.abs().max() <= 1
            at = project(frame.boxes[:, :3], batch([frame]), 0)
            for view, boxes in zip(at, frame.boxes2d):
                for left, top, right, bottom in boxes.tolist():
                    total += 1
                    inside = (view[:, 0] > left) & (view[:, 0] < right) & (view[:, 1] > top) & (view[:, 1] < bottom)
                    around += bool((inside & (view[:, 2] > 0)).any())
    assert total > 10 and around / total > 0.7


def test_objects_move_by_their_velocity_in_the_world():
    frames = make_scene(3, 2)
    tracks = []
    for frame, age in zip(frames, (0.5, 0.0)):
        moved = frame.boxes[:, :3] + age * torch.cat([frame.boxes[:, 7:], torch.zeros(len(frame.boxes), 1)], 1)
        tracks.append((frame.pose @ torch.cat([moved, torch.ones(len(moved), 1)], 1).T).T[:, :2])
    nearest = torch.cdist(*tracks).amin(1)
    assert (nearest < 1e-3).sum() >= len(nearest) - 1  # one may have gone out of sight


def test_hidden_objects_are_no_objects():
    assert SEEN > 0
    for frame in make_scene(0, 2):
        assert len(frame.boxes) == len(frame.labels) <= sum(len(boxes) for boxes in frame.boxes2d)


def test_lifting_undoes_projecting(scenes):
    """A point seen in a patch comes back from its offset and depth."""
    frame = batch([scenes[0][0]])
    point = frame.boxes[0][:1, :3]
    at = project(point, frame, 0)
    view = int((at[:, 0, 2] * ((at[:, 0, 0] > 0) & (at[:, 0, 0] < 72))).argmax())
    centre, size = pixels(frame, (5, 9))
    offset = torch.zeros(1, 3, 5, 9, 3)
    offset[0, view, 2, 4] = torch.cat([(at[view, 0, :2] - centre[2, 4]) / size, at[view, 0, 2:].log()])
    assert torch.allclose(lift(offset, frame)[0, view, 2, 4], point[0], atol=1e-3)


# --- loss and metrics


def test_matching_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for rows, cols in ((1, 1), (1, 4), (3, 3), (3, 5), (4, 6), (0, 3)):
        for _ in range(20):
            cost = rng.normal(size=(rows, cols))
            best = min(sum(cost[i, p[i]] for i in range(rows)) for p in itertools.permutations(range(cols), rows))
            got = match(cost)
            assert len(set(got.tolist())) == rows and cost[range(rows), got].sum() == pytest.approx(best)
    with pytest.raises(ValueError, match="3 rows for 2 columns"):
        match(np.zeros((3, 2)))


def test_loss_falls_towards_the_truth(scenes):
    frame, detector = frame_of(scenes, 0), small()
    found, _ = detector(frame)
    usual = detection_loss(found, frame)
    for i, (boxes, labels) in enumerate(zip(frame.boxes, frame.labels)):
        found.boxes[:, i, : len(boxes)] = code(boxes)
        found.logits[:, i] = -8
        found.logits[:, i, range(len(boxes)), labels] = 8
    better = detection_loss(found, frame)
    assert better < usual / 2 and torch.isfinite(usual)
    assert code(torch.tensor([[1.0, 2, 3, 4, 5, 6, 0, 7, 8]]))[0].tolist() == pytest.approx(
        [1, 2, 3, math.log(4), math.log(5), math.log(6), 0, 1, 7, 8]
    )


def test_loss_of_frames_without_objects(scenes):
    frame, detector = frame_of(scenes, 0), small()
    frame.boxes = [b[:0] for b in frame.boxes]
    frame.labels = [b[:0] for b in frame.labels]
    assert torch.isfinite(detection_loss(detector(frame)[0], frame))


def sample(scores, centres, true) -> Sample:
    zeros = np.zeros(len(scores), dtype=int)
    return Sample(np.array(scores), zeros, np.array(centres, float), np.zeros(len(true), int), np.array(true, float))


def test_hits_by_hand():
    """The better of two takes the one object; a class of its own counts alone."""
    one = sample([0.2, 0.9], [[0.0, 0], [0.5, 0]], [[0.0, 0]])
    assert hits([one], 0, 1.0)[0].tolist() == [True, False] and hits([one], 1, 1.0) == (pytest.approx([]), 0)
    assert hits([one], 0, 0.3)[0].tolist() == [False, True]
    assert hits([one, sample([0.5], [[9.0, 0]], [[9.0, 0]])], 0, 1.0)[0].tolist() == [True, True, False]


def test_average_precision_by_hand():
    assert average_precision(np.array([True, True]), 2) == pytest.approx(1.0)
    assert average_precision(np.array([], dtype=bool), 2) == 0 == average_precision(np.array([False]), 2)
    # One of two found, first: precision 1 up to recall 0.5 (40 of the 90 recalls above 0.1), then none.
    assert average_precision(np.array([True, False]), 2) == pytest.approx(
        sum((1.0 if r < 50 else 0.5 if r == 50 else 0) - (0.1 if r <= 50 else 0) for r in range(11, 101)) / 90 / 0.9
    )
    one = sample([0.9], [[0.0, 0]], [[0.3, 0], [5.0, 5]])
    assert accuracy([one], 1)["recall 1 m"] == 0.5


def test_ranking_by_hand():
    assert ranking(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])) == 0.75
    assert ranking(torch.tensor([1.0, 1, 1]), torch.tensor([0, 1, 0])) == 0.5
    assert ranking(torch.tensor([0.0, 1, 2]), torch.tensor([0, 1, 1])) == 1


# --- training


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    """Stopped in the fourth step, saved after the second: the end is that of a run that nothing stopped."""
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "make_detector", lambda method=None: small(method and METHOD))
    data = [make_scene(seed, 2, 3, 40, 72) for seed in range(4)]

    class Stopped(train.Stage):
        def step(self, data):
            if self.done == 3:
                raise KeyboardInterrupt
            return super().step(data)

    for name in ("once", "stopped"):
        work = tmp_path / name
        work.mkdir()
        for stage in ("pretrain", "fast"):
            if name == "stopped":
                with pytest.raises(KeyboardInterrupt):
                    Stopped(stage, work, 5).run(data)
            run = train.Stage(stage, work, 5)
            assert run.done == (2 if name == "stopped" else 0)
            run.run(data)
    one, two = (torch.load(tmp_path / name / "fast.pt")["model"] for name in ("once", "stopped"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    dense = torch.load(tmp_path / "once" / "pretrain.pt")["model"]
    assert not any(key.startswith("backbone.selectors") for key in dense) and len(one) > len(dense)


def test_commands(tmp_path, monkeypatch, capsys):
    """Train and evaluate, one step on two scenes."""
    for name, value in (("BATCH", 1), ("SCENES", 2), ("FRAMES", 2)):
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(speed, "times", list)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr("sys.argv", ["train", "--work", str(tmp_path), "--steps", "1", "--finetune", "1"])
    train.main()
    assert (
        (tmp_path / "train.log").read_text().count("step 1 loss") == 4 == capsys.readouterr().out.count("step 1 loss")
    )
    monkeypatch.setattr("sys.argv", ["evaluate", "--work", str(tmp_path), "--scenes", "2"])
    evaluate.main()
    result = json.loads((tmp_path / "evaluate.json").read_text())
    assert len(result["accuracy"]) == 7 and result["frames"] == 4
    assert Image.open(tmp_path / "kept.png").size == (4 * (3 * 96 + 4), 2 * (3 * 48 + 4))


def test_a_little_training_ranks_tokens_under_objects_first():
    """Two updates of each of 60 steps on 16 scenes, by the selection loss alone; judged on scenes never seen, 0.5 is chance."""
    data = [make_scene(seed, 2, 3, 40, 72) for seed in range(16)]
    detector = small().train()
    optimizer = torch.optim.AdamW(detector.parameters(), 4e-3)
    for step in range(60):
        history = None
        for moment in range(2):
            frame = frame_of([data[(4 * step + i) % 16] for i in range(4)], moment)
            found, history = detector(frame, history)
            boxes = [view for sample in frame.boxes2d for view in sample]
            optimizer.zero_grad()
            selection_loss(found.features.masks, boxes, (5, 9), 8).backward()
            optimizer.step()
    new = [make_scene(seed, 2, 3, 40, 72) for seed in range(100, 108)]
    moments = evaluate.run(detector.eval(), new)
    for some in (moments[:1], moments[1:]):  # by the fallback scorer, by the history's queries
        assert min(evaluate.ranks(some)) > 0.7


# --- committed results


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(RESULTS.read_text())


def test_trained_selectors_rank_objects_first(results):
    """On scenes never trained on; 0.5 is chance."""
    ranks = results["ranking per scoring block"]
    assert min(ranks["first frames (fallback scorer)"] + ranks["frames with a history"]) > 0.9
    assert max(ranks["untrained selectors"]) < min(ranks["frames with a history"])
    for row in results["accuracy"]:
        for kept in row.get("kept", []):
            assert kept["under objects"] > kept["all"] or kept["all"] == 1


def test_results_count_tokens_as_the_code_does(results):
    rows = {row["backbone"]: row for row in results["backbone time"]}
    settings = {"dense": None, "fast": ToC3D.fast(), "faster, padded": ToC3D.faster(select="padded")}
    for name, method in settings.items():
        with torch.device("meta"):
            backbone = Backbone(**speed.TIMED, toc3d=method)
        assert rows[name]["tokens in MLPs, of 24000"] == sum(slots for slots, _ in backbone.mlp_tokens(20, 50))
    keeps_all = [row for row in results["accuracy"] if row["ratios"] == [1.0, 1.0, 1.0]]
    assert keeps_all and set(keeps_all[0]["tokens in MLP per block"]) == {72}
    assert results["environment"]["command"] and len(CLASSES) == 2
