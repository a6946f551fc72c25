"""ToC3D's motion-query-guided token selection: the last frame's object queries score the tokens of this frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mmkv.tokens.toc3d import ToC3D

OCTAVES = 6
MOTION = 15  # velocity 2, time 1, ego pose 3 x 4


@dataclass(eq=False)
class History:
    """Objects that a detector found in the last frame, the most confident first.

    Args:
        queries: `[B, M, D]`.
        points: `[B, M, 3]`, centres in global coordinates, m.
        velocity: `[B, M, 2]`, m/s along the axes of the ego of their own frame.
        time: `[B, M]`, s.
        pose: `[B, M, 4, 4]`, ego to global, of their own frame.
        exists: bool `[B]`, False where a sample starts a scene.
    """

    queries: torch.Tensor
    points: torch.Tensor
    velocity: torch.Tensor
    time: torch.Tensor
    pose: torch.Tensor
    exists: torch.Tensor

    def newest(self, count: int) -> History:
        """The `count` most confident objects."""
        if self.queries.shape[1] < count:
            raise ValueError(
                f"a history of {self.queries.shape[1]} queries; the selector needs {count}, keep that many"
            )
        parts = {name: value[:, :count] for name, value in vars(self).items() if name != "exists"}
        return History(**parts, exists=self.exists)

    def rows(self, which: torch.Tensor) -> History:
        """The samples at bool `[B]`."""
        return History(**{name: value[which] for name, value in vars(self).items()})


class MotionNorm(nn.Module):
    """A LayerNorm whose scale and shift come from a condition `[..., cond]`; at first scale 1 and shift 0."""

    def __init__(self, cond: int, dim: int):
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(cond, dim), nn.ReLU())
        self.gamma, self.beta = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for part, bias in ((self.gamma, 1.0), (self.beta, 0.0)):
            nn.init.zeros_(part.weight)
            nn.init.constant_(part.bias, bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        condition = self.reduce(condition)
        return self.gamma(condition) * F.layer_norm(x, x.shape[-1:]) + self.beta(condition)


def sine(position: torch.Tensor, dim: int) -> torch.Tensor:
    """`[..., dim]` of `[...]`: sin and cos in turn of 2 pi position / 10000^(2 i / dim)."""
    step = 10000 ** (2 * torch.arange((dim + 1) // 2, device=position.device, dtype=torch.float32) / dim)
    angle = 2 * math.pi * position[..., None].float() / step
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :dim]


def sine3d(points: torch.Tensor, dim: int) -> torch.Tensor:
    """`[..., 3 dim]` of points `[..., 3]` in [0, 1]: y, x, z (StreamPETR's order)."""
    return torch.cat([sine(points[..., axis], dim) for axis in (1, 0, 2)], -1)


def octaves(x: torch.Tensor, count: int = OCTAVES) -> torch.Tensor:
    """`[..., 2 count n]` of `[..., n]`: sin x, cos x, sin 2x, cos 2x, sin 4x ..."""
    return torch.cat([f(x * 2.0**i) for i in range(count) for f in (torch.sin, torch.cos)], -1)


def transform(points: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """Points `[..., M, 3]` by a rigid pose `[..., 4, 4]`."""
    return points @ pose[..., :3, :3].transpose(-1, -2) + pose[..., None, :3, 3]


class Selector(nn.Module):
    """Scores tokens by the last frame's queries, or by themselves where there is no last frame.

    Args:
        method: for `queries`, `noise` and `history`.
        dim: channels C of the tokens.
        query_dim: channels D of the queries, even.
        pc_range: x, y, z from and to, m, of the detector's space around the ego.
    """

    def __init__(self, method: ToC3D, dim: int, query_dim: int, pc_range: tuple[float, ...]):
        super().__init__()
        if query_dim < 2 or query_dim % 2:
            raise ValueError(f"query_dim {query_dim}; must be even, for as many sines as cosines")
        self.method = method
        self.register_buffer("pc_range", torch.tensor(pc_range, dtype=torch.float32), persistent=False)
        self.position = nn.Sequential(
            nn.Linear(query_dim * 3 // 2, query_dim), nn.ReLU(), nn.Linear(query_dim, query_dim)
        )
        self.position_motion = MotionNorm(2 * OCTAVES * MOTION, query_dim)
        self.query_motion = MotionNorm(2 * OCTAVES * MOTION, query_dim)
        self.time = nn.Sequential(nn.Linear(query_dim, query_dim), nn.LayerNorm(query_dim))
        self.project = nn.Linear(dim, query_dim)
        self.aggregate = nn.Linear(method.queries, 2)
        self.own = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.own_score = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def motion_queries(self, history: History, time: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
        """`[B, queries, D]`: the history's first queries, told where they are now and how they moved.

        Args:
            history: of M >= queries objects.
            time, pose: of this frame, `[B]` in s and `[B, 4, 4]` ego to global.
        """
        history = history.newest(self.method.queries)
        to_ego = torch.linalg.inv(pose.float())
        low, high = self.pc_range[:3], self.pc_range[3:]
        points = (transform(history.points.float(), to_ego) - low) / (high - low)
        velocity, age, old = history.velocity.float(), -history.time.float(), history.pose.float()
        if self.method.history == "aligned":
            age, old = age + time[:, None], to_ego[:, None] @ old
            velocity = (old[..., :2, :2] @ velocity[..., None])[..., 0]
        motion = octaves(torch.cat([velocity, age[..., None], old[..., :3, :].flatten(-2)], -1))
        dim = history.queries.shape[-1]
        position = self.position_motion(self.position(sine3d(points, dim // 2)), motion) + self.time(sine(age, dim))
        return self.query_motion(history.queries, motion) + position

    def by_queries(self, x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (keep, drop) `[B * V, N, 2]` of tokens `[B * V, N, C]` by queries `[B, Q, D]`."""
        queries = queries.repeat_interleave(x.shape[0] // queries.shape[0], 0)
        affinity = self.project(x) @ queries.transpose(1, 2) * queries.shape[-1] ** -0.5
        return self.aggregate(affinity).log_softmax(-1)

    def by_themselves(self, x: torch.Tensor) -> torch.Tensor:
        """The same without queries: half of the channels are the image's mean."""
        x = self.own(x)
        local, whole = x.split([x.shape[-1] // 2, x.shape[-1] - x.shape[-1] // 2], -1)
        return self.own_score(torch.cat([local, whole.mean(1, keepdim=True).expand_as(whole)], -1)).log_softmax(-1)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        history: History | None,
        time: torch.Tensor,
        pose: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the tokens of V views of each sample.

        Args:
            x: `[B * V, N, C]`, the views of a sample side by side.
            mask: `[B * V, N]` of the scoring before this, in [0, 1]; None for ones.
            history: of the last frame, None where no sample has one.
            time, pose: as in `motion_queries`.

        Returns:
            Log-probability to be kept `[B * V, N]`, and the mask `[B * V, N]` for the next scoring and the loss.

        Raises:
            ValueError: the images are not as many for each sample.
        """
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        exists = history.exists if history is not None else torch.zeros(len(time), dtype=torch.bool, device=x.device)
        views, left = divmod(x.shape[0], len(exists))
        if left or len(exists) != len(time):
            raise ValueError(
                f"{x.shape[0]} images, {len(exists)} histories, {len(time)} times; give as many views of each sample"
            )
        with_history = exists.repeat_interleave(views)
        log_p = x.new_zeros(*x.shape[:2], 2, dtype=torch.float32)
        if exists.any():
            queries = self.motion_queries(history.rows(exists), time[exists], pose[exists])
            log_p = log_p.index_put((with_history,), self.by_queries(x[with_history], queries.to(x.dtype)).float())
        if not exists.all():
            log_p = log_p.index_put((~with_history,), self.by_themselves(x[~with_history]).float())
        noisy = self.training or self.method.noise == "always"
        mask = F.gumbel_softmax(log_p, dim=-1) if noisy else log_p.exp()
        return log_p[..., 0], mask[..., 0]


def box_targets(boxes: list[torch.Tensor], grid: tuple[int, int], patch: int) -> torch.Tensor:
    """fp32 `[len(boxes), H, W]`: 1 on each patch that a box touches.

    Args:
        boxes: per view `[n, 4]`, left, top, right, bottom in px.
        grid: H, W in patches.
        patch: side, px.
    """
    targets = []
    for view in boxes:
        start = (view[:, :2] / patch).floor()[..., None]
        stop = (view[:, 2:] / patch).ceil()[..., None]
        rows, cols = (torch.arange(n, device=view.device) for n in grid)
        down = (rows >= start[:, 1]) & (rows < stop[:, 1])
        along = (cols >= start[:, 0]) & (cols < stop[:, 0])
        targets.append((down[:, :, None] & along[:, None, :]).any(0))
    return torch.stack(targets).float()


def selection_loss(masks: list[torch.Tensor], boxes: list[torch.Tensor], grid: tuple[int, int], patch: int):
    """Gaussian focal loss (alpha 2, gamma 4) of the scorings' masks `[B * V, N]` against the patches under 2D boxes, mean
    over tokens; see `box_targets`.
    """
    target = box_targets(boxes, grid, patch).flatten(1)
    p = torch.stack(masks).float().clamp(1e-6, 1 - 1e-6)
    foreground = -((1 - p) ** 2) * p.log() * target
    background = -(p**2) * (1 - p).log() * (1 - target) ** 4
    return (foreground + background).mean()
