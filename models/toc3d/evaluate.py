"""The trained detectors on scenes that they never saw: `python -m mmkv.models.toc3d.evaluate --work DIR`.

Dense against ToC3D: accuracy, how tokens under objects rank, tokens that enter each block's MLP, time of the backbone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mmkv.models.toc3d import speed, train
from mmkv.models.toc3d.backbone import Backbone
from mmkv.models.toc3d.detector import Detector, Found
from mmkv.models.toc3d.metrics import Sample, accuracy, ranking
from mmkv.models.toc3d.scenes import CLASSES, Frame, batch
from mmkv.tokens.toc3d import ToC3D
from mmkv.tokens.toc3d_selector import History, box_targets

TOP = 12  # detections of a frame that count


def load(work: Path, stage: str) -> Detector:
    """A trained detector, in eval mode."""
    detector = train.make_detector(train.STAGES[stage])
    detector.load_state_dict(torch.load(work / f"{stage}.pt")["model"])
    return detector.eval()


def with_settings(detector: Detector, toc3d: ToC3D) -> Detector:
    """The same detector under other settings, which must have the same scoring blocks and queries."""
    detector.backbone.toc3d = toc3d
    for selector in detector.backbone.selectors:
        selector.method = toc3d
    return detector


def other_scene(history: History) -> History:
    """Each sample gets the objects that the next sample of the batch remembers, as seen from its own ego."""
    pose = torch.linalg.inv(history.pose.roll(1, 0))
    local = history.points.roll(1, 0)[..., None, :] @ pose[..., :3, :3].mT + pose[..., None, :3, 3]
    points = local @ history.pose[..., :3, :3].mT + history.pose[..., None, :3, 3]
    return replace(
        history, queries=history.queries.roll(1, 0), points=points[..., 0, :], velocity=history.velocity.roll(1, 0)
    )


@torch.no_grad()
def run(detector: Detector, data: list[list[Frame]], memory=None) -> list[tuple[Frame, Found]]:
    """All frames of a batch of scenes, in order of time; `memory` may change the history before each frame but the first."""
    history, out = None, []
    for moment in zip(*data):
        frame = batch(list(moment))
        if history is not None and memory is not None:
            history = memory(history)
        found, history = detector(frame, history)
        out.append((frame, found))
    return out


def detections(frame: Frame, found: Found) -> list[Sample]:
    """The most confident ones of each scene."""
    out = []
    for logits, boxes, true, labels in zip(found.logits[-1], found.boxes[-1], frame.boxes, frame.labels):
        scores, label = logits.sigmoid().max(-1)
        best = scores.topk(TOP).indices
        arrays = (scores[best], label[best], boxes[best, :2], labels, true[:, :2])
        out.append(Sample(*(a.numpy() for a in arrays)))
    return out


def under_objects(frame: Frame, grid: tuple[int, int]) -> torch.Tensor:
    """fp32 `[B * V, H, W]`, 1 on patches under an object."""
    return box_targets([view for sample in frame.boxes2d for view in sample], grid, train.PATCH)


def ranks(moments: list[tuple[Frame, Found]]) -> list[float]:
    """Per scoring block, `ranking` over these frames."""
    target = torch.stack([under_objects(f, found.features.grid.shape[2:]) for f, found in moments])
    stages = zip(*(found.features.scores for _, found in moments))
    return [round(ranking(torch.stack(scores), target), 4) for scores in stages]


def kept_under_objects(moments: list[tuple[Frame, Found]]) -> list[dict]:
    """Per routed block, the share of tokens under objects that it runs, and of all tokens."""
    target = torch.stack([under_objects(f, found.features.grid.shape[2:]) for f, found in moments]) > 0
    rows = []
    for i, some in enumerate(moments[0][1].features.salient):
        if some is not None:
            salient = torch.stack([found.features.salient[i] for _, found in moments])
            shares = salient[target].float().mean(), salient.float().mean()
            rows.append({"block": i, "under objects": round(shares[0].item(), 4), "all": round(shares[1].item(), 4)})
    return rows


def count_mlp_tokens(backbone: Backbone, call) -> list[float]:
    """Rows that each block's MLP reads per image during `call`, counted by hooks."""
    counts, images = [0] * len(backbone.blocks), [0]

    def counting(i):
        def hook(_module, inputs):
            counts[i] += inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    hooks = [block.mlp.register_forward_pre_hook(counting(i)) for i, block in enumerate(backbone.blocks)]
    hooks.append(backbone.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0]))))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return [count / sum(images) for count in counts]


def accuracies(work: Path, data: list[list[Frame]]) -> list[dict]:
    """One row per detector and setting."""
    paddings = {"fast": replace(train.FAST, select="padded"), "faster": replace(train.FASTER, select="padded")}
    cases = [("dense", None), ("fast", train.FAST), ("faster", train.FASTER)]
    cases += [("fast", train.FASTER), ("fast", train.FAST.keeping_everything())]
    cases += [("fast", paddings["fast"]), ("faster", paddings["faster"])]
    rows = []
    for stage, toc3d in cases:
        detector = load(work, stage)
        if toc3d is not None:
            with_settings(detector, toc3d)
        moments = []
        tokens = count_mlp_tokens(detector.backbone, lambda d=detector, m=moments: m.extend(run(d, data)))
        own = detector.backbone.mlp_tokens(*moments[0][1].features.grid.shape[2:])
        row = {"trained as": stage, "ratios": toc3d and toc3d.ratios, "select": toc3d and toc3d.select}
        row |= {k: round(v, 4) for k, v in accuracy(sum((detections(*m) for m in moments), []), len(CLASSES)).items()}
        later = sum((detections(*m) for m in moments[1:]), [])
        row["mAP, frames with a history"] = round(accuracy(later, len(CLASSES))["mAP"], 4)
        forgets = run(detector, data, lambda history: replace(history, exists=torch.zeros_like(history.exists)))
        alone = sum((detections(*m) for m in forgets[1:]), [])
        row["the same, history taken away"] = round(accuracy(alone, len(CLASSES))["mAP"], 4)
        row["tokens in MLP per block"] = tokens
        row["real ones"] = [real for _, real in own]
        if tokens != [all_ for all_, _ in own]:
            raise AssertionError(f"counted {tokens} tokens, computed {own}")
        if toc3d is not None:
            row["kept"] = kept_under_objects(moments)
        rows.append(row)
        print(row, flush=True)
    return rows


def selector_ranks(work: Path, data: list[list[Frame]]) -> dict:
    """How ToC3D-Fast's scores rank tokens under objects: trained and not, with the right history and with another scene's."""
    torch.manual_seed(0)
    untrained = train.make_detector(train.FAST)
    untrained.load_state_dict(torch.load(work / "pretrain.pt")["model"], strict=False)
    detector = load(work, "fast")
    usual, swapped = run(detector, data), run(detector, data, other_scene)
    return {
        "untrained selectors": ranks(run(untrained.eval(), data)),
        "first frames (fallback scorer)": ranks(usual[:1]),
        "frames with a history": ranks(usual[1:]),
        "frames with another scene's history": ranks(swapped[1:]),
        "mean change of log p by another scene's history": changes(usual[1:], swapped[1:]),
    }


def changes(one: list[tuple[Frame, Found]], two: list[tuple[Frame, Found]]) -> list[float]:
    """Per scoring block, the mean difference of scores."""
    pairs = [zip(a.features.scores, b.features.scores) for (_, a), (_, b) in zip(one, two)]
    by_frame = [[(x - y).abs().mean().item() for x, y in pair] for pair in pairs]
    return [round(v, 4) for v in np.mean(by_frame, 0)]


def picture(work: Path, scene: list[Frame], path: Path, zoom: int = 3) -> None:
    """Kept tokens over the cameras, a row of views per frame: what the last block left out is dimmed, 2D boxes are framed."""
    moments = run(load(work, "fast"), [scene])
    strips = []
    for frame, found in moments:
        salient = found.features.salient[-1]
        views = []
        for image, kept, boxes in zip(frame.images[0], salient, frame.boxes2d[0]):
            bright = kept.repeat_interleave(train.PATCH, 0).repeat_interleave(train.PATCH, 1)
            pixels = ((image + 1) * 127.5) * torch.where(bright, 1.0, 0.3)
            view = Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())
            view = view.resize((view.width * zoom, view.height * zoom), Image.Resampling.NEAREST)
            draw = ImageDraw.Draw(view)
            for box in boxes.tolist():
                draw.rectangle([side * zoom for side in box], outline=(255, 255, 0))
            views.append(np.pad(np.array(view), ((2, 2), (2, 2), (0, 0)), constant_values=255))
        strips.append(np.concatenate(views, 1))
    Image.fromarray(np.concatenate(strips)).quantize(128).save(path, optimize=True)


def evaluate(work: Path, count: int = 100) -> dict:
    """All of it, on this many scenes."""
    data = train.scenes(work / f"test{count}.pt", range(train.TEST, train.TEST + count))
    return {
        "scenes": count,
        "frames": count * train.FRAMES,
        "accuracy": accuracies(work, data),
        "ranking per scoring block": selector_ranks(work, data),
        "backbone time": speed.times(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--scenes", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = evaluate(args.work, args.scenes)
    (args.work / "evaluate.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(
        args.work, train.scenes(args.work / "picture.pt", range(train.TEST, train.TEST + 1))[0], args.work / "kept.png"
    )


if __name__ == "__main__":
    main()
