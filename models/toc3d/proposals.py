"""Queries from the images: tokens that look like an object's centre, at the depth they tell (Far3D, arXiv 2308.09616)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mmkv.models.toc3d.scenes import Frame
from mmkv.tokens.toc3d_selector import transform

FIRST_DEPTH = 6.0  # m, before training


@dataclass(eq=False)
class Proposed:
    """What each token says.

    Args:
        logits: `[B, V, H, W, classes]`, that an object's centre lies in its patch.
        offset: `[B, V, H, W, 3]`, from the patch's centre to it, in patches right and down, and log depth.
    """

    logits: torch.Tensor
    offset: torch.Tensor


class Proposals(nn.Module):
    """Finds centres in the image plane, and lifts the best to queries.

    Args:
        dim: channels of tokens and queries.
        count: queries of a sample.
        classes: how many.
    """

    def __init__(self, dim: int, count: int, classes: int):
        super().__init__()
        self.count = count
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, classes + 3))
        with torch.no_grad():
            self.head[-1].bias[:classes] = -4.0  # few tokens are centres
            self.head[-1].bias[-1] = torch.tensor(FIRST_DEPTH).log()
        self.content = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor, frame: Frame) -> tuple[Proposed, torch.Tensor, torch.Tensor]:
        """Tokens `[B, V, H, W, D]`: what they say, and the best ones' content `[B, count, D]` and points `[B, count, 3]` in m."""
        logits, offset = self.head(tokens).tensor_split([-3], -1)
        peak = logits.detach().amax(-1)
        around = F.max_pool2d(peak, 3, stride=1, padding=1)
        peak = torch.where(peak == around, peak, peak - 20)  # a neighbour of a better one comes last
        best = peak.flatten(1).topk(min(self.count, peak[0].numel())).indices[..., None]
        points = lift(offset.detach(), frame).flatten(1, 3)
        content = self.content(tokens.flatten(1, 3))
        return (
            Proposed(logits, offset),
            content.gather(1, best.expand(-1, -1, content.shape[-1])),
            points.gather(1, best.expand(-1, -1, 3)),
        )


def pixels(frame: Frame, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of the patches `[H, W, 2]` (right, down), and a patch's size `[2]`, px."""
    height, width = frame.images.shape[-2:]
    size = frame.images.new_tensor([width / grid[1], height / grid[0]])
    down, right = torch.meshgrid(*(torch.arange(n, device=size.device) + 0.5 for n in grid), indexing="ij")
    return torch.stack([right, down], -1) * size, size


def lift(offset: torch.Tensor, frame: Frame) -> torch.Tensor:
    """`[B, V, H, W, 3]` in ego axes, m, of `Proposed.offset`."""
    centre, size = pixels(frame, offset.shape[2:4])
    at = centre + offset[..., :2] * size
    depth = offset[..., 2:].clamp(max=6).exp()
    rays = torch.cat([at, torch.ones_like(depth)], -1).flatten(2, 3) @ torch.linalg.inv(frame.intrinsics).mT
    return transform(rays * depth.flatten(2, 3), frame.camera).view_as(offset)


def project(points: torch.Tensor, frame: Frame, sample: int) -> torch.Tensor:
    """`[V, n, 3]`: where points `[n, 3]` of one sample lie in its views: px right, px down, depth in m."""
    in_camera = transform(points, torch.linalg.inv(frame.camera[sample]))
    seen = in_camera @ frame.intrinsics[sample].mT
    return torch.cat([seen[..., :2] / seen[..., 2:].clamp(min=1e-3), in_camera[..., 2:]], -1)


def proposal_loss(said: Proposed, frame: Frame, focal) -> torch.Tensor:
    """2 x focal loss on centres + L1 on offsets and log depth, per object seen in a view."""
    grid = said.logits.shape[2:4]
    height, width = frame.images.shape[-2:]
    centre, size = pixels(frame, grid)
    target = torch.zeros_like(said.logits)
    far, seen = said.offset.new_zeros(()), 0
    for i, (boxes, labels) in enumerate(zip(frame.boxes, frame.labels)):
        at = project(boxes[:, :3], frame, i)
        inside = (at[..., 0] >= 0) & (at[..., 0] < width) & (at[..., 1] >= 0) & (at[..., 1] < height)
        view, which = torch.nonzero(inside & (at[..., 2] > 0.1), as_tuple=True)
        at = at[view, which]
        col, row = (at[:, :2] / size).long().unbind(-1)
        target[i, view, row, col, labels[which]] = 1
        truth = torch.cat([(at[:, :2] - centre[row, col]) / size, at[:, 2:].log()], -1)
        far = far + (said.offset[i, view, row, col] - truth).abs().sum()
        seen += len(view)
    return (2 * focal(said.logits, target).sum() + far) / max(1, seen)
