"""A compact multi-view temporal 3D detector: object queries read all cameras, and the best of them go on to the next frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mmkv.models.toc3d.backbone import Backbone, Features
from mmkv.models.toc3d.proposals import Proposals, Proposed, pixels
from mmkv.models.toc3d.scenes import CLASSES, PC_RANGE, Frame
from mmkv.tokens.toc3d_selector import MOTION, OCTAVES, History, MotionNorm, octaves, sine3d, transform

CODE = 10  # centre 3, log size 3, sin and cos of yaw, velocity 2
NEAR = 1.0  # m, first depth of the position embedding


@dataclass(eq=False)
class Found:
    """Objects of a frame, in ego axes, m and s.

    Args:
        logits: `[layers, B, Q, classes]`.
        boxes: `[layers, B, Q, 10]`: centre, log size, sin and cos of yaw, velocity.
        proposed: what the tokens said.
        features: of the backbone.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    proposed: Proposed
    features: Features


class DecoderLayer(nn.Module):
    """Queries read each other and the tokens of all views."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.among = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.across = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, place, tokens, token_place):
        y = self.norms[0](x)
        x = x + self.among(y + place, y + place, y, need_weights=False)[0]
        y = self.norms[1](x)
        x = x + self.across(y + place, tokens + token_place, tokens, need_weights=False)[0]
        return x + self.mlp(self.norms[2](x))


class Detector(nn.Module):
    """Detects objects in the frames of a scene, one frame a call; in the manner of StreamPETR (arXiv 2303.11926), small.

    Args:
        backbone: of the images; its ToC3D settings must ask for at most `memory` queries.
        dim: channels of the queries, even.
        queries: learned ones.
        proposals: queries from tokens of this frame.
        memory: objects of the last frame that become queries of this one, beside the others.
        layers, heads: of the decoder.
        depths: points along each token's ray in its position embedding.
        classes: how many.
        pc_range: x, y, z from and to, m.
    """

    def __init__(
        self,
        backbone: Backbone,
        dim: int = 64,
        queries: int = 8,
        proposals: int = 24,
        memory: int = 16,
        layers: int = 2,
        heads: int = 4,
        depths: int = 8,
        classes: int = len(CLASSES),
        pc_range: tuple[float, ...] = PC_RANGE,
    ):
        super().__init__()
        if backbone.toc3d is not None and backbone.toc3d.queries > memory:
            raise ValueError(f"ToC3D scores by {backbone.toc3d.queries} queries; the memory of {memory} must hold them")
        for selector in backbone.selectors:
            if selector.project.out_features != dim:
                raise ValueError(
                    f"dim {dim}; the backbone's selectors expect queries of {selector.project.out_features}"
                )
        self.backbone, self.memory = backbone, memory
        self.register_buffer("pc_range", torch.tensor(pc_range), persistent=False)
        depth = torch.linspace(0, 1, depths) ** 2 * (pc_range[3] - NEAR) + NEAR  # closer together when near
        self.register_buffer("depths", depth, persistent=False)
        self.neck = nn.Linear(backbone.dim, dim)
        self.proposals = Proposals(dim, proposals, classes)
        self.token_place = nn.Sequential(nn.Linear(3 * depths, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.anchors = nn.Parameter(
            torch.rand(queries + memory, 3) * 2 - 1
        )  # of samples without a history, all of them
        self.content = nn.Parameter(torch.zeros(queries + memory, dim))
        self.place = nn.Sequential(nn.Linear(dim * 3 // 2, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.motion = MotionNorm(2 * OCTAVES * MOTION, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, classes)
        self.regress = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, CODE))
        nn.init.constant_(self.classify.bias, -4.0)  # few queries are objects

    def forward(self, frame: Frame, history: History | None = None) -> tuple[Found, History]:
        """A batch of frames and the history that the call before returned, None at the start of all scenes; its `exists` is to
        be set to False where a sample starts a new one.

        Returns:
            What was found, and the history for the next frame, without gradients.
        """
        views = frame.images.shape[1]
        features = self.backbone(frame.images.flatten(0, 1), history, frame.time, frame.pose)
        grid = self.neck(features.grid.permute(0, 2, 3, 1)).unflatten(0, (-1, views))
        tokens, token_place = grid.flatten(1, 3), self.token_place(self.rays(frame, grid.shape[2:4])).flatten(1, 2)
        proposed, content, centres = self.proposals(grid, frame)
        x, points = self.start(frame, history)
        x, points = torch.cat([content, x], 1), torch.cat([self.shares(centres), points], 1)
        logits, boxes = [], []
        for layer in self.layers:
            place = self.place(sine3d(points.sigmoid(), x.shape[-1] // 2))
            x = layer(x, place, tokens, token_place)
            out = self.norm(x)
            code = self.regress(out)
            points = points + code[..., :3]
            logits.append(self.classify(out))
            boxes.append(torch.cat([self.metres(points), code[..., 3:]], -1))
            points = points.detach()
        found = Found(torch.stack(logits), torch.stack(boxes), proposed, features)
        return found, self.remember(x, found, frame)

    def start(self, frame: Frame, history: History | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[B, Q, D]` and their points before the sigmoid `[B, Q, 3]`: the last frame's objects moved on to this
        frame, in place of the last anchors where there is a history.
        """
        count = len(frame.time)
        x, points = self.content.expand(count, -1, -1), self.anchors.expand(count, -1, -1)
        if history is None:
            return x, points
        age = frame.time[:, None] - history.time
        to_ego = torch.linalg.inv(frame.pose)
        old = to_ego[:, None] @ history.pose
        velocity = (old[..., :2, :2] @ history.velocity[..., None])[..., 0]
        centre = transform(history.points, to_ego)
        centre = torch.cat([centre[..., :2] + age[..., None] * velocity, centre[..., 2:]], -1)
        motion = octaves(torch.cat([velocity, age[..., None], old[..., :3, :].flatten(-2)], -1))
        new = self.motion(history.queries, motion), self.shares(centre)
        exists = history.exists[:, None, None]
        return tuple(
            torch.cat([a[:, : -self.memory], torch.where(exists, b, a[:, -self.memory :])], 1)
            for a, b in zip((x, points), new)
        )

    def rays(self, frame: Frame, grid: tuple[int, int]) -> torch.Tensor:
        """`[B, V, H * W, 3 * depths]`: points along the ray through each patch's centre, in shares of the detector's space."""
        centre, _ = pixels(frame, grid)
        at = torch.cat([centre, torch.ones_like(centre[..., :1])], -1).view(-1, 3)
        rays = F.normalize(at @ torch.linalg.inv(frame.intrinsics).mT, dim=-1)
        points = transform((rays[..., None, :] * self.depths[:, None]).flatten(2, 3), frame.camera)
        low, high = self.pc_range[:3], self.pc_range[3:]
        return ((points - low) / (high - low)).unflatten(2, (-1, len(self.depths))).flatten(-2)

    def shares(self, points: torch.Tensor) -> torch.Tensor:
        """The inverse of `metres`, for points inside the detector's space; others go to its border."""
        low, high = self.pc_range[:3], self.pc_range[3:]
        return ((points - low) / (high - low)).clamp(1e-3, 1 - 1e-3).logit()

    def metres(self, points: torch.Tensor) -> torch.Tensor:
        """Points before the sigmoid `[..., 3]` in m."""
        low, high = self.pc_range[:3], self.pc_range[3:]
        return points.sigmoid() * (high - low) + low

    @torch.no_grad()
    def remember(self, x: torch.Tensor, found: Found, frame: Frame) -> History:
        """The `memory` most confident objects."""
        best = found.logits[-1].amax(-1).sort(dim=-1, descending=True, stable=True).indices[:, : self.memory, None]

        def pick(values):
            return values.gather(1, best.expand(-1, -1, values.shape[-1]))

        boxes = pick(found.boxes[-1])
        return History(
            pick(x),
            transform(boxes[..., :3], frame.pose),
            boxes[..., 8:],
            frame.time[:, None].expand(-1, self.memory),
            frame.pose[:, None].expand(-1, self.memory, -1, -1),
            torch.ones(len(frame.time), dtype=torch.bool, device=x.device),
        )
