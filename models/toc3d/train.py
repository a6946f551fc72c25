"""Train the small detector: `python -m mmkv.models.toc3d.train --work DIR`, again with the same DIR to resume.

As in the paper, a dense detector first; then ToC3D-Fast and -Faster are fine-tuned from it, and so is the dense one, for
as many steps, so that they compare. Minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from mmkv.models.toc3d.backbone import Backbone
from mmkv.models.toc3d.detector import Detector
from mmkv.models.toc3d.losses import detection_loss
from mmkv.models.toc3d.scenes import PC_RANGE, Frame, batch, make_scene
from mmkv.tokens.toc3d import ToC3D
from mmkv.tokens.toc3d_selector import selection_loss

PATCH = 8  # px
IMAGE = (48, 96)
FRAMES = 4
SCORING = (1, 3, 4)  # a quarter, half and three quarters of 6 blocks
QUERIES = 16
FAST = ToC3D.fast(scoring=SCORING, queries=QUERIES)
FASTER = ToC3D.faster(scoring=SCORING, queries=QUERIES)
STAGES = {"pretrain": None, "dense": None, "fast": FAST, "faster": FASTER}
RATES = {"pretrain": 1e-3, "dense": 4e-4, "fast": 4e-4, "faster": 4e-4}
SAVE_EVERY = 25  # steps
BATCH, SCENES, TEST = (
    8,
    600,
    100_000,
)  # scenes a step; training scenes; first seed of the scenes that are never trained on


def make_detector(toc3d: ToC3D | None = None) -> Detector:
    """The small detector, untrained: 6 x 64 EVA-02 blocks on 4 x 12 windows of 6 x 12 patches, 0.5 M parameters."""
    backbone = Backbone(
        IMAGE,
        PATCH,
        dim=64,
        depth=6,
        heads=2,
        window=4,
        global_window=None,
        toc3d=toc3d,
        query_dim=64,
        pc_range=PC_RANGE,
    )
    return Detector(backbone, dim=64, memory=QUERIES)


def scenes(path: Path, seeds: range) -> list[list[Frame]]:
    """Scenes of these seeds; drawn once, then read from the file."""
    if not path.exists():
        torch.save([[vars(frame) for frame in make_scene(seed, FRAMES)] for seed in seeds], path)
    return [[Frame(**frame) for frame in scene] for scene in torch.load(path)]


def loss_of(detector: Detector, found, frame: Frame) -> torch.Tensor:
    """The detector's loss, and with ToC3D the weighted selection loss."""
    loss, toc3d = detection_loss(found, frame), detector.backbone.toc3d
    if toc3d is not None:
        boxes = [view for sample in frame.boxes2d for view in sample]
        grid = found.features.grid.shape[2:]
        loss = loss + toc3d.loss_weight * selection_loss(found.features.masks, boxes, grid, PATCH)
    return loss


class Stage:
    """One run of training, from its last saved step on."""

    def __init__(self, name: str, work: Path, steps: int):
        torch.manual_seed(0)
        self.name, self.path, self.steps, self.done, self.log = name, work / f"{name}.pt", steps, 0, work / "train.log"
        self.detector = make_detector(STAGES[name])
        self.optimizer = torch.optim.AdamW(self.detector.parameters(), RATES[name], weight_decay=0.01)
        if self.path.exists():
            state = torch.load(self.path)
            self.done = state["done"]
            self.detector.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        elif name != "pretrain":
            # What is missing are the selectors, which start from scratch.
            self.detector.load_state_dict(torch.load(work / "pretrain.pt")["model"], strict=False)

    def save(self) -> None:
        state = dict(done=self.done, model=self.detector.state_dict(), optimizer=self.optimizer.state_dict())
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)  # whole, or not at all

    def run(self, data: list[list[Frame]]) -> None:
        losses, start = [], time.time()
        self.detector.train()
        while self.done < self.steps:
            losses.append(self.step(data))
            self.done += 1
            if self.done % SAVE_EVERY == 0 or self.done == self.steps:
                line = f"{self.name} step {self.done} loss {np.mean(losses):.3f} seconds {time.time() - start:.0f}"
                print(line, flush=True)
                with self.log.open("a") as file:
                    file.write(line + "\n")
                losses = []
                self.save()

    def step(self, data: list[list[Frame]]) -> float:
        """One batch of scenes, an update per frame; the history flows from frame to frame, gradients do not."""
        rng = np.random.default_rng([list(STAGES).index(self.name), self.done])
        torch.manual_seed(int(rng.integers(2**31)))  # of the Gumbel noise, so that resuming changes nothing
        picked = [data[i] for i in rng.integers(0, len(data), BATCH)]
        warm = min(1, (self.done + 1) / 50)
        rate = RATES[self.name] * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * self.done / self.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        history, total = None, 0.0
        for moment in zip(*picked):
            frame = batch(list(moment))
            found, history = self.detector(frame, history)
            loss = loss_of(self.detector, found, frame)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.detector.parameters(), 5.0)
            self.optimizer.step()
            total += loss.item() / len(picked[0])
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--steps", type=int, default=500, help="of 8 scenes, for the dense detector")
    parser.add_argument("--finetune", type=int, default=150, help="steps of each fine-tuning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    data = scenes(args.work / "scenes.pt", range(SCENES))
    for name in STAGES:
        Stage(name, args.work, args.steps if name == "pretrain" else args.finetune).run(data)


if __name__ == "__main__":
    main()
